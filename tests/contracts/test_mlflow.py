"""What Atoll asks of MLflow, over the server in this process and over a real one.

``$ATOLL_TEST_MLFLOW`` names the real one: the URL of a server that may be written to, or the
``mlflow`` program, which is then started with a database and files of its own.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mlflow_server import Tracking, serving  # after the path

from atoll.server.errors import BadInput, ExportRefused, Unavailable
from atoll.server.exporting import export
from atoll.server.mlflow import Mlflow, Point, target
from atoll.server.record import encode

SECONDS = 120.0


def _started(program: str, home: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(home / "files")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    # Not our PYTHONPATH: the program has an environment of its own.
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    url = f"http://127.0.0.1:{port}"
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, env=surroundings | quiet, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + SECONDS
            while not _healthy(url):
                assert process.poll() is None, (home / "server.log").read_text()
                assert time.monotonic() < deadline, "MLflow does not answer"
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(20)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module", params=["here", pytest.param("real", marks=pytest.mark.long)])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "here":
        with serving(Tracking()) as url:
            yield url
        return
    given = os.environ.get("ATOLL_TEST_MLFLOW")
    if given is None:
        pytest.skip("$ATOLL_TEST_MLFLOW names neither an mlflow program nor a server's URL")
    if given.startswith("http"):
        yield given
        return
    yield from _started(given, tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def mlflow(url: str) -> Iterator[Mlflow]:
    with Mlflow(url) as server:
        yield server


class Reader:
    """Reads back what is there, by the API alone."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, trust_env=False, timeout=30)

    def get(self, path: str, **query: str) -> Any:
        answer = self._client.get(f"/api/2.0/mlflow/{path}", params=query)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, **body: Any) -> Any:
        answer = self._client.post(f"/api/2.0/mlflow/{path}", json=body)
        answer.raise_for_status()
        return answer.json()

    def file(self, uri: str, name: str) -> bytes:
        path = uri.removeprefix("mlflow-artifacts:")
        answer = self._client.get(f"/api/2.0/mlflow-artifacts/artifacts{path}/{name}")
        answer.raise_for_status()
        return answer.content

    def run(self, run: str) -> Any:
        return self.get("runs/get", run_id=run)["run"]

    def pairs(self, run: str, kind: str) -> dict[str, str]:
        found = self.run(run)["data"].get(kind, [])
        return {item["key"]: item["value"] for item in found}

    def history(self, run: str, key: str) -> list[tuple[int, float, int]]:
        found = self.get("metrics/get-history", run_id=run, metric_key=key).get("metrics", [])
        return sorted((p.get("step", 0), p["value"], p["timestamp"]) for p in found)


@pytest.fixture
def reader(url: str) -> Iterator[Reader]:
    found = Reader(url)
    yield found
    found._client.close()


@pytest.fixture
def fresh() -> str:
    """Return a name that no other test uses, on a server that is not ours alone."""
    return f"atoll-test-{secrets.token_hex(6)}"


def test_an_experiment_is_made_once_and_found_by_its_name(mlflow: Mlflow, fresh: str) -> None:
    made = mlflow.experiment(fresh)
    assert mlflow.experiment(fresh) == made
    assert mlflow.experiment(fresh + "-2") != made


def test_a_deleted_experiment_is_not_written_to(mlflow: Mlflow, reader: Reader, fresh: str) -> None:
    reader.post("experiments/delete", experiment_id=mlflow.experiment(fresh))
    with pytest.raises(ExportRefused, match="restore it"):
        mlflow.experiment(fresh)


def test_a_run_is_found_by_its_id_in_its_experiment_alone(mlflow: Mlflow, fresh: str) -> None:
    here, elsewhere = mlflow.experiment(fresh), mlflow.experiment(fresh + "-2")
    assert mlflow.find(here, "r1") is None
    made = mlflow.create(here, "r1", "a name", 1000.5)
    assert mlflow.find(here, "r1") == made
    assert mlflow.find(here, "r2") is None
    assert mlflow.find(elsewhere, "r1") is None


def test_a_run_says_when_it_began_how_it_stands_and_when_it_ended(
    mlflow: Mlflow, reader: Reader, fresh: str
) -> None:
    made = mlflow.create(mlflow.experiment(fresh), "r1", "a name", 1000.5)
    info = reader.run(made.id)["info"]
    assert (info["run_name"], info["start_time"], info["status"]) == ("a name", 1000500, "RUNNING")
    mlflow.status(made, "KILLED", 1060.25)
    info = reader.run(made.id)["info"]
    assert (info["status"], info["end_time"]) == ("KILLED", 1060250)


