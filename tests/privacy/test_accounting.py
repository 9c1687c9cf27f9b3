"""ε against published numbers, closed forms and independent accountants."""

import json
import logging
import math
import time

import mpmath
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from atoll.privacy import accounting
from atoll.privacy.accounting import (
    FixedSample,
    Gaussian,
    Unnoised,
    from_json,
    gaussian_delta,
    gaussian_epsilon,
    spent,
    to_json,
)
from atoll.privacy.errors import BadParameters


@pytest.mark.parametrize(
    ("event", "delta", "method", "epsilon", "digits"),
    [
        (Gaussian(1.0, 0.01, times=1000), 1e-5, "pld", 1.828, 3),
        (Gaussian(1.0, times=1000), 1e-5, "closed form", 633.93, 2),
        (Gaussian(1.0, 0.1, times=100), 1e-6, "pld", 8.059, 3),
        (Gaussian(1.0, times=100), 1e-6, "closed form", 96.72, 2),
        (Gaussian(1.0, FixedSample(100, 1000), times=100), 1e-6, "rdp", 86.24, 2),
        (Gaussian(8.0, times=20), 1e-6, "closed form", 2.549, 3),
    ],
)
def test_golden(event, delta, method, epsilon, digits):
    got = spent([event], delta)
    assert got.method == method
    assert round(got.epsilon_pld, digits) == epsilon


def test_golden_renyi():
    assert round(spent([Gaussian(1.0, 0.01, times=1000)], 1e-5).epsilon_rdp, 3) == 2.101


@pytest.mark.parametrize(
    ("noise", "times", "delta", "epsilon"),
    [(1.0, 1000, 1e-5, 633.93), (1.0, 100, 1e-6, 96.72), (8.0, 20, 1e-6, 2.549)],
)
def test_the_closed_form_agrees_with_the_loss_distribution_to_the_printed_digits(
    noise, times, delta, epsilon
):
    step = 1e-4 if epsilon < 100 else 1e-3
    one = pld.from_gaussian_mechanism(noise, value_discretization_interval=step)
    by_grid = one.self_compose(times).get_epsilon_for_delta(delta)
    digits = 3 if epsilon < 10 else 2
    ours = spent([Gaussian(noise, times=times)], delta).epsilon_pld
    assert round(by_grid, digits) == round(ours, digits) == epsilon


sampling = st.none() | st.sampled_from([0.001, 0.05, 1.0]) | st.just(FixedSample(3, 100))


@given(st.lists(st.builds(Gaussian, st.floats(0.3, 9), sampling, st.integers(1, 9)), max_size=4))
@settings(max_examples=30)
def test_so_many_times_is_as_many_events(events):
    one_by_one = [Gaussian(e.noise_multiplier, e.sampling) for e in events for _ in range(e.times)]
    assert spent(events, 1e-5) == spent(one_by_one, 1e-5)


