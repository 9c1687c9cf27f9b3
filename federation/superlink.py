"""The embedded SuperLink: flwr's own program, made cheap for many small messages.

A message costs some sixteen requests in flwr 1.41, and each passes nine middlewares that run what
is inside of them as a task of its own behind a memory stream (Starlette's ``BaseHTTPMiddleware``).
Two things are different here, and nothing else:

- For calls of devices and ServerApps, whose answers are short, the same middlewares are called
  as plain functions of the request.
- Two calls bundle others for a device, with the same checks and the same handlers:
  :data:`FETCH` waits for a message for at most :data:`WAIT_SECONDS` and returns it with its
  parts; :data:`SEND` takes a reply with its parts. A device that finds a stock SuperLink makes
  the single calls.

    python -m atoll.federation.superlink [options of flower-superlink]
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
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

FETCH: Final = "fetch-message"
SEND: Final = "send-message"
BUNDLED: Final = (FETCH, SEND)

WAIT_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.03
_PARTS_SECONDS: Final = 5.0
"""How long a message's parts may still be on their way from the ServerApp."""

_SHORT: Final = ("/v1/fleet/", "/v1/runtime/")

_Request = TypeVar("_Request", PullMessagesRequest, PushMessagesRequest)

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


async def fetch(request: Request) -> Response:
    """Return a :class:`PullMessagesResponse` and, if there is a message, its parts in tree order.

    A part that is not there yet is empty, and then the message is not confirmed as received.
    """
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.servicer.fleet import fleet_handlers

    asked = await _authenticated(request, await request.body(), PullMessagesRequest)
    state = get_linkstate(request)
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = await run_in_threadpool(
            fleet_handlers.pull_messages, asked, state, state.object_store
        )
        if found.messages_list or time.monotonic() >= deadline:
            break
        await asyncio.sleep(_LOOK_SECONDS)
        if await request.is_disconnected():
            break
    parts = await _parts(found, asked, state) if found.messages_list else []
    return Response(frames.pack({}, [found.SerializeToString(), *parts]))


async def _parts(
    found: PullMessagesResponse,
    asked: PullMessagesRequest,
    state: Any,  # noqa: ANN401 -- flwr's LinkState
) -> list[bytes]:
    from flwr.superlink.servicer.fleet import fleet_handlers

    run, tree = found.messages_list[0].metadata.run_id, found.message_object_trees[0]
    wanted = [
        PullObjectRequest(node=asked.node, run_id=run, object_id=part.object_id)
        for part in iterate_object_tree(tree)
    ]
    deadline = time.monotonic() + _PARTS_SECONDS
    parts: dict[str, bytes] = {}
    while True:
        for one in wanted:
            if not parts.get(one.object_id):
                pulled = await run_in_threadpool(fleet_handlers.pull_object, one, state)
                parts[one.object_id] = pulled.object_content
        if all(parts.values()) or time.monotonic() >= deadline:
            break
        await asyncio.sleep(_LOOK_SECONDS)
    if all(parts.values()):
        received = ConfirmMessageReceivedRequest(
            node=asked.node, run_id=run, message_object_id=tree.object_id
        )
        await run_in_threadpool(
            fleet_handlers.confirm_message_received, received, state, state.object_store
        )
    return [parts[one.object_id] for one in wanted]


async def send(request: Request) -> Response:
    """Take a :class:`PushMessagesRequest` and the message's parts; return flwr's answer."""
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.servicer.fleet import fleet_handlers

    try:
        envelope, *parts = frames.unpack(await request.body()).parts
    except (Refused, ValueError) as error:
        raise _malformed(error) from error
    pushed = await _authenticated(request, envelope, PushMessagesRequest)
    state = get_linkstate(request)

    def store() -> bytes:
        answer = fleet_handlers.push_messages(pushed, state)
        wanted = set(answer.objects_to_push)
        run = pushed.messages_list[0].metadata.run_id
        for part in parts:
            name = get_object_id(part)
            if name in wanted:
                fleet_handlers.push_object(
                    PushObjectRequest(
                        node=pushed.node,
                        run_id=run,
                        object_id=name,
                        object_content=part,
                        session_id=answer.session_id,
                    ),
                    state,
                )
        return bytes(answer.SerializeToString())

    return Response(await run_in_threadpool(store))


async def _authenticated(request: Request, body: bytes, kind: Callable[[], _Request]) -> _Request:
    """Parse a request and check the node's signature, as flwr's own middlewares do."""
    from flwr.superlink.routers.fleet.node_auth import authenticate_node

    message = kind()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise _malformed(error) from error
    request.state.protobuf_request = message
    await run_in_threadpool(authenticate_node, request)
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
        for name, handler in ((FETCH, fetch), (SEND, send)):
            app.add_route(f"/v1/fleet/{name}", handler, methods=["POST"])
        return app

    superlink.create_app = create_app  # type: ignore[assignment]
    flower_superlink()


if __name__ == "__main__":
    main()
