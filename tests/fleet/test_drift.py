from functools import reduce
from math import log, log2, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.fleet import drift
from atoll.fleet import profile as profiles
from atoll.fleet.drift import (
    MIN_ROWS,
    DeviceVerdict,
    Verdict,
    assess_device,
    js,
    ks,
    psi,
    wasserstein,
)
from atoll.fleet.errors import BadProfile
from atoll.fleet.samples import MIN_EXPECTED, Sample, Tally, coarsen

counts = hnp.arrays(np.int64, 8, elements=st.integers(0, 200)).filter(lambda c: c.sum() > 0)


def _counts(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def assess(one, other, *rules, **more) -> Verdict:
    """Judge counts without noise."""
    return drift.assess(Sample.exact(one), Sample.exact(other), *rules, **more)


def chi2(one, other) -> drift.Chi2:
    return drift.chi2(Sample.exact(one), Sample.exact(other))


# ---- the statistics against closed forms and SciPy


def test_js_is_in_bits_and_has_its_known_values() -> None:
    assert js(_counts(1, 0), _counts(0, 5)) == 1
    assert js(_counts(2, 1), _counts(4, 2)) == 0
    by_hand = 0.5 * (log2(1 / 0.75)) + 0.5 * (0.5 * log2(0.5 / 0.75) + 0.5 * log2(0.5 / 0.25))
    assert js(_counts(4, 0), _counts(3, 3)) == pytest.approx(by_hand)


def test_psi_is_in_nats_with_half_a_row_in_every_bin() -> None:
    p, q = (3 + 0.5) / 5, (1 + 0.5) / 5
    by_hand = (q - p) * log(q / p) + ((1 - q) - (1 - p)) * log((1 - q) / (1 - p))
    assert psi(_counts(3, 1), _counts(1, 3)) == pytest.approx(by_hand)
    many = 10**9
    p, q = 0.25, 0.5
    by_hand = (q - p) * log(q / p) + (p - q) * log((1 - q) / (1 - p))
    assert psi(_counts(many, 3 * many), _counts(many, many)) == pytest.approx(by_hand)


def test_ks_and_wasserstein_of_a_shift_by_hand() -> None:
    one, other = _counts(4, 0, 0, 0), _counts(0, 0, 4, 0)
    assert ks(one, other) == 1
    assert wasserstein(one, other) == 2
    assert wasserstein(_counts(1, 1, 0), _counts(0, 1, 1)) == 1
    assert ks(_counts(1, 1), _counts(3, 1)) == 0.25


@given(counts, counts)
def test_statistics_agree_with_scipy(one, other) -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    stats = pytest.importorskip("scipy.stats")
    assert js(one, other) == pytest.approx(distance.jensenshannon(one, other, 2) ** 2, abs=1e-9)
    bins = np.arange(8)
    assert wasserstein(one, other) == pytest.approx(
        stats.wasserstein_distance(bins, bins, one, other), abs=1e-9
    )
    values = [np.repeat(bins, c) for c in (one, other)]
    assert ks(one, other) == pytest.approx(stats.ks_2samp(*values, method="asymp").statistic)
    used = (one + other) > 0
    if used.sum() > 1:
        found = chi2(one, other)
        theirs = stats.chi2_contingency([one[used], other[used]], correction=False)
        assert found.degrees == theirs.dof
        assert found.statistic == pytest.approx(theirs.statistic, abs=1e-9)
        assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-9)


@given(counts, counts)
def test_statistics_are_symmetric_not_negative_and_nothing_between_equals(one, other) -> None:
    for statistic in (psi, js, ks, wasserstein):
        assert statistic(one, other) >= 0
        assert statistic(one, other) == pytest.approx(statistic(other, one), abs=1e-12)
        assert statistic(one, one) == 0
    assert js(one, other) <= 1 + 1e-12
    assert ks(one, other) <= 1 + 1e-12
    assert wasserstein(one, other) <= 7 + 1e-12


def test_nothing_counted_cannot_be_compared() -> None:
    for statistic in (js, ks, wasserstein, chi2):
        with pytest.raises(BadProfile, match="no rows"):
            statistic(_counts(0, 0), _counts(1, 1))


