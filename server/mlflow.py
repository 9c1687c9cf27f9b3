"""The few calls of MLflow's REST API that a run's export needs.

Documented at https://mlflow.org/docs/latest/rest-api.html and spoken with httpx, which the hub
has anyway: ``mlflow-skinny`` 3 installs beside our pins but brings sixteen more packages (the
Databricks SDK, OpenTelemetry, GitPython) into the process that holds a fleet's keys, for six
requests. ``tests/contracts/mlflow.py`` holds this module against a real server.

Credentials stand in the URL, ``https://user:password@host``, and are kept out of every message.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Literal, NamedTuple, Self
from urllib.parse import quote, urlsplit, urlunsplit

import httpx

from atoll.server.errors import BadInput, ExportRefused, Unavailable

API: Final = "api/2.0/mlflow/"
ARTIFACTS: Final = "api/2.0/mlflow-artifacts/artifacts"
RUN_TAG: Final = "atoll.run"
"""The tag by which a run is found again."""
TIMEOUT: Final = httpx.Timeout(10.0, connect=3.0)
MOST_METRICS: Final = 900
MOST_OTHERS: Final = 90
"""Of what one ``log-batch`` may carry: 1,000 metrics, 100 parameters, 100 tags, 1,000 in all."""
_LONGEST: Final = 5000  # characters of a tag's or parameter's value, in all versions since 2.8
_TRY_LATER: Final = {401, 403, 408, 425, 429}  # like a server that is down: no fault of the run

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Point(NamedTuple):
    """One value of a metric; ``at`` is in Unix seconds."""

    key: str
    value: float
    at: float
    step: int


class Remote(NamedTuple):
    """A run as MLflow knows it: where its artifacts go and the parameters it has."""

    id: str
    artifacts: str
    params: frozenset[str]


def target(url: str) -> str:
    """Return the URL of a tracking server without credentials, for messages and tables.

    Raises :class:`BadInput` for what is no such URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(
            "the tracking server's URL begins with http:// or https://, and names a host",
            "give the one that MLflow's page has in the browser",
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port is None else f"{host}:{port}"
    return urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))


