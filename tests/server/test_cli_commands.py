"""The commands against a real hub."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import insert, update
from typer.testing import CliRunner

from atoll.fleet.token import EnrolmentToken
from atoll.server import auth
from atoll.server.cli import app
from atoll.server.schema import releases, rollouts, rounds, runs

PLAN = 'name = "first-steps"\ntask = "spar"\nmodel = "shoulder"\nrounds = 2\n'


@pytest.fixture
def atoll(running, monkeypatch):
    """Run a command with ``--data`` of the running hub, or with ``token``."""
    for name in ("ATOLL_DATA", "ATOLL_URL", "ATOLL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    context = running.hub.context

    def run(*arguments, token=None):
        environment = {"NO_COLOR": "1", "COLUMNS": "200"}
        if token is None:
            arguments = (*arguments, "--data", str(context.settings.data))
        else:
            environment |= {"ATOLL_URL": context.addresses.operator_url, "ATOLL_TOKEN": token}
        return CliRunner().invoke(app, list(map(str, arguments)), env=environment)

    return run


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def operator(running, name, role):
    with running.hub.context.store.begin() as connection:
        return auth.create(connection, name, role, time.time())


def test_a_token_is_printed_alone_and_lets_the_named_device_in(atoll, running):
    said = atoll("device", "token", "--device", "cli-a", "--label", "role=train", "--ttl", "1h")
    assert said.exit_code == 0
    token = EnrolmentToken.decode(said.stdout)
    assert token.device == "cli-a"
    assert token.url == running.hub.context.addresses.device_url
    assert "within 60 min" in said.stderr
    assert said.stdout.strip() not in said.stderr


def test_a_token_in_json_tells_when_it_ends(atoll):
    said = json.loads(atoll("device", "token", "--ttl", "10m", "--json").stdout)
    assert said["device"] is None
    assert said["expires_at"] == pytest.approx(time.time() + 600, abs=30)


def test_a_refused_ttl_is_the_hubs_sentence(atoll):
    said = atoll("device", "token", "--ttl", "9999d")
    assert said.exit_code == 1
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("\n") == 1


def test_devices_are_listed_shown_and_revoked(atoll, running):
    running.enrolled("cli-b")
    listed = atoll("device", "list")
    line = next(line for line in listed.stdout.splitlines() if line.startswith("cli-b"))
    assert "offline" in line
    assert "never" in line
    shown = atoll("device", "show", "cli-b")
    assert shown.exit_code == 0
    assert "certificate  runs out in 30 d" in shown.stdout
    assert json.loads(atoll("device", "show", "cli-b", "--json").stdout)["id"] == "cli-b"
    done = atoll("device", "revoke", "cli-b", "--reason", "lost")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "cli-b is revoked.\n"
    states = {row["id"]: row for row in json.loads(atoll("device", "list", "--json").stdout)}
    assert states["cli-b"]["revoked_at"] is not None
    again = atoll("device", "revoke", "cli-b")
    assert again.exit_code == 1
    assert "cli-b" in again.stderr


def test_a_device_that_is_not_there_is_refused_by_name(atoll):
    for command in ("show", "revoke"):
        said = atoll("device", command, "no-such-device")
        assert said.exit_code == 1
        assert "no-such-device" in said.stderr


def test_a_wrong_token_is_not_allowed_and_says_where_it_came_from(atoll):
    said = atoll("device", "list", token="atollop_wrong")
    assert said.exit_code == 4
    assert "does not accept the token from $ATOLL_URL and $ATOLL_TOKEN" in said.stderr


@pytest.mark.parametrize("token", ["bad\ntoken", "tökén"])
def test_a_token_that_cannot_be_one_is_misuse(atoll, token):
    said = atoll("device", "list", token=token)
    assert said.exit_code == 2
    assert "token" in said.stderr


def test_a_role_that_may_not_is_told_so(atoll, running):
    viewer = operator(running, "cli-viewer", "viewer")
    assert atoll("device", "list", token=viewer).exit_code == 0
    said = atoll("device", "token", token=viewer)
    assert said.exit_code == 4
    assert "cli-viewer has the role viewer" in said.stderr


def test_a_login_link_is_printed_alone(atoll, running):
    said = atoll("login")
    url = running.hub.context.addresses.operator_url
    assert said.stdout.startswith(f"{url}/login?code=")
    assert said.stdout.count("\n") == 1


def test_a_full_disk_is_told_in_a_sentence(running):
    program = "from atoll.server.cli import main; main()"
    data = str(running.hub.context.settings.data)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "device", "list", "--json", "--data", data],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device: standard output\n"


def test_a_plan_is_proposed_and_waits_where_the_role_may_not_approve(atoll, running, plan):
    token = operator(running, "cli-operator", "operator")
    said = atoll("plan", "run", plan, "--reason", "to try", token=token)
    assert said.exit_code == 0, said.stderr
    run = said.stdout.strip()
    assert f"atoll plan approve {run}" in said.stderr
    shown = json.loads(atoll("plan", "show", run, "--json").stdout)
    assert shown["state"] == "proposed"
    assert shown["reason"] == "to try"
    assert run in atoll("plan", "list").stdout
    assert atoll("plan", "approve", run, token=token).exit_code == 4
    assert atoll("plan", "cancel", run).exit_code == 0
    again = atoll("plan", "approve", run)
    assert again.exit_code == 1
    assert "cancelled" in again.stderr


def test_an_unknown_task_is_the_hubs_refusal(atoll, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace('"spar"', '"no-such-task"'))
    said = atoll("plan", "run", path)
    assert said.exit_code == 1
    assert "no-such-task" in said.stderr


def a_run(running, state, **values):
    """Write a run as its own process leaves it."""
    made = f"cli{time.monotonic_ns():x}"[:32]
    with running.hub.context.store.begin() as connection:
        connection.execute(
            insert(runs).values(
                id=made,
                plan=PLAN,
                name="first-steps",
                model="shoulder",
                state=state,
                created_at=time.time(),
                created_by="test",
                started_at=time.time() - 60,
                **({"metrics": {}} | values),
            )
        )
        for number in (1, 2):
            connection.execute(
                insert(rounds).values(
                    run=made,
                    round=number,
                    started_at=time.time(),
                    seconds=1.5,
                    survivors=["a", "b"],
                    dropped=["c"],
                    loss=0.5,
                    epsilon=None,
                )
            )
    return made


def test_a_run_is_shown_with_its_rounds_and_what_it_measured(atoll, running):
    metrics = {"accuracy": {"known": {"float": 0.987, "int8": 0.981}}, "epsilon": 812.5}
    run = a_run(running, "gated", stage="gate", metrics=metrics, ended_at=time.time())
    shown = atoll("plan", "show", run)
    assert shown.exit_code == 0, shown.stderr
    facts = [line.split() for line in shown.stdout.splitlines()]
    assert ["accuracy", "known", "int8", "0.981"] in facts
    assert ["ε", "812"] in facts
    assert len([line for line in shown.stdout.splitlines() if "0.5000" in line]) == 2


def test_the_rounds_of_a_run_are_shown_with_what_is_known_of_them(atoll, running):
    run = a_run(running, "gated", stage="gate", ended_at=time.time())
    with running.hub.context.store.begin() as connection:
        known = {"bytes_up": 2**20, "bytes_down": 512, "drawn": 5, "accuracy": 0.625}
        mine = rounds.c.run == run
        connection.execute(update(rounds).where(mine, rounds.c.round == 1).values(known))
        lost = {"survivors": [], "lost": True, "loss": None}
        connection.execute(update(rounds).where(mine, rounds.c.round == 2).values(lost))
    shown = [line.split() for line in atoll("plan", "show", run).stdout.splitlines()]
    assert ["rounds", "1", "of", "2", "rounds,", "1", "lost"] in shown
    first = ["1", "1.5", "2", "of", "5", "0.5000", "62.5%", "–", "1.0", "MiB", "512", "B"]
    assert first in shown
    assert ["2", "1.5", "0", "of", "1", "–", "–", "–", "–", "–", "lost"] in shown


def test_a_record_is_printed_and_lists_of_runs_are_spared_it(atoll, running):
    run = a_run(running, "gated", record={"seed": 11}, ended_at=time.time())
    told = json.loads(atoll("plan", "record", run).stdout)
    assert (told["run"], told["seed"], len(told["rounds"])) == (run, 11, 2)
    assert "record" not in json.loads(atoll("plan", "show", run, "--json").stdout)
    assert all("record" not in one for one in json.loads(atoll("plan", "list", "--json").stdout))
    unknown = atoll("plan", "record", "no-such-run")
    assert unknown.exit_code == 1
    assert "no-such-run" in unknown.stderr


def test_watching_a_run_ends_as_the_run_did(atoll, running):
    gated = a_run(running, "gated", stage="gate", ended_at=time.time())
    said = atoll("plan", "show", gated, "--watch")
    assert said.exit_code == 0
    assert f"atoll model publish {gated}" in said.stderr
    assert "round 2/2  loss 0.5000  2 of 3 devices  1.5 s" in said.stderr
    failed = a_run(running, "failed", reason="two devices answered", ended_at=time.time())
    said = atoll("plan", "show", failed, "--watch", "--json")
    assert said.exit_code == 1
    assert json.loads(said.stdout)["state"] == "failed"
    assert "two devices answered" in said.stderr


def test_models_are_listed_with_where_their_rollouts_stand(atoll, running):
    with running.hub.context.store.begin() as connection:
        for release in (1, 2):
            connection.execute(
                insert(releases).values(
                    model="cli-model",
                    release=release,
                    manifest={},
                    profile=b"",
                    published_at=time.time(),
                    published_by="test",
                )
            )
        connection.execute(
            insert(rollouts).values(
                model="cli-model",
                release=1,
                state="done",
                canaries=[],
                targets=[],
                created_at=time.time(),
                created_by="test",
                updated_at=time.time(),
            )
        )
    shown = [
        line.split() for line in atoll("model", "list").stdout.splitlines() if "cli-model" in line
    ]
    assert [(line[1], line[-1]) for line in shown] == [("2", "test"), ("1", "done")]


def test_a_model_that_is_not_published_cannot_be_rolled_out(atoll):
    said = atoll("model", "roll-out", "no-such-model")
    assert said.exit_code == 1
    assert "no-such-model" in said.stderr


def test_a_run_that_is_approved_goes_on_without_its_watcher(atoll, running, plan):
    said = atoll("plan", "run", plan, "--detach")
    assert said.exit_code == 0, said.stderr
    run = said.stdout.strip()
    assert f"atoll plan show {run} --watch" in said.stderr
    shown = json.loads(atoll("plan", "show", run, "--json").stdout)
    assert shown["approved_by"] == "admin"
    with running.hub.context.store.begin() as connection:  # nobody is there to train
        connection.execute(update(runs).where(runs.c.id == run).values(state="cancelled"))
