"""Telling a person what a long program is doing: numbered steps with a live line each."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Say = Callable[[str], None]


class Steps:
    """Numbered steps on a console; on a terminal the current one shows what it is at.

    Off a terminal (a log, CI) each step is two plain lines, without control characters.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._total = total
        self._number = 0

    @contextmanager
    def step(self, title: str) -> Iterator[Say]:
        """Show a step while the block runs; what it yields replaces the detail beside the title."""
        self._number += 1
        mark = f"[{self._number}/{self._total}]".replace("[", r"\[")
        began = time.monotonic()
        last = ""

        def say(detail: str) -> None:
            nonlocal last
            last = detail
            seconds = time.monotonic() - began
            status.update(f"[bold]{mark} {title}[/bold] [dim]{seconds:3.0f} s[/dim]  {detail}")

        if not self.console.is_terminal:
            self.console.print(f"{mark} {title} …", highlight=False)
        with self.console.status(f"[bold]{mark} {title}[/bold]") as status:
            yield say
        self.seconds[title] = time.monotonic() - began
        self.console.print(
            f"[green]✓[/green] [bold]{mark} {title}[/bold] "
            f"[dim]{self.seconds[title]:.1f} s[/dim]  {last}",
            highlight=False,
        )
