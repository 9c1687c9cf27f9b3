"""Whether counts changed: statistics of two count vectors, and thresholds that fit their sizes.

Fixed thresholds mean nothing without the sample sizes: with 64 bins and a hundred rows on each
side PSI exceeds 0.1 on undrifted data nearly always. With n and m rows and k bins,
nm/(n+m) · PSI is about chi-square with k-1 degrees when nothing changed (PSI and Pearson's
statistic share their second-order expansion), so every threshold here follows from the rate
of false alarms that is asked for.

**Dependent rows.** Overlapping windows of one signal count the same moments several times.
``effective`` is the share of rows that is worth an independent one (0.5 for windows that
overlap by half); sizes are scaled by it before anything is judged: the first-order correction
of Rao and Scott, "The analysis of categorical data from complex sample surveys", JASA 76
(1981), with 1/``effective`` as the design effect.

**Drift** is a change both significant and large: at a sufficient size everything is
significant. Size is PSI less what it is expected to be without any change.

**Whom to compare.** People differ, so a device is compared with its own baseline, the first
windows it served under a release; against the population's reference for information alone.
"""

from collections.abc import Mapping
from math import log, sqrt
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.fleet.chisquare import critical, survival
from atoll.fleet.counts import Counts
from atoll.fleet.errors import BadProfile
from atoll.fleet.profile import Profile

State = Literal["too-few-rows", "stable", "drifted"]
Scaled = npt.NDArray[np.float64]
Numbers = Counts | Scaled
"""Counts, or counts scaled to their effective size; ``(bins,)``, not negative."""

ALPHA: Final = 0.001
"""Rate of false alarms of one assessment of one device, all its variables together."""
MIN_EFFECT: Final = 0.25
"""PSI that counts as large (Siddiqi, "Credit Risk Scorecards", 2006: a major shift)."""
MIN_ROWS: Final = 20
"""Effective rows below which nothing is judged."""
MIN_EXPECTED: Final = 5.0
"""Cochran's rule for chi-square: expect no fewer in a bin."""

_SMOOTHING: Final = 0.5


class Chi2(NamedTuple):
    """Pearson's two-sample statistic, its degrees of freedom and its p-value."""

    statistic: float
    degrees: int
    p_value: float


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one variable stands.

    ``statistics`` and ``thresholds`` have the same keys (``psi``, ``js``, ``ks``,
    ``wasserstein``, ``chi2``); each threshold alone keeps the rate of false alarms, but for
    that of ``js``, which at a few rows a bin lets up to three times as many pass. ``effect``
    is the size of the change. ``score`` is at least 1 exactly if ``drifted``.
    """

    state: State
    score: float = 0.0
    effect: float = 0.0
    p_value: float = 1.0
    statistics: dict[str, float] = {}
    thresholds: dict[str, float] = {}


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a device stands against its own baseline, and (for information) its population."""

    state: State
    rows: int
    score: float
    variables: dict[str, Verdict]
    population: dict[str, Verdict]

    @property
    def drifted(self) -> tuple[str, ...]:
        """The drifted variables, worst first."""
        found = [name for name, verdict in self.variables.items() if verdict.state == "drifted"]
        return tuple(sorted(found, key=lambda name: -self.variables[name].score))


def psi(reference: Numbers, window: Numbers) -> float:
    """Return the population stability index in nats: Σ (q - p) ln(q / p).

    It is the Jeffreys divergence.
    Half a row is added to every bin on both sides so that empty bins stay finite.
    """
    p, q = _shares(_float(reference) + _SMOOTHING), _shares(_float(window) + _SMOOTHING)
    return float(np.sum((q - p) * np.log(q / p)))


def js(reference: Numbers, window: Numbers) -> float:
    """Return the Jensen-Shannon divergence in bits, 0 to 1.

    Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991).
    """
    p, q = _shares(reference), _shares(window)
    middle = (p + q) / 2
    parts = [np.sum(s[s > 0] * np.log2(s[s > 0] / middle[s > 0])) for s in (p, q)]
    return max(0.0, float(sum(parts) / 2))


