"""The variables of a profile: how values fall into bins, and the reference counts in them."""

from itertools import pairwise
from math import isfinite

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.fleet.counts import MAX_COUNT
from atoll.fleet.errors import BadProfile
from atoll.fleet.features import MAX_BINS_PER_FEATURE


class Numeric(msgspec.Struct, frozen=True, tag="numeric", tag_field="t"):
    """Bins between ``edges``: bin i holds ``edges[i-1] <= v < edges[i]``; both ends are open."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse edges that do not rise, or counts that do not fit them."""
        if not 0 < len(self.edges) < MAX_BINS_PER_FEATURE or not all(map(isfinite, self.edges)):
            raise BadProfile(f"a numeric variable has 1 to {MAX_BINS_PER_FEATURE - 1} edges")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise BadProfile("the edges of a numeric variable must rise")
        _check_counts(self.counts, self.bins)

    @property
    def bins(self) -> int:
        """Length of the count vector: the bins and one for missing values."""
        return len(self.edges) + 2

    def index(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return the bin of each value, ``(n,)``."""
        bins = np.searchsorted(np.asarray(self.edges), values, side="right")
        return np.where(np.isfinite(values), bins, self.bins - 1).astype(np.int64)


class Categorical(msgspec.Struct, frozen=True, tag="categorical", tag_field="t"):
    """One bin per category; values are indices of categories."""

    categories: tuple[str, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse counts that do not fit the categories."""
        if not self.categories:
            raise BadProfile("a categorical variable needs categories")
        _check_counts(self.counts, self.bins)

    @property
    def bins(self) -> int:
        """Length of the count vector: the categories and one for what is none of them."""
        return len(self.categories) + 1

    def index(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return the bin of each value, ``(n,)``."""
        known = (values >= 0) & (values < len(self.categories)) & (values == np.floor(values))
        return np.where(known, values, self.bins - 1).astype(np.int64)


def draw(
    variable: Numeric | Categorical, n: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Draw ``n`` values that fall into the bins as the reference does, ``(n,)``.

    Values are even within a bin; missing values are never drawn. Without reference counts
    every bin is as likely.
    """
    counts = np.asarray(variable.counts[:-1], dtype=np.float64)
    if not counts.any():
        counts = np.ones_like(counts)
    bins = rng.choice(counts.size, size=n, p=counts / counts.sum())
    if isinstance(variable, Categorical):
        return bins.astype(np.float64)
    edges = np.asarray(variable.edges)
    # The end bins are open: take them as wide as their neighbours.
    first = edges[1] - edges[0] if edges.size > 1 else 0.0
    last = edges[-1] - edges[-2] if edges.size > 1 else 0.0
    limits = np.concatenate([[edges[0] - first], edges, [edges[-1] + last]])
    return rng.uniform(limits[bins], limits[bins + 1])


def _check_counts(counts: tuple[int, ...], bins: int) -> None:
    if len(counts) != bins or min(counts) < 0 or max(counts) > MAX_COUNT:
        raise BadProfile(f"expected {bins} counts between 0 and {MAX_COUNT}")
