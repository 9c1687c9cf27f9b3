"""What every benchmark prints: one row per measured case, and whether its goal was met."""

import time
from collections.abc import Callable, Sequence

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measured case.

    ``ours`` and ``peer`` are in ``unit``; ``ratio`` says how many times better ours is, and
    ``met`` whether ours keeps to ``goal``. None where there is no such peer or goal.
    """

    case: str
    metric: str
    unit: str
    ours: float
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None
    goal: float | None = None
    met: bool | None = None


def best_of(function: Callable[[], object], repeats: int = 5) -> float:
    """Return the least seconds that a call of ``function`` took.

    The minimum, because whatever else the machine does can only add.
    """
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def report(rows: Sequence[Row], as_json: bool) -> int:  # noqa: FBT001 -- one flag, passed on
    """Print ``rows``, as a JSON list or a table; return the exit status, 1 for a missed goal."""
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
    else:
        Console().print(_table(rows))
    return int(any(row.met is False for row in rows))


def _table(rows: Sequence[Row]) -> Table:
    table = Table("case", "metric", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("ours", "goal", "peer's", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peer")
    table.add_column("met", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row.case),
            escape(row.metric),
            _number(row.ours, row.unit),
            "" if row.goal is None else _number(row.goal, row.unit),
            "" if row.peer is None else _number(row.peer, row.unit),
            "" if row.ratio is None else f"{_digits(row.ratio)}×",
            escape(row.peer_name or ""),
            {None: "", True: "yes", False: "[bold red]no[/]"}[row.met],
        )
    return table


def _number(value: float, unit: str) -> str:
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
