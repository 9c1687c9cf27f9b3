"""The reference profile of a release, and counting what a device sees into its bins.

A profile fixes bins for each variable (every feature, and the model's two outputs) and holds
how the training population fell into them. A device counts its own examples into the same
bins and ships counts, never values. Counts merge exactly (:mod:`atoll.fleet.counts`) and every
drift statistic is computed from them (:mod:`atoll.fleet.drift`).

The last entry of every count vector is for what has no place in the bins: NaN and infinity
for numbers, unknown categories for the rest.
"""

from collections.abc import Mapping
from math import prod
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.fleet.counts import (
    MAX_COUNT,
    Counts,
    checked,
    merge,
    pack_all,
    pack_counts,
    unpack_all,
    unpack_counts,
)
from atoll.fleet.errors import BadProfile
from atoll.fleet.features import (
    FINE_BINS,
    MAX_BINS_PER_FEATURE,
    Features,
    FeatureSpec,
    Ranges,
    feature_range,
    features,
    fine_counts,
    quantile_edges,
)
from atoll.fleet.variables import Categorical, Numeric, draw

__all__ = [
    "FINE_BINS",
    "MAX_BINS_PER_FEATURE",
    "OUTPUT_CLASS",
    "OUTPUT_SCORE",
    "Categorical",
    "Counts",
    "FeatureSpec",
    "Features",
    "Numeric",
    "Profile",
    "Ranges",
    "build",
    "count",
    "feature_range",
    "features",
    "fine_counts",
    "merge",
    "pack_all",
    "pack_counts",
    "quantile_edges",
    "synthesise",
    "unpack_all",
    "unpack_counts",
]

OUTPUT_CLASS: Final = "output:class"
OUTPUT_SCORE: Final = "output:score"
SCORE_BINS: Final = 20


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Bins per variable, and the reference counts of ``rows`` examples in them."""

    features: FeatureSpec
    variables: dict[str, Numeric | Categorical]
    rows: int = 0

    def __post_init__(self) -> None:
        """Refuse a profile whose variables are not its features and the two outputs."""
        expected = {*self.features.names, OUTPUT_CLASS, OUTPUT_SCORE}
        if self.variables.keys() != expected:
            odd = ", ".join(sorted(self.variables.keys() ^ expected))
            raise BadProfile(f"profile and features disagree about the variables: {odd}")
        if not 0 <= self.rows <= MAX_COUNT:
            raise BadProfile("a profile's rows cannot be negative or beyond counting")
        if not isinstance(self.variables[OUTPUT_CLASS], Categorical):
            raise BadProfile(f"{OUTPUT_CLASS} must be categorical")

    @property
    def classes(self) -> tuple[str, ...]:
        """The model's classes, in the order of its outputs."""
        variable = self.variables[OUTPUT_CLASS]
        return variable.categories if isinstance(variable, Categorical) else ()

    @property
    def bins(self) -> dict[str, int]:
        """Length of the count vector per variable, as :func:`unpack_all` wants it."""
        return {name: variable.bins for name, variable in self.variables.items()}

    def reference(self) -> dict[str, Counts]:
        """Return the reference counts per variable."""
        return {
            name: np.asarray(variable.counts, dtype=np.int64)
            for name, variable in self.variables.items()
        }

    def with_counts(self, counts: Mapping[str, Counts], rows: int) -> "Profile":
        """Return this profile with other reference counts; raise :class:`BadProfile`."""
        if counts.keys() != self.variables.keys():
            raise BadProfile("counts and profile disagree about the variables")
        variables = {
            name: msgspec.structs.replace(variable, counts=tuple(checked(counts[name]).tolist()))
            for name, variable in self.variables.items()
        }
        return Profile(features=self.features, variables=variables, rows=rows)

    def encode(self) -> bytes:
        """Return the profile as MessagePack, as in ``profile.msgpack``."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "Profile":
        """Read :meth:`encode`'s bytes; raise :class:`BadProfile` for any others."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadProfile(f"not a profile: {error}") from error


