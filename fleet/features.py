"""What is watched of an example: features computed from a declaration, never from task code.

A serving device has no task installed; the bundle's profile tells it what to compute. For signals
and images (``channel-stats``) these are moments per channel, for tables (``columns``) the columns.

Where the bin edges of a profile come from, without a row leaving a device: each device reports
the :class:`Ranges` of its features; then counts on a fine even grid over the merged ranges
(:func:`fine_counts`); the hub merges those and picks quantiles (:func:`quantile_edges`).
"""

from collections.abc import Mapping
from math import floor, frexp, isfinite, ldexp, prod
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.fleet.counts import Counts, checked
from atoll.fleet.errors import BadProfile

Matrix = npt.NDArray[np.float64]

FINE_BINS: Final = 2048
MAX_BINS_PER_FEATURE: Final = 64

_SIGNAL_AXES: Final = 3
_TABLE_AXES: Final = 2


class FeatureSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which features an example has.

    ``channel-stats``: examples ``(channels, time)``, or images ``(channels, rows, columns)``; one
    feature ``{channel}:{stat}`` per channel and statistic, over all that follows the channel's
    axis (standard deviation with divisor n). ``columns``: examples
    ``(columns,)``; one feature per column, numeric unless ``categories`` names its categories,
    whose indices the column then holds.
    """

    kind: Literal["channel-stats", "columns"]
    channels: tuple[str, ...]
    stats: tuple[Literal["mean", "std"], ...] = ("mean", "std")
    categories: dict[str, tuple[str, ...]] = {}

    def __post_init__(self) -> None:
        """Refuse a specification that names no features, or one twice."""
        names = self.names
        if not names or len(set(names)) != len(names):
            raise BadProfile("a feature specification needs features, each named once")
        if any(name.startswith("output:") for name in names):
            raise BadProfile("names beginning with 'output:' belong to the model's outputs")
        if not self.categories.keys() <= set(names) or not all(self.categories.values()):
            raise BadProfile("categories must belong to columns and not be empty")

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names, in the order of the matrix's columns."""
        if self.kind == "columns":
            return self.channels
        return tuple(f"{channel}:{stat}" for channel in self.channels for stat in self.stats)

    @property
    def numeric(self) -> tuple[str, ...]:
        """The features that have a range."""
        return tuple(name for name in self.names if name not in self.categories)


class Features(NamedTuple):
    """``values`` float64 ``(n, F)``, whose columns are called ``names``."""

    values: Matrix
    names: tuple[str, ...]

    def column(self, name: str) -> Matrix:
        """Return one feature, ``(n,)``; raise :class:`BadProfile` if there is none so called."""
        try:
            return self.values[:, self.names.index(name)]
        except ValueError:
            raise BadProfile(f"no feature is called {name!r}") from None


def features(spec: FeatureSpec, x: npt.NDArray[np.float32]) -> Features:
    """Compute the features of ``x``, ``(n, *example_shape)``, of any real dtype.

    NaN and infinity pass through and are counted as missing later. Raises :class:`BadProfile`
    when the shape does not fit ``spec``.
    """
    fits = x.ndim == _TABLE_AXES if spec.kind == "columns" else x.ndim >= _SIGNAL_AXES
    if not fits or x.shape[1] != len(spec.channels) or 0 in x.shape[1:]:
        raise BadProfile(
            f"examples of shape {x.shape[1:]} do not fit {spec.kind} of "
            f"{len(spec.channels)} channels"
        )
    rows = np.asarray(x, dtype=np.float64)
    if spec.kind == "columns":
        return Features(rows, spec.names)
    rows = rows.reshape(len(rows), len(spec.channels), prod(x.shape[2:]))
    with np.errstate(invalid="ignore", over="ignore"):
        stats = [rows.mean(axis=2) if stat == "mean" else rows.std(axis=2) for stat in spec.stats]
    return Features(np.stack(stats, axis=2).reshape(len(rows), len(spec.names)), spec.names)


