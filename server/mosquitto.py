"""Eclipse Mosquitto (2.0 or later) as the hub's child, for those who have it installed.

What was tried and found with 2.0:

- The certificate's CN becomes the user name; the rules are written out per device, so one that
  is not listed has none.
- A subscription beyond the rules is granted and then nothing is delivered through it; a
  forbidden publish is acknowledged and dropped.
- On SIGHUP it reads rules and revocation list again, mutes a device that lost its rules, but
  leaves it connected and would accept it again. So its certificate goes on the revocation
  list, and it is cut off by connecting under its client id (MQTT 3.1.1 §3.1.4-2) through a
  Unix socket that the hub's user alone can open.
- ``use_username_as_clientid`` keeps a device from taking over another's session.
- OpenSSL keeps the list it read first unless the next one is strictly newer, to the second.
- State is written every few seconds and at a clean stop, not before a PUBACK: what a power cut
  takes in between is lost. NATS does better; see :mod:`atoll.server.nats`.
"""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from atoll.fleet.authority import Authority
from atoll.fleet.files import PUBLIC, write_atomic
from atoll.fleet.topics import check_device_id
from atoll.server.broker import (
    HUB_USER,
    MAX_MESSAGE_BYTES,
    TlsFiles,
    device_publishes,
    device_reads,
    loopback,
)
from atoll.server.errors import CannotStart
from atoll.server.supervisor import Address, Child

SAVE_SECONDS: Final = 5
QUEUE: Final = 100_000_000
"""As good as no limit. With 0, which means none, 2.0.11 drops a client that is denied."""
LIST_LIFE: Final = timedelta(days=3650)
"""The list is written anew with each change, so its end only has to be far away."""

_SOCKET: Final = "kick.sock"


class MosquittoBroker:
    """``mosquitto`` on ``listen``, keeping what it must in ``directory``.

    ``authority`` signs the revocation list; ``now`` gives the time (aware) it is signed at.
    """

    def __init__(
        self,
        directory: Path,
        listen: Address,
        tls: TlsFiles,
        authority: Authority,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._directory = directory
        self._listen = listen
        self._tls = tls
        self._authority = authority
        self._now = now
        self._listed: frozenset[str] = frozenset()
        self._leaving: frozenset[str] = frozenset()

    @property
    def address(self) -> Address:
        """Where the hub connects: the devices' listener, by loopback."""
        return loopback(self._listen)

    @property
    def client_id(self) -> str:
        """The hub's own name, which the broker would impose anyway."""
        return HUB_USER

    def write_config(self, devices: Collection[str], revoked: Collection[str] = ()) -> None:
        """Write configuration, rules and revocation list. Raises :class:`OSError`."""
        listed = frozenset(devices)
        self._leaving = (self._leaving | self._listed) - listed
        self._listed = listed
        write_revocations(self._directory / "revoked.crl", self._authority, revoked, self._now())
        write_atomic(self._directory / "rules.acl", rules_for(devices).encode())
        config = config_for(self._listen, self._tls, self._directory.absolute())
        write_atomic(self._directory / "mosquitto.conf", config.encode())

    def child(self) -> Child:
        """Return the program; raise :class:`CannotStart` when it is not installed."""
        return Child(
            name="broker",
            command=[str(find_program()), "-c", "mosquitto.conf"],
            ready=self.address,
            directory=self._directory,
            port_option="--mqtt-port",
        )

    def reload(self, pid: int | None) -> None:
        """Send SIGHUP, then disconnect the devices that are no longer listed."""
        if pid is None:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)
            # The signal is acted upon at the end of a turn of the broker's loop, and to take a
            # connection takes two: whoever is cut off here comes back to the new list.
            for device in sorted(self._leaving):
                _kick(self._directory, device)
            self._leaving = frozenset()


