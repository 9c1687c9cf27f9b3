"""A Flower Grid inside this process: the same ClientApps, no sockets, its own clock.

A message waits until its reply is pulled; then its device computes, in the order in which
replies are asked for, so a run is repeatable, and no more than one reply is there at a time. Time
stands still while devices compute and moves when the server side pauses; a device that never
answers costs no waiting.

    grid = InProcessGrid({1: app_of_a, 2: app_of_b})
    run_rounds(Run(grid, ..., clock=grid.clock), initial)

A ClientApp that raises :class:`Vanished` stands for a device that is gone: no reply comes.
Any other exception becomes an error reply, as on a real node.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from atoll.federation.exchange import Clock
from atoll.federation.flower import answer, claim_run


class Vanished(Exception):  # says what happened to the device
    """Raised by a ClientApp whose device is to fall silent."""


class InProcessGrid(Grid):
    """A grid over ClientApps by node id; :meth:`connect` and :meth:`disconnect` as devices do."""

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
        claim_run(1)
        self._apps = dict(apps)
        self._contexts: dict[int, Context] = {}
        self._waiting: dict[str, Message] = {}
        self._asked: dict[int, str] = {}
        self._ids = count(1)
        self._now = 0.0
        self.clock = Clock(now=lambda: self._now, pause=self._pause)

    def connect(self, node_id: int, app: ClientApp) -> None:
        """Add a node, or give it another app."""
        self._apps[node_id] = app

    def disconnect(self, node_id: int) -> None:
        """Take a node away."""
        del self._apps[node_id]

    def _pause(self, seconds: float) -> None:
        self._now += seconds

    def set_run(self, run: Run) -> None:
        """Do nothing: this grid has one run."""

    @property
    def run(self) -> Run:
        """Return the one run."""
        return Run.create_empty(1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; Flower prefers its constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes."""
        return sorted(self._apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep each message for its node.

        It takes the place of what the node was asked before and nobody has pulled a reply to.
        """
        ids, before = [], dict(self._asked)
        for message in messages:
            node = message.metadata.dst_node_id
            self._waiting.pop(before.get(node, ""), None)
            message_id = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            self._asked[node] = message_id
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Have each of ``message_ids`` answered, once, and yield the replies that come."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is None:
                continue
            node = message.metadata.dst_node_id
            context = self._contexts.setdefault(node, Context(1, node, {}, RecordDict(), {}))
            try:
                reply = answer(self._apps.get(node), message, context, passing=(Vanished,))
            except Vanished:
                continue
            yield reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull at once; nothing here comes later, so ``timeout`` has no effect."""
        del timeout
        return self.pull_messages(self.push_messages(messages))
