"""A simulation that broke off goes on from its directory and comes to the same end."""

import io
import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from atoll.federation import plan as plans
from atoll.federation.checkpoints import Checkpoint, Checkpoints
from atoll.federation.errors import BadCheckpoint
from atoll.server.cli import app
from atoll.simulations import identity, resumable, simulate_report
from atoll.simulations.populations import Simulated, named
from atoll.simulations.resumable import Resumable
from atoll.simulations.simulate import Round

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


def opened(folder, plan=PLAN, devices=30, cohort=None):
    return Resumable(folder, plan, named("digits", devices, plan.seed), cohort)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def go(folder, stop_after=None, plan=PLAN):
    def on_round(done):
        if done.round == stop_after:
            raise Stopped

    simulated = named("digits", 30, plan.seed)
    kept = folder and Resumable(folder, plan, simulated, None)
    ended, heard = resumable.run(plan, simulated, None, on_round, kept=kept)
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
    assert len(list(tmp_path.iterdir())) == (4 if plan is CONTROLLED else 3)


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
        assert [done.round for done in opened(tmp_path).rounds] == [1, 2, 3]
    assert lines.read_text().count("\n") == 3


def test_lines_that_are_gone_are_not_made_up(tmp_path):
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=3)
    (tmp_path / resumable.ROUNDS).write_text("")
    with pytest.raises(BadCheckpoint, match="tells of 0 rounds"):
        opened(tmp_path)


def changed(**sections):
    plan = PLAN
    for name, value in sections.items():
        section = isinstance(value, dict)
        new = msgspec.structs.replace(getattr(plan, name), **value) if section else value
        plan = msgspec.structs.replace(plan, **{name: new})
    return plan


@pytest.mark.parametrize(
    ("other", "differences"),
    [
        ({"plan": changed(seed=4)}, ["seed: 3 there, 4 here"]),
        ({"plan": changed(rounds=9)}, ["rounds: 7 there, 9 here"]),
        ({"devices": 31}, ["devices: 30 there, 31 here"]),
        ({"cohort": 5}, ["fixed size of the cohort: the plan's there, 5 here"]),
        (
            {"plan": changed(privacy={"clip": "fixed"}, cohort={"labels": {"a": "b"}})},
            [
                'cohort.labels: left out there, {"a": "b"} here',
                'privacy.clip: "adaptive" there, left out here',
            ],
        ),
    ],
    ids=["seed", "rounds", "devices", "cohort", "fields"],
)
def test_another_simulation_is_refused_by_what_differs(tmp_path, other, differences):
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=1)
    before = contents(tmp_path)
    with pytest.raises(BadCheckpoint, match="holds another simulation") as refused:
        opened(tmp_path, **other)
    assert f"({'; '.join(differences)})" in str(refused.value)
    assert "give another directory" in str(refused.value)
    assert contents(tmp_path) == before


def test_other_examples_are_another_simulation(tmp_path):
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=1)
    task, population = named("digits", 30, PLAN.seed)
    fewer = Simulated(task, replace(population, rows=49))
    with pytest.raises(BadCheckpoint, match="data: devices held other examples"):
        Resumable(tmp_path, PLAN, fewer, None)


def test_of_many_differences_the_first_are_told(tmp_path):
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=1)
    plan = plans.loads('name = "test"\ntask = "digits"\nmodel = "digits"')
    with pytest.raises(BadCheckpoint, match=r"; and \d+ more\)"):
        opened(tmp_path, plan)


def test_a_state_that_does_not_say_what_it_is_of_goes_on_and_then_says_so(tmp_path):
    """As they were written before."""
    whole, _ = go(None)
    with pytest.raises(Stopped):
        go(tmp_path, stop_after=2)
    (tmp_path / resumable.OF).unlink()
    with pytest.raises(BadCheckpoint, match="belongs to run"):
        opened(tmp_path, devices=31)
    ended, _ = go(tmp_path)
    assert np.array_equal(ended.weights, whole.weights)
    with pytest.raises(BadCheckpoint, match="devices: 30 there, 31 here"):
        opened(tmp_path, devices=31)


def test_a_file_is_no_directory(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text("kept")
    for path in (file, file / "below"):
        with pytest.raises(BadCheckpoint, match=r"is a file, or below one.* new or empty"):
            opened(path)
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"thesis.tex": b"x"}, "holds no simulation, but 'thesis.tex': give"),
        ({"a.txt": b"x", "rounds.jsonl": b"{}\n", "b": b""}, "but 'a.txt' and more: give"),
        ({"last.npz": b"x"}, "holds a state without rounds.jsonl"),
        ({"last.npz": b"no archive", "rounds.jsonl": b""}, "last.npz is damaged"),
        ({"rounds.jsonl": b"{}\n{}\n"}, "rounds.jsonl is damaged|tells of 2 rounds"),
        ({"rounds.jsonl": b"\xff\n"}, "rounds.jsonl is damaged"),
        (
            {"simulation.json": b"{}", "last.npz": b"x", "rounds.jsonl": b""},
            "simulation.json is damaged",
        ),
    ],
)
def test_a_directory_of_something_else_is_refused_and_left_as_it_is(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=says):
        opened(tmp_path)
    assert contents(tmp_path) == files


