"""The noise has the distribution it says it has."""

import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import cks
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from atoll.privacy import noise
from atoll.privacy.errors import BadParameters
from atoll.privacy.keystream import Keystream

DRAWS = 200_000
MANY = 4_000_000

COLUMNS = 1 << noise._COLUMN_BITS
ALL = 2**64 - 1
CAPACITY = 1 << (noise._CUT_BITS - noise._COLUMN_BITS)

# Blocks of one integer end at σ = 110, where 9.3 σ passes 1023; those of two at 220.
SIGMAS = [0.3, 0.5, 1.0, 2.5, 7.3, 33.0, 110.0, 110.1, 220.0, 220.1, 300.0, 11_585.24, 2.0**20]


class Scripted(Keystream):
    """A stream of given words, for what happens once in 2**40 draws."""

    def __init__(self, *words):
        super().__init__(bytes(32))
        self.left = list(words)

    def words(self, count):
        taken, self.left = self.left[:count], self.left[count:]
        assert len(taken) == count, "more words were drawn than the script has"
        return np.array(taken, dtype=np.uint64)


def exponential(exponent, bits):
    """⌊exp(-exponent)·2**bits⌋, to far more digits than the sampler has."""
    with localcontext() as context:
        context.prec = 200
        power = Decimal(-exponent.numerator) / Decimal(exponent.denominator)
        return int(power.exp() * (1 << bits))


def below(sigma, edges):
    """P(X < edge) of the discrete Gaussian, as defined; by the error function when it is wide.

    Past σ = 3000 the sum over integers and the integral between half-integers differ by less
    than 1e-8.
    """
    if sigma > 3000:
        return special.ndtr((np.asarray(edges) - 0.5) / sigma)
    reach = math.ceil(40 * sigma) + 1
    everything = np.arange(-reach, reach + 1)
    density = np.exp(-((everything / sigma) ** 2) / 2)
    up_to = np.concatenate([[0.0], np.cumsum(density / density.sum())])
    return up_to[np.clip(np.asarray(edges) + reach, 0, up_to.size - 1)]


def goodness_of_fit(draws, sigma, edges):
    """The p-value of χ² over the cells that ``edges`` (integers) cut the line into."""
    probability = np.diff(np.concatenate([[0.0], below(sigma, edges), [1.0]]))
    observed = np.bincount(np.searchsorted(edges, draws, side="right"), minlength=len(edges) + 1)
    kept = probability * draws.size >= 5
    expected = probability[kept] * draws.size
    return stats.chisquare(
        [*observed[kept], observed[~kept].sum() + 1], [*expected, draws.size - expected.sum() + 1]
    ).pvalue


def cells(sigma, most=2000):
    """Edges between single integers, or between about ``most`` equally likely ranges."""
    if 10 * sigma < most:
        return np.arange(-math.ceil(5 * sigma) - 1, math.ceil(5 * sigma) + 2)
    return np.unique(
        np.round(sigma * stats.norm.ppf(np.linspace(0, 1, most + 1)[1:-1])).astype(int)
    )


@pytest.mark.parametrize("sigma", SIGMAS)
def test_noise_fits_the_exact_probabilities(sigma):
    draws = noise.discrete_gaussian(sigma, MANY, Keystream.replayable(1))
    assert goodness_of_fit(draws, sigma, cells(sigma)) > 1e-4


def test_a_fit_to_a_slightly_different_sigma_is_noticed():
    draws = noise.discrete_gaussian(2.5, MANY, Keystream.replayable(4))
    assert goodness_of_fit(draws, 2.51, cells(2.5)) < 1e-4


@pytest.mark.parametrize("sigma", [3e6, noise.MAX_SIGMA])
def test_very_wide_noise_fits_the_gaussian_it_approaches(sigma):
    draws = noise.discrete_gaussian(sigma, DRAWS, Keystream.replayable(3))
    assert stats.kstest(draws / sigma, "norm").pvalue > 1e-4


@pytest.mark.parametrize("sigma", [0.5, 3.0, 109.0, 300.0, 11_585.0])
def test_noise_is_told_from_the_sampler_of_the_paper_by_no_test(sigma):
    used = cks.attainable(sigma)
    oracle = cks.discrete_gaussian(sigma, DRAWS, Keystream.replayable(11))
    draws = noise.discrete_gaussian(used, DRAWS, Keystream.replayable(12))
    edges = cells(sigma, most=200)
    table = [
        np.bincount(np.searchsorted(edges, side, side="right"), minlength=len(edges) + 1)
        for side in (oracle, draws)
    ]
    both = np.array(table)[:, np.sum(table, axis=0) >= 10]
    assert stats.chi2_contingency(both).pvalue > 1e-4
    assert stats.ks_2samp(np.abs(oracle), np.abs(draws)).pvalue > 1e-4


