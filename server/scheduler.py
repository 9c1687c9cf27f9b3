"""The hub's heartbeat: a thread that calls each of its duties, over and over.

A duty is a function that looks at the store and does what is due; it keeps nothing in mind
that a restart would lose. One that fails is logged and does not keep the others from their
turn; the same failure is logged once until it changes or has passed.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import update

from atoll.server.context import Clock
from atoll.server.schema import devices
from atoll.server.store import Store

log = logging.getLogger(__name__)

INTERVAL: Final = 0.5


@dataclass(frozen=True, slots=True)
class Duty:
    """Something to do every ``every`` seconds, or as soon after as its turn comes."""

    name: str
    do: Callable[[], object]
    every: float = INTERVAL


class Scheduler:
    """Calls duties in turn from a thread of its own."""

    def __init__(self, duties: Sequence[Duty], interval: float = INTERVAL) -> None:
        self._duties = duties
        self._interval = interval
        self._due = dict.fromkeys((duty.name for duty in duties), float("-inf"))
        self._failing: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End when the duty at hand is done."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def turn(self, now: float) -> None:
        """Call the duties that are due at ``now`` (monotonic seconds)."""
        for duty in self._duties:
            if self._stopping.is_set():
                return
            if now >= self._due[duty.name]:
                self._due[duty.name] = now + duty.every
                self._call(duty)

    def _call(self, duty: Duty) -> None:
        try:
            duty.do()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if self._failing.get(duty.name) != said:
                log.exception("%s failed and is tried again", duty.name)
            self._failing[duty.name] = said
        else:
            if self._failing.pop(duty.name, None):
                log.info("%s works again", duty.name)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            self.turn(time.monotonic())


def mark_silent(store: Store, clock: Clock, silence: float) -> int:
    """Count devices as offline that were not heard of for ``silence`` seconds."""
    with store.begin() as connection:
        changed = connection.execute(
            update(devices)
            .where(devices.c.online, devices.c.last_seen < clock() - silence)
            .values(online=False)
        )
        return changed.rowcount
