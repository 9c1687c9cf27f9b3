"""What can go wrong in the language that hub and device share.

FleetError
├── BadName              a name that cannot be used; choose another
│   ├── BadDeviceId
│   └── BadTopic
├── BadMessage           bytes that are no message of ours; drop and count
├── BadIdentity          a certificate, token or key to refuse; enrol again
├── BadBundle            a model that must not be installed; stay on what runs
└── BadProfile           counts that cannot be merged or compared
"""


class FleetError(Exception):
    """Base of all errors raised by :mod:`atoll.fleet`."""


class BadName(FleetError, ValueError):
    """A name that cannot be used."""


class BadDeviceId(BadName):
    """A device id outside ``[a-z0-9][a-z0-9-]{0,62}``."""

    def __init__(self, device: str) -> None:
        super().__init__(
            f"device id {device!r} is not usable: 1 to 63 of a-z, 0-9 and '-', "
            "beginning with a letter or digit"
        )


class BadTopic(BadName):
    """A topic that is not one of ours."""

    def __init__(self, name: str) -> None:
        super().__init__(f"not an Atoll topic: {name!r}")


class BadMessage(FleetError, ValueError):
    """Bytes that are no message of ours."""


class BadIdentity(FleetError):
    """A certificate, token or key to refuse."""


class BadBundle(FleetError):
    """A model bundle that must not be installed."""


class BadProfile(FleetError, ValueError):
    """Counts that cannot be merged or compared."""
