"""Sending one message to each of several devices and waiting for what comes back.

Polls the grid promptly instead of Flower's ``send_and_receive``, which sleeps three seconds
between looks. A device that answers with an error, is offline, or is silent until the
deadline is a failure by name and never stops the others.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from atoll.federation import messages

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


@dataclass(frozen=True, slots=True)
class Replies:
    """What came back, by device; ``failed`` says why the others are missing.

    ``bytes_down`` and ``bytes_up`` count payload to and from all devices together.
    """

    content: dict[str, RecordDict] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


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
    """Send each device its content and wait at most ``timeout`` seconds for the replies.

    ``nodes`` maps device to Flower node id; ``kind`` is a Flower message type.
    """
    devices = list(contents)
    outgoing = [
        Message(contents[device], nodes[device], kind, ttl=timeout + _EXTRA_LIFE, group_id=group)
        for device in devices
    ]
    down = sum(messages.size(content) for content in contents.values())
    asked = clock.now()
    deadline = asked + timeout
    pending = {}
    replies = Replies(bytes_down=down)
    up = 0
    for device, message_id in zip(devices, grid.push_messages(outgoing), strict=True):
        if message_id:
            pending[message_id] = device
        else:
            replies.failed[device] = "the SuperLink did not take the message"
    while pending:
        late = clock.now() >= deadline
        for reply in grid.pull_messages(list(pending)):
            device = pending.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                replies.failed[device] = reply.error.reason or f"error {reply.error.code}"
            else:
                replies.content[device] = reply.content
                up += messages.size(reply.content)
        if late or not pending:
            break
        now = clock.now()
        clock.pause(min(poll_delay(now - asked), max(deadline - now, 0.0)))
    for device in pending.values():
        replies.failed[device] = f"no answer within {timeout:g} s"
    return Replies(replies.content, replies.failed, down, up)
