"""The rules that a plan brings along, on cohort and candidate, checked before it runs."""

from atoll.federation.plan import Plan
from atoll.server import cohort_rule, policy


def check(plan: Plan) -> None:
    """Raise :class:`atoll.server.errors.BadInput` for a rule that cannot be meant so."""
    if plan.cohort.rule is not None:
        cohort_rule.check(plan.cohort.rule)
    for rule in policy.rules_of(plan):
        policy.check(rule)
