"""Watching a run from the command line: a bar on a terminal, a line for each change elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Final, Self

from atoll.server.client import NoHub
from atoll.server.progress import Standing, asked, latest, plan_of, standing, time_left
from atoll.server.tables import note, put_table, span
from atoll.server.web_format import size

ENDED: Final = ("gated", "published", "rejected", "failed", "cancelled")
POLL_SECONDS: Final = 1.0
PATIENCE: Final = 60.0
"""Seconds for which a hub that is being restarted may be silent."""
MOMENT: Final = 2.0
"""Seconds that something may take before a person is told how far it is."""
BETWEEN: Final = 10.0
"""Seconds between two lines of what goes on for long."""

TABLED: Final = ("cohort", "fairness", "spread", "spread_left_out", "turns")
"""Facts that :mod:`atoll.server.cli_cohorts` shows."""

_SPENT: Final = ("epsilon", "delta")

Run = Mapping[str, Any]


def follow(
    look: Callable[[], Run],
    show: Callable[[Run], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Look at a run until it has ended, showing it each time; return it.

    Raises :class:`NoHub` after :data:`PATIENCE` seconds of silence.
    """
    heard = clock()
    while True:
        try:
            run = look()
        except NoHub:
            if clock() - heard > PATIENCE:
                raise
        else:
            heard = clock()
            show(run)
            if run["state"] in ENDED:
                return run
        sleep(POLL_SECONDS)


def lines(before: Run | None, run: Run) -> list[str]:
    """Return what has changed since ``before``, a line each."""
    said = []
    if before is None or before["state"] != run["state"]:
        said.append(f"{run['state']}{': ' + run['reason'] if run['reason'] else ''}")
    known = {} if before is None else {one["round"]: one for one in before["rounds"]}
    for place, one in enumerate(run["rounds"]):
        told = known.get(one["round"])
        if told is None:
            said.append(f"round {_number(run, place)}  {'  '.join(facts(one))}")
        elif told.get("accuracy") is None and one.get("accuracy") is not None:
            said.append(f"round {_number(run, place)}  accuracy {one['accuracy']:.1%}")
    if run["stage"] and (before is None or before["stage"] != run["stage"]):
        said.append(f"stage: {run['stage']}")
    return said


def standing_of(run: Run) -> Standing:
    """Count the run's rounds."""
    return standing(plan_of(run["plan"]), run["rounds"])


def facts(one: Run) -> list[str]:
    """Return what is known of a round: loss, accuracy, ε, participation, bytes, time."""
    if one.get("lost"):
        return ["lost: it broke off"]
    said = []
    if one["loss"] is not None:
        said.append(f"loss {one['loss']:.4f}")
    if one.get("accuracy") is not None:
        said.append(f"accuracy {one['accuracy']:.1%}")
    if one["epsilon"] is not None:
        said.append(f"ε {one['epsilon']:.3g}")
    said.append(f"{len(one['survivors'])} of {asked(one)} devices")
    if not one["survivors"]:
        said.append("thrown away")
    if one.get("bytes_up") is not None:
        said.append(f"{size(one['bytes_up'])} up, {size(one['bytes_down'])} down")
    return [*said, f"{one['seconds']:.1f} s"]


def outcome(run: Run) -> dict[str, object]:
    """Return what a run's metrics say, as names and values to print; but what has tables.

    What the population has spent is told once, as ``ε``, wherever the metrics have it.
    """
    metrics = run["metrics"] or {}
    facts: dict[str, object] = {}
    if (spent := metrics.get("epsilon")) is not None:
        delta = metrics.get("delta")
        facts["ε"] = f"{spent:.3g}" + (f" at δ = {delta:g}" if delta is not None else "")
    for name, value in sorted(metrics.items()):
        if name in TABLED or name in _SPENT:
            continue
        if isinstance(value, bool | int | float | str):
            facts[name] = _number_of(value)
        elif isinstance(value, Mapping):
            for inner, deeper in sorted(value.items()):
                if name == "privacy" and inner in _SPENT:
                    continue
                pairs = deeper.items() if isinstance(deeper, Mapping) else [("", deeper)]
                for last, number in pairs:
                    if isinstance(number, int | float):
                        facts[" ".join(filter(None, (name, inner, last)))] = _number_of(number)
    return facts


