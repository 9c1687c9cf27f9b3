"""Devices of different speeds in this process, on a clock that costs no waiting.

    grid = PacedGrid({1: app_of_a, 2: app_of_b}, {1: 1.0, 2: 30.0}.__getitem__)
    run_buffered(Run(grid, ..., clock=grid.clock), initial)

A reply can be pulled so many seconds after its message was sent as the node takes, by the grid's
own clock, which moves when the hub's side pauses. What a device answers does not depend on it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.clientapp import ClientApp

from atoll.federation.engine import InProcessGrid


class PacedGrid(InProcessGrid):
    """The in-process grid with nodes that take their time: ``seconds`` for each message."""

    def __init__(self, apps: Mapping[int, ClientApp], seconds: Callable[[int], float]) -> None:
        super().__init__(apps)
        self._seconds = seconds
        self._due: dict[str, float] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep each message until its node is done with it."""
        sent = list(messages)
        self._asked.clear()  # a slow node goes on with what it was asked before
        ids = list(super().push_messages(sent))
        for message, message_id in zip(sent, ids, strict=True):
            done = self.clock.now() + self._seconds(message.metadata.dst_node_id)
            self._due[message_id] = done
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are done by now, in the order in which they were."""
        now = self.clock.now()
        done = [one for one in message_ids if self._due.get(one, now) <= now]
        done.sort(key=lambda one: self._due.get(one, now))
        for message_id in done:
            yield from super().pull_messages([message_id])
            self._due.pop(message_id, None)
