"""A run from its proposal to its end, with the SuperLink up, down, and lying about."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from atoll.federation.errors import LinkError
from atoll.federation.flower import RunStatus
from atoll.server import runs
from atoll.server.auth import Operator
from atoll.server.errors import BadInput, Conflict, Forbidden
from atoll.server.runs import Runner
from atoll.server.schema import devices, twins
from atoll.server.schema import runs as table
from atoll.server.store import Store

PLAN = 'name = "a"\ntask = "spar"\nmodel = "m"\n'
ANN = Operator("ann", "approver")


@pytest.fixture
def runner(store: Store, nodes: Any, clock: Any, tmp_path: Path) -> Runner:
    with store.begin() as connection:
        for name, revoked in (("w1", None), ("w2", None), ("gone", 1.0)):
            connection.execute(
                insert(devices).values(
                    id=name,
                    labels={},
                    certificate="",
                    serial=name,
                    expires_at=0.0,
                    enrolled_at=0.0,
                    revoked_at=revoked,
                )
            )
            wanted = {"version": 0, "model": None, "release": None, "train": False}
            connection.execute(insert(twins).values(device=name, desired=wanted))
    return Runner(store, nodes, clock, tmp_path / "runs")


def propose(store: Store, *, approved: bool = True) -> str:
    with store.begin() as connection:
        run = runs.propose(connection, PLAN, actor="bob", now=1.0)
        if approved:
            runs.approve(connection, run, operator=ANN, now=2.0)
    return run


def row(store: Store, run: str) -> Any:
    with store.read() as connection:
        return connection.execute(select(table).where(table.c.id == run)).one()


def training(store: Store) -> set[str]:
    with store.read() as connection:
        rows = connection.execute(select(twins.c.device, twins.c.desired)).all()
    return {row.device for row in rows if row.desired["train"]}


def test_a_proposed_run_waits(store: Store, runner: Runner, nodes: Any) -> None:
    run = propose(store, approved=False)
    runner.tick()
    assert row(store, run).state == "proposed"
    assert nodes.runs == {}
    assert training(store) == set()


def test_an_approved_run_opens_training_starts_and_closes_it(
    store: Store, runner: Runner, nodes: Any
) -> None:
    run = propose(store)
    assert runner.tick()
    assert (row(store, run).state, row(store, run).flower_run) == ("running", "1")
    assert nodes.runs["1"].detail == f"{runs.SERVER_APP} {{'run': '{run}'}}"
    assert training(store) == {"w1", "w2"}
    assert not runner.tick()
    with store.begin() as connection:  # as the run's own process does
        connection.execute(update(table).values(state="gated"))
    nodes.runs["1"] = RunStatus("finished", "completed", "")
    assert runner.tick()
    assert row(store, run).state == "gated"
    assert training(store) == set()


@pytest.mark.parametrize(
    ("outcome", "state", "reason"),
    [
        ("failed", "failed", "boom"),
        ("completed", "failed", "without a result"),
        ("stopped", "cancelled", "stopped"),
    ],
)
def test_a_run_that_ends_without_saying_how_is_settled(
    store: Store, runner: Runner, nodes: Any, outcome: str, state: str, reason: str
) -> None:
    run = propose(store)
    runner.tick()
    nodes.runs["1"] = RunStatus("finished", outcome, "boom" if outcome == "failed" else "")
    runner.tick()
    assert row(store, run).state == state
    assert reason in row(store, run).reason
    assert row(store, run).ended_at is not None


def test_runs_go_one_after_another_in_the_order_they_came(
    store: Store, runner: Runner, nodes: Any
) -> None:
    first, second = propose(store), propose(store)
    runner.tick()
    runner.tick()
    states = {row(store, run).state for run in (first, second)}
    assert states == {"running", "approved"}
    nodes.runs["1"] = RunStatus("finished", "failed", "")
    runner.tick()
    runner.tick()
    assert {row(store, run).state for run in (first, second)} == {"failed", "running"}
    assert training(store) == {"w1", "w2"}


def test_a_run_waits_for_a_superlink_that_is_down(store: Store, runner: Runner, nodes: Any) -> None:
    run = propose(store)
    nodes.down = True
    with pytest.raises(LinkError):
        runner.tick()
    assert row(store, run).state == "approved"
    assert "down" in row(store, run).reason
    nodes.down = False
    runner.tick()
    assert (row(store, run).state, row(store, run).reason) == ("running", "")


def test_a_run_that_was_being_started_when_the_hub_died_is_settled(
    store: Store, runner: Runner
) -> None:
    run = propose(store)
    with store.begin() as connection:
        connection.execute(update(table).values(state="running"))
    runner.recover()
    assert row(store, run).state == "failed"
    assert "propose it again" in row(store, run).reason


def test_a_device_that_comes_during_a_run_is_opened_too(
    store: Store, runner: Runner, nodes: Any
) -> None:
    propose(store)
    runner.tick()
    with store.begin() as connection:
        connection.execute(update(devices).values(revoked_at=None))
    runner.tick()
    assert training(store) == {"w1", "w2", "gone"}


def test_cancelling_says_what_to_stop(store: Store, runner: Runner, nodes: Any) -> None:
    run = propose(store)
    runner.tick()
    with store.begin() as connection:
        assert runs.cancel(connection, run, actor="bob", now=3.0) == "1"
    runner.tick()
    assert training(store) == set()
    with store.begin() as connection, pytest.raises(Conflict, match="is cancelled"):
        runs.cancel(connection, run, actor="bob", now=4.0)


@pytest.mark.parametrize("role", ["viewer", "operator"])
def test_approving_needs_the_role(store: Store, role: Any) -> None:
    run = propose(store, approved=False)
    with store.begin() as connection, pytest.raises(Forbidden):
        runs.approve(connection, run, operator=Operator("eve", role), now=2.0)


def test_a_run_is_approved_once(store: Store) -> None:
    run = propose(store)
    with store.begin() as connection, pytest.raises(Conflict):
        runs.approve(connection, run, operator=ANN, now=2.0)


def test_a_plan_for_a_task_that_is_not_installed_is_refused(store: Store) -> None:
    with store.begin() as connection, pytest.raises(BadInput, match="no task named 'x'"):
        runs.propose(connection, PLAN.replace("spar", "x"), actor="bob", now=1.0)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("[privacy]\nnoise_multiplier = 1.0\ndelta = 0.5\n", "one of 2 devices away"),
        ("[privacy]\nnoise_multiplier = 0.1\nbits = 4\n", "raise bits"),
        ("[privacy]\ncolluders = 2\n", "raise min_devices"),
        ("[cohort]\nsampling_rate = 0.5\n", "raise sampling_rate"),
    ],
)
def test_a_plan_that_promises_nothing_is_refused_when_it_is_proposed(
    store: Store, runner: Runner, section: str, says: str
) -> None:
    with store.begin() as connection, pytest.raises(BadInput, match=says):
        runs.propose(connection, PLAN + section, actor="bob", now=1.0)


def test_a_fleet_that_is_not_there_yet_is_not_held_against_a_plan(store: Store) -> None:
    plan = PLAN + "[cohort]\nsampling_rate = 0.5\n"
    with store.begin() as connection:
        runs.propose(connection, plan, actor="bob", now=1.0)
