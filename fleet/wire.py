"""The messages between hub and device over MQTT, as MessagePack of frozen structs.

How these types may evolve: fields are added at the end with a default, never renamed,
retyped or removed; a reader ignores fields it does not know; a new kind of body gets a new
tag. A reader that meets an unknown tag raises :class:`BadMessage`, and the hub counts it
under ``unreadable`` without stopping.

Every device → hub message is an :class:`Envelope`. ``(boot, seq)`` is unique for a device:
``boot`` counts starts of the agent and ``seq`` the messages within one, so the hub can drop
repeats and see gaps whatever the device's clock says.

Values are bounded by what the hub's tables can hold (no NaN, no 64-bit overflow, no NUL in
text), so a message that decodes can be stored and one bad device cannot stop the intake.
"""

from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from atoll.fleet.errors import BadMessage

MAX_MESSAGE_BYTES: Final = 256 * 1024

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rows = Annotated[int, Meta(ge=0, le=2**31 - 1)]
ReleaseNumber = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e12)]
Sigma = Annotated[float, Meta(ge=0, le=2**29)]
"""A standard deviation of noise, past the largest that can be drawn."""
Text = Annotated[str, Meta(pattern=r"^[^\x00]*\Z")]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
"""A model's name."""
Word = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,31}\Z")]
"""One of a few that grow in number; which there are is for those who read them."""


class _Wire(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    """Shared settings of every wire struct."""


class Birth(_Wire, frozen=True, kw_only=True, tag="birth"):
    """First message after each connect, on ``status``, retained.

    Paired with :class:`Death` by ``boot`` as in Eclipse Sparkplug B 3.0, §6.4.
    """

    boot: Count
    agent_version: Annotated[Text, Meta(max_length=32)]
    serve_url: Annotated[Text, Meta(max_length=255)] | None = None
    labels: dict[Text, Text] = {}


class Death(_Wire, frozen=True, kw_only=True, tag="death"):
    """The last will, on ``status``, retained; sent by the broker or before a clean stop."""

    boot: Count


class Reported(_Wire, frozen=True, kw_only=True, tag="reported"):
    """What runs on the device now; the answer to :class:`Desired`.

    ``state`` is that of the *wanted* release: ``idle`` (nothing wanted), ``fetching``,
    ``checking``, ``serving``, or ``failed`` with ``error`` saying why. ``release`` is the one
    that serves, which in every state but ``serving`` may be an older one or none.
    """

    desired_version: Count
    model: Name | None
    release: ReleaseNumber | None
    state: Literal["idle", "fetching", "checking", "serving", "failed"]
    error: Text | None = None


class Window(_Wire, frozen=True, kw_only=True, tag="window"):
    """Counts of one serving window, in the bins of the release's reference profile.

    ``counts`` maps a profile variable (feature or output) to its bin counts, packed by
    :func:`atoll.fleet.counts.pack_counts`. ``start`` and ``end`` are device-clock Unix
    seconds; ``rows`` is the number of examples counted.

    ``noise`` is σ of the noise on each count; where it is not 0 the counts may be negative and
    are packed by :func:`atoll.fleet.counts.pack_signed`. A hub that does not know ``noise``
    cannot unpack them and leaves the window out.
    """

    model: Name
    release: ReleaseNumber
    start: Seconds
    end: Seconds
    rows: Rows
    counts: dict[Text, bytes]
    noise: Sigma = 0.0


class Health(_Wire, frozen=True, kw_only=True, tag="health"):
    """How the device is: resident bytes per process, traffic, drops, latency (milliseconds).

    ``power``, ``network`` and ``accelerator`` are what cohort rules ask for; none where it cannot
    be told. ``examples`` is how many there are to train on, rounded down to a power of two; none
    while the training process has not counted them.
    """

    rss: dict[Text, Count]
    disk_free: Count
    outbox_waiting: Count
    outbox_dropped: Count
    bytes_up: Count
    bytes_down: Count
    latency_p50: Milliseconds | None = None
    latency_p95: Milliseconds | None = None
    power: Word | None = None
    network: Word | None = None
    accelerator: Word | None = None
    examples: Count | None = None


class Event(_Wire, frozen=True, kw_only=True, tag="event"):
    """Something a person may want to know."""

    kind: Annotated[Text, Meta(max_length=64)]
    severity: Literal["info", "warning", "error"]
    detail: Text = ""


Body = Birth | Death | Reported | Window | Health | Event


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A device → hub message: ``at`` is device-clock Unix seconds, for information only."""

    boot: Count
    seq: Count
    at: Seconds
    body: Body


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub wants of a device; retained on ``desired``, replaced whole.

    ``version`` only grows, so a device ignores an older one. ``train`` opens a training
    window: the agent keeps its training process running while it is true.
    """

    version: Count
    model: Name | None = None
    release: ReleaseNumber | None = None
    train: bool = False


_Message = TypeVar("_Message", Envelope, Desired)

_encoder = msgspec.msgpack.Encoder()


def encode(message: Envelope | Desired) -> bytes:
    """Encode for the wire."""
    return _encoder.encode(message)


def decode(data: bytes, kind: type[_Message]) -> _Message:
    """Decode and validate; raise :class:`BadMessage` for anything else than a ``kind``."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from error