def ks(reference: Numbers, window: Numbers) -> float:
    """Return the Kolmogorov-Smirnov distance at the bin edges, 0 to 1.

    It is at most that of the values themselves.
    """
    return float(np.abs(_ahead(reference, window)).max())


def wasserstein(reference: Numbers, window: Numbers) -> float:
    """Return the Wasserstein-1 distance in bins: how many bins a row moved on average.

    Where bins are the reference's quantiles this is a distance in ranks, free of units.
    """
    return float(np.abs(_ahead(reference, window)).sum())


def chi2(reference: Numbers, window: Numbers) -> Chi2:
    """Test homogeneity of two samples (Pearson), bins empty on both sides left out."""
    n, m = float(reference.sum()), float(window.sum())
    p, q = _shares(reference), _shares(window)
    pooled = (_float(reference) + _float(window)) / (n + m)
    used = pooled > 0
    statistic = n * m / (n + m) * float(np.sum((p - q)[used] ** 2 / pooled[used]))
    degrees = int(used.sum()) - 1
    return Chi2(statistic, degrees, survival(statistic, degrees))


def coarsen(
    reference: Numbers, window: Numbers, minimum: float = MIN_EXPECTED
) -> tuple[Scaled, Scaled]:
    """Join adjacent bins until each is expected to hold ``minimum`` rows on both sides.

    Expectation is by the pooled counts, in which both sides look alike, so joining favours
    neither. Returns both vectors over the joined bins, at least one.
    """
    pooled = _float(reference) + _float(window)
    total = float(pooled.sum())
    smaller = min(float(reference.sum()), float(window.sum()))
    needed = minimum * total / smaller if smaller else float("inf")
    starts, held = [0], 0.0
    for index, count in enumerate(pooled.tolist()):
        if held >= needed:
            starts.append(index)
            held = 0.0
        held += count
    if held < needed and len(starts) > 1:
        starts.pop()  # too little is left for a bin of its own
    return (
        np.add.reduceat(_float(reference), starts),
        np.add.reduceat(_float(window), starts),
    )


def assess(
    reference: Counts,
    window: Counts,
    alpha: float = ALPHA,
    min_effect: float = MIN_EFFECT,
    *,
    effective: float = 1.0,
    min_rows: int = MIN_ROWS,
) -> Verdict:
    """Judge one variable; the last bin of both vectors is that of missing values.

    ``alpha`` is the rate of false alarms, ``effective`` the share of rows worth an independent
    one. Raises :class:`BadProfile` when the vectors do not fit each other, and
    :class:`ValueError` for an ``alpha`` or ``effective`` outside (0, 1].
    """
    if reference.shape != window.shape or reference.ndim != 1:
        raise BadProfile(f"counts of {reference.shape} and {window.shape} bins do not compare")
    if not 0 < effective <= 1:
        raise ValueError(f"the effective share of rows lies between 0 and 1, not at {effective}")
    before, after = _float(reference) * effective, _float(window) * effective
    n, m = float(before.sum()), float(after.sum())
    if min(n, m) < max(min_rows, 1):
        return Verdict(state="too-few-rows")
    joined = _join(before, after)
    found = chi2(*joined)
    spread = 1 / n + 1 / m
    limit = critical(alpha, found.degrees)
    statistics = {
        "psi": psi(*joined),
        "js": js(*joined),
        "ks": ks(before, after),
        "wasserstein": wasserstein(before, after),
        "chi2": found.statistic,
    }
    thresholds = {
        "psi": limit * spread,
        "js": limit * spread / (8 * log(2)),
        "ks": sqrt(log(2 / alpha) / 2 * spread),
        "wasserstein": _wasserstein_limit(before + after, spread, alpha),
        "chi2": limit,
    }
    effect = max(0.0, statistics["psi"] - found.degrees * spread)
    size = effect / min_effect if min_effect > 0 else float("inf")
    score = min(found.statistic / limit, size) if limit else 0.0
    return Verdict(
        state="drifted" if score >= 1 else "stable",
        score=score,
        effect=effect,
        p_value=found.p_value,
        statistics=statistics,
        thresholds=thresholds,
    )


