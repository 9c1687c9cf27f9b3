"""Operator routes about devices, enrolment tokens and operators."""

from typing import Annotated, Any, Final

from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy import Select, select

from atoll.server import audit, auth, enrolment, sessions
from atoll.server.api_access import Admin, Hub, Operating, Viewer
from atoll.server.auth import Role
from atoll.server.errors import NotFound
from atoll.server.schema import devices, health, twins

router: Final = APIRouter()

Label = Annotated[str, Field(min_length=1, max_length=63)]


class TokenRequest(BaseModel, extra="forbid"):
    """A token to make: for one device, or for any that asks."""

    device: str | None = None
    labels: dict[Label, Annotated[str, Field(max_length=255)]] = Field(default={}, max_length=32)
    ttl: float = enrolment.TOKEN_SECONDS
    """Seconds."""


class RevokeRequest(BaseModel, extra="forbid"):
    """Why a device is put out."""

    reason: Annotated[str, Field(max_length=500)] = ""


class OperatorRequest(BaseModel, extra="forbid"):
    """An operator to add."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    role: Role


@router.get("/devices", tags=["devices"])
def list_devices(hub: Hub, _who: Viewer) -> list[dict[str, Any]]:
    """List the devices, revoked ones too."""
    with hub.store.read() as connection:
        rows = connection.execute(_devices().order_by(devices.c.id)).mappings()
        return [dict(row) for row in rows]


@router.get("/devices/{device}", tags=["devices"])
def show_device(device: str, hub: Hub, _who: Viewer) -> dict[str, Any]:
    """Show one device, with its certificate and its latest health."""
    query = (
        _devices()
        .add_columns(
            devices.c.certificate,
            health.c.body.label("health"),
            health.c.received_at.label("health_at"),
        )
        .outerjoin(health, health.c.device == devices.c.id)
        .where(devices.c.id == device)
    )
    with hub.store.read() as connection:
        row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound(f"there is no device {device!r}", "see the list of devices")
    return dict(row)


@router.post("/devices/{device}/revoke", tags=["devices"])
def revoke_device(
    device: str, hub: Hub, who: Operating, body: RevokeRequest | None = None
) -> dict[str, str]:
    """Put a device out of the fleet: broker, API and SuperLink refuse it from now on."""
    reason = body.reason if body else ""
    with hub.store.begin() as connection:
        enrolment.revoke(connection, device, actor=who.name, now=hub.clock(), reason=reason)
    hub.membership.follow()
    hub.bus.publish("devices", "audit")
    return {"device": device, "state": "revoked"}


@router.post("/tokens", tags=["devices"], status_code=201)
def make_token(body: TokenRequest, hub: Hub, who: Operating) -> dict[str, Any]:
    """Make a one-time enrolment token. It is shown this once."""
    now = hub.clock()
    with hub.store.begin() as connection:
        token = enrolment.new_token(
            connection,
            url=hub.addresses.device_url,
            ca_sha256=hub.authority.fingerprint,
            device=body.device,
            labels=body.labels,
            life=body.ttl,
            actor=who.name,
            now=now,
        )
    hub.bus.publish("audit")
    return {"token": token, "device": body.device, "expires_at": now + body.ttl}


@router.post("/login-link", tags=["operators"], status_code=201)
def make_login_link(hub: Hub, who: Viewer) -> dict[str, Any]:
    """Make a link that opens the dashboard as the caller, once, within ten minutes."""
    now = hub.clock()
    with hub.store.begin() as connection:
        code = sessions.new_login_code(connection, who.name, now)
    return {
        "url": f"{hub.addresses.operator_url}/login?code={code}",
        "expires_at": now + sessions.CODE_SECONDS,
    }


@router.get("/operators", tags=["operators"])
def list_operators(hub: Hub, _who: Admin) -> list[dict[str, Any]]:
    """List the operators."""
    with hub.store.read() as connection:
        return list(auth.listing(connection))


@router.post("/operators", tags=["operators"], status_code=201)
def add_operator(body: OperatorRequest, hub: Hub, who: Admin) -> dict[str, str]:
    """Add an operator and return the token. It is shown this once."""
    now = hub.clock()
    with hub.store.begin() as connection:
        token = auth.create(connection, body.name, body.role, now)
        audit.record(connection, who.name, "operator.create", body.name, now, role=body.role)
    hub.bus.publish("audit")
    return {"name": body.name, "role": body.role, "token": token}


@router.post("/operators/{name}/revoke", tags=["operators"])
def revoke_operator(name: str, hub: Hub, who: Admin) -> dict[str, str]:
    """End an operator's access."""
    now = hub.clock()
    with hub.store.begin() as connection:
        auth.revoke(connection, name, now)
        audit.record(connection, who.name, "operator.revoke", name, now)
    hub.bus.publish("audit")
    return {"name": name, "state": "revoked"}


def _devices() -> Select[Any]:
    hidden = {"certificate", "previous_serial"}
    return (
        select(
            *(column for column in devices.c if column.name not in hidden),
            twins.c.desired,
            twins.c.desired_version,
            twins.c.published_version,
            twins.c.reported,
            twins.c.reported_at,
        )
        .select_from(devices)
        .outerjoin(twins, twins.c.device == devices.c.id)
    )
