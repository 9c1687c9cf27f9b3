"""Watching a run from the command line: a bar on a terminal, a line for each change elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

from atoll.federation import plan as plans
from atoll.federation.errors import BadPlan
from atoll.server.client import NoHub
from atoll.server.tables import note, span

ENDED: Final = ("gated", "published", "rejected", "failed", "cancelled")
POLL_SECONDS: Final = 1.0
PATIENCE: Final = 60.0
"""Seconds for which a hub that is being restarted may be silent."""

TABLED: Final = ("cohort", "fairness", "spread", "spread_left_out", "turns")
"""Facts that :mod:`atoll.server.cli_cohorts` shows."""

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
    done = 0 if before is None else len(before["rounds"])
    total = rounds_of(run)
    for one in run["rounds"][done:]:
        parts = [f"round {one['round']}{f'/{total}' if total else ''}", *_facts(one)]
        parts.append(f"{len(one['survivors'])} answered, {len(one['dropped'])} dropped")
        said.append("  ".join([*parts, f"{one['seconds']:.1f} s"]))
    if run["stage"] and (before is None or before["stage"] != run["stage"]):
        said.append(f"stage: {run['stage']}")
    return said


def rounds_of(run: Run) -> int | None:
    """Return how many rounds the run's plan has; none if it cannot be read here."""
    try:
        return plans.loads(run["plan"]).rounds
    except BadPlan:
        return None


def time_left(rounds: Sequence[Run], total: int) -> float | None:
    """Return the seconds that the rounds to come will take, by the mean of those done."""
    if not rounds:
        return None
    done = sum(float(one["seconds"]) for one in rounds)
    return done / len(rounds) * max(0, total - len(rounds))


def outcome(run: Run) -> dict[str, object]:
    """Return what a run's metrics say, as names and values to print; but what has tables."""
    facts: dict[str, object] = {}
    for name, value in sorted((run["metrics"] or {}).items()):
        if name in TABLED:
            continue
        if isinstance(value, bool | int | str):
            facts[name] = value
        elif isinstance(value, float):
            facts[name] = f"{value:.4g}"
        elif isinstance(value, Mapping):
            for inner, deeper in sorted(value.items()):
                pairs = deeper.items() if isinstance(deeper, Mapping) else [("", deeper)]
                for last, number in pairs:
                    if isinstance(number, int | float):
                        facts[" ".join(filter(None, (name, inner, last)))] = f"{number:.4g}"
    return facts


class RunProgress:
    """Shows a run on standard error, as fits it: with a bar, or line by line."""

    def __init__(self) -> None:
        self._before: Run | None = None
        self._stack = ExitStack()
        self._update: Callable[[str, int, int | None], None] | None = None

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
            total = rounds_of(run)
            self._update(describe(run, total), len(run["rounds"]), total)
        self._before = run

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        progress = self._stack.enter_context(
            Progress(
                BarColumn(),
                TextColumn("{task.completed}/{task.total} rounds", markup=False),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
        )
        task = progress.add_task("", total=None)

        def update(description: str, done: int, total: int | None) -> None:
            progress.update(task, description=description, completed=done, total=total)

        self._update = update


def describe(run: Run, total: int | None) -> str:
    """Return in one line where a run stands."""
    words = [run["state"] if run["state"] != "running" else run["stage"] or "starting"]
    rounds = run["rounds"]
    if rounds:
        words += _facts(rounds[-1])
        left = time_left(rounds, total) if total else None
        if left and run["state"] == "running":
            words.append(f"about {span(left)} of training left")
    return "  ".join(words)


def _facts(one: Run) -> list[str]:
    facts = []
    if one["loss"] is not None:
        facts.append(f"loss {one['loss']:.4f}")
    if one["epsilon"] is not None:
        facts.append(f"ε {one['epsilon']:.3g}")
    return facts
