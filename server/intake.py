"""What a message from a device changes: read by its topic, stored once, applied.

The broker lets a device publish in its own subtree alone, so the topic says who speaks.

Births and deaths are states of a connection rather than events: a last will has the same
``(boot, seq)`` each time it is sent, so they take effect by boot number whether new or not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from atoll.fleet import topics
from atoll.fleet.errors import BadMessage, BadTopic
from atoll.fleet.wire import (
    Birth,
    Body,
    Death,
    Envelope,
    Event,
    Health,
    Reported,
    Window,
    decode,
)
from atoll.server.link import Incoming
from atoll.server.schema import alerts, devices, health, messages, twins, windows

_LEAVES: Final[Mapping[type[Body], topics.Leaf]] = {
    Birth: "status",
    Death: "status",
    Reported: "reported",
    Window: "telemetry",
    Health: "telemetry",
    Event: "event",
}


@dataclass(frozen=True, slots=True)
class Received:
    """A message that could be read."""

    device: str
    envelope: Envelope
    raw: bytes
    bytes_up: int
    retained: bool


class Unreadable(Exception):
    """A message to count and forget; ``device`` is none when not even the topic is ours."""

    def __init__(self, device: str | None, why: str) -> None:
        super().__init__(why)
        self.device = device


def read(message: Incoming) -> Received:
    """Decode a message, or raise :class:`Unreadable`."""
    try:
        device, leaf = topics.parse(message.topic)
    except BadTopic as error:
        raise Unreadable(None, str(error)) from error
    try:
        envelope = decode(message.payload, Envelope)
    except BadMessage as error:
        raise Unreadable(device, str(error)) from error
    if _LEAVES[type(envelope.body)] != leaf:
        raise Unreadable(device, f"a {type(envelope.body).__name__} does not belong on {leaf}")
    if not (0 <= envelope.boot < 2**63 and 0 <= envelope.seq < 2**63):
        raise Unreadable(device, "boot or seq is out of range")
    size = len(message.payload) + len(message.topic)
    return Received(device, envelope, message.payload, size, message.retained)


def store_batch(connection: Connection, batch: Sequence[Received], now: float) -> set[str]:
    """Store messages and what they change; return the devices nobody knows here.

    Messages of unknown or revoked devices are dropped.
    """
    known = _known(connection, {received.device for received in batch})
    moved: Counter[str] = Counter()
    for received in batch:
        if received.device in known:
            moved[received.device] += received.bytes_up
            _store(connection, received, now)
    for device, size in moved.items():
        connection.execute(
            update(devices)
            .where(devices.c.id == device)
            .values(mqtt_up=devices.c.mqtt_up + size, last_seen=now)
        )
    return {received.device for received in batch} - known


def _known(connection: Connection, names: set[str]) -> set[str]:
    rows = connection.execute(
        select(devices.c.id).where(devices.c.id.in_(names), devices.c.revoked_at.is_(None))
    )
    return set(rows.scalars())


def _store(connection: Connection, received: Received, now: float) -> None:
    new = _insert(connection, received, now)
    match received.envelope.body:
        case Birth() as body:
            if new is not None or not received.retained:
                _born(connection, received.device, body)
        case Death() as body:
            if new is not None or not received.retained:
                _died(connection, received.device, body)
        case Reported() as body if new is not None:
            _reported(connection, received, body, now)
        case Window() as body if new is not None:
            _window(connection, received.device, new, body, now)
        case Health() as body if new is not None:
            _health(connection, received.device, body, now)
        case Event() as body if new is not None:
            _event(connection, received.device, body, now)


def _insert(connection: Connection, received: Received, now: float) -> int | None:
    """Insert the message; return its id, or none for a repeat."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    envelope = received.envelope
    found: int | None = connection.execute(
        dialect.insert(messages)
        .values(
            device=received.device,
            boot=envelope.boot,
            seq=envelope.seq,
            device_at=envelope.at,
            received_at=now,
            kind=_tag(envelope.body),
            body=received.raw,
        )
        .on_conflict_do_nothing()
        .returning(messages.c.id)
    ).scalar_one_or_none()
    return found


def _born(connection: Connection, device: str, body: Birth) -> None:
    connection.execute(
        update(devices)
        .where(devices.c.id == device, devices.c.boot <= body.boot)
        .values(
            online=True,
            boot=body.boot,
            agent_version=body.agent_version[:32],
            serve_url=body.serve_url[:255] if body.serve_url else None,
        )
    )


def _died(connection: Connection, device: str, body: Death) -> None:
    connection.execute(
        update(devices)
        .where(devices.c.id == device, devices.c.boot == body.boot)
        .values(online=False)
    )


def _reported(connection: Connection, received: Received, body: Reported, now: float) -> None:
    envelope = received.envelope
    later = (
        select(messages.c.id)
        .where(
            messages.c.device == received.device,
            messages.c.kind == "reported",
            (messages.c.boot > envelope.boot)
            | ((messages.c.boot == envelope.boot) & (messages.c.seq > envelope.seq)),
        )
        .limit(1)
    )
    if connection.execute(later).first() is None:
        connection.execute(
            update(twins)
            .where(twins.c.device == received.device)
            .values(reported=_json(body), reported_at=now)
        )


def _window(connection: Connection, device: str, message: int, body: Window, now: float) -> None:
    connection.execute(
        insert(windows).values(
            message=message,
            device=device,
            model=body.model[:63],
            release=body.release,
            received_at=now,
            start=body.start,
            end=body.end,
            rows=body.rows,
            counts=msgspec.msgpack.encode(body.counts),
            noise=body.noise,
        )
    )


def _health(connection: Connection, device: str, body: Health, now: float) -> None:
    values = {"received_at": now, "body": _json(body)}
    changed = connection.execute(update(health).where(health.c.device == device).values(**values))
    if changed.rowcount == 0:
        connection.execute(insert(health).values(device=device, **values))


def _event(connection: Connection, device: str, body: Event, now: float) -> None:
    if body.severity in ("warning", "error"):
        text = f"{body.kind}: {body.detail}" if body.detail else body.kind
        connection.execute(
            insert(alerts).values(
                at=now, kind="device", severity=body.severity, device=device, text=text
            )
        )


def _json(body: Reported | Health) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(body)
    del values["t"]
    return values


def _tag(body: Body) -> str:
    return str(type(body).__struct_config__.tag)
