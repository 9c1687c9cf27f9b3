"""Rounds over the in-process engine with the real sums."""

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from blobs import Blobs
from cohorts import Fleet, fleet, plan_of
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from atoll.federation import client_app, interim, messages, parameters
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.engine import Vanished
from atoll.federation.errors import BadCheckpoint, RoundFailed
from atoll.federation.evaluation import ask, evaluate
from atoll.federation.plan import ExamplePrivacy, Plan
from atoll.federation.progress import PATIENCE
from atoll.federation.run import RoundReport
from atoll.federation.task import Examples, Split
from atoll.privacy.errors import BadParameters, BudgetExceeded
from atoll.privacy.ledger import Gaussian, Ledger, MemoryStore
from atoll.privacy.mode import Mode
from atoll.privacy.plain import PlainParty
from atoll.privacy.sums import Integers, PartySum, SumSpec

Charge = Callable[[int], float | None]


class Diverged(Blobs):
    """Its examples make the loss, and so the update, not a number."""

    def load(self, data: Path, split: Split) -> Examples:
        good = super().load(data, split)
        return Examples(np.full_like(good.x, np.nan), good.y)


class Broken(Blobs):
    """Raises while loading."""

    def load(self, data: Path, split: Split) -> Examples:
        raise OSError("the disk is gone")


class Gone(Blobs):
    """Falls silent while loading."""

    def load(self, data: Path, split: Split) -> Examples:
        raise Vanished


def accuracy(scores: dict[str, object]) -> float:
    return sum(s.correct for s in scores.values()) / sum(s.rows for s in scores.values())


@pytest.mark.parametrize("mode", ["plain", "he"])
def test_a_cohort_learns_what_separates_the_classes(tmp_path: Path, mode: str) -> None:
    here = fleet(tmp_path, 3)
    reports: list[RoundReport] = []
    plan = plan_of(mode, count=4)
    done = here.run(plan, on_round=reports.append)
    before = parameters.flatten(Blobs().model(plan.seed))
    scores = evaluate(here.of(plan), done.weights)
    untrained = evaluate(here.of(plan), before)
    assert set(scores) == set(here.cohort.members)
    assert accuracy(scores) > 0.9 > accuracy(untrained)
    assert [report.round for report in reports] == [1, 2, 3, 4]
    assert all(report.survivors == ("device-1", "device-2", "device-3") for report in reports)
    assert all(report.dropped == {} for report in reports)
    assert reports[-1].loss < reports[0].loss
    assert all(report.bytes_up > 0 and report.bytes_down > 0 for report in reports)
    assert (done.ended, done.rounds) == ("complete", 4)


@pytest.mark.parametrize(
    ("examples", "why"),
    [
        (ExamplePrivacy(1.0, 1.0, 0.5, 3), "BatchNorm1d"),
        (ExamplePrivacy(0.0, 1.0, 0.5, 3), "noise_multiplier"),
        (ExamplePrivacy(1.0, 1.0, 1.5, 3), "sampling_rate"),
        (ExamplePrivacy(1.0, 1.0, 0.5, -3), "steps"),
    ],
)
def test_a_device_does_not_train_on_examples_that_it_cannot_protect(
    tmp_path: Path, examples: ExamplePrivacy, why: str
) -> None:
    here, reports = fleet(tmp_path, 2), []
    plan = plan_of()
    asked = msgspec.structs.replace(
        plan, privacy=msgspec.structs.replace(plan.privacy, examples=examples)
    )
    with pytest.raises(RoundFailed):
        here.run(asked, on_round=reports.append)
    assert all(why in reason for reason in reports[0].dropped.values())
    assert len(reports[0].dropped) == 2


def test_an_encrypted_run_gives_exactly_the_plain_model(tmp_path: Path) -> None:
    plain = fleet(tmp_path / "a", 3).run(plan_of("plain"))
    encrypted = fleet(tmp_path / "b", 3).run(plan_of("he"))
    assert np.array_equal(plain.weights, encrypted.weights)
    assert not np.array_equal(plain.weights, parameters.flatten(Blobs().model(7)))


