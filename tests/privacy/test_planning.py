"""A forecast is what the ledger will say, and its noise is the least that keeps the promise."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.privacy.accounting import FixedSample, Gaussian, gaussian_epsilon
from atoll.privacy.errors import BadParameters
from atoll.privacy.ledger import Ledger, MemoryStore
from atoll.privacy.planning import Series, default_delta, least_noise, with_noise, within

HUNDRED = {"population": 1000, "cohort": 100, "rounds": 100, "delta": 1e-6}


@pytest.mark.parametrize(
    ("sampling", "epsilon", "epsilon_rdp", "method", "relation"),
    [
        ("none", 96.72, 100.72, "closed form", "zero-out"),
        ("poisson", 8.06, 8.92, "pld", "zero-out"),
        ("fixed", 86.24, 86.24, "rdp", "replace-one"),
    ],
)
def test_golden(sampling, epsilon, epsilon_rdp, method, relation):
    got = with_noise(Series(**HUNDRED, sampling=sampling), 1.0)
    assert (round(got.epsilon, 2), round(got.epsilon_rdp, 2)) == (epsilon, epsilon_rdp)
    assert (got.method, got.relation) == (method, relation)


@pytest.mark.parametrize("sampling", ["none", "poisson", "fixed"])
def test_the_ledger_charges_what_was_forecast(sampling):
    series = Series(population=50, cohort=5, rounds=7, delta=1e-3, sampling=sampling)
    forecast = with_noise(series, 2.0)
    ledger = Ledger(MemoryStore(), "watches", None, series.delta)
    after = {}
    for number in range(1, 8):
        drawn = {"none": None, "poisson": 0.1, "fixed": FixedSample(5, 50)}[sampling]
        after[number] = ledger.charge(f"run/{number}", Gaussian(2.0, drawn)).epsilon_pld
    assert dict(forecast.curve) == after
    assert forecast.epsilon == after[7]


@given(
    st.integers(1, 10**6),
    st.floats(1e-12, 1e-3),
    st.floats(0.01, 200),
    st.floats(0.05, 1000).map(lambda value: float(f"{value:.4g}")),
)
@settings(max_examples=60)
def test_the_least_noise_is_the_closed_forms_rounded_up(rounds, delta, epsilon, noise):
    series = Series(1, 1, rounds, delta)
    found = least_noise(series, epsilon)
    assert float(f"{found:.4g}") == found
    assert gaussian_epsilon(math.sqrt(rounds) / found, delta) <= epsilon * (1 + 1e-12)
    below = found - 10.0 ** (math.floor(math.log10(found)) - 3)
    assert gaussian_epsilon(math.sqrt(rounds) / below, delta) > epsilon * (1 - 1e-12)
    # And back: what a noise of four digits costs takes that noise.
    cost = gaussian_epsilon(math.sqrt(rounds) / noise, delta)
    if cost > 0:
        assert least_noise(series, cost * (1 + 1e-9)) == noise


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_the_least_noise_keeps_a_sampled_series_within_and_less_does_not(sampling, epsilon):
    series = Series(**HUNDRED, sampling=sampling)
    got = within(series, epsilon)
    assert got.epsilon <= epsilon
    assert float(f"{got.noise_multiplier:.4g}") == got.noise_multiplier
    less = got.noise_multiplier - 10.0 ** (math.floor(math.log10(got.noise_multiplier)) - 3)
    assert with_noise(series, less).epsilon > epsilon


def test_sampling_everybody_is_no_sampling():
    whole = {"population": 8, "cohort": 8, "rounds": 12, "delta": 1e-5}
    plain = least_noise(Series(**whole), 4.0)
    assert least_noise(Series(**whole, sampling="poisson"), 4.0) == plain
    # Replacing a contribution changes a sum by twice as much.
    assert least_noise(Series(**whole, sampling="fixed"), 4.0) == pytest.approx(2 * plain, rel=1e-3)


@given(st.integers(1, 5000))
@settings(max_examples=30)
def test_the_curve_goes_from_the_first_round_to_the_last_and_rises(rounds):
    got = with_noise(Series(10, 10, rounds, 0.01), 3.0)
    numbers = [number for number, _ in got.curve]
    assert numbers[0] == 1
    assert got.curve[-1] == (rounds, got.epsilon)
    assert numbers == sorted(set(numbers))
    assert len(numbers) <= 25
    epsilons = [epsilon for _, epsilon in got.curve]
    assert epsilons == sorted(epsilons)


def test_what_the_noise_does_to_the_sum():
    got = with_noise(Series(**HUNDRED), 2.0)
    assert got.mean_noise == 0.02  # 2 C over 100 devices
    assert got.device_share == 0.2  # a hundred of these make 2 C
    assert got.device_share * math.sqrt(100) == 2.0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"delta": 1e-3}, "below 1/1000.* use 0.0001"),
        ({"delta": 0.0}, "above 0"),
        ({"delta": math.nan}, "delta nan"),
        ({"cohort": 1001}, "cohort 1001 .* population of 1000"),
        ({"cohort": 0}, "cohort 0"),
        ({"rounds": 0}, "rounds 0"),
        ({"population": 0, "cohort": 0}, "population 0"),
    ],
)
def test_a_series_that_promises_nothing_is_refused(change, complaint):
    with pytest.raises(BadParameters, match=complaint):
        Series(**(HUNDRED | change))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_or_a_noise_that_is_none_is_refused(value):
    series = Series(**HUNDRED)
    with pytest.raises(BadParameters, match="epsilon"):
        least_noise(series, value)
    with pytest.raises(BadParameters, match="noise_multiplier"):
        with_noise(series, value)


@given(st.integers(1, 10**9))
def test_the_default_delta_is_always_allowed(population):
    assert Series(population, 1, 1, default_delta(population)).delta < 1 / population