def config_for(listen: Address, tls: TlsFiles, directory: Path) -> str:
    """Return ``mosquitto.conf``; ``directory`` is where it runs, holding rules and list."""
    # Started as root it would become another user, who can read nothing of ours.
    user = "user root\n" if os.geteuid() == 0 else ""
    return f"""\
{user}per_listener_settings true
persistence true
persistence_location {directory}/
autosave_interval {SAVE_SECONDS}
max_packet_size {MAX_MESSAGE_BYTES}
# The hub's session waits for the hub however long that takes.
max_queued_messages {QUEUE}
max_inflight_messages 1024
log_dest stderr
log_type error
log_type warning
log_type notice

listener {listen.port} {listen.host}
cafile {tls.ca}
certfile {tls.certificate}
keyfile {tls.key}
crlfile {directory / "revoked.crl"}
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {directory / "rules.acl"}

# No rules and so no messages: the hub cuts devices off through it.
listener 0 {_SOCKET}
allow_anonymous true
acl_file {directory / "rules.acl"}
"""


def rules_for(devices: Collection[str]) -> str:
    """Return the access rules: what is not named is forbidden."""
    blocks = [_rules(HUB_USER, write=device_reads("+"), read=device_publishes("+"))]
    blocks += [
        _rules(device, write=device_publishes(device), read=device_reads(device))
        for device in sorted(devices)
        if check_device_id(device)
    ]
    return "\n".join(blocks)


def pattern_rules() -> str:
    """Return rules that hold for any device by its certificate's name, without listing it."""
    own = "\n".join(
        [f"pattern write {topic.replace('+', '%u')}" for topic in device_publishes("+")]
        + [f"pattern read {topic.replace('+', '%u')}" for topic in device_reads("+")]
    )
    return f"{own}\n\n{_rules(HUB_USER, write=device_reads('+'), read=device_publishes('+'))}"


def write_revocations(
    path: Path, authority: Authority, serials: Collection[str], now: datetime
) -> None:
    """Write a signed list (RFC 5280 §5) of ``serials`` (hexadecimal), in PEM.

    It is dated a day back, for slow clocks, and later than the one it replaces.
    """
    dated = (now - timedelta(days=1)).replace(microsecond=0)
    with suppress(FileNotFoundError, ValueError):
        before = x509.load_pem_x509_crl(path.read_bytes()).last_update_utc
        dated = max(dated, before + timedelta(seconds=1))
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.cert.subject)
        .last_update(dated)
        .next_update(dated + LIST_LIFE)
    )
    for serial in sorted(serials):
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(int(serial, 16))
            .revocation_date(dated)
            .build()
        )
    signed = builder.sign(authority.key, hashes.SHA384())
    write_atomic(path, signed.public_bytes(serialization.Encoding.PEM), PUBLIC)


def find_program() -> Path:
    """Return ``mosquitto`` from PATH or where systems put servers.

    Raises :class:`CannotStart` when there is none.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which("mosquitto", path=path)
    if found is None:
        raise CannotStart(
            "mosquitto is not installed",
            "install it (apt install mosquitto) or leave out --broker for the embedded broker",
        )
    return Path(found)


def _rules(user: str, write: list[str], read: list[str]) -> str:
    lines = [f"user {user}", *(f"topic write {topic}" for topic in write)]
    return "\n".join([*lines, *(f"topic read {topic}" for topic in read), ""])


def _kick(directory: Path, device: str) -> None:
    """Connect under the device's client id and leave: the broker drops the older connection."""
    name = device.encode("ascii")
    connect = b"\x00\x04MQTT\x04\x02\x00\x0a" + len(name).to_bytes(2, "big") + name
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2)
            # A socket's path has at most 107 bytes, a data directory's may be longer.
            connection.connect(f"/proc/self/fd/{handle}/{_SOCKET}")
            connection.sendall(bytes([0x10, len(connect)]) + connect)
            connection.recv(4)
            connection.sendall(b"\xe0\x00")
    except OSError as error:
        if not isinstance(error, FileNotFoundError | ConnectionError | TimeoutError):
            raise
    finally:
        os.close(handle)
