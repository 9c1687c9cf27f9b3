"""Ends the hub's children when the hub is gone; see :mod:`atoll.server.supervisor`.

Run as a program, ``python guard.py <mark>``: reads standard input until its end, which comes
when the hub has closed it or died, then ends what carries the mark. Standard library alone,
so that it starts without site-packages and stays small.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

MARK: Final = "ATOLL_SUPERVISOR"
"""The environment variable that children inherit."""

_POLL: Final = 0.05


def marked(mark: str) -> list[int]:
    """Return the ids of the processes started with the mark, zombies aside."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal() and int(directory.name) != os.getpid():
            with suppress(OSError):  # it ended meanwhile, or is another user's
                if wanted in (directory / "environ").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
    return found


def end_marked(mark: str, grace: float) -> None:
    """End the marked processes: SIGTERM, and SIGKILL after ``grace`` seconds."""
    deadline = time.monotonic() + grace
    asked: set[int] = set()
    while found := marked(mark):
        force = time.monotonic() > deadline
        for pid in found:
            if force or pid not in asked:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if force else signal.SIGTERM)
                asked.add(pid)
        time.sleep(_POLL)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_marked(sys.argv[1], grace=5.0)
