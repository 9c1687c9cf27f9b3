"""What can be said of a CEL expression (https://cel.dev) without evaluating it."""

import re
from typing import Final

import cel

STRING: Final = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'')
_BOUND: Final = re.compile(r"\.(?:all|exists|exists_one|map|filter)\(\s*([A-Za-z_]\w*)\s*,")


def bare(expression: str) -> str:
    """Return the expression with its strings emptied, so that no name is read out of one."""
    return STRING.sub('""', expression)


def names(expression: str) -> set[str]:
    """Return the variables that it reads, but those that a macro of its own binds.

    Raises :class:`ValueError` for what is no CEL.
    """
    return set(cel.compile(expression).variables()) - set(_BOUND.findall(bare(expression)))
