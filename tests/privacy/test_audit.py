"""The bound on ε against closed forms, the paper's numbers and mechanisms known exactly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from atoll.privacy.audit import Guesses, epsilon_at_least, guess, p_value
from atoll.privacy.errors import BadParameters


@st.composite
def attacks(draw, most=400):
    canaries = draw(st.integers(1, most))
    made = draw(st.integers(0, canaries))
    return Guesses(canaries, made, draw(st.integers(0, made)))


def test_the_numbers_of_the_paper():
    # Appendix D; section 7, figure 11, where 2.6758 is printed cut off.
    assert epsilon_at_least(Guesses(1000, 100, 75), 1e-4) == pytest.approx(0.673, abs=5e-4)
    assert epsilon_at_least(Guesses(100_000, 1510, 1439), 1e-5) == pytest.approx(2.6755, abs=5e-4)


@given(attacks(), st.floats(0, 12), st.floats(0, 1e-2))
@settings(max_examples=100)
def test_the_p_value_is_the_one_of_the_paper(seen, epsilon, delta):
    coins = stats.binom(seen.made, 1 / (1 + math.exp(-epsilon)))
    excess = max(
        (
            (coins.cdf(seen.correct - 1) - coins.cdf(seen.correct - i - 1)) / i
            for i in range(1, seen.correct + 1)
        ),
        default=0.0,
    )
    expected = coins.sf(seen.correct - 1) + 2 * seen.canaries * delta * excess
    assert p_value(seen, epsilon, delta) == pytest.approx(min(1.0, expected), rel=1e-8, abs=1e-12)


@given(st.integers(1, 5000), st.floats(0.5, 0.999))
@settings(max_examples=50)
def test_nothing_but_right_guesses_refute_what_the_closed_form_says(made, confidence):
    share = (1 - confidence) ** (1 / made)
    expected = max(0.0, math.log(share / (1 - share)))
    seen = Guesses(made, made, made)
    assert epsilon_at_least(seen, 0.0, confidence) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("made", [10_000, 100_000])
def test_tails_of_many_guesses_are_neither_lost_nor_rounded_away(made):
    for share in (0.74, 0.76, 0.8):
        seen = Guesses(made, made, round(share * made))
        expected = stats.binom.logsf(seen.correct - 1, made, 1 / (1 + math.exp(-1.0)))
        found = p_value(seen, 1.0, 0.0)
        if expected > -700:
            assert math.log(found) == pytest.approx(expected, rel=1e-7)
        else:
            assert found < 1e-300


@given(attacks(most=200), st.floats(1e-9, 1e-2), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(max_examples=100)
def test_every_smaller_epsilon_is_refuted_too(seen, delta, confidence):
    bound = epsilon_at_least(seen, delta, confidence)
    for epsilon in np.linspace(0, bound, 20, endpoint=False) if bound else []:
        assert p_value(seen, float(epsilon), delta) < 1 - confidence
    assert p_value(seen, bound + 2e-6, delta) >= 1 - confidence


@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("canaries", [20, 300])
def test_a_mechanism_that_is_private_is_accused_as_rarely_as_promised(canaries, epsilon, delta):
    # Randomised response that gives the bit away with probability δ is (ε, δ)-private; who
    # believes every answer is right a binomial number of times.
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    correct = np.arange(canaries + 1)
    accused = [
        epsilon_at_least(Guesses(canaries, canaries, int(v)), delta) > epsilon + 1e-6
        for v in correct
    ]
    assert stats.binom.pmf(correct, canaries, right)[accused].sum() <= 0.05


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 3.0])
def test_many_guesses_on_randomised_response_find_most_of_its_epsilon(epsilon):
    made = 50_000
    typical = Guesses(made, made, round(made / (1 + math.exp(-epsilon))))
    assert 0.9 * epsilon < epsilon_at_least(typical, 0.0) < epsilon


@given(attacks())
@settings(max_examples=50)
def test_more_right_guesses_refute_more_and_more_delta_explains_more(seen):
    if seen.correct < seen.made:
        better = Guesses(seen.canaries, seen.made, seen.correct + 1)
        assert epsilon_at_least(better, 1e-5) >= epsilon_at_least(seen, 1e-5)
    assert epsilon_at_least(seen, 1e-3) <= epsilon_at_least(seen, 1e-6)


def test_guesses_are_made_at_both_ends_and_not_between():
    scores = np.array([0.1, 9.0, -5.0, 0.2, 7.0, -6.0])
    included = np.array([True, True, False, False, False, True])
    assert guess(scores, included, 0) == Guesses(6, 0, 0)
    assert guess(scores, included, 1) == Guesses(6, 1, 1)
    assert guess(scores, included, 4) == Guesses(6, 4, 2)
    assert guess(scores, included, 6) == Guesses(6, 6, 2)


def test_no_guess_refutes_nothing():
    assert p_value(Guesses(10, 0, 0), 0.0, 0.0) == 1.0
    assert epsilon_at_least(Guesses(10, 0, 0), 1e-5) == 0.0


@pytest.mark.parametrize("numbers", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_guesses_that_cannot_be_are_refused(numbers):
    with pytest.raises(BadParameters, match="right guesses"):
        Guesses(*numbers)


def test_values_out_of_range_are_refused():
    seen = Guesses(10, 5, 3)
    for epsilon, delta in ((-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, -0.1), (1.0, 2.0)):
        with pytest.raises(BadParameters, match=r"epsilon|delta"):
            p_value(seen, epsilon, delta)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(BadParameters, match="confidence"):
            epsilon_at_least(seen, 0.0, confidence)
    with pytest.raises(BadParameters, match="guesses"):
        guess(np.zeros(3), np.zeros(3, dtype=bool), 4)
    with pytest.raises(BadParameters, match="scores"):
        guess(np.zeros(3), np.zeros(4, dtype=bool), 1)
