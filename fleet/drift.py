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

**Noise.** Counts may carry noise of a known σ (:mod:`atoll.fleet.samples`). Its variance joins
the sampling's in every threshold, sizes are in rows' worth, and the test of homogeneity weighs
each bin by the variance of both together (Kifer and Rogers, "A New Class of Private Chi-Square
Hypothesis Tests", AISTATS 2017), which is Pearson's where there is no noise. Where noise drowns
the counts the state is ``too-few-rows``, never ``stable``.

**Drift** is a change both significant and large: at a sufficient size everything is
significant. Size is PSI less what it is expected to be without any change.

**Whom to compare.** People differ, so a device is compared with its own baseline, the first
windows it served under a release; against the population's reference for information alone.
"""

from math import log, sqrt
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np

from atoll.fleet.chisquare import critical, survival
from atoll.fleet.counts import Counts
from atoll.fleet.errors import BadProfile
from atoll.fleet.profile import Profile
from atoll.fleet.samples import Sample, Scaled, Tally, join, shares

State = Literal["too-few-rows", "stable", "drifted"]
Numbers = Counts | Scaled
"""Counts, or counts scaled to their effective size; ``(bins,)``, not negative."""

ALPHA: Final = 0.001
"""Rate of false alarms of one assessment of one device, all its variables together."""
MIN_EFFECT: Final = 0.25
"""PSI that counts as large (Siddiqi, "Credit Risk Scorecards", 2006: a major shift)."""
MIN_ROWS: Final = 20
"""Effective rows' worth below which nothing is judged."""

_SMOOTHING: Final = 0.5


class Chi2(NamedTuple):
    """The two-sample statistic of homogeneity, its degrees of freedom and its p-value."""

    statistic: float
    degrees: int
    p_value: float


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one variable stands.

    ``statistics`` and ``thresholds`` have the same keys (``psi``, ``js``, ``ks``,
    ``wasserstein``, ``chi2``); each threshold alone keeps the rate of false alarms, but for
    that of ``js``, which at a few rows a bin lets up to three times as many pass. ``effect``
    is the size of the change. ``score`` is at least 1 exactly if ``drifted``. PSI and JS are
    those of the counts above zero.
    """

    state: State
    score: float = 0.0
    effect: float = 0.0
    p_value: float = 1.0
    statistics: dict[str, float] = {}
    thresholds: dict[str, float] = {}


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a device stands against its own baseline, and (for information) its population.

    ``rows`` are the current ones and ``noise`` is σ of the noise on each of their counts.
    """

    state: State
    rows: int
    score: float
    variables: dict[str, Verdict]
    population: dict[str, Verdict]
    noise: float = 0.0

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


def chi2(reference: Sample, window: Sample) -> Chi2:
    """Test homogeneity of two samples, bins empty on both sides left out.

    Without noise this is Pearson's statistic. With it, the shares' differences d have under
    homogeneity the covariance ``spread`` · (diag p - ppᵀ) + diag t - ttᵀ/Σt, where t is the
    variance of their noise (less what :meth:`Sample.of` took off); the statistic is dᵀC⁻d,
    worked out by the formula of Sherman and Morrison.
    """
    n, m = reference.rows, window.rows
    apart = _shares(reference.counts) - _shares(window.counts)
    noise = _noise(reference, window)
    variance = (1 / n + 1 / m) * shares(reference, window) + noise
    used = variance > 0
    apart, noise, variance = apart[used], noise[used], variance[used]
    statistic = float(np.sum(apart**2 / variance))
    if noise.any():
        left = float(noise.sum() - np.sum(noise**2 / variance))
        statistic += float(np.sum(noise * apart / variance)) ** 2 / left
    degrees = int(used.sum()) - 1
    return Chi2(statistic, degrees, survival(statistic, degrees))


def assess(
    reference: Sample,
    window: Sample,
    alpha: float = ALPHA,
    min_effect: float = MIN_EFFECT,
    *,
    effective: float = 1.0,
    min_rows: int = MIN_ROWS,
) -> Verdict:
    """Judge one variable; the last bin of both samples is that of missing values.

    ``alpha`` is the rate of false alarms, ``effective`` the share of rows worth an independent
    one. Raises :class:`BadProfile` when the samples do not fit each other, and
    :class:`ValueError` for an ``alpha`` or ``effective`` outside (0, 1].
    """
    bins = reference.counts.shape, window.counts.shape
    if bins[0] != bins[1] or len(bins[0]) != 1:
        raise BadProfile(f"counts of {bins[0]} and {bins[1]} bins do not compare")
    if not 0 < effective <= 1:
        raise ValueError(f"the effective share of rows lies between 0 and 1, not at {effective}")
    before, after = reference.scaled(effective), window.scaled(effective)
    if min(before.worth, after.worth) < max(min_rows, 1):
        return Verdict(state="too-few-rows")
    joined = join(before, after)
    found = chi2(*joined)
    spread = 1 / before.rows + 1 / after.rows
    limit = critical(alpha, found.degrees)
    least = 1 / (before.rows + after.rows)
    common = np.maximum(shares(*joined), least)  # no bin is emptier than one row makes it
    noise = _noise(*joined)
    widest = float((spread + noise / common).max())
    statistics = {
        "psi": psi(joined[0].positive, joined[1].positive),
        "js": js(joined[0].positive, joined[1].positive),
        "ks": ks(before.counts, after.counts),
        "wasserstein": wasserstein(before.counts, after.counts),
        "chi2": found.statistic,
    }
    thresholds = {
        "psi": limit * widest,
        "js": limit * widest / (8 * log(2)),
        "ks": sqrt(log(2 / alpha) / 2 * (1 / before.worth + 1 / after.worth)),
        "wasserstein": _wasserstein_limit(before, after, alpha),
        "chi2": limit,
    }
    unchanged = found.degrees * spread + float(np.sum(_centred(noise) / common))
    effect = max(0.0, statistics["psi"] - unchanged)
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
    baseline: Tally | None,
    current: Tally,
    alpha: float = ALPHA,
    min_effect: float = MIN_EFFECT,
    *,
    effective: float = 1.0,
    min_rows: int = MIN_ROWS,
) -> DeviceVerdict:
    """Judge a device by all variables of its release's profile.

    ``alpha`` is shared among them (Bonferroni). Without a baseline the state is
    ``too-few-rows``, and so it is while noise drowns a variable and no other has drifted.
    Raises :class:`BadProfile` for counts that are not in the profile's bins.
    """
    share = alpha / len(profile.variables)

    def against(reference: Tally) -> dict[str, Verdict]:
        return {
            name: assess(
                reference.sample(name),
                current.sample(name),
                share,
                min_effect,
                effective=effective,
                min_rows=min_rows,
            )
            for name in profile.variables
        }

    for tally in (current, current if baseline is None else baseline):
        bins = {name: vector.size for name, vector in tally.counts.items()}
        if bins != profile.bins:
            raise BadProfile("counts are not in the bins of the release's profile")
    own = against(baseline) if baseline is not None else {}
    states = {verdict.state for verdict in own.values()}
    state: State = "stable" if states == {"stable"} else "too-few-rows"
    return DeviceVerdict(
        state="drifted" if "drifted" in states else state,
        rows=current.rows,
        score=max((verdict.score for verdict in own.values()), default=0.0),
        variables=own,
        population=against(Tally(profile.reference(), profile.rows)),
        noise=current.noise,
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


def _noise(reference: Sample, window: Sample) -> Scaled:
    """Return the variance that noise has in the difference of each bin's shares."""
    return reference.noise / reference.rows**2 + window.noise / window.rows**2


def _centred(noise: Scaled) -> Scaled:
    """Return the variances of independent ``noise`` whose sum is known, and taken off."""
    total = float(noise.sum())
    return noise - noise**2 / total if total else noise


def _wasserstein_limit(reference: Sample, window: Sample, alpha: float) -> float:
    """Return a bound that the distance in bins exceeds with at most probability ``alpha``.

    The distance is Σ|D| over the edges, each D about normal, with variance P(1-P) · ``spread``
    and that of the noise so far. Whatever their dependence, the sum's quantile is at most its
    expected shortfall, and that at most the one of fully dependent terms (McNeil, Frey,
    Embrechts, "Quantitative Risk Management", 2015, §8.4.4), which for half-normals is
    2φ(z)/α · Σσ with z at 1 - α/2.
    """
    spread = 1 / reference.rows + 1 / window.rows
    upto = np.clip(np.cumsum(shares(reference, window)), 0, 1)
    noise = _noise(reference, window)
    so_far = np.cumsum(noise)
    total = float(noise.sum())
    walked = so_far * np.maximum(1 - so_far / total, 0) if total else so_far
    sigmas = np.sqrt(upto * (1 - upto) * spread + walked)
    normal = NormalDist()
    return float(sigmas.sum() * 2 * normal.pdf(normal.inv_cdf(1 - alpha / 2)) / alpha)
