"""What a hub is told at its start, and where it keeps things.

Every path of the data directory is named here and nowhere else.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from platformdirs import user_data_path

from atoll.server.store import sqlite_url

BrokerKind = Literal["nats", "mosquitto"]

DAY: Final = 86_400.0


def default_data(environment: Mapping[str, str] = os.environ) -> Path:
    """Return ``$ATOLL_DATA``, or the user's data directory for the hub."""
    given = environment.get("ATOLL_DATA")
    return Path(given) if given else user_data_path("atoll") / "hub"


def own_address() -> str:
    """Return the address that this machine's default route would use; loopback without one.

    Connecting a datagram socket chooses a route and sends nothing.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: never a real host
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


@dataclass(frozen=True, slots=True)
class Settings:
    """A hub's settings. A port of 0 means one that is free."""

    data: Path
    database: str | None = None
    """SQLAlchemy URL; none: SQLite in the data directory."""
    host: str = "127.0.0.1"
    """Name or address by which devices reach this machine; goes into tokens and certificates."""
    device_bind: str = "0.0.0.0"  # noqa: S104  devices come from other machines; mTLS guards it
    device_port: int = 8443
    operator_bind: str = "127.0.0.1"
    operator_port: int = 8080
    operator_hosts: tuple[str, ...] = ()
    """Further ``Host`` names under which the operator API answers, e.g. behind a proxy."""
    broker: BrokerKind | str = "nats"
    """``nats`` or ``mosquitto`` to have one started, or ``mqtts://host:port`` of yours."""
    mqtt_bind: str = "0.0.0.0"  # noqa: S104  as for device_bind
    mqtt_port: int = 8883
    superlink: str | None = None
    """``host:port`` of your SuperLink; none: one is started."""
    superlink_ca: Path | None = None
    """PEM of the CA of that SuperLink; none: the hub's own."""
    superlink_port: int = 0
    mlflow: str | None = None
    """URL of an MLflow tracking server that is told of runs; with its credentials, if it asks."""
    certificate_days: float = 30.0
    """Life of a device certificate; renewal begins at two thirds of it."""
    offline_seconds: float = 90.0
    """A device unheard of for longer counts as offline, whatever it last said."""
    max_body: int = 64 * 1024 * 1024
    """Largest request body from a device, in bytes; Flower sends a model in smaller pieces."""

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.database or sqlite_url(self.data / "hub.db")

    @property
    def ca(self) -> Path:
        """The CA's key and certificate."""
        return self.data / "ca"

    @property
    def tls(self) -> Path:
        """Server and service certificates: ``api``, ``broker``, ``superlink``, ``hub``."""
        return self.data / "tls"

    @property
    def tuf(self) -> Path:
        """The TUF repository."""
        return self.data / "tuf"

    @property
    def candidates(self) -> Path:
        """Unsigned bundles, one directory per run."""
        return self.data / "candidates"

    @property
    def runs(self) -> Path:
        """What runs go on from, one directory per run."""
        return self.data / "runs"

    @property
    def online_keys(self) -> Path:
        """TUF keys that the hub signs with."""
        return self.data / "online-keys"

    @property
    def offline_keys(self) -> Path:
        """TUF keys that should not stay here."""
        return self.data / "offline-keys"

    @property
    def operator_file(self) -> Path:
        """Where programs on this machine find the operator API: ``{"url", "token"}``."""
        return self.data / "operator.json"
