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
from atoll.privacy.update import UpdateSpec, decode, encode, quantise

SPEC = UpdateSpec(clip_norm=1.5, bits=12, noise_multiplier=0.0, survivors=4)


def stream(seed=0):
    return Keystream.replayable(seed)


@given(
    arrays(
        np.float64,
        st.integers(1, 60),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=64),
    ),
    st.integers(6, 24),
    st.floats(1e-6, 1e6),
)
@settings(max_examples=150, deadline=None)
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
    assert decode(quantise(small, SPEC, stream()).values, SPEC, 1) == pytest.approx(
        small, abs=1 / SPEC.scale
    )
    large = quantise(1e300 * small, SPEC, stream()).values
    assert decode(large, SPEC, 1) == pytest.approx(SPEC.clip_norm * np.array([0.6, -0.8]), abs=2e-3)


def test_rounding_is_unbiased():
    value = np.full(40_000, 0.3 / SPEC.scale)
    got = quantise(value, SPEC, stream()).values
    assert set(got.tolist()) == {0, 1}
    assert stats.binomtest(int(got.sum()), got.size, 0.3).pvalue > 1e-4


def test_the_mean_over_devices_comes_back():
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(4, 500)) * 0.01
    total = np.sum([encode(u, SPEC, stream(i)) for i, u in enumerate(updates)], axis=0)
    assert decode(total, SPEC, 4) == pytest.approx(updates.mean(axis=0), abs=1 / SPEC.scale)


def test_shares_of_the_minimum_survivors_add_up_to_the_promised_noise():
    spec = UpdateSpec(1.0, 14, 0.7, 9)
    total = np.sum([encode(np.zeros(20_000), spec, stream(i)) for i in range(9)], axis=0)
    promised = 0.7 * spec.sensitivity
    assert total.std() == pytest.approx(promised, rel=0.02)
    assert stats.kstest(total / promised, "norm").pvalue > 1e-4


@given(st.integers(8, 20), st.sampled_from([0.0, 0.5, 1.0, 4.0]), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
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
    with pytest.raises(BadParameters, match="raise bits"):
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
        ({"bits": 4, "noise_multiplier": 0.5}, "raise bits"),
        ({"bits": 24, "noise_multiplier": 1e6}, "lower noise_multiplier"),
    ],
)
def test_parameters_that_cannot_work_are_refused(change, says):
    fine = {"clip_norm": 1.0, "bits": 12, "noise_multiplier": 0.0, "survivors": 4}
    with pytest.raises(BadParameters, match=says):
        UpdateSpec(**{**fine, **change})


def test_rounding_that_keeps_failing_the_check_falls_back_to_zero():
    class AlwaysUp(Keystream):
        def uniform(self, count):
            return np.zeros(count)  # below every fraction, so every value is rounded up

    spec = UpdateSpec(1.0, 8, 0.0, 1)
    got = quantise(np.ones(400), spec, AlwaysUp(bytes(32))).values
    assert int(got @ got) <= spec.sensitivity**2
    assert got.tolist() == [math.trunc(spec.room(400) / 20)] * 400


def test_equal_seeds_give_equal_integers():
    values = np.linspace(-1, 1, 100)
    assert (encode(values, SPEC, stream(3)) == encode(values, SPEC, stream(3))).all()


def test_noise_goes_on_what_was_clipped_alone():
    # The types say so; this is what a type checker reads.
    assert update.add_noise.__annotations__["clipped"] is update.Clipped
    assert update.add_noise.__annotations__["return"] is update.Noised
