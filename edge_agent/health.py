"""How the device is, in the numbers of :class:`atoll.fleet.wire.Health`."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil


def resident(pids: Mapping[str, int]) -> dict[str, int]:
    """Return resident bytes per named process; one that is gone is left out."""
    sizes: dict[str, int] = {}
    for name, pid in pids.items():
        try:
            sizes[name] = int(psutil.Process(pid).memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return sizes


def disk_free(path: Path) -> int:
    """Return the bytes that may still be written to the disk that holds ``path``."""
    return shutil.disk_usage(path).free
