"""From the outbox to the broker: which messages are on their way, and what is done with PUBACKs."""

import logging
import time
from collections.abc import Callable
from typing import Final

from atoll.edge_agent.errors import AgentError, DiskFull
from atoll.edge_agent.link import IN_FLIGHT, Acknowledged, Down, Link
from atoll.edge_agent.outbox import Counts, Outbox
from atoll.fleet import wire

DISK_PAUSE: Final = 5.0
"""Seconds to send nothing after the disk was full: what was acknowledged could not be noted."""

log = logging.getLogger("atoll.agent")


class Sender:
    """Keeps up to :data:`IN_FLIGHT` messages on their way, and forgets one on its PUBACK alone.

    After a connection ends, everything without a PUBACK is sent again on the next one; the
    hub drops repeats by ``(boot, seq)``.
    """

    def __init__(self, outbox: Outbox, link: Link, boot: int, clock: Callable[[], float]) -> None:
        self._outbox = outbox
        self._link = link
        self._boot = boot
        self._clock = clock
        self._will: bytes | None = None
        self._on_the_way: dict[int, int] = {}
        self._paused_until = 0.0
        self.linked = False

    def connect(self) -> None:
        """Begin a new connection, ending the one there is; answer by ``Up`` or ``Down``.

        Raises :class:`AgentError` when the identity cannot be used or the disk is full.
        """
        self.down()
        if self._will is None:
            self._will = self._outbox.reserve(wire.Death(boot=self._boot), self._clock())
        self._link.connect(self._will)

    def up(self) -> None:
        """Begin to send: the connection stands, and the broker holds our last will."""
        self.linked = True
        self._will = None

    def down(self) -> None:
        """Stop sending: the connection is gone, and with it every PUBACK we waited for."""
        self.linked = False
        self._on_the_way.clear()

    def enqueue(self, body: wire.Body) -> None:
        """Put a message in the outbox; a full disk loses it, and the log says so."""
        try:
            self._outbox.enqueue(body, self._clock())
        except DiskFull as error:
            log.error("a message is lost: %s", error)  # noqa: TRY400  # a sentence, no traceback

    def acknowledged(self, mid: int) -> None:
        """Note a PUBACK; raises :class:`DiskFull`, and the message will be sent again."""
        item = self._on_the_way.pop(mid, None)
        if item is None:
            return
        try:
            self._outbox.settle([item])
        except AgentError:
            self._paused_until = time.monotonic() + DISK_PAUSE
            raise

    def pump(self) -> None:
        """Hand over what waits, as far as there is room."""
        room = IN_FLIGHT - len(self._on_the_way)
        if not self.linked or room <= 0 or time.monotonic() < self._paused_until:
            return
        for item in self._outbox.waiting(room, set(self._on_the_way.values())):
            mid = self._link.publish(item.leaf, item.payload, retain=item.retain)
            if mid is None:
                return
            self._on_the_way[mid] = item.id

    def drain(self, wait: Callable[[float], Acknowledged | Down | None], seconds: float) -> None:
        """Send what waits for at most ``seconds``; ``wait`` gives the next signal in time."""
        deadline = time.monotonic() + seconds
        while self.linked:
            self.pump()
            signal = wait(max(0.0, deadline - time.monotonic())) if self._on_the_way else None
            if isinstance(signal, Acknowledged):
                self.acknowledged(signal.mid)
            else:
                return

    def counts(self) -> Counts:
        """Count what waits."""
        return self._outbox.counts()
