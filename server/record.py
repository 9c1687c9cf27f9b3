"""A run's record: one JSON document that says what ran, on what, and what came in and out.

Most of it is in the hub's tables already. What only the run's own process knows (versions, what
it began and ended with, the files it left) it tells through :meth:`Recorder.record`, and
:func:`document` puts both together. Once the run is settled the document is a file beside the
run's checkpoint, :data:`NAME`, whose digest is in the audit log; until then it is made anew for
whoever asks.

Devices are counted in it, never named. All digests are SHA-256 in lower-case hexadecimal;
weights are hashed as float32 little-endian bytes, in the order of
:func:`atoll.federation.parameters.flatten`. ``format`` grows when a field changes its meaning;
fields are added without.
"""

import hashlib
import inspect
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, select

from atoll.federation import parameters
from atoll.federation.cohort import Cohort
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.task import Task
from atoll.fleet.bundle import MANIFEST, Manifest
from atoll.fleet.files import write_atomic
from atoll.server.errors import NotFound
from atoll.server.progress import asked
from atoll.server.schema import ledger, rounds, runs

FORMAT: Final = 1
NAME: Final = "record.json"
PACKAGES: Final = (
    *("atoll", "numpy", "torch", "flwr", "cryptography", "dp-accounting"),
    *("opacus", "tenseal", "onnx", "onnxscript", "onnxruntime"),
)
"""What a run's numbers depend on at the hub; one that is not installed is left out."""
SETTLED: Final = ("gated", "published", "rejected", "failed", "cancelled")


def digest(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def of_weights(weights: Vector) -> str:
    """Return the digest of float32 ``weights``."""
    return digest(parameters.to_bytes(weights))


def beginning(
    plan: Plan, task: Task, cohort: Cohort, initial: Vector, attempt: int, at: float
) -> dict[str, Any]:
    """Return what a process tells when it begins: its ``attempt`` at Unix time ``at``.

    A run that is taken up again may be so by another version; each attempt says its own.
    """
    return {
        "task": of_task(plan.task, task),
        "seed": plan.seed,
        "weights": {"parameters": len(initial), "in": of_weights(initial)},
        "attempts": {
            str(attempt): {
                "at": at,
                "versions": versions(),
                "platform": platform.platform(),
                "machine": platform.machine(),
                "devices": {"train": len(cohort.trainers), "evaluate": len(cohort.evaluators)},
            }
        },
    }


def files_of(manifest: Manifest) -> dict[str, str]:
    """Return the digest of each file of a candidate."""
    described = {name: found.sha256 for name, found in manifest.files.items()}
    return {MANIFEST: digest(manifest.encode()), **described}


def versions() -> dict[str, str]:
    """Return the versions of Python and of :data:`PACKAGES` here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def of_task(name: str, task: Task) -> dict[str, str]:
    """Return which code a task is: its class, its package and version, and its source's digest.

    A task that no installed package offers under ``name`` has no package.
    """
    kind = type(task)
    where = f"{kind.__module__}:{kind.__qualname__}"
    said = {"name": name, "class": where}
    for offered in entry_points(group="atoll.tasks", name=name):
        if offered.value == where and offered.dist is not None:
            said |= {"package": offered.dist.name, "version": offered.dist.version}
    source = inspect.getsourcefile(kind)
    if source is not None and Path(source).is_file():
        said["source"] = digest(Path(source).read_bytes())
    return said


def document(connection: Connection, run: str) -> dict[str, Any]:
    """Return the record of a run as the tables have it now; raise :class:`NotFound`."""
    row = connection.execute(select(runs).where(runs.c.id == run)).mappings().first()
    if row is None:
        raise NotFound(f"there is no run {run!r}", "see the list of runs")
    told = select(rounds).where(rounds.c.run == run).order_by(rounds.c.round)
    charged = (
        select(ledger)
        .where(ledger.c.charge.startswith(f"{run}/", autoescape=True))
        .order_by(ledger.c.id)
    )
    return {
        "format": FORMAT,
        "run": run,
        "plan": {
            "name": row["name"],
            "model": row["model"],
            "sha256": digest(row["plan"].encode()),
            "text": row["plan"],
        },
        "state": row["state"],
        "reason": row["reason"],
        "created_at": row["created_at"],
        "created_by": row["created_by"],
        "approved_by": row["approved_by"],
        "started_at": row["started_at"],
        "ended_at": row["ended_at"],
        "starts": row["attempt"],
        **(row["record"] or {}),
        "rounds": [_round(dict(one)) for one in connection.execute(told).mappings()],
        "ledger": [dict(one) for one in connection.execute(charged).mappings()],
        "metrics": _nameless(row["metrics"] or {}),
    }


def encode(record: Mapping[str, Any]) -> bytes:
    """Return the bytes of a record: UTF-8 JSON, indented, keys in order; what is NaN is null."""
    text = json.dumps(_finite(record), indent=2, sort_keys=True, ensure_ascii=False)
    return text.encode() + b"\n"


def read(connection: Connection, folder: Path, run: str) -> bytes:
    """Return the record of a run, from its ``folder`` once it is settled.

    Raises :class:`NotFound`.
    """
    state = connection.execute(select(runs.c.state).where(runs.c.id == run)).scalar()
    path = folder / NAME
    if state in SETTLED and path.is_file():
        return path.read_bytes()
    return encode(document(connection, run))


def settle(connection: Connection, folder: Path, run: str) -> str:
    """Write the record of a run that has just ended to its ``folder``; return its digest.

    ``connection`` is the transaction in which it ended. Raises :class:`OSError`.
    """
    data = encode(document(connection, run))
    write_atomic(folder / NAME, data)
    return digest(data)


def _round(row: Mapping[str, Any]) -> dict[str, Any]:
    left_out = {"run", "survivors", "dropped"}
    kept = {name: value for name, value in row.items() if name not in left_out}
    return kept | {"drawn": asked(row), "in_sum": len(row["survivors"])}


def _nameless(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's metrics without what is told by device."""
    kept = {name: value for name, value in metrics.items() if name != "by_device"}
    if "cohort" in kept:  # whoever is left out is among the trainers and not eligible
        kept["cohort"] = {k: v for k, v in kept["cohort"].items() if k != "left_out"}
    return kept


def _finite(value: Any) -> Any:  # noqa: ANN401  JSON in, JSON out
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
