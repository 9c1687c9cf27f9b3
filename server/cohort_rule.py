"""Which devices a plan's ``cohort.rule`` lets train: CEL over typed facts about each device.

    device.power == "mains" && device.rows >= 256 && !device.drifted

Rules fail closed. A device may train only where the rule comes out as ``true``; and a fact that
the rule names and that is not known of a device leaves it out, unless the rule asks for it by
``has(device.…)``. :func:`check` finds what can be found before a run: a name that is no fact, a
word that a fact never is, types that do not go together. What is known of devices, and since
when, is :mod:`atoll.server.device_facts`'.
"""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import cel

from atoll.server import expressions
from atoll.server.errors import BadInput
from atoll.server.expressions import Literal, Name, Node, Part, Select

Known = Mapping[str, Any]
"""What is known of one device, by the name of the fact."""


class Fact(NamedTuple):
    """A fact's type, and the words that it may be if these are all."""

    kind: type
    words: tuple[str, ...] = ()


FACTS: Final[Mapping[str, Fact]] = MappingProxyType(
    {
        "power": Fact(str, ("mains", "battery")),
        "network": Fact(str, ("wired", "wifi", "cellular")),
        "accelerator": Fact(str, ("none", "cuda", "rocm", "edge-tpu", "hailo", "npu")),
        "rows": Fact(int),
        "drift": Fact(str, ("unwatched", "too-few-rows", "stable", "drifted")),
        "drifted": Fact(bool),
        "state": Fact(str, ("idle", "fetching", "checking", "serving", "failed")),
        "model": Fact(str),
        "release": Fact(int),
        "took_part": Fact(int),
        "labels": Fact(dict),
    }
)
"""What a rule may name of a device; docs/federation.md says what each means."""

_WITNESSES: Final[Mapping[type, tuple[Any, ...]]] = MappingProxyType(
    {str: ("", "x"), int: (0, 2**31), bool: (False, True), dict: ({},)}
)
"""Values that stand for all of a type when a rule is tried out."""

_DEVICE: Final = Name("device")
_FAILED: Final = (ValueError, TypeError, RuntimeError, KeyError)


def check(rule: str) -> None:
    """Raise :class:`BadInput`, naming what is at fault, for a rule that cannot be meant so."""
    program, nodes = _compiled(rule)
    others = sorted({node.text for node in nodes if isinstance(node, Name)} - {_DEVICE.text})
    if others:
        raise _bad(f"{others[0]!r} is nothing that a rule can name", "its facts are device.…")
    facts = [name for name in map(_fact, nodes) if name is not None]
    if nodes.count(_DEVICE) > len(facts):
        raise _bad("`device` stands alone", "name its facts as device.power and so on")
    for name in facts:
        if name not in FACTS:
            raise _bad(f"'device.{name}' is no fact", f"the facts are {', '.join(FACTS)}")
    for node in nodes:
        for name, literal in _compared(node):
            _check_literal(name, literal)
    _try_out(program, list(dict.fromkeys(facts)))


def left_out(rule: str, known: Mapping[str, Known]) -> dict[str, str]:
    """Return which devices may not train, and why, of those of which something is ``known``."""
    (program, nodes), names = _compiled(rule), named(rule)
    asked = {
        _fact(node.inner[0]) for node in nodes if isinstance(node, Part) and node.kind == "has()"
    }
    needed = [name for name in names if name not in asked]
    judged: dict[str, str | None] = {}  # many devices are alike, and CEL takes its time
    found = {}
    for device, facts in known.items():
        alike = repr(facts)
        if alike not in judged:
            judged[alike] = _why_not(program, needed, names, facts)
        why = judged[alike]
        if why is not None:
            found[device] = why
    return found


def named(rule: str) -> list[str]:
    """Return the facts that a rule names, in its order."""
    _, nodes = _compiled(rule)
    return list(dict.fromkeys(name for name in map(_fact, nodes) if name is not None))


def _fact(node: Node) -> str | None:
    """Return which fact the node is, if it is ``device.…``."""
    return node.field if isinstance(node, Select) and node.of == _DEVICE else None


def _compared(node: Node) -> list[tuple[str, Literal]]:
    """Return the facts that a node compares with literals, and which."""
    if not isinstance(node, Part) or len(node.inner) != 2:
        return []
    pairs: list[tuple[Node, Node]] = []
    left, right = node.inner
    if node.kind in ("==", "!="):
        pairs = [(left, right), (right, left)]
    elif node.kind == "in" and isinstance(right, Part) and right.kind == "[]":
        pairs = [(left, each) for each in right.inner]
    return [
        (name, other)
        for one, other in pairs
        if (name := _fact(one)) is not None and isinstance(other, Literal)
    ]


def _why_not(program: cel.Program, needed: list[str], shown: list[str], facts: Known) -> str | None:
    missing = [name for name in needed if name not in facts]
    if missing:
        return f"device.{missing[0]} is not known"
    try:
        allowed = program.execute({"device": dict(facts)})
    except _FAILED as error:
        return f"the rule cannot be evaluated: {error}"
    if allowed is True:
        return None
    return ", ".join(_said(name, facts[name]) for name in shown if name in facts) or "by the rule"


def _said(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        inner = " ".join(f"{key}={each}" for key, each in sorted(value.items()))
        return f"device.{name} = {inner or 'none'}"
    words = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    return f"device.{name} = {words or value}"


def _compiled(rule: str) -> tuple[cel.Program, Sequence[Node]]:
    """Return what evaluates a rule, and all nodes of its tree."""
    try:
        return cel.compile(rule), list(expressions.walk(expressions.tree(rule)))
    except ValueError as error:
        raise _bad(f"no CEL expression: {error}", "see https://cel.dev") from error


def _check_literal(name: str, literal: Literal) -> None:
    fact, value = FACTS[name], literal.value
    numbers = fact.kind is int and isinstance(value, float)  # CEL compares them by value
    if type(value) is not fact.kind and not numbers:
        raise _bad(
            f"'device.{name}' is compared with {literal.text}, and it is {_TYPES[fact.kind]}",
            "compare it with one",
        )
    if fact.words and value not in fact.words:
        raise _bad(
            f"'device.{name}' is never {literal.text}", f"it is one of {', '.join(fact.words)}"
        )


def _try_out(program: cel.Program, names: list[str]) -> None:
    """Raise :class:`BadInput` if some values of the facts have no meaning in the rule."""
    values = [FACTS[name].words[:2] or _WITNESSES[FACTS[name].kind] for name in names]
    for made in itertools.product(*values):
        try:
            found = program.execute({"device": dict(zip(names, made, strict=True))})
        except KeyError:
            continue  # a label that no device need carry
        except (ValueError, TypeError, RuntimeError) as error:
            about = ", ".join(f"device.{name}" for name in names) or "no fact"
            raise _bad(f"it cannot be evaluated ({about}): {error}", "mend it") from error
        if not isinstance(found, bool):
            raise _bad(f"it comes out as {found!r}", "it must come out as true or false")


_TYPES: Final = {str: "text", int: "a whole number", bool: "true or false", dict: "a map"}


def _bad(what: str, remedy: str) -> BadInput:
    return BadInput(f"the plan cannot be run: cohort.rule: {what}", remedy)
