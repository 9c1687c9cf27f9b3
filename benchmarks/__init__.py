"""One program per claim about speed or size, with its peers measured in the same run.

``python -m benchmarks.<name> [--json]`` from a checkout; not part of the installed package.
"""
