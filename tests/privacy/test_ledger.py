"""The ledger charges once, before the round, and never past the budget."""

import math
import threading

import pytest
from ledger_store import LedgerMachine, keeps_the_contract

from atoll.privacy.errors import BadParameters, BudgetExceeded
from atoll.privacy.ledger import Gaussian, Ledger, MemoryStore, Unnoised

EVENT = Gaussian(4.0)


@pytest.fixture
def store():
    return MemoryStore()


def ledger(store, budget=None, population="watches", unit="device"):
    return Ledger(store, population, budget, 1e-5, unit)


def test_the_store_in_memory_keeps_the_contract():
    keeps_the_contract(lambda: LedgerMachine(MemoryStore()))


def test_a_charge_is_recorded_once_however_often_it_is_made(store):
    book = ledger(store)
    once = book.charge("run/1", EVENT)
    assert book.charge("run/1", EVENT) == once == book.spent()
    assert len(store.events("watches")) == 1
    assert book.charge("run/2", EVENT).epsilon_pld > once.epsilon_pld


def test_one_charge_cannot_be_two_events(store):
    book = ledger(store)
    book.charge("run/1", EVENT)
    with pytest.raises(BadParameters, match="a charge id of its own"):
        book.charge("run/1", Gaussian(5.0))
    assert len(store.events("watches")) == 1


def test_what_is_recorded_outlives_the_ledger(store):
    before = ledger(store).charge("run/1", EVENT)
    assert ledger(store).spent() == before


def test_a_charge_past_the_budget_is_refused_and_not_recorded(store):
    one = ledger(MemoryStore()).charge("run/1", EVENT).epsilon_pld
    book = ledger(store, budget=one * 1.01)
    book.charge("run/1", EVENT)
    with pytest.raises(BudgetExceeded, match=r"'watches' to ε = .* over its budget"):
        book.charge("run/2", EVENT)
    assert len(store.events("watches")) == 1
    assert book.charge("run/1", EVENT).epsilon_pld == one  # a repeat is still no charge


def test_the_budget_itself_may_be_spent(store):
    one = ledger(MemoryStore()).charge("run/1", EVENT).epsilon_pld
    assert ledger(store, budget=one).charge("run/1", EVENT).epsilon_pld == one


def test_a_round_without_noise_never_fits_a_budget(store):
    with pytest.raises(BudgetExceeded):
        ledger(store, budget=1e9).charge("run/1", Unnoised())
    assert ledger(store).charge("run/1", Unnoised()).epsilon_pld == math.inf


def test_populations_have_accounts_of_their_own(store):
    ledger(store).charge("run/1", EVENT)
    assert ledger(store, population="phones").spent().epsilon_pld == 0.0


def test_units_have_accounts_of_their_own(store):
    device = ledger(store).charge("run/1", EVENT)
    rows = ledger(store, unit="row").charge("rows/1", Gaussian(2.0))
    assert ledger(store).spent() == device
    assert ledger(store, unit="row").spent() == rows
    assert ledger(store, unit="example").spent().epsilon_pld == 0.0
    with pytest.raises(BudgetExceeded, match="per row"):
        ledger(store, budget=rows.epsilon_pld, unit="row").charge("rows/2", Gaussian(1.9))
    assert ledger(store, budget=rows.epsilon_pld).charge("run/2", EVENT) == ledger(store).spent()


def test_of_releases_to_rows_the_dearest_counts_alone(store):
    rows = ledger(store, unit="row")
    dear = rows.charge("telemetry/1", Gaussian(1.5))
    assert rows.charge("telemetry/2", Gaussian(3.0)) == dear
    assert rows.charge("telemetry/3", Gaussian(1.5)) == dear
    assert rows.charge("telemetry/4", Gaussian(1.0)).epsilon_pld > dear.epsilon_pld
    assert rows.charge("telemetry/5", Unnoised()).epsilon_pld == math.inf


def test_a_charge_is_of_one_unit(store):
    ledger(store).charge("run/1", EVENT)
    with pytest.raises(BadParameters, match="a charge id of its own"):
        ledger(store, unit="row").charge("run/1", EVENT)
    assert ledger(store, unit="row").spent().epsilon_pld == 0.0


def test_a_record_names_its_unit_unless_it_is_a_device(store):
    ledger(store).charge("run/1", EVENT)
    ledger(store, unit="example").charge("run/2", EVENT)
    (_, device), (_, example) = store.events("watches")
    assert device == {"kind": "gaussian", "noise_multiplier": 4.0, "sampling": None}
    assert example == {**device, "unit": "example"}


def test_a_unit_of_a_newer_version_is_not_passed_over(store):
    record = {"kind": "unnoised", "unit": "household"}
    store.append_if_absent("watches", "run/1", record, lambda _: None)
    with pytest.raises(BadParameters, match="'household'"):
        ledger(store).charge("run/2", EVENT)
    with pytest.raises(BadParameters, match="none of device, example, row"):
        ledger(store, unit="household")


def test_a_preview_spends_nothing(store):
    book = ledger(store)
    book.charge("run/1", EVENT)
    ahead = book.after(EVENT, EVENT)
    assert len(store.events("watches")) == 1
    book.charge("run/2", EVENT)
    assert book.charge("run/3", EVENT) == ahead


def test_a_store_that_fails_leaves_the_charge_unmade():
    class Full(MemoryStore):
        def append_if_absent(self, population, charge, event, allow):
            raise OSError("disk full")

    book = ledger(Full())
    with pytest.raises(OSError, match="disk full"):
        book.charge("run/1", EVENT)
    assert book.spent().epsilon_pld == 0.0


def test_a_crash_after_the_record_costs_budget_once(store):
    class Crashes(MemoryStore):
        def append_if_absent(self, population, charge, event, allow):
            store.append_if_absent(population, charge, event, allow)
            raise ConnectionError("killed")

        def events(self, population):
            return store.events(population)

    with pytest.raises(ConnectionError):
        ledger(Crashes()).charge("run/1", EVENT)
    spent = ledger(store).spent()
    assert spent.epsilon_pld > 0
    assert ledger(store).charge("run/1", EVENT) == spent


def test_charges_made_at_once_do_not_overspend(store):
    ten = ledger(store).after(*[EVENT] * 10).epsilon_pld
    book = ledger(store, budget=ten)
    refused = []

    def charge(number):
        try:
            book.charge(f"run/{number}", EVENT)
        except BudgetExceeded:
            refused.append(number)

    threads = [threading.Thread(target=charge, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.events("watches")) == 10
    assert len(refused) == 6


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_must_be_positive(store, budget):
    with pytest.raises(BadParameters, match="budget_epsilon"):
        ledger(store, budget=budget)
