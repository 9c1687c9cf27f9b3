"""Which broker: the embedded one, a mosquitto of our own, or one that someone else runs."""

from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from atoll.fleet.files import PUBLIC, write_atomic
from atoll.fleet.identity import Authority
from atoll.server.broker import Broker, TlsFiles, hub_client_id
from atoll.server.errors import CannotStart
from atoll.server.mosquitto import MosquittoBroker, pattern_rules, write_revocations
from atoll.server.nats import NatsBroker
from atoll.server.supervisor import Address

DEFAULT_PORT: Final = 8883


def _utc() -> datetime:
    return datetime.now(UTC)


def open_broker(
    wanted: str,
    directory: Path,
    listen: Address,
    tls: TlsFiles,
    authority: Authority,
    now: Callable[[], datetime] = _utc,
) -> Broker:
    """Return the broker that ``wanted`` names: ``nats``, ``mosquitto`` or ``mqtts://host:port``.

    ``listen`` and ``tls`` are for one that we start. Raises :class:`CannotStart` for any other.
    """
    if wanted == "nats":
        return NatsBroker(directory, listen, tls)
    if wanted == "mosquitto":
        return MosquittoBroker(directory, listen, tls, authority, now)
    return ExternalBroker(wanted, directory, authority, now)


class ExternalBroker:
    """A broker that someone else runs and configures; we only connect, by TLS.

    It must take the hub's CA for clients, make a certificate's CN the user name, and grant
    what ``<directory>/rules.acl`` says (in mosquitto's notation; other brokers have their own
    for the same). A revoked certificate is in ``<directory>/revoked.crl``; a broker that does
    not read that list lets the device connect until its certificate expires.
    """

    def __init__(
        self, url: str, directory: Path, authority: Authority, now: Callable[[], datetime] = _utc
    ) -> None:
        self._address = parse_url(url)
        self._directory = directory
        self._authority = authority
        self._now = now

    @property
    def address(self) -> Address:
        """Where the URL points."""
        return self._address

    @property
    def client_id(self) -> str:
        """Secret: what this broker lets its clients call themselves is not known."""
        return hub_client_id(self._directory)

    def write_config(self, devices: Collection[str], revoked: Collection[str] = ()) -> None:  # noqa: ARG002 -- known by certificate and pattern
        """Write what the broker's operator needs. Raises :class:`OSError`."""
        write_atomic(self._directory / "ca.pem", self._authority.cert_pem, PUBLIC)
        write_atomic(self._directory / "rules.acl", pattern_rules().encode(), PUBLIC)
        write_revocations(self._directory / "revoked.crl", self._authority, revoked, self._now())

    def child(self) -> None:
        """Return none: it runs elsewhere."""

    def reload(self, pid: int | None) -> None:
        """Do nothing: it is its operator's to reload."""


def parse_url(url: str) -> Address:
    """Return the address in ``mqtts://host[:port]``; raise :class:`CannotStart`."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORT
    except ValueError:
        parts, port = urlsplit(""), DEFAULT_PORT
    if parts.scheme != "mqtts" or not parts.hostname or parts.path.strip("/") or parts.username:
        raise CannotStart(
            f"cannot use {url!r} as a broker",
            "write nats, mosquitto, or mqtts://host:port without path or password",
        )
    return Address(parts.hostname, port)
