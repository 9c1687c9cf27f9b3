"""A tracking server in this process that speaks what :mod:`atoll.server.mlflow` asks of MLflow.

It refuses what MLflow 3 refuses (limits of a batch, names, parameters that change, what is deleted)
with the same status and code; ``test_mlflow.py`` runs over it and over a real server alike.
"""

import json
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

NAME = re.compile(r"[A-Za-z0-9_\-. :/]{1,250}")
LIMITS = {"metrics": 1000, "params": 100, "tags": 100}


class Refused(Exception):
    """Becomes an answer with MLflow's code for it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def invalid(message: str) -> Refused:
    return Refused(400, "INVALID_PARAMETER_VALUE", message)


def missing(message: str) -> Refused:
    return Refused(404, "RESOURCE_DOES_NOT_EXIST", message)


class Tracking:
    """What the server holds, and how often each of its paths was asked for."""

    def __init__(self) -> None:
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.credentials: set[str | None] = set()
        self.answers: int | None = None
        """A status to answer everything with, for a server that is not well."""

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> Any:
        self.asked[f"{method} {path.split('/artifacts/', maxsplit=1)[0]}"] += 1
        if self.answers is not None:
            raise Refused(self.answers, "TEMPORARILY_UNAVAILABLE", "not now")
        prefix = "/api/2.0/mlflow-artifacts/artifacts/"
        if path.startswith(prefix):
            name = unquote(path.removeprefix(prefix))
            if method == "PUT":
                self.files[name] = body
                return {}
            return self.files[name]
        handler = getattr(
            self, path.removeprefix("/api/2.0/mlflow/").replace("/", "_").replace("-", "_")
        )
        return handler(**(query if method == "GET" else json.loads(body)))

    def experiments_get_by_name(self, experiment_name: str) -> Any:
        for experiment in self.experiments.values():
            if experiment["name"] == experiment_name:
                return {"experiment": experiment}
        raise missing(f"Could not find experiment with name {experiment_name!r}")

    def experiments_create(self, name: str) -> Any:
        if any(found["name"] == name for found in self.experiments.values()):
            raise Refused(400, "RESOURCE_ALREADY_EXISTS", f"{name} already exists")
        number = str(len(self.experiments) + 1)
        self.experiments[number] = {
            "experiment_id": number,
            "name": name,
            "lifecycle_stage": "active",
        }
        return {"experiment_id": number}

    def experiments_delete(self, experiment_id: str) -> Any:
        self.experiments[experiment_id]["lifecycle_stage"] = "deleted"
        return {}

    def runs_create(self, experiment_id: str, run_name: str, start_time: int, tags: list) -> Any:
        run = secrets.token_hex(16)
        info = {
            "run_id": run,
            "experiment_id": experiment_id,
            "run_name": run_name,
            "status": "RUNNING",
            "start_time": start_time,
            "lifecycle_stage": "active",
            "artifact_uri": f"mlflow-artifacts:/{experiment_id}/{run}/artifacts",
        }
        self.runs[run] = {"info": info, "tags": {}, "params": {}, "metrics": {}}
        self.runs_log_batch(run, tags=tags)
        return {"run": self._shown(run)}

    def runs_search(
        self,
        experiment_ids: list[str],
        filter: str,  # noqa: A002  MLflow's name
        max_results: int,
    ) -> Any:
        tag, value = re.fullmatch(r"tags\.\"([^\"]+)\" = '([^']*)'", filter).groups()
        found = [
            self._shown(run)
            for run, held in self.runs.items()
            if held["info"]["experiment_id"] in experiment_ids
            and held["info"]["lifecycle_stage"] == "active"
            and held["tags"].get(tag) == value
        ]
        return {"runs": found[:max_results]} if found else {}

    def runs_get(self, run_id: str) -> Any:
        self._run(run_id)
        return {"run": self._shown(run_id)}

    def runs_update(self, run_id: str, status: str, end_time: int | None = None) -> Any:
        info = self._run(run_id)["info"]
        info["status"] = status
        if end_time is not None:
            info["end_time"] = end_time
        return {"run_info": info}

    def runs_delete(self, run_id: str) -> Any:
        self._run(run_id)["info"]["lifecycle_stage"] = "deleted"
        return {}

    def runs_log_batch(self, run_id: str, metrics=(), params=(), tags=()) -> Any:
        held = self._run(run_id)
        if held["info"]["lifecycle_stage"] != "active":
            raise invalid(f"The run {run_id} must be in the 'active' state.")
        for kind, items in (("metrics", metrics), ("params", params), ("tags", tags)):
            if len(items) > LIMITS[kind]:
                raise invalid(f"A batch logging request can contain at most {LIMITS[kind]} {kind}")
            for item in items:
                if not NAME.fullmatch(item["key"]):
                    raise invalid(f"Invalid value {item['key']!r}: Names may only contain …")
        for param in params:
            if held["params"].get(param["key"], param["value"]) != param["value"]:
                raise invalid("Changing param values is not allowed.")
        held["params"] |= {param["key"]: param["value"] for param in params}
        held["tags"] |= {tag["key"]: tag["value"] for tag in tags}
        for metric in metrics:
            point = {"key": metric["key"]} | {
                name: metric[name] for name in ("value", "timestamp", "step")
            }
            history = held["metrics"].setdefault(metric["key"], [])
            if point not in history:
                history.append(point)
        return {}

    def metrics_get_history(self, run_id: str, metric_key: str) -> Any:
        history = self._run(run_id)["metrics"].get(metric_key, [])
        return {"metrics": history} if history else {}

    def _run(self, run_id: str) -> dict[str, Any]:
        if run_id not in self.runs:
            raise missing(f"Run with id={run_id} not found")
        return self.runs[run_id]

    def _shown(self, run: str) -> Any:
        held = self.runs[run]
        latest = [
            max(history, key=lambda point: (point["step"], point["timestamp"]))
            for history in held["metrics"].values()
        ]
        data = {
            "metrics": latest,
            "params": [{"key": key, "value": value} for key, value in held["params"].items()],
            "tags": [{"key": key, "value": value} for key, value in held["tags"].items()],
        }
        return {"info": held["info"], "data": {kind: all_ for kind, all_ in data.items() if all_}}


@contextmanager
def serving(tracking: Tracking) -> Iterator[str]:
    """Serve on a free port of loopback; give the URL."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def _do(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                tracking.credentials.add(self.headers.get("Authorization"))
                try:
                    said = tracking.answer(
                        self.command, parts.path, dict(parse_qsl(parts.query)), body
                    )
                    status = 200
                except Refused as refused:
                    status = refused.status
                    said = {"error_code": refused.code, "message": str(refused)}
                except Exception as error:  # noqa: BLE001  as a server's own fault
                    status, said = 500, {"error_code": "INTERNAL_ERROR", "message": str(error)}
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