def test_a_single_array_is_no_state(tmp_path):
    np.save(tmp_path / "last.npy", np.zeros(3))
    (tmp_path / "last.npy").rename(tmp_path / "last.npz")
    (tmp_path / resumable.ROUNDS).touch()
    with pytest.raises(BadCheckpoint, match="is damaged"):
        opened(tmp_path)


def test_the_state_of_a_federated_run_is_no_simulation(tmp_path):
    Checkpoints(tmp_path).save(Checkpoint.fresh("run", np.zeros(3, np.float32)))
    with pytest.raises(BadCheckpoint, match=r"state without rounds\.jsonl"):
        opened(tmp_path)


def test_control_variates_that_are_gone_are_not_begun_anew(tmp_path):
    with pytest.raises(Stopped):
        go(tmp_path, 2, CONTROLLED)
    (tmp_path / "carried-2.npz").write_bytes(b"torn")
    with pytest.raises(BadCheckpoint, match=r"carried-2\.npz is gone or damaged"):
        opened(tmp_path, CONTROLLED)
    (tmp_path / "carried-2.npz").unlink()
    with pytest.raises(BadCheckpoint, match=r"carried-2\.npz is gone or damaged"):
        opened(tmp_path, CONTROLLED)


def test_hidden_files_and_a_state_that_broke_off_are_nobodys(tmp_path):
    for name in (".DS_Store", "last.part", "simulation.part", "simulation.json"):
        (tmp_path / name).touch()
    assert opened(tmp_path).rounds == []


def test_a_simulation_is_known_by_what_its_plan_says_and_not_by_the_defaults():
    short = plans.loads('name = "a"\ntask = "digits"\nmodel = "m"')
    long = plans.loads(
        'name = "a"\ntask = "digits"\nmodel = "m"\nrounds = 10\n[privacy]\nbits = 16'
    )
    assert short == long
    population = named("digits", 3, 0).population
    made = identity.of(short, population, None)
    assert set(made.plan) == {"name", "task", "model"}
    assert made == identity.of(long, population, None)
    labelled = plans.loads('name = "a"\ntask = "digits"\nmodel = "m"\n[cohort.labels]\nx = "y"')
    assert made.run != identity.of(labelled, population, None).run


def test_the_name_of_a_run_stays_what_it_was_so_that_kept_ones_go_on():
    population = named("digits", 30, 0).population
    assert identity.of(PLAN, population, 5).run == "test-f63d22d578fa0f9f"
    other = changed(privacy={"examples": plans.ExamplePrivacy(1.0, 1.0, 0.1, 3)})
    assert identity.of(other, population, None).run == "test-4d5dc5ac06970272"


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
    assert all(done["accuracy"] is not None for done in whole["history"])
    assert first["accuracy"] == again["accuracy"] == whole["accuracy"]
    assert again["history"] == first["history"]
    assert again["rounds"]["done"] == 3
    assert (first["rounds"]["before"], again["rounds"]["before"]) == (0, 3)
    assert again["rounds"]["seconds"] == first["rounds"]["seconds"] > 0
    assert again["rounds"]["seconds"] == sum(done["seconds"] for done in again["history"])


def test_the_command_says_what_is_wrong_with_its_directory(tmp_path):
    plan, there = tmp_path / "plan.toml", tmp_path / "there"
    plan.write_text('name = "a"\ntask = "digits"\nmodel = "m"\nrounds = 1\nprivacy.mode = "plain"')

    def atoll(directory, *more):
        words = ["simulate", str(plan), "--devices", "4", "--checkpoint", str(directory), *more]
        return CliRunner().invoke(app, words, env={"COLUMNS": "300", "NO_COLOR": "1"})

    assert atoll(there).exit_code == 0
    for directory, more, says in [
        (plan, (), f"error: {plan} is a file"),
        (tmp_path, (), f"error: {tmp_path} holds no simulation, but 'plan.toml'"),
        (there, ("--seed", "9"), f"error: {there} holds another simulation (seed: left out"),
    ]:
        said = atoll(directory, *more)
        assert said.exit_code == 1
        assert said.stderr.startswith(says)
        assert said.stderr.count("\n") == 1


def test_progress_begins_at_the_rounds_that_are_done():
    done = Round(5, 0.1, 3, 3, 0.5, None, 1.0, 0.25)
    for terminal, begins in ((True, "4/10 rounds"), (False, "going on after round 4/10\n")):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
        with simulate_report._progress(10, 4, console) as show:
            assert terminal or file.getvalue() == begins
            show(done)
        assert begins in file.getvalue()
        assert "5/10" in file.getvalue()
        assert "0/10 rounds" not in file.getvalue()
