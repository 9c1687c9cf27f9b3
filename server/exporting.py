"""Telling a tracking server of runs: what is told, and when.

    export(mlflow, record)               # one run, by its record (server.record)
    Exporter(store, …).tick()            # those of a hub that have changed since they were told

What is told is told again without harm: a run is found by its id before it is made, parameters
are added once, and of a metric only the steps that are missing. So an export that broke off,
or came never because the server was down, is made good by the next one. The hub calls
:meth:`Exporter.tick` from a thread of its own, after a round is in the tables; a run's own
process knows nothing of it.

A reader of MLflow learns what a viewer of the dashboard does, but for the devices' names.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlalchemy import Select, and_, delete, func, insert, select

from atoll.server import record
from atoll.server.errors import ExportRefused
from atoll.server.mlflow import Mlflow, Point, Status
from atoll.server.progress import plan_of
from atoll.server.schema import exports, rounds, runs
from atoll.server.store import Store

SERIES: Final = {
    "loss": "loss",
    "accuracy": "accuracy",
    "epsilon": "epsilon",
    "in_sum": "survivors",
    "drawn": "drawn",
    "connected": "connected",
    "bytes_up": "bytes_up",
    "bytes_down": "bytes_down",
    "clip_norm": "clip_norm",
    "seconds": "seconds",
}
"""Fields of a round in the record, and the metrics that they are. The last one is never none, and
so tells that its round is there whole."""
FINAL: Final = "final/"
"""What goes before the name of a metric of the whole run."""
SETTLED: Final = "ended"
_AT_ONCE: Final = 5  # runs in one tick, so that a hub that stops need not wait for all
_STATUS: Final[Mapping[str, Status]] = {
    "gated": "FINISHED",
    "published": "FINISHED",
    "rejected": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}
_ODD: Final = re.compile(r"[^A-Za-z0-9_\-. :/]")  # what MLflow has in no name

log = logging.getLogger(__name__)


def export(mlflow: Mlflow, data: bytes) -> str:
    """Tell of a run by the bytes of its record; return MLflow's id of the run.

    The experiment is the model, so that runs of all its plans stand side by side. Raises what
    :class:`Mlflow` does.
    """
    told: dict[str, Any] = json.loads(data)
    begun = told["started_at"] or told["created_at"]
    experiment = mlflow.experiment(told["plan"]["model"])
    name = f"{told['plan']['name']} {told['run']}"
    remote = mlflow.find(experiment, told["run"]) or mlflow.create(
        experiment, told["run"], name, begun
    )
    settled = told["state"] in record.SETTLED
    known = {key: mlflow.steps(remote, key) for key in ("seconds", "accuracy")}
    points = list(series(told, known["seconds"], known["accuracy"]))
    mlflow.log(remote, [*points, *(final(told) if settled else ())], params(told), tags(told, data))
    if settled and mlflow.put(remote, record.NAME, data):
        mlflow.log(remote, tags={"atoll.record": record.NAME})
    mlflow.status(remote, _STATUS.get(told["state"], "RUNNING"), told["ended_at"])
    return remote.id


def params(told: Mapping[str, Any]) -> dict[str, str]:
    """Return the plan's fields that are set, by their path; defaults too."""
    plan = plan_of(told["plan"]["text"])
    fields = {} if plan is None else msgspec.to_builtins(plan)
    return {
        _name(path): value if isinstance(value, str) else json.dumps(value)
        for path, value in _flat(fields)
        if value is not None
    }


def tags(told: Mapping[str, Any], data: bytes) -> dict[str, str]:
    """Return what code ran, the digests, and how the run stands; ``data`` is the record's bytes."""
    found = {
        "atoll.state": told["state"],
        "atoll.reason": told["reason"],
        "atoll.plan": told["plan"]["name"],
        "atoll.plan_sha256": told["plan"]["sha256"],
        "mlflow.user": told["created_by"],
    }
    attempts = told.get("attempts") or {}
    if attempts:
        last = attempts[max(attempts, key=int)]
        found |= {f"atoll.version.{name}": value for name, value in last["versions"].items()}
        found["atoll.platform"] = last["platform"]
    for name in ("task", "weights", "files"):
        found |= {f"atoll.{name}.{key}": str(value) for key, value in told.get(name, {}).items()}
    if told["state"] in record.SETTLED:
        found["atoll.record_sha256"] = record.digest(data)
    return {_name(name): value for name, value in found.items() if value}


