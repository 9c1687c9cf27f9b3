"""The MQTT broker between hub and devices: one seam, whichever program it is.

Whoever implements :class:`Broker` promises (``tests/contracts/`` holds them to it):

- only certificates of the hub's CA get in, and the certificate's CN is the user;
- a device publishes its own ``reported``, ``telemetry``, ``event`` and ``status`` and reads
  its own ``desired``; of other devices' topics it neither hears nor is heard;
- the hub (``CN=_hub``) publishes every ``desired`` and reads every device's leaves;
- within seconds of :meth:`Broker.reload` a device that is no longer listed is cut off and
  kept out;
- what was acknowledged at QoS 1 for the hub's durable session outlives a restart.

A broker may acknowledge a publish that it then drops for want of permission (NATS does; MQTT
3.1.1 §3.3.5 allows it): a forged message seems to succeed to its sender and never arrives.

:func:`atoll.server.brokers.open_broker` makes the one that the settings ask for.
"""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from atoll.fleet.files import write_atomic
from atoll.fleet.identity import HUB_SERVICE
from atoll.fleet.topics import DEVICE_PUBLISHES, DEVICE_READS, topic
from atoll.server.supervisor import Address, Child

HUB_USER: Final = HUB_SERVICE
MAX_MESSAGE_BYTES: Final = 512 * 1024
"""Largest MQTT payload a broker takes; above :data:`atoll.fleet.wire.MAX_MESSAGE_BYTES`."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a broker serves with: the CA that signs clients, and its own certificate."""

    ca: Path
    certificate: Path
    key: Path


class Broker(Protocol):
    """An MQTT 3.1.1 broker.

    Order at start: :meth:`write_config`, then :meth:`child` is handed to the supervisor. After
    each enrolment or revocation: :meth:`write_config`, then :meth:`reload`.
    """

    @property
    def address(self) -> Address:
        """Where the hub connects, with its service certificate and TLS."""
        ...

    @property
    def client_id(self) -> str:
        """The MQTT client id of the hub's one connection, the same after a restart.

        A secret where the broker lets any client take any id: a device that knew it could
        take over the hub's session.
        """
        ...

    def write_config(self, devices: Collection[str], revoked: Collection[str] = ()) -> None:
        """Write what the broker reads: ``devices`` may connect.

        ``revoked`` are the serial numbers (hexadecimal) of certificates that must no longer
        be taken though they have not expired. Raises :class:`OSError`.
        """
        ...

    def child(self) -> Child | None:
        """Return the program to keep running, called ``broker``; none if it is not ours."""
        ...

    def reload(self, pid: int | None) -> None:
        """Have the running broker (process ``pid``) read its configuration again.

        ``pid`` is the supervisor's; with none, a broker that is down now, nothing happens: it
        reads the configuration when it starts.
        """
        ...


def hub_client_id(directory: Path) -> str:
    """Return the hub's secret client id, made on first use and kept in ``directory``."""
    path = directory / "client-id"
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        made = f"hub-{secrets.token_hex(16)}"
        write_atomic(path, made.encode("ascii"))
        return made


def loopback(listen: Address) -> Address:
    """Return where a program on this machine reaches what listens on ``listen``."""
    return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host), listen.port)  # noqa: S104 -- read, not bound


def device_publishes(device: str) -> list[str]:
    """Return the topics that ``device`` (or ``+``: any) may publish."""
    return [topic(device, leaf) for leaf in DEVICE_PUBLISHES]


def device_reads(device: str) -> list[str]:
    """Return the topics that ``device`` (or ``+``: any) may read."""
    return [topic(device, DEVICE_READS)]
