"""The sampler of Canonne, Kamath and Steinke, the oracle for the fast one.

"The Discrete Gaussian for Differential Privacy" (NeurIPS 2020), algorithms 1 to 3, over whole
arrays. Every coin is decided by comparing exact integers. The standard deviation is rounded
up to a multiple of √2/c (:func:`attainable`); draws past the tail are drawn again.
"""

import math

import numpy as np

from atoll.privacy.keystream import Keystream
from atoll.privacy.noise import Bools, Ints, tail


def _rational(sigma: float) -> tuple[int, int]:
    """Return ``(m, c)`` with ``m·√2/c`` the least multiple of ``√2/c`` that is ≥ ``sigma``.

    ``c`` is the finest power of two up to 1024 with which every product in
    :func:`_accept` stays below 2**62.
    """
    c = 1024
    while c > 1 and (tail(sigma) + 2) * (sigma + 1) * c * c >= 2.0**62:
        c //= 2
    m = math.ceil(sigma * c / math.sqrt(2))
    return m, c


def attainable(sigma: float) -> float:
    """Return the σ that is drawn for ``sigma``; never smaller."""
    m, c = _rational(sigma)
    return m * math.sqrt(2) / c


def discrete_gaussian(sigma: float, count: int, stream: Keystream) -> Ints:
    """Return draws with P(x) ∝ exp(-x²/2σ²), σ = ``attainable(sigma)``."""
    m, c = _rational(sigma)
    farthest = tail(sigma)
    out = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        # About half of the candidates survive; ask for a few more than that needs.
        candidates = _laplace(m, c, (count - filled) * 2 + 32, stream)
        candidates = candidates[np.abs(candidates) <= farthest]
        kept = candidates[_accept(np.abs(candidates), m, c, stream)][: count - filled]
        out[filled : filled + kept.size] = kept
        filled += kept.size
    return out


def _scale(m: int, c: int) -> int:
    """Return the Laplace scale ``t = ⌊σ⌋ + 1`` for ``σ = m·√2/c``, in exact integers."""
    return math.isqrt(2 * m * m // (c * c)) + 1


def _laplace(m: int, c: int, count: int, stream: Keystream) -> Ints:
    """Return at most ``count`` draws with P(x) ∝ exp(-|x|/t) (algorithm 2)."""
    t = _scale(m, c)
    low = stream.below(t, count)
    low = low[_exp_minus(low, t, 1, stream)]
    size: Ints = low + t * _geometric(low.size, stream)
    negative = (stream.words(size.size) & np.uint64(1)).astype(bool)
    keep = ~(negative & (size == 0))
    np.negative(size, out=size, where=negative)
    kept: Ints = size[keep]
    return kept


def _accept(size: Ints, m: int, c: int, stream: Keystream) -> Bools:
    """Decide coins of probability exp(-(|y| - σ²/t)²/2σ²) (algorithm 3).

    With σ = m√2/c that exponent is the square of x = (|y|·c²·t - 2m²)/(2·m·c·t). Split into
    whole and fraction, x = a + f, it is a² + 2·a·f + f²: so many coins of exp(-1), exp(-f) and
    one of exp(-f²), all of which must fall heads.
    """
    t = _scale(m, c)
    denominator = 2 * m * c * t
    whole, rest = np.divmod(np.abs(size * (c * c * t) - 2 * m * m), denominator)
    alive = np.arange(size.size)
    alive = alive[_exp_minus(rest, denominator, 2, stream)]
    for power, times in ((0, whole * whole), (1, 2 * whole)):
        done = 0
        while True:
            tossing = times[alive] > done
            if not tossing.any():
                break
            tossed = alive[tossing]
            heads = _exp_minus(rest[tossed], denominator, power, stream)
            alive = np.concatenate([alive[~tossing], tossed[heads]])
            done += 1
    accepted = np.zeros(size.size, dtype=bool)
    accepted[alive] = True
    return accepted


def _exp_minus(numerators: Ints, denominator: int, power: int, stream: Keystream) -> Bools:
    """Toss a coin of exp(-(n/d)**power) per numerator ``0 ≤ n ≤ d`` (algorithm 1)."""
    heads = np.zeros(numerators.size, dtype=bool)
    alive = np.arange(numerators.size)
    k = 1
    while alive.size:
        hit = stream.below(k, alive.size) == 0
        for _ in range(power):
            hit &= stream.below(denominator, alive.size) < numerators[alive]
        heads[alive[~hit]] = k % 2 == 1
        alive = alive[hit]
        k += 1
    return heads


def _geometric(count: int, stream: Keystream) -> Ints:
    """Return counts of exp(-1) coins that fall heads before the first tails."""
    out = np.zeros(count, dtype=np.int64)
    alive = np.arange(count)
    one = np.ones(count, dtype=np.int64)
    while alive.size:
        alive = alive[_exp_minus(one[alive], 1, 0, stream)]
        out[alive] += 1
    return out
