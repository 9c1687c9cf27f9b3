"""Operator routes about models: releases, rollouts, drift, alerts; and the audit log."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sqlalchemy import select, update

from atoll.server import audit, publishing, repository, rollouts
from atoll.server.api_access import Approver, Hub, Operating, Viewer
from atoll.server.errors import Conflict, NotFound
from atoll.server.schema import alerts, devices, drift, releases
from atoll.server.schema import rollouts as rollouts_table

router: Final = APIRouter()

Limit = Annotated[int, Query(ge=1, le=1000)]


class ReleaseRequest(BaseModel, extra="forbid"):
    """A run's candidate and what was signed for it."""

    run: str
    targets: Annotated[str, Field(max_length=4 * 1024 * 1024)]
    """The new targets metadata, JSON, byte for byte as it was signed."""


class RollOutRequest(BaseModel, extra="forbid"):
    """What to roll out; without a release the newest, without canaries one device."""

    release: Annotated[int, Field(ge=1)] | None = None
    canaries: list[str] | None = None


class RollBackRequest(BaseModel, extra="forbid"):
    """Why a rollout is undone."""

    reason: Annotated[str, Field(max_length=500)] = ""


@router.get("/models", tags=["models"])
def list_models(hub: Hub, _who: Viewer) -> list[dict[str, Any]]:
    """List the models with their releases and rollouts, newest first."""
    hidden = {"profile"}
    columns = [column for column in releases.c if column.name not in hidden]
    with hub.store.read() as connection:
        released = connection.execute(
            select(*columns).order_by(releases.c.model, releases.c.release.desc())
        )
        rolled = connection.execute(select(rollouts_table).order_by(rollouts_table.c.id.desc()))
        models: dict[str, dict[str, Any]] = {}
        for row in released.mappings():
            model = models.setdefault(
                row["model"], {"model": row["model"], "releases": [], "rollouts": []}
            )
            model["releases"].append(dict(row))
        for row in rolled.mappings():
            models[row["model"]]["rollouts"].append(dict(row))
    return list(models.values())


@router.get("/targets", tags=["models"])
def current_targets(hub: Hub, _who: Viewer) -> Response:
    """Return the signed targets metadata as devices see it now: what the signer starts from."""
    return Response(repository.current_targets(hub.tuf), media_type="application/json")


@router.post("/models/{model}/releases", tags=["models"], status_code=201)
def publish_release(
    model: str, body: ReleaseRequest, hub: Hub, who: Approver
) -> dict[str, str | int | None]:
    """Publish a run's candidate, by targets metadata that the offline key has signed."""
    with hub.store.begin() as connection:
        release = publishing.publish(
            connection,
            hub.settings,
            model=model,
            run=body.run,
            signed=body.targets.encode(),
            actor=who.name,
            now=hub.clock(),
        )
    hub.bus.publish("models", "runs", "audit")
    return {"model": model, "release": release.release, "fallback": release.fallback}


@router.post("/models/{model}/roll-out", tags=["models"], status_code=201)
def roll_out(model: str, body: RollOutRequest, hub: Hub, who: Operating) -> dict[str, Any]:
    """Roll a release out: to the canaries first, and to the rest once they serve it."""
    with hub.store.begin() as connection:
        rollout = rollouts.start(
            connection,
            model,
            release=body.release,
            canaries=body.canaries,
            actor=who.name,
            now=hub.clock(),
        )
    hub.bus.publish("models", "devices", "audit")
    return {"id": rollout, "model": model}


@router.post("/models/{model}/roll-back", tags=["models"])
def roll_back(
    model: str, hub: Hub, who: Operating, body: RollBackRequest | None = None
) -> dict[str, Any]:
    """Return the devices of the newest rollout to the release that it may fall back to."""
    reason = body.reason if body and body.reason else f"rolled back by {who.name}"
    with hub.store.begin() as connection:
        rollout = rollouts.roll_back(
            connection, model, actor=who.name, now=hub.clock(), reason=reason
        )
    hub.bus.publish("models", "devices", "audit")
    return {"id": rollout, "model": model}


@router.get("/drift", tags=["watching"])
def list_drift(hub: Hub, _who: Viewer) -> list[dict[str, Any]]:
    """Show how far each device has drifted, the farthest first."""
    query = (
        select(drift)
        .join(devices, devices.c.id == drift.c.device)
        .where(devices.c.revoked_at.is_(None))
        .order_by(drift.c.score.desc())
    )
    with hub.store.read() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


@router.get("/alerts", tags=["watching"])
def list_alerts(
    hub: Hub, _who: Viewer, *, all_: Annotated[bool, Query(alias="all")] = False, limit: Limit = 200
) -> list[dict[str, Any]]:
    """List the alerts that are neither acknowledged nor closed, or ``all``; newest first."""
    query = select(alerts).order_by(alerts.c.id.desc()).limit(limit)
    if not all_:
        query = query.where(alerts.c.acknowledged_at.is_(None), alerts.c.closed_at.is_(None))
    with hub.store.read() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


@router.post("/alerts/{alert}/acknowledge", tags=["watching"])
def acknowledge_alert(alert: int, hub: Hub, who: Operating) -> dict[str, Any]:
    """Say that a person has seen the alert."""
    now = hub.clock()
    with hub.store.begin() as connection:
        changed = connection.execute(
            update(alerts)
            .where(alerts.c.id == alert, alerts.c.acknowledged_at.is_(None))
            .values(acknowledged_at=now, acknowledged_by=who.name)
        )
        if changed.rowcount == 0:
            if connection.execute(select(alerts.c.id).where(alerts.c.id == alert)).first() is None:
                raise NotFound(f"there is no alert {alert}", "see the list of alerts")
            raise Conflict(f"alert {alert} was acknowledged already")
        audit.record(connection, who.name, "alert.acknowledge", str(alert), now)
    hub.bus.publish("alerts", "audit")
    return {"id": alert, "acknowledged_by": who.name}


@router.get("/audit", tags=["audit"])
def read_audit(
    hub: Hub, _who: Viewer, start: Annotated[int, Query(ge=0)] = 0, limit: Limit = 100
) -> dict[str, Any]:
    """Read the audit log from entry ``start``, after checking it whole against its hashes."""
    with hub.store.read() as connection:
        size, root = audit.verify(connection)
        return {
            "size": size,
            "root": root.hex(),
            "entries": audit.entries(connection, start, limit),
        }
