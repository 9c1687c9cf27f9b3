"""What a plan asks of its task, checked before anything starts."""

from collections.abc import Sequence

from atoll.federation import layout
from atoll.federation.errors import BadPlan
from atoll.federation.plan import Plan
from atoll.federation.task import Grouped, Task
from atoll.server import policy
from atoll.server.policy import Rule


def check_examples(plan: Plan, task: Task, *, charged: bool) -> None:
    """Check that a plan's promise to examples can be kept; ``charged``: there is an account.

    Raises :class:`BadPlan` without an account of theirs, and
    :class:`atoll.privacy.errors.BadParameters` for a model that mixes examples.
    """
    if plan.privacy.examples is None:
        return
    if not charged:
        raise BadPlan("[privacy.examples] needs a ledger of examples, and this run has none")
    from atoll.federation import example_privacy  # loads Opacus

    shape = layout.of(task, plan.seed, plan.layers)
    example_privacy.check(shape.model, task.input_shape)


def check_groups(task: Task, rules: Sequence[Rule]) -> None:
    """Raise :class:`BadPlan` for a gate on fairness where the task tells of no groups."""
    asking = [rule.name for rule in rules if "fairness" in policy.subjects(rule)]
    if asking and not groups_of(task):
        raise BadPlan(
            f"the gate {asking[0]!r} is about groups, and the task {task.name!r} tells of "
            "none: leave the gate out, or give the task `groups` and `group_of`"
        )


def groups_of(task: Task) -> tuple[str, ...]:
    """Return the names of the groups that a task tells of; none for a task without."""
    return task.groups if isinstance(task, Grouped) else ()
