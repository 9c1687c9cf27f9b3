"""The hub's own keys and certificates on disk, made at first start and renewed at later ones."""

import ipaddress
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from atoll.fleet.errors import BadIdentity
from atoll.fleet.files import PUBLIC, sync_directory, write_atomic
from atoll.fleet.identity import HUB_SERVICE, Authority, load_key, read_certificate, renew_due
from atoll.server.broker import TlsFiles

LOCAL_NAMES: Final = ("localhost",)
LOCAL_ADDRESSES: Final = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class HubTls:
    """What the hub serves and connects with."""

    api: TlsFiles
    broker: TlsFiles
    superlink: TlsFiles
    hub: TlsFiles
    """The hub's client certificate at the broker."""


def open_authority(directory: Path, now: datetime) -> Authority:
    """Load the hub's CA, or make it: whole or not at all.

    Raises :class:`BadIdentity` when what is there is damaged, :class:`OSError` when it
    cannot be written.
    """
    if directory.exists():
        return Authority.load(directory)
    authority = Authority.create("Atoll hub CA", now)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".ca-", dir=directory.parent))
    try:
        authority.save(staging)
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_directory(directory.parent)
    return authority


def open_tls(authority: Authority, ca: Path, directory: Path, host: str, now: datetime) -> HubTls:
    """Return the hub's certificates, issuing those that are missing or will not do.

    ``host`` is the name or address by which devices reach the hub. Raises
    :class:`BadIdentity` for one that cannot stand in a certificate, and :class:`OSError`.
    """
    wide = frozenset({host, *LOCAL_NAMES, *LOCAL_ADDRESSES})
    local = frozenset({*LOCAL_NAMES, *LOCAL_ADDRESSES})
    return HubTls(
        api=_server(authority, ca, directory, "api", wide, now),
        broker=_server(authority, ca, directory, "broker", wide, now),
        superlink=_server(authority, ca, directory, "superlink", local, now),
        hub=_service(authority, ca, directory, now),
    )


def _server(
    authority: Authority,
    ca: Path,
    directory: Path,
    name: str,
    hosts: Collection[str],
    now: datetime,
) -> TlsFiles:
    files = _files(ca, directory, name)
    if not _will_do(files, authority, hosts, now):
        names = [host for host in sorted(hosts) if not _is_address(host)]
        addresses = [host for host in sorted(hosts) if _is_address(host)]
        _write(files, *authority.issue_server(names, addresses, now))
    return files


def _service(authority: Authority, ca: Path, directory: Path, now: datetime) -> TlsFiles:
    files = _files(ca, directory, "hub")
    if not _will_do(files, authority, (), now):
        _write(files, *authority.issue_service(HUB_SERVICE, now))
    return files


def _files(ca: Path, directory: Path, name: str) -> TlsFiles:
    return TlsFiles(
        ca=ca, certificate=directory / f"{name}.cert.pem", key=directory / f"{name}.key.pem"
    )


def _write(files: TlsFiles, key: bytes, certificate: bytes) -> None:
    write_atomic(files.key, key)
    write_atomic(files.certificate, certificate, PUBLIC)


def _will_do(files: TlsFiles, authority: Authority, hosts: Collection[str], now: datetime) -> bool:
    try:
        pem = files.certificate.read_bytes()
        certificate = read_certificate(pem)
        certificate.verify_directly_issued_by(authority.cert)
        fits = certificate.public_key() == load_key(files.key).public_key()
        return fits and _hosts(certificate) == set(hosts) and not renew_due(pem, now)
    except (OSError, BadIdentity, InvalidSignature, ValueError, TypeError):
        return False


def _hosts(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    }


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