class Mlflow:
    """A tracking server.

    Every method raises :class:`Unavailable` when it cannot be reached or does not let us in, and
    :class:`ExportRefused` when it will not have what it was told.
    """

    def __init__(self, url: str) -> None:
        """Raise :class:`BadInput` for what is no URL; nothing is sent yet."""
        self.target = target(url)
        parts = urlsplit(url)
        auth = (
            httpx.BasicAuth(parts.username, parts.password or "")
            if parts.username is not None
            else None
        )
        self._client = httpx.Client(base_url=self.target + "/", auth=auth, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def experiment(self, name: str) -> str:
        """Return the id of the experiment of that name, made if there is none."""
        asked = {"experiment_name": name}
        found = self._call("GET", "experiments/get-by-name", params=asked, missing=True)
        if found is None:
            return str(
                self._call("POST", "experiments/create", json={"name": name})["experiment_id"]
            )
        if found["experiment"]["lifecycle_stage"] == "deleted":
            raise ExportRefused(
                f"the experiment {name!r} was deleted at {self.target}", "restore it there"
            )
        return str(found["experiment"]["experiment_id"])

    def find(self, experiment: str, run: str) -> Remote | None:
        """Return the run that carries the tag :data:`RUN_TAG` with ``run``, if there is one."""
        body = {
            "experiment_ids": [experiment],
            "filter": f"tags.\"{RUN_TAG}\" = '{run}'",
            "max_results": 1,
        }
        found = self._call("POST", "runs/search", json=body).get("runs", [])
        return _remote(found[0]) if found else None

    def create(self, experiment: str, run: str, name: str, started_at: float) -> Remote:
        """Begin a run that :meth:`find` finds by ``run``."""
        body = {
            "experiment_id": experiment,
            "run_name": name,
            "start_time": _milliseconds(started_at),
            "tags": [{"key": RUN_TAG, "value": run}],
        }
        return _remote(self._call("POST", "runs/create", json=body)["run"])

    def steps(self, remote: Remote, key: str) -> set[int]:
        """Return the steps at which a metric has a value."""
        asked = {"run_id": remote.id, "metric_key": key}
        found = self._call("GET", "metrics/get-history", params=asked)
        return {int(point.get("step", 0)) for point in found.get("metrics", [])}

    def log(
        self,
        remote: Remote,
        metrics: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Add values, in order; parameters that the run has already are left as they are."""
        fresh = {name: value for name, value in (params or {}).items() if name not in remote.params}
        for some in _chunks(_pairs(fresh), MOST_OTHERS):
            self._batch(remote, "params", some)
        for some in _chunks(_pairs(tags or {}), MOST_OTHERS):
            self._batch(remote, "tags", some)
        points = [point._asdict() | {"timestamp": _milliseconds(point.at)} for point in metrics]
        for some in _chunks(points, MOST_METRICS):
            self._batch(remote, "metrics", some)

    def status(self, remote: Remote, status: Status, ended_at: float | None) -> None:
        """Say how the run stands, and when it ended."""
        body: dict[str, Any] = {"run_id": remote.id, "status": status}
        if ended_at is not None:
            body["end_time"] = _milliseconds(ended_at)
        self._call("POST", "runs/update", json=body)

    def put(self, remote: Remote, name: str, data: bytes) -> bool:
        """Store a file with the run, if the server takes files itself; return whether it did.

        One that sends its clients to a bucket would need that bucket's own library.
        """
        where = urlsplit(remote.artifacts)
        if where.scheme != "mlflow-artifacts":
            return False
        self._call("PUT", f"{ARTIFACTS}{quote(where.path)}/{name}", content=data, api="")
        return True

    def _batch(self, remote: Remote, kind: str, items: list[dict[str, Any]]) -> None:
        self._call("POST", "runs/log-batch", json={"run_id": remote.id, kind: items})

    def _call(
        self,
        method: str,
        path: str,
        *,
        api: str = API,
        missing: bool = False,
        params: Mapping[str, str] | None = None,
        json: object = None,
        content: bytes | None = None,
    ) -> Any:  # noqa: ANN401  JSON
        """Return the answer's JSON, or none with ``missing`` for what is not there."""
        try:
            answer = self._client.request(
                method, api + path, params=params, json=json, content=content
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            raise Unavailable(
                f"MLflow at {self.target} cannot be reached ({why})", "it is told later"
            ) from error
        said = _json(answer)
        if answer.is_success and said is not None:
            return said
        if answer.is_success:
            raise ExportRefused(f"what answers at {self.target} is not MLflow", "correct its URL")
        said = said or {}
        if missing and said.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
            return None
        why = f"{answer.status_code} {said.get('message') or answer.reason_phrase}"[:500]
        if answer.is_server_error or answer.status_code in _TRY_LATER:
            raise Unavailable(f"MLflow at {self.target} answers {why}", "it is told later")
        raise ExportRefused(f"MLflow at {self.target} refuses {path}: {why}")


def _json(answer: httpx.Response) -> dict[str, Any] | None:
    """Return the answer's object, empty for no body; none for what is not JSON."""
    try:
        said = answer.json() if answer.content else {}
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _remote(run: Mapping[str, Any]) -> Remote:
    params = run.get("data", {}).get("params", [])
    return Remote(
        id=str(run["info"]["run_id"]),
        artifacts=str(run["info"].get("artifact_uri", "")),
        params=frozenset(str(param["key"]) for param in params),
    )


def _pairs(named: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": name, "value": value[:_LONGEST]} for name, value in named.items()]


def _chunks(items: Sequence[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    left = iter(items)
    while some := list(islice(left, most)):
        yield some


def _milliseconds(at: float) -> int:
    return round(at * 1000)
