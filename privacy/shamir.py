"""A secret in pieces, any ``threshold`` of which give it back and fewer of which say nothing.

Shamir, "How to share a secret" (1979): the secret is a polynomial's value at 0, over the integers
modulo the smallest prime above 2**256, so that any 32 bytes are a secret; a piece is its value
at 1, 2, 3, …. Python's integers take a time that depends on their size, which a peer on the
network cannot see in what a device sends.
"""

import secrets
from collections.abc import Mapping
from typing import Final

from atoll.privacy.errors import Refused

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
PIECE_BYTES: Final = 33


def split(secret: bytes, pieces: int, threshold: int) -> list[bytes]:
    """Return ``pieces`` of 33 bytes; piece ``i`` (from 0) is the value at ``i + 1``."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= pieces:
        raise ValueError(f"cannot split {len(secret)} bytes {threshold} of {pieces}")
    polynomial = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(polynomial, at).to_bytes(PIECE_BYTES) for at in range(1, pieces + 1)]


def combine(pieces: Mapping[int, bytes]) -> bytes:
    """Return the secret from pieces by their number (from 0), as many as the threshold.

    Raises :class:`Refused` for what is no set of pieces. Wrong pieces give a wrong secret:
    whoever combines must know how to tell.
    """
    points = [(number + 1, int.from_bytes(piece)) for number, piece in pieces.items()]
    if not points or any(len(piece) != PIECE_BYTES for piece in pieces.values()):
        raise Refused("a piece of a secret that is none")
    total = 0
    for at, value in points:
        above, below = 1, 1
        for other, _ in points:
            if other != at:
                above = above * other % PRIME
                below = below * (other - at) % PRIME
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    if total >= 1 << 8 * SECRET_BYTES:
        raise Refused("pieces that do not belong together")
    return total.to_bytes(SECRET_BYTES)


def _value(polynomial: list[int], at: int) -> int:
    """Return the polynomial at a point (Horner)."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * at + coefficient) % PRIME
    return value
