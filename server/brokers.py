"""Which broker: the embedded one, a mosquitto of our own, or one that someone else runs."""

import ipaddress
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from atoll.fleet.authority import Authority
from atoll.fleet.errors import BadIdentity
from atoll.fleet.files import PUBLIC, write_atomic
from atoll.fleet.identity import renew_due
from atoll.server.broker import MAX_MESSAGE_BYTES, Broker, TlsFiles, hub_client_id
from atoll.server.errors import CannotStart
from atoll.server.mosquitto import QUEUE, MosquittoBroker, pattern_rules, write_revocations
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

    Hub and devices trust the hub's CA and nothing else, so the broker must serve with a
    certificate of it: ``server.pem`` and ``server.key`` in ``directory`` are made for the host
    in the URL. It must take the same CA (``ca.pem``) for clients, make a certificate's CN the
    user name, and grant what ``rules.acl`` says. A revoked certificate is in ``revoked.crl``; a
    broker that does not read that list lets the device connect until its certificate expires.
    ``mosquitto.conf`` there says all this in mosquitto's words.
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
        home = self._directory
        write_atomic(home / "ca.pem", self._authority.cert_pem, PUBLIC)
        self._write_server_certificate()
        write_atomic(home / "rules.acl", pattern_rules().encode(), PUBLIC)
        write_revocations(home / "revoked.crl", self._authority, revoked, self._now())
        write_atomic(home / "mosquitto.conf", example_config(self._address).encode(), PUBLIC)

    def _write_server_certificate(self) -> None:
        path = self._directory / "server.pem"
        with suppress(FileNotFoundError, BadIdentity):
            if not renew_due(path.read_bytes(), self._now()):
                return
        host = self._address.host
        names, addresses = ([], [host]) if _is_ip(host) else ([host], [])
        key, certificate = self._authority.issue_server(names, addresses, self._now())
        write_atomic(self._directory / "server.key", key)
        write_atomic(path, certificate, PUBLIC)

    def child(self) -> None:
        """Return none: it runs elsewhere."""

    def reload(self, pid: int | None) -> None:
        """Do nothing: it is its operator's to reload."""


def example_config(address: Address) -> str:
    """Return a ``mosquitto.conf`` that an external broker can start from."""
    return f"""\
# For mosquitto 2.0 at {address}, started in this directory; other brokers need the same in
# their own words. After each revocation: copy revoked.crl again and send SIGHUP.
per_listener_settings true
persistence true
max_queued_messages {QUEUE}
max_packet_size {MAX_MESSAGE_BYTES}

listener {address.port}
cafile ca.pem
certfile server.pem
keyfile server.key
crlfile revoked.crl
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file rules.acl
"""


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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
