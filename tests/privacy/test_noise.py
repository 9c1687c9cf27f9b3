"""The noise has the distribution it says it has."""

import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from atoll.privacy import noise
from atoll.privacy.errors import BadParameters
from atoll.privacy.keystream import Keystream

DRAWS = 200_000


def pmf(sigma, support):
    """The discrete Gaussian's probabilities, as defined."""
    reach = math.ceil(40 * sigma) + 1
    everything = np.arange(-reach, reach + 1)
    return np.exp(-(support**2) / (2 * sigma**2)) / np.exp(-(everything**2) / (2 * sigma**2)).sum()


def goodness_of_fit(draws, sigma, edges):
    """The p-value of χ² over the cells that ``edges`` (integers) cut the line into."""
    reach = math.ceil(40 * sigma) + 1
    everything = np.arange(-reach, reach + 1)
    cells = np.searchsorted(edges, everything, side="right")
    probability = np.bincount(cells, weights=pmf(sigma, everything), minlength=len(edges) + 1)
    observed = np.bincount(np.searchsorted(edges, draws, side="right"), minlength=len(edges) + 1)
    kept = probability * draws.size >= 5
    expected = probability[kept] * draws.size
    return stats.chisquare(
        [*observed[kept], observed[~kept].sum() + 1], [*expected, draws.size - expected.sum() + 1]
    ).pvalue


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.0, 2.5, 7.3])
def test_small_noise_fits_the_exact_probabilities_value_by_value(sigma):
    draws = noise.discrete_gaussian(sigma, DRAWS, Keystream.replayable(1))
    edges = np.arange(-40, 41)
    assert goodness_of_fit(draws, noise.attainable(sigma), edges) > 1e-4


@pytest.mark.parametrize("sigma", [300.0, 11_585.24])
def test_wide_noise_fits_the_exact_probabilities_in_cells(sigma):
    draws = noise.discrete_gaussian(sigma, DRAWS, Keystream.replayable(2))
    edges = np.round(sigma * stats.norm.ppf(np.linspace(0, 1, 101)[1:-1])).astype(int)
    assert goodness_of_fit(draws, noise.attainable(sigma), edges) > 1e-4


@pytest.mark.parametrize("sigma", [3e6, noise.MAX_SIGMA])
def test_very_wide_noise_fits_the_gaussian_it_approaches(sigma):
    draws = noise.discrete_gaussian(sigma, DRAWS, Keystream.replayable(3))
    assert stats.kstest(draws / sigma, "norm").pvalue > 1e-4


def test_a_fit_to_another_sigma_is_noticed():
    draws = noise.discrete_gaussian(2.5, DRAWS, Keystream.replayable(4))
    assert goodness_of_fit(draws, 2.55, np.arange(-40, 41)) < 1e-4


def test_low_bits_of_wide_noise_are_uniform():
    draws = noise.discrete_gaussian(11_585.0, DRAWS, Keystream.replayable(5))
    assert stats.chisquare(np.bincount(draws & 63, minlength=64)).pvalue > 1e-4


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.0, 33.3, 1e4, 1e6, 1e8, noise.MAX_SIGMA])
def test_sigma_is_never_rounded_down(sigma):
    got = noise.attainable(sigma)
    assert sigma <= got <= sigma + math.sqrt(2) / 512 + 1e-8 * sigma


def test_no_draw_is_past_the_tail():
    draws = noise.discrete_gaussian(1.0, DRAWS, Keystream.replayable(6))
    assert np.abs(draws).max() <= noise.tail(1.0)
    # What the docstring promises of the tail, at the σ that is really used.
    reach = noise.tail(1000.0) / noise.attainable(1000.0)
    assert 2 * math.exp(-(reach**2) / 2) <= noise.TAIL_PROBABILITY


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, noise.MAX_SIGMA * 2])
def test_a_sigma_that_cannot_be_drawn_is_refused(sigma):
    with pytest.raises(BadParameters):
        noise.discrete_gaussian(sigma, 1, Keystream.replayable(0))


def test_the_keystream_is_aes_in_counter_mode():
    cipher = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor()
    stream = Keystream(bytes(32))
    words = np.concatenate([stream.words(3), stream.words(5)])
    assert words.astype("<u8").tobytes() == cipher.update(bytes(64))


def test_fresh_keystreams_differ_and_replayable_ones_do_not():
    assert Keystream.fresh().words(4).tolist() != Keystream.fresh().words(4).tolist()
    assert Keystream.replayable(7).words(4).tolist() == Keystream.replayable(7).words(4).tolist()
    with pytest.raises(ValueError, match="32 bytes"):
        Keystream(b"short")


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 1000])
def test_integers_below_a_limit_are_uniform(limit):
    drawn = Keystream.replayable(8).below(limit, 50_000)
    counts = np.bincount(drawn, minlength=limit)
    assert counts.size == limit
    assert limit == 1 or stats.chisquare(counts).pvalue > 1e-4


def test_the_largest_limit_fits_and_others_are_refused():
    drawn = Keystream.replayable(9).below(2**63, 1000)
    assert drawn.min() >= 0
    assert stats.kstest(drawn / 2.0**63, "uniform").pvalue > 1e-4
    for limit in (0, 2**63 + 1):
        with pytest.raises(ValueError, match="outside"):
            Keystream.replayable(9).below(limit, 1)
