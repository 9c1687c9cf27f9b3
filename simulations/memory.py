"""How much memory a simulation took: this process, and what its workers did not share with it."""

import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_KIB = 1024


def peak() -> int:
    """Return the most bytes that this process has occupied."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * _KIB  # Linux counts in KiB


def own_peak(pid: int) -> int:
    """Return the most bytes that a process of Linux has had to itself, 0 where that is not told.

    Pages that it shares with the process which forked it are not among them until either writes
    to them. Private pages are counted as they are, and with them what it has given back since it
    occupied most; what it gave back was its own.
    """
    process = Path(f"/proc/{pid}")
    with suppress(OSError):
        now = _sum(process / "smaps_rollup", ("Private_Clean", "Private_Dirty"))
        given_back = _sum(process / "status", ("VmHWM",)) - _sum(process / "status", ("VmRSS",))
        return now + max(given_back, 0)
    return 0


def _sum(file: Path, names: Iterable[str]) -> int:
    """Return the bytes that a file of ``Name:  n kB`` lines has for ``names``."""
    said = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return sum(int(said[name].split()[0]) for name in names if name in said) * _KIB
