"""How a device comes into the fleet, stays in it, and is put out of it.

Everything here is one transaction over the store. What follows outside of it (broker and
SuperLink) is told by :mod:`atoll.server.membership`, which can be repeated at will.

**Names rest.** Brokers know a device by the name in its certificate, not by the serial. So a
name is given to another key only when the certificate before it has run out; until then
whoever holds the old key could speak under that name.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, RowMapping, insert, select, update

from atoll.fleet.errors import BadDeviceId, BadIdentity
from atoll.fleet.identity import Authority, Peer, peer_of, public_pem
from atoll.fleet.token import EnrolmentToken
from atoll.fleet.topics import check_device_id
from atoll.server import audit
from atoll.server.auth import digest
from atoll.server.errors import BadInput, Conflict, Forbidden, NotFound
from atoll.server.schema import devices, dropped_nodes, enrolment_tokens, twins

TOKEN_SECONDS: Final = 24 * 3600.0
"""How long a token lives unless told otherwise."""
MAX_TOKEN_SECONDS: Final = 90 * 24 * 3600.0

_REMEDY: Final = "make a new one with `atoll device token`"


class BadToken(Forbidden):
    """A token that lets nobody in: ``token-unknown``, ``token-used`` or ``token-expired``."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device that has just come in."""

    device: str
    certificate: bytes
    labels: Mapping[str, str]
    boot: int
    """The highest boot number heard under this name; the device counts on from there."""


def new_token(
    connection: Connection,
    *,
    url: str,
    ca_sha256: str,
    device: str | None,
    labels: Mapping[str, str],
    life: float,
    actor: str,
    now: float,
) -> str:
    """Return a token that works once within ``life`` seconds, for ``device`` or for any.

    Raises :class:`BadInput`.
    """
    if device is not None:
        _check_id(device)
    if not 0 < life <= MAX_TOKEN_SECONDS:
        raise BadInput(f"a token lives for up to {MAX_TOKEN_SECONDS / 86400:.0f} days")
    secret = secrets.token_urlsafe(24)
    try:
        token = EnrolmentToken(url, ca_sha256, secret, device).encode()
    except BadIdentity as error:
        raise BadInput(str(error)) from error
    connection.execute(
        insert(enrolment_tokens).values(
            secret_sha256=digest(secret),
            device=device,
            labels=dict(labels),
            created_at=now,
            expires_at=now + life,
        )
    )
    audit.record(
        connection, actor, "token.create", device or "any", now, labels=dict(labels), life=life
    )
    return token


def enrol(
    connection: Connection,
    authority: Authority,
    *,
    secret: str,
    device: str | None,
    csr: bytes,
    now: float,
    life: timedelta,
) -> Enrolled:
    """Spend the token and certify the device's keys.

    ``device`` is the name that the device wants where the token leaves it the choice. A
    device that asks again with the same token and key is given its certificate again, since
    the first answer may have been lost.

    Raises :class:`BadToken`, :class:`BadInput`, or :class:`Conflict` when the name is taken;
    the token is then unspent if the transaction is rolled back.
    """
    claimed = connection.execute(
        update(enrolment_tokens)
        .where(
            enrolment_tokens.c.secret_sha256 == digest(secret),
            enrolment_tokens.c.used_at.is_(None),
            enrolment_tokens.c.expires_at > now,
        )
        .values(used_at=now)
        .returning(enrolment_tokens.c.device, enrolment_tokens.c.labels)
    ).first()
    if claimed is None:
        return _again(connection, authority, digest(secret), csr, now)
    named, labels = claimed
    if named is not None and device not in (None, named):
        raise BadInput(
            f"the token is for {named!r} and not for {device!r}", "leave the name to the token"
        )
    name = named or device
    if name is None:
        raise BadInput(
            "neither the token nor the request names the device", "give the device a name"
        )
    certificate, peer = _certify(authority, csr, _check_id(name), now, life)
    _admit(connection, peer, certificate, labels, now, may_replace=named is not None)
    connection.execute(
        update(enrolment_tokens)
        .where(enrolment_tokens.c.secret_sha256 == digest(secret))
        .values(used_by=name)
    )
    audit.record(connection, name, "device.enrol", name, now, serial=peer.serial, labels=labels)
    return Enrolled(name, certificate, labels, _boot(connection, name))


def renew(
    connection: Connection,
    authority: Authority,
    peer: Peer,
    *,
    csr: bytes,
    now: float,
    life: timedelta,
) -> bytes:
    """Certify the same keys for longer; return the certificate.

    ``peer`` is the caller's present certificate, which keeps working until the new one is
    first seen (:func:`check`). Raises :class:`BadInput` for other keys than the present ones.
    """
    certificate, renewed = _certify(authority, csr, peer.device, now, life)
    same_seal = renewed.seal.public_bytes_raw() == peer.seal.public_bytes_raw()
    if public_pem(renewed.key) != public_pem(peer.key) or not same_seal:
        raise BadInput("a renewal keeps the device's keys", "enrol again to change them")
    connection.execute(
        update(devices)
        .where(devices.c.id == peer.device)
        .values(
            certificate=certificate.decode(),
            serial=renewed.serial,
            previous_serial=peer.serial,
            expires_at=renewed.not_after.timestamp(),
        )
    )
    audit.record(connection, peer.device, "device.renew", peer.device, now, serial=renewed.serial)
    return certificate


