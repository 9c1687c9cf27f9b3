"""Flower's grid over HTTP, a request for many messages instead of several for each.

    grid = BundledGrid(grid)        # what a ServerApp was given

The embedded SuperLink takes and gives messages with all of their parts
(:mod:`atoll.federation.superlink`). With a stock one flwr's own grid does the work, a request
for each part, but looks again for parts that are still being uploaded at once: it would wait a
second and then up to 180, holding up everyone else's.
"""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, cast

import httpx
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.run import Run, RunNotRunningException
from flwr.superlink.grid import http_grid
from google.protobuf.message import Message as ProtobufMessage

from atoll.federation.errors import LinkError
from atoll.federation.flower import laid_out_once
from atoll.federation.messages import QUERY
from atoll.federation.superlink import FETCH_ALL, FETCH_PARTS, SEND_ALL
from atoll.federation.transport import Transport
from atoll.privacy import frames

_UPLOAD_PATIENCE: Final = 30.0
"""Seconds that a reply's missing parts hold up the server side before it is an error."""
_AHEAD: Final = 64
"""Messages that are named when more parts are asked for; small ones come so many at a time."""
_OCTETS: Final = {"content-type": "application/octet-stream"}

_promptly = functools.partial(
    pull_objects, initial_backoff=0.05, backoff_cap=0.5, max_time=_UPLOAD_PATIENCE
)


@contextmanager
def _carried() -> Iterator[None]:
    """Say of a failed call what it means: Flower does not carry this run any more."""
    try:
        yield
    except (httpx.HTTPError, RunNotRunningException) as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise LinkError(f"the SuperLink no longer carries this run ({said})") from error


