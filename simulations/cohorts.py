"""A simulated round's cohort: who is drawn, and what the round costs."""

from collections.abc import Sequence
from typing import Final

from atoll.federation.cohort import draw
from atoll.federation.plan import Plan
from atoll.privacy.keystream import Keystream
from atoll.privacy.ledger import Event, FixedSample, Gaussian
from atoll.server.charging import event_of

BLOCK: Final = 4096
"""Devices for which a Poisson draw tosses its coins at once."""


def drawn(plan: Plan, size: int, cohort: int | None, entropy: Keystream) -> Sequence[int]:
    """Return a round's cohort out of ``size`` devices.

    By the plan's sampling rate, or ``cohort`` of them, each such set as likely; none: all.
    """
    rate = plan.cohort.sampling_rate
    if rate is not None:
        return sampled(size, rate, entropy)
    return range(size) if cohort is None else chosen(size, cohort, entropy)


def sampled(size: int, rate: float, entropy: Keystream) -> list[int]:
    """Return a Poisson sample of the numbers below ``size``, in memory for the sample alone."""
    found: list[int] = []
    for start in range(0, size, BLOCK):
        found += draw(range(start, min(start + BLOCK, size)), rate, entropy)
    return found


def chosen(size: int, count: int, entropy: Keystream) -> list[int]:
    """Return ``count`` of the numbers below ``size``, each such set as likely as another.

    R. Floyd's algorithm (J. Bentley, "Programming Pearls", CACM 30:9, 1987): one draw each.
    """
    found: set[int] = set()
    for last in range(size - count, size):
        one = int(entropy.below(last + 1, 1)[0])
        found.add(last if one in found else one)
    return sorted(found)


def cost(plan: Plan, size: int, cohort: int | None) -> Event:
    """Return what a round costs a population of ``size`` devices.

    A fixed cohort is secret under the same condition as a sampled one, that the hub alone adds
    the noise; means are over its size, which is no secret.
    """
    event = event_of(plan, size)
    secret = cohort is not None and cohort < size and plan.privacy.noise == "central"
    if isinstance(event, Gaussian) and cohort is not None and secret:
        return Gaussian(event.noise_multiplier, FixedSample(cohort, size))
    return event
