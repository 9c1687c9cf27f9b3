"""What the pages about runs and the privacy they cost show, read from the tables."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, select

from atoll.server import schema
from atoll.server.errors import NotFound
from atoll.server.fairness_terms import MEASURES
from atoll.server.progress import Standing, asked, latest, plan_of, standing, time_left
from atoll.server.web_charts import plot
from atoll.server.web_read import first, rows

LIMIT: Final = 100
STAGES: Final = (
    "train",
    "evaluate",
    "export",
    "ranges",
    "quantise",
    "evaluate-int8",
    "profile",
    "golden",
    "gate",
)


def run_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run with what its plan and metrics say spelt out."""
    metrics: Mapping[str, Any] = row["metrics"] or {}
    plan = plan_of(row["plan"])
    accuracy = accuracy_table(metrics)
    return dict(row) | {
        "parsed": plan,
        "rounds": plan.rounds if plan else 0,
        "gates": _gates(metrics.get("gates")),
        "accuracy": accuracy,
        "spread": metrics.get("spread") or {},
        "spread_left_out": metrics.get("spread_left_out") or {},
        "fairness": metrics.get("fairness"),
        "cohort": metrics.get("cohort"),
        "turns": metrics.get("turns"),
        "best": {split: by.get("int8", by.get("float")) for split, by in accuracy.items()},
        "seconds": row["ended_at"] - row["started_at"]
        if row["ended_at"] is not None and row["started_at"] is not None
        else None,
    }


def runs(connection: Connection) -> dict[str, Any]:
    """Return the runs, newest first, with where the rounds of each stand."""
    query = select(schema.runs).order_by(schema.runs.c.created_at.desc()).limit(LIMIT)
    found = [run_row(row) for row in rows(connection, query)]
    counts = standings(connection, found)
    found = [row | {"standing": counts[row["id"]]} for row in found]
    return {
        "proposed": [row for row in found if row["state"] == "proposed"],
        "rows": [row for row in found if row["state"] != "proposed"],
    }


def run(connection: Connection, run_id: str) -> dict[str, Any]:
    """Return one run with its rounds; raise :class:`NotFound`."""
    query = select(schema.runs).where(schema.runs.c.id == run_id)
    found = first(connection, query)
    if found is None:
        raise NotFound(f"there is no run {run_id!r}", "look at the list of runs for its id")
    row = run_row(found)
    r = schema.rounds.c
    stored = rows(connection, select(schema.rounds).where(r.run == run_id).order_by(r.round))
    rounds = [_shown(one) for one in stored]
    return {
        "row": row,
        "rounds": rounds,
        "plots": round_plots(rounds),
        "stages": stages(row),
        "progress": progress(row, rounds),
        "measures": fairness_table(row["fairness"] or {}),
    }


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round with who was in it and asked; of one that is lost nothing is known."""
    if row["lost"]:
        unknown = ("answered", "asked", "bytes_up", "bytes_down", "seconds")
        return dict(row) | dict.fromkeys(unknown)
    return dict(row) | {"answered": len(row["survivors"]), "asked": asked(row)}


def standings(connection: Connection, found: Sequence[Mapping[str, Any]]) -> dict[str, Standing]:
    """Return where the rounds of each of the runs stand, by the run's id."""
    r = schema.rounds.c
    query = select(r.run, r.survivors, r.dropped, r.lost).where(
        r.run.in_([row["id"] for row in found])
    )
    mine: dict[str, list[Mapping[str, Any]]] = {row["id"]: [] for row in found}
    for one in rows(connection, query):
        mine[one["run"]].append(one)
    return {row["id"]: standing(row["parsed"], mine[row["id"]]) for row in found}


