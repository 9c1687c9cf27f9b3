"""Carries the twins' desired states to the broker, retained, as often as it takes.

Whoever wants something of a device calls :func:`want`, in its own transaction; the scheduler's
tick publishes what is not published yet. A device reads the retained state whenever it
connects, so nothing is lost when either side is away.
"""

import logging
import time
from collections.abc import Collection
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, select, update

from atoll.fleet.topics import topic
from atoll.fleet.wire import Desired, encode
from atoll.server.link import Link, published
from atoll.server.schema import devices, twins
from atoll.server.store import Store

log = logging.getLogger(__name__)

_PATIENCE: Final = 5.0
_AT_ONCE: Final = 500


def want(connection: Connection, device: str, **changes: str | int | bool | None) -> bool:
    """Change what is wanted of a device: ``model``, ``release`` or ``train``.

    The version grows only when something changes; returns whether it did. A device that is
    unknown or revoked wants nothing.
    """
    row = connection.execute(
        select(twins.c.desired_version, twins.c.desired)
        .join(devices, devices.c.id == twins.c.device)
        .where(twins.c.device == device, devices.c.revoked_at.is_(None))
    ).first()
    if row is None:
        return False
    wanted = dict(row.desired) | changes
    if wanted == row.desired:
        return False
    version = row.desired_version + 1
    desired = msgspec.convert(wanted | {"version": version}, Desired)
    connection.execute(
        update(twins)
        .where(twins.c.device == device)
        .values(desired_version=version, desired=msgspec.to_builtins(desired))
    )
    return True


def unpublished(connection: Connection) -> list[tuple[str, Desired]]:
    """Return the desired states that the broker does not have yet."""
    rows = connection.execute(
        select(twins.c.device, twins.c.desired)
        .join(devices, devices.c.id == twins.c.device)
        .where(twins.c.desired_version > twins.c.published_version, devices.c.revoked_at.is_(None))
        .limit(_AT_ONCE)
    )
    return [(row.device, msgspec.convert(row.desired, Desired)) for row in rows]


def tick(store: Store, link: Link) -> Collection[str]:
    """Publish what is not published yet; return the devices whose state the broker now has."""
    if not link.online:
        return ()
    with store.read() as connection:
        waiting = unpublished(connection)
    sent = [
        (
            device,
            desired.version,
            link.publish(topic(device, "desired"), encode(desired), retain=True),
        )
        for device, desired in waiting
    ]
    deadline = time.monotonic() + _PATIENCE
    done: list[dict[str, Any]] = [
        {"device": device, "version": version}
        for device, version, info in sent
        if published(info, max(0.0, deadline - time.monotonic()))
    ]
    if done:
        with store.begin() as connection:
            for one in done:
                connection.execute(
                    update(twins)
                    .where(
                        twins.c.device == one["device"],
                        twins.c.published_version < one["version"],
                    )
                    .values(published_version=one["version"])
                )
    return [str(one["device"]) for one in done]