def test_a_fixed_sample_is_bounded_as_by_its_theorem():
    """Theorem 27 of Wang, Balle and Kasiviswanathan, recomputed at the orders that matter.

    Noise σ = zC, sensitivity 2C: each release has the divergence 2α/z² before it is sampled.
    """
    noise, sample, times, delta = 4.0, FixedSample(20, 1000), 50, 1e-6
    gamma = mpmath.mpf(sample.size) / sample.population

    def divergence(order):
        return 2 * mpmath.mpf(order) / noise**2

    def moment(order):  # e^((α-1)ε(α)) - 1 at integers, whose differences bound the series
        return mpmath.e ** ((order - 1) * divergence(order)) if order > 1 else mpmath.mpf(1)

    def difference(order):
        return sum(
            (-1) ** (order - i) * mpmath.binomial(order, i) * moment(i) for i in range(order + 1)
        )

    def sampled(order):
        total = 1 + gamma**2 * mpmath.binomial(order, 2) * min(
            4 * (mpmath.e ** divergence(2) - 1), 2 * mpmath.e ** divergence(2)
        )
        for j in range(3, order + 1):
            # 4·√(B(2⌊j/2⌋)·B(2⌈j/2⌉)) or 2e^((j-1)ε(j)), whichever is less
            low, high = 2 * (j // 2), 2 * ((j + 1) // 2)
            ternary = 4 * mpmath.sqrt(difference(low) * difference(high))
            term = min(ternary, 2 * mpmath.e ** ((j - 1) * divergence(j)))
            total += gamma**j * mpmath.binomial(order, j) * term
        return mpmath.log(total) / (order - 1)

    with mpmath.workdps(60):
        theirs = min(
            times * sampled(a) + mpmath.log1p(-1 / mpmath.mpf(a)) - mpmath.log(delta * a) / (a - 1)
            for a in range(2, 40)
        )
    ours = spent([Gaussian(noise, sample, times)], delta).epsilon_rdp
    assert ours <= float(theirs) * (1 + 1e-9)  # it looks between the integers too
    assert ours == pytest.approx(float(theirs), rel=0.01)


def test_one_fixed_sample_judges_the_whole_account_by_replacement():
    everybody = FixedSample(7, 7)  # hides nothing: replacement alone
    for others in ([Gaussian(3.0)], [Gaussian(3.0, 0.1, 4)], [Gaussian(3.0), Gaussian(5.0, 0.5)]):
        got = spent([Gaussian(2.0, everybody), *others], 1e-5)
        assert (got.relation, got.method) == ("replace-one", "closed form")
        precision = sum(e.times * 4 / e.noise_multiplier**2 for e in [Gaussian(2.0), *others])
        assert got.epsilon_pld == pytest.approx(gaussian_epsilon(math.sqrt(precision), 1e-5))
        assert spent(others, 1e-5).relation == "zero-out"


@given(st.floats(0.02, 30), st.integers(1, 400), st.integers(1, 50), st.none() | st.just(0.05))
@settings(max_examples=25)
def test_a_fixed_sample_never_costs_more_than_the_whole(noise, size, times, other):
    drawn = Gaussian(noise, FixedSample(size, 400), times)
    got = spent([drawn, Gaussian(9.0, other)], 1e-6)
    whole = spent([Gaussian(noise, FixedSample(400, 400), times), Gaussian(9.0, other)], 1e-6)
    assert got.epsilon_pld <= min(whole.epsilon_pld, got.epsilon_rdp)
    assert got.epsilon_pld >= spent([Gaussian(9.0, other)], 1e-6).epsilon_pld
    assert math.isfinite(got.epsilon_rdp)


@given(st.floats(0.02, 30), st.floats(1e-12, 0.1))
@settings(max_examples=100)
def test_the_closed_form_inverts_the_curve(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon:
        assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=1e-6)
    else:
        assert gaussian_delta(mu, 0.0) <= delta


@given(st.floats(0.05, 60), st.floats(0, 1))
@settings(max_examples=100)
def test_the_curve_is_the_one_of_the_paper(mu, share):
    epsilon = share * (mu * mu / 2 + 5 * mu)
    first = special.ndtr(mu / 2 - epsilon / mu)
    second = math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
    assert gaussian_delta(mu, epsilon) == pytest.approx(first - second, rel=1e-7, abs=1e-14)


@pytest.mark.parametrize(("noise", "delta"), [(0.5, 1e-5), (1.0, 1e-6), (4.0, 1e-9)])
def test_the_closed_form_is_just_below_the_privacy_loss_distribution(noise, delta):
    grid = pld.from_gaussian_mechanism(noise, value_discretization_interval=1e-3)
    above = grid.get_epsilon_for_delta(delta)
    ours = spent([Gaussian(noise)], delta).epsilon_pld
    assert above - 1e-3 <= ours <= above


@given(
    st.lists(
        st.builds(
            Gaussian, st.floats(0.02, 50), st.none() | st.sampled_from([0.001, 0.05, 0.5, 1.0])
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=25)
def test_the_cross_check_is_never_lower(events):
    got = spent(events, 1e-5)
    assert 0 <= got.epsilon_pld <= got.epsilon_rdp
    assert math.isfinite(got.epsilon_rdp)


@given(st.lists(st.floats(0.3, 10), min_size=1, max_size=5), st.floats(0.3, 10))
@settings(max_examples=50)
def test_more_releases_cost_more(noises, another):
    events = [Gaussian(noise) for noise in noises]
    before, after = spent(events, 1e-6), spent([*events, Gaussian(another)], 1e-6)
    assert before.epsilon_pld < after.epsilon_pld
    assert before.epsilon_rdp < after.epsilon_rdp


def test_sampling_saves_and_sampling_everybody_saves_nothing():
    whole = spent([Gaussian(1.0)] * 10, 1e-5)
    assert spent([Gaussian(1.0, 1.0)] * 10, 1e-5) == whole
    assert spent([Gaussian(1.0, 0.1)] * 10, 1e-5).epsilon_pld < whole.epsilon_pld / 3


def test_sampled_and_unsampled_releases_compose():
    both = spent([Gaussian(1.0, 0.05)] * 20 + [Gaussian(4.0)] * 3, 1e-5)
    alone = spent([Gaussian(4.0)] * 3, 1e-5)
    other = spent([Gaussian(1.0, 0.05)] * 20, 1e-5)
    assert max(alone.epsilon_pld, other.epsilon_pld) < both.epsilon_pld
    assert both.epsilon_pld < spent([Gaussian(1.0)] * 20 + [Gaussian(4.0)] * 3, 1e-5).epsilon_pld


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert spent([], 1e-5).epsilon_pld == 0.0
    assert spent([Gaussian(5.0), Unnoised()], 1e-5).epsilon_pld == math.inf


@pytest.mark.parametrize("sampling", [None, 0.1, 0.9])
@pytest.mark.parametrize("noise", [0.05, 0.01, 1e-4, 1e-9])
def test_hardly_any_noise_is_reckoned_at_once_and_truly(noise, sampling):
    begun = time.process_time()
    got = spent([Gaussian(noise, sampling)] * 30, 1e-5)
    assert time.process_time() - begun < 5
    assert got.epsilon_pld <= got.epsilon_rdp
    # At least what one unsampled release costs, times the chance to be in any.
    assert got.epsilon_pld > 0.05 * gaussian_epsilon(1 / noise, 1e-5)
    if sampling is None:
        mu = math.sqrt(30) / noise
        assert got.epsilon_pld == pytest.approx(mu * mu / 2 + 4.26 * mu, rel=1e-3)


def test_noise_beyond_any_number_costs_everything():
    assert spent([Gaussian(1e-200)], 1e-5).epsilon_pld == math.inf


def test_charging_round_by_round_is_quick():
    spent([Gaussian(1.1, 0.02)], 1e-5)  # the first computes what the others share
    slowest = 0.0
    for rounds in range(2, 32):
        begun = time.process_time()
        spent([Gaussian(1.1, 0.02)] * rounds, 1e-5)
        slowest = max(slowest, time.process_time() - begun)
    # 30 ms measured; the room is for machines that are busy with other tests.
    assert slowest < 0.5


def test_the_accountant_is_not_chatty(caplog):
    with caplog.at_level(logging.DEBUG):
        accounting._rdp_single.cache_clear()
        spent([Gaussian(1.0, 0.1)], 1e-5)
    assert not caplog.records


@given(
    st.one_of(
        st.builds(Unnoised),
        st.builds(
            Gaussian,
            st.floats(0.01, 10),
            st.none()
            | st.floats(0.01, 1)
            | st.builds(FixedSample, st.integers(1, 9), st.integers(9, 99)),
            st.integers(1, 10**6),
        ),
    )
)
def test_events_survive_json(event):
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


def test_records_of_one_release_are_as_they_always_were():
    sampled = {"kind": "gaussian", "noise_multiplier": 1.5, "sampling": 0.1}
    assert to_json(Gaussian(1.5, 0.1)) == sampled
    assert to_json(Gaussian(1.5)) == sampled | {"sampling": None}
    assert to_json(Unnoised()) == {"kind": "unnoised"}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "laplace"},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": "1"},
        {"kind": "gaussian", "noise_multiplier": 0},
        {"kind": "gaussian", "noise_multiplier": 1, "sampling": 2},
        {"kind": "gaussian", "noise_multiplier": 1, "sampling": "all"},
        {"kind": "gaussian", "noise_multiplier": 1, "sampling": {"size": 2}},
        {"kind": "gaussian", "noise_multiplier": 1, "sampling": {"size": 3, "population": 2}},
        {"kind": "gaussian", "noise_multiplier": 1, "sampling": {"size": 0, "population": 2}},
        {"kind": "gaussian", "noise_multiplier": 1, "times": 0},
        {"kind": "gaussian", "noise_multiplier": 1, "times": 1.5},
    ],
)
def test_other_records_are_refused(data):
    with pytest.raises(BadParameters):
        from_json(data)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_delta_must_be_a_probability_that_means_something(delta):
    with pytest.raises(BadParameters, match="delta"):
        spent([Gaussian(1.0)], delta)
