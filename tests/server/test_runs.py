"""A run from its proposal to its end, with the SuperLink up, down, and lying about."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from atoll.federation.errors import LinkError
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.flower import RunStatus
from atoll.federation.run import RoundReport
from atoll.server import audit, claims, runs
from atoll.server.auth import Operator
from atoll.server.claims import ClaimedLedgerStore, Start
from atoll.server.errors import BadInput, Conflict, Forbidden, Superseded, Unavailable
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.recording import SqlRecorder
from atoll.server.runs import ATTEMPTS, Runner
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


def report(number: int, survivors: tuple[str, ...]) -> RoundReport:
    return RoundReport(number, 1.0, survivors, {}, None, None, 0, 0, 1.0)


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
    assert nodes.runs["1"].detail == f"{runs.SERVER_APP} {{'run': '{run}', 'attempt': 1}}"
    assert training(store) == {"w1", "w2"}
    assert not runner.tick()
    with store.begin() as connection:  # as the run's own process does
        connection.execute(update(table).values(state="gated"))
    nodes.runs["1"] = RunStatus("finished", "completed", "")
    assert runner.tick()
    assert row(store, run).state == "gated"
    assert training(store) == set()


@pytest.mark.parametrize("outcome", ["failed", "completed"])
def test_a_run_whose_process_ended_without_saying_how_is_taken_up_again(
    store: Store, runner: Runner, nodes: Any, clock: Any, outcome: str
) -> None:
    run = propose(store)
    runner.tick()
    begun = row(store, run).started_at
    clock.now += 100
    nodes.runs["1"] = RunStatus("finished", outcome, "boom")
    assert runner.tick()
    after = row(store, run)
    assert (after.state, after.stalled, after.ended_at) == ("approved", 1, None)
    assert "boom" in after.reason
    assert training(store) == {"w1", "w2"}
    runner.tick()
    again = row(store, run)
    assert (again.state, again.flower_run, again.attempt) == ("running", "2", 2)
    assert (again.reason, again.started_at) == (
        "taken up again from its checkpoint, attempt 2 of 5",
        begun,
    )
    assert nodes.runs["2"].detail.endswith(f"{{'run': '{run}', 'attempt': 2}}")
    with store.read() as connection:
        last = list(audit.entries(connection))[-1]
    assert (last["actor"], last["action"], last["subject"]) == ("hub", "run.resume", run)


def test_a_run_that_somebody_stopped_at_the_superlink_stays_stopped(
    store: Store, runner: Runner, nodes: Any
) -> None:
    run = propose(store)
    runner.tick()
    nodes.runs["1"] = RunStatus("finished", "stopped", "")
    runner.tick()
    assert row(store, run).state == "cancelled"
    assert row(store, run).ended_at is not None


def test_a_run_that_completes_no_round_fails_after_the_last_attempt(
    store: Store, runner: Runner, nodes: Any
) -> None:
    run = propose(store)
    for _ in range(2 * ATTEMPTS + 2):
        runner.tick()
        flower = row(store, run).flower_run
        nodes.runs[flower] = RunStatus("finished", "failed", "boom")
    assert len(nodes.runs) == ATTEMPTS
    assert row(store, run).state == "failed"
    assert "executor.log" in row(store, run).reason
    assert training(store) == set()


def test_a_run_that_makes_progress_may_be_taken_up_without_end(
    store: Store, runner: Runner, nodes: Any, clock: Any
) -> None:
    run = propose(store)
    for number in range(1, 3 * ATTEMPTS):
        runner.tick()
        SqlRecorder(store, run, clock).round(report(number, ("w1", "w2")))
        nodes.runs[row(store, run).flower_run] = RunStatus("finished", "failed", "")
        runner.tick()
        assert row(store, run).state == "approved"
    assert len(nodes.runs) == 3 * ATTEMPTS - 1


def test_a_round_that_was_thrown_away_is_no_progress(
    store: Store, runner: Runner, clock: Any
) -> None:
    run = propose(store)
    runner.tick()
    with store.begin() as connection:
        connection.execute(update(table).values(stalled=2))
    SqlRecorder(store, run, clock).round(report(1, ()))
    assert row(store, run).stalled == 2


def test_a_killed_process_is_seen_before_flower_sees_it(
    store: Store, runner: Runner, nodes: Any, tmp_path: Path
) -> None:
    run = propose(store)
    runner.tick()
    lock = tmp_path / "runs" / run / claims.NAME
    program = (
        "import fcntl, sys\n"
        "held = open(sys.argv[1], 'w')\n"
        "fcntl.flock(held, fcntl.LOCK_EX)\n"
        "held.write('1'); held.flush(); print('held', flush=True); sys.stdin.read()\n"
    )
    lock.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not runner.tick()
        process.kill()
    assert runner.tick()
    assert row(store, run).state == "approved"
    assert nodes.runs["1"].outcome == "stopped"
    runner.tick()
    assert row(store, run).flower_run == "2"
    assert not runner.tick()  # the second process has not come, so nothing is known of it here


def test_a_process_that_settled_its_run_and_ended_is_not_taken_up(
    store: Store, runner: Runner, tmp_path: Path
) -> None:
    run = propose(store)
    runner.tick()
    folder = tmp_path / "runs" / run
    with claims.claimed(store, folder, Start(run, 1, "1"), SYSTEM_CLOCK) as claim:
        with store.begin() as connection:
            connection.execute(update(table).where(claim.mine).values(state="gated"))
        assert not claims.ended(folder, 1)
    assert not claims.ended(folder, 2)
    assert claims.ended(folder, 1)
    runner.tick()
    assert row(store, run).state == "gated"


def test_a_run_is_one_processs_at_a_time_and_the_last_ones(
    store: Store, runner: Runner, nodes: Any, tmp_path: Path
) -> None:
    run, folder = propose(store), tmp_path / "folder"
    runner.tick()
    hasty = Clock(now=iter(range(0, 9999, 50)).__next__, pause=lambda _: None)
    with claims.claimed(store, folder, Start(run, 1, "1"), SYSTEM_CLOCK) as first:
        first.check()
        for other in (Start(run, 1, "7"), Start(run, 2, "2"), Start("none", 1, "1")):
            with pytest.raises(Superseded), claims.claimed(store, folder, other, hasty):
                pass
        nodes.runs["1"] = RunStatus("finished", "failed", "")  # says Flower; but it lives
        runner.tick()
        runner.tick()
        with pytest.raises(Superseded):
            first.check()
        kept = ClaimedLedgerStore(SqlLedgerStore(store, lambda: 1.0), first)
        with pytest.raises(Superseded):
            kept.append_if_absent("m", "r/1", {"kind": "unnoised"}, lambda _: None)
        assert kept.events("m") == []
        with pytest.raises(Unavailable), claims.claimed(store, folder, Start(run, 2, "2"), hasty):
            pass
    with claims.claimed(store, folder, Start(run, 2, "2"), SYSTEM_CLOCK) as second:
        second.check()
        with store.begin() as connection:
            runs.cancel(connection, run, actor="bob", now=3.0)
        with pytest.raises(Superseded):
            second.check()


def test_a_start_that_took_effect_though_it_seemed_to_fail_is_not_doubled(
    store: Store, runner: Runner, nodes: Any, tmp_path: Path
) -> None:
    run = propose(store)
    nodes.lossy = True
    with pytest.raises(LinkError):
        runner.tick()
    assert row(store, run).state == "approved"
    nodes.lossy = False
    runner.tick()
    assert row(store, run).flower_run == "2"
    with (
        pytest.raises(Superseded),
        claims.claimed(store, tmp_path, Start(run, 1, "1"), SYSTEM_CLOCK),
    ):
        pass
    with claims.claimed(store, tmp_path, Start(run, 2, "2"), SYSTEM_CLOCK):
        pass


def test_a_process_that_came_before_its_start_was_known_keeps_the_run(
    store: Store, runner: Runner, nodes: Any, tmp_path: Path
) -> None:
    run = propose(store)

    def arrives(flower: str) -> None:
        with claims.claimed(store, tmp_path, Start(run, 1, flower), SYSTEM_CLOCK):
            pass

    nodes.lossy, nodes.started = True, arrives
    with pytest.raises(LinkError):
        runner.tick()
    assert (row(store, run).state, row(store, run).flower_run) == ("running", "1")
    runner.tick()
    assert len(nodes.runs) == 1


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
    runner.tick()  # the one that has begun goes on before the other begins
    assert sorted((row(store, run).state, row(store, run).attempt) for run in (first, second)) == [
        ("approved", 0),
        ("running", 2),
    ]
    with store.begin() as connection:
        connection.execute(update(table).where(table.c.attempt > 0).values(state="gated"))
    runner.tick()
    assert {row(store, run).state for run in (first, second)} == {"gated", "running"}
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


def test_a_run_that_was_being_started_when_the_hub_died_is_started_anew(
    store: Store, runner: Runner, tmp_path: Path
) -> None:
    run = propose(store)
    with store.begin() as connection:
        connection.execute(update(table).values(state="running", attempt=1))
    runner.recover()
    assert row(store, run).state == "approved"
    runner.tick()
    assert (row(store, run).state, row(store, run).attempt) == ("running", 2)
    with (
        pytest.raises(Superseded),
        claims.claimed(store, tmp_path, Start(run, 1, "elsewhere"), SYSTEM_CLOCK),
    ):
        pass
    runner.recover()
    assert row(store, run).state == "running"


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
        ("[privacy]\nnoise_multiplier = 0.1\nbits = 4\n", "raise privacy.bits"),
        ("[privacy]\ncolluders = 2\n", "raise cohort.min_devices"),
        ("[cohort]\nsampling_rate = 0.5\n", "raise cohort.sampling_rate"),
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
