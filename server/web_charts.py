"""Small drawings as numbers: what the templates put into SVG, and what uPlot draws.

Nothing here knows HTML; a drawing's text alternative is the template's business.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WIDTH = 100.0
HEIGHT = 32.0


class Bar(NamedTuple):
    """A bar in a drawing of :data:`WIDTH` × :data:`HEIGHT`, y downwards."""

    x: float
    y: float
    width: float
    height: float


def bars(histograms: Sequence[Sequence[int]]) -> list[list[Bar]]:
    """Return the bars of histograms over the same bins, as shares on one common scale.

    An empty histogram has no bars. Many bins are drawn without gaps.
    """
    shares = [
        [count / total for count in histogram] if (total := sum(histogram)) else []
        for histogram in histograms
    ]
    top = max((share for histogram in shares for share in histogram), default=0.0)
    return [_bars(histogram, top) for histogram in shares]


def _bars(shares: Sequence[float], top: float) -> list[Bar]:
    if not shares or top <= 0:
        return []
    step = WIDTH / len(shares)
    width = step * (0.86 if step > 3 else 1.0)
    return [
        Bar(round(i * step, 2), round(HEIGHT * (1 - s / top), 2), round(width, 2), h)
        for i, s in enumerate(shares)
        if (h := round(HEIGHT * s / top, 2)) > 0
    ]


def plot(
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str,
    from_zero: bool = False,
    whole: bool = False,
) -> str:
    """Return the JSON that ``atoll.js`` hands to uPlot; what is not finite becomes a gap.

    ``from_zero`` lets the axis begin there; ``whole`` marks it at whole numbers alone.
    """
    lines = [
        {"label": name, "y": [v if v is not None and math.isfinite(v) else None for v in values]}
        for name, values in series.items()
    ]
    axes = {"x_label": x_label, "from_zero": from_zero, "whole": whole}
    return json.dumps(
        {"x": list(x), "series": lines} | axes,
        separators=(",", ":"),
        allow_nan=False,
    )
