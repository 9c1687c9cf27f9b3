"""How a device is watched, as pure rules: what is compared, how it is judged, what follows.

A device is compared with itself: the first :attr:`Rules.baseline_rows` rows that it served
under a release against its latest :attr:`Rules.current_rows`. :mod:`atoll.server.watch` reads
and writes the tables around these rules.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from atoll.fleet.counts import Counts, merge
from atoll.fleet.drift import ALPHA, MIN_EFFECT, MIN_ROWS, DeviceVerdict, State, assess_device
from atoll.fleet.profile import Profile

NAMED: Final = 3
"""How many drifted variables an alert names."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How many rows are compared, and how strictly; see :mod:`atoll.fleet.drift`.

    The defaults judge a device after a few hundred rows, at thresholds that fit so few. They
    take the baseline for typical: where a device sees one thing for long, make it larger.
    """

    baseline_rows: int = 64
    current_rows: int = 128
    alpha: float = ALPHA
    min_effect: float = MIN_EFFECT
    min_rows: int = MIN_ROWS
    effective: float = 1.0
    """The share of rows worth an independent one: below 1 where windows of a signal overlap."""


class Serving(NamedTuple):
    """A device and the release it serves."""

    device: str
    model: str
    release: int


class Counted(NamedTuple):
    """A window as counted: its message, its rows and its counts by variable."""

    message: int
    rows: int
    counts: Mapping[str, Counts]


@dataclass(frozen=True, slots=True)
class Split:
    """What is compared. ``current`` is empty until windows come after a full baseline."""

    baseline: Mapping[str, Counts]
    current: Mapping[str, Counts]
    baseline_rows: int
    current_rows: int


Action = Literal["open", "close", "nothing"]


def split(oldest: Iterable[Counted], newest: Iterable[Counted], rules: Rules) -> Split:
    """Merge the windows of one device under one release into baseline and current.

    ``oldest`` and ``newest`` are the same windows in and against the order of arrival; both
    are read no further than is needed. No window counts for both.
    """
    baseline: Mapping[str, Counts] = {}
    before, last = 0, -1
    for window in oldest:
        baseline = merge(baseline, window.counts)
        before += window.rows
        last = window.message
        if before >= rules.baseline_rows:
            break
    current: Mapping[str, Counts] = {}
    now = 0
    if before >= rules.baseline_rows:
        for window in newest:
            if window.message <= last or now >= rules.current_rows:
                break
            current = merge(current, window.counts)
            now += window.rows
    return Split(baseline, current, before, now)


def judge(profile: Profile, compared: Split, rules: Rules) -> DeviceVerdict:
    """Judge a device; without current windows the state is ``too-few-rows``."""
    if not compared.current_rows:
        return DeviceVerdict(
            state="too-few-rows",
            rows=compared.baseline_rows,
            score=0.0,
            variables={},
            population={},
        )
    return assess_device(
        profile,
        compared.baseline,
        compared.current,
        rules.alpha,
        rules.min_effect,
        effective=rules.effective,
        min_rows=rules.min_rows,
    )


def decide(state: State, *, alerted: bool) -> Action:
    """Say what becomes of a device's alert; ``alerted`` is whether one is open."""
    if state == "drifted" and not alerted:
        return "open"
    if state == "stable" and alerted:
        return "close"
    return "nothing"


def alert_text(serving: Serving, verdict: DeviceVerdict) -> str:
    """Return the sentence of an alert: what changed, and by how much."""
    named = ", ".join(verdict.drifted[:NAMED])
    more = len(verdict.drifted) - NAMED
    return (
        f"{serving.device} drifts: {named}{f' and {more} more' if more > 0 else ''} changed since "
        f"it began to serve {serving.model} {serving.release} "
        f"({verdict.score:.1f} times the threshold)"
    )
