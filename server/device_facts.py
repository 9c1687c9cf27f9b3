"""What the hub knows of each device that a cohort rule may name (:mod:`atoll.server.cohort_rule`).

A device tells of its power, network, accelerator and examples with its health. What it told
longer ago than the caller lets pass is not known any more. Drift and what it serves are the
hub's own findings, and how often it took part is counted over the model's runs.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Final

from sqlalchemy import Connection, select

from atoll.server import schema

TOLD: Final[Mapping[str, str]] = {
    "power": "power",
    "network": "network",
    "accelerator": "accelerator",
    "rows": "examples",
}
"""Facts that devices tell, and what they are called in :class:`atoll.fleet.wire.Health`."""


def of_fleet(
    connection: Connection, model: str, named: Collection[str], *, now: float, fresh: float
) -> dict[str, dict[str, Any]]:
    """Return what is known of each device that is not revoked, as far as it is ``named``.

    ``model`` is the one of whose runs ``took_part`` counts the rounds. What was told more than
    ``fresh`` seconds before ``now`` (Unix seconds) is left out.
    """
    d, h, t = schema.devices.c, schema.health.c, schema.twins.c
    query = (
        select(d.id, d.labels, h.body, h.received_at, t.reported)
        .select_from(
            schema.devices.outerjoin(schema.health, h.device == d.id).outerjoin(
                schema.twins, t.device == d.id
            )
        )
        .where(d.revoked_at.is_(None))
    )
    drift = _drift(connection) if {"drift", "drifted"} & set(named) else {}
    took_part = _took_part(connection, model) if "took_part" in named else Counter()
    found = {}
    for device, labels, health, told_at, reported in connection.execute(query):
        told = health if health is not None and now - told_at <= fresh else {}
        serves = reported or {}
        release = (device, serves.get("model"), serves.get("release"))
        state = drift.get(release, "unwatched")
        everything = {
            **{name: told.get(field) for name, field in TOLD.items()},
            "drift": state,
            "drifted": state == "drifted",
            "state": serves.get("state"),
            "model": serves.get("model"),
            "release": serves.get("release"),
            "took_part": took_part[device],
            "labels": labels,
        }
        found[device] = {
            name: value for name, value in everything.items() if name in named and value is not None
        }
    return found


def _drift(connection: Connection) -> dict[tuple[str, object, object], str]:
    f = schema.drift.c
    query = select(f.device, f.model, f.release, f.state)
    return {(device, model, release): s for device, model, release, s in connection.execute(query)}


def _took_part(connection: Connection, model: str) -> "Counter[str]":
    """Return in how many rounds of all runs of a model each device's update was in the sum."""
    query = (
        select(schema.rounds.c.survivors)
        .join(schema.runs, schema.runs.c.id == schema.rounds.c.run)
        .where(schema.runs.c.model == model)
    )
    return Counter(
        device for survivors in connection.execute(query).scalars() for device in survivors
    )