def test_more_than_a_batch_takes_is_told_in_several(
    mlflow: Mlflow, reader: Reader, fresh: str
) -> None:
    made = mlflow.create(mlflow.experiment(fresh), "r1", "n", 1.0)
    points = [Point("loss", 1 / step, float(step), step) for step in range(1, 1202)]
    params = {f"p.{number}": str(number) for number in range(130)}
    tags = {f"t.{number}": str(number) for number in range(130)}
    mlflow.log(made, points, params, tags)
    assert reader.history(made.id, "loss") == [(s, 1 / s, 1000 * s) for s in range(1, 1202)]
    assert reader.pairs(made.id, "params") == params
    assert reader.pairs(made.id, "tags").items() >= tags.items()
    assert mlflow.steps(made, "loss") == set(range(1, 1202))
    assert mlflow.steps(made, "accuracy") == set()


def test_parameters_that_are_there_stay_and_tags_follow(
    mlflow: Mlflow, reader: Reader, fresh: str
) -> None:
    experiment = mlflow.experiment(fresh)
    made = mlflow.create(experiment, "r1", "n", 1.0)
    mlflow.log(made, params={"a": "1"}, tags={"t": "1"})
    found = mlflow.find(experiment, "r1")
    assert found is not None
    mlflow.log(found, params={"a": "2", "b": "3"}, tags={"t": "2"})
    assert reader.pairs(made.id, "params") == {"a": "1", "b": "3"}
    assert reader.pairs(made.id, "tags")["t"] == "2"


def test_a_parameter_that_would_change_is_refused_by_the_server(mlflow: Mlflow, fresh: str) -> None:
    made = mlflow.create(mlflow.experiment(fresh), "r1", "n", 1.0)
    mlflow.log(made, params={"a": "1"})
    with pytest.raises(ExportRefused, match="not allowed"):
        mlflow.log(made, params={"a": "2"})  # told by one who did not look first


def test_a_value_told_twice_is_there_once(mlflow: Mlflow, reader: Reader, fresh: str) -> None:
    made = mlflow.create(mlflow.experiment(fresh), "r1", "n", 1.0)
    for _ in range(2):
        mlflow.log(made, [Point("loss", 0.5, 7.0, 3)])
    assert reader.history(made.id, "loss") == [(3, 0.5, 7000)]


def test_odd_names_and_unknown_runs_are_refused(mlflow: Mlflow, fresh: str) -> None:
    made = mlflow.create(mlflow.experiment(fresh), "r1", "n", 1.0)
    with pytest.raises(ExportRefused, match="Names may only contain"):
        mlflow.log(made, [Point("ε (spent)", 1.0, 1.0, 1)])
    with pytest.raises(ExportRefused, match="not found"):
        mlflow.log(made._replace(id="0" * 32), [Point("loss", 1.0, 1.0, 1)])


def test_a_file_comes_back_byte_for_byte(mlflow: Mlflow, reader: Reader, fresh: str) -> None:
    made = mlflow.create(mlflow.experiment(fresh), "r1", "n", 1.0)
    data = bytes(range(256)) * 10
    assert mlflow.put(made, "some.bin", data)
    assert reader.file(made.artifacts, "some.bin") == data
    assert not mlflow.put(made._replace(artifacts="s3://bucket/a"), "some.bin", data)


PLAN = """name = "steps"
task = "spar"
model = "{model}"
rounds = 3
cohort = {{ labels = {{ "wrist & arm" = "left" }} }}
privacy = {{ mode = "plain", clip = "adaptive" }}
"""


def a_round(number: int, **more: Any) -> dict[str, Any]:
    usual = {
        "round": number, "started_at": 100.0 * number, "seconds": 5.0, "loss": 1.0 / number,
        "epsilon": None, "bytes_up": 10, "bytes_down": 20, "clip_norm": 1.0, "drawn": 4,
        "connected": 3, "in_sum": 2, "lost": False, "accuracy": None, "evaluated": 0,
        "evaluate_seconds": 0.0,
    }  # fmt: skip
    return usual | more


def a_record(model: str, rounds: list[dict[str, Any]], **more: Any) -> bytes:
    usual = {
        "run": "abc123", "format": 1, "state": "running", "reason": "", "created_by": "ann",
        "created_at": 1.0, "started_at": 2.0, "ended_at": None, "metrics": {}, "rounds": rounds,
        "plan": {
            "name": "steps", "model": model, "sha256": "ab" * 32, "text": PLAN.format(model=model)
        },
        "task": {"name": "spar", "class": "m:C", "package": "atoll", "version": "0.1.0"},
        "weights": {"in": "1" * 64, "out": "2" * 64, "parameters": 9},
        "attempts": {
            "1": {"versions": {"python": "3.10"}, "platform": "old"},
            "2": {"versions": {"python": "3.11", "torch": "2"}, "platform": "Linux"},
        },
    }  # fmt: skip
    return encode(usual | more)