def test_the_oracle_itself_fits():
    draws = cks.discrete_gaussian(7.3, DRAWS, Keystream.replayable(13))
    assert goodness_of_fit(draws, cks.attainable(7.3), cells(7.3)) > 1e-4


@pytest.mark.parametrize("sigma", [0.5, 1.0, 111.0, 11_585.0])
def test_noise_is_as_often_negative_as_positive_at_any_magnitude(sigma):
    draws = noise.discrete_gaussian(sigma, MANY, Keystream.replayable(14))
    for magnitude in (0, round(sigma), round(2 * sigma)):
        positive, negative = (draws > magnitude).sum(), (draws < -magnitude).sum()
        assert stats.binomtest(int(positive), int(positive + negative)).pvalue > 1e-4


def test_low_bits_of_wide_noise_are_uniform():
    draws = noise.discrete_gaussian(11_585.0, DRAWS, Keystream.replayable(5))
    assert stats.chisquare(np.bincount(draws & 63, minlength=64)).pvalue > 1e-4


def test_neighbouring_draws_are_independent():
    draws = noise.discrete_gaussian(300.0, MANY, Keystream.replayable(15)) > 0
    for lag in (1, 2, noise._CHUNK):
        same = int((draws[lag:] == draws[:-lag]).sum())
        even = below(300.0, [1])[0]
        share = even**2 + (1 - even) ** 2
        assert stats.binomtest(same, draws.size - lag, share).pvalue > 1e-4


