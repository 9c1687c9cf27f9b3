"""What every ledger store must do; tests/privacy and tests/server run it for each of them.

The machine makes charges in any order, again and again, from ledgers that are opened anew, and
compares with a list: the plainest ledger there is.
"""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from atoll.privacy.accounting import FixedSample, from_json, spent
from atoll.privacy.errors import BadParameters, BudgetExceeded
from atoll.privacy.ledger import UNITS, Gaussian, Ledger, Unnoised, unit_of

DELTA = 1e-5
POPULATIONS = ("knee", "shoulder")
BUDGETS = (None, 0.5, 2.0, 50.0)

populations = st.sampled_from(POPULATIONS)
units = st.sampled_from(UNITS)
charge_ids = st.integers(0, 9).map(lambda number: f"run/{number}")
events = st.sampled_from(
    [
        Gaussian(4.0),
        Gaussian(4.0, times=3),
        Gaussian(30.0),
        Gaussian(1.0, FixedSample(3, 3)),
        Unnoised(),
    ]
)


class LedgerMachine(RuleBasedStateMachine):
    """``store`` is empty at first."""

    def __init__(self, store):
        super().__init__()
        self.store = store
        self.charged = {population: [] for population in POPULATIONS}  # (id, unit, event)

    def of(self, population, unit):
        return [event for _, of, event in self.charged[population] if of == unit]

    def spent(self, population, unit, *more):
        """Return what an account comes to; of releases to rows the dearest counts."""
        events = [*self.of(population, unit), *more]
        if unit == "row":
            events = sorted(events, key=lambda event: getattr(event, "noise_multiplier", 0))[:1]
        return spent(events, DELTA)

    def opened(self, population, unit, budget=None):
        return Ledger(self.store, population, budget, DELTA, unit)

    @rule(
        population=populations,
        unit=units,
        charge=charge_ids,
        event=events,
        budget=st.sampled_from(BUDGETS),
    )
    def charge(self, population, unit, charge, event, budget):
        known = {one: (of, what) for one, of, what in self.charged[population]}
        book = self.opened(population, unit, budget)
        after = self.spent(population, unit, event)
        if charge in known:
            if known[charge] == (unit, event):
                assert book.charge(charge, event) == book.spent()
            else:
                with pytest.raises(BadParameters, match="charge id of its own"):
                    book.charge(charge, event)
        elif budget is not None and after.epsilon_pld > budget:
            with pytest.raises(BudgetExceeded):
                book.charge(charge, event)
        else:
            assert book.charge(charge, event) == after
            self.charged[population].append((charge, unit, event))

    @precondition(lambda self: any(self.charged.values()))
    @rule(data=st.data())
    def charge_again(self, data):
        """As a run does that was killed after its charge, and starts anew."""
        population = data.draw(
            st.sampled_from([name for name in self.charged if self.charged[name]])
        )
        charge, unit, event = data.draw(st.sampled_from(self.charged[population]))
        before = self.opened(population, unit).spent()
        # Not even a budget that is spent refuses what was charged already.
        assert self.opened(population, unit, 1e-9).charge(charge, event) == before

    @rule(population=populations, charge=charge_ids, message=st.sampled_from(["no", "never"]))
    def refuse(self, population, charge, message):
        """What ``allow`` raises is passed on; it is asked about new charges alone."""
        asked = []

        def allow(there):
            asked.append([one for one, _ in there])
            raise LookupError(message)

        ids = [one for one, _, _ in self.charged[population]]
        if charge in ids:
            record = {"kind": "unnoised"}
            assert not self.store.append_if_absent(population, charge, record, allow)
            assert asked == []
        else:
            with pytest.raises(LookupError, match=message):
                self.store.append_if_absent(population, charge, {"kind": "unnoised"}, allow)
            assert asked == [ids]

    @rule(population=populations, unit=units, event=events)
    def look_ahead(self, population, unit, event):
        found = self.opened(population, unit).after(event)
        assert found == self.spent(population, unit, event)

    @invariant()
    def the_store_holds_each_charge_once_in_its_order(self):
        for population, charged in self.charged.items():
            there = self.store.events(population)
            assert [(one, unit_of(record), from_json(record)) for one, record in there] == charged

    @invariant()
    def units_are_judged_apart(self):
        for population in POPULATIONS:
            for unit in UNITS:
                found = self.opened(population, unit).spent()
                assert found == self.spent(population, unit)
                assert math.isinf(found.epsilon_pld) == (Unnoised() in self.of(population, unit))


def keeps_the_contract(machine, examples=30):
    """Run machines of a ledger store; ``machine()`` makes one whose store is empty."""
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=25),
    )