@given(counts, counts)
def test_coarsening_keeps_rows_and_expects_enough_in_every_bin(one, other) -> None:
    left, right = (side.counts for side in coarsen(Sample.exact(one), Sample.exact(other)))
    n, m = one.sum(), other.sum()
    assert left.size == right.size >= 1
    assert left.sum() == n
    assert right.sum() == m
    if left.size > 1:
        assert ((left + right) * min(n, m) / (n + m) >= MIN_EXPECTED - 1e-9).all()
    swapped = coarsen(Sample.exact(other), Sample.exact(one))
    np.testing.assert_array_equal(swapped[0].counts, right)


# ---- verdicts


EDGES = np.quantile(np.random.default_rng(0).normal(size=20_000), np.arange(1, 64) / 64)


def _sample(rng, n, shift=0.0) -> np.ndarray:
    index = np.searchsorted(EDGES, rng.normal(shift, 1, n))
    return np.bincount(index, minlength=65).astype(np.int64)


TRIALS, ALPHA = 800, 0.02


@pytest.mark.parametrize(("n", "m"), [(20, 20), (30, 5000), (100, 150), (1000, 1000)])
def test_undrifted_windows_raise_no_more_false_alarms_than_asked_for(n, m) -> None:
    rng = np.random.default_rng(7)
    verdicts = [assess(_sample(rng, m), _sample(rng, n), ALPHA, 0.0) for _ in range(TRIALS)]
    # 3.5 standard errors: the rate asked for is kept, and the test does not fail by chance.
    allowed = TRIALS * ALPHA + 3.5 * sqrt(TRIALS * ALPHA)
    for name in ("psi", "ks", "wasserstein", "chi2"):
        fired = sum(v.statistics[name] > v.thresholds[name] for v in verdicts)
        assert fired <= allowed, name
    assert sum(v.state == "drifted" for v in verdicts) <= allowed
    low = sum(v.p_value < 0.5 for v in verdicts) / TRIALS  # neither blind: p is about uniform
    assert 0.4 < low < 0.6


def test_a_fixed_psi_threshold_would_fire_nearly_always() -> None:
    rng = np.random.default_rng(7)
    fired = [psi(_sample(rng, 100), _sample(rng, 100)) > 0.1 for _ in range(50)]
    assert np.mean(fired) > 0.9


@pytest.mark.parametrize(("n", "share"), [(50, 0.9), (100, 1), (500, 1)])
def test_a_shift_by_one_and_a_half_deviations_is_found(n, share) -> None:
    rng = np.random.default_rng(3)
    found = [assess(_sample(rng, n), _sample(rng, n, 1.5), 1e-4) for _ in range(50)]
    assert np.mean([verdict.state == "drifted" for verdict in found]) >= share


def test_a_significant_but_small_change_is_not_drift() -> None:
    rng = np.random.default_rng(3)
    verdict = assess(_sample(rng, 100_000), _sample(rng, 100_000, 0.1))
    assert verdict.p_value < 1e-6
    assert verdict.state == "stable"
    assert 0 < verdict.score < 1


@given(
    hnp.arrays(np.int64, 12, elements=st.integers(0, 60)),
    hnp.arrays(np.int64, 12, elements=st.integers(0, 60)),
    st.sampled_from([1.0, 0.5, 0.125]),
)
def test_any_counts_get_a_verdict_whose_score_says_the_same(one, other, effective) -> None:
    verdict = assess(one, other, effective=effective)
    few = min(one.sum(), other.sum()) * effective < MIN_ROWS
    assert (verdict.state == "too-few-rows") == few
    assert (verdict.state == "drifted") == (verdict.score >= 1)
    assert verdict.statistics.keys() == verdict.thresholds.keys()
    assert all(np.isfinite([*verdict.statistics.values(), *verdict.thresholds.values()]))


def test_too_few_rows_is_neither_stable_nor_drifted() -> None:
    before = _counts(1000, 1000, 0)
    assert assess(before, _counts(MIN_ROWS - 1, 0, 0)).state == "too-few-rows"
    assert assess(before, _counts(MIN_ROWS, 0, 0)).state == "drifted"
    assert assess(before, _counts(0, 0, 0), min_rows=0).state == "too-few-rows"


