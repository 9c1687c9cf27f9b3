"""What can go wrong on a device, told in one sentence that names the remedy.

AgentError
├── NotEnrolled          there is no identity in the data directory; enrol
├── AlreadyEnrolled      there is one; remove it to start over
├── AlreadyRunning       another agent holds the data directory; stop it or choose another
├── DataUnwritable       the data directory cannot be written; fix its permissions
├── DiskFull             free some space
├── PortInUse            choose another port
├── HubError
│   ├── HubUnreachable   try again later, or correct the address
│   ├── HubUntrusted     not the hub that signed our token or certificate; do not go on
│   └── HubRefused       the hub said no and why
├── UpdateRefused        the release must not be installed; stay on what runs
└── BadModel             the model cannot be loaded or run
"""

from pathlib import Path


class AgentError(Exception):
    """Base of all errors raised by :mod:`atoll.edge_agent`."""


class NotEnrolled(AgentError):
    """There is no identity in the data directory."""

    def __init__(self, data: Path) -> None:
        super().__init__(
            f"this device is not enrolled (no identity in {data}): ask the hub's operator for a "
            "token and run `atoll-agent enrol --token TOKEN`"
        )


class AlreadyEnrolled(AgentError):
    """There is an identity already."""

    def __init__(self, identity: Path, device: str) -> None:
        super().__init__(
            f"this device is already enrolled as {device!r}: to start over, have the old device "
            f"revoked at the hub and remove {identity}"
        )


class AlreadyRunning(AgentError):
    """Another agent holds the data directory."""

    def __init__(self, data: Path) -> None:
        super().__init__(
            f"an agent is already running on {data}: stop it first, or give this one its own "
            "directory with --data"
        )


class DataUnwritable(AgentError):
    """The data directory cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"cannot write to {path} ({reason}): correct its owner or permissions, or choose "
            "another directory with --data"
        )


class DiskFull(AgentError):
    """No space is left."""

    def __init__(self, path: Path | str, needed: int | None = None) -> None:
        more = "" if needed is None else f"; {needed} bytes are needed"
        super().__init__(f"the disk that holds {path} is full{more}: free some space and try again")


class PortInUse(AgentError):
    """The serving port cannot be had."""

    def __init__(self, port: int, reason: str) -> None:
        super().__init__(
            f"cannot serve on port {port} ({reason}): choose another with --serve-port, or 0 "
            "for any free one"
        )


class HubError(AgentError):
    """The hub did not do what was asked."""


class HubUnreachable(HubError):
    """No answer from the hub."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"the hub at {url} cannot be reached ({reason}): check that it runs and that this "
            "device can reach it, then try again"
        )


class HubUntrusted(HubError):
    """Whoever answered is not our hub, or a certificate is expired or foreign."""


class HubRefused(HubError):
    """The hub answered with an error; the message is its own."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class UpdateRefused(AgentError):
    """A release that must not be installed."""


class BadModel(AgentError):
    """A model file that cannot be loaded or run."""
