"""Clipping, integer quantisation, discrete noise, the ledger, and the sums that hide their terms.

Knows arrays and byte strings; never messages, devices or networks.
"""
