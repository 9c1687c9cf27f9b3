"""A simulation that broke off goes on from its directory and comes to the same end."""

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from atoll.federation import plan as plans
from atoll.federation.errors import BadCheckpoint
from atoll.server.cli import app
from atoll.simulations import resumable
from atoll.simulations.populations import named
from atoll.simulations.resumable import Resumable

PLAN = plans.loads("""
name = "test"
task = "digits"
model = "digits"
rounds = 7
evaluate_every = 2
seed = 3
[training]
batch_size = 8
learning_rate = 0.1
server_momentum = 0.5
averaged_rounds = 3
[cohort]
min_devices = 2
sampling_rate = 0.2
[privacy]
mode = "plain"
clip_norm = 0.4
clip = "adaptive"
noise = "central"
noise_multiplier = 0.5
""")


CONTROLLED = msgspec.structs.replace(
    PLAN, training=msgspec.structs.replace(PLAN.training, control_steps=7)
)


class Stopped(Exception):
    pass


def go(folder, stop_after=None, plan=PLAN):
    def on_round(done):
        if done.round == stop_after:
            raise Stopped

    ended, heard = resumable.run(
        plan, named("digits", 30, plan.seed), None, on_round, directory=folder
    )
    return ended, [replace(done, seconds=0.0) for done in heard]


@pytest.mark.parametrize("plan", [PLAN, CONTROLLED], ids=["plain", "control variates"])
def test_it_ends_as_if_it_had_never_broken_off(tmp_path, plan):
    """Cohorts, noise, clipping norm, momentum, the mean of the last rounds and ε included."""
    whole, rounds = go(None, plan=plan)
    for stop_after in (2, 6):
        with pytest.raises(Stopped):
            go(tmp_path, stop_after, plan)
    ended, heard = go(tmp_path, plan=plan)
    assert np.array_equal(ended.weights, whole.weights)
    assert (ended.accuracy, ended.rounds) == (whole.accuracy, whole.rounds)
    assert heard == rounds
    assert len({done.drawn for done in heard}) > 1
    assert len(list(tmp_path.iterdir())) == (3 if plan is CONTROLLED else 2)


def test_what_has_ended_is_told_again_without_a_round(tmp_path):
    whole, rounds = go(tmp_path)
    again, heard = go(tmp_path, stop_after=1)
    assert np.array_equal(again.weights, whole.weights)
    assert heard == rounds


def test_a_line_past_the_state_is_dropped(tmp_path):
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=3)
    lines = tmp_path / resumable.ROUNDS
    for torn in (lines.read_text().splitlines()[-1] + "\n", '{"round": 4, "se'):
        with lines.open("a") as file:
            file.write(torn)
        assert [done.round for done in Resumable(tmp_path, PLAN, 30, None).rounds] == [1, 2, 3]
    assert lines.read_text().count("\n") == 3


def test_lines_that_are_gone_are_not_made_up(tmp_path):
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=3)
    (tmp_path / resumable.ROUNDS).write_text("")
    with pytest.raises(BadCheckpoint, match="tells of 0 rounds"):
        Resumable(tmp_path, PLAN, 30, None)


def test_another_simulation_is_refused(tmp_path):
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=1)
    other = msgspec.structs.replace(PLAN, seed=4)
    for plan, devices, cohort in ((other, 30, None), (PLAN, 31, None), (PLAN, 30, 5)):
        with pytest.raises(BadCheckpoint, match="belongs to run"):
            Resumable(tmp_path, plan, devices, cohort)


def test_a_simulation_is_known_by_what_its_plan_says_and_not_by_the_defaults():
    short = plans.loads('name = "a"\ntask = "digits"\nmodel = "m"')
    long = plans.loads(
        'name = "a"\ntask = "digits"\nmodel = "m"\nrounds = 10\n[privacy]\nbits = 16'
    )
    assert short == long
    assert set(resumable._said(short)) == {"name", "task", "model"}
    assert resumable.identity(short, 3, None) == resumable.identity(long, 3, None)
    labelled = plans.loads('name = "a"\ntask = "digits"\nmodel = "m"\n[cohort.labels]\nx = "y"')
    assert resumable.identity(short, 3, None) != resumable.identity(labelled, 3, None)


def test_the_command_goes_on_from_its_directory(tmp_path):
    file, there = tmp_path / "plan.toml", tmp_path / "there"
    file.write_text(
        'name = "a"\ntask = "digits"\nmodel = "m"\nrounds = 3\nevaluate_every = 1\n'
        '[privacy]\nmode = "plain"'
    )

    def atoll(*more):
        words = ["simulate", str(file), "--devices", "4", "--json", *more]
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 0, said.output
        return json.loads(said.stdout)

    whole = atoll()
    first, again = (atoll("--checkpoint", str(there)) for _ in range(2))
    assert [done["accuracy"] is not None for done in whole["history"]] == [True, True, False]
    assert first["accuracy"] == again["accuracy"] == whole["accuracy"]
    assert again["history"] == first["history"]
    assert again["rounds"]["done"] == 3
