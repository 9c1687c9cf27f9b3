"""A plot in the terminal, for a person who looks on.

Without colour, so that a pipe or a file holds the same.
"""

import math
import shutil
from collections.abc import Sequence
from typing import Final

from atoll.server.tables import clean, put

_WIDEST: Final = 100
_NARROWEST: Final = 40
_ROWS: Final = 17
_TICKS: Final = 5


def put_plot(title: str, points: Sequence[tuple[float, float]], *, x_label: str) -> None:
    """Print a line through ``points``, (x, y) in the order of x and not below 0."""
    import plotext

    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = ticks(xs[0], xs[-1], 1.0), ticks(0.0, max(ys), 0.0)
    if y_ticks[-1] < max(ys):
        y_ticks.append(2 * y_ticks[-1] - y_ticks[-2])
    plotext.clear_figure()
    plotext.theme("clear")
    columns = shutil.get_terminal_size((80, 24)).columns
    plotext.plotsize(min(max(columns, _NARROWEST), _WIDEST), _ROWS)
    plotext.plot(xs, ys, marker="braille")
    plotext.ylim(0, y_ticks[-1] or 1.0)
    plotext.xticks(x_ticks, [f"{x:.10g}" for x in x_ticks])
    plotext.yticks(y_ticks, [f"{y:.10g}" for y in y_ticks])
    plotext.title(clean(title))
    plotext.xlabel(x_label)
    for line in plotext.uncolorize(plotext.build()).splitlines():
        put(line.rstrip())


def ticks(low: float, high: float, least: float) -> list[float]:
    """Return round numbers from ``low`` to ``high``, in steps of at least ``least``."""
    wanted = max((high - low) / _TICKS, least)
    if wanted <= 0:
        return [low]
    decimals = -math.floor(math.log10(wanted))
    power = 10.0**-decimals
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= wanted * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, max(decimals, 0)) for n in range(first, last + 1)]
