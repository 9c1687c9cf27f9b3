"""Whether a candidate may go on to be signed: named rules over typed facts, in CEL.

The rules are in the Common Expression Language (https://cel.dev), so a person who is to answer for
a release can read and change them. They fail closed: a rule passes only when it evaluates to
``true``; a missing fact, a type error, NaN or a rule that does not parse is a failure that
says so. All numbers among the facts are doubles, so rules write ``1.0``.

A plan may add rules of its own (``[gates]``); none takes one away.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import cel

from atoll.federation.plan import Plan
from atoll.server import expressions
from atoll.server.errors import BadInput

_NAMED: Final = re.compile(r"[a-z_]\w*(?:\.[a-z_]\w*)+")


class Rule(NamedTuple):
    """A rule by name; ``expression`` is CEL and must come out as ``true``."""

    name: str
    expression: str


class Verdict(NamedTuple):
    """What a rule said; ``detail`` names the facts, or why it could not be evaluated."""

    name: str
    passed: bool
    rule: str
    detail: str

    def plain(self) -> dict[str, str | bool]:
        """Return the verdict as JSON-able data."""
        return dict(self._asdict())


RULES: Final[Sequence[Rule]] = (
    Rule("rounds trained", "rounds.trained >= 1.0"),
    Rule("devices evaluated", "devices.evaluated >= devices.asked / 2.0"),
    Rule("better than chance", "accuracy.known.int8 >= 2.0 / model.classes"),
    Rule(
        "int8 within one point",
        "accuracy.all.float - accuracy.all.int8 < 0.01"
        " && accuracy.all.int8 - accuracy.all.float < 0.01",
    ),
    Rule(
        "int8 within one point, known people",
        "accuracy.known.float - accuracy.known.int8 < 0.01"
        " && accuracy.known.int8 - accuracy.known.float < 0.01",
    ),
    Rule("export keeps the answers", "model.export_changed <= 0.002"),
    Rule("golden check holds", "golden.worst <= golden.tolerance"),
    Rule("golden check can fail", "golden.tolerance <= 0.25 * golden.spread"),
    Rule("privacy budget", "!has(privacy.budget) || privacy.epsilon <= privacy.budget"),
)

WHOLE: Final = Rule("no layers stay on devices", "layers.local == 0.0")
"""What a model must come up to before there is one: of layers that stay, the hub has none."""


def judge(facts: Mapping[str, Any], rules: Iterable[Rule] = RULES) -> list[Verdict]:
    """Evaluate every rule over ``facts``, nested mappings of numbers, strings and booleans."""
    context = {name: _doubles(value) for name, value in facts.items()}
    return [_verdict(rule, context) for rule in rules]


FACTS: Final = frozenset(
    {
        *("accuracy", "by_device", "cohort", "confusion", "delta", "devices", "epsilon"),
        *("fairness", "fine_tuned", "golden", "layers", "loss", "model", "privacy", "profile"),
        *("rounds", "rows"),
        *("spread", "spread_left_out", "turns"),
    }
)
"""What a rule may be about: the names of a run's facts."""


def rules_of(plan: Plan) -> list[Rule]:
    """Return the rules that a plan adds."""
    return [Rule(name, expression) for name, expression in plan.gates.items()]


def check(rule: Rule) -> None:
    """Raise :class:`BadInput` for a rule that no candidate could ever pass."""
    unknown = sorted(subjects(rule) - FACTS)
    if unknown:
        raise BadInput(
            f"the gate {rule.name!r} is about {unknown[0]!r}, which is no fact of a run",
            f"there are: {', '.join(sorted(FACTS))}",
        )


def subjects(rule: Rule) -> set[str]:
    """Return the names of the facts that a rule is about; raise :class:`BadInput` if it has none.

    That is, if it is no CEL. Names that a macro binds are not among them.
    """
    try:
        return expressions.names(rule.expression)
    except ValueError as error:
        raise BadInput(
            f"the gate {rule.name!r} is no CEL expression: {error}", "see https://cel.dev"
        ) from error


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Tell whether every rule passed and there was one."""
    return bool(verdicts) and all(verdict.passed for verdict in verdicts)


def _verdict(rule: Rule, context: dict[str, Any]) -> Verdict:
    try:
        program = cel.compile(rule.expression)
        found = program.execute(context)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        why = f"cannot be evaluated: {error}"
        return Verdict(rule.name, passed=False, rule=rule.expression, detail=why)
    named = dict.fromkeys(_NAMED.findall(rule.expression))
    said = [f"{path} = {value:.6g}" for path in named if (value := _at(context, path)) is not None]
    return Verdict(rule.name, passed=found is True, rule=rule.expression, detail=", ".join(said))


def _at(context: Mapping[str, Any], path: str) -> float | None:
    """Return the number that a dotted name stands for, if it is one."""
    found: Any = context
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, float) else None


def _doubles(value: Any) -> Any:  # noqa: ANN401 -- JSON in, JSON out
    if isinstance(value, Mapping):
        return {name: _doubles(inner) for name, inner in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
