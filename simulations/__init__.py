"""Fleets, data and scenarios made of the real parts, on one machine."""
