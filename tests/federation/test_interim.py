"""Accuracy between rounds: asked when the plan says, beside the sum and never in its way."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blobs import Blobs
from cohorts import fleet, plan_of

from atoll.federation import interim, parameters
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.engine import InProcessGrid
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.evaluation import evaluate
from atoll.federation.plan import Plan, loads
from atoll.federation.run import RoundReport
from atoll.federation.task import Examples, Split

WEIGHTS_BYTES = parameters.flatten(Blobs().model(0)).nbytes


def asking(every: int, **more: object) -> Plan:
    return msgspec.structs.replace(plan_of(**more), evaluate_every=every)


class Counting(InProcessGrid):
    """Counts the messages of each kind that are pushed."""

    def __init__(self, inner: InProcessGrid) -> None:
        super().__init__(inner._apps)
        self.kinds: list[str] = []

    def push_messages(self, messages):
        outgoing = list(messages)
        self.kinds += [message.metadata.message_type for message in outgoing]
        return super().push_messages(outgoing)


class Unevaluated(Blobs):
    """Trains, and has nothing to evaluate on."""

    def load(self, data: Path, split: Split) -> Examples:
        if split == "test":
            raise OSError("the disk is gone")
        return super().load(data, split)


def told(here, plan, **more) -> dict[int, list[RoundReport]]:
    """Run the plan and return the reports by round, in the order of telling."""
    found: dict[int, list[RoundReport]] = {}
    here.run(
        plan, on_round=lambda report: found.setdefault(report.round, []).append(report), **more
    )
    return found


def test_a_plan_that_does_not_ask_sends_no_evaluation(tmp_path: Path) -> None:
    here = fleet(tmp_path, 2)
    here.grid = Counting(here.grid)
    reports = told(here, plan_of(count=2))
    assert set(here.grid.kinds) == {"train"}
    assert [[one.accuracy for one in round_] for round_ in reports.values()] == [[None], [None]]


def test_every_second_round_is_told_again_with_its_accuracy(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3)
    here.grid = Counting(here.grid)
    reports = told(here, asking(2, count=4))
    assert [len(reports[number]) for number in (1, 2, 3, 4)] == [1, 2, 1, 2]
    assert here.grid.kinds.count("evaluate") == 2 * 3
    before, after = reports[2]
    assert before.accuracy is None
    assert after == replace(
        before,
        accuracy=after.accuracy,
        evaluated=after.evaluated,
        evaluate_seconds=after.evaluate_seconds,
        bytes_down=before.bytes_down + 3 * WEIGHTS_BYTES,
    )


def test_the_accuracy_is_that_of_the_weights_the_run_would_end_with(tmp_path: Path) -> None:
    """Of the mean over the last rounds, where the plan averages them: cohorts.PLAN does."""
    here = fleet(tmp_path, 3)
    reports: dict[int, RoundReport] = {}
    plan = asking(4, count=4)
    done = here.run(plan, on_round=lambda report: reports.update({report.round: report}))
    scores = evaluate(here.of(plan), done.weights).values()
    rows = sum(score.rows for score in scores)
    assert reports[4].evaluated == rows
    assert reports[4].accuracy == sum(score.correct for score in scores) / rows


@pytest.mark.parametrize("mode", ["plain", "secagg"])
def test_asking_changes_no_bit_of_the_model(tmp_path: Path, mode: str) -> None:
    asked = fleet(tmp_path / "a", 3).run(asking(1, mode=mode))
    unasked = fleet(tmp_path / "b", 3).run(plan_of(mode))
    assert np.array_equal(asked.weights, unasked.weights)


def test_too_few_answers_are_no_accuracy_and_no_failure(tmp_path: Path) -> None:
    silent = {"device-1": Unevaluated(), "device-2": Unevaluated()}
    reports = told(fleet(tmp_path, 3, silent), asking(1, count=1))
    assert [one.accuracy for one in reports[1]] == [None, None]
    assert reports[1][-1].evaluated == 0
    assert reports[1][-1].survivors == ("device-1", "device-2", "device-3")


def test_only_devices_that_are_connected_are_asked(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3)
    here.grid.disconnect(3)
    here.grid = Counting(here.grid)
    reports = told(here, asking(1, count=1))
    assert here.grid.kinds.count("evaluate") == 2
    assert reports[1][-1].accuracy is not None


def test_rounds_that_trained_nothing_are_not_evaluated(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3)
    plan = asking(1, count=2, least=3)

    def charge(number: int) -> None:
        if number == 2:
            here.grid.disconnect(3)

    reports: list[RoundReport] = []
    with suppress(RoundFailed):
        here.run(plan, on_round=reports.append, charge=charge)
    assert [(one.round, bool(one.survivors)) for one in reports if one.accuracy is not None] == [
        (1, True)
    ]


def test_a_run_taken_up_again_counts_the_rounds_that_are_in_the_weights(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    here = fleet(tmp_path / "fleet", 2)
    here.run(asking(2, count=1), checkpoints=checkpoints)
    reports = told(here, asking(2, count=3), checkpoints=checkpoints)
    assert {number: len(found) for number, found in reports.items()} == {2: 2, 3: 1}


def test_a_round_says_who_was_drawn_and_who_was_there(tmp_path: Path) -> None:
    here = fleet(tmp_path, 4)
    here.grid.disconnect(4)
    reports = told(here, plan_of(count=1))
    assert (reports[1][0].drawn, reports[1][0].connected) == (4, 3)
    assert not reports[1][0].lost


def test_due_is_a_multiple_and_never_without_a_plan_that_asks() -> None:
    assert [interim.due(asking(3), trained) for trained in range(1, 7)] == [
        *(False, False, True, False, False, True)
    ]
    assert not any(interim.due(plan_of(), trained) for trained in range(1, 7))
    with pytest.raises(BadPlan, match="evaluate_every"):
        loads('name = "n"\ntask = "t"\nmodel = "m"\nevaluate_every = 0\n')