@given(st.floats(1e-3, noise.MAX_SIGMA) | st.floats(0.2, 1000.0))
@example(110.0)
@example(110.1)
@example(noise.MAX_SIGMA)
@example(1e-300)
@settings(max_examples=20)
def test_the_table_holds_the_exact_weights_of_the_blocks(sigma):
    table = noise._table(sigma)
    width = 1 << table.offset_bits
    starts = [int(start) for start in table.starts]
    blocks = dict.fromkeys(starts[:COLUMNS], 0)
    for column in range(COLUMNS):
        cut = (int(table.cuts[column]) << 64) + int(table.ties[column]) - column * CAPACITY
        blocks[starts[column]] += cut
        blocks[starts[column + COLUMNS]] += CAPACITY - cut
    assert sum(blocks.values()) == 1 << noise._CUT_BITS
    # Every integer up to the tail is in exactly one block, and in no other.
    firsts = range(0, width * COLUMNS // 2, width)
    assert blocks.keys() == {*firsts, *(~first for first in firsts)}
    assert width * COLUMNS // 2 > noise.tail(sigma)
    with localcontext() as context:
        context.prec = 70
        half = 1 / (2 * Fraction(sigma) ** 2)
        decay = Decimal(half.numerator) / Decimal(half.denominator)
        weights = {
            start: (-decay * start**2).exp() if abs(start) <= noise.tail(sigma) else Decimal(0)
            for start in blocks
        }
        whole = sum(weights.values())
        moved = sum(
            abs(weights[start] / whole - Decimal(share) / (1 << noise._CUT_BITS))
            for start, share in blocks.items()
        )
    assert moved / 2 < Decimal(2) ** -116


@given(st.floats(110.1, noise.MAX_SIGMA))
@settings(max_examples=30)
def test_hardly_any_draw_is_in_vain(sigma):
    drawn = noise._draw(noise._table(sigma), 20_000, Keystream.replayable(16))
    assert drawn.size > 0.99 * 20_000


def test_what_the_float_decides_at_once_the_integers_decide_alike(monkeypatch):
    sigma, seed = 5000.0, 17
    table = noise._table(sigma)
    usual = noise._draw(table, 8000, Keystream.replayable(seed))
    shy = replace(table, surely=np.uint64(0))
    assert (noise._draw(shy, 8000, Keystream.replayable(seed)) == usual).all()
    monkeypatch.setattr(noise, "_UNSURE", 2.0)
    assert (noise._draw(shy, 8000, Keystream.replayable(seed)) == usual).all()


@given(st.floats(110.1, noise.MAX_SIGMA), st.data())
@settings(max_examples=200)
def test_each_value_of_a_block_is_kept_with_its_own_probability(sigma, data):
    table = noise._table(sigma)
    width = 1 << table.offset_bits
    first = width * data.draw(st.integers(0, noise.tail(sigma) // width))
    start = data.draw(st.sampled_from([first, ~first]))
    offset = data.draw(st.integers(0, width - 1))
    value = start ^ offset
    assert value == (start + offset if start >= 0 else start - offset)
    share = exponential((value**2 - start**2) * table.decay, 64)
    assert int(table.surely) + width <= share + 1
    for coin, heads in ((share - 4, True), (share + width + 4, False)):
        if coin < 2**64:
            asked = np.array([start]), np.array([offset]), np.array([coin], dtype=np.uint64)
            assert noise._accept(table, *asked, Scripted(0, 0)).tolist() == [heads]


@given(st.fractions(0, Fraction(1, 4), max_denominator=10**12).filter(bool), st.integers(42, 64))
@settings(max_examples=200)
def test_an_undecided_coin_is_decided_by_the_next_digits(exponent, bits):
    digits = exponential(exponent, bits + 128)
    coin, second, third = digits >> 128, digits >> 64 & ALL, digits & ALL
    assume(10 < third < ALL - 10)
    assert noise._below(coin, bits, exponent, Scripted(second, third - 10))
    assert not noise._below(coin, bits, exponent, Scripted(second, third + 10))
    assert noise._below(coin - 3, bits, exponent, Scripted())
    assert not noise._below(coin + 3, bits, exponent, Scripted())


def test_a_coin_within_the_floats_error_is_decided_exactly():
    table = noise._table(5000.0)
    start, offset = np.array([4096 >> table.offset_bits << table.offset_bits]), np.array([3])
    exponent = 3 * (2 * int(start[0]) + 3) * table.decay
    bits = 64 - table.offset_bits
    digits = exponential(exponent, bits + 64)
    coin = np.array([digits >> 64 << table.offset_bits], dtype=np.uint64)
    rest = digits % 2**64
    for word, heads in ((rest - 10, True), (rest + 10, False)):
        stream = Scripted(word)
        assert noise._accept(table, start, offset, coin, stream).tolist() == [heads]
        assert stream.left == []


def test_a_word_at_a_cut_is_decided_by_the_lower_half_of_the_cut():
    table = noise._table(3.0)
    column = next(j for j in range(COLUMNS) if table.ties[j] and table.cuts[j] % 2)
    cut, tie = int(table.cuts[column]), int(table.ties[column])
    own, other = table.starts[column], table.starts[column + COLUMNS]
    assert own != other
    drawn = noise._draw(table, 4, Scripted(cut - 1, cut, cut, cut + 1, tie - 1, tie))
    assert drawn.tolist() == [own, own, other, other]


def test_a_shorter_tail_cuts_the_distribution_and_changes_nothing_else():
    table = replace(noise._table(300.0), tail=301)
    stream = Keystream.replayable(18)
    draws = np.concatenate([noise._draw(table, 8000, stream) for _ in range(200)])
    assert (draws.min(), draws.max()) == (-301, 301)
    inside = np.arange(-301, 302)
    density = np.exp(-((inside / 300.0) ** 2) / 2)
    observed = np.bincount(draws + 301, minlength=603)
    assert stats.chisquare(observed, density / density.sum() * draws.size).pvalue > 1e-4


def test_no_draw_is_past_the_tail_and_the_tail_is_as_light_as_promised():
    draws = noise.discrete_gaussian(1.0, MANY, Keystream.replayable(6))
    assert np.abs(draws).max() <= noise.tail(1.0)
    assert 2 * math.exp(-(noise.TAIL_SIGMAS**2) / 2) + 2.0**-115 <= noise.TAIL_PROBABILITY
    for sigma in (sigma for sigma in SIGMAS if sigma < 3000):
        assert 2 * below(sigma, [-noise.tail(sigma)])[0] < 2.0**-61


def test_noise_so_narrow_that_it_is_always_zero_is_zero():
    assert not noise.discrete_gaussian(1e-300, 1000, Keystream.replayable(7)).any()


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, noise.MAX_SIGMA * 2])
def test_a_sigma_that_cannot_be_drawn_is_refused(sigma):
    for function in (noise.check, lambda s: noise.discrete_gaussian(s, 1, Scripted())):
        with pytest.raises(BadParameters):
            function(sigma)


@pytest.mark.parametrize("sigma", [3.0, 300.0])
@pytest.mark.parametrize("count", [0, 1, noise._CHUNK, 3 * noise._CHUNK + 5])
def test_equal_keys_draw_equal_noise_and_others_do_not(sigma, count):
    first, again, other = (
        noise.discrete_gaussian(sigma, count, Keystream.replayable(seed)) for seed in (8, 8, 9)
    )
    assert first.shape == (count,)
    assert first.dtype == np.int64
    assert (first == again).all()
    assert count < 2 or (first != other).any()


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
