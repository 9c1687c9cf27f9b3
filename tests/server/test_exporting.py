"""A hub's runs at a tracking server: told as they go on, caught up with, never waited for."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))

from mlflow_server import Tracking, serving  # after the path

from atoll.federation.run import RoundReport
from atoll.server import exporting
from atoll.server.cli import app
from atoll.server.errors import Unavailable
from atoll.server.exporting import Exporter, mark_of
from atoll.server.hub import Hub
from atoll.server.mlflow import Mlflow
from atoll.server.recording import SqlRecorder
from atoll.server.schema import exports, runs
from atoll.server.store import Store

PLAN = 'name = "steps"\ntask = "spar"\nmodel = "{model}"\nrounds = 3\n'


@pytest.fixture
def tracking() -> Tracking:
    return Tracking()


@pytest.fixture
def url(tracking: Tracking) -> Iterator[str]:
    with serving(tracking) as url:
        yield url


@pytest.fixture
def exporter(store: Store, tmp_path: Path, url: str) -> Iterator[Exporter]:
    with Mlflow(url.replace("//", "//ann:secret@")) as mlflow:
        yield Exporter(store, tmp_path / "runs", mlflow, lambda: 7.0)


def add(store: Store, run: str, state: str = "running", model: str = "m", **values: Any) -> None:
    with store.begin() as connection:
        connection.execute(
            insert(runs).values(
                id=run,
                plan=PLAN.format(model=model),
                name="steps",
                model=model,
                state=state,
                created_at=1.0,
                created_by="ann",
                **({"started_at": 2.0, "metrics": {}} | values),
            )
        )


def train(store: Store, run: str, number: int, **more: Any) -> None:
    report = RoundReport(number, 1.0, ("a", "b"), {"c": "late"}, 0.5, None, 10, 20, 1.0, 3, 3)
    SqlRecorder(store, run, lambda: 100.0 * number).round(replace(report, **more))


def end(store: Store, run: str, state: str) -> None:
    with store.begin() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(state=state, ended_at=500.0))


def told(tracking: Tracking) -> dict[str, tuple[str, dict[str, list[int]]]]:
    """Return by run its status and the steps of each metric."""
    return {
        held["tags"]["atoll.run"]: (
            held["info"]["status"],
            {key: [point["step"] for point in history] for key, history in held["metrics"].items()},
        )
        for held in tracking.runs.values()
    }


def test_rounds_are_told_as_they_come_and_each_once(
    store: Store, exporter: Exporter, tracking: Tracking
) -> None:
    add(store, "r1")
    assert exporter.tick() == 1
    for number in (1, 2):
        train(store, "r1", number)
        assert exporter.tick() == 1
    status, metrics = told(tracking)["r1"]
    assert (status, metrics["loss"], metrics["survivors"]) == ("RUNNING", [1, 2], [1, 2])
    assert "accuracy" not in metrics
    train(store, "r1", 2, accuracy=0.75, evaluated=40)  # what evaluators answered comes after
    assert exporter.tick() == 1
    assert told(tracking)["r1"][1]["accuracy"] == [2]
    assert told(tracking)["r1"][1]["loss"] == [1, 2]


def test_a_run_that_has_not_changed_costs_no_request(
    store: Store, exporter: Exporter, tracking: Tracking
) -> None:
    add(store, "r1")
    train(store, "r1", 1)
    exporter.tick()
    end(store, "r1", "gated")
    assert exporter.tick() == 1
    before = tracking.asked.copy()
    assert exporter.tick() == 0
    with store.begin() as connection:
        connection.execute(update(runs).values(state="published"))
    assert exporter.tick() == 0
    assert tracking.asked == before


def test_a_server_that_was_down_is_caught_up_with(
    store: Store, exporter: Exporter, tracking: Tracking
) -> None:
    tracking.answers = 503
    add(store, "r1")
    train(store, "r1", 1)
    before = _rows(store)
    with pytest.raises(Unavailable):
        exporter.tick()
    assert _rows(store) == before
    train(store, "r1", 2, lost=True, survivors=())
    train(store, "r1", 3)
    end(store, "r1", "gated")
    with pytest.raises(Unavailable):
        exporter.tick()
    tracking.answers = None
    assert exporter.tick() == 1
    status, metrics = told(tracking)["r1"]
    assert (status, metrics["loss"]) == ("FINISHED", [1, 3])
    [file] = tracking.files
    assert file.endswith("/artifacts/record.json")


def _rows(store: Store) -> list[Any]:
    with store.read() as connection:
        return [tuple(row) for row in connection.execute(select(runs))]


def test_what_broke_off_in_the_middle_is_made_good(
    store: Store, exporter: Exporter, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was made at the server and nothing more, when the connection went."""
    add(store, "r1")
    train(store, "r1", 1)
    log_batch, failing = Tracking.runs_log_batch, [True]

    def torn(self: Tracking, run_id: str, **parts: Any) -> Any:
        if failing and "params" in parts:
            raise RuntimeError("the server dies here")
        return log_batch(self, run_id, **parts)

    monkeypatch.setattr(Tracking, "runs_log_batch", torn)
    with pytest.raises(Unavailable):
        exporter.tick()
    failing.clear()
    assert len(tracking.runs) == 1
    assert exporter.tick() == 1
    assert len(tracking.runs) == 1
    assert told(tracking)["r1"][1]["loss"] == [1]