def test_a_seed_gives_the_same_model_and_noise_another(tmp_path: Path) -> None:
    first = fleet(tmp_path / "a", 3).run(plan_of())
    again = fleet(tmp_path / "b", 3).run(plan_of())
    noised = fleet(tmp_path / "c", 3).run(plan_of(noise=0.1))
    other = fleet(tmp_path / "d", 3).run(plan_of(), run="another")
    assert np.array_equal(first.weights, again.weights)
    assert not np.array_equal(first.weights, noised.weights)
    assert not np.array_equal(first.weights, other.weights)


@pytest.mark.parametrize("mode", ["plain", "he"])
@pytest.mark.parametrize(
    ("task", "reason"),
    [(Broken(), "disk is gone"), (Gone(), "no answer"), (Diverged(), "NaN")],
    ids=["errors", "vanishes", "diverges"],
)
def test_a_device_that_fails_is_a_drop_out(
    tmp_path: Path, mode: str, task: Blobs, reason: str
) -> None:
    here = fleet(tmp_path / "a", 4, {"device-2": task})
    reports: list[RoundReport] = []
    done = here.run(plan_of(mode, count=2), on_round=reports.append)
    assert done.rounds == 2
    assert np.isfinite(done.weights).all()
    for report in reports:
        assert report.survivors == ("device-1", "device-3", "device-4")
        assert list(report.dropped) == ["device-2"]
        assert reason in report.dropped["device-2"]


def test_the_survivors_mean_does_not_know_the_drop_out(tmp_path: Path) -> None:
    # The same three devices' mean, whether a fourth failed or never was.
    with_failure = fleet(tmp_path / "a", 4, {"device-4": Broken()}).run(plan_of(count=1))
    without = fleet(tmp_path / "b", 3).run(plan_of(count=1))
    assert np.array_equal(with_failure.weights, without.weights)


def test_rounds_with_too_few_survivors_change_nothing_and_end_the_run(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3, {"device-1": Broken(), "device-2": Broken()})
    reports: list[RoundReport] = []
    charged: list[int] = []
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(RoundFailed, match="thrown away"):
        here.run(
            plan_of(count=9),
            on_round=reports.append,
            charge=charged.append,
            checkpoints=checkpoints,
        )
    assert [report.survivors for report in reports] == [()] * PATIENCE
    assert set(reports[0].dropped) == {"device-1", "device-2", "device-3"}
    assert charged == [1, 2, 3]
    kept = checkpoints.load("run")
    assert kept is not None
    assert np.array_equal(kept.weights, parameters.flatten(Blobs().model(7)))
    assert (kept.begun, kept.completed, kept.trained) == (3, 0, 0)


def test_too_few_connected_devices_are_named_before_anything_is_charged(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3)
    here.grid.disconnect(1)
    here.grid.disconnect(2)
    charged: list[int] = []
    with pytest.raises(RoundFailed, match="1 of 3"):
        here.run(plan_of(), charge=charged.append)
    assert charged == []


def test_a_plan_that_cannot_be_private_is_refused_before_anything_is_charged(
    tmp_path: Path,
) -> None:
    charged: list[int] = []
    with pytest.raises(BadParameters):
        fleet(tmp_path, 2).run(plan_of(least=3), charge=charged.append)
    assert charged == []


