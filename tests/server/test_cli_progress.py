"""Following a run."""

import io
import itertools
import re

import pytest

from atoll.server.cli_progress import (
    BETWEEN,
    MOMENT,
    PATIENCE,
    RunProgress,
    counting,
    describe,
    follow,
    lines,
    outcome,
    standing_of,
)
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
        | {"bytes_up": None, "bytes_down": None, "drawn": 3, "lost": False, "accuracy": None}
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
        ["round 1/3  loss 1.0000  ε 10  2 of 3 devices  2.0 s"],
        ["round 2/3  loss 0.5000  ε 20  2 of 3 devices  2.0 s"],
        [],
        ["gated", "round 3/3  loss 0.3333  ε 30  2 of 3 devices  2.0 s", "stage: gate"],
    ]


def test_the_time_left_is_that_of_the_rounds_to_come():
    assert describe(a_run(done=1))[0] == "train  about 4 s of training left"
    assert describe(a_run("gated", done=1))[0] == "gated"
    assert describe(a_run()) == ("train", "")


def test_a_round_says_what_it_moved_and_how_right_the_weights_are():
    run = a_run(done=1)
    run["rounds"][0] |= {"bytes_up": 3 * 2**20, "bytes_down": 1536, "accuracy": 0.875}
    said = "loss 1.0000  accuracy 87.5%  ε 10  2 of 3 devices  3.0 MiB up, 1.5 KiB down  2.0 s"
    assert lines(None, run)[1] == f"round 1/3  {said}"
    assert describe(run) == ("train  about 4 s of training left", said)


def test_the_last_known_accuracy_stays_in_sight():
    run = a_run(done=2)
    run["rounds"][0]["accuracy"] = 0.875
    assert describe(run)[1].endswith("2 of 3 devices  2.0 s  accuracy 87.5% before")


def test_a_terminal_is_shown_all_of_it_however_narrow(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    run = a_run(done=2)
    run["rounds"][1] |= {"bytes_up": 3 * 2**20, "bytes_down": 1536, "accuracy": 0.875}
    with RunProgress() as progress:
        progress.show(run)
    said = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", screen.getvalue()).split())
    assert "2/3 rounds train about 2 s of training left" in said
    assert "loss 0.5000 accuracy 87.5% ε 20 2 of 3 devices 3.0 MiB up, 1.5 KiB down 2.0 s" in said


def test_an_accuracy_that_comes_after_its_round_is_a_line_of_its_own():
    before, after = a_run(done=2), a_run(done=2)
    after["rounds"][1]["accuracy"] = 0.5
    assert lines(before, after) == ["round 2/3  accuracy 50.0%"]
    assert lines(after, after) == []


def test_what_takes_a_moment_is_not_counted_aloud(capsys):
    now = itertools.count(0.0, MOMENT / 10)
    with counting("keys made", lambda: next(now)) as heard:
        for done in range(1, 9):
            heard(done, 8)
    assert capsys.readouterr().err == ""


def test_what_takes_long_says_how_far_it_is_now_and_then(capsys):
    now = itertools.count()  # seconds, one a look: a device takes one, and a line one more
    with counting("keys made", lambda: next(now)) as heard:
        for done in range(1, 10_001):
            heard(done * 10, 100_000)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["keys made: 20 of 100,000", "keys made: 120 of 100,000"]
    assert 10_000 / (BETWEEN + 1) - 2 < len(said) < 10_000 / BETWEEN + 2


def test_on_a_terminal_what_takes_long_has_a_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    now = itertools.count(0.0, MOMENT)
    with counting("keys made", lambda: next(now)) as heard:
        heard(1, 100_000)
        heard(70_000, 100_000)
    assert "70,000/100,000 keys made" in screen.getvalue()


def test_a_lost_round_and_the_one_that_makes_up_for_it_are_one_of_those_planned():
    run = a_run("gated", done=4)
    run["rounds"][1] |= {"survivors": [], "lost": True, "loss": None, "seconds": 0.0}
    assert str(standing_of(run)) == "3 of 3 rounds, 1 lost"
    told = lines(None, run)
    assert [line.split("  ")[0] for line in told[1:5]] == [
        *("round 1/3", "round 2/3", "round 2/3", "round 3/3")
    ]
    assert told[2] == "round 2/3  lost: it broke off"


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
        "ε": "123",
    }


def test_what_was_spent_is_told_once():
    privacy = {"delta": 1e-5, "epsilon": 2.5, "epsilon_rdp": 2.75, "budget": 3.0}
    examples = {"examples": {"epsilon": 1.5, "delta": 1e-6}}
    metrics = {"epsilon": 2.5, "delta": 1e-5, "privacy": privacy | examples}
    assert outcome(a_run(metrics=metrics)) == {
        "ε": "2.5 at δ = 1e-05",
        "privacy budget": "3",
        "privacy epsilon_rdp": "2.75",
        "privacy examples delta": "1e-06",
        "privacy examples epsilon": "1.5",
    }