def progress(row: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the run's page tells of its rounds so far; the newest values that are known."""
    counted = [one for one in rounds if one["bytes_up"] is not None]
    where = standing(row["parsed"], rounds)
    heard = [one for one in rounds if not one["lost"]]
    return {
        "standing": where,
        "training": row["state"] == "running" and row["stage"] in ("", "train"),
        "loss": latest(rounds, "loss"),
        "accuracy": latest(rounds, "accuracy"),
        "epsilon": latest(rounds, "epsilon"),
        "clip_norm": latest(rounds, "clip_norm"),
        "answered": heard[-1]["answered"] if heard else None,
        "asked": heard[-1]["asked"] if heard else None,
        "up": sum(one["bytes_up"] for one in counted) if counted else None,
        "down": sum(one["bytes_down"] for one in counted) if counted else None,
        "left": time_left(rounds, where.to_come) if row["state"] == "running" else None,
    }


def stages(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each stage of a run with ``done``, the run's state if it is there, or ``later``.

    A stage that is not in :data:`STAGES` is shown after them: the pipeline may know more.
    """
    at = row["stage"]
    names = STAGES if not at or at in STAGES else (*STAGES, at)
    if row["state"] in ("gated", "published"):
        return [(name, "done") for name in names]
    if not at:
        return [(name, "later") for name in names]
    here = names.index(at)
    return [
        (name, "done" if i < here else row["state"] if i == here else "later")
        for i, name in enumerate(names)
    ]


def round_plots(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return title and plot of what is known by round; none without rounds."""
    if not rounds:
        return []
    x = [float(entry["round"]) for entry in rounds]
    answered = [entry["answered"] for entry in rounds]
    drawn = [entry["asked"] for entry in rounds]
    plots = [
        (
            "Training loss",
            plot(x, {"mean loss": [entry["loss"] for entry in rounds]}, x_label="round"),
        ),
        (
            "Devices that took part",
            plot(
                x,
                {"answered": answered, "asked": drawn},
                x_label="round",
                from_zero=True,
                whole=True,
            ),
        ),
    ]
    spent = [entry["epsilon"] for entry in rounds]
    if any(value is not None for value in spent):
        plots.append(("ε spent", plot(x, {"ε": spent}, x_label="round", from_zero=True)))
    measured = [entry for entry in rounds if entry["accuracy"] is not None]
    if measured:
        points = [float(entry["round"]) for entry in measured]
        found = {"share that is right": [entry["accuracy"] for entry in measured]}
        plots.append(("Accuracy on held-back examples", plot(points, found, x_label="round")))
    if any(entry["bytes_up"] is not None for entry in rounds):
        sent = {
            "from devices": [_mebibytes(entry["bytes_up"]) for entry in rounds],
            "to devices": [_mebibytes(entry["bytes_down"]) for entry in rounds],
        }
        plots.append(("MiB sent", plot(x, sent, x_label="round", from_zero=True)))
    norms = [entry["clip_norm"] for entry in rounds]
    if len({norm for norm in norms if norm is not None}) > 1:
        plots.append(("Clipping norm", plot(x, {"norm": norms}, x_label="round", from_zero=True)))
    return plots


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def accuracy_table(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return accuracy as shares of one: split → precision → value, as far as it is known."""
    found = metrics.get("accuracy")
    if not isinstance(found, Mapping):
        return {}
    table: dict[str, dict[str, float]] = {}
    for one, inner in found.items():
        if not isinstance(inner, Mapping):
            continue
        for other, value in inner.items():
            if isinstance(value, int | float):
                # Stored either way round; a precision is named float or int8.
                split, precision = (one, other) if one not in ("float", "int8") else (other, one)
                table.setdefault(split, {})[precision] = float(value)
    return table


def fairness_table(found: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return each measure that could be told: its words, of the worst class, and the mean."""
    return [
        (words, found[name], found[f"{name}_mean"])
        for name, words in MEASURES.items()
        if name in found
    ]


def _gates(found: object) -> list[dict[str, Any]]:
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    return [
        {
            "name": gate.get("name", ""),
            "rule": gate.get("rule", ""),
            "passed": gate.get("passed") is True,
            "detail": gate.get("detail", ""),
        }
        for gate in found
        if isinstance(gate, Mapping)
    ]
