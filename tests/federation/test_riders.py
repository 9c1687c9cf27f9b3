"""What rides behind an update, and what is made of it."""

import math

import numpy as np
import pytest
from cohorts import plan_of, varied
from hypothesis import given
from hypothesis import strategies as st

from atoll.federation import release
from atoll.federation.riders import FARTHEST, Riders
from atoll.privacy import update
from atoll.privacy.keystream import Keystream
from atoll.privacy.update import Noised, Sums


def adaptive(quantile: float, noise: float = 0.0, **privacy: object):
    return varied(
        plan_of(least=2, noise=noise),
        privacy={"clip": "adaptive", "clip_quantile": quantile, **privacy},
    )


def test_no_riders_ride_unless_the_plan_asks() -> None:
    riders = Riders.of(plan_of())
    assert (riders.count, riders.weight(1000), riders.values(3, within=True, steps=0)) == (
        0,
        1.0,
        (),
    )


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_weights_are_capped_and_never_nothing(examples: int, cap: int) -> None:
    weight = Riders(weight_cap=cap).weight(examples)
    assert 1 / cap <= weight <= 1
    assert weight == min(examples, cap) / cap


@given(st.integers(0, 500), st.floats(0.01, 0.99), st.booleans())
def test_riders_are_within_one(cap: int, quantile: float, within: bool) -> None:  # noqa: FBT001
    riders = Riders(cap, quantile)
    values = riders.values(9, within=within, steps=0)
    assert len(values) == riders.count
    assert all(-1 <= value <= 1 for value in values)


def test_at_the_median_the_bit_rides_as_in_the_paper() -> None:
    # b - 1/2 over its sensitivity of 1/2.
    riders = Riders(clip_quantile=0.5)
    assert riders.values(1, within=True, steps=0) == (1.0,)
    assert riders.values(1, within=False, steps=0) == (-1.0,)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("within", [0, 3, 10])
def test_the_clipping_norm_moves_by_the_papers_rule(quantile: float, within: int) -> None:
    plan, riders = adaptive(quantile, clip_rate=0.3), Riders(clip_quantile=quantile)
    said = sum(riders.values(1, within=i < within, steps=0)[0] for i in range(10))
    sums = Sums(np.zeros(1), np.array([said]))
    got = riders.next_clip_norm(plan, 2.0, sums, 10)
    assert got == pytest.approx(2.0 * math.exp(-0.3 * (within / 10 - quantile)))


@given(st.floats(-1e12, 1e12), st.floats(0.01, 0.99), st.floats(1e-9, 1e9))
def test_noise_moves_the_clipping_norm_only_so_far(
    said: float, quantile: float, norm: float
) -> None:
    plan, riders = adaptive(quantile), Riders(clip_quantile=quantile)
    start, rate = plan.privacy.clip_norm, plan.privacy.clip_rate
    got = riders.next_clip_norm(plan, norm, Sums(np.zeros(1), np.array([said])), 4)
    assert start / FARTHEST <= got <= start * FARTHEST
    if start / FARTHEST <= norm <= start * FARTHEST:
        assert abs(math.log(got / norm)) <= rate * max(quantile, 1 - quantile) + 1e-9


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_the_clipping_norm_finds_the_quantile(quantile: float, noise: float) -> None:
    plan = varied(adaptive(quantile, noise), privacy={"noise": "central"})
    riders, norm = Riders.of(plan), plan.privacy.clip_norm
    # Norms of the updates of a hundred devices, all far from where the clipping norm starts.
    norms = 50 * np.exp(np.random.default_rng(3).normal(size=100))
    draws = Keystream.replayable(5)
    shares = []
    for _ in range(120):
        spec = release.update_spec(plan, norm)
        within = norms <= norm
        total = sum(
            update.encode([0.0], spec, draws, 1.0, riders.values(1, within=one, steps=0))
            for one in within.tolist()
        )
        sums = update.decode(update.release(total, spec, draws), spec)
        shares.append(within.mean())
        norm = riders.next_clip_norm(plan, norm, sums, 100)
    assert shares[0] == 0
    assert np.mean(shares[-50:]) == pytest.approx(quantile, abs=0.05)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 200))
def test_the_weighed_mean_is_exact_without_noise(rows: list[int], cap: int) -> None:
    plan = varied(
        plan_of(),
        training={"weighting": "capped", "weight_cap": cap},
        privacy={"bits": 24, "clip_norm": 1.0},
    )
    riders, spec = Riders.of(plan), release.update_spec(plan, 1.0)
    updates = np.random.default_rng(len(rows)).normal(size=(len(rows), 5)) / 10
    draws = Keystream.replayable(0)
    total = sum(
        update.encode(one, spec, draws, riders.weight(n), riders.values(n, within=True, steps=0))
        for one, n in zip(updates, rows, strict=True)
    )
    got = riders.mean(update.decode(Noised(total), spec), spec, len(rows))
    weights = np.minimum(rows, cap) / cap
    # A step of rounding, over the least that the weights can add up to.
    assert got == pytest.approx(np.average(updates, axis=0, weights=weights), abs=cap * 5e-7)


@pytest.mark.parametrize("said", [-50.0, 0.0, 1e-9])
def test_a_denominator_lost_in_its_noise_is_floored(said: float) -> None:
    plan = varied(
        plan_of(noise=0.5, least=3),
        training={"weighting": "capped", "weight_cap": 10},
        privacy={"rider_noise_multiplier": 2.0},
    )
    riders, spec = Riders.of(plan), release.update_spec(plan, 1.0)
    sums = Sums(np.array([4.0]), np.array([said]))
    assert riders.mean(sums, spec, 8)[0] == 4.0 / 2.0  # the noise's deviation
    assert riders.mean(sums, spec, 80)[0] == 4.0 / 8.0  # eighty devices of one example
    assert riders.mean(Sums(np.array([4.0]), np.array([16.0])), spec, 80)[0] == 4.0 / 16.0
