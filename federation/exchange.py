"""Sending one message to each of several devices and waiting for what comes back.

Polls the grid promptly instead of Flower's ``send_and_receive``, which sleeps three seconds
between looks, and leaves the waiting to a grid that ``waits``. A device that answers with an error,
is offline, or is silent until the deadline is a failure by name and never stops the others.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

FASTEST_POLL: Final = 0.03
SLOWEST_POLL: Final = 0.5
POLL_SHARE: Final = 1 / 5
_EXTRA_LIFE: Final = 5.0
"""Seconds a message outlives its deadline in the SuperLink, so that the last look finds it."""


class Clock(NamedTuple):
    """Where time comes from: seconds now, and a pause in seconds."""

    now: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


SYSTEM_CLOCK: Final = Clock()


def poll_delay(waited: float, slowest: float = SLOWEST_POLL) -> float:
    """Return the seconds to wait before looking again, having ``waited`` so long already.

    A fifth of the time waited so far: prompt while messages flow, never adding more than that
    share to a wait, and few requests where there is nothing to come (each costs the SuperLink
    some 3 ms of CPU).
    """
    return min(max(waited * POLL_SHARE, FASTEST_POLL), slowest)


class Reply(NamedTuple):
    """What became of one message: what the device answered, or ``failure`` says why nothing."""

    device: str
    content: RecordDict | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Replies:
    """What came back, by device; ``failed`` says why the others are missing."""

    content: dict[str, RecordDict] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def converse(
    grid: Grid,
    nodes: Mapping[str, int],
    kind: str,
    contents: Mapping[str, RecordDict],
    timeout: float,
    *,
    group: str = "",
    clock: Clock = SYSTEM_CLOCK,
) -> Iterator[Reply]:
    """Send each device its content; yield each reply as it comes, for ``timeout`` seconds at most.

    ``nodes`` maps device to Flower node id; ``kind`` is a Flower message type. Messages leave
    with the first reply that is asked for. Every device is yielded once; whoever has heard enough
    stops asking, and the others' replies are never looked at. No reply is held here, so that a
    cohort takes no more memory than one device does.
    """
    outgoing = [
        Message(content, nodes[device], kind, ttl=timeout + _EXTRA_LIFE, group_id=group)
        for device, content in contents.items()
    ]
    asked = clock.now()
    deadline = asked + timeout
    pending = {}
    for device, message_id in zip(contents, grid.push_messages(outgoing), strict=True):
        if message_id:
            pending[message_id] = device
        else:
            yield Reply(device, None, "the SuperLink did not take the message")
    del outgoing
    while pending:
        late = clock.now() >= deadline
        for reply in grid.pull_messages(list(pending)):
            # A reply to nothing that was asked is nobody's.
            if reply.metadata.reply_to_message_id in pending:
                yield _read(pending.pop(reply.metadata.reply_to_message_id), reply)
        if late or not pending:
            break
        now = clock.now()
        _pause(grid, clock, min(poll_delay(now - asked), max(deadline - now, 0.0)))
    for device in pending.values():
        yield Reply(device, None, f"no answer within {timeout:g} s")


class Outstanding:
    """Messages that devices have not answered yet, each with a deadline of its own.

    For who asks the next device as soon as one has answered, where :func:`converse` asks all of
    them once. Replies are held here from when they are looked for until they are read.
    """

    def __init__(self, grid: Grid, clock: Clock) -> None:
        self._grid, self._clock = grid, clock
        self._pending: dict[str, _Sent] = {}
        self._failed: list[Reply] = []

    def send(
        self, device: str, node: int, kind: str, content: RecordDict, timeout: float, group: str
    ) -> None:
        """Send ``device`` a message that counts as unanswered after ``timeout`` seconds."""
        message = Message(content, node, kind, ttl=timeout + _EXTRA_LIFE, group_id=group)
        (message_id,) = self._grid.push_messages([message])
        if message_id:
            self._pending[message_id] = _Sent(device, timeout, self._clock.now() + timeout)
        else:
            self._failed.append(Reply(device, None, "the SuperLink did not take the message"))

    def wait(self) -> list[Reply]:
        """Return what has come or failed since the last time, one at least if any is due.

        Each message that was sent is returned once. Nothing only when nothing is outstanding.
        """
        began = self._clock.now()
        while True:
            now = self._clock.now()
            found, self._failed = self._failed, []
            if found or not self._pending:
                return found  # a look may rest where there is nothing
            for reply in self._grid.pull_messages(list(self._pending)):
                sent = self._pending.pop(reply.metadata.reply_to_message_id, None)
                if sent is not None:
                    found.append(_read(sent.device, reply))
            for message_id, late in list(self._pending.items()):
                if now >= late.deadline:
                    del self._pending[message_id]
                    why = f"no answer within {late.timeout:g} s"
                    found.append(Reply(late.device, None, why))
            if found:
                return found
            left = min(sent.deadline for sent in self._pending.values()) - now
            _pause(self._grid, self._clock, min(poll_delay(now - began), left))


def _pause(grid: Grid, clock: Clock, seconds: float) -> None:
    """Wait before the next look, unless looking waits by itself."""
    if not getattr(grid, "waits", False):
        clock.pause(seconds)


class _Sent(NamedTuple):
    device: str
    timeout: float
    deadline: float


def _read(device: str, reply: Message) -> Reply:
    if reply.has_error():
        return Reply(device, None, reply.error.reason or f"error {reply.error.code}")
    return Reply(device, reply.content)


def exchange(
    grid: Grid,
    nodes: Mapping[str, int],
    kind: str,
    contents: Mapping[str, RecordDict],
    timeout: float,
    *,
    group: str = "",
    clock: Clock = SYSTEM_CLOCK,
) -> Replies:
    """Return all replies of :func:`converse` together, for answers that are small."""
    replies = Replies()
    for device, content, failure in converse(
        grid, nodes, kind, contents, timeout, group=group, clock=clock
    ):
        if content is None:
            replies.failed[device] = failure
        else:
            replies.content[device] = content
    return replies
