"""Child processes that end with us, whatever happens to us.

Each child talks in JSON lines: commands on its stdin, messages on its stdout (stderr is the
log). A child reads end-of-file on stdin as "stop", so even after our SIGKILL none stays. It
runs in a session of its own: Ctrl-C reaches us alone, and we end it in order.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

STOP_SECONDS: Final = 8.0
KILL_SECONDS: Final = 3.0


class Said(NamedTuple):
    """A message from a child."""

    child: str
    pid: int
    message: dict[str, Any]


class Ended(NamedTuple):
    """A child ended; ``how`` says in words."""

    child: str
    pid: int
    how: str


class Process:
    """A running child."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        emit: Callable[[Said | Ended], object],
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
            start_new_session=True,
            env={**os.environ, **environment},
            cwd=Path("/"),
        )
        self.pid = self._process.pid
        self.started = time.monotonic()
        self._emit = emit
        self._thread = threading.Thread(target=self._listen, name=name, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        stream = self._process.stdout
        if stream is not None:
            with stream:
                for line in stream:
                    try:
                        message = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(message, dict):
                        self._emit(Said(self.name, self.pid, message))
        self._emit(Ended(self.name, self.pid, describe(self._process.wait())))

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a command; one to a child that just died is lost, and ``Ended`` follows."""
        stream = self._process.stdin
        if stream is None or stream.closed:
            return
        try:
            stream.write(json.dumps(message).encode() + b"\n")
            stream.flush()
        except OSError:
            return

    def stop(self) -> None:
        """Ask it to end, and insist after a while; returns at once, :class:`Ended` follows."""
        stream = self._process.stdin
        if stream is None or stream.closed:
            return
        with contextlib.suppress(OSError):  # it has just ended, and what we wrote is lost
            stream.close()
        threading.Thread(target=self.wait, name=f"end-{self.name}", daemon=True).start()

    def wait(self) -> None:
        """Wait for its end, and insist."""
        for patience, insist in ((STOP_SECONDS, signal.SIGTERM), (KILL_SECONDS, signal.SIGKILL)):
            try:
                self._process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(insist)
        self._process.wait()
        self._thread.join(KILL_SECONDS)


def describe(code: int) -> str:
    """Say how a process ended."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "ended" if code == 0 else f"failed with exit status {code}"
