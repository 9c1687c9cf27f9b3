"""How a person comes into the dashboard and stays: one-time login links, sessions.

Whoever reads the database must not be able to use what is in it, so codes and session
secrets are stored as SHA-256 alone (they are 32 random bytes: no salt is needed). A login code
works once, for :data:`CODE_SECONDS`; a session ends after :data:`SESSION_SECONDS`, at
logout, or when its operator is revoked.
"""

import secrets
from typing import Final

from sqlalchemy import Connection, delete, insert, select, update

from atoll.server.auth import ROLES, Operator, digest
from atoll.server.schema import login_codes, operators, sessions

CODE_SECONDS: Final = 600.0
SESSION_SECONDS: Final = 12 * 3600.0


def new_login_code(connection: Connection, operator: str, now: float) -> str:
    """Return a code for ``/login?code=…`` that lets ``operator`` in once."""
    code = secrets.token_urlsafe(32)
    connection.execute(
        insert(login_codes).values(
            code_sha256=digest(code), operator=operator, expires_at=now + CODE_SECONDS
        )
    )
    return code


def use_login_code(connection: Connection, code: str, now: float) -> str | None:
    """Spend ``code`` and return its operator; none if it is unknown, spent or too old."""
    spent = connection.execute(
        update(login_codes)
        .where(
            login_codes.c.code_sha256 == digest(code),
            login_codes.c.used_at.is_(None),
            login_codes.c.expires_at > now,
        )
        .values(used_at=now)
        .returning(login_codes.c.operator)
    )
    return spent.scalar_one_or_none()


def open_session(connection: Connection, operator: str, now: float) -> str:
    """Return the secret for the cookie of a new session; sessions that ended are cleared."""
    connection.execute(delete(sessions).where(sessions.c.expires_at <= now))
    secret = secrets.token_urlsafe(32)
    connection.execute(
        insert(sessions).values(
            secret_sha256=digest(secret),
            operator=operator,
            created_at=now,
            expires_at=now + SESSION_SECONDS,
        )
    )
    return secret


def session_operator(connection: Connection, secret: str, now: float) -> Operator | None:
    """Return the operator whose session this is; none if it has ended."""
    row = connection.execute(
        select(operators.c.name, operators.c.role)
        .join(sessions, sessions.c.operator == operators.c.name)
        .where(
            sessions.c.secret_sha256 == digest(secret),
            sessions.c.expires_at > now,
            operators.c.revoked_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        return None
    return next((Operator(row.name, role) for role in ROLES if role == row.role), None)


def close_session(connection: Connection, secret: str) -> None:
    """End a session; one that is not there is none to end."""
    connection.execute(delete(sessions).where(sessions.c.secret_sha256 == digest(secret)))
