"""Who of the trainers takes part in a round: those whom a rule lets, and in turns.

Two things narrow a round's trainers besides labels. ``cohort.rule`` leaves devices out by what is
known of them; what that is, and the rule's language, is the caller's, who says whom it leaves
out now. ``cohort.size`` takes so many of those connected who had the fewest turns so far.

A turn is to have been asked, whether or not an answer came: else a device that never answers
would be asked for ever. While the same devices are there their turns differ by at most one.

Neither hides who takes part, so neither amplifies (ADR 13): a turn can be foreseen, and a rule's
outcome may follow from a device's data.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from atoll.federation.cohort import Name
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.exchange import Clock
from atoll.privacy.keystream import Keystream

LeftOut = Callable[[], Collection[str]]
"""Says which devices may not train now."""

_LOOK_SECONDS: Final = 0.5


def nobody() -> Collection[str]:
    """Leave nobody out."""
    return ()


def judged(rule: str | None, left_out: LeftOut | None) -> LeftOut:
    """Return who says whom a ``rule`` leaves out; raise :class:`BadPlan` if nobody can."""
    if rule is not None and left_out is None:
        raise BadPlan("cohort.rule needs somebody who knows the devices, and this run has nobody")
    return left_out or nobody


def await_allowed(
    trainers: Sequence[str], left_out: LeftOut, *, least: int, timeout: float, clock: Clock
) -> list[str]:
    """Return the trainers that may train, once ``least`` of them may.

    Raises :class:`RoundFailed` when they may not within ``timeout`` seconds.
    """
    deadline = clock.now() + timeout
    while True:
        out = set(left_out())
        allowed = [name for name in trainers if name not in out]
        if len(allowed) >= least:
            return allowed
        if clock.now() >= deadline:
            raise RoundFailed(
                f"cohort.rule leaves {len(allowed)} of {len(trainers)} training devices and the "
                f"plan needs {least}; see why the others are left out, change the rule, or lower "
                "cohort.min_devices"
            )
        clock.pause(_LOOK_SECONDS)


def fewest_turns(
    names: Sequence[Name], turns: Mapping[Name, int], size: int, entropy: Keystream
) -> list[Name]:
    """Return ``size`` of ``names``, or all of fewer: those with the fewest turns, in their order.

    Who is not in ``turns`` had none. Between equals ``entropy`` decides.
    """
    lots = entropy.words(len(names)).tolist()
    order = sorted(range(len(names)), key=lambda at: (turns.get(names[at], 0), lots[at]))
    return [names[at] for at in sorted(order[:size])]


def lots_of(seed: int, run: str, number: int) -> Keystream:
    """Return what decides between equals in a round; the same again in a run that is repeated."""
    return Keystream(hashlib.sha256(f"atoll/turns/{seed}/{run}/{number}".encode()).digest())


def after(turns: Mapping[Name, int], chosen: Collection[Name]) -> dict[Name, int]:
    """Return the turns after a round of the ``chosen``."""
    return {**turns, **{name: turns.get(name, 0) + 1 for name in chosen}}
