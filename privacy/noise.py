"""Discrete Gaussian noise on the integers, sampled exactly and at a few nanoseconds a value.

The line is cut into blocks of 2**s integers, mirrored about zero, so narrow that the density
hardly changes within one (s = 0, one integer each, up to σ of about 110). A draw picks a block
by Walker's alias method with the density at the block's end nearest zero, takes an offset in
it uniformly, and keeps the value x = ±(m + offset) with probability exp(-(x² - m²)/2σ²), which
is within one per cent of one on average.

No floating-point rounding shapes the distribution. The blocks' weights are integers, computed
to 192 bits; the alias table's columns are cut at multiples of 2**-128 of the whole. A random
word is first compared with the upper half of such a cut, and on a tie a second word with the
lower half. The coin of the last step is decided in floats only where the float's error cannot
matter, and otherwise in integers, drawing more bits until it is decided. What remains, in
total variation per value: the tail that is drawn again (:data:`TAIL_PROBABILITY`), and less
than 2**-115 of rounding in the table.

Sources: M. Vose, "A Linear Algorithm for Generating Random Numbers with a Given Distribution"
(1991); for the distribution, Canonne, Kamath and Steinke, "The Discrete Gaussian for
Differential Privacy" (NeurIPS 2020), whose own sampler is the oracle of the tests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from atoll.privacy.errors import BadParameters
from atoll.privacy.keystream import Keystream

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

TAIL_SIGMAS: Final = 9.3
TAIL_PROBABILITY: Final = 2.0**-61
"""Bound on P(|X| > tail(σ)), 2·exp(-9.3²/2), and the table's rounding together."""

MAX_SIGMA: Final = 2.0**28

_COLUMN_BITS: Final = 11
"""A table of 2**11 columns takes 64 KiB, next to the core, and is built in milliseconds."""

_CUT_BITS: Final = 128
_WEIGHT_BITS: Final = 192

_UNSURE: Final = 2.0**-40
"""More than the float's error in a coin (2**-50) and the coin's unseen bits (2**-42) together."""

_CHUNK: Final = 8192


def check(sigma: float) -> None:
    """Raise :class:`BadParameters` for a σ that is not positive or past :data:`MAX_SIGMA`."""
    if not 0 < sigma <= MAX_SIGMA:
        raise BadParameters(f"noise of σ = {sigma:g} cannot be drawn; use 0 < σ ≤ {MAX_SIGMA:g}")


def tail(sigma: float) -> int:
    """Return the largest magnitude that noise of ``sigma`` can have."""
    return math.ceil(TAIL_SIGMAS * sigma)


def discrete_gaussian(sigma: float, count: int, stream: Keystream) -> Ints:
    """Return int64 ``(count,)`` draws with P(x) ∝ exp(-x²/2σ²).

    Conditioned on |x| ≤ ``tail(sigma)``; that and all rounding move the distribution by less
    than :data:`TAIL_PROBABILITY` in total variation. Raises :class:`BadParameters` for a σ
    that is not positive or past :data:`MAX_SIGMA`.
    """
    check(sigma)
    table = _table(sigma)
    out = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        drawn = _draw(table, min(_CHUNK, count - filled), stream)
        out[filled : filled + drawn.size] = drawn
        filled += drawn.size
    return out


@dataclass(frozen=True, slots=True)
class _Table:
    """The alias table of one σ.

    Column j holds the words from j·2**53 on. Those below ``cuts[j]`` mean the block that
    starts at ``starts[j]``, those above it ``starts[j + 2**11]``; at the cut itself a second
    word below ``ties[j]`` means the former. A block that starts at ``m ≥ 0`` is m, m + 1, …,
    and one that starts at ``~m`` is ~m, ~(m + 1), …: start XOR offset, either way, as m is a
    multiple of ``2**offset_bits``.
    """

    tail: int
    offset_bits: int
    decay: Fraction  # 1/2σ²
    cuts: Words
    ties: Words
    starts: Ints
    surely: np.uint64  # coins below this one, of 2**64, accept every offset in every block


@lru_cache(maxsize=16)
def _table(sigma: float) -> _Table:
    farthest = tail(sigma)
    offset_bits = max(0, farthest.bit_length() - (_COLUMN_BITS - 1))
    width = 1 << offset_bits
    decay = 1 / (2 * Fraction(sigma) ** 2)
    starts, weights = _blocks(width, farthest, decay)
    capacity = 1 << (_CUT_BITS - _COLUMN_BITS)
    cuts, others = _alias(_share_out(weights, 1 << _CUT_BITS), capacity)
    words = [column * capacity + cut for column, cut in enumerate(cuts)]
    least = _exp_minus(decay * (width - 1) * (2 * farthest + width), 64)
    return _Table(
        farthest,
        offset_bits,
        decay,
        np.array([word >> 64 for word in words], dtype=np.uint64),
        np.array([word % 2**64 for word in words], dtype=np.uint64),
        np.array([*starts, *(starts[other] for other in others)], dtype=np.int64),
        np.uint64(max(0, least - 2 ** (offset_bits + 1))),
    )