def series(
    told: Mapping[str, Any], rounds_known: set[int], accuracies: set[int]
) -> Iterator[Point]:
    """Yield the values of the rounds that are not known; lost ones have none."""
    for one in told["rounds"]:
        if one["lost"]:
            continue
        step, at = one["round"], one["started_at"] + one["seconds"]
        for field, key in SERIES.items():
            value = one.get(field)
            known = accuracies if field == "accuracy" else rounds_known
            if step not in known and value is not None and math.isfinite(value):
                yield Point(key, float(value), at, step)


def final(told: Mapping[str, Any]) -> Iterator[Point]:
    """Yield the numbers among the metrics of a run that has ended, by their path."""
    at = told["ended_at"] or told["started_at"] or told["created_at"]
    for path, value in _flat({**told["metrics"], "confusion": None}):
        if isinstance(value, int | float) and math.isfinite(value):
            yield Point(_name(FINAL + path), float(value), at, 0)


class Exporter:
    """Keeps a tracking server told of a hub's runs; ``folder`` holds a directory for each run.

    ``clock`` gives Unix seconds.
    """

    def __init__(
        self, store: Store, folder: Path, mlflow: Mlflow, clock: Callable[[], float]
    ) -> None:
        self._store, self._folder, self._mlflow, self._clock = store, folder, mlflow, clock

    def tick(self) -> int:
        """Tell of runs that have changed since they were told, oldest first; return how many.

        Raises :class:`Unavailable`. A run that is refused is logged and told again once it has
        changed, so that it keeps no other from its turn.
        """
        with self._store.read() as connection:
            found = connection.execute(_changes(self._mlflow.target)).mappings().all()
        due = [(row, mark) for row in found if (mark := mark_of(dict(row))) != row["mark"]][
            :_AT_ONCE
        ]
        for row, mark in due:
            run = row["id"]
            with self._store.read() as connection:
                data = record.read(connection, self._folder / run, run)
            try:
                export(self._mlflow, data)
            except ExportRefused as refusal:
                log.warning("run %s was not exported: %s", run, refusal)
            self._keep(run, mark)
        return len(due)

    def _keep(self, run: str, mark: str) -> None:
        mine = and_(exports.c.run == run, exports.c.target == self._mlflow.target)
        with self._store.begin() as connection:
            connection.execute(delete(exports).where(mine))
            connection.execute(
                insert(exports).values(
                    run=run, target=self._mlflow.target, mark=mark, at=self._clock()
                )
            )


def mark_of(row: Mapping[str, Any]) -> str:
    """Return what differs once there is more to tell of a run."""
    if row["state"] in record.SETTLED:
        return SETTLED
    return f"{row['rounds']}/{row['accuracies']}"


def _changes(target: str) -> Select[tuple[Any, ...]]:
    """Return a query for the runs that have begun and were not told to their end, oldest first."""
    counted = (
        select(
            rounds.c.run,
            func.count().label("rounds"),
            func.count(rounds.c.accuracy).label("accuracies"),
        )
        .group_by(rounds.c.run)
        .subquery()
    )
    before = and_(exports.c.run == runs.c.id, exports.c.target == target)
    return (
        select(
            runs.c.id,
            runs.c.state,
            exports.c.mark,
            func.coalesce(counted.c.rounds, 0).label("rounds"),
            func.coalesce(counted.c.accuracies, 0).label("accuracies"),
        )
        .outerjoin(exports, before)
        .outerjoin(counted, counted.c.run == runs.c.id)
        .where(runs.c.started_at.is_not(None))
        .where(func.coalesce(exports.c.mark, "") != SETTLED)
        .order_by(runs.c.created_at)
    )


def _flat(fields: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _name(name: str) -> str:
    return _ODD.sub("_", name)[:250]
