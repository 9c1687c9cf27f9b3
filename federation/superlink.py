"""The embedded SuperLink: flwr's own program, made cheap for many small messages.

A message costs some sixteen requests in flwr 1.41, and each passes nine middlewares that run what
is inside of them as a task of its own behind a memory stream (Starlette's ``BaseHTTPMiddleware``).
Two things are different here, and nothing else:

- For calls of devices and ServerApps, whose answers are short, the same middlewares are called
  as plain functions of the request.
- Calls bundle others, with the same checks and the same handlers. For a device
  :data:`FETCH` waits for a message for at most :data:`WAIT_SECONDS` and returns it with its
  parts, and :data:`SEND` takes a reply with its parts; for a ServerApp :data:`FETCH_ALL` and
  :data:`SEND_ALL` do the same with many messages (the former waits :data:`REST_SECONDS` for a
  first one), and :data:`FETCH_PARTS` returns the parts of those for which an answer had no room,
  so that the ServerApp holds a few of them at a time, however many there are. Who finds a stock
  SuperLink makes the single calls.

    python -m atoll.federation.superlink [options of flower-superlink]
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeVar

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware, _CachedRequest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from atoll.privacy import frames
from atoll.privacy.errors import Refused
from atoll.privacy.frames import Frame

FETCH: Final = "fetch-message"
SEND: Final = "send-message"
BUNDLED: Final = (FETCH, SEND)
"""What a device may call."""
FETCH_ALL: Final = "fetch-messages"
FETCH_PARTS: Final = "fetch-parts"
SEND_ALL: Final = "send-messages"

ANSWER_BYTES: Final = 1 << 24
"""Parts that an answer to a ServerApp has room for: four replies of a 4 MB model."""

WAIT_SECONDS: Final = 2.0
REST_SECONDS: Final = 0.5
"""How long a ServerApp's look rests when it finds nothing; so much later it may see a deadline."""
_LOOK_SECONDS: Final = 0.03
_PARTS_SECONDS: Final = 5.0
"""How long a message's parts may still be on their way from the ServerApp."""

_SHORT: Final = ("/v1/fleet/", "/v1/runtime/")

_Request = TypeVar(
    "_Request",
    PullMessagesRequest,
    PushMessagesRequest,
    PullAppMessagesRequest,
    PushAppMessagesRequest,
    ObjectTree,
)

_through_a_stream = BaseHTTPMiddleware.__call__


