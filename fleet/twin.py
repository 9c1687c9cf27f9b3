"""The device twin: what is desired of a device, what it reported, and how far it is.

Desired states carry a version that only grows. A device acts on the newest it has seen and
names that version in every report, so a report is never taken for the answer to a later wish.
"""

from typing import Literal

from atoll.fleet.wire import Desired, Reported

Outcome = Literal["pending", "serving", "idle", "failed"]


def outcome(desired: Desired, reported: Reported | None) -> Outcome:
    """Tell how far a device is with what is desired of it, as the hub sees it.

    ``pending`` until it has answered this very version and runs what it names; the others
    are settled: the device does nothing more by itself.
    """
    if reported is None or reported.desired_version != desired.version:
        return "pending"
    if reported.state == "failed":
        return "failed"
    if (reported.model, reported.release) != (desired.model, desired.release):
        return "pending"
    met: Outcome = "idle" if desired.model is None else "serving"
    return met if reported.state == met else "pending"
