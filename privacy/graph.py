"""Who exchanges masks with whom: everybody up to :data:`COMPLETE`, then a sparse graph.

Above that, the graph is the union of :data:`CYCLES` rings, each of which runs through all devices
in an order of its own that follows from what they have advertised. Such a union is an expander:
it does not fall apart when a part of its devices is gone, whoever chose them. (A single ring,
with its nearest places as neighbours, does: where two arcs of it are gone, the devices between
them share masks with nobody else.) Work per device stays the same however many take part.

After Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead" (CCS 2020).
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from math import comb
from typing import Final

from atoll.privacy.agreement import quorum

COMPLETE: Final = 80
"""The largest cohort in which everybody is everybody's neighbour."""
CYCLES: Final = 40
"""A device has two neighbours on each; some coincide. With a fifth of 1,000 devices gone, or on the
hub's side, some neighbourhood is too thin, or too full of them, in fewer than one graph of 10⁵
(:func:`overrun`)."""

Neighbours = Mapping[str, Collection[str]]


def neighbours(names: Sequence[str], seed: bytes) -> Neighbours:
    """Return everybody's neighbours among ``names``; the relation is symmetric."""
    if len(names) <= COMPLETE:
        return {name: sorted(set(names) - {name}) for name in names}
    found: dict[str, set[str]] = {name: set() for name in names}
    coded = [(name, name.encode()) for name in sorted(names)]
    for cycle in range(CYCLES):
        start = hashlib.sha256(seed + bytes([cycle]))

        def place(name: tuple[str, bytes], start: "hashlib._Hash" = start) -> bytes:
            at = start.copy()
            at.update(name[1])
            return at.digest()

        ring = [name for name, _ in sorted(coded, key=place)]
        for one, other in zip(ring, ring[1:] + ring[:1], strict=True):
            found[one].add(other)
            found[other].add(one)
    return {name: sorted(near) for name, near in found.items()}


def connected(near: Neighbours, names: Collection[str]) -> bool:
    """Tell whether ``names`` hang together by themselves.

    If they do not, their masks cancel in each part alone, and each part's sum can be opened.
    """
    left = set(names)
    edge = [left.pop()] if left else []
    while edge:
        reached = left & set(near[edge.pop()])
        left -= reached
        edge += reached
    return not left


def threshold(holders: int, parties: int, min_survivors: int) -> int:
    """Return how many of a secret's ``holders`` open it: more than half of them.

    Where all of a round's ``parties`` are holders it is as many as must survive anyway, if that
    is more.
    """
    return quorum(holders, min_survivors) if holders == parties else holders // 2 + 1


def overrun(parties: int, bad: int, degree: int) -> float:
    """Return a bound on P(some neighbourhood of ``degree`` has half of it bad).

    ``bad`` of ``parties`` devices, chosen before the graph is, collude with the hub or have
    dropped out. Given its size a neighbourhood is any set of others with the same probability;
    hypergeometric, and a union over the devices.
    """
    others, limit = parties - 1, (degree + 1) // 2
    tail = sum(
        comb(bad, hit) * comb(others - bad, degree - hit)
        for hit in range(limit, min(bad, degree) + 1)
    )
    return min(1.0, parties * (tail / comb(others, degree)))
