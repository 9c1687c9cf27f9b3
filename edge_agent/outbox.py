"""Messages that wait for the broker's acknowledgement, across crashes and power cuts.

A message's ``(boot, seq)`` is given in the transaction that stores it, so no two messages of
a device ever share one, whichever process enqueues. It leaves on PUBACK alone. When the byte
quota is reached, what matters least goes first, oldest first, and the number of messages
dropped is kept for :class:`~atoll.fleet.wire.Health`. A message dropped while it was on its
way may arrive all the same: ``dropped`` is an upper bound.
"""

import sqlite3
from collections.abc import Collection
from typing import Final, NamedTuple

from atoll.edge_agent.database import Database
from atoll.fleet import wire
from atoll.fleet.topics import Leaf

QUOTA: Final = 16 * 1024 * 1024
"""Bytes of waiting payloads: months of events, or a week of hourly windows."""

_PLACES: Final[dict[type[wire.Body], tuple[int, Leaf]]] = {
    wire.Birth: (0, "status"),
    wire.Death: (0, "status"),
    wire.Reported: (1, "reported"),
    wire.Event: (2, "event"),
    wire.Window: (3, "telemetry"),
    wire.Health: (4, "telemetry"),
}
"""Body → (priority: lower is sent first and dropped last, leaf)."""


class Item(NamedTuple):
    """A waiting message."""

    id: int
    leaf: Leaf
    payload: bytes

    @property
    def retain(self) -> bool:
        """Only ``status`` is retained: a newcomer learns who is online."""
        return self.leaf == "status"


class Counts(NamedTuple):
    """How full the outbox is, in messages and bytes; ``dropped`` counts for ever."""

    waiting: int
    bytes: int
    dropped: int


class Outbox:
    """The outbox of one device; several processes may have it open."""

    def __init__(self, database: Database, quota: int = QUOTA) -> None:
        self._database = database
        self._quota = quota

    def start_boot(self, after: int = 0) -> int:
        """Begin the next boot, one past ``after`` at least, and return its number.

        It is durable before this returns.
        """
        with self._database.transaction() as rows:
            row = rows.execute(
                "UPDATE counters SET boot = max(boot, ?) + 1, seq = 0 RETURNING boot", (after,)
            ).fetchone()
        return int(row[0])

    def reserve(self, body: wire.Body, at: float) -> bytes:
        """Return an envelope with its own ``(boot, seq)`` without storing it: a last will."""
        with self._database.transaction() as rows:
            return _envelope(rows, body, at)[2]

    def enqueue(self, body: wire.Body, at: float) -> bool:
        """Store a message; return False when there was no room for it.

        Raises :class:`atoll.edge_agent.errors.DiskFull`.
        """
        priority, leaf = _PLACES[type(body)]
        with self._database.transaction() as rows:
            boot, seq, payload = _envelope(rows, body, at)
            if not self._make_room(rows, priority, len(payload)):
                rows.execute("UPDATE counters SET dropped = dropped + 1")
                return False
            rows.execute(
                "INSERT INTO outbox (boot, seq, priority, leaf, payload) VALUES (?, ?, ?, ?, ?)",
                (boot, seq, priority, leaf, payload),
            )
            rows.execute("UPDATE counters SET bytes = bytes + ?", (len(payload),))
            return True

    def _make_room(self, rows: sqlite3.Connection, priority: int, needed: int) -> bool:
        excess = rows.execute("SELECT bytes FROM counters").fetchone()[0] + needed - self._quota
        if excess <= 0:
            return True
        victims: list[tuple[int]] = []
        freed = 0
        for victim, size in rows.execute(
            "SELECT id, length(payload) FROM outbox WHERE priority >= ? ORDER BY priority DESC, id",
            (priority,),
        ):
            victims.append((victim,))
            freed += size
            if freed >= excess:
                break
        if freed < excess:
            return False
        rows.executemany("DELETE FROM outbox WHERE id = ?", victims)
        rows.execute(
            "UPDATE counters SET bytes = bytes - ?, dropped = dropped + ?", (freed, len(victims))
        )
        return True

    def waiting(self, limit: int, skip: Collection[int] = ()) -> list[Item]:
        """Return up to ``limit`` messages to send next, without those in ``skip``."""
        rows = self._database.query(
            "SELECT id, leaf, payload FROM outbox ORDER BY priority, id LIMIT ?",
            limit + len(skip),
        )
        items = [Item(*row) for row in rows]  # type: ignore[arg-type]  # STRICT columns
        return [item for item in items if item.id not in skip][:limit]

    def settle(self, ids: Collection[int]) -> None:
        """Remove acknowledged messages."""
        if not ids:
            return
        with self._database.transaction() as rows:
            freed = 0
            for one in ids:
                row = rows.execute(
                    "DELETE FROM outbox WHERE id = ? RETURNING length(payload)", (one,)
                ).fetchone()
                freed += row[0] if row else 0
            rows.execute("UPDATE counters SET bytes = bytes - ?", (freed,))

    def counts(self) -> Counts:
        """Count what waits."""
        row = self._database.query(
            "SELECT (SELECT count(*) FROM outbox), bytes, dropped FROM counters"
        )[0]
        return Counts(*row)  # type: ignore[arg-type]  # STRICT columns


def _envelope(rows: sqlite3.Connection, body: wire.Body, at: float) -> tuple[int, int, bytes]:
    boot, seq = rows.execute("UPDATE counters SET seq = seq + 1 RETURNING boot, seq").fetchone()
    return boot, seq, wire.encode(wire.Envelope(boot=boot, seq=seq, at=at, body=body))