def test_overlapping_windows_count_for_less() -> None:
    rng = np.random.default_rng(5)
    one, other = _sample(rng, 200), _sample(rng, 200, 0.8)
    assert assess(one, other).p_value < assess(one, other, effective=0.25).p_value
    assert assess(one, other, effective=0.05).state == "too-few-rows"
    # Each row four times over is worth what it was once.
    repeated = assess(4 * one, 4 * other, effective=0.25)
    assert repeated.p_value == pytest.approx(assess(one, other).p_value)


def test_repeated_rows_raise_no_false_alarms_when_told_of() -> None:
    rng = np.random.default_rng(9)
    fired = sum(
        assess(4 * _sample(rng, 100), 4 * _sample(rng, 100), 0.01, 0.0, effective=0.25).state
        == "drifted"
        for _ in range(200)
    )
    assert fired <= 8


def test_values_that_go_missing_are_drift_however_the_rest_stands() -> None:
    before = np.append(np.full(10, 10), 0).astype(np.int64)
    after = np.append(np.full(10, 5), 50).astype(np.int64)
    assert assess(before, after).state == "drifted"
    nothing_left = np.append(np.zeros(10), 100).astype(np.int64)
    assert assess(before, nothing_left).state == "drifted"
    assert assess(nothing_left, nothing_left).state == "stable"


def test_a_constant_that_stays_is_stable_and_one_that_moves_is_drift() -> None:
    here, there = _counts(0, 100, 0, 0), _counts(0, 0, 100, 0)
    assert assess(here, here) == assess(here, here)
    assert assess(here, here).state == "stable"
    assert assess(here, there).state == "drifted"


def test_counts_of_other_bins_are_refused() -> None:
    with pytest.raises(BadProfile, match="do not compare"):
        assess(_counts(1, 2), _counts(1, 2, 3))
    for effective in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="effective"):
            assess(_counts(50, 50), _counts(50, 50), effective=effective)


# ---- counts with noise

VARIABLES = 14


def _noised(rng, counts: np.ndarray, z: float, windows: int) -> Sample:
    """Return counts of ``windows`` windows, each noised for ``VARIABLES`` variables."""
    sigma = z * sqrt(2 * VARIABLES * windows)
    noise = np.rint(rng.normal(0, sigma, counts.shape)).astype(np.int64)
    return Sample.of(counts + noise, int(counts.sum()), sigma)


def _even(rng, n) -> np.ndarray:
    return _sample(rng, n)


def _narrow(rng, n) -> np.ndarray:
    return np.bincount(np.searchsorted(EDGES, rng.normal(0.3, 0.1, n)), minlength=65)


def _two_peaks(rng, n) -> np.ndarray:
    centre = np.where(rng.random(n) < 0.8, -1.5, 1.2)
    return np.bincount(np.searchsorted(EDGES, rng.normal(centre, 0.05)), minlength=65)


def _often_missing(rng, n) -> np.ndarray:
    index = np.where(rng.random(n) < 0.3, 64, np.searchsorted(EDGES, rng.normal(0, 1, n)))
    return np.bincount(index, minlength=65)


def _classes(rng, n) -> np.ndarray:
    return np.bincount(rng.choice(6, n, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05]), minlength=7)


@pytest.mark.parametrize("shape", [_even, _narrow, _two_peaks, _often_missing, _classes])
@pytest.mark.parametrize(
    ("z", "before", "after"),
    # (rows, windows) of either side, also where noise and rows stand in other proportions
    [
        (0.3, (768, 3), (1280, 5)),
        (1, (768, 3), (1280, 5)),
        (1, (2560, 2), (600, 6)),
        (4, (5120, 20), (10_240, 40)),
    ],
)
def test_undrifted_windows_with_noise_raise_no_more_false_alarms(shape, z, before, after) -> None:
    rng = np.random.default_rng(5)
    trials = 400
    verdicts = [
        drift.assess(
            _noised(rng, shape(rng, before[0]), z, before[1]),
            _noised(rng, shape(rng, after[0]), z, after[1]),
            ALPHA,
            0.0,
        )
        for _ in range(trials)
    ]
    allowed = trials * ALPHA + 3.5 * sqrt(trials * ALPHA)
    for name in ("ks", "wasserstein", "chi2", "psi"):
        assert sum(v.statistics[name] > v.thresholds[name] for v in verdicts) <= allowed, name
    assert sum(v.state == "drifted" for v in verdicts) <= allowed
    low = sum(v.p_value < 0.5 for v in verdicts) / trials  # neither blind: p is about uniform
    assert 0.4 < low < 0.6


