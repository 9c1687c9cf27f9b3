"""What can happen to the agent, as plain values for :func:`atoll.edge_agent.core.step`."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from atoll.fleet.wire import Desired

Part = Literal["link", "fetch", "serving", "trainer", "renew"]
ChildPart = Literal["serving", "trainer"]


class Release(NamedTuple):
    """A release of a model."""

    model: str
    number: int


@dataclass(frozen=True, slots=True)
class Begin:
    """The process starts; what it knew before."""

    desired: Desired | None
    installed: Release | None


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected to the broker and subscribed."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection failed or ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """The hub's desired state arrived."""

    desired: Desired


@dataclass(frozen=True, slots=True)
class Fetched:
    """A release lies verified on the disk."""

    release: Release


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """It could not be fetched; when ``final``, trying again would not help."""

    release: Release
    error: str
    final: bool


@dataclass(frozen=True, slots=True)
class Accepted:
    """The serving process loaded, warmed and checked a release, and serves it."""

    release: Release


@dataclass(frozen=True, slots=True)
class Rejected:
    """The serving process refused a release and serves what it did before."""

    release: Release
    error: str


@dataclass(frozen=True, slots=True)
class ChildUp:
    """A child process takes commands."""

    part: ChildPart


@dataclass(frozen=True, slots=True)
class ChildDown:
    """A child process ended after ``lasted`` seconds; ``how`` says in words."""

    part: ChildPart
    how: str
    lasted: float


@dataclass(frozen=True, slots=True)
class Due:
    """An :class:`After` has run out."""

    part: Part


@dataclass(frozen=True, slots=True)
class Renewed:
    """The certificate is good for another ``due_in`` seconds; ``new`` if it just changed."""

    due_in: float
    new: bool


@dataclass(frozen=True, slots=True)
class RenewFailed:
    """There is not."""

    error: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A person or the system asks to end."""


Input = (
    Begin
    | LinkUp
    | LinkDown
    | Wanted
    | Fetched
    | FetchFailed
    | Accepted
    | Rejected
    | ChildUp
    | ChildDown
    | Due
    | Renewed
    | RenewFailed
    | Stop
)
