"""How the dashboard says things: words for times, sizes and numbers, tones for states.

Every state is shown as a word, a shape and a tone, and every word has one tone wherever it
stands; :data:`TONES` is the whole list.
"""

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final, Literal

Tone = Literal["ok", "busy", "wait", "warn", "bad", "idle"]

_WORDS: Final[Mapping[Tone, str]] = {
    "ok": "ok online serving done published stable passed",
    "busy": "running fetching checking canary rolling",
    "wait": "proposed approved gated too-few-rows open",
    "warn": "offline warning rolled-back",
    "bad": "failed rejected halted drifted error revoked broken over-budget",
    "idle": "idle later waiting info cancelled superseded acknowledged closed none unnoised",
}

TONES: Final[Mapping[str, Tone]] = {
    word: tone for tone, words in _WORDS.items() for word in words.split()
}

LABELS: Final[Mapping[str, str]] = {
    "gated": "waits for signing",
    "proposed": "waits for approval",
    "rejected": "rejected by a gate",
    "too-few-rows": "too few rows",
    "rolled-back": "rolled back",
    "unnoised": "no noise",
    "over-budget": "over budget",
}
"""Words for people where the stored one is short for programs."""

_MINUTE: Final = 60
_HOUR: Final = 3600
_DAYS: Final = 172_800
_KIB: Final = 1024
_NONE: Final = "–"


def tone(word: str) -> Tone:
    """Return the tone of a state; one that is not known is shown without emphasis."""
    return TONES.get(word, "idle")


def label(word: str) -> str:
    """Return the words for a state."""
    return LABELS.get(word, word)


def ago(at: float | None, now: float) -> str:
    """Return ``3 min ago`` or ``in 2 h``; ``never`` for none."""
    if at is None:
        return "never"
    seconds = abs(now - at)
    if seconds < 5:
        return "now"
    if seconds < _MINUTE:
        text = f"{int(seconds)} s"
    elif seconds < _HOUR:
        text = f"{int(seconds // _MINUTE)} min"
    elif seconds < _DAYS:
        text = f"{int(seconds // _HOUR)} h"
    else:
        text = f"{int(seconds // 86_400)} days"
    return f"{text} ago" if now >= at else f"in {text}"


def moment(at: float | None) -> str:
    """Return the time in UTC, to the second."""
    return _NONE if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    """Return ``4.2 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds is None:
        return _NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def size(count: float | None) -> str:
    """Return a number of bytes with a binary unit."""
    if count is None:
        return _NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < _KIB:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= _KIB
    return f"{count:.1f} TiB"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share of one in percent, with a space that does not break."""
    return _NONE if share is None else f"{100 * share:.{digits}f}\u202f%"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits; ``∞`` for infinity."""
    if value is None or math.isnan(value):
        return _NONE
    if math.isinf(value):
        return "∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    if float(value).is_integer():
        return f"{int(value)}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(digits - whole, 0) if whole else digits}f}"


FILTERS: Final[Mapping[str, Callable[..., str]]] = {
    "tone": tone,
    "label": label,
    "moment": moment,
    "duration": duration,
    "size": size,
    "percent": percent,
    "num": number,
}
"""The filters of the templates."""
