"""Updates become integers whose sensitivity is exact, and come back as their mean."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from atoll.privacy import update
from atoll.privacy.errors import BadParameters, BadUpdate
from atoll.privacy.keystream import Keystream
from atoll.privacy.update import Clipped, Noised, UpdateSpec, encode, quantise

SPEC = UpdateSpec(clip_norm=1.5, bits=12, noise_multiplier=0.0, survivors=4)


JOINT = UpdateSpec(1.5, 16, 0.8, 5, riders=2, rider_noise_multiplier=4.0)


def stream(seed=0):
    return Keystream.replayable(seed)


def decode(values, spec):
    return update.decode(Noised(values), spec).update


@given(
    arrays(
        np.float64,
        st.integers(1, 60),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=64),
    ),
    st.integers(6, 24),
    st.floats(1e-6, 1e6),
)
@settings(max_examples=150)
def test_the_integer_norm_never_passes_the_sensitivity(values, bits, clip_norm):
    spec = UpdateSpec(clip_norm, bits, 0.0, 1)
    got = [int(v) for v in quantise(values, spec, stream()).values]
    assert sum(v * v for v in got) <= spec.sensitivity**2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(bad):
    with pytest.raises(BadUpdate, match="NaN or Inf"):
        encode(np.array([0.0, bad]), SPEC, stream())


@pytest.mark.parametrize("shape", [(), (0,), (2, 2)])
def test_another_shape_is_refused(shape):
    with pytest.raises(BadUpdate, match="one axis"):
        encode(np.zeros(shape), SPEC, stream())


def test_a_zero_update_stays_zero_without_noise():
    assert encode(np.zeros(10), SPEC, stream()).tolist() == [0] * 10


def test_a_zero_update_is_noised_like_any_other():
    spec = UpdateSpec(1.0, 12, 1.0, 1)
    drawn = encode(np.zeros(4000), spec, stream())
    assert drawn.std() == pytest.approx(spec.share_sigma, rel=0.05)


def test_a_small_update_is_not_scaled_and_a_large_one_is_clipped():
    small = np.array([0.3, -0.4])
    assert decode(quantise(small, SPEC, stream()).values, SPEC) == pytest.approx(
        small, abs=1 / SPEC.scale
    )
    large = quantise(1e300 * small, SPEC, stream()).values
    assert decode(large, SPEC) == pytest.approx(SPEC.clip_norm * np.array([0.6, -0.8]), abs=2e-3)


def test_rounding_is_unbiased():
    value = np.full(40_000, 0.3 / SPEC.scale)
    got = quantise(value, SPEC, stream()).values
    assert set(got.tolist()) == {0, 1}
    assert stats.binomtest(int(got.sum()), got.size, 0.3).pvalue > 1e-4


def test_the_mean_over_devices_comes_back():
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(4, 500)) * 0.01
    total = np.sum([encode(u, SPEC, stream(i)) for i, u in enumerate(updates)], axis=0)
    assert decode(total, SPEC) / 4 == pytest.approx(updates.mean(axis=0), abs=1 / SPEC.scale)


def test_shares_of_the_minimum_survivors_add_up_to_the_promised_noise():
    spec = UpdateSpec(1.0, 14, 0.7, 9)
    total = np.sum([encode(np.zeros(20_000), spec, stream(i)) for i in range(9)], axis=0)
    promised = 0.7 * spec.sensitivity
    assert total.std() == pytest.approx(promised, rel=0.02)
    assert stats.kstest(total / promised, "norm").pvalue > 1e-4


@given(st.integers(8, 20), st.sampled_from([0.0, 0.5, 1.0, 4.0]), st.integers(1, 50))
@settings(max_examples=40)
def test_no_value_passes_the_bound(bits, noise_multiplier, survivors):
    spec = UpdateSpec(1.0, bits, noise_multiplier, survivors)
    spike = np.zeros(300)
    spike[0] = 5.0
    assert np.abs(encode(spike, spec, stream())).max() <= spec.bound


def test_without_noise_the_bound_is_the_sensitivity():
    assert SPEC.bound == SPEC.sensitivity == 2047
    assert UpdateSpec(1.0, 12, 1.0, 4).bound == 2047 + math.ceil(9.3 * 2047 / 2)


def test_room_solves_the_equation_it_says_it_does():
    for length in (1, 100, 10_000):
        c, s = SPEC.room(length), SPEC.sensitivity
        assert c * c + length / 4 + c + math.sqrt(length) / 2 == pytest.approx(s * s)


def test_too_few_bits_for_the_length_are_refused():
    with pytest.raises(BadParameters, match=r"raise privacy\.bits"):
        encode(np.ones(100_000), UpdateSpec(1.0, 8, 0.0, 1), stream())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.inf}, "clip_norm"),
        ({"bits": 1}, "bits"),
        ({"bits": 25}, "bits"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"survivors": 0}, "survivors"),
        ({"bits": 4, "noise_multiplier": 0.5}, "raise privacy.bits"),
        ({"bits": 24, "noise_multiplier": 1e6}, "lower privacy.noise_multiplier"),
        ({"colluders": 4}, "somebody has to add noise"),
        ({"colluders": -1}, "colluders"),
        ({"riders": -1}, "riders"),
        ({"riders": 1, "noise_multiplier": 1.0}, "both zero or both positive"),
        ({"riders": 1, "rider_noise_multiplier": 1.0}, "both zero or both positive"),
        ({"rider_noise_multiplier": math.nan}, "rider_noise_multiplier"),
        ({"riders": 1, "noise_multiplier": 1.0, "rider_noise_multiplier": 1e4}, "no step"),
        ({"riders": 1, "noise_multiplier": 1.0, "rider_noise_multiplier": 1e-3}, "too coarse"),
    ],
)
def test_parameters_that_cannot_work_are_refused(change, says):
    fine = {"clip_norm": 1.0, "bits": 12, "noise_multiplier": 0.0, "survivors": 4}
    with pytest.raises(BadParameters, match=says):
        UpdateSpec(**{**fine, **change})


def test_rounding_that_keeps_failing_the_check_falls_back_to_zero():
    class AlwaysUp(Keystream):
        def fill(self, out):
            out[:] = 1 - 2**-32  # with any fraction it comes to one, so every value goes up

    spec = UpdateSpec(1.0, 8, 0.0, 1)
    got = quantise(np.ones(400), spec, AlwaysUp(bytes(32))).values
    assert int(got @ got) <= spec.sensitivity**2
    assert got.tolist() == [math.trunc(spec.room(400) / 20)] * 400


def test_equal_seeds_give_equal_integers():
    values = np.linspace(-1, 1, 100)
    assert (encode(values, SPEC, stream(3)) == encode(values, SPEC, stream(3))).all()


def test_noise_goes_on_what_was_clipped_alone():
    # The types say so; this is what a type checker reads.
    assert update.add_noise.__annotations__["clipped"] is Clipped
    assert update.add_noise.__annotations__["return"] is Noised
    assert update.release.__annotations__["return"] is Noised
    assert update.decode.__annotations__["total"] is Noised


SPECS = st.builds(
    lambda clip_norm, bits, noise, survivors, placement, riders, ratio: UpdateSpec(
        clip_norm,
        bits,
        noise,
        survivors,
        colluders=survivors // 3,
        placement=placement,
        riders=riders,
        rider_noise_multiplier=noise * ratio,
    ),
    st.floats(1e-3, 1e3),
    st.integers(14, 22),
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    st.integers(1, 20),
    st.sampled_from(["distributed", "central"]),
    st.integers(0, 3),
    st.sampled_from([0.5, 1.0, 5.0, 20.0]),
)


@given(
    SPECS,
    arrays(
        np.float64,
        st.integers(1, 40),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=64),
    ),
    st.floats(0, 1),
    st.data(),
)
@settings(max_examples=150)
def test_the_whole_vector_keeps_its_sensitivity_and_its_bound(spec, values, weight, data):
    riders = data.draw(st.lists(st.floats(-1, 1), min_size=spec.riders, max_size=spec.riders))
    got = [int(v) for v in quantise(values, spec, stream(), weight, riders).values]
    length = len(values)
    assert sum(v * v for v in got[:length]) <= spec.sensitivity**2
    assert all(abs(v) <= spec.rider_steps for v in got[length:])
    assert spec.rider_steps + math.ceil(9.3 * spec.rider_sigma) <= spec.sensitivity + spec.tail
    term = encode(values, spec, stream(), weight, riders)
    assert term.size == length + spec.riders
    assert np.abs(term).max() <= spec.bound
    if not spec.noise_multiplier:
        assert spec.multiplier == 0
        return
    # One release: the farthest that a term moves it, in σ of the noise on the sum.
    moved = (spec.sensitivity / (spec.share_sigma * math.sqrt(spec.adders))) ** 2
    if spec.riders:
        moved += spec.riders * (spec.rider_steps / (spec.rider_sigma * math.sqrt(spec.adders))) ** 2
    assert 1 / math.sqrt(moved) == pytest.approx(spec.multiplier)


def test_one_rider_of_five_times_the_noise_costs_two_percent():
    spec = UpdateSpec(1.0, 16, 0.8, 5, riders=1, rider_noise_multiplier=4.0)
    assert spec.multiplier == pytest.approx(0.8 / math.sqrt(1 + 1 / 25))
    assert spec.multiplier == pytest.approx(0.8 * 0.98, rel=1e-3)


@pytest.mark.parametrize("rider", [-1.0, -0.3, 0.0, 0.125, 1.0])
def test_riders_come_back_without_bias(rider):
    many = 4000
    spec = UpdateSpec(1.0, 8, 0.0, 1, riders=many)
    back = update.decode(Noised(encode([0.0], spec, stream(), 1.0, [rider] * many)), spec).riders
    # Rounding a share f up with probability f has variance f·(1 - f) ≤ 1/4.
    assert back.mean() == pytest.approx(
        rider, abs=5 * 0.5 / (spec.rider_steps * math.sqrt(many)) + 1e-12
    )
    assert np.ptp(back) <= 1 / spec.rider_steps + 1e-12


@pytest.mark.parametrize("riders", [(), (0.1,), (0.1, 1.01), (0.1, math.nan), (0.1, 0.2, 0.3)])
def test_riders_out_of_range_or_number_are_refused(riders):
    with pytest.raises(BadUpdate, match="rider"):
        encode(np.ones(3), JOINT, stream(), 1.0, riders)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_that_would_leave_the_sensitivity_is_refused(weight):
    with pytest.raises(BadUpdate, match="weight"):
        encode(np.ones(3), SPEC, stream(), weight)


def test_a_weight_scales_what_was_clipped():
    got = decode(quantise([30.0, -40.0], SPEC, stream(), 0.25).values, SPEC)
    assert got == pytest.approx(0.25 * SPEC.clip_norm * np.array([0.6, -0.8]), abs=2e-3)


def interval(variance, count):
    """Return where a sample variance of ``count`` normal values lies but once in a million."""
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], count - 1)
    return variance * low / (count - 1), variance * high / (count - 1)


@pytest.mark.parametrize(
    ("placement", "colluders", "adding", "shares"),
    [
        ("distributed", 0, 5, 1.0),
        ("distributed", 0, 7, 7 / 5),  # two more than the minimum
        ("distributed", 2, 5, 5 / 3),  # nobody colluded after all
        ("distributed", 2, 3, 1.0),  # the colluders have subtracted theirs
        ("central", 2, 5, 1.0),
        ("central", 0, 7, 1.0),
    ],
)
def test_noise_on_a_sum_has_the_variance_it_promises(placement, colluders, adding, shares):
    length = 20_000
    spec = UpdateSpec(1.5, 16, 0.8, 5, colluders, placement, 2, 4.0)
    zero = np.zeros(length)
    total = sum(encode(zero, spec, stream(i), 0.0, (0.0, 0.0)) for i in range(adding))
    got = update.decode(update.release(total, spec, stream(99)), spec)
    low, high = interval(shares * (0.8 * 1.5) ** 2, length)
    assert low < got.update.var(ddof=1) < high


@pytest.mark.parametrize("placement", ["distributed", "central"])
def test_noise_on_riders_has_the_variance_it_promises(placement):
    many = 20_000
    spec = UpdateSpec(1.5, 16, 0.8, 4, 1, placement, many, 4.0)
    total = sum(encode([0.0], spec, stream(i), 0.0, [1.0] * many) for i in range(3))
    got = update.decode(update.release(total, spec, stream(99)), spec).riders
    low, high = interval(4.0**2, many)
    assert low < got.var(ddof=1) < high
    assert got.mean() == pytest.approx(3.0, abs=5 * 4.0 / math.sqrt(many))


def test_norms_of_any_size_are_told():
    assert update.norm([3.0, -4.0]) == 5.0
    assert update.norm([0.0, 0.0]) == 0.0
    assert update.norm([3e300, 4e300]) == pytest.approx(5e300)
    assert update.norm([3e-300, 4e-300]) == pytest.approx(5e-300)
    assert update.norm([1.0, -math.inf]) == math.inf
    assert math.isnan(update.norm([1.0, math.nan]))
