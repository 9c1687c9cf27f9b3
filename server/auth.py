"""Operators: who they are and what they may do.

A bearer token is 32 random bytes, so its SHA-256 is enough to keep: nothing can be guessed
from it, and a slow hash would protect nothing.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from sqlalchemy import Connection, insert, select, update

from atoll.server.errors import BadInput, Conflict, Forbidden, NotFound, Unauthenticated
from atoll.server.schema import operators

Role = Literal["viewer", "operator", "approver", "admin"]

ROLES: Final[Sequence[Role]] = get_args(Role)
"""From least to most: each may do what the ones before it may."""

_PREFIX: Final = "atollop_"  # so that a leaked token is found by scanners


@dataclass(frozen=True, slots=True)
class Operator:
    """An authenticated person or program."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether this operator has ``role`` or a higher one."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def require(self, role: Role) -> None:
        """Raise :class:`Forbidden` unless :meth:`may`."""
        if not self.may(role):
            raise Forbidden(
                f"{self.name} has the role {self.role}, and this needs {role}",
                "ask an admin, or someone with that role, to do it",
            )


def digest(secret: str) -> str:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create(connection: Connection, name: str, role: Role, now: float) -> str:
    """Add an operator and return the token, which is shown this once.

    Raises :class:`BadInput` for an unusable name or role, :class:`Conflict` for a taken name.
    """
    if not name.isprintable() or not 1 <= len(name) <= 63:
        raise BadInput("an operator's name has 1 to 63 printable characters")
    if role not in ROLES:
        raise BadInput(f"there is no role {role!r}", f"use one of {', '.join(ROLES)}")
    taken = select(operators.c.name).where(operators.c.name == name)
    if connection.execute(taken).first():
        raise Conflict(f"there is an operator {name!r} already", "choose another name")
    token = _PREFIX + secrets.token_urlsafe(32)
    connection.execute(
        insert(operators).values(name=name, role=role, token_sha256=digest(token), created_at=now)
    )
    return token


def reissue(connection: Connection, name: str) -> str:
    """Replace an operator's token, lost, by a new one; raise :class:`NotFound`."""
    token = _PREFIX + secrets.token_urlsafe(32)
    changed = connection.execute(
        update(operators)
        .where(operators.c.name == name, operators.c.revoked_at.is_(None))
        .values(token_sha256=digest(token))
    )
    if changed.rowcount == 0:
        raise NotFound(f"there is no operator {name!r} with access")
    return token


def revoke(connection: Connection, name: str, now: float) -> None:
    """End an operator's access; raise :class:`NotFound` unless there is one to end.

    The last admin cannot be revoked: nobody could add another (:class:`Conflict`).
    """
    live = operators.c.revoked_at.is_(None)
    one = select(operators.c.role).where(operators.c.name == name, live)
    role = connection.execute(one).scalar_one_or_none()
    if role is None:
        raise NotFound(f"there is no operator {name!r} with access")
    admins = select(operators.c.name).where(operators.c.role == "admin", live)
    if role == "admin" and len(connection.execute(admins).all()) == 1:
        raise Conflict(f"{name!r} is the last admin", "create another admin first")
    connection.execute(update(operators).where(operators.c.name == name).values(revoked_at=now))


def authenticate(connection: Connection, token: str) -> Operator:
    """Return whose token this is, or raise :class:`Unauthenticated`."""
    row = connection.execute(
        select(operators.c.name, operators.c.role).where(
            operators.c.token_sha256 == digest(token), operators.c.revoked_at.is_(None)
        )
    ).first()
    if row is None:
        raise Unauthenticated(
            "the token is unknown or was revoked", "use the token from the hub's operator.json"
        )
    return _operator(row.name, row.role)


def listing(connection: Connection) -> list[dict[str, str | float | None]]:
    """Return the operators, without anything of their tokens."""
    columns = (
        operators.c.name,
        operators.c.role,
        operators.c.created_at,
        operators.c.revoked_at,
    )
    rows = connection.execute(select(*columns).order_by(operators.c.name))
    return [dict(row) for row in rows.mappings()]


def _operator(name: str, role: str) -> Operator:
    for known in ROLES:
        if known == role:
            return Operator(name, known)
    raise Unauthenticated(f"the database gives {name!r} an unknown role {role!r}")