def assess_device(
    profile: Profile,
    baseline: Mapping[str, Counts] | None,
    current: Mapping[str, Counts],
    alpha: float = ALPHA,
    min_effect: float = MIN_EFFECT,
    *,
    effective: float = 1.0,
    min_rows: int = MIN_ROWS,
) -> DeviceVerdict:
    """Judge a device by all variables of its release's profile.

    ``alpha`` is shared among them (Bonferroni). Without a baseline the state is
    ``too-few-rows``. Raises :class:`BadProfile` for counts that are not in the profile's bins.
    """
    share = alpha / len(profile.variables)

    def against(reference: Mapping[str, Counts]) -> dict[str, Verdict]:
        return {
            name: assess(
                reference[name],
                current[name],
                share,
                min_effect,
                effective=effective,
                min_rows=min_rows,
            )
            for name in profile.variables
        }

    for counts in (current, current if baseline is None else baseline):
        bins = {name: vector.size for name, vector in counts.items()}
        if bins != profile.bins:
            raise BadProfile("counts are not in the bins of the release's profile")
    own = against(baseline) if baseline is not None else {}
    states = {verdict.state for verdict in own.values()}
    state: State = "stable" if "stable" in states else "too-few-rows"
    return DeviceVerdict(
        state="drifted" if "drifted" in states else state,
        rows=int(next(iter(current.values())).sum()),
        score=max((verdict.score for verdict in own.values()), default=0.0),
        variables=own,
        population=against(profile.reference()),
    )


def _float(counts: Numbers) -> Scaled:
    return counts.astype(np.float64)


def _shares(counts: Numbers) -> Scaled:
    total = counts.sum()
    if not total > 0:
        raise BadProfile("no rows were counted, so there is nothing to compare")
    return _float(counts) / float(total)


def _ahead(reference: Numbers, window: Numbers) -> Scaled:
    """Return the difference of the distribution functions at each bin's upper edge."""
    return np.cumsum(_shares(reference)) - np.cumsum(_shares(window))


def _join(before: Scaled, after: Scaled) -> tuple[Scaled, Scaled]:
    """Coarsen, and keep missing values apart where they are many enough to be a bin."""
    n, m = float(before.sum()), float(after.sum())
    if (before[-1] + after[-1]) * min(n, m) / (n + m) < MIN_EXPECTED or len(before) == 1:
        return coarsen(before, after)
    if not (before[:-1].any() and after[:-1].any()):
        return _ends(before), _ends(after)
    left = coarsen(before[:-1], after[:-1])
    return np.append(left[0], before[-1]), np.append(left[1], after[-1])


def _ends(counts: Scaled) -> Scaled:
    return np.array([counts[:-1].sum(), counts[-1]])


def _wasserstein_limit(pooled: Scaled, spread: float, alpha: float) -> float:
    """Return a bound that the distance in bins exceeds with at most probability ``alpha``.

    The distance is Σ|D| over the edges, each D about normal with variance P(1-P) · ``spread``.
    Whatever their dependence, the sum's quantile is at most its expected shortfall, and that
    at most the one of fully dependent terms (McNeil, Frey, Embrechts, "Quantitative Risk
    Management", 2015, §8.4.4), which for half-normals is 2φ(z)/α · Σσ with z at 1 - α/2.
    """
    upto = np.clip(np.cumsum(_shares(pooled)), 0, 1)
    sigmas = np.sqrt(upto * (1 - upto) * spread)
    normal = NormalDist()
    return float(sigmas.sum() * 2 * normal.pdf(normal.inv_cdf(1 - alpha / 2)) / alpha)
