"""Where things lie in the agent's data directory, and who may use it now."""

import errno
import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Self

from atoll.edge_agent.errors import AlreadyRunning, DataUnwritable, DiskFull

VARIABLE: Final = "ATOLL_AGENT_DATA"


@dataclass(frozen=True, slots=True)
class Paths:
    """The layout under one data directory."""

    data: Path

    @property
    def identity(self) -> Path:
        """Keys, certificates and what the hub told at enrolment."""
        return self.data / "identity"

    @property
    def database(self) -> Path:
        """Outbox and settings, SQLite."""
        return self.data / "agent.db"

    @property
    def models(self) -> Path:
        """Two slots per model."""
        return self.data / "models"

    @property
    def tuf(self) -> Path:
        """Trusted metadata and partial downloads."""
        return self.data / "tuf"

    @property
    def examples(self) -> Path:
        """This device's own data, which a task reads and which never leaves."""
        return self.data / "data"

    @property
    def kept(self) -> Path:
        """What training carries from round to round; of the latest runs, and it never leaves."""
        return self.data / "kept"

    @property
    def lock(self) -> Path:
        """Held by the running agent."""
        return self.data / "agent.lock"


def default_data(environ: Mapping[str, str], *, root: bool) -> Path:
    """Return the data directory to use when none is given."""
    if chosen := environ.get(VARIABLE):
        return Path(chosen)
    if root:
        return Path("/var/lib/atoll-agent")
    return Path(environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "atoll/agent"


def translate(error: OSError, path: Path) -> DiskFull | DataUnwritable:
    """Return the error to raise for a failed write under ``path``."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull(path)
    return DataUnwritable(path, error.strerror or str(error))


def make(path: Path) -> None:
    """Create a private directory; raise :class:`DataUnwritable` or :class:`DiskFull`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise translate(error, path) from error


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush a directory and everything in it to the disk."""
    for inner in sorted(path.rglob("*")):
        sync(inner)
    sync(path)


class Lock:
    """The data directory's lock: one agent at a time. The kernel frees it when we die."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        make(self._paths.data)
        try:
            file = self._paths.lock.open("a")
        except OSError as error:
            raise translate(error, self._paths.data) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise AlreadyRunning(self._paths.data) from None
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def running(paths: Paths) -> bool:
    """Tell whether an agent holds the data directory now."""
    if not paths.lock.exists():
        return False
    try:
        with Lock(paths):
            return False
    except AlreadyRunning:
        return True