def check(connection: Connection, peer: Peer) -> bool:
    """Let a verified certificate through, or raise :class:`Forbidden`.

    Returns whether this is the first use of a renewed certificate: the caller then ends the
    one before with :func:`settle_renewal`, in a transaction that writes.
    """
    row = connection.execute(
        select(devices.c.serial, devices.c.previous_serial, devices.c.revoked_at).where(
            devices.c.id == peer.device
        )
    ).first()
    if row is None:
        raise Forbidden(
            f"{peer.device!r} is not enrolled here", "enrol it again", code="not-enrolled"
        )
    if row.revoked_at is not None:
        raise Forbidden(f"{peer.device!r} was revoked", "ask an operator", code="revoked")
    if peer.serial == row.serial:
        return row.previous_serial is not None
    if peer.serial == row.previous_serial:
        return False
    raise Forbidden(
        f"the certificate of {peer.device!r} was replaced by a newer one",
        "use the newer one, or enrol again",
        code="superseded",
    )


def settle_renewal(connection: Connection, peer: Peer) -> None:
    """End the certificate before ``peer``'s."""
    connection.execute(
        update(devices)
        .where(devices.c.id == peer.device, devices.c.serial == peer.serial)
        .values(previous_serial=None)
    )


def revoke(connection: Connection, device: str, *, actor: str, now: float, reason: str) -> None:
    """Put a device out of the fleet.

    Raises :class:`NotFound`, or :class:`Conflict` when it is out already.
    """
    row = connection.execute(
        select(devices.c.node_id, devices.c.revoked_at).where(devices.c.id == device)
    ).first()
    if row is None:
        raise NotFound(f"there is no device {device!r}", "see `atoll device list`")
    if row.revoked_at is not None:
        raise Conflict(f"{device!r} was revoked already")
    _drop_node(connection, device, row.node_id, now)
    connection.execute(
        update(devices)
        .where(devices.c.id == device)
        .values(revoked_at=now, online=False, node_id=None)
    )
    audit.record(connection, actor, "device.revoke", device, now, reason=reason)


def _again(
    connection: Connection, authority: Authority, token: str, csr: bytes, now: float
) -> Enrolled:
    row = connection.execute(
        select(
            enrolment_tokens.c.used_at,
            devices.c.id,
            devices.c.certificate,
            devices.c.labels,
            devices.c.revoked_at,
        )
        .outerjoin(devices, devices.c.id == enrolment_tokens.c.used_by)
        .where(enrolment_tokens.c.secret_sha256 == token)
    ).first()
    if row is None:
        raise BadToken("this hub never made that token", _REMEDY, code="token-unknown")
    if row.used_at is None:
        raise BadToken("the token has expired", _REMEDY, code="token-expired")
    if row.id is not None and row.revoked_at is None:
        certificate = row.certificate.encode()
        _, asking = _certify(authority, csr, row.id, now, timedelta(minutes=1))
        present = _peer(authority, certificate, now)
        if present is not None and public_pem(asking.key) == public_pem(present.key):
            return Enrolled(row.id, certificate, row.labels, _boot(connection, row.id))
    raise BadToken("the token was used before", _REMEDY, code="token-used")


def _boot(connection: Connection, device: str) -> int:
    boot: int = connection.execute(
        select(devices.c.boot).where(devices.c.id == device)
    ).scalar_one()
    return boot


def _admit(
    connection: Connection,
    peer: Peer,
    certificate: bytes,
    labels: Mapping[str, str],
    now: float,
    *,
    may_replace: bool,
) -> None:
    row = connection.execute(select(devices).where(devices.c.id == peer.device)).mappings().first()
    values = {
        "labels": dict(labels),
        "certificate": certificate.decode(),
        "serial": peer.serial,
        "previous_serial": None,
        "expires_at": peer.not_after.timestamp(),
        "enrolled_at": now,
        "revoked_at": None,
    }
    if row is None:
        connection.execute(insert(devices).values(id=peer.device, **values))
        desired = {"version": 0, "model": None, "release": None, "train": False}
        connection.execute(insert(twins).values(device=peer.device, desired=desired))
        return
    if not may_replace:
        raise Conflict(
            f"there is a device {peer.device!r} already",
            "choose another name, or make a token for this one",
            code="device-taken",
        )
    if _same_key(row, peer):
        if row["revoked_at"] is not None:
            raise Conflict(
                f"the key of {peer.device!r} was revoked", "delete the identity on the device"
            )
    elif row["expires_at"] > now:
        until = datetime.fromtimestamp(row["expires_at"], UTC)
        raise Conflict(
            f"a certificate of {peer.device!r} for another key is valid until "
            f"{until:%Y-%m-%d %H:%M} UTC",
            "choose another name, or wait until then",
            code="device-taken",
        )
    else:
        _drop_node(connection, peer.device, row["node_id"], now)
        values["node_id"] = None
    connection.execute(update(devices).where(devices.c.id == peer.device).values(**values))


def _same_key(row: RowMapping, peer: Peer) -> bool:
    from cryptography import x509

    present = x509.load_pem_x509_certificate(row["certificate"].encode())
    return present.public_key() == peer.key


def _drop_node(connection: Connection, device: str, node: str | None, now: float) -> None:
    if node is not None:
        connection.execute(insert(dropped_nodes).values(node_id=node, device=device, at=now))


def _certify(
    authority: Authority, csr: bytes, device: str, now: float, life: timedelta
) -> tuple[bytes, Peer]:
    at = datetime.fromtimestamp(now, UTC)
    try:
        certificate = authority.issue_device(csr, device, at, life)
        return certificate, peer_of(certificate, authority.cert_pem, at)
    except BadIdentity as error:
        raise BadInput(str(error), "send a certificate request of an Atoll identity") from error


def _peer(authority: Authority, certificate: bytes, now: float) -> Peer | None:
    try:
        return peer_of(certificate, authority.cert_pem, datetime.fromtimestamp(now, UTC))
    except BadIdentity:  # expired since
        return None


def _check_id(device: str) -> str:
    try:
        return check_device_id(device)
    except BadDeviceId as error:
        raise BadInput(str(error), "choose another name") from error
