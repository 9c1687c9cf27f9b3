"""The programs that run beside the hub: started, watched, started again, never left behind.

A :class:`Supervisor` starts children (:class:`Child`: broker, SuperLink, executor), waits
until each answers on its port, writes what they say to ``<logs>/<name>.log``, and starts one
that dies again after a pause that doubles. Use it as a context manager::

    with Supervisor(data / "logs") as supervisor:
        supervisor.start(broker.child())          # raises ChildFailed or PortTaken
        supervisor.signal("broker", signal.SIGHUP)

**Nothing is left behind.** Every child is a session of its own, so Ctrl-C in a terminal
reaches the hub alone, which stops the children in reverse order on its way out. Should the
hub be killed outright (``kill -9``, out of memory), a guard does it: a small process that
holds the read end of a pipe, sees end-of-file when the hub is gone however it went, and ends
every process that carries this supervisor's mark in its environment. The mark is inherited,
so grandchildren in sessions of their own are found too, and so is a child that was started
in the instant before the hub died. ``PR_SET_PDEATHSIG`` would not do: it reaches children
alone, is forgotten at a set-uid exec, and fires when the starting *thread* ends.
"""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from atoll.server.errors import CannotStart, PortTaken
from atoll.server.guard import MARK, end_marked

log = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
STEADY: Final = 60.0
"""Seconds after which a child counts as well, and its next pause is the first one again."""
SETTLE: Final = 0.3
"""Seconds that a child without a port must run to count as started."""
LOG_BYTES: Final = 10 * 1024 * 1024
LAST_LINES: Final = 5
LAST_BYTES: Final = 2048

_POLL: Final = 0.05


class Address(NamedTuple):
    """Where something listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Child:
    """A program to keep running."""

    name: str
    """Names its log file; lower-case letters, digits and ``-``."""
    command: Sequence[str]
    ready: Address | None = None
    """It is up when this accepts connections; none: when it has not ended at once."""
    ready_timeout: float = 30.0
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set on top of the hub's own."""
    directory: Path | None = None
    grace: float = 5.0
    """Seconds between SIGTERM and SIGKILL."""
    port_option: str = ""
    """The option that moves ``ready``, named to a user whose port is taken."""


class ChildFailed(CannotStart):
    """A child ended, or did not answer, while it was being started."""

    code = "child-failed"