class Ranges(msgspec.Struct, frozen=True):
    """Lowest and highest value per feature, widened outward; features without any are absent."""

    spans: dict[str, tuple[float, float]]

    def __post_init__(self) -> None:
        """Refuse spans that are not finite or run backwards."""
        for name, (low, high) in self.spans.items():
            if not (isfinite(low) and isfinite(high) and low <= high and isfinite(high - low)):
                raise BadProfile(f"{name} has no usable range: {low} to {high}")

    def merge(self, other: "Ranges") -> "Ranges":
        """Return the ranges of both; associative and commutative."""
        spans = dict(self.spans)
        for name, (low, high) in other.spans.items():
            here = spans.get(name, (low, high))
            spans[name] = (min(low, here[0]), max(high, here[1]))
        return Ranges(spans)


def feature_range(found: Features) -> Ranges:
    """Return the ranges of the finite values.

    Each is widened outward to a power-of-two step of at most an eighth of its width, so that
    the exact extreme of a device's examples does not leave it.
    """
    spans = {}
    for name, column in zip(found.names, found.values.T, strict=True):
        finite = column[np.isfinite(column)]
        if finite.size:
            spans[name] = _widen(float(finite.min()), float(finite.max()))
    return Ranges(spans)


def fine_counts(found: Features, ranges: Ranges, bins: int = FINE_BINS) -> dict[str, Counts]:
    """Count each ranged feature on an even grid of ``bins``, int64 ``(bins + 1,)``.

    The last entry counts missing values (NaN, infinity). Values outside the range count in
    the end bins. Raises :class:`BadProfile` for a range of a feature that is not there.
    """
    counts = {}
    for name, (low, high) in ranges.spans.items():
        column = found.column(name)
        finite = column[np.isfinite(column)]
        scaled = (finite - low) / (high - low) * bins if high > low else np.zeros(finite.shape)
        index = np.clip(scaled, 0, bins - 1).astype(np.int64)
        vector = np.bincount(index, minlength=bins + 1).astype(np.int64)
        vector[bins] = column.size - finite.size
        counts[name] = vector
    return counts


def quantile_edges(
    fine: Mapping[str, Counts], ranges: Ranges, bins: int = MAX_BINS_PER_FEATURE
) -> dict[str, tuple[float, ...]]:
    """Pick up to ``bins - 1`` strictly rising inner edges per feature at its quantiles.

    ``fine`` comes from :func:`fine_counts` over the same ``ranges``; inside a fine bin values
    are taken as evenly spread. A feature that never varied gets the one edge at its value.
    Raises :class:`BadProfile` when the two do not belong together.
    """
    if fine.keys() != ranges.spans.keys():
        raise BadProfile("fine counts and ranges name different features")
    edges: dict[str, tuple[float, ...]] = {}
    for name, (low, high) in ranges.spans.items():
        counts = checked(fine[name])[:-1]
        total = int(counts.sum())
        if not total or high <= low:
            edges[name] = (low,)
            continue
        grid = np.linspace(low, high, counts.size + 1)
        upto = np.cumsum(counts)
        levels = np.arange(1, bins) * (total / bins)
        at = np.searchsorted(upto, levels)  # the fine bin in which each level is reached
        inside = (levels - upto[at] + counts[at]) / counts[at]
        edges[name] = tuple(np.unique(grid[at] + inside * np.diff(grid)[at]).tolist())
    return edges


def _widen(low: float, high: float) -> tuple[float, float]:
    width = high - low
    if not isfinite(width) or width <= 0:
        return low, high
    step = ldexp(1.0, max(frexp(width)[1] - 4, -1074))
    wide = floor(low / step) * step, -floor(-high / step) * step
    return wide if all(map(isfinite, wide)) and wide[0] <= low and wide[1] >= high else (low, high)
