"""Who exchanges masks with whom: everybody up to :data:`COMPLETE`, then a sparse graph.

Above that, each device has up to :data:`DEGREE` neighbours: the nearest ones on a ring whose
order nobody chooses, because it follows from what all devices of the round have advertised
(Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020, §3). Work per device so stays the same however many take
part.
"""

import hashlib
from collections.abc import Sequence
from math import comb
from typing import Final

COMPLETE: Final = 32
"""The largest cohort in which everybody is everybody's neighbour."""
DEGREE: Final = 80
"""With a fifth of 1,000 devices gone, or colluding with the hub, some neighbourhood is too thin, or
too full of them, in fewer than one round of a million (:func:`overrun`)."""


def neighbours(names: Sequence[str], party: str, seed: bytes) -> list[str]:
    """Return the sorted neighbours of ``party`` among ``names``; the relation is symmetric."""
    size = len(names)
    if size <= COMPLETE:
        return sorted(name for name in names if name != party)
    ring = sorted(names, key=lambda name: hashlib.sha256(seed + name.encode()).digest())
    at = ring.index(party)
    steps = range(1, min(DEGREE, size - 1) // 2 + 1)
    return sorted({ring[(at + side * step) % size] for step in steps for side in (1, -1)})


def threshold(holders: int, min_survivors: int) -> int:
    """Return how many of a secret's ``holders`` open it: more than half of them.

    Where all devices of a round are holders it is as many as must survive anyway, if that is more.
    """
    return quorum(holders, min_survivors) if holders <= COMPLETE else holders // 2 + 1


def quorum(sharers: int, min_survivors: int) -> int:
    """Return how many of a round's devices must sign a list of survivors.

    More than half, and as many as must survive. Two lists of a round can both be signed only if
    ``2 * quorum - sharers`` devices sign both, which an honest one does not.
    """
    return max(sharers // 2 + 1, min(min_survivors, sharers))


def overrun(parties: int, bad: int, limit: int) -> float:
    """Return a bound on P(some neighbourhood of the graph holds ``limit`` bad devices or more).

    ``bad`` of ``parties`` devices, whichever, are bad (colluding with the hub, or dropped);
    hypergeometric, and a union over the devices.
    """
    degree, others = min(DEGREE, (parties - 1) // 2 * 2), parties - 1
    whole = comb(others, degree)
    tail = sum(
        comb(bad, hit) * comb(others - bad, degree - hit)
        for hit in range(limit, min(bad, degree) + 1)
    )
    return min(1.0, parties * (tail / whole))
