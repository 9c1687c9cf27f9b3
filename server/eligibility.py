"""Whom a plan's ``cohort.rule`` leaves out now, by what the hub knows of its devices.

The rule's language is :mod:`atoll.server.cohort_rule`'s, what is known
:mod:`atoll.server.device_facts`'.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from atoll.federation.plan import Plan
from atoll.federation.selection import LeftOut
from atoll.server import cohort_rule, device_facts
from atoll.server.store import Store

LISTED: Final = 200
"""Devices that a run lists as left out; of more, their number alone is told."""

Reasons = Callable[[], Mapping[str, str]]
"""Says which devices may not train now, and why."""


def left_out(store: Store, plan: Plan, now: float, fresh: float) -> dict[str, str]:
    """Return which devices the plan's rule leaves out at ``now`` (Unix seconds), and why.

    What a device told more than ``fresh`` seconds ago is not known.
    """
    rule = plan.cohort.rule
    if rule is None:
        return {}
    with store.read() as connection:
        known = device_facts.of_fleet(
            connection, plan.model, cohort_rule.named(rule), now=now, fresh=fresh
        )
    return cohort_rule.left_out(rule, known)


def noted(
    rule: str | None,
    look_up: Reasons | None,
    trainers: Sequence[str],
    note: Callable[[dict[str, Any]], None],
) -> LeftOut | None:
    """Return what says which ``trainers`` may not train now, if there is a rule and who knows.

    ``note`` is given the run's fact ``cohort`` whenever it changes.
    """
    if rule is None or look_up is None:
        return None
    before: dict[str, Mapping[str, str]] = {}

    def look() -> Collection[str]:
        found = {name: why for name, why in look_up().items() if name in trainers}
        if before.get("now") != found:
            before["now"] = found
            note(
                {
                    "rule": rule,
                    "trainers": len(trainers),
                    "eligible": len(trainers) - len(found),
                    "left_out": dict(list(found.items())[:LISTED]),
                }
            )
        return found

    return look