def test_a_run_that_is_refused_keeps_no_other_from_its_turn(
    store: Store, exporter: Exporter, tracking: Tracking, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tracking.experiments_create("gone")["experiment_id"]
    tracking.experiments_delete(gone)
    add(store, "r1", model="gone")
    add(store, "r2")
    assert exporter.tick() == 2
    assert set(told(tracking)) == {"r2"}
    assert "r1 was not exported" in caplog.text
    assert "secret" not in caplog.text
    assert exporter.tick() == 0  # and is not asked for again until it changes
    tracking.experiments[gone]["lifecycle_stage"] = "active"
    train(store, "r1", 1)
    assert exporter.tick() == 1
    assert set(told(tracking)) == {"r1", "r2"}


def test_runs_that_never_began_are_not_told(store: Store, exporter: Exporter) -> None:
    add(store, "r1", "proposed", started_at=None)
    add(store, "r2", "cancelled", started_at=None)
    assert exporter.tick() == 0


def test_an_old_hub_is_caught_up_with_some_runs_at_a_time(
    store: Store, exporter: Exporter, tracking: Tracking
) -> None:
    for number in range(12):
        add(store, f"r{number}", "gated", ended_at=3.0)
    assert [exporter.tick() for _ in range(4)] == [5, 5, 2, 0]
    assert len(told(tracking)) == 12


def test_where_runs_were_told_is_kept_without_credentials(
    store: Store, exporter: Exporter, url: str
) -> None:
    add(store, "r1")
    exporter.tick()
    with store.read() as connection:
        assert connection.execute(select(exports)).all() == [("r1", url, "0/0", 7.0)]


def test_another_server_is_told_everything(
    store: Store, exporter: Exporter, tmp_path: Path
) -> None:
    add(store, "r1", "gated", ended_at=3.0)
    assert exporter.tick() == 1
    other = Tracking()
    with serving(other) as elsewhere, Mlflow(elsewhere) as mlflow:
        assert Exporter(store, tmp_path / "runs", mlflow, lambda: 8.0).tick() == 1
    assert set(told(other)) == {"r1"}


def test_no_device_is_named(store: Store, exporter: Exporter, tracking: Tracking) -> None:
    named = {
        "by_device": {"secret-watch": {"rows": 3, "float": 0.5}},
        "cohort": {"rule": "charge > 0.5", "left_out": {"secret-ring": "it has 0.2"}},
    }
    add(store, "r1", metrics=named)
    train(store, "r1", 1, survivors=("secret-watch",), dropped={"secret-glove": "late"})
    end(store, "r1", "gated")
    exporter.tick()
    assert "secret-" not in repr(tracking.runs)
    [file] = tracking.files.values()
    assert b"secret-" not in file
    assert json.loads(file)["metrics"] == {"cohort": {"rule": "charge > 0.5"}}


def test_the_mark_differs_once_there_is_more_to_tell() -> None:
    row = {"state": "running", "rounds": 1, "accuracies": 0}
    changed = [row | {"rounds": 2}, row | {"accuracies": 1}, row | {"state": "gated"}]
    assert len({mark_of(one) for one in [row, *changed]}) == 4
    assert mark_of(row | {"state": "published"}) == mark_of(row | {"state": "gated"})


def test_a_hub_tells_the_server_that_it_is_given(
    tmp_path: Path, tracking: Tracking, url: str, hub_settings: Any, wait_until: Any
) -> None:
    settings = replace(hub_settings(tmp_path / "data"), mlflow=url)
    with Hub(settings) as hub:
        store = hub.context.store
        add(store, "r1", "gated", ended_at=3.0)
        wait_until(lambda: "r1" in told(tracking), "the export")
        said = CliRunner().invoke(
            app,
            ["plan", "export", "r1", "--mlflow", url, "--data", str(settings.data)],
            env={"NO_COLOR": "1"},
        )
        assert said.exit_code == 0, said.stderr
        assert said.stdout.split() == list(tracking.runs)  # found, not made again
        record = CliRunner().invoke(app, ["plan", "record", "r1", "--data", str(settings.data)])
        assert record.stdout_bytes == next(iter(tracking.files.values()))


@pytest.mark.parametrize(
    "command", [("plan", "export", "r1"), ("hub",)], ids=["by hand", "at the start"]
)
def test_an_odd_url_is_a_misuse(command: tuple[str, ...], tmp_path: Path) -> None:
    said = CliRunner().invoke(
        app, [*command, "--mlflow", "file:///tmp", "--data", str(tmp_path)], env={"NO_COLOR": "1"}
    )
    assert said.exit_code == 2
    assert "http://" in said.stderr


def test_an_export_by_hand_needs_a_server() -> None:
    said = CliRunner().invoke(app, ["plan", "export", "r1"], env={"ATOLL_MLFLOW": ""})
    assert said.exit_code == 2
    assert "ATOLL_MLFLOW" in said.stderr


def test_every_series_is_a_field_of_a_round() -> None:
    """``seconds``, by which a round is known to be there whole, is told last."""
    assert list(exporting.SERIES)[-1] == "seconds"
