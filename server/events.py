"""Tells whoever shows the hub's state that some of it has changed.

A hint, never a record: what changed is read from the store. Hints for one subscriber are
merged while it is busy, so a slow browser costs a set of words and not a queue.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Subject = Literal["devices", "runs", "models", "alerts", "drift", "audit"]


class Subscription:
    """One subscriber's merged hints; belongs to the event loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed: set[Subject] = set()
        self._wake = asyncio.Event()

    async def changed(self) -> frozenset[Subject]:
        """Wait until something has changed since the last call; return the subjects."""
        await self._wake.wait()
        self._wake.clear()
        changed = frozenset(self._changed)
        self._changed.clear()
        return changed

    def post(self, subjects: tuple[Subject, ...]) -> None:
        """Add hints, from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._add, subjects)

    def _add(self, subjects: tuple[Subject, ...]) -> None:
        self._changed.update(subjects)
        self._wake.set()


class Bus:
    """Carries hints from any thread to subscribers in event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: set[Subscription] = set()

    def publish(self, *subjects: Subject) -> None:
        """Say that ``subjects`` have changed."""
        with self._lock:
            subscriptions = tuple(self._subscriptions)
        for subscription in subscriptions:
            subscription.post(subjects)

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Receive hints while the block runs; call it inside an event loop."""
        subscription = Subscription()
        with self._lock:
            self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscriptions.discard(subscription)