class Supervisor:
    """Keeps children running until it is closed. Methods may be called from any thread.

    ``restarted`` is called (from a thread of the supervisor's) with a child's name each time
    it is up again after it died, so that what it had been told can be told again.
    """

    def __init__(self, logs: Path, restarted: Callable[[str], None] | None = None) -> None:
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._logs = logs
        self._restarted = restarted
        self._mark = secrets.token_hex(16)
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        self._guard = _start_guard(self._mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, child: Child) -> None:
        """Start ``child`` and return when it is up.

        Raises :class:`PortTaken` when something else listens on its port, and
        :class:`ChildFailed` with the last lines of its log when it ends at once or is not up
        in time; it is not running then.
        """
        if child.ready is not None and is_open(child.ready):
            raise PortTaken(
                f"port {child.ready.port} is in use by another program, and the {child.name} "
                "needs it",
                f"end that program or choose another port with {child.port_option}"
                if child.port_option
                else "end that program, or a hub that still runs",
            )
        kept = _Kept(child, self._logs / f"{child.name}.log", self._mark, self._restarted)
        with self._lock:
            if child.name in self._kept:
                raise ValueError(f"a child called {child.name!r} is already kept")
            self._kept[child.name] = kept
        try:
            kept.start()
        except BaseException:
            with self._lock:
                del self._kept[child.name]
            kept.stop()
            raise

    def stop(self, name: str) -> None:
        """End a child for good; nothing happens when there is none of that name."""
        with self._lock:
            kept = self._kept.pop(name, None)
        if kept is not None:
            kept.stop()

    def pid(self, name: str) -> int | None:
        """Return a child's process id, or none while it is down."""
        with self._lock:
            kept = self._kept.get(name)
        return kept.pid if kept is not None else None

    def signal(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a child; false when it is down."""
        pid = self.pid(name)
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def running(self) -> dict[str, bool]:
        """Tell of each child whether it runs now."""
        with self._lock:
            return {name: kept.pid is not None for name, kept in self._kept.items()}

    def close(self) -> None:
        """End all children, the last one started first, and whatever they left."""
        with self._lock:
            kept, self._kept = list(self._kept.values()), {}
        for one in reversed(kept):
            one.stop()
        end_marked(self._mark, grace=1.0)
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._guard.wait()


class _Kept:
    """One child, its process and the thread that watches it."""

    def __init__(
        self, child: Child, log_file: Path, mark: str, restarted: Callable[[str], None] | None
    ) -> None:
        self._child = child
        self._log = log_file
        self._mark = mark
        self._restarted = restarted
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._stopping = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch, name=f"watch-{child.name}", daemon=True
        )

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        self._process = self._spawn()
        self._wait_until_ready(self._process)
        self._watcher.start()

    def stop(self) -> None:
        self._stopping.set()
        while True:
            if self._process is not None:
                _end(self._process, self._child.grace)
            if not self._watcher.is_alive():
                return
            self._watcher.join(_POLL)  # it may have been starting the child again just now

    def _spawn(self) -> subprocess.Popen[bytes]:
        with suppress(FileNotFoundError):
            if self._log.stat().st_size > LOG_BYTES:
                self._log.replace(self._log.with_suffix(".log.1"))
        with self._log.open("ab") as output:
            self._log_start = output.tell()
            try:
                return subprocess.Popen(
                    self._child.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self._child.environment, MARK: self._mark},
                    cwd=self._child.directory,
                    start_new_session=True,
                )
            except OSError as error:
                raise ChildFailed(
                    f"the {self._child.name} cannot be started: {error.strerror}: "
                    f"{self._child.command[0]}"
                ) from error

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        deadline = began + self._child.ready_timeout
        while not self._stopping.is_set():
            if process.poll() is not None:
                raise self._failure(f"ended at once ({_how(process.returncode)})")
            if self._child.ready is None:
                if time.monotonic() > began + SETTLE:
                    return
            elif is_open(self._child.ready):
                return
            if time.monotonic() > deadline:
                raise self._failure(f"did not answer on {self._child.ready} in time")
            self._stopping.wait(_POLL)

    def _failure(self, what: str) -> ChildFailed:
        said = last_lines(self._log, since=self._log_start)
        return ChildFailed(
            f"the {self._child.name} {what}" + (f"; it said: {said}" if said else ""),
            f"all it said is in {self._log}",
        )

    def _watch(self) -> None:
        pause = FIRST_PAUSE
        began = time.monotonic()
        while self._process is not None:
            code = self._process.wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - began > STEADY:
                pause = FIRST_PAUSE
            log.warning(
                "the %s ended (%s); starting it again in %.1f s",
                self._child.name,
                _how(code),
                pause,
            )
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE)
            began = time.monotonic()
            self._again()

    def _again(self) -> None:
        try:
            self._process = self._spawn()
            self._wait_until_ready(self._process)
        except ChildFailed as error:
            log.warning("%s", error)
            if self._process is not None:
                _end(self._process, self._child.grace)
        else:
            if self._restarted is not None and not self._stopping.is_set():
                self._restarted(self._child.name)


def is_open(address: Address, timeout: float = 1.0) -> bool:
    """Tell whether something accepts connections there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address.host, address.host)  # noqa: S104 -- asked, not bound
    try:
        with socket.create_connection((host, address.port), timeout):
            return True
    except OSError:
        return False


def last_lines(path: Path, since: int = 0) -> str:
    """Return the last lines of a log after ``since`` bytes, on one line."""
    try:
        with path.open("rb") as file:
            file.seek(max(since, path.stat().st_size - LAST_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the process's group to end, then make it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            return


def _how(code: int) -> str:
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def _start_guard(mark: str) -> subprocess.Popen[bytes]:
    # Isolated, so that nothing of the user's can keep it from starting; and without our own
    # environment, so that the guard of a supervisor above us does not take it for one of ours.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},
        start_new_session=True,
    )