def test_a_spent_budget_ends_the_run_with_what_was_trained(tmp_path: Path) -> None:
    event = Gaussian(noise_multiplier=1.0)
    probe = Ledger(MemoryStore(), "people", None, 1e-5)
    for number in range(2):
        probe.charge(f"probe/{number}", event)
    ledger = Ledger(MemoryStore(), "people", probe.spent().epsilon_pld * 1.01, 1e-5)

    def charge(number: int) -> float | None:
        ledger.charge(f"run/{number}", event)
        return ledger.spent().epsilon_pld

    reports: list[RoundReport] = []
    done = fleet(tmp_path, 3).run(
        plan_of(count=5, noise=1.0), charge=charge, on_round=reports.append
    )
    assert (done.ended, done.rounds) == ("budget", 2)
    assert [report.round for report in reports] == [1, 2]
    spent = [report.epsilon for report in reports]
    assert spent[0] is not None
    assert spent[1] is not None
    assert 0 < spent[0] < spent[1]


def test_a_budget_that_is_spent_already_trains_nothing(tmp_path: Path) -> None:
    def refuse(_: int) -> None:
        raise BudgetExceeded("spent")

    done = fleet(tmp_path, 3).run(plan_of(), charge=refuse)
    assert (done.ended, done.rounds) == ("budget", 0)


