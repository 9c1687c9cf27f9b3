"""The privacy ledger's events in the hub's database.

The ServerApp of a run charges from its own process while the hub reads, so a charge is one
transaction that holds the write lock from its first look to its commit.
"""

from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy import Connection, insert, select, text

from atoll.privacy.ledger import Record
from atoll.server.context import Clock
from atoll.server.schema import ledger
from atoll.server.store import Store

_CHARGE_LOCK: Final = 0x6C6564676572  # "ledger", the key of a PostgreSQL advisory lock


class SqlLedgerStore:
    """:class:`atoll.privacy.ledger.LedgerStore` over the store."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def events(self, population: str) -> Sequence[tuple[str, Record]]:
        """Return every ``(charge id, event)`` of ``population``."""
        with self._store.read() as connection:
            return _events(connection, population)

    def append_if_absent(
        self,
        population: str,
        charge: str,
        event: Record,
        allow: Callable[[Sequence[tuple[str, Record]]], None],
    ) -> bool:
        """Record an event unless ``charge`` is already there; return whether it was added."""
        with self._store.begin() as connection:
            if not self._store.sqlite:  # SQLite's writers are alone already
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CHARGE_LOCK}
                )
            events = _events(connection, population)
            if charge in dict(events):
                return False
            allow(events)
            connection.execute(
                insert(ledger).values(
                    population=population, charge=charge, event=dict(event), at=self._clock()
                )
            )
            return True


def _events(connection: Connection, population: str) -> Sequence[tuple[str, Record]]:
    query = (
        select(ledger.c.charge, ledger.c.event)
        .where(ledger.c.population == population)
        .order_by(ledger.c.id)
    )
    return [(row.charge, row.event) for row in connection.execute(query)]