def _number_of(value: float | str) -> object:
    """Return whole numbers in full, and others to four digits."""
    if isinstance(value, bool | str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def put_rounds(run: Run) -> None:
    """Print a run's rounds."""
    put_table(
        ["Round", "Seconds", "In the sum", "Loss", "Accuracy", "ε", "Up", "Down", ""],
        [_row(done) for done in run["rounds"]],
        "No round is done yet.",
    )


@contextmanager
def counting(
    what: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """Yield what is to be called with how many are done and of how many, as ``what`` goes on.

    It says nothing in the first :data:`MOMENT` seconds; then there is a bar on a terminal, and
    elsewhere a line at once and after each further :data:`BETWEEN` seconds.
    """
    due = clock() + MOMENT
    with ExitStack() as stack:
        bar: Callable[[int, int], None] | None = None

        def heard(done: int, total: int) -> None:
            nonlocal bar, due
            if bar is not None:
                bar(done, total)
            elif clock() < due:
                return
            elif sys.stderr.isatty():
                bar = _counting_bar(what, stack)
                bar(done, total)
            else:
                due = clock() + BETWEEN
                note(f"{what}: {done:,} of {total:,}")

        yield heard


def _counting_bar(what: str, stack: ExitStack) -> Callable[[int, int], None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,}/{task.total:,} {task.description}", markup=False),
        TimeRemainingColumn(),
    )
    progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
    task = progress.add_task(what, total=1)
    return lambda done, total: progress.update(task, completed=done, total=total)


class RunProgress:
    """Shows a run on standard error, as fits it: with a bar, or line by line."""

    def __init__(self) -> None:
        self._before: Run | None = None
        self._stack = ExitStack()
        self._update: Callable[[str, str, int, int | None], None] | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._start_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def show(self, run: Run) -> None:
        """Show the run as it is now."""
        if self._update is None:
            for line in lines(self._before, run):
                note(line)
        else:
            where = standing_of(run)
            self._update(*describe(run), where.done, where.planned)
        self._before = run

    def _start_bar(self) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text

        progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} rounds", markup=False),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        task = progress.add_task("", total=None)
        live = self._stack.enter_context(Live(progress, console=Console(stderr=True)))

        def update(head: str, last: str, done: int, total: int | None) -> None:
            progress.update(task, description=head, completed=done, total=total)
            # Below the bar, where it may take lines of its own on a narrow terminal.
            live.update(Group(progress, Text(last)) if last else progress)

        self._update = update


def describe(run: Run) -> tuple[str, str]:
    """Return where a run stands, and what is known of its last round; a line each."""
    words = [run["state"] if run["state"] != "running" else run["stage"] or "starting"]
    rounds = run["rounds"]
    if not rounds:
        return words[0], ""
    where = standing_of(run)
    if where.lost:
        words.append(f"{where.lost} lost")
    left = time_left(rounds, where.to_come)
    if left and run["state"] == "running":
        words.append(f"about {span(left)} of training left")
    last = facts(rounds[-1])
    known = latest(rounds, "accuracy")
    if rounds[-1].get("accuracy") is None and known is not None:
        last.append(f"accuracy {known:.1%} before")
    return "  ".join(words), "  ".join(last)


def _number(run: Run, place: int) -> str:
    """Name the round in the given place of the run's rounds: ``2/3`` of those planned.

    Lost rounds and those that make up for them are counted as one.
    """
    plan = plan_of(run["plan"])
    if plan is None:
        return str(run["rounds"][place]["round"])
    before = sum(not one.get("lost") for one in run["rounds"][:place])
    return f"{before + 1}/{plan.rounds}"


def _row(done: Mapping[str, Any]) -> list[object]:
    """Return the cells of a round; what is not known of it is a dash."""
    known = {
        name: form(done[name]) if done.get(name) is not None else "–"
        for name, form in (
            ("loss", "{:.4f}".format),
            ("accuracy", "{:.1%}".format),
            ("epsilon", "{:.3g}".format),
            ("bytes_up", size),
            ("bytes_down", size),
        )
    }
    lost = "lost" if done.get("lost") else ""
    return [
        done["round"],
        f"{done['seconds']:.1f}",
        f"{len(done['survivors'])} of {asked(done)}",
        *known.values(),
        lost if done["survivors"] or lost else "thrown away",
    ]
