"""Work of which tests ask the memory. Each runs in a fresh process: ``process.apart(work, …)``.

In the tests' own process other tests have left arenas, threads and caches behind.
"""

import os
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np

from atoll.federation import plan as plans
from atoll.privacy import sparse
from atoll.privacy.errors import Refused
from atoll.privacy.keystream import Keystream
from atoll.privacy.running import RunningTotal
from atoll.privacy.sums import RoundKey, SumSpec
from benchmarks import process


def traced(work: Callable[[], object]) -> int:
    """Return the most bytes that Python and numpy held for ``work`` at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident(size: int) -> tuple[int, int, int]:
    """Return the resident bytes before, at the peak of drawing ``size`` bytes, and afterwards."""
    before = process.resident()
    # Random bytes: pages of zeros would not be there.
    drawn, most = process.peak(lambda: len(os.urandom(size)))
    if drawn != size:
        raise AssertionError(drawn)
    _, later = process.peak(lambda: None)
    return before, most, later


def of_total(length: int, count: int) -> tuple[int, int]:
    """Return the bytes of a total of ``count`` terms, and the most that were held for it."""
    term, held = np.ones(length, np.int16), []

    def work() -> None:
        total = RunningTotal(SumSpec(RoundKey("run", 1), length, 32_767, 100, 1))
        for _ in range(count):
            total.add(term)
        held.append(total.values().nbytes)

    most = traced(work)
    return held[0], most


def of_refusal(positions: bytes, told: bytes, length: int) -> int:
    """Return the most bytes that were held for refusing a term of so many values."""

    def work() -> None:
        try:
            sparse.view([positions, told], length, 100)
        except Refused:
            return
        raise AssertionError("the term was taken")

    return traced(work)


def of_rounds(plan_tomls: Sequence[str], sizes: Sequence[int], cohort: int | None) -> list[int]:
    """Return the most bytes that a round of each plan takes in a population of each size.

    Drawing, examples and report, without training. ``cohort`` devices are in a round, or as many
    as are drawn, which must be some fifty.
    """
    return [_of_round(text, size, cohort) for text, size in zip(plan_tomls, sizes, strict=True)]


def _of_round(plan_toml: str, size: int, cohort: int | None) -> int:
    from atoll.federation.training import Trained
    from atoll.simulations import cohorts, learning, trainers
    from atoll.simulations.populations import named

    plan, population = plans.loads(plan_toml), named("digits", size, 0).population
    trainer = trainers.Trainer(
        lambda weights, clients: (
            Trained(weights + len(one.examples.y) * 1e-6, 0.0, 1) for one in clients
        ),
        "batched",
    )
    devices = learning.Devices(plan, population, cohort, trainer, "memory")
    weights = np.zeros(4810, np.float32)

    def work() -> None:
        entropy = Keystream.replayable(1)
        drawn = cohorts.drawn(plan, size, cohort, entropy)
        if not 20 < len(drawn) < 90:
            raise AssertionError(len(drawn))
        if devices.learn(1, weights, 1.0, drawn, entropy).survivors != len(drawn):
            raise AssertionError("devices dropped out")

    work()  # what is made once
    return traced(work)
