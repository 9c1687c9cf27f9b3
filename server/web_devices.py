"""What the pages about devices show, read from the tables."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, select

from atoll.fleet.profile import OUTPUT_CLASS
from atoll.server import schema
from atoll.server.errors import NotFound
from atoll.server.watch import compared_windows, profile_of
from atoll.server.watch_rules import Rules, Serving
from atoll.server.web_charts import bars
from atoll.server.web_read import first, rows

EVENTS: Final = 20


def fleet_rows(connection: Connection, now: float, silent_after: float) -> list[dict[str, Any]]:
    """Return one row per device: who it is, what it serves, how it is.

    A device unheard of for ``silent_after`` seconds counts as offline whatever it last said.
    """
    d, t, h, f = schema.devices.c, schema.twins.c, schema.health.c, schema.drift.c
    about = schema.alerts.c.device
    open_alerts = Counter(
        connection.execute(
            select(about).where(schema.alerts.c.closed_at.is_(None), about.is_not(None))
        ).scalars()
    )
    drift = {
        (row.device, row.model, row.release): row
        for row in connection.execute(
            select(f.device, f.model, f.release, f.state, f.score, f.rows)
        )
    }
    query = (
        select(
            *(d[name] for name in _DEVICE_COLUMNS),
            t.desired,
            t.desired_version,
            t.published_version,
            t.reported,
            t.reported_at,
            h.body.label("health"),
            h.received_at.label("health_at"),
        )
        .select_from(
            schema.devices.outerjoin(schema.twins, t.device == d.id).outerjoin(
                schema.health, h.device == d.id
            )
        )
        .order_by(d.revoked_at.is_not(None), d.id)
    )
    fleet = rows(connection, query)
    for row in fleet:
        reported: Mapping[str, Any] = row["reported"] or {}
        desired: Mapping[str, Any] = row["desired"] or {}
        row["state"] = device_state(row, now, silent_after)
        row["model"], row["release"] = reported.get("model"), reported.get("release")
        row["serving_state"] = reported.get("state")
        row["error"] = reported.get("error")
        row["wanted_model"], row["wanted_release"] = desired.get("model"), desired.get("release")
        row["train"] = bool(desired.get("train"))
        watched = drift.get((row["id"], row["model"], row["release"]))
        row["drift_state"] = watched.state if watched else None
        row["drift_score"] = watched.score if watched else None
        row["drift_rows"] = watched.rows if watched else 0
        row["open_alerts"] = open_alerts[row["id"]]
        row["up"], row["down"] = traffic(row)
    return fleet


_DEVICE_COLUMNS: Final = (
    "id",
    "labels",
    "serial",
    "expires_at",
    "enrolled_at",
    "revoked_at",
    "online",
    "boot",
    "last_seen",
    "serve_url",
    "agent_version",
    "node_id",
    "https_up",
    "https_down",
    "mqtt_up",
)


def device_state(row: Mapping[str, Any], now: float, silent_after: float) -> str:
    """Return ``revoked``, ``online`` or ``offline``."""
    if row["revoked_at"] is not None:
        return "revoked"
    heard = row["last_seen"] is not None and now - row["last_seen"] <= silent_after
    return "online" if row["online"] and heard else "offline"


def traffic(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return bytes from and to the device, as the hub counted them."""
    return row["https_up"] + row["mqtt_up"], row["https_down"]


def devices(connection: Connection, now: float, silent_after: float) -> dict[str, Any]:
    """Return the table of devices."""
    fleet = fleet_rows(connection, now, silent_after)
    return {"rows": fleet, "states": Counter(row["state"] for row in fleet)}


def device(
    connection: Connection, device_id: str, now: float, silent_after: float, rules: Rules
) -> dict[str, Any]:
    """Return one device; raise :class:`NotFound`."""
    fleet = fleet_rows(connection, now, silent_after)
    row = next((row for row in fleet if row["id"] == device_id), None)
    if row is None:
        raise NotFound(
            f"there is no device {device_id!r}", "look at the list of devices for its name"
        )
    a, f = schema.alerts.c, schema.drift.c
    alerts = select(schema.alerts).where(a.device == device_id).order_by(a.id.desc())
    drift = first(
        connection,
        select(schema.drift).where(
            f.device == device_id, f.model == row["model"], f.release == row["release"]
        ),
    )
    return {
        "row": row,
        "twin": {
            "desired": json.dumps(row["desired"] or {}, indent=2, sort_keys=True),
            "reported": json.dumps(row["reported"] or {}, indent=2, sort_keys=True),
        },
        "alerts": rows(connection, alerts.limit(EVENTS)),
        "drift": drift,
        "histograms": _histograms(connection, row, drift, rules),
    }


def _histograms(
    connection: Connection, row: Mapping[str, Any], drift: Mapping[str, Any] | None, rules: Rules
) -> list[dict[str, Any]]:
    """Return, per variable, the bars of the population, of the device before and of it now.

    The most changed come first.
    """
    if drift is None:
        return []
    profile = profile_of(connection, row["model"], row["release"])
    if profile is None:
        return []
    serving = Serving(row["id"], row["model"], row["release"])
    compared = compared_windows(connection, serving, profile, rules)
    verdicts: Mapping[str, Mapping[str, Any]] = drift["detail"].get("variables", {})
    reference, before, current = profile.reference(), compared.baseline, compared.current
    found = []
    for name in profile.variables:
        shown = [
            ("reference", "everyone", reference[name]),
            ("before", f"its first {before.rows} rows", before.counts.get(name)),
            ("current", f"its last {current.rows} rows", current.counts.get(name)),
        ]
        drawings = [(kind, words, vector) for kind, words, vector in shown if vector is not None]
        # Noise takes some counts below zero, where a bar has no room.
        heights = bars([np.maximum(vector, 0).tolist() for _, _, vector in drawings])
        verdict = verdicts.get(name, {})
        found.append(
            {
                "name": name,
                "drawings": [
                    (kind, words, drawn)
                    for (kind, words, _), drawn in zip(drawings, heights, strict=True)
                ],
                "state": verdict.get("state"),
                "score": verdict.get("score", 0.0),
                "psi": verdict.get("statistics", {}).get("psi"),
                "classes": profile.classes if name == OUTPUT_CLASS else (),
            }
        )
    return sorted(found, key=lambda entry: -entry["score"])
