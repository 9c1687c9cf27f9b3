"""What each page of the dashboard shows, read from the tables.

A view is a function of a connection and the time to the values of its template. Devices have
their own module (:mod:`atoll.server.web_devices`), and so have runs
(:mod:`atoll.server.web_runs`).
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Table, func, select

from atoll.server import audit as audit_log
from atoll.server import schema
from atoll.server.web_devices import fleet_rows
from atoll.server.web_loop import Facts, steps
from atoll.server.web_read import first, rows
from atoll.server.web_runs import run_row, standings

View = dict[str, Any]

RECENT: Final = 6
PAGE: Final = 100


def open_alerts(connection: Connection) -> int:
    """Return how many alerts are open and not acknowledged: the number in the menu."""
    a = schema.alerts.c
    query = select(func.count()).where(a.closed_at.is_(None), a.acknowledged_at.is_(None))
    return connection.execute(query).scalar_one()


def overview(connection: Connection, now: float, silent_after: float) -> View:
    """Return the loop with the state of each step, and what needs a person."""
    fleet = [row for row in fleet_rows(connection, now, silent_after) if row["state"] != "revoked"]
    latest = select(schema.runs).order_by(schema.runs.c.created_at.desc())
    state = schema.runs.c.state
    recent = [run_row(row) for row in rows(connection, latest.limit(RECENT))]
    waiting = rows(connection, latest.where(state.in_(("proposed", "gated"))))
    trained = first(connection, latest.where(state != "proposed").limit(1))
    newest = run_row(trained) if trained else None
    release = _newest(connection, schema.releases, "published_at")
    rollout = _newest(connection, schema.rollouts, "created_at")
    facts = Facts(
        run=newest,
        rounds=standings(connection, [newest])[newest["id"]].done if newest else 0,
        release=release,
        rollout=rollout,
        devices=fleet,
        proposed=any(run["state"] == "proposed" for run in waiting),
    )
    return {
        "steps": steps(facts),
        "devices": len(fleet),
        "online": sum(row["state"] == "online" for row in fleet),
        "drifted": sum(row["drift_state"] == "drifted" for row in fleet),
        "alerts": _alerts(connection, only_open=True),
        "recent": recent,
        "waiting": [run_row(row) for row in waiting],
        "release": release,
        "rollout": _progress(rollout, fleet) if rollout else None,
    }


def models(
    connection: Connection, now: float, silent_after: float, card: Callable[[str], str]
) -> View:
    """Return the releases and the roll-outs, newest first.

    ``card`` returns the model card that a run wrote, or nothing.
    """
    releases, rollouts, runs = schema.releases, schema.rollouts, schema.runs
    fleet = fleet_rows(connection, now, silent_after)
    serving = Counter((row["model"], row["release"]) for row in fleet if row["model"])
    published = select(releases).order_by(releases.c.published_at.desc()).limit(PAGE)
    rolled = select(rollouts).order_by(rollouts.c.id.desc()).limit(PAGE)
    gated = select(runs).where(runs.c.state == "gated").order_by(runs.c.created_at.desc())
    return {
        "releases": [
            _release(row)
            | {
                "serving": serving[row["model"], row["release"]],
                "card": card(row["run"]) if row["run"] else "",
            }
            for row in rows(connection, published)
        ],
        "rollouts": [_progress(row, fleet) for row in rows(connection, rolled)],
        "gated": [run_row(row) for row in rows(connection, gated)],
    }


def alerts(connection: Connection) -> View:
    """Return the open alerts and the last of the closed ones."""
    everything = _alerts(connection, only_open=False)
    return {
        "open_list": [row for row in everything if row["closed_at"] is None],
        "closed_list": [row for row in everything if row["closed_at"] is not None],
    }


def audit(connection: Connection) -> View:
    """Return the newest entries, and the Merkle root after checking every entry.

    Of a log that does not match its hashes no entry is shown.
    """
    broken, size, root = None, 0, b""
    try:
        size, root = audit_log.verify(connection)
    except audit_log.AuditBroken as error:
        broken = str(error)
    return {
        "entries": [] if broken else audit_log.entries(connection, limit=PAGE, newest_first=True),
        "size": size,
        "root": root.hex(),
        "broken": broken,
    }


def _alerts(connection: Connection, *, only_open: bool) -> list[View]:
    a = schema.alerts.c
    query = select(schema.alerts).order_by(a.closed_at.is_not(None), a.id.desc()).limit(PAGE)
    if only_open:
        query = query.where(a.closed_at.is_(None))
    return [row | {"state": _alert_state(row)} for row in rows(connection, query)]


def _alert_state(row: Mapping[str, Any]) -> str:
    if row["closed_at"] is not None:
        return "closed"
    return "open" if row["acknowledged_at"] is None else "acknowledged"


def _newest(connection: Connection, table: Table, column: str) -> View | None:
    return first(connection, select(table).order_by(table.c[column].desc()).limit(1))


def _release(row: Mapping[str, Any]) -> View:
    manifest: Mapping[str, Any] = row["manifest"]
    files: Mapping[str, Mapping[str, Any]] = manifest.get("files", {})
    return {
        "model": row["model"],
        "release": row["release"],
        "fallback": row["fallback"],
        "run": row["run"],
        "published_at": row["published_at"],
        "published_by": row["published_by"],
        "task": manifest.get("task"),
        "classes": manifest.get("classes", []),
        "channels": manifest.get("channels", []),
        "accuracy": _accuracy(manifest.get("metrics", {})),
        "input": manifest.get("input"),
        "files": files,
        "bytes": sum(int(entry.get("length", 0)) for entry in files.values()),
        "manifest": json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False),
    }


def _accuracy(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return split → precision → share from names such as ``accuracy.known.int8``."""
    table: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        match name.split("."):
            case ["accuracy", split, precision]:
                table.setdefault(split, {})[precision] = value
    return table


def _progress(rollout: Mapping[str, Any], fleet: Sequence[Mapping[str, Any]]) -> View:
    wanted = (rollout["model"], rollout["release"])
    by_id = {row["id"]: row for row in fleet}

    def count(matches: Callable[[Mapping[str, Any]], bool]) -> int:
        return sum(1 for name in rollout["targets"] if name in by_id and matches(by_id[name]))

    return dict(rollout) | {
        "served": count(lambda row: (row["model"], row["release"]) == wanted),
        "failed": count(lambda row: row["serving_state"] == "failed"),
        "total": len(rollout["targets"]),
    }
