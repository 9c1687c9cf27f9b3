"""Who exchanges masks with whom: everybody up to :data:`COMPLETE`, then a sparse graph.

Above that, each device has :data:`DEGREE` neighbours: the nearest ones on a ring whose order nobody
chooses, because it follows from what all devices of the round have advertised (Bell, Bonawitz,
Gascón, Lepoint and Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
CCS 2020, §3). Work per device so stays the same however many take part.
"""

import hashlib
from collections.abc import Sequence
from math import comb
from typing import Final

COMPLETE: Final = 32
"""The largest cohort in which everybody is everybody's neighbour."""
DEGREE: Final = 32


def neighbours(names: Sequence[str], party: str, seed: bytes) -> list[str]:
    """Return the sorted neighbours of ``party`` among ``names``; the relation is symmetric."""
    if len(names) <= COMPLETE:
        return sorted(name for name in names if name != party)
    ring = sorted(names, key=lambda name: hashlib.sha256(seed + name.encode()).digest())
    at, size = ring.index(party), len(ring)
    steps = range(1, DEGREE // 2 + 1)
    return sorted({ring[(at + side * step) % size] for step in steps for side in (1, -1)})


def threshold(holders: int, min_survivors: int) -> int:
    """Return how many of a secret's ``holders`` open it.

    More than half, so that the hub cannot have two secrets of one device opened by two halves
    of its neighbours. In a cohort where all are neighbours it is as many as must survive
    anyway; in a graph more than two thirds, which leaves a third of a neighbourhood to drop out.
    """
    if holders > COMPLETE:
        return 2 * holders // 3 + 1
    return max(holders // 2 + 1, min(min_survivors, holders))


def overrun(parties: int, bad: int, limit: int) -> float:
    """Return a bound on P(some neighbourhood of the graph holds ``limit`` bad devices or more).

    ``bad`` of ``parties`` devices, whichever, are bad (colluding with the hub, or dropped);
    hypergeometric, and a union over the devices.
    """
    others, whole = parties - 1, comb(parties - 1, DEGREE)
    tail = sum(
        comb(bad, hit) * comb(others - bad, DEGREE - hit)
        for hit in range(limit, min(bad, DEGREE) + 1)
    )
    return min(1.0, parties * (tail / whole))
