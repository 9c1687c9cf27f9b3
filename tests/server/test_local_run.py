"""A plan without a hub: its folder, its interruptions, and the command that runs it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from atoll.federation import plan as plans
from atoll.federation.errors import BadPlan, DataMissing
from atoll.federation.run import RoundReport
from atoll.fleet import bundle as bundles
from atoll.server import cli_progress, local_run
from atoll.server.cli import app
from atoll.server.errors import AlreadyRunning, Conflict
from atoll.server.local_run import Followed, opened
from atoll.server.recording import MemoryRecorder
from atoll.simulations import devices, digits

PLAN = """
name = "trial"
task = "digits"
model = "digits"
rounds = {rounds}
seed = 5
training = {{ learning_rate = 0.1, local_epochs = 3 }}
cohort = {{ min_devices = 2{more} }}
privacy = {{ mode = "secagg", clip_norm = 2.0, noise_multiplier = {noise}{budget} }}
"""


def plan_of(rounds=3, more="", noise=0.01, budget=""):
    return PLAN.format(rounds=rounds, more=more, noise=noise, budget=budget)


def carry_out(folder, text, dealt, show=lambda _: None):
    with (
        opened(folder, text, dealt, time.time) as run,
        devices.in_process(dealt) as fleet,
    ):
        return run.carry_out(fleet, show), run.resumed


def dealt(folder, count=3):
    return devices.dealt(plans.loads(plan_of()), count, folder / "kept")


def test_an_interrupted_run_goes_on_and_has_spent_what_it_had(tmp_path):
    folder, text = tmp_path / "run", plan_of(rounds=4)

    def interrupt(run):
        if len(run["rounds"]) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(folder, text, dealt(tmp_path), interrupt)
    # New keys, as those of a new process are.
    ended, resumed = carry_out(folder, text, dealt(tmp_path))
    assert resumed
    assert ended["state"] == "gated", ended["reason"]
    assert [one["round"] for one in ended["rounds"]] == [1, 2, 3, 4]
    assert all(one["seconds"] > 0 for one in ended["rounds"])
    taken = [one["seconds"] for one in ended["rounds"]]
    assert ended["metrics"]["rounds"]["seconds"] == pytest.approx(sum(taken) / 4)
    straight, _ = carry_out(tmp_path / "straight", text, dealt(tmp_path))
    spent = [one["epsilon"] for one in straight["rounds"]]
    assert [one["epsilon"] for one in ended["rounds"]] == spent
    assert ended["metrics"]["epsilon"] == spent[-1]
    assert bundles.read(folder / "candidates" / local_run.RUN).model == "digits"


def test_a_folder_holds_one_run_and_says_what_it_holds(tmp_path):
    folder, mine = tmp_path / "run", dealt(tmp_path)
    with (
        opened(folder, plan_of(), mine, time.time),
        pytest.raises(AlreadyRunning, match="another process"),
        opened(folder, plan_of(), mine, time.time),
    ):
        pass
    with pytest.raises(Conflict, match="another plan"), opened(folder, plan_of(9), mine, time.time):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "hub.db").touch()
    with (
        pytest.raises(Conflict, match="no run"),
        opened(tmp_path / "other", plan_of(), mine, time.time),
    ):
        pass
    ended, _ = carry_out(tmp_path / "spent", plan_of(budget=", budget_epsilon = 0.1"), mine)
    assert ended["state"] == "rejected"
    with (
        pytest.raises(Conflict, match="rejected"),
        opened(tmp_path / "spent", plan_of(), mine, time.time),
    ):
        pass


def test_other_devices_do_not_go_on_with_a_run(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path / "run", plan_of(), dealt(tmp_path), interrupt)
    with pytest.raises(Conflict, match="other devices"):
        carry_out(tmp_path / "run", plan_of(), dealt(tmp_path, 4))


def test_rounds_and_evaluating_are_timed_where_the_clock_of_the_run_stands_still():
    ticks = iter([0.0, 1.0, 3.0, 50.0, 54.0])
    inner, heard = MemoryRecorder(), []
    recorder = Followed(inner, lambda: heard.append(1), lambda: next(ticks))
    report = RoundReport(1, 0.0, ("a",), {}, 0.5, None, 1, 1, 1.0)
    recorder.stage("train")
    recorder.round(report)
    recorder.round(replace(report, accuracy=0.4))  # as a round is, once it has been evaluated
    recorder.round(replace(report, round=2))
    recorder.metrics({"epsilon": None})
    told = recorder.rounds_told()
    assert [one.seconds for one in told] == [2.0, 4.0]
    assert [one.evaluate_seconds for one in told] == [47.0, 0.0]
    assert inner.facts == {"epsilon": None}
    assert len(heard) == 5


def test_devices_are_dealt_the_same_in_every_process_and_carry_the_plans_labels(tmp_path):
    plan = plans.loads(plan_of(more=', labels = { role = "train" }'))
    mine = devices.dealt(plan, 12, tmp_path)
    assert [device.name for device in mine][::11] == ["device-01", "device-12"]
    assert all(device.labels == {"role": "train"} for device in mine)
    before = [device.task().load(device.data, "train") for device in mine]
    devices._population.cache_clear()
    after = [device.task().load(device.data, "train") for device in mine]
    for one, two in zip(before, after, strict=True):
        assert one.x.tobytes() == two.x.tobytes()
    assert sum(len(one.y) for one in before) == pytest.approx(len(digits.pools()[0].y), rel=0.1)


def folders(root, labels):
    paths, _ = digits.deal(root, len(labels), 100.0, seed=1)
    for path, text in zip(paths, labels, strict=True):
        if text:
            (path / "labels.toml").write_text(text)
    return paths


def test_a_run_that_is_long_in_coming_says_how_many_devices_are_ready(atoll, monkeypatch):
    monkeypatch.setattr(cli_progress, "MOMENT", 0.0)
    monkeypatch.setattr(cli_progress, "BETWEEN", 0.0)
    said = atoll("--engine", "local", "--devices", 3)
    for what in ("keys made", "devices started"):
        assert [f"{what}: {done} of 3" for done in (1, 2, 3)] == [
            line for line in said.stderr.splitlines() if line.startswith(what)
        ]


def test_folders_are_devices_with_the_labels_in_them(tmp_path):
    folders(tmp_path, ['role = "train"', ""])
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.txt").touch()
    found = devices.found(plans.loads(plan_of()), tmp_path, tmp_path)
    assert [(device.name, device.labels) for device in found] == [
        ("device-00", {"role": "train"}),
        ("device-01", {}),
    ]
    assert len(found[0].task().load(found[0].data, "train").y) > 500


@pytest.mark.parametrize(
    ("spoil", "error", "complaint"),
    [
        (lambda root: (root / "Not An Id").mkdir(), BadPlan, "cannot be a device"),
        (lambda root: (root / "device-00/labels.toml").write_text("role = 1"), BadPlan, "labels"),
        (
            lambda root: [path.unlink() for path in root.glob("*/train.npz")],
            DataMissing,
            "in no folder",
        ),
    ],
)
def test_folders_that_are_no_devices_are_named(tmp_path, spoil, error, complaint):
    folders(tmp_path, ["", ""])
    spoil(tmp_path)
    with pytest.raises(error, match=complaint):
        devices.found(plans.loads(plan_of()), tmp_path, tmp_path)


@pytest.fixture
def atoll(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ATOLL_DATA", "ATOLL_URL", "ATOLL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "plan.toml").write_text(plan_of())

    def run(*arguments):
        command = ["plan", "run", "plan.toml", *map(str, arguments)]
        return CliRunner().invoke(app, command, env={"NO_COLOR": "1", "COLUMNS": "200"})

    return run


def test_a_plan_runs_without_a_hub_and_says_where_the_candidate_is(atoll, tmp_path):
    folders(tmp_path / "data", ["", "", ""])
    # Digits are dealt for training alone: what is there is tested with.
    for path in (tmp_path / "data").iterdir():
        (path / "test.npz").write_bytes((path / "train.npz").read_bytes())
    said = atoll("--engine", "local", "--examples", "data", "--json")
    assert said.exit_code == 0, said.output
    ended = json.loads(said.stdout)
    assert (ended["state"], ended["engine"]) == ("gated", "local")
    assert ended["candidate"] == "runs/trial-1/candidates/local"
    assert bundles.read(tmp_path / ended["candidate"]).run == local_run.RUN
    assert "round 3/3" in said.stderr
    assert "Traceback" not in said.stderr
    again = atoll("--engine", "local", "--devices", 3, "--out", "runs/trial-1")
    assert again.exit_code == 1
    assert "runs/trial-1 holds a run that is gated" in again.stderr


def test_a_run_that_a_gate_refuses_ends_with_1_and_shows_its_rounds(atoll, tmp_path):
    (tmp_path / "plan.toml").write_text(plan_of(rounds=1, noise=50))
    said = atoll("--engine", "local", "--devices", 3, "--out", "out")
    assert said.exit_code == 1
    assert "better than chance" in said.stderr
    assert said.stdout.count("at δ = 1e-05") == 1
    assert not [line for line in said.stdout.splitlines() if line.startswith("epsilon")]
    assert said.stdout.splitlines()[-1].split()[0] == "1"
    assert not (tmp_path / "out" / "candidates").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--engine", "lokal"], "'fleet', 'local', 'ray'"),
        (["--engine", "local"], "give one of the two"),
        (["--engine", "local", "--devices", 3, "--examples", "."], "give one of the two"),
        (["--engine", "local", "--devices", 0], "--devices"),
        (["--devices", 3], "--devices is for --engine local and --engine ray"),
        (["--engine", "fleet", "--ray-address", "auto"], "--ray-address is for --engine"),
        (["--engine", "local", "--devices", 3, "--data", "."], "--examples DIR"),
        (["--engine", "ray", "--devices", 3, "--detach"], "--detach is for a hub"),
        (["--engine", "local", "--devices", 3, "--reason", "x"], "--reason is for a hub"),
        (["--engine", "local", "--devices", 3, "--ray-address", "auto"], "for --engine ray"),
        (["--engine", "local", "--devices", 1], "1 of 1 devices would train"),
        (["--engine", "local", "--examples", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_written(
    atoll, tmp_path, arguments, complaint
):
    said = atoll(*arguments)
    assert said.exit_code == 2, said.output
    assert complaint in said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_a_rule_about_what_agents_report_is_refused_where_there_are_none(atoll, tmp_path):
    rule = """, rule = 'device.power == "mains"'"""
    (tmp_path / "plan.toml").write_text(plan_of(more=rule))
    said = atoll("--engine", "local", "--devices", 3)
    assert said.exit_code == 2
    assert "leave cohort.rule out" in said.stderr


def test_a_cluster_that_is_not_there_leaves_the_run_to_go_on(atoll):
    pytest.importorskip("ray")
    address = ["--ray-address", "127.0.0.1:1"]
    said = atoll("--engine", "ray", "--devices", 3, *address, "--out", "out")
    assert said.exit_code == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in said.stderr
    assert "The same command with --out out goes on" in said.stderr


def test_completion_knows_the_engines():
    environment = {
        **os.environ,
        "_ATOLL_COMPLETE": "complete_bash",
        "COMP_WORDS": "atoll plan run --engine ",
        "COMP_CWORD": "4",
    }
    program = [sys.executable, "-c", "from atoll.server.cli import main; main()"]
    said = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["fleet", "local", "ray"]
