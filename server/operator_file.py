"""How people and programs on this machine find a hub: ``operator.json`` and a greeting."""

import json
import os
from typing import Final

from sqlalchemy import select

from atoll.fleet.files import write_atomic
from atoll.server import audit, auth, sessions
from atoll.server.context import HubContext
from atoll.server.errors import Unauthenticated
from atoll.server.schema import operators

ADMIN: Final = "admin"
"""The operator that a new hub has; its token is in ``operator.json``."""


def write(hub: HubContext) -> None:
    """Write ``operator.json``, readable by the hub's user alone.

    It holds ``url`` and ``token`` of the operator API, and where devices reach the hub.
    """
    where = hub.addresses
    facts = {
        "url": where.operator_url,
        "token": _admin_token(hub),
        "device_url": where.device_url,
        "mqtt": f"{where.mqtt_host}:{where.mqtt_port}",
        "pid": os.getpid(),
    }
    write_atomic(hub.settings.operator_file, json.dumps(facts, indent=1).encode())


def greeting(hub: HubContext) -> list[str]:
    """Return what a person should know of a hub that has just started."""
    with hub.store.begin() as connection:
        code = sessions.new_login_code(connection, ADMIN, hub.clock())
    where = hub.addresses
    keys = hub.settings.offline_keys
    warning = [f"Move {keys} to a medium that is kept offline: it signs models"]
    return [
        f"Dashboard  {where.operator_url}/login?code={code}",
        f"API        {where.operator_url}/api/v1 (token in {hub.settings.operator_file})",
        f"Devices    {where.device_url}, MQTT on {where.mqtt_host}:{where.mqtt_port}",
        f"Data       {hub.settings.data}",
        *(warning if keys.exists() else []),
    ]


def _admin_token(hub: HubContext) -> str:
    """Return the token in ``operator.json`` if it still is one, else a new one."""
    try:
        token = str(json.loads(hub.settings.operator_file.read_text())["token"])
        with hub.store.read() as connection:
            auth.authenticate(connection, token)
    except (OSError, ValueError, KeyError, TypeError, Unauthenticated):
        pass
    else:
        return token
    with hub.store.begin() as connection:
        exists = select(operators.c.name).where(operators.c.name == ADMIN)
        if connection.execute(exists).first() is None:
            audit.record(connection, "hub", "operator.create", ADMIN, hub.clock(), role="admin")
            return auth.create(connection, ADMIN, "admin", hub.clock())
        audit.record(connection, "hub", "operator.reissue", ADMIN, hub.clock())
        return auth.reissue(connection, ADMIN)
