"""The device twin: what is desired of a device, what it reported, and what follows.

Desired states carry a version that only grows. A device acts on the newest it has seen and
names that version in every report, so a report is never taken for the answer to a later wish.

:func:`reconcile` is the rule that an agent's richer state machine is held to;
:func:`outcome` is how the hub reads the reports of one that keeps it.
"""

from typing import Literal, NamedTuple

from atoll.fleet.wire import Desired, Reported

Outcome = Literal["pending", "serving", "idle", "failed"]


class Install(NamedTuple):
    """Fetch, check and switch to this release."""

    model: str
    release: int


class Stop(NamedTuple):
    """Stop serving: nothing is wanted any more."""


class Confirm(NamedTuple):
    """Nothing changes but the version: report that the new wish is already met."""


Step = Install | Stop | Confirm


def reconcile(desired: Desired, reported: Reported) -> Step | None:
    """Tell a device what it must do next to become what is desired; none if nothing.

    ``reported`` is what the device would report of itself now. An older desired state than
    the one it is working on is ignored. A release that failed is tried again only under a new
    version, so a broken release cannot make a device fetch it for ever. After a start an
    agent serves nothing yet and is ``idle``, whatever it was before.
    """
    if desired.version < reported.desired_version:
        return None
    new = desired.version > reported.desired_version
    if not new and reported.state != "idle":
        return None  # under way, done or failed
    if desired.model is None or desired.release is None:
        if reported.model is not None:
            return Stop()
        return Confirm() if new else None
    if (reported.model, reported.release) == (desired.model, desired.release):
        return Confirm() if new or reported.state != "serving" else None
    return Install(desired.model, desired.release)


def outcome(desired: Desired, reported: Reported | None) -> Outcome:
    """Tell how far a device is with what is desired of it, as the hub sees it.

    ``pending`` until it has answered this very version.
    """
    if reported is None or reported.desired_version != desired.version:
        return "pending"
    if reported.state == "failed":
        return "failed"
    runs = (reported.model, reported.release)
    if runs != (desired.model, desired.release):
        return "pending"
    if desired.model is None:
        return "idle" if reported.state == "idle" else "pending"
    return "serving" if reported.state == "serving" else "pending"


def settled(desired: Desired, reported: Reported | None) -> bool:
    """Tell whether the device will do nothing more by itself: it met the wish or failed."""
    return outcome(desired, reported) != "pending"