def everything(reader: Reader, run: str) -> Any:
    """Return all that the server knows of a run."""
    keys = [metric["key"] for metric in reader.run(run)["data"].get("metrics", [])]
    return reader.run(run), {key: reader.history(run, key) for key in keys}


def test_a_run_is_told_as_it_goes_on_and_whole_at_its_end(
    mlflow: Mlflow, reader: Reader, fresh: str
) -> None:
    first = a_record(fresh, [a_round(1)])
    run = export(mlflow, first)
    assert reader.run(run)["info"]["status"] == "RUNNING"
    params = reader.pairs(run, "params")
    assert params["cohort.labels.wrist _ arm"] == "left"
    assert (params["rounds"], params["privacy.clip"]) == ("3", "adaptive")
    assert "privacy.budget_epsilon" not in params
    tags = reader.pairs(run, "tags")
    assert (tags["atoll.version.python"], tags["atoll.platform"]) == ("3.11", "Linux")
    assert (tags["atoll.weights.in"], tags["atoll.task.package"]) == ("1" * 64, "atoll")

    before = everything(reader, run)
    assert export(mlflow, first) == run
    assert everything(reader, run) == before

    # A round that broke off has no values; an accuracy may come after its round.
    rounds = [a_round(1, accuracy=0.5), a_round(2, lost=True), a_round(3), a_round(4)]
    metrics = {"accuracy": {"known": {"int8": 0.75}}, "gates": [{"name": "g"}], "epsilon": None}
    last = a_record(fresh, rounds, state="gated", ended_at=900.0, metrics=metrics)
    assert export(mlflow, last) == run
    assert reader.history(run, "loss") == [
        (1, 1.0, 105000), (3, 1 / 3, 305000), (4, 0.25, 405000)
    ]  # fmt: skip
    assert reader.history(run, "accuracy") == [(1, 0.5, 105000)]
    assert reader.history(run, "survivors")[0] == (1, 2.0, 105000)
    assert reader.history(run, "final/accuracy.known.int8") == [(0, 0.75, 900000)]
    info = reader.run(run)["info"]
    assert (info["status"], info["end_time"]) == ("FINISHED", 900000)
    assert reader.file(info["artifact_uri"], "record.json") == last
    before = everything(reader, run)
    assert export(mlflow, last) == run
    assert everything(reader, run) == before


@pytest.mark.parametrize(
    ("state", "status"),
    [("rejected", "FINISHED"), ("failed", "FAILED"), ("cancelled", "KILLED")],
)
def test_how_a_run_ended_is_told(
    mlflow: Mlflow, reader: Reader, fresh: str, state: str, status: str
) -> None:
    run = export(mlflow, a_record(fresh, [], state=state, ended_at=9.0, reason="x" * 9000))
    assert reader.run(run)["info"]["status"] == status
    tags = reader.pairs(run, "tags")
    assert (tags["atoll.state"], set(tags["atoll.reason"])) == (state, {"x"})


def test_a_server_that_is_not_there_is_told_later() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Mlflow(f"http://ann:secret@127.0.0.1:{port}") as mlflow:
        with pytest.raises(Unavailable, match="cannot be reached") as told:
            export(mlflow, a_record("m", []))
        assert "secret" not in str(told.value)


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_a_server_that_cannot_now_is_told_later(status: int) -> None:
    tracking = Tracking()
    with serving(tracking) as url, Mlflow(url.replace("//", "//ann:secret@")) as mlflow:
        tracking.answers = status
        with pytest.raises(Unavailable, match=f"answers {status}") as told:
            export(mlflow, a_record("m", []))
        assert "secret" not in str(told.value)
        tracking.answers = None
        export(mlflow, a_record("m", []))
        assert tracking.credentials == {"Basic YW5uOnNlY3JldA=="}  # RFC 7617: ann:secret


@pytest.mark.parametrize(
    "url", ["", "mlflow", "sqlite:///m.db", "http://", "http://h:x", "ftp://h"]
)
def test_what_is_no_url_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(BadInput, match="http"):
        target(url)


def test_a_target_has_no_credentials() -> None:
    assert target("https://ann:secret@[::1]:5000/base/?q") == "https://[::1]:5000/base"


def test_a_record_is_json_that_programs_read() -> None:
    assert json.loads(a_record("m", [a_round(1, loss=float("nan"))]))["rounds"][0]["loss"] is None
