"""Keys made away from the hub, candidates signed with them, releases rolled out and back."""

import json
import time
from datetime import UTC, datetime

import pytest
from sqlalchemy import insert
from typer.testing import CliRunner

from atoll.fleet import bundle as bundles
from atoll.server import repository
from atoll.server.cli import app
from atoll.server.schema import runs
from atoll.server.settings import Settings

MODEL = "cli-published"


@pytest.fixture
def atoll(monkeypatch):
    for name in ("ATOLL_DATA", "ATOLL_URL", "ATOLL_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, **environment):
        environment |= {"NO_COLOR": "1", "COLUMNS": "200"}
        return CliRunner().invoke(app, list(map(str, arguments)), env=environment)

    return run


@pytest.fixture
def hub_data(running):
    return running.hub.context.settings.data


@pytest.fixture
def candidate(running):
    """Return what leaves a run with a candidate behind, as the pipeline does."""
    context = running.hub.context

    def make(state="gated", reason=""):
        run = f"cli{time.monotonic_ns():x}"
        manifest = bundles.Manifest(
            model=MODEL,
            task="spar",
            run=run,
            created=0.0,
            input=bundles.Input("input", (6, 200)),
            output=bundles.Output("logits"),
            classes=("a", "b"),
            channels=("x",),
        )
        contents = {name: f"{name} of {run}".encode() for name in bundles.FILES[1:]}
        contents[bundles.CARD] = f"# Card of {run}\n\x1b[31mred".encode()
        bundles.write(context.settings.candidates / run, manifest, contents)
        with context.store.begin() as connection:
            connection.execute(
                insert(runs).values(
                    id=run,
                    plan="",
                    name="cli",
                    model=MODEL,
                    state=state,
                    reason=reason,
                    created_at=time.time(),
                    created_by="test",
                    metrics={},
                )
            )
        return run

    return make


def test_releases_are_signed_numbered_and_name_their_fallback(atoll, hub_data, candidate):
    first, second = candidate(), candidate()
    said = atoll("model", "publish", first, "--data", hub_data)
    assert said.exit_code == 0, said.stderr
    assert said.stdout == f"{MODEL} release 1 is published.\n"
    assert f"# Card of {first}" in said.stderr
    assert "\x1b" not in said.stderr
    keys = hub_data / "offline-keys"
    made = atoll("model", "publish", second, "--keys", keys, "--data", hub_data, "--json")
    assert json.loads(made.stdout) == {"model": MODEL, "release": 2, "fallback": 1}
    again = atoll("model", "publish", second, "--data", hub_data)
    assert again.exit_code == 1
    assert f"run {second} is published" in again.stderr
    listed = json.loads(atoll("model", "list", "--data", hub_data, "--json").stdout)
    releases = next(one for one in listed if one["model"] == MODEL)["releases"]
    assert [(one["release"], one["run"]) for one in releases] == [(2, second), (1, first)]


def test_from_another_machine_the_keys_have_to_be_named(atoll, running, hub_data, candidate):
    facts = json.loads((hub_data / "operator.json").read_text())
    access = {"ATOLL_URL": facts["url"], "ATOLL_TOKEN": facts["token"], "ATOLL_DATA": "/none"}
    run = candidate()
    said = atoll("model", "publish", run, **access)
    assert said.exit_code == 2
    assert "/none/offline-keys/targets.pem" in said.stderr
    assert "--keys" in said.stderr
    keys = hub_data / "offline-keys"
    assert atoll("model", "publish", run, "--keys", keys, **access).exit_code == 0


def test_a_key_of_another_hub_is_refused_before_anything_is_sent(
    atoll, hub_data, candidate, tmp_path
):
    atoll("keys", "init", "--keys", tmp_path / "keys", "--data", tmp_path / "other")
    run = candidate()
    said = atoll("model", "publish", run, "--keys", tmp_path / "keys", "--data", hub_data)
    assert said.exit_code == 1
    assert "does not carry your key's signature" in said.stderr


def test_a_candidate_that_is_damaged_is_not_signed(atoll, running, hub_data, candidate):
    run = candidate()
    path = running.hub.context.settings.candidates / run / bundles.MODEL
    path.write_bytes(b"something else")
    said = atoll("model", "publish", run, "--data", hub_data)
    assert said.exit_code == 1
    assert "must not be signed" in said.stderr
    assert bundles.MODEL in said.stderr


@pytest.mark.parametrize("state", ["running", "rejected", "failed"])
def test_a_run_without_a_sound_candidate_is_not_published(atoll, hub_data, candidate, state):
    run = candidate(state, reason="accuracy fell")
    said = atoll("model", "publish", run, "--data", hub_data)
    assert said.exit_code == 1
    assert f"run {run} is {state}" in said.stderr
    assert "accuracy fell" in said.stderr


def test_a_release_is_rolled_out_and_back(atoll, running, hub_data, candidate, wait_until):
    running.enrolled("cli-canary")
    for _ in range(2):
        assert atoll("model", "publish", candidate(), "--data", hub_data).exit_code == 0
    wrong = atoll("model", "roll-out", MODEL, "--canary", "nobody", "--data", hub_data)
    assert wrong.exit_code == 1
    assert "nobody" in wrong.stderr
    said = atoll("model", "roll-out", MODEL, "--canary", "cli-canary", "--data", hub_data)
    assert said.exit_code == 0, said.stderr
    assert f"{MODEL} " in said.stdout
    assert ": canary, 0 of " in said.stdout

    def wanted():
        shown = atoll("device", "show", "cli-canary", "--data", hub_data, "--json")
        return json.loads(shown.stdout)["desired"]

    wait_until(lambda: wanted().get("model") == MODEL, "wanting the release of the canary")
    back = atoll("model", "roll-back", MODEL, "--reason", "odd", "--data", hub_data, "--json")
    assert back.exit_code == 0, back.stderr
    assert json.loads(back.stdout)["state"] == "rolled-back"
    assert json.loads(back.stdout)["reason"] == "odd"
    again = atoll("model", "roll-back", MODEL, "--data", hub_data)
    assert again.exit_code == 1
    assert "rolled-back already" in again.stderr


def test_keys_made_before_the_first_start_never_lie_on_the_hub(atoll, tmp_path):
    data, keys = tmp_path / "hub", tmp_path / "medium" / "keys"
    said = atoll("keys", "init", "--keys", keys, "--data", data)
    assert said.exit_code == 0, said.stderr
    made = said.stdout.split()
    assert made == [str(keys / "root.pem"), str(keys / "targets.pem")]
    assert all(
        (keys / name).stat().st_mode & 0o777 == 0o600 for name in ("root.pem", "targets.pem")
    )
    settings = Settings(data=data)
    assert not settings.offline_keys.exists()
    assert sorted(path.name for path in settings.online_keys.iterdir()) == [
        "snapshot.pem",
        "timestamp.pem",
    ]
    lying = repository.ensure(
        settings.tuf, settings.offline_keys, settings.online_keys, datetime.now(UTC)
    )
    assert not lying
    assert not settings.offline_keys.exists()


def test_keys_of_a_hub_that_has_devices_are_not_replaced(atoll, tmp_path):
    data = tmp_path / "hub"
    atoll("keys", "init", "--keys", tmp_path / "a", "--data", data)
    root = (data / "tuf" / "metadata" / "1.root.json").read_bytes()
    said = atoll("keys", "init", "--keys", tmp_path / "b", "--data", data)
    assert said.exit_code == 1
    assert "nothing was done" in said.stderr
    assert not (tmp_path / "b").exists()
    assert (data / "tuf" / "metadata" / "1.root.json").read_bytes() == root


def test_a_medium_that_cannot_be_written_is_named(atoll, tmp_path):
    (tmp_path / "file").write_text("")
    said = atoll("keys", "init", "--keys", tmp_path / "file" / "keys", "--data", tmp_path / "hub")
    assert said.exit_code == 1
    assert str(tmp_path / "file") in said.stderr
    assert not (tmp_path / "hub" / "tuf").exists()
