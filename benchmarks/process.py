"""CPU time and memory of the running process, as Linux counts them, or of one of its own.

CPU time and not the clock's, because a benchmark shares its machine. Resident memory and not
``tracemalloc``'s, because half of it belongs to libraries that Python does not see.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")


def cpu_time(function: Callable[[], T]) -> tuple[T, float]:
    """Return what ``function`` returns, and the seconds that all threads worked for it."""
    began = time.process_time()
    result = function()
    return result, time.process_time() - began


def least_cpu_time(function: Callable[[], T], repeats: int) -> tuple[T, float]:
    """Return the last result of ``repeats`` calls, and the least seconds that one took."""
    result, least = cpu_time(function)
    for _ in range(repeats - 1):
        result, seconds = cpu_time(function)
        least = min(least, seconds)
    return result, least


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Return what ``function`` returns in a fresh process; both must be importable by name."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def resident() -> int:
    """Return how many bytes of memory the process occupies now."""
    return _status("VmRSS")


def peak(function: Callable[[], T]) -> tuple[T, int]:
    """Return what ``function`` returns, and the most bytes the process occupied meanwhile."""
    _CLEAR.write_text("5")  # proc(5): resets VmHWM
    result = function()
    return result, _status("VmHWM")


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} does not say {name}")
