"""The device's SQLite file: opening it, and its two small tables.

Plain ``sqlite3``: importing ``sqlite_utils`` also imports numpy (and pandas where installed),
15 MB more in a process of 26 MB that only needs short transactions.

WAL, so that the serving process writes while the control process reads. ``synchronous=FULL``:
with NORMAL a power cut may undo the last commits, so a message that the caller was told is
safe would be gone. That costs one fsync per message, at a few messages a minute.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from atoll.edge_agent.errors import AgentError, DataUnwritable, DiskFull

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS counters (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    boot INTEGER NOT NULL, seq INTEGER NOT NULL,
    bytes INTEGER NOT NULL, dropped INTEGER NOT NULL
) STRICT;
INSERT OR IGNORE INTO counters VALUES (1, 0, 0, 0, 0);
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    boot INTEGER NOT NULL, seq INTEGER NOT NULL, priority INTEGER NOT NULL,
    leaf TEXT NOT NULL, payload BLOB NOT NULL,
    UNIQUE (boot, seq)
) STRICT;
CREATE INDEX IF NOT EXISTS outbox_order ON outbox (priority, id);
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""

_Value = TypeVar("_Value")


class Database:
    """One connection, shared by the threads of one process."""

    def __init__(self, path: Path) -> None:
        """Open and create; raise :class:`DataUnwritable` or :class:`DiskFull`."""
        self.path = path
        self._lock = threading.Lock()
        with self._translated():
            self._connection = sqlite3.connect(
                path, isolation_level=None, timeout=20, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA cache_size=-256")
        if self._connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            with self.transaction() as rows:
                for statement in _SCHEMA.split(";"):
                    rows.execute(statement)
                rows.execute("PRAGMA user_version=1")
        path.chmod(0o600)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_FULL:
                raise DiskFull(self.path) from error
            raise DataUnwritable(self.path, str(error)) from error
        except sqlite3.DatabaseError as error:
            raise AgentError(
                f"{self.path} is damaged ({error}): move it away and start again; messages that "
                "waited in it are lost"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one write transaction.

        Raises :class:`DiskFull` or :class:`DataUnwritable`; nothing is written then.
        """
        with self._lock, self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def query(self, sql: str, *arguments: object) -> list[tuple[object, ...]]:
        """Read rows."""
        with self._lock, self._translated():
            return self._connection.execute(sql, arguments).fetchall()

    def get(self, key: str, kind: type[_Value]) -> _Value | None:
        """Return a setting, or none when it was never set or is of an older shape."""
        rows = self.query("SELECT value FROM settings WHERE key = ?", key)
        if not rows:
            return None
        try:
            return msgspec.msgpack.decode(msgspec.convert(rows[0][0], bytes), type=kind)
        except msgspec.DecodeError:
            return None

    def put(self, key: str, value: object) -> None:
        """Set a setting, durably; ``None`` removes it."""
        with self.transaction() as rows:
            if value is None:
                rows.execute("DELETE FROM settings WHERE key = ?", (key,))
            else:
                rows.execute(
                    "INSERT OR REPLACE INTO settings VALUES (?, ?)",
                    (key, msgspec.msgpack.encode(value)),
                )
