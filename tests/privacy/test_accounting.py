"""ε against published numbers, closed forms and independent accountants."""

import logging
import math
import time

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from atoll.privacy import accounting
from atoll.privacy.accounting import (
    Gaussian,
    Unnoised,
    from_json,
    gaussian_delta,
    gaussian_epsilon,
    spent,
    to_json,
)
from atoll.privacy.errors import BadParameters


def test_golden_sampled():
    got = spent([Gaussian(1.0, 0.01)] * 1000, 1e-5)
    assert got.epsilon_pld == pytest.approx(1.828, abs=5e-4)
    assert got.epsilon_rdp == pytest.approx(2.101, abs=5e-4)
    assert got.method == "pld"


def test_golden_unsampled():
    assert spent([Gaussian(1.0)] * 1000, 1e-5).epsilon_pld == pytest.approx(633.93, abs=5e-3)
    assert spent([Gaussian(8.0)] * 20, 1e-6).epsilon_pld == pytest.approx(2.549, abs=5e-4)


@given(st.floats(0.02, 30), st.floats(1e-12, 0.1))
@settings(max_examples=100, deadline=None)
def test_the_closed_form_inverts_the_curve(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon:
        assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=1e-6)
    else:
        assert gaussian_delta(mu, 0.0) <= delta


@given(st.floats(0.05, 60), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
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
@settings(max_examples=25, deadline=None)
def test_the_cross_check_is_never_lower(events):
    got = spent(events, 1e-5)
    assert 0 <= got.epsilon_pld <= got.epsilon_rdp
    assert math.isfinite(got.epsilon_rdp)


@given(st.lists(st.floats(0.3, 10), min_size=1, max_size=5), st.floats(0.3, 10))
@settings(max_examples=50, deadline=None)
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
        st.builds(Gaussian, st.floats(0.01, 10), st.none() | st.floats(0.01, 1)),
    )
)
def test_events_survive_json(event):
    assert from_json(to_json(event)) == event


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
    ],
)
def test_other_records_are_refused(data):
    with pytest.raises(BadParameters):
        from_json(data)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_delta_must_be_a_probability_that_means_something(delta):
    with pytest.raises(BadParameters, match="delta"):
        spent([Gaussian(1.0)], delta)
