"""What the pages about runs and the privacy they cost show, read from the tables."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, func, select

from atoll.federation.errors import BadPlan
from atoll.federation.plan import Plan, loads
from atoll.server import schema
from atoll.server.errors import NotFound
from atoll.server.model_card import MEASURES
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
    plan = _plan(row["plan"])
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
    """Return the runs, newest first, with how many rounds each has completed."""
    query = select(schema.runs).order_by(schema.runs.c.created_at.desc()).limit(LIMIT)
    counted = select(schema.rounds.c.run, func.count().label("n")).group_by(schema.rounds.c.run)
    done = {row["run"]: row["n"] for row in rows(connection, counted)}
    found = [
        run_row(row) | {"rounds_done": done.get(row["id"], 0)} for row in rows(connection, query)
    ]
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
    rounds = rows(connection, select(schema.rounds).where(r.run == run_id).order_by(r.round))
    return {"row": row, "rounds": rounds, "plots": round_plots(rounds), "stages": stages(row)} | {
        "measures": fairness_table(row["fairness"] or {})
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
    """Return title and plot of loss, participation and ε by round; none without rounds."""
    if not rounds:
        return []
    x = [float(entry["round"]) for entry in rounds]
    answered = [float(len(entry["survivors"])) for entry in rounds]
    asked = [n + len(entry["dropped"]) for n, entry in zip(answered, rounds, strict=True)]
    plots = [
        (
            "Training loss",
            plot(x, {"mean loss": [entry["loss"] for entry in rounds]}, x_label="round"),
        ),
        (
            "Devices that took part",
            plot(
                x,
                {"answered": answered, "asked": asked},
                x_label="round",
                from_zero=True,
                whole=True,
            ),
        ),
    ]
    spent = [entry["epsilon"] for entry in rounds]
    if any(value is not None for value in spent):
        plots.append(("ε spent", plot(x, {"ε": spent}, x_label="round", from_zero=True)))
    return plots


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


def _plan(text: str) -> Plan | None:
    """Return the plan, or none for one that this version cannot read any more."""
    try:
        return loads(text)
    except BadPlan:
        return None


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
