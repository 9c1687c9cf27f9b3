"""What can go wrong in a federated run.

FederationError
├── TaskMissing          no installed package offers the task; install it
├── DataMissing          the device has no examples; it sits the round out
├── BadGroups            the task's groups do not fit its examples; mend the task
├── BadPlan              the plan file cannot be run as it stands; edit it
├── BadMessage           a message that is none of ours; drop it
├── BadCheckpoint        a run's file on disk is damaged or another's; remove it
├── Unbatchable          clients of this model cannot train at once; train one after the other
├── RoundFailed          too few devices answered; the round is thrown away
└── LinkError            the SuperLink cannot be reached or refuses; retry later
"""

from collections.abc import Sequence


class FederationError(Exception):
    """Base of all errors raised by :mod:`atoll.federation`."""


class TaskMissing(FederationError):
    """No installed package offers the task."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        offered = ", ".join(known) or "none"
        super().__init__(
            f"no task named {name!r} is installed (there are: {offered}); "
            "install the package that offers it here and on the devices"
        )


class DataMissing(FederationError):
    """The device has no examples."""


class BadGroups(FederationError, ValueError):
    """Groups that are not those of the examples."""


class BadPlan(FederationError, ValueError):
    """A plan that cannot be run as it stands."""


class BadMessage(FederationError, ValueError):
    """A message that is none of ours."""


class BadCheckpoint(FederationError):
    """A checkpoint that cannot be read or belongs to another run."""


class Unbatchable(FederationError):
    """Clients of this model cannot be trained as one computation."""


class RoundFailed(FederationError):
    """Too few devices answered."""


class LinkError(FederationError):
    """The SuperLink cannot be reached or refuses."""