async def _directly(self: BaseHTTPMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
    """Call the middleware with an answer that is whole before it is passed on."""
    if scope["type"] != "http" or not scope["path"].startswith(_SHORT):
        await _through_a_stream(self, scope, receive, send)
        return
    request = _CachedRequest(scope, receive)

    async def call_next(_: Request) -> Response:
        start: dict[str, Any] = {}
        body: list[bytes] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                body.append(message.get("body", b""))

        await self.app(scope, request.wrapped_receive, keep)
        response = Response(b"".join(body), status_code=start["status"])
        response.raw_headers = list(start["headers"])
        return response

    response = await self.dispatch_func(request, call_next)
    await response(scope, receive, send)


class _Held(NamedTuple):
    """A message that was handed over, until its node says that it has come.

    ``parts`` are the answer's. What the store keeps for many nodes, the weights, is here once.
    """

    message: str
    run: int
    parts: Sequence[bytes]


_held: dict[int, _Held] = {}
_news: dict[int, asyncio.Event] = {}
"""Set when there may be something for a node; made when it first asks."""
_replies: dict[int, asyncio.Event] = {}
"""Set when a reply has come to a run; made when its ServerApp first asks."""


async def fetch(request: Request) -> Response:
    """Return a :class:`PullMessagesResponse` and, if there is a message, its parts in tree order.

    The body's head names the message that the node has ``heard``; until it does, it is handed
    the same again, so that none is lost with a connection. A part that is not there yet is
    empty; then the message is not held, and the node pulls its parts itself.
    """
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.servicer.fleet import fleet_handlers

    frame = _frame(await request.body())
    asked = await _authenticated(
        request, frame.parts[0] if frame.parts else b"", PullMessagesRequest
    )
    state, node = get_linkstate(request), asked.node.node_id
    news = _news.setdefault(node, asyncio.Event())
    held = _held.get(node)
    if held is not None and frame.head.get("heard") == held.message:
        del _held[node]
        received = ConfirmMessageReceivedRequest(
            node=asked.node, run_id=held.run, message_object_id=held.message
        )
        with suppress(FlowerError):  # the run has ended, and its objects with it
            await run_in_threadpool(
                fleet_handlers.confirm_message_received, received, state, state.object_store
            )
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        news.clear()
        if node in _held:
            return Response(frames.pack({}, _held[node].parts))
        found = await run_in_threadpool(
            fleet_handlers.pull_messages, asked, state, state.object_store
        )
        left = deadline - time.monotonic()
        if found.messages_list or left <= 0:
            break
        with suppress(TimeoutError):
            await asyncio.wait_for(news.wait(), left)
    parts = await _parts(found, asked, state) if found.messages_list else []
    answer = [found.SerializeToString(), *parts]
    if parts and all(parts):
        envelope, tree = found.messages_list[0], found.message_object_trees[0]
        _held[node] = _Held(tree.object_id, envelope.metadata.run_id, answer)
        news.set()  # for a request of the same node that waits beside one that nobody reads
    return Response(frames.pack({}, answer))


async def _parts(
    found: PullMessagesResponse,
    asked: PullMessagesRequest,
    state: Any,  # noqa: ANN401 -- flwr's LinkState
) -> list[bytes]:
    """Return a message's parts in tree order; empty those that do not come in time."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    run = found.messages_list[0].metadata.run_id
    names = [part.object_id for part in iterate_object_tree(found.message_object_trees[0])]
    last = PullObjectRequest(node=asked.node, run_id=run, object_id=names[-1])

    def look() -> list[bytes]:
        # The handler checks whether the run goes on, and answers with a copy: of the smallest part.
        if not fleet_handlers.pull_object(last, state).object_available:
            return [b""]
        here = [state.get_object(run, name) or b"" for name in names]
        if all(here) and len(here) > 1:
            state.store_traffic(run, bytes_sent=sum(map(len, here[:-1])), bytes_recv=0)
        return here

    deadline = time.monotonic() + _PARTS_SECONDS
    parts = await run_in_threadpool(look)
    while not all(parts) and time.monotonic() < deadline:
        await asyncio.sleep(_LOOK_SECONDS)
        parts = await run_in_threadpool(look)
    return parts


async def send(request: Request) -> Response:
    """Take a :class:`PushMessagesRequest` and the message's parts; return flwr's answer."""
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.servicer.fleet import fleet_handlers

    envelope, *parts = _bundled(await request.body())
    pushed = await _authenticated(request, envelope, PushMessagesRequest)
    state = get_linkstate(request)

    def store() -> bytes:
        answer = fleet_handlers.push_messages(pushed, state)
        wanted = set(answer.objects_to_push)
        run = pushed.messages_list[0].metadata.run_id
        tree = iterate_object_tree(pushed.message_object_trees[0])
        # In the tree's order, each once; the store holds each against its hash.
        for name, part in zip(dict.fromkeys(one.object_id for one in tree), parts, strict=False):
            if name in wanted and not state.store_object(run, answer.session_id, name, part):
                raise FlowerError(
                    ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, f"part {name} was not taken"
                )
        state.store_traffic(run, bytes_sent=0, bytes_recv=max(1, sum(map(len, parts))))
        return bytes(answer.SerializeToString())

    answer = await run_in_threadpool(store)
    for message in pushed.messages_list:
        if message.metadata.run_id in _replies:
            _replies[message.metadata.run_id].set()
    return Response(answer)


async def fetch_all(request: Request) -> Response:
    """Return a :class:`PullAppMessagesResponse` and the parts of its first messages.

    Waits :data:`REST_SECONDS` for a first message if there is none yet.
    """
    asked = _parsed(await request.body(), PullAppMessagesRequest)
    state, handlers, task = await run_in_threadpool(_app, request)
    news = _replies.setdefault(task.run_id, asyncio.Event())
    deadline = time.monotonic() + REST_SECONDS
    while True:
        news.clear()
        answer = await run_in_threadpool(handlers.pull_messages, asked, state, task)
        left = deadline - time.monotonic()
        if answer.messages_list or left <= 0:
            break
        with suppress(TimeoutError):
            await asyncio.wait_for(news.wait(), left)

    def found() -> bytes:
        parts = _first_parts(state, task.run_id, answer.message_object_trees)
        return frames.pack({}, [answer.SerializeToString(), *parts])

    return Response(await run_in_threadpool(found))


async def fetch_parts(request: Request) -> Response:
    """Take the trees of messages that were announced; return the parts of the first of them."""
    trees = _bundled(await request.body())

    def found() -> bytes:
        state, _, task = _app(request)
        asked = [_parsed(tree, ObjectTree) for tree in trees]
        return frames.pack({}, _first_parts(state, task.run_id, asked))

    return Response(await run_in_threadpool(found))


def _first_parts(
    state: Any,  # noqa: ANN401 -- flwr's LinkState
    run: int,
    trees: Iterable[ObjectTree],
) -> list[bytes]:
    """Return the parts of the first messages, in the order of their trees.

    Of one message, and of as many more as :data:`ANSWER_BYTES` have room for. Messages whose parts
    have all come are confirmed as received; a part that has not is empty.
    """
    parts: list[bytes] = []
    left, deadline = ANSWER_BYTES, time.monotonic() + _PARTS_SECONDS
    for tree in trees:
        names = [part.object_id for part in iterate_object_tree(tree)]
        here = [state.get_object(run, name) or b"" for name in names]
        while not all(here) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            here = [state.get_object(run, name) or b"" for name in names]
        left -= sum(map(len, here))
        if left < 0 and parts:
            break
        if all(here):
            state.object_store.delete(tree.object_id)
        parts += here
    return parts


async def send_all(request: Request) -> Response:
    """Take a :class:`PushAppMessagesRequest` and the parts of its messages; return the answer."""
    envelope, *parts = _bundled(await request.body())
    pushed = _parsed(envelope, PushAppMessagesRequest)

    def store() -> bytes:
        state, handlers, task = _app(request)
        answer = handlers.push_messages(pushed, state, task)
        wanted = set(answer.objects_to_push)
        for part in parts:
            name = get_object_id(part)
            if name in wanted:
                state.store_object(task.run_id, answer.session_id, name, part)
        return bytes(answer.SerializeToString())

    answer = await run_in_threadpool(store)
    for message in pushed.messages_list:
        if message.metadata.dst_node_id in _news:
            _news[message.metadata.dst_node_id].set()
    return Response(answer)


def _app(request: Request) -> tuple[Any, Any, Any]:
    """Return flwr's state and handlers, and the task that the caller's token is for."""
    from flwr.supercore.constant import TASK_TOKEN_HEADER
    from flwr.supercore.dependencies.runtime import get_runtime_handlers, get_runtime_state
    from flwr.supercore.dependencies.task import authenticate_task

    state = get_runtime_state(request)
    task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)
    return state, get_runtime_handlers(request), task


async def _authenticated(request: Request, body: bytes, kind: Callable[[], _Request]) -> _Request:
    """Parse a request and check the node's signature, as flwr's own middlewares do."""
    from flwr.superlink.routers.fleet.node_auth import authenticate_node

    message = _parsed(body, kind)
    request.state.protobuf_request = message
    await run_in_threadpool(authenticate_node, request)
    return message


def _bundled(body: bytes) -> Sequence[bytes]:
    """Return the parts of a bundle, at least one."""
    parts = _frame(body).parts
    if not parts:
        raise _malformed(Refused("nothing in it"))
    return parts


def _frame(body: bytes) -> Frame:
    try:
        return frames.unpack(body)
    except Refused as error:
        raise _malformed(error) from error


def _parsed(body: bytes, kind: Callable[[], _Request]) -> _Request:
    message = kind()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise _malformed(error) from error
    return message


def _malformed(error: Exception) -> FlowerError:
    return FlowerError(ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, f"malformed bundle: {error}")


def main() -> None:
    """Run the SuperLink with this process's arguments."""
    BaseHTTPMiddleware.__call__ = _directly  # type: ignore[method-assign]
    from flwr.superlink import main as superlink
    from flwr.superlink.cli.flower_superlink import flower_superlink

    stock = superlink.create_app

    def create_app(*arguments: Any) -> Any:  # noqa: ANN401 -- flwr's own
        app = stock(*arguments)
        for path, handler in (
            (f"/v1/fleet/{FETCH}", fetch),
            (f"/v1/fleet/{SEND}", send),
            (f"/v1/runtime/{FETCH_ALL}", fetch_all),
            (f"/v1/runtime/{FETCH_PARTS}", fetch_parts),
            (f"/v1/runtime/{SEND_ALL}", send_all),
        ):
            app.add_route(path, handler, methods=["POST"])
        return app

    superlink.create_app = create_app  # type: ignore[assignment]
    flower_superlink()


if __name__ == "__main__":
    main()
