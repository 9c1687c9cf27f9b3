"""The ledger as accounts: for each population and unit, what was charged and what it comes to.

ε is computed from the recorded events each time, as :mod:`atoll.privacy.ledger` says; what the
tables add is which run was charged, and with it δ, the limit and the size of the cohort.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Connection, select

from atoll.federation.errors import BadPlan
from atoll.federation.plan import Privacy, loads
from atoll.privacy.accounting import Event, Spent, from_json, spent
from atoll.privacy.ledger import UNITS, Unit, composed, unit_of
from atoll.server import schema
from atoll.server.web_read import first, rows

POINTS: Final = 120
"""At most so many points of a curve are computed."""


@dataclass(frozen=True, slots=True)
class Terms:
    """At which δ an account is judged, its limit on ε, and the devices of its last round."""

    delta: float
    budget_epsilon: float | None = None
    cohort: int | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """What one population was charged for one unit.

    ``charges`` and ``at`` (Unix seconds) go with ``events``, one each. ``curve`` gives ε after
    some numbers of charges, the last among them; infinite where nothing bounds it.
    """

    population: str
    unit: Unit
    charges: Sequence[str]
    events: tuple[Event, ...]
    at: Sequence[float]
    terms: Terms

    @property
    def spent(self) -> Spent:
        """Return what is spent."""
        return self._spent(len(self.events))

    @property
    def curve(self) -> dict[int, float]:
        """Return ε after some of the charges: number of charges → ε."""
        count = len(self.events)
        step = max(1, math.ceil(count / POINTS))
        at = sorted({*range(step, count + 1, step), count})
        return {n: self._spent(n).epsilon_pld for n in at}

    def _spent(self, charges: int) -> Spent:
        return _spent(tuple(composed(self.events[:charges], self.unit)), self.terms.delta)


def accounts(connection: Connection, delta: float | None = None) -> list[Account]:
    """Return every account, by population and unit.

    Judged at ``delta``, or else each at its own. A limit is one at the account's δ and says
    nothing at another.
    """
    names = select(schema.ledger.c.population).distinct().order_by(schema.ledger.c.population)
    return [
        account
        for population in connection.execute(names).scalars().all()
        for account in _of(connection, population, delta)
    ]


def latest(connection: Connection) -> Account | None:
    """Return the account of devices that was charged last; none without a charge."""
    table = schema.ledger.c
    devices = table.event["unit"].as_string().is_(None)
    last = first(
        connection, select(table.population).where(devices).order_by(table.id.desc()).limit(1)
    )
    return None if last is None else _of(connection, last["population"], None)[0]


def _of(connection: Connection, population: str, delta: float | None) -> list[Account]:
    """Return a population's accounts in the order of :data:`UNITS`."""
    table = schema.ledger.c
    query = select(schema.ledger).where(table.population == population).order_by(table.id)
    by_unit: dict[Unit, list[Mapping[str, Any]]] = {unit: [] for unit in UNITS}
    for row in rows(connection, query):
        by_unit[unit_of(row["event"])].append(row)
    found = []
    for unit, charged in by_unit.items():
        if not charged:
            continue
        terms = _terms(connection, population, unit, charged[-1]["charge"])
        if delta is not None and delta != terms.delta:
            terms = Terms(delta, None, terms.cohort)
        found.append(
            Account(
                population,
                unit,
                [row["charge"] for row in charged],
                tuple(from_json(row["event"]) for row in charged),
                [row["at"] for row in charged],
                terms,
            )
        )
    return found


def _terms(connection: Connection, population: str, unit: Unit, charge: str) -> Terms:
    """Return the terms of the run that was charged last.

    A charge names its run. Where no run is found, and for served rows, for whom a plan sets no
    limit, the defaults of a plan stand.
    """
    r, o = schema.runs.c, schema.rounds.c
    defaults = Terms(Privacy().delta)
    if unit == "row":
        return defaults
    recent = rows(connection, select(r.id, r.plan, r.model, r.name).order_by(r.created_at.desc()))
    mine = next((run for run in recent if run["id"] in charge), None) or next(
        (run for run in recent if population in (run["model"], run["name"])), None
    )
    if mine is None:
        return defaults
    survivors = select(o.survivors).where(o.run == mine["id"]).order_by(o.round.desc()).limit(1)
    done = first(connection, survivors)
    cohort = len(done["survivors"]) if done else None
    try:
        wanted = loads(mine["plan"]).privacy
    except BadPlan:  # of another version
        return Terms(defaults.delta, None, cohort)
    if unit == "example":
        asked = wanted.examples
        return defaults if asked is None else Terms(asked.delta, asked.budget_epsilon, None)
    return Terms(wanted.delta, wanted.budget_epsilon, cohort)


@lru_cache(maxsize=512)
def _spent(events: tuple[Event, ...], delta: float) -> Spent:
    return spent(events, delta)
