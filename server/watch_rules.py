"""How a device is watched, as pure rules: what is compared, how it is judged, what follows.

A device is compared with itself: the first :attr:`Rules.baseline_rows` rows that it served
under a release against its latest :attr:`Rules.current_rows`. Where counts carry noise, rows'
worth is meant (:mod:`atoll.fleet.samples`), so more of them are read. :mod:`atoll.server.watch`
reads and writes the tables around these rules.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Final, Literal, NamedTuple

from atoll.fleet.drift import ALPHA, MIN_EFFECT, MIN_ROWS, DeviceVerdict, State, assess_device
from atoll.fleet.profile import Profile
from atoll.fleet.samples import Tally

NAMED: Final = 3
"""How many drifted variables an alert names."""
WINDOWS: Final = 1000
"""Windows read for one side at most, unless rules ask for more rows: noise that leaves so many
of them too few drowns what there was to see."""


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
    """A window as counted: its message and what it counts."""

    message: int
    tally: Tally


@dataclass(frozen=True, slots=True)
class Split:
    """What is compared. ``current`` is empty until windows come after a full baseline."""

    baseline: Tally
    current: Tally


Action = Literal["open", "close", "nothing"]


def split(oldest: Iterable[Counted], newest: Iterable[Counted], rules: Rules) -> Split:
    """Merge the windows of one device under one release into baseline and current.

    ``oldest`` and ``newest`` are the same windows in and against the order of arrival; both
    are read no further than is needed. No window counts for both.
    """
    baseline, last = _gather(oldest, rules.baseline_rows)
    if baseline.worth < rules.baseline_rows:
        return Split(baseline, Tally())
    after = takewhile(lambda window: window.message > last, newest)
    return Split(baseline, _gather(after, rules.current_rows)[0])


def _gather(windows: Iterable[Counted], wanted: int) -> tuple[Tally, int]:
    """Merge windows until they are worth ``wanted`` rows; return them and the last one's message.

    A window whose noise would take more than its rows bring is left out. What decides that, its
    number of rows and its σ, says nothing of what it counted.
    """
    held, last = Tally(), -1
    for window in islice(windows, max(WINDOWS, wanted)):
        together = held.merge(window.tally)
        if together.worth >= held.worth:
            held = together
        last = window.message
        if held.worth >= wanted:
            break
    return held, last


def judge(profile: Profile, compared: Split, rules: Rules) -> DeviceVerdict:
    """Judge a device; without current windows the state is ``too-few-rows``."""
    if not compared.current.rows:
        return DeviceVerdict(
            state="too-few-rows",
            rows=compared.baseline.rows,
            score=0.0,
            variables={},
            population={},
            noise=compared.baseline.noise,
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
