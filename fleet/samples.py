"""What drift compares: counts, the rows they are of, the noise they carry, what they are worth.

A release may have its devices add noise to every count of a window before it leaves them
(:class:`atoll.fleet.bundle.Manifest`). The noise is unbiased and its σ is known, so nothing
here undoes it: variances add when windows are merged, and everything that is judged allows for
them. Counts below zero are kept as they are, on the device and in every sum. Setting them to
zero would add, to every bin that is nearly empty, what the noise is on average above zero;
merged over many windows, such bins would seem to fill up.

**Worth.** Of n rows in k bins with noise of σ on each count, the share of a bin (about 1/k)
is known with the variance (1 + kσ²/n) · 1/nk. That is as well as n²/(n + kσ²) exact rows
would have it known, and so many the rows are worth here. What asks for enough rows asks for
rows' worth: without noise, rows.

**The sum is known.** How many rows a window counts is public, so noise that moves the sum of
its bins can be told from counts and is taken off, evenly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.fleet.counts import Counts, merge

Scaled = npt.NDArray[np.float64]
"""Counts as real numbers, e.g. scaled to their effective size; ``(bins,)``."""

MIN_EXPECTED: Final = 5.0
"""Cochran's rule for chi-square: expect no fewer rows' worth in a bin."""


def worth(rows: float, variance: float) -> float:
    """Return how many exact rows are as good as ``rows`` with noise of ``variance`` in all."""
    return rows * (rows / (rows + variance)) if rows > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of ``rows`` rows by variable, with noise of σ = ``noise`` on each count."""

    counts: Mapping[str, Counts] = field(default_factory=dict)
    rows: int = 0
    noise: float = 0.0

    @property
    def worth(self) -> float:
        """How many exact rows these are as good as, in the variable of most bins."""
        bins = max((vector.size for vector in self.counts.values()), default=0)
        return worth(self.rows, bins * self.noise**2)

    def merge(self, other: "Tally") -> "Tally":
        """Add two tallies of different rows; raise :class:`BadProfile` if their bins differ."""
        return Tally(
            merge(self.counts, other.counts),
            self.rows + other.rows,
            hypot(self.noise, other.noise),
        )

    def sample(self, name: str) -> "Sample":
        """Return what was counted of one variable."""
        return Sample.of(self.counts[name], self.rows, self.noise)


class Sample(NamedTuple):
    """One side of a comparison: ``counts`` and the variance of the ``noise`` on each.

    Both are ``(bins,)``. The counts sum to the rows; single ones may be negative.
    """

    counts: Scaled
    noise: Scaled

    @classmethod
    def exact(cls, counts: Counts | Scaled) -> "Sample":
        """Return counts without noise."""
        return cls(counts.astype(np.float64), np.zeros(counts.shape))

    @classmethod
    def of(cls, counts: Counts, rows: int, sigma: float) -> "Sample":
        """Return counts of ``rows`` rows with noise of ``sigma`` on each."""
        if not sigma:
            return cls.exact(counts)
        values = counts.astype(np.float64)
        values += (rows - values.sum()) / values.size
        return cls(values, np.full(values.shape, sigma**2))

    @property
    def rows(self) -> float:
        """How many rows were counted."""
        return float(self.counts.sum())

    @property
    def quality(self) -> float:
        """What one of the rows is worth, at most 1."""
        return worth(self.rows, float(self.noise.sum())) / self.rows if self.rows > 0 else 0.0

    @property
    def worth(self) -> float:
        """How many exact rows these are as good as."""
        return self.rows * self.quality

    @property
    def positive(self) -> Scaled:
        """The counts as rows' worth, none below zero: for what has no meaning below zero."""
        return np.maximum(self.counts, 0.0) * self.quality

    def scaled(self, by: float) -> "Sample":
        """Return this with every row counting for ``by``."""
        return Sample(self.counts * by, self.noise * by**2)

    def only(self, bins: slice) -> "Sample":
        """Return some of the bins."""
        return Sample(self.counts[bins], self.noise[bins])

    def joined(self, starts: list[int]) -> "Sample":
        """Return this over wider bins, one beginning at each of ``starts``."""
        return Sample(np.add.reduceat(self.counts, starts), np.add.reduceat(self.noise, starts))


def pooled(one: Sample, other: Sample) -> Scaled:
    """Return both sides' counts together, as rows' worth: each side weighs what it is worth.

    That is the most precise estimate of what both have in common if they do, and without noise
    their sum. A bin may be negative.
    """
    return one.counts * one.quality + other.counts * other.quality


def shares(one: Sample, other: Sample) -> Scaled:
    """Return the share of each bin in both sides together, none negative, summing to one."""
    both = np.maximum(pooled(one, other), 0.0)
    return np.asarray(both / both.sum())


def coarsen(one: Sample, other: Sample, minimum: float = MIN_EXPECTED) -> tuple[Sample, Sample]:
    """Join adjacent bins until each is expected to hold ``minimum`` rows' worth on both sides.

    Expectation is by the pooled counts, in which both sides look alike, so joining favours
    neither. Returns both over the joined bins, at least one.
    """
    both = pooled(one, other).tolist()
    total, n, m = sum(both), one.rows, other.rows
    if min(total, n, m) <= 0:
        return one.joined([0]), other.joined([0])
    noises = list(zip(one.noise.tolist(), other.noise.tolist(), strict=True))
    starts, held, left, right = [0], 0.0, 0.0, 0.0

    def enough() -> bool:
        return (
            worth(held * n / total, left) >= minimum and worth(held * m / total, right) >= minimum
        )

    for index, count in enumerate(both):
        if enough():
            starts.append(index)
            held, left, right = 0.0, 0.0, 0.0
        held += count
        left += noises[index][0]
        right += noises[index][1]
    if not enough() and len(starts) > 1:
        starts.pop()  # too little is left for a bin of its own
    return one.joined(starts), other.joined(starts)


def join(one: Sample, other: Sample) -> tuple[Sample, Sample]:
    """Coarsen two samples whose last bin is that of missing values.

    Missing values are kept apart where they are many enough to be a bin.
    """
    missing, last = slice(-1, None), slice(None, -1)
    n, m = one.rows, other.rows
    expected = float(pooled(one, other)[-1]) / (one.worth + other.worth)
    enough = (
        worth(expected * n, float(one.noise[-1])) >= MIN_EXPECTED
        and worth(expected * m, float(other.noise[-1])) >= MIN_EXPECTED
    )
    if not enough or one.counts.size == 1:
        return coarsen(one, other)
    rest = coarsen(one.only(last), other.only(last))
    return _beside(rest[0], one.only(missing)), _beside(rest[1], other.only(missing))


def _beside(one: Sample, other: Sample) -> Sample:
    return Sample(np.append(one.counts, other.counts), np.append(one.noise, other.noise))
