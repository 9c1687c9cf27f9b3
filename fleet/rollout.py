"""Rolling a release out: canaries first, the rest once they all serve, back when they fail.

The rules look at what each device was told and what it answered, and say whom to tell what.
They may be asked at any time and any number of times: asking again with nothing changed tells
nobody anything, so a hub that restarts in the middle goes on where it was.

A device that is offline is told all the same and answers when it is back; a canary that is
offline is waited for. A device missing from the mapping has left the fleet and is passed over.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

import msgspec

from atoll.fleet.twin import outcome
from atoll.fleet.wire import Desired, Reported

State = Literal["canary", "rolling", "done", "halted", "rolled-back", "superseded"]

RUNNING: Final[frozenset[State]] = frozenset({"canary", "rolling"})
"""States in which a rollout still acts; all others are final."""

_NAMED: Final = 5


class Twin(NamedTuple):
    """What a device was told last, and what it answered last."""

    desired: Desired
    reported: Reported | None


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout of ``release`` of ``model`` to ``targets``, of which ``canaries`` go first.

    ``fallback`` is the release to return to, none for serving nothing. Once the canaries
    serve, up to a share of ``max_failed`` of the devices may fail for reasons of their own
    (a full disk); more halts the rollout.
    """

    model: str
    release: int
    fallback: int | None
    targets: tuple[str, ...]
    canaries: tuple[str, ...]
    max_failed: float = 0.1
    state: State = "canary"
    reason: str = ""


class Decision(NamedTuple):
    """The rollout as it is now, and the release that each device must now be told (or none)."""

    rollout: Rollout
    tell: dict[str, int | None]


def start(
    model: str,
    release: int,
    fallback: int | None,
    targets: Iterable[str],
    canaries: Iterable[str] = (),
) -> Rollout:
    """Return a new rollout; without canaries every device is told at once.

    Raises :class:`ValueError` for no targets, a canary that is none, or a fallback that is
    the release itself.
    """
    everyone, first = tuple(dict.fromkeys(targets)), tuple(dict.fromkeys(canaries))
    if not everyone:
        raise ValueError(f"no device to roll {model} release {release} out to")
    if strangers := set(first) - set(everyone):
        raise ValueError(f"canaries must be among the devices: {', '.join(sorted(strangers))}")
    if fallback == release:
        raise ValueError(f"release {release} cannot be its own fallback")
    return Rollout(
        model=model,
        release=release,
        fallback=fallback,
        targets=everyone,
        canaries=first,
        state="canary" if first else "rolling",
    )


def step(rollout: Rollout, twins: Mapping[str, Twin]) -> Decision:
    """Decide what follows from how the devices stand.

    Never tells a device beyond the canaries before all canaries serve the release. Final
    states tell nobody anything.
    """
    if rollout.state not in RUNNING:
        return Decision(rollout, {})
    outcomes = {
        device: _outcome(rollout, twins[device]) for device in rollout.targets if device in twins
    }
    if rollout.state == "canary":
        first = {device: outcomes[device] for device in rollout.canaries if device in outcomes}
        if not first:
            return _back(rollout, twins, "halted", "no canary is left in the fleet")
        if failed := [device for device, how in first.items() if how == "failed"]:
            return _back(rollout, twins, "halted", _why(failed, twins))
        if any(how != "serving" for how in first.values()):
            return Decision(rollout, _untold(rollout, first, twins))
        rollout = msgspec.structs.replace(rollout, state="rolling")
    failed = [device for device, how in outcomes.items() if how == "failed"]
    if len(failed) > rollout.max_failed * len(outcomes):
        return _back(rollout, twins, "halted", _why(failed, twins))
    if all(how in {"serving", "failed"} for how in outcomes.values()):
        reason = _why(failed, twins) if failed else ""
        return Decision(msgspec.structs.replace(rollout, state="done", reason=reason), {})
    return Decision(rollout, _untold(rollout, outcomes, twins))


def roll_back(rollout: Rollout, twins: Mapping[str, Twin], reason: str) -> Decision:
    """Return every device that was told the release to the fallback; from any state."""
    return _back(rollout, twins, "rolled-back", reason)


def supersede(rollout: Rollout, reason: str) -> Rollout:
    """End a running rollout because another takes its devices over; final ones stay."""
    if rollout.state not in RUNNING:
        return rollout
    return msgspec.structs.replace(rollout, state="superseded", reason=reason)


def _outcome(rollout: Rollout, twin: Twin) -> str:
    return outcome(*twin) if _told(rollout, twin) else "untold"


def _told(rollout: Rollout, twin: Twin) -> bool:
    return (twin.desired.model, twin.desired.release) == (rollout.model, rollout.release)


def _untold(
    rollout: Rollout, devices: Iterable[str], twins: Mapping[str, Twin]
) -> dict[str, int | None]:
    return {device: rollout.release for device in devices if not _told(rollout, twins[device])}


def _back(rollout: Rollout, twins: Mapping[str, Twin], state: State, reason: str) -> Decision:
    told = [
        device for device in rollout.targets if device in twins and _told(rollout, twins[device])
    ]
    ended = msgspec.structs.replace(rollout, state=state, reason=reason)
    return Decision(ended, dict.fromkeys(told, rollout.fallback))


def _why(failed: list[str], twins: Mapping[str, Twin]) -> str:
    named = []
    for device in failed[:_NAMED]:
        reported = twins[device].reported
        named.append(f"{device}: {reported.error or 'failed' if reported else 'failed'}")
    more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    return "; ".join(named) + more
