"""The names of the aggregation rules, apart from them: whoever reads a plan need not load them."""

from typing import Final, Literal, get_args

Rule = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "norm-bound"]

RULES: Final[tuple[Rule, ...]] = get_args(Rule)

_PER_LIAR: Final[dict[Rule, tuple[int, int]]] = {
    "mean": (0, 1),
    "median": (2, 1),
    "trimmed-mean": (2, 1),
    "krum": (2, 3),
    "multi-krum": (2, 3),
    "bulyan": (4, 3),
    "norm-bound": (2, 1),
}


def needed(rule: Rule, byzantine: int) -> int:
    """Return how many updates ``rule`` asks for when ``byzantine`` of them may be anything."""
    times, more = _PER_LIAR[rule]
    return times * byzantine + more