class BundledGrid(Grid):
    """A grid over the one that flwr gave its ServerApp.

    What sends or asks raises :class:`LinkError` when the SuperLink is gone for good, or has
    ended the run.
    """

    def __init__(self, inner: Grid) -> None:
        # What it does beyond the interface is flwr's HttpGrid alone.
        self._inner: Any = inner
        self._bundled = isinstance(inner, http_grid.HttpGrid)
        if isinstance(inner, http_grid.HttpGrid):
            _hasten(inner._runtime_client._client)  # noqa: SLF001
        vars(http_grid)["pull_objects"] = _promptly

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """Return the run."""
        return cast("Run", self._inner.run)

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

    @property
    def waits(self) -> bool:
        """Whether :meth:`pull_messages` waits, so that the caller need not."""
        return self._bundled

    @_carried()
    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes."""
        return cast("Iterable[int]", self._inner.get_node_ids())

    @_carried()
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids, empty where one was not taken."""
        sent = list(messages)
        if sent and self._bundled:
            with laid_out_once(sent):
                request, objects = _outgoing(sent)
                parts = [part.deflate() for part in objects.values()]
            body = frames.pack({}, [request.SerializeToString(), *parts])
            answer = self._call(SEND_ALL, body, request)
            if answer is not None:
                return list(PushAppMessagesResponse.FromString(answer).message_ids)
        return cast("Iterable[str]", self._inner.push_messages(sent))

    @_carried()
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies there are to ``message_ids``, each once.

        They are fetched now, and their parts as they are asked for, a few of them at a time. Where
        :attr:`waits`, this rests at the SuperLink until there is one.
        """
        wanted = list(message_ids)
        if self._bundled:
            request = PullAppMessagesRequest(message_ids=wanted)
            answer = self._call(FETCH_ALL, request.SerializeToString(), request)
            if answer is not None:
                return self._incoming(answer)
        return cast("Iterable[Message]", self._inner.pull_messages(wanted))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull as flwr does, a look every three seconds."""
        return cast("Iterable[Message]", self._inner.send_and_receive(messages, timeout=timeout))

    def _call(self, name: str, body: bytes, message: ProtobufMessage) -> bytes | None:
        """Make a bundled call; none, and none any more, where it is not known."""
        client = self._inner._runtime_client  # noqa: SLF001 -- see the module's docstring

        def send() -> httpx.Response:
            url = f"{client._base_url}/v1/runtime/{name}"  # noqa: SLF001
            request = client._client.build_request("POST", url, content=body, headers=_OCTETS)  # noqa: SLF001
            found: httpx.Response = client._send(ProtobufRequestContext(name, message, request))  # noqa: SLF001
            if found.status_code != httpx.codes.NOT_FOUND:
                found.raise_for_status()
            return found

        # As flwr's own calls: a SuperLink that is away for a moment is asked again.
        found: httpx.Response = client._retry_invoker.invoke(send)  # noqa: SLF001
        if found.status_code == httpx.codes.NOT_FOUND:
            self._bundled = False
            return None
        return found.content

    def _incoming(self, answer: bytes) -> Iterator[Message]:
        """Yield replies, put together; fetch more parts when those that came along are used up."""
        head, *parts = frames.view(answer).parts
        found = PullAppMessagesResponse.FromString(bytes(head))
        waiting = deque(zip(found.messages_list, found.message_object_trees, strict=True))
        while waiting:
            if not parts:
                parts = self._more([tree for _, tree in islice(waiting, _AHEAD)])
            envelope, tree = waiting.popleft()
            names = [part.object_id for part in iterate_object_tree(tree)]
            here, parts = parts[: len(names)], parts[len(names) :]
            asked = envelope.metadata.reply_to_message_id
            yield self._together(asked, tree, names, [bytes(part) for part in here])

    @_carried()
    def _more(self, trees: Sequence[ObjectTree]) -> list[memoryview]:
        """Fetch the parts of the first of ``trees``; none where only single calls are known."""
        body = frames.pack({}, [tree.SerializeToString() for tree in trees])
        answer = self._call(FETCH_PARTS, body, trees[0])
        return [] if answer is None else list(frames.view(answer).parts)

    @_carried()
    def _together(
        self, asked: str, tree: ObjectTree, names: Sequence[str], parts: Sequence[bytes]
    ) -> Message:
        """Put a reply together; pull its parts one by one if they did not come along."""
        contents = dict(zip(names, parts, strict=False))
        if len(parts) < len(names) or not all(parts):
            try:
                contents = self._pull(tree, names)
            except ObjectPullError as error:
                return _missing(asked, str(error))
        try:
            message = inflate_object_from_contents(tree.object_id, contents)
        except Exception as error:  # noqa: BLE001 -- a device's bytes may raise anything
            return _missing(asked, f"unreadable: {type(error).__name__}")
        if not isinstance(message, Message):
            return _missing(asked, f"a {type(message).__name__} instead of a message")
        # What a device writes inside its message is not believed where the envelope knows better.
        message.metadata.__dict__["_message_id"] = tree.object_id
        message.metadata.__dict__["_reply_to_message_id"] = asked
        return message

    def _pull(self, tree: ObjectTree, names: Sequence[str]) -> dict[str, bytes]:
        client, node = self._inner._runtime_client, self._inner.node  # noqa: SLF001
        run = self.run.run_id
        one_by_one = make_pull_object_fn_protobuf(client.PullObject, node, run)
        contents = _promptly(list(names), one_by_one)
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=tree.object_id)
        )
        return contents


def _hasten(client: httpx.Client) -> None:
    """Give a client that is made already a transport for large bodies, with the TLS it has."""
    stock: Any = client._transport  # noqa: SLF001
    client._transport = Transport(stock._pool._ssl_context)  # noqa: SLF001
    stock.close()


def _outgoing(
    messages: Sequence[Message],
) -> tuple[PushAppMessagesRequest, dict[str, InflatableObject]]:
    envelopes, trees, objects = [], [], {}
    for message in messages:
        message.metadata.__dict__["_message_id"] = message.object_id
        envelopes.append(message_to_proto(remove_content_from_message(message)))
        trees.append(get_object_tree(message))
        objects.update(get_all_nested_objects(message))
    return PushAppMessagesRequest(messages_list=envelopes, message_object_trees=trees), objects


def _missing(asked: str, why: str) -> Message:
    """Return the error reply that flwr makes of one whose parts never came."""
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id=asked,
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type=QUERY,
    )
    return make_message(metadata=metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, why))
