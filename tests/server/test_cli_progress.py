"""Following a run."""

import itertools

import pytest

from atoll.server.cli_progress import PATIENCE, describe, follow, lines, outcome, time_left
from atoll.server.client import NoHub

PLAN = 'name = "n"\ntask = "t"\nmodel = "m"\nrounds = 3\n'


def a_run(state="running", done=0, stage="train", reason="", **more):
    rounds = [
        {
            "round": number,
            "seconds": 2.0,
            "survivors": ["a", "b"],
            "dropped": ["c"],
            "loss": 1.0 / number,
            "epsilon": 10.0 * number,
        }
        for number in range(1, done + 1)
    ]
    shared = {"state": state, "stage": stage, "reason": reason, "rounds": rounds, "plan": PLAN}
    return {**shared, "metrics": {}, **more}


def test_each_change_is_a_line_and_no_change_is_none():
    seen = [a_run("approved", stage=""), a_run(), a_run(done=1), a_run(done=2), a_run(done=2)]
    seen.append(a_run("gated", done=3, stage="gate"))
    told = [lines(before, now) for before, now in itertools.pairwise([None, *seen])]
    assert told == [
        ["approved"],
        ["running", "stage: train"],
        ["round 1/3  loss 1.0000  ε 10  2 answered, 1 dropped  2.0 s"],
        ["round 2/3  loss 0.5000  ε 20  2 answered, 1 dropped  2.0 s"],
        [],
        ["gated", "round 3/3  loss 0.3333  ε 30  2 answered, 1 dropped  2.0 s", "stage: gate"],
    ]


def test_the_time_left_is_that_of_the_rounds_to_come():
    assert time_left([], 3) is None
    assert time_left(a_run(done=1)["rounds"], 3) == 4.0
    assert "about 4 s of training left" in describe(a_run(done=1), 3)
    assert "left" not in describe(a_run("gated", done=1), 3)


def test_a_plan_of_a_newer_version_is_shown_all_the_same():
    run = a_run(done=1, plan="unknown = 1")
    assert lines(None, run)[1].startswith("round 1  loss")


def test_following_ends_with_the_run_and_outlives_a_restart_of_the_hub():
    answers = iter([a_run(), NoHub("gone"), NoHub("gone"), a_run(done=1), a_run("failed")])
    shown, slept = [], []

    def look():
        answer = next(answers)
        if isinstance(answer, NoHub):
            raise answer
        return answer

    ended = follow(look, shown.append, slept.append, clock=lambda: 0.0)
    assert ended["state"] == "failed"
    assert len(shown) == 3
    assert len(slept) == 4


def test_a_hub_that_stays_away_is_an_error():
    now = itertools.count(0.0, PATIENCE / 3)

    def look():
        raise NoHub("gone")

    with pytest.raises(NoHub):
        follow(look, print, lambda _seconds: None, clock=lambda: next(now))


def test_metrics_are_shown_however_deep_they_are():
    metrics = {
        "accuracy": {"known": {"float": 0.99, "int8": 0.98}},
        "epsilon": 123.456,
        "delta": None,
        "gates": [{"name": "x"}],
    }
    assert outcome(a_run(metrics=metrics)) == {
        "accuracy known float": "0.99",
        "accuracy known int8": "0.98",
        "epsilon": "123.5",
    }