@pytest.mark.parametrize("mode", ["plain", "he"])
def test_a_run_taken_up_between_rounds_gives_the_undisturbed_model(
    tmp_path: Path, mode: str
) -> None:
    undisturbed = fleet(tmp_path / "a", 3).run(plan_of(mode, count=4))
    here = fleet(tmp_path / "b", 3)
    checkpoints = Checkpoints(tmp_path / "run")
    charged: list[int] = []

    def stop_after_two(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(
            plan_of(mode, count=4),
            charge=charged.append,
            on_round=stop_after_two,
            checkpoints=checkpoints,
        )
    done = here.run(plan_of(mode, count=4), charge=charged.append, checkpoints=checkpoints)
    assert np.array_equal(done.weights, undisturbed.weights)
    assert charged == [1, 2, 3, 4]
    assert done.rounds == 4


def test_the_result_is_the_mean_of_the_last_rounds_weights(tmp_path: Path) -> None:
    def weights(rounds: int, averaged: int) -> np.ndarray:
        plan = plan_of(count=rounds)
        training = msgspec.structs.replace(plan.training, averaged_rounds=averaged)
        done = fleet(tmp_path / f"{rounds}-{averaged}", 3).run(
            msgspec.structs.replace(plan, training=training)
        )
        return done.weights

    after = [weights(rounds, averaged=1) for rounds in (2, 3, 4)]
    assert np.allclose(weights(4, averaged=3), np.mean(after, axis=0), rtol=0, atol=1e-6)


class BrokenOff(Blobs):
    """Ends the hub's process, as it were, in the middle of round 2."""

    calls = 0

    def load(self, data: Path, split: Split) -> Examples:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().load(data, split)


def broken_off(tmp_path: Path, plan: Plan, charge: Charge, last: str = "device-3") -> Fleet:
    """Return a fleet of which ``last`` had not answered round 2 when the hub's process ended."""
    here = fleet(tmp_path / "cut", 3, {last: BrokenOff()})
    with pytest.raises(KeyboardInterrupt):
        here.run(plan, charge=charge, checkpoints=Checkpoints(tmp_path / "run"))
    return here


@pytest.mark.parametrize("last", ["device-1", "device-3"])
def test_a_plain_round_that_broke_off_is_repeated_exactly(tmp_path: Path, last: str) -> None:
    undisturbed = fleet(tmp_path / "undisturbed", 3).run(plan_of(count=4))
    charged: list[int] = []
    here = broken_off(tmp_path, plan_of(count=4), charged.append, last)
    reports: list[RoundReport] = []
    done = here.run(
        plan_of(count=4),
        charge=charged.append,
        on_round=reports.append,
        checkpoints=Checkpoints(tmp_path / "run"),
    )
    assert np.array_equal(done.weights, undisturbed.weights)
    assert charged == [1, 2, 2, 3, 4]  # the same charge once more, which the ledger has already
    assert [(report.round, len(report.survivors)) for report in reports] == [(2, 3), (3, 3), (4, 3)]


def test_a_plain_round_with_noise_that_is_repeated_has_the_same_terms(tmp_path: Path) -> None:
    terms: list[bytes] = []

    class Kept(PlainParty):
        def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
            reply = super().answer(spec, phase, payload, term)
            if spec.key.round == 2:
                terms.append(reply)
            return reply

    def side(name: str, party: PartySum) -> PartySum:
        return Kept(name) if name == "device-1" else party

    here = fleet(tmp_path / "cut", 3, {"device-3": BrokenOff()}, side)
    plan, checkpoints = plan_of(count=2, noise=1.0), Checkpoints(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        here.run(plan, checkpoints=checkpoints)
    assert here.run(plan, checkpoints=checkpoints).rounds == 2
    assert len(terms) == 2
    assert terms[0] == terms[1]


@pytest.mark.parametrize("mode", ["he", "secagg"])
def test_a_hidden_round_that_broke_off_is_lost_and_another_takes_its_place(
    tmp_path: Path, mode: Mode
) -> None:
    charged: list[int] = []
    plan = plan_of(mode, count=3)
    here = broken_off(tmp_path, plan, charged.append)
    reports: list[RoundReport] = []
    checkpoints = Checkpoints(tmp_path / "run")
    done = here.run(plan, charge=charged.append, on_round=reports.append, checkpoints=checkpoints)
    assert charged == [1, 2, 3, 4]
    assert (done.rounds, done.ended) == (3, "complete")
    assert [(report.round, len(report.survivors)) for report in reports] == [(2, 0), (3, 3), (4, 3)]
    assert all("cannot be repeated" in why for why in reports[0].dropped.values())
    assert [report.lost for report in reports] == [True, False, False]
    kept = checkpoints.load("run")
    assert kept is not None
    assert (kept.begun, kept.ended, kept.lost, kept.trained, kept.tailed) == (4, 4, 1, 3, 3)


def test_no_round_takes_a_lost_ones_place_over_the_budget(tmp_path: Path) -> None:
    plan = plan_of("secagg", count=3, noise=0.1)

    def charge(number: int) -> None:
        if number > 3:
            raise BudgetExceeded("spent")

    done = broken_off(tmp_path, plan, charge).run(
        plan, charge=charge, checkpoints=Checkpoints(tmp_path / "run")
    )
    assert (done.rounds, done.ended) == (2, "budget")


def test_a_plain_round_of_which_devices_know_no_more_is_lost(tmp_path: Path) -> None:
    charged: list[int] = []
    here = broken_off(tmp_path, plan_of(count=3), charged.append)
    for number in (1, 2):  # as after a restart: all that is left is that round 2 was answered
        answered = client_app.AnsweredHere()
        answered.note("run", 2)
        name = f"device-{number}"
        party = PlainParty(name)
        app = client_app.build(
            Blobs(), tmp_path / "cut" / name, lambda _, party=party: party, {}, answered
        )
        here.grid.connect(number, app)
    reports: list[RoundReport] = []
    done = here.run(
        plan_of(count=3),
        charge=charged.append,
        on_round=reports.append,
        checkpoints=Checkpoints(tmp_path / "run"),
    )
    assert charged == [1, 2, 2, 3, 4]
    assert done.rounds == 3
    assert "before this process remembers" in reports[0].dropped["device-1"]
    assert [len(report.survivors) for report in reports] == [0, 3, 3]
    assert [report.lost for report in reports] == [True, False, False]


def test_a_round_that_was_thrown_away_is_not_taken_for_one_that_broke_off(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3, {"device-1": Broken(), "device-2": Broken()})
    checkpoints = Checkpoints(tmp_path / "run")
    charged: list[int] = []

    def stop(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(plan_of(), charge=charged.append, on_round=stop, checkpoints=checkpoints)
    kept = checkpoints.load("run")
    assert kept is not None
    assert (kept.begun, kept.ended, kept.lost) == (2, 2, 0)
    here.run(plan_of(count=3), charge=charged.append, checkpoints=checkpoints)
    assert charged == [1, 2, 3]


def test_a_checkpoint_of_before_rounds_were_repeated_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    fleet(tmp_path, 3).run(plan_of(count=1), checkpoints=checkpoints)
    with np.load(tmp_path / "last.npz") as file:
        old = {name: file[name] for name in file.files if name != "broken_off"}
    np.savez(tmp_path / "last.npz", **old)
    kept = checkpoints.load("run")
    assert kept is not None
    assert (kept.begun, kept.completed, kept.ended, kept.lost) == (1, 1, 1, 0)


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    here = fleet(tmp_path, 3)
    here.run(plan_of(count=1), checkpoints=checkpoints)
    with pytest.raises(BadCheckpoint, match="belongs to run 'run'"):
        checkpoints.load("other")
    whole = (tmp_path / "last.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "last.npz").write_bytes(whole[:cut])
        with pytest.raises(BadCheckpoint, match="damaged"):
            checkpoints.load("run")
    assert [path.name for path in tmp_path.glob("last*")] == ["last.npz"]


def test_queries_reach_the_devices_and_failures_leave_the_others(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3)
    here.grid.disconnect(2)
    nodes = here.cohort.nodes
    assert ask(here.grid, nodes, "echo", b"abc", 5) == {"device-1": b"ABC", "device-3": b"ABC"}
    assert ask(here.grid, nodes, "unknown", b"abc", 5, clock=here.grid.clock) == {}


def test_evaluation_counts_rows_and_leaves_out_who_fails(tmp_path: Path) -> None:
    here = fleet(tmp_path, 2, {"device-2": Broken()})
    weights = parameters.flatten(Blobs().model(0))
    scores = evaluate(here.of(plan_of()), weights)
    assert set(scores) == {"device-1"}
    assert scores["device-1"].rows == 60
    assert math.isfinite(scores["device-1"].loss)


@pytest.mark.parametrize(
    "answer",
    [
        messages.EvaluateReply(rows=2, correct=3, loss=0.1),
        messages.EvaluateReply(rows=2, correct=-1, loss=0.1),
        messages.EvaluateReply(rows=-2, correct=-3, loss=0.1),
        messages.EvaluateReply(rows=2, correct=1, loss=math.nan),
        messages.EvaluateReply(rows=2, correct=1, loss=0.1, correct_tuned=3),
        messages.EvaluateReply(rows=2, correct=1, loss=0.1, correct_tuned=-2),
    ],
)
def test_counts_that_cannot_be_are_no_answer(
    tmp_path: Path, answer: messages.EvaluateReply
) -> None:
    here, lying = fleet(tmp_path, 2), ClientApp()

    @lying.evaluate()
    def say(message: Message, _: Context) -> Message:
        return Message(messages.pack(answer), reply_to=message)

    here.grid._apps[2] = lying
    plan = msgspec.structs.replace(plan_of(count=1, least=1), evaluate_every=1)
    weights = parameters.flatten(Blobs().model(plan.seed))
    assert set(evaluate(here.of(plan), weights)) == {"device-1"}
    untrained = RoundReport(1, 0.0, ("device-1",), {}, None, None, 0, 0, 1.0)
    assert interim.measured(here.of(plan), untrained, weights).evaluated == 60


def test_a_device_does_not_train_another_task_or_contribute_out_of_turn(tmp_path: Path) -> None:
    class Other(Blobs):
        name = "other"

    reports: list[RoundReport] = []
    here = fleet(tmp_path, 3, {"device-1": Other()})
    here.run(plan_of(count=1), on_round=reports.append)
    assert "'other', not 'blobs'" in reports[0].dropped["device-1"]


def test_training_leaves_the_callers_random_state_and_threads_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    fleet(tmp_path, 2).run(plan_of(count=1))
    assert torch.equal(torch.rand(4), wanted)
    assert torch.get_num_threads() == threads
