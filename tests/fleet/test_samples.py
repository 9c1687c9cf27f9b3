from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.fleet.samples import MIN_EXPECTED, Sample, Tally, coarsen, pooled, shares, worth

sigmas = st.floats(0.01, 100)


@given(st.integers(1, 10**6), st.integers(1, 100), sigmas)
def test_as_many_exact_rows_as_the_worth_know_a_share_as_well(rows, bins, sigma) -> None:
    alike = (1 / bins) / rows + (sigma / rows) ** 2  # of a share of 1/bins: sampling and noise
    assert (1 / bins) / worth(rows, bins * sigma**2) == pytest.approx(alike)


@given(st.integers(0, 10**6), st.floats(0, 1e9))
def test_noise_only_takes_and_without_it_a_row_is_worth_a_row(rows, variance) -> None:
    assert worth(rows, 0.0) == rows
    assert worth(rows, variance) <= rows
    assert worth(-rows, variance) == 0


@given(st.lists(st.tuples(st.integers(0, 500), sigmas), min_size=1, max_size=8))
def test_merging_adds_counts_rows_and_variances(windows) -> None:
    merged = Tally()
    for rows, sigma in windows:
        merged = merged.merge(Tally({"v": np.array([rows, 0, 0])}, rows, sigma))
    assert merged.rows == merged.counts["v"].sum() == sum(rows for rows, _ in windows)
    assert merged.noise**2 == pytest.approx(sum(sigma**2 for _, sigma in windows))
    assert merged.worth == pytest.approx(worth(merged.rows, 3 * merged.noise**2))


def test_what_noise_adds_to_the_sum_is_taken_off_evenly_and_nothing_is_clamped() -> None:
    side = Sample.of(np.array([7, -4, 0, 1]), 8, 2.0)
    np.testing.assert_allclose(side.counts, [8, -3, 1, 2])
    assert side.rows == 8
    np.testing.assert_array_equal(side.noise, [4, 4, 4, 4])


def test_merged_noise_averages_out_where_clamping_would_have_filled_the_bins() -> None:
    rng = np.random.default_rng(1)
    exact = np.array([100, 0, 0, 0, 0, 0, 0, 0])
    noise = np.rint(rng.normal(0, 5, (400, 8))).astype(np.int64)
    merged = Tally()
    for one in noise:
        merged = merged.merge(Tally({"v": exact + one}, 100, 5.0))
    found = merged.sample("v")
    within = 4 * merged.noise
    assert np.abs(found.counts - 400 * exact).max() < within
    clamped = np.maximum(exact + noise, 0).sum(axis=0)
    assert (clamped[1:] > 400 * exact[1:] + 5 * within / 4).all()


@given(st.lists(st.integers(-50, 300), min_size=2, max_size=30), st.floats(0.5, 20))
def test_joined_bins_are_worth_enough_on_both_sides_and_keep_all_rows(values, sigma) -> None:
    counts = np.array(values)
    one, other = Sample.of(counts, 400, sigma), Sample.of(counts[::-1], 900, 2 * sigma)
    left, right = coarsen(one, other)
    assert left.rows == pytest.approx(400)
    assert right.rows == pytest.approx(900)
    assert left.noise.sum() == pytest.approx(counts.size * sigma**2)
    if left.counts.size > 2:  # the last may have taken in what was left
        both = pooled(left, right)[:-1] / pooled(left, right).sum()
        for side in (left, right):
            bins = zip(both * side.rows, side.noise[:-1], strict=True)
            assert all(worth(n, v) >= MIN_EXPECTED - 1e-6 for n, v in bins)


def test_a_side_weighs_what_it_is_worth() -> None:
    exact = Sample.exact(np.array([10, 30]))
    drowned = Sample.of(np.array([4000, 0]), 4000, 1e6)
    np.testing.assert_allclose(shares(exact, drowned), [0.25, 0.75], atol=1e-3)
    np.testing.assert_array_equal(pooled(exact, exact), [20, 60])


def test_the_tally_speaks_for_its_variable_of_most_bins() -> None:
    counts = {"few": np.zeros(2, np.int64), "many": np.zeros(50, np.int64)}
    assert Tally(counts, 100, sqrt(2)).worth == pytest.approx(100 * 100 / (100 + 50 * 2))