def build(
    spec: FeatureSpec, edges: Mapping[str, tuple[float, ...]], classes: tuple[str, ...]
) -> Profile:
    """Return a profile without counts, for devices to count into.

    ``edges`` comes from :func:`quantile_edges` over ``spec.numeric``; a feature that no device
    had a finite value of may be absent and gets the edge 0. Raises :class:`BadProfile`.
    """
    variables: dict[str, Numeric | Categorical] = {}
    for name in spec.names:
        if name in spec.categories:
            variables[name] = _categorical(spec.categories[name])
        else:
            variables[name] = _numeric(edges.get(name, (0.0,)))
    variables[OUTPUT_CLASS] = _categorical(classes)
    variables[OUTPUT_SCORE] = _numeric(tuple(i / SCORE_BINS for i in range(1, SCORE_BINS)))
    return Profile(features=spec, variables=variables)


def count(
    profile: Profile, found: Features, probabilities: npt.NDArray[np.floating]
) -> dict[str, Counts]:
    """Count examples into the profile's bins, per variable int64 ``(bins,)``.

    ``found`` comes from :func:`features` with the profile's specification; ``probabilities``
    has shape ``(n, classes)`` and rows that sum to one (softmax, not logits). Each vector sums
    to n. Raises :class:`BadProfile` when they do not fit the profile.
    """
    rows = len(found.values)
    if probabilities.shape != (rows, len(profile.classes)):
        raise BadProfile(
            f"probabilities have shape {probabilities.shape}; expected "
            f"({rows}, {len(profile.classes)})"
        )
    scores = probabilities.astype(np.float64).max(axis=1)  # NaN if any is NaN
    known = np.isfinite(scores)
    outputs = {
        OUTPUT_CLASS: np.where(known, probabilities.argmax(axis=1), -1).astype(np.float64),
        OUTPUT_SCORE: scores,
    }
    counts = {}
    for name, variable in profile.variables.items():
        values = outputs[name] if name in outputs else found.column(name)
        index = variable.index(values)
        counts[name] = np.bincount(index, minlength=variable.bins).astype(np.int64)
    return counts


def synthesise(
    profile: Profile, shape: tuple[int, ...], n: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Return ``n`` synthetic examples of ``shape``, float32 ``(n, *shape)``.

    The hub has no data, so golden inputs are made of what the profile says: noise whose
    watched features fall into the bins as often as the population's did. Features are drawn
    independently. Signals and images are Gaussian noise shifted and scaled to exactly the mean and
    standard deviation drawn for each channel (0 and 1 where the profile watches only the
    other). Raises :class:`BadProfile` when ``shape`` does not fit the profile.
    """
    spec = profile.features
    fits = len(shape) == 1 if spec.kind == "columns" else len(shape) > 1
    if not fits or shape[0] != len(spec.channels) or not prod(shape):
        raise BadProfile(f"examples of shape {shape} do not fit the profile's features")
    drawn = {name: draw(profile.variables[name], n, rng) for name in spec.names}
    if spec.kind == "columns":
        return np.stack([drawn[name] for name in spec.names], axis=1).astype(np.float32)
    noise = rng.standard_normal((n, shape[0], prod(shape[1:])))
    if noise.shape[2] > 1:
        noise -= noise.mean(axis=2, keepdims=True)
        noise /= noise.std(axis=2, keepdims=True)
    for index, channel in enumerate(spec.channels):
        if f"{channel}:std" in drawn:
            noise[:, index] *= np.maximum(drawn[f"{channel}:std"], 0)[:, None]
        if f"{channel}:mean" in drawn:
            noise[:, index] += drawn[f"{channel}:mean"][:, None]
    return noise.reshape(n, *shape).astype(np.float32)


def _numeric(edges: tuple[float, ...]) -> Numeric:
    return Numeric(edges, (0,) * (len(edges) + 2))


def _categorical(categories: tuple[str, ...]) -> Categorical:
    return Categorical(categories, (0,) * (len(categories) + 1))