def test_taking_noised_counts_for_exact_ones_would_raise_alarms_always() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        one, other = (_noised(rng, _sample(rng, n), 1, n // 256) for n in (768, 1280))
        naive = [np.maximum(np.rint(side.counts), 0).astype(np.int64) for side in (one, other)]
        assert assess(*naive).state == "drifted"
        assert drift.assess(one, other).state == "stable"


@pytest.mark.parametrize(("z", "windows"), [(0.5, 2), (1, 5), (2, 15), (5, 96)])
def test_a_shift_is_found_in_noise_once_there_are_rows_enough(z, windows) -> None:
    rng = np.random.default_rng(3)
    alpha = 1e-3 / VARIABLES
    shifted = [
        drift.assess(
            _noised(rng, _sample(rng, 256 * windows), z, windows),
            _noised(rng, _sample(rng, 256 * windows, 1.0), z, windows),
            alpha,
        )
        for _ in range(40)
    ]
    assert np.mean([verdict.state == "drifted" for verdict in shifted]) >= 0.9
    # The PSI of a shift by d deviations is d²; joined bins lose a little of it.
    assert np.mean([verdict.effect for verdict in shifted]) == pytest.approx(0.95, abs=0.2)


def test_counts_that_noise_drowns_are_too_few_rows_however_many_they_are() -> None:
    rng = np.random.default_rng(3)
    one = _noised(rng, _sample(rng, 5000), 50, 20)
    other = _noised(rng, _sample(rng, 5000, 3.0), 50, 20)
    assert one.worth < MIN_ROWS < one.rows
    assert drift.assess(one, other).state == "too-few-rows"


@given(
    hnp.arrays(np.int64, 12, elements=st.integers(-60, 200)),
    hnp.arrays(np.int64, 12, elements=st.integers(-60, 200)),
    st.integers(0, 2000),
    st.floats(0.1, 30),
    st.sampled_from([1.0, 0.5]),
)
def test_any_noised_counts_get_a_verdict(one, other, rows, sigma, effective) -> None:
    before, after = Sample.of(one, rows, sigma), Sample.of(other, 500, sigma)
    verdict = drift.assess(before, after, effective=effective)
    few = min(side.scaled(effective).worth for side in (before, after)) < MIN_ROWS
    assert (verdict.state == "too-few-rows") == few
    assert (verdict.state == "drifted") == (verdict.score >= 1)
    assert all(np.isfinite([*verdict.statistics.values(), *verdict.thresholds.values()]))


def test_the_statistic_is_that_of_the_whole_covariance() -> None:
    rng = np.random.default_rng(8)
    one = Sample(rng.integers(20, 90, 6).astype(float), rng.uniform(1, 40, 6))
    other = Sample(rng.integers(20, 90, 6).astype(float), rng.uniform(1, 40, 6))
    n, m = one.rows, other.rows
    p = one.counts * one.quality + other.counts * other.quality
    p /= p.sum()
    t = one.noise / n**2 + other.noise / m**2
    covariance = (1 / n + 1 / m) * (np.diag(p) - np.outer(p, p))
    covariance += np.diag(t) - np.outer(t, t) / t.sum()
    d = one.counts / n - other.counts / m
    found = drift.chi2(one, other)
    assert found.statistic == pytest.approx(d @ np.linalg.pinv(covariance) @ d)
    assert found.degrees == 5


# ---- devices: a wrist watch of six channels whose wearer has two postures

CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
SPEC = profiles.FeatureSpec(kind="channel-stats", channels=CHANNELS)
CLASSES = ("still", "moving")
UPSIDE_DOWN = np.diag([-1, -1, 1, -1, -1, 1]).astype(np.float32)
ASKEW = np.kron(np.eye(2), [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]).astype(np.float32)


def _person(number: int, rng: np.random.Generator, n: int) -> np.ndarray:
    """Return windows of one person: gravity in a person's own direction, and motion."""
    own = np.random.default_rng(number)
    postures = np.concatenate([own.normal(0, 1, (2, 3)), own.normal(0, 0.2, (2, 3))], axis=1)
    spread = own.uniform(0.2, 1, 6)
    chosen = postures[rng.integers(0, 2, n)] + rng.normal(0, 0.2, (n, 6))
    noise = rng.normal(size=(n, 6, 50)) * (spread * rng.lognormal(0, 0.3, (n, 6)))[..., None]
    return (chosen[..., None] + noise).astype(np.float32)


def _count(profile, x) -> Tally:
    found = profiles.features(SPEC, x)
    sure = 1 / (1 + np.exp(-found.values[:, 0]))
    return Tally(profiles.count(profile, found, np.stack([sure, 1 - sure], axis=1)), len(x))


@pytest.fixture(scope="module")
def profile() -> profiles.Profile:
    rng = np.random.default_rng(0)
    people = [_person(number, rng, 300) for number in range(8)]
    found = [profiles.features(SPEC, x) for x in people]
    ranges = reduce(lambda a, b: a.merge(b), map(profiles.feature_range, found))
    fine = reduce(profiles.merge, (profiles.fine_counts(f, ranges) for f in found))
    bare = profiles.build(SPEC, profiles.quantile_edges(fine, ranges), CLASSES)
    counted = reduce(Tally.merge, (_count(bare, x) for x in people))
    return bare.with_counts(counted.counts, counted.rows)


@pytest.mark.parametrize("n", [60, 120, 200])
def test_the_rotated_device_is_found_and_no_other(profile, n) -> None:
    rng = np.random.default_rng(n)
    for number in range(10):
        baseline = _count(profile, _person(number, rng, n))
        same = assess_device(profile, baseline, _count(profile, _person(number, rng, n)))
        assert same.state == "stable", (number, same.drifted)
        assert same.score < 1
        assert same.rows == n
        for turned in (UPSIDE_DOWN, ASKEW):
            x = np.einsum("ij,njt->nit", turned, _person(number, rng, n))
            worn_wrong = assess_device(profile, baseline, _count(profile, x))
            assert worn_wrong.state == "drifted", number
            assert worn_wrong.score > 1.5
            assert worn_wrong.drifted


def test_false_alarms_of_whole_devices_keep_to_the_rate_asked_for(profile) -> None:
    rng = np.random.default_rng(1)
    fired = 0
    for _ in range(60):
        one, other = (_count(profile, _person(3, rng, 80)) for _ in range(2))
        fired += assess_device(profile, one, other, 0.05, 0.0).state == "drifted"
    assert fired <= 3 + 3.5 * sqrt(3)


def test_people_differ_from_the_population_and_that_is_no_alarm(profile) -> None:
    rng = np.random.default_rng(2)
    one, other = (_count(profile, _person(9, rng, 200)) for _ in range(2))
    verdict = assess_device(profile, one, other)
    assert verdict.state == "stable"
    assert any(v.state == "drifted" for v in verdict.population.values())


def test_without_a_baseline_nothing_is_judged_but_the_population(profile) -> None:
    current = _count(profile, _person(1, np.random.default_rng(3), 100))
    verdict = assess_device(profile, None, current)
    assert verdict.state == "too-few-rows"
    assert verdict.score == 0
    assert verdict.variables == {}
    assert verdict.population.keys() == profile.variables.keys()


def test_a_verdict_travels_as_json(profile) -> None:
    import msgspec

    rng = np.random.default_rng(4)
    one, other = (_count(profile, _person(1, rng, 100)) for _ in range(2))
    verdict = assess_device(profile, one, other)
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=DeviceVerdict) == verdict


def test_counts_of_another_profile_are_refused(profile) -> None:
    current = _count(profile, _person(1, np.random.default_rng(3), 100))
    for bad in (Tally(), Tally({**current.counts, "ax:mean": np.zeros(3, np.int64)}, 100)):
        with pytest.raises(BadProfile, match="not in the bins"):
            assess_device(profile, None, bad)
        with pytest.raises(BadProfile, match="not in the bins"):
            assess_device(profile, bad, current)


def test_a_device_is_not_stable_while_noise_drowns_one_of_its_variables(profile) -> None:
    rng = np.random.default_rng(6)
    one, other = (_count(profile, _person(3, rng, 400)) for _ in range(2))
    drowned = [Tally(side.counts, side.rows, 12.0) for side in (one, other)]
    verdict = assess_device(profile, *drowned)
    assert {v.state for v in verdict.variables.values()} == {"stable", "too-few-rows"}
    assert (verdict.state, verdict.noise) == ("too-few-rows", 12.0)
