"""What waits in the outbox, for a person to look at: read-only, through ``sqlite-utils``.

Only commands that end at once use this. The control process keeps to plain ``sqlite3``
(:mod:`atoll.edge_agent.database` says why). The file may also be opened with the
``sqlite-utils`` command itself.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
from sqlite_utils import Database

from atoll.edge_agent.errors import DataUnwritable
from atoll.fleet import wire
from atoll.fleet.errors import BadMessage


class Waiting(msgspec.Struct, frozen=True):
    """A message that the hub has not acknowledged; ``bytes`` is its encoded size."""

    boot: int
    seq: int
    at: float
    leaf: str
    kind: str
    bytes: int


def waiting(path: Path, limit: int) -> Iterator[Waiting]:
    """Return the messages in the order in which they will be sent, at most ``limit``.

    Raises :class:`DataUnwritable` when the file cannot be read.
    """
    try:
        database = Database(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True))
        for row in database["outbox"].rows_where(order_by="priority, id", limit=limit):
            yield _told(row["boot"], row["seq"], row["leaf"], row["payload"])
        database.close()
    except sqlite3.Error as error:
        raise DataUnwritable(path, str(error)) from error


def _told(boot: int, seq: int, leaf: str, payload: bytes) -> Waiting:
    try:
        envelope = wire.decode(payload, wire.Envelope)
    except BadMessage:
        return Waiting(boot, seq, 0.0, leaf, "unreadable", len(payload))
    kind = type(envelope.body).__name__.lower()
    return Waiting(boot, seq, envelope.at, leaf, kind, len(payload))
