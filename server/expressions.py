"""What can be said of a CEL expression (https://cel.dev) without evaluating it: its tree.

The library that compiles and evaluates CEL shows no tree, so the grammar of the language
definition (https://github.com/google/cel-spec, "Syntax") is read once more here, but for messages,
which that library does not evaluate either.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import cel


@dataclass(frozen=True, slots=True)
class Literal:
    """A number, a text, bytes, ``true``, ``false`` or ``null``, as it is written."""

    text: str

    @property
    def value(self) -> Any:  # noqa: ANN401 -- CEL's
        """What it stands for."""
        return cel.evaluate(self.text)


@dataclass(frozen=True, slots=True)
class Name:
    """A variable that the expression reads; what a macro of its own binds is none."""

    text: str


@dataclass(frozen=True, slots=True)
class Select:
    """``of.field``."""

    of: "Node"
    field: str


@dataclass(frozen=True, slots=True)
class Part:
    """Anything else: an operator, by its sign, or a call, by its function's name and ``()``.

    A list is ``[]``, a map ``{}``, an index ``[.]``, a choice ``?``, and ``bound`` what a macro
    binds.
    """

    kind: str
    inner: "tuple[Node, ...]" = ()


Node = Literal | Name | Select | Part


def tree(expression: str) -> Node:
    """Return the expression's tree; raise :class:`ValueError` for what is no CEL."""
    cel.compile(expression)
    try:
        return _Reader(_tokens(expression)).whole()
    except RecursionError as error:
        raise ValueError("it is too deep") from error


def walk(node: Node) -> Iterator[Node]:
    """Yield the node and all below it, in the order in which they are written."""
    waiting = [node]
    while waiting:
        found = waiting.pop()
        yield found
        if isinstance(found, Select):
            waiting.append(found.of)
        elif isinstance(found, Part):
            waiting.extend(reversed(found.inner))


def names(expression: str) -> set[str]:
    """Return the variables that it reads, but those that a macro of its own binds.

    Raises :class:`ValueError` for what is no CEL.
    """
    return {node.text for node in walk(tree(expression)) if isinstance(node, Name)}


class _Token(NamedTuple):
    kind: str
    text: str


_RAW: Final = r"[bB]?[rR](?:\"{3}.*?\"{3}|'{3}.*?'{3}|\"[^\"]*\"|'[^']*')"
_TEXT: Final = (
    r"[bB]?(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}"
    r"|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*')"
)
_NUMBER: Final = r"0[xX][0-9a-fA-F]+[uU]?|(?:\d*\.\d+|\d+)(?:[eE][+-]?\d+)?[uU]?"
_SIGN: Final = r"[=!<>]=|&&|\|\||[-+*/%!<>?:.,()\[\]{}]"
_TOKEN: Final = re.compile(
    rf"(?P<space>\s+|//[^\n]*)|(?P<text>{_RAW}|{_TEXT})|(?P<name>[A-Za-z_]\w*)"
    rf"|(?P<number>{_NUMBER})|(?P<sign>{_SIGN})",
    re.DOTALL,
)
_LEVELS: Final[Sequence[Sequence[str]]] = (
    ("||",),
    ("&&",),
    ("==", "!=", "<", "<=", ">", ">=", "in"),
    ("+", "-"),
    ("*", "/", "%"),
)
"""Operators between two, those that bind least first."""
_MACROS: Final = ("all", "exists", "exists_one", "map", "filter")
"""Those that bind their first argument in the others."""
_END: Final = _Token("end", "")


def _tokens(expression: str) -> list[_Token]:
    found, at = [], 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None or match.lastgroup is None:
            raise ValueError(f"{expression[at]!r} is not understood")
        if match.lastgroup != "space":
            found.append(_Token(match.lastgroup, match.group()))
        at = match.end()
    return [*found, _END]


class _Reader:
    """Reads tokens from left to right; each method takes one rule of the grammar."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens, self._at = tokens, 0
        self._bound: tuple[str, ...] = ()

    def whole(self) -> Node:
        found = self._choice()
        if self._next is not _END:
            raise ValueError(f"{self._next.text!r} is not understood there")
        return found

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        token = self._next
        self._at += token is not _END
        return token

    def _taken(self, text: str) -> bool:
        """Take a sign, if it is the next."""
        found = self._next.kind in ("sign", "name") and self._next.text == text
        self._at += found
        return found

    def _need(self, text: str) -> None:
        if not self._taken(text):
            raise ValueError(f"{self._next.text!r} stands where {text!r} was expected")

    def _choice(self) -> Node:
        found = self._between(0)
        if not self._taken("?"):
            return found
        yes = self._between(0)
        self._need(":")
        return Part("?", (found, yes, self._choice()))

    def _between(self, level: int) -> Node:
        if level == len(_LEVELS):
            return self._unary()
        found = self._between(level + 1)
        while sign := next((one for one in _LEVELS[level] if self._taken(one)), None):
            found = Part(sign, (found, self._between(level + 1)))
        return found

    def _unary(self) -> Node:
        if self._taken("!"):
            return Part("!", (self._unary(),))
        if self._taken("-"):
            number = self._next.kind == "number"
            found = self._unary()
            if number and isinstance(found, Literal):
                return Literal(f"-{found.text}")
            return Part("-", (found,))
        return self._member()

    def _member(self) -> Node:
        found = self._primary()
        while True:
            if self._taken("."):
                name = self._name()
                found = self._call(name, (found,)) if self._taken("(") else Select(found, name)
            elif self._taken("["):
                found = Part("[.]", (found, self._choice()))
                self._need("]")
            else:
                return found

    def _primary(self) -> Node:
        if self._taken("("):
            found = self._choice()
            self._need(")")
            return found
        if self._taken("["):
            return Part("[]", self._listed("]"))
        if self._taken("{"):
            return Part("{}", self._listed("}"))
        if self._next.kind in ("text", "number"):
            return Literal(self._take().text)
        dot = "." if self._taken(".") else ""
        name = self._name()
        if name in ("true", "false", "null"):
            return Literal(name)
        if self._taken("("):
            return self._call(name, ())
        return Part("bound") if name in self._bound else Name(dot + name)

    def _call(self, name: str, target: tuple[Node, ...]) -> Node:
        bound = self._bound
        if target and name in _MACROS and self._next.kind == "name":
            self._bound = (*bound, self._next.text)
        found = Part(f"{name}()", target + self._listed(")"))
        self._bound = bound
        return found

    def _listed(self, end: str) -> tuple[Node, ...]:
        """Take what commas separate, and in a map colons, up to its end."""
        found: list[Node] = []
        while not self._taken(end):
            found.append(self._choice())
            if end == "}":
                self._need(":")
                found.append(self._choice())
            if not self._taken(","):
                self._need(end)
                break
        return tuple(found)

    def _name(self) -> str:
        if self._next.kind != "name":
            raise ValueError(f"{self._next.text!r} stands where a name was expected")
        return self._take().text
