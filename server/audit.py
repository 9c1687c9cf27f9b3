"""The audit log: what people and the hub did, in a Merkle tree that anyone can recompute.

Entries are canonical JSON. Leaves and nodes are hashed as RFC 6962, §2.1 says
(SHA-256; 0x00 before a leaf, 0x01 before two children), so that a root seen once pins every
entry before it.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, func, insert, select, text

from atoll.server.errors import HubError
from atoll.server.schema import audit

Fact = str | int | float | bool | None | Sequence["Fact"] | dict[str, "Fact"]

_APPEND_LOCK: Final = 0x6175646974  # "audit", the key of a PostgreSQL advisory lock


class AuditBroken(HubError):
    """The log does not match its hashes: someone changed the database."""

    code = "audit-broken"


def record(
    connection: Connection, actor: str, action: str, subject: str, now: float, **facts: Fact
) -> int:
    """Append an entry and return its index; they count from 0 without gaps.

    ``actor`` is an operator, a device or ``hub``; ``action`` a word such as
    ``device.revoke``; ``subject`` what it was done to; ``now`` Unix seconds. It stands or
    falls with the caller's transaction, which must be one that writes.
    """
    if connection.dialect.name == "postgresql":  # SQLite's writers are alone already
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _APPEND_LOCK})
    last = connection.execute(select(func.max(audit.c.index))).scalar_one()
    index = 0 if last is None else last + 1
    entry = canonical(
        {
            "index": index,
            "at": now,
            "actor": actor,
            "action": action,
            "subject": subject,
            "facts": dict(facts),
        }
    )
    connection.execute(insert(audit).values(index=index, entry=entry, leaf=leaf_hash(entry)))
    return index


def entries(
    connection: Connection, start: int = 0, limit: int = 100, *, newest_first: bool = False
) -> list[dict[str, Fact]]:
    """Return up to ``limit`` entries with index ``start`` and on, or the last ones."""
    query = select(audit.c.entry).where(audit.c.index >= start).limit(limit)
    order = audit.c.index.desc() if newest_first else audit.c.index
    return [json.loads(row.entry) for row in connection.execute(query.order_by(order))]


def verify(connection: Connection) -> tuple[int, bytes]:
    """Check every entry against its leaf; return the number of entries and the root.

    Raises :class:`AuditBroken` naming the first index that is missing or was altered.
    """
    leaves: list[bytes] = []
    for at, entry, leaf in connection.execute(
        select(audit.c.index, audit.c.entry, audit.c.leaf).order_by(audit.c.index)
    ):
        if at != len(leaves) or leaf_hash(entry) != leaf:
            raise AuditBroken(
                f"entry {len(leaves)} of the audit log is missing or was altered",
                "compare the database with a backup",
            )
        leaves.append(leaf)
    return len(leaves), root(leaves)


def canonical(entry: dict[str, Fact]) -> bytes:
    """Encode: UTF-8, sorted names, no spaces, no NaN."""
    return json.dumps(
        entry, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    ).encode()


def leaf_hash(entry: bytes) -> bytes:
    """Return the leaf of an entry."""
    return hashlib.sha256(b"\x00" + entry).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """Return the Merkle tree hash of ``leaves``."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = _split(len(leaves))
    return _node(root(leaves[:split]), root(leaves[split:]))


def proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the audit path of leaf ``index``, from the leaf upwards (RFC 6962, §2.1.1)."""
    if not 0 <= index < len(leaves):
        raise IndexError(index)
    if len(leaves) == 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*proof(leaves[:split], index), root(leaves[split:])]
    return [*proof(leaves[split:], index - split), root(leaves[:split])]


def root_of(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """Return the root that ``path`` leads to from ``leaf``; equal to the tree's if it is in it.

    Raises ``ValueError`` for a path that no tree of ``size`` leaves has.
    """
    if not 0 <= index < size:
        raise ValueError("the index lies outside the tree")
    if size == 1:
        if path:
            raise ValueError("the path is too long")
        return leaf
    if not path:
        raise ValueError("the path is too short")
    split = _split(size)
    *below, sibling = path
    if index < split:
        return _node(root_of(leaf, index, split, below), sibling)
    return _node(sibling, root_of(leaf, index - split, size - split, below))


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """Return the largest power of two below ``size``."""
    return 1 << (size - 1).bit_length() - 1