def _blocks(width: int, farthest: int, decay: Fraction) -> tuple[list[int], list[int]]:
    """Return the starts of 2**11 blocks and their weights, exp(-start²·decay) in 2**-192.

    Along k the exponent (k·width + m)²·decay is a parabola, so that its exponentials follow
    from three by multiplication; the error stays below 2**-170.
    """
    starts: list[int] = []
    weights: list[int] = []
    bend = _exp_minus(2 * decay * width**2, _WEIGHT_BITS)
    for nearest in (0, 1):  # magnitude of the first start on this side: 0 and ~0
        weight = _exp_minus(decay * nearest**2, _WEIGHT_BITS)
        ratio = _exp_minus(decay * width * (width + 2 * nearest), _WEIGHT_BITS)
        for start in range(0, width << (_COLUMN_BITS - 1), width):
            starts.append(~start if nearest else start)
            weights.append(weight if start + nearest <= farthest else 0)
            weight = weight * ratio >> _WEIGHT_BITS
            ratio = ratio * bend >> _WEIGHT_BITS
    return starts, weights


def _share_out(weights: Sequence[int], total: int) -> list[int]:
    """Return integers that add up to ``total`` in the proportions of ``weights``.

    Rounded down; the first, which is the heaviest, gets what is left over.
    """
    whole = sum(weights)
    shares = [weight * total // whole for weight in weights]
    shares[0] += total - sum(shares)
    return shares


def _alias(shares: Sequence[int], capacity: int) -> tuple[list[int], list[int]]:
    """Cut columns of ``capacity`` so that each item fills its share of them, exactly.

    Returns for each column how much of it belongs to its own item, and the item that has the
    rest.
    """
    left = list(shares)
    others = list(range(len(left)))
    small = [item for item in others if left[item] < capacity]
    large = [item for item in others if left[item] > capacity]
    while large:
        poor, rich = small.pop(), large[-1]
        others[poor] = rich
        left[rich] -= capacity - left[poor]
        if left[rich] <= capacity:
            large.pop()
            if left[rich] < capacity:
                small.append(rich)
    # Full columns have no cut: both of their sides are the item's own.
    return [share % capacity for share in left], others


def _exp_minus(exponent: Fraction, bits: int) -> int:
    """Return exp(-exponent)·2**bits, off by less than 1.01; ``exponent`` ≥ 0."""
    if exponent > bits:
        return 0
    context = Context(prec=bits // 3 + 12)
    power = context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator))
    return int(context.multiply(context.exp(power), Decimal(1 << bits)))


def _draw(table: _Table, count: int, stream: Keystream) -> Ints:
    """Return at most ``count`` draws, and almost that many."""
    words = stream.words(count)
    columns = (words >> np.uint64(64 - _COLUMN_BITS)).view(np.int64)
    cuts = table.cuts[columns]
    beyond = words > cuts
    tied = np.flatnonzero(words == cuts)
    if tied.size:
        beyond[tied] = stream.words(tied.size) >= table.ties[columns[tied]]
    columns += beyond * np.int64(1 << _COLUMN_BITS)
    starts: Ints = table.starts[columns]
    if not table.offset_bits:
        return starts
    words = stream.words(count)
    offsets = (words >> np.uint64(64 - table.offset_bits)).view(np.int64)
    coins = words << np.uint64(table.offset_bits)
    drawn = starts ^ offsets
    keep = np.abs(drawn) <= table.tail
    asked = np.flatnonzero(coins >= table.surely)
    keep[asked] &= _accept(table, starts[asked], offsets[asked], coins[asked], stream)
    kept: Ints = drawn[keep]
    return kept


def _accept(table: _Table, starts: Ints, offsets: Ints, coins: Words, stream: Keystream) -> Bools:
    """Decide whether ``coins``, of 2**64, fall below exp(-(x² - start²)·decay)."""
    exponents = offsets * (2 * np.abs(starts) + offsets)
    gaps = np.exp(exponents * -float(table.decay)) - coins * 2.0**-64
    accepted: Bools = gaps > 0
    for unsure in np.flatnonzero(np.abs(gaps) <= _UNSURE):
        coin = int(coins[unsure]) >> table.offset_bits
        exponent = int(exponents[unsure]) * table.decay
        accepted[unsure] = _below(coin, 64 - table.offset_bits, exponent, stream)
    return accepted


def _below(coin: int, bits: int, exponent: Fraction, stream: Keystream) -> bool:
    """Decide whether a number in [0, 1) is below exp(-exponent).

    ``coin`` is its first ``bits`` binary digits; the others are drawn as they are needed.
    """
    while True:
        threshold = _exp_minus(exponent, bits)
        if coin + 1 <= threshold - 2:
            return True
        if coin >= threshold + 2:
            return False
        coin = coin << 64 | int(stream.words(1)[0])
        bits += 64
