"""Where a run stands, from its plan and its rounds: what terminal and dashboard both say.

A round is *trained* when its update is in the weights, *thrown away* when too few devices were
in its sum, and *lost* when it broke off with the process that led it. A round thrown away was
one of the plan's; a lost one is made up for by one more at the end, unless the plan samples its
cohorts (ADR 14). So what is told is how many of the planned rounds are trained, never how many
rows there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoll.federation.errors import BadPlan
from atoll.federation.plan import Plan, loads

Round = Mapping[str, Any]
"""A row of the table ``rounds``, as the API gives it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Counts of rounds; ``planned`` and ``to_come`` are none for a plan that cannot be read."""

    planned: int | None
    trained: int
    thrown_away: int
    lost: int
    to_come: int | None

    @property
    def done(self) -> int:
        """Rounds of the plan that are over, whatever came of them."""
        return self.trained + self.thrown_away

    @property
    def now(self) -> int:
        """Which of the planned rounds is under way, counting from 1."""
        return self.done + 1 if self.to_come else self.done

    def __str__(self) -> str:
        """Say it: ``3 of 4 rounds, 1 lost``."""
        of = "" if self.planned is None else f" of {self.planned}"
        noun = "round" if (self.planned or self.trained) == 1 else "rounds"
        words = [f"{self.trained}{of} {noun}"]
        if self.thrown_away:
            words.append(f"{self.thrown_away} thrown away")
        if self.lost:
            words.append(f"{self.lost} lost")
        return ", ".join(words)


def plan_of(text: str) -> Plan | None:
    """Return the plan, or none for one that this version cannot read."""
    try:
        return loads(text)
    except BadPlan:
        return None


def standing(plan: Plan | None, rounds: Sequence[Round]) -> Standing:
    """Count a run's rounds."""
    trained = sum(bool(one["survivors"]) for one in rounds)
    lost = sum(bool(one.get("lost")) for one in rounds)
    to_come = None
    if plan is not None:
        made_up = lost if plan.cohort.sampling_rate is None else 0
        to_come = max(plan.rounds + made_up - len(rounds), 0)
    return Standing(
        plan.rounds if plan else None, trained, len(rounds) - trained - lost, lost, to_come
    )


def time_left(rounds: Sequence[Round], to_come: int | None) -> float | None:
    """Return the seconds that the rounds to come will take, by the mean of those that ended.

    What devices took to evaluate in between counts in. None before there is a mean.
    """
    ended = [one for one in rounds if not one.get("lost")]
    if not ended or to_come is None:
        return None
    spent = sum(float(one["seconds"]) + (one.get("evaluate_seconds") or 0.0) for one in ended)
    return spent / len(ended) * to_come


def latest(rounds: Sequence[Round], name: str) -> Any:  # noqa: ANN401  a column's value
    """Return the newest value of a column that is known, none without any."""
    return next((one[name] for one in reversed(rounds) if one.get(name) is not None), None)


def asked(one: Round) -> int:
    """Return how many trainers a round drew."""
    drawn: int | None = one.get("drawn")
    return drawn or len(one["survivors"]) + len(one["dropped"])
