"""What the agent can be told to do by :func:`atoll.edge_agent.core.step`."""

from dataclasses import dataclass

from atoll.edge_agent.events import ChildPart, Part, Release
from atoll.fleet.wire import Desired, Event, Reported


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a connection to the broker, closing the one there is."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Enqueue the birth message."""


@dataclass(frozen=True, slots=True)
class Report:
    """Enqueue what runs here."""

    reported: Reported


@dataclass(frozen=True, slots=True)
class Tell:
    """Enqueue an event."""

    event: Event


@dataclass(frozen=True, slots=True)
class Remember:
    """Store the desired state."""

    desired: Desired


@dataclass(frozen=True, slots=True)
class Fetch:
    """Download and verify a release."""

    release: Release


@dataclass(frozen=True, slots=True)
class Load:
    """Have the serving process check a release and, if it is good, serve it."""

    release: Release


@dataclass(frozen=True, slots=True)
class Install:
    """Record which release serves; none when nothing is wanted or the slot is damaged."""

    release: Release | None


@dataclass(frozen=True, slots=True)
class Start:
    """Start a child process."""

    part: ChildPart


@dataclass(frozen=True, slots=True)
class Finish:
    """Ask a child process to end; a :class:`ChildDown` follows."""

    part: ChildPart


@dataclass(frozen=True, slots=True)
class Renew:
    """Ask the hub for a new certificate if two thirds of this one's life are over."""


@dataclass(frozen=True, slots=True)
class After:
    """Send a :class:`Due` in about ``delay`` seconds."""

    part: Part
    delay: float


@dataclass(frozen=True, slots=True)
class Quit:
    """End the children, say goodbye and exit."""


Action = (
    Connect
    | Announce
    | Report
    | Tell
    | Remember
    | Fetch
    | Load
    | Install
    | Start
    | Finish
    | Renew
    | After
    | Quit
)
