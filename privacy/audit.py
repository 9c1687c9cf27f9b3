"""A lower bound on ε from an attack that worked, to hold against the ε that was accounted.

Accounting proves what a mechanism on paper leaks at most; an audit measures what the program
leaks at least. It plants canaries, each of them in the data with probability one half, and an
attacker who sees the output guesses which. More right guesses than (ε, δ) allows refute that ε.

By Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023),
theorem 5.2 and appendix D: all canaries go through one run. Under (ε, δ)-privacy the number of
right guesses is at most that of as many coins of e^ε/(1 + e^ε), but for a part that grows with
the number of canaries times δ. The bound holds whatever the attack; a weak attack makes it low.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from atoll.privacy.errors import BadParameters

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Guesses:
    """What became of an attack: ``correct`` of ``made`` guesses, on ``canaries`` in all."""

    canaries: int
    made: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.made <= self.canaries:
            raise BadParameters(
                f"{self.correct} right guesses of {self.made} on {self.canaries} canaries"
            )


def guess(scores: Floats, included: Bools, made: int) -> Guesses:
    """Guess that the highest of ``scores`` ``(m,)`` were ``included`` and the lowest were not.

    Half of the ``made`` guesses each; the canaries between get none. ``made`` must be chosen
    without looking at ``included``, or the bound does not hold.
    """
    if scores.shape != included.shape or scores.ndim != 1:
        raise BadParameters(f"scores {scores.shape} for canaries {included.shape}")
    if not 0 <= made <= scores.size:
        raise BadParameters(f"{made} guesses cannot be made on {scores.size} canaries")
    order = np.argsort(scores, kind="stable")
    lowest, highest = order[: made // 2], order[scores.size - (made - made // 2) :]
    correct = np.count_nonzero(~included[lowest]) + np.count_nonzero(included[highest])
    return Guesses(scores.size, made, int(correct))


def p_value(seen: Guesses, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of so many right guesses under (ε, δ)-privacy."""
    if not 0 <= epsilon < math.inf:
        raise BadParameters(f"epsilon {epsilon} must be finite and not negative")
    if not 0 <= delta <= 1:
        raise BadParameters(f"delta {delta} must be a probability")
    # log of e^ε/(1 + e^ε) and of its complement, at any ε.
    right = -math.log1p(math.exp(-epsilon))
    wrong = right - epsilon
    k = np.arange(seen.made + 1)
    coins = np.exp(_log_choose(seen.made) + k * right + (seen.made - k) * wrong)
    fewer = np.cumsum(coins[: seen.correct][::-1])  # P[v > K ≥ v - i] for i = 1, 2, …
    excess = float((fewer / np.arange(1, seen.correct + 1)).max(initial=0.0))
    return min(1.0, float(coins[seen.correct :].sum()) + 2 * seen.canaries * delta * excess)


def epsilon_at_least(seen: Guesses, delta: float, confidence: float = 0.95) -> float:
    """Return the largest ε that ``seen`` refutes at ``delta``, to 1e-6; 0 if it refutes none.

    A mechanism that is (ε, δ)-private yields more than its ε with probability at most
    1 - ``confidence``.
    """
    if not 0 < confidence < 1:
        raise BadParameters(f"confidence {confidence} must be between 0 and 1")
    low, high = 0.0, 1.0
    while p_value(seen, high, delta) < 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        if p_value(seen, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


@lru_cache(maxsize=4)
def _log_choose(n: int) -> Floats:
    """Return log(n choose k) for k = 0, …, n."""
    factorials = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    logarithms: Floats = factorials[-1] - factorials - factorials[::-1]
    return logarithms
