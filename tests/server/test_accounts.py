"""The ledger's accounts: by population and unit, at the δ and limit of the run charged last."""

import math

import pytest
from sqlalchemy import insert

from atoll.privacy.ledger import Gaussian, Ledger, Unnoised
from atoll.server.accounts import POINTS, Terms, accounts, latest
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.schema import rounds, runs

PLAN = """\
name = "p"
task = "spar"
model = "shoulder"
[privacy]
noise_multiplier = 8.0
delta = 1e-4
budget_epsilon = 3.0
"""


@pytest.fixture
def charge(store, clock):
    held = SqlLedgerStore(store, clock)

    def charge(population, charge_id, event, unit="device"):
        return Ledger(held, population, None, 1e-5, unit).charge(charge_id, event)

    return charge


@pytest.fixture
def read(store):
    def read(delta=None):
        with store.read() as connection:
            return accounts(connection, delta)

    return read


@pytest.fixture
def last(store):
    def last():
        with store.read() as connection:
            return latest(connection)

    return last


def a_run(store, run, plan=PLAN, survivors=("a", "b", "c")):
    with store.begin() as connection:
        connection.execute(
            insert(runs).values(
                id=run,
                plan=plan,
                name="p",
                model="shoulder",
                state="running",
                created_at=1.0,
                created_by="test",
                metrics={},
            )
        )
        connection.execute(
            insert(rounds).values(
                run=run,
                round=1,
                started_at=1.0,
                seconds=1.0,
                survivors=list(survivors),
                dropped=[],
            )
        )


def test_populations_and_units_are_accounts_of_their_own(charge, read):
    charge("shoulder", "rows/1", Gaussian(2.0), "row")
    rows = charge("shoulder", "rows/2", Gaussian(2.0), "row")
    device = charge("shoulder", "run/1", Gaussian(8.0, 0.1, 5))
    example = charge("knee", "run/1", Gaussian(1.0, 0.01, 100), "example")
    found = read()
    assert [(one.population, one.unit, len(one.charges)) for one in found] == [
        ("knee", "example", 1),
        ("shoulder", "device", 1),
        ("shoulder", "row", 2),
    ]
    assert [one.spent for one in found] == [example, device, rows]


def test_an_account_of_devices_has_the_terms_of_the_run_charged_last(store, charge, read):
    a_run(store, "run-x")
    charge("shoulder", "run-x/1", Gaussian(8.0))
    charge("shoulder", "rows/1", Gaussian(8.0), "row")
    device, row = read()
    assert device.terms == Terms(1e-4, 3.0, 3)
    assert device.spent.delta == 1e-4
    assert row.terms == Terms(1e-5)


def test_a_limit_is_told_at_its_own_delta_alone(store, charge, read):
    a_run(store, "run-x")
    charge("shoulder", "run-x/1", Gaussian(8.0))
    assert read(1e-4)[0].terms.budget_epsilon == 3.0
    (other,) = read(1e-6)
    assert other.terms == Terms(1e-6, None, 3)
    assert other.spent.epsilon_pld > read()[0].spent.epsilon_pld


def test_a_plan_that_cannot_be_read_leaves_the_defaults(store, charge, read):
    a_run(store, "run-x", plan="of = 'another version'")
    charge("shoulder", "run-x/1", Gaussian(8.0))
    assert read()[0].terms == Terms(1e-5, None, 3)


def test_the_curve_ends_with_the_last_charge(charge, read):
    for number in range(POINTS + 5):
        charge("shoulder", f"run/{number}", Gaussian(50.0))
    (account,) = read()
    assert len(account.curve) <= POINTS
    assert list(account.curve)[-1] == POINTS + 5
    assert account.curve[POINTS + 5] == account.spent.epsilon_pld
    assert list(account.curve.values()) == sorted(account.curve.values())
    charge("shoulder", "run/plain", Unnoised())
    assert list(read()[0].curve.values())[-1] == math.inf


def test_the_latest_account_is_one_of_devices(charge, last):
    assert last() is None
    charge("shoulder", "rows/1", Gaussian(2.0), "row")
    assert last() is None
    charge("shoulder", "run/1", Gaussian(3.0))
    charge("knee", "run/1", Gaussian(4.0))
    charge("shoulder", "rows/2", Gaussian(2.0), "row")
    found = last()
    assert (found.population, found.unit) == ("knee", "device")
