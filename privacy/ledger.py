"""The record of what each population of devices has been asked to reveal.

The ledger holds events and nothing derived from them: what is spent is computed from the
events each time, so a better accountant gives a better answer to old records. An event is
charged *before* its round starts. A crash between the charge and the round therefore costs
budget; it never costs privacy.

What is promised to whom is a question of the *unit*: a training round promises something to a
whole device, training under DP-SGD on a device to each of its examples, telemetry to each served
row. Promises of different units do not add up, so a population has an account for each. A record
that names no unit is of devices.
"""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Final, Literal, Protocol, get_args

from atoll.privacy import accounting
from atoll.privacy.accounting import Event, FixedSample, Gaussian, Spent, Unnoised
from atoll.privacy.errors import BadParameters, BudgetExceeded

__all__ = [
    "UNITS",
    "Event",
    "FixedSample",
    "Gaussian",
    "Ledger",
    "LedgerStore",
    "MemoryStore",
    "Record",
    "Spent",
    "Unit",
    "Unnoised",
    "unit_of",
]

Record = Mapping[str, object]
"""An event and its unit as JSON-able data.

:func:`atoll.privacy.accounting.to_json`, and ``unit`` where it is not ``"device"``.
"""

Unit = Literal["device", "example", "row"]
"""Whom a promise is made to."""

UNITS: Final[tuple[Unit, ...]] = get_args(Unit)


def unit_of(record: Record) -> Unit:
    """Return the unit of a record; raise :class:`BadParameters` for one not known here."""
    unit = record.get("unit", "device")
    for known in UNITS:
        if unit == known:
            return known
    raise BadParameters(
        f"the ledger has a record of the unit {unit!r}, written by a newer version; use that one"
    )


class LedgerStore(Protocol):
    """Where events are kept, one list per population, in the order of their charges."""

    def events(self, population: str) -> Sequence[tuple[str, Record]]:
        """Return every ``(charge id, event)`` of ``population``."""
        ...

    def append_if_absent(
        self,
        population: str,
        charge: str,
        event: Record,
        allow: Callable[[Sequence[tuple[str, Record]]], None],
    ) -> bool:
        """Record an event unless ``charge`` is already there; return whether it was added.

        All in one transaction that excludes other writers: look for ``charge``; if it is
        absent, call ``allow`` with the events there are, which raises to refuse, and then
        append. Durable when this returns. What ``allow`` raises is passed on with nothing
        written.
        """
        ...


class MemoryStore:
    """A store for simulations and tests; it forgets."""

    def __init__(self) -> None:
        self._events: dict[str, dict[str, Record]] = {}
        self._lock = Lock()

    def events(self, population: str) -> Sequence[tuple[str, Record]]:
        """Return every ``(charge id, event)`` of ``population``."""
        return tuple(self._events.get(population, {}).items())

    def append_if_absent(
        self,
        population: str,
        charge: str,
        event: Record,
        allow: Callable[[Sequence[tuple[str, Record]]], None],
    ) -> bool:
        """Record an event unless ``charge`` is already there; return whether it was added."""
        with self._lock:
            if charge in self._events.get(population, {}):
                return False
            allow(self.events(population))
            self._events.setdefault(population, {})[charge] = dict(event)
            return True


def composed(events: Sequence[Event], unit: Unit) -> Sequence[Event]:
    """Return the events that add up for one ``unit``.

    A row is served once, under one release, so of releases to rows only the dearest counts; a
    device, and an example, may be in all of them.
    """
    if unit != "row" or not events:
        return events
    return [min(events, key=lambda event: getattr(event, "noise_multiplier", 0.0))]


class Ledger:
    """The account of one population, for one unit.

    ``budget_epsilon`` is the most it may spend at ``delta``; none records without refusing.
    Charge ids are the population's: no two accounts of one population share one.
    """

    def __init__(
        self,
        store: LedgerStore,
        population: str,
        budget_epsilon: float | None,
        delta: float,
        unit: Unit = "device",
    ) -> None:
        if not 0 < delta < 1:
            raise BadParameters(f"delta {delta} must be between 0 and 1")
        if budget_epsilon is not None and not budget_epsilon > 0:
            raise BadParameters(f"budget_epsilon {budget_epsilon} must be positive")
        if unit not in UNITS:
            raise BadParameters(f"unit {unit!r} is none of {', '.join(UNITS)}")
        self._store = store
        self._population = population
        self._budget = budget_epsilon
        self._delta = delta
        self._unit: Unit = unit

    def charge(self, charge_id: str, event: Event) -> Spent:
        """Record ``event`` and return what is spent with it; durable before this returns.

        The same ``charge_id`` again changes nothing when it names the same event of the same
        unit, and raises :class:`BadParameters` when it names another. Raises
        :class:`BudgetExceeded`, with nothing recorded, when it would overspend.
        """
        record = accounting.to_json(event)
        if self._unit != "device":
            record["unit"] = self._unit
        added = self._store.append_if_absent(
            self._population, charge_id, record, self._check(event)
        )
        if not added:
            before = dict(self._store.events(self._population))[charge_id]
            if accounting.from_json(before) != event or unit_of(before) != self._unit:
                raise BadParameters(
                    f"charge {charge_id!r} was recorded as {dict(before)!r}; "
                    "a different event needs a charge id of its own"
                )
        return self.spent()

    def spent(self) -> Spent:
        """Return what has been spent."""
        return self.after()

    def after(self, *events: Event) -> Spent:
        """Return what would be spent after ``events`` more, without recording them."""
        recorded = self._recorded(self._store.events(self._population))
        return self._total([*recorded, *events])

    def _check(self, event: Event) -> Callable[[Sequence[tuple[str, Record]]], None]:
        def allow(events: Sequence[tuple[str, Record]]) -> None:
            if self._budget is None:
                return
            after = self._total([*self._recorded(events), event]).epsilon_pld
            if after > self._budget:
                whom = "" if self._unit == "device" else f" per {self._unit}"
                raise BudgetExceeded(
                    f"this round would bring {self._population!r} to ε = {after:.3g}{whom} at "
                    f"δ = {self._delta:g}, over its budget of {self._budget:g}; "
                    "raise noise_multiplier, plan fewer rounds or stop here"
                )

        return allow

    def _total(self, events: Sequence[Event]) -> Spent:
        return accounting.spent(composed(events, self._unit), self._delta)

    def _recorded(self, events: Sequence[tuple[str, Record]]) -> list[Event]:
        return [
            accounting.from_json(record) for _, record in events if unit_of(record) == self._unit
        ]
