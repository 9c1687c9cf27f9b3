"""What the commands print: tables for people, JSON for programs.

Some of what is shown was written by devices. It is never taken as markup, and characters that
could steer a terminal are replaced.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86_400

_SPAN: Final = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[smhd])?", re.ASCII)
_UNITS: Final = {"s": 1, "m": MINUTE, "h": HOUR, "d": DAY}


def put_json(value: object) -> None:
    """Print ``value`` as JSON, indented for a person who looks on."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def put_bytes(data: bytes) -> None:
    """Print a file as it is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def put_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """Print a table, or the sentence ``empty`` when there are no rows."""
    if not rows:
        sys.stdout.write(f"{empty}\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    # In a pipe nobody is helped by columns that are cut to the width of a screen.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def put_facts(facts: Mapping[str, object]) -> None:
    """Print names and values, one pair a line; a value that is empty is left out."""
    shown = {name: clean(value) for name, value in facts.items() if value not in (None, "")}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def put(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")


def note(line: str) -> None:
    """Say something to a person that is no result: to standard error."""
    sys.stderr.write(f"{line}\n")


def clean(value: object) -> str:
    """Return ``value`` as text in which nothing steers the terminal."""
    text = "" if value is None else str(value)
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def ago(then: float | None, now: float) -> str:
    """Return how long ago a time (Unix seconds) was, in one unit."""
    if then is None:
        return "never"
    seconds = max(0.0, now - then)
    return "just now" if seconds < 5 else f"{span(seconds)} ago"


def span(seconds: float) -> str:
    """Return a duration in its largest unit."""
    for unit, size in (("d", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def labels(found: Mapping[str, str] | None) -> str:
    """Return labels as they are given on the command line."""
    return " ".join(f"{key}={value}" for key, value in sorted((found or {}).items()))


def read_span(text: str) -> float:
    """Return the seconds in ``90s``, ``30m``, ``24h``, ``7d``; raise :class:`ValueError`."""
    found = _SPAN.fullmatch(text)
    seconds = float(found["number"]) * _UNITS[found["unit"] or "s"] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"not a duration: {text!r}")
    return seconds


def device_state(device: Mapping[str, Any]) -> str:
    """Return ``revoked``, ``online`` or ``offline``."""
    if device.get("revoked_at") is not None:
        return "revoked"
    return "online" if device.get("online") else "offline"
