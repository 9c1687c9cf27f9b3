"""The one way from a device to the SuperLink: a dozen calls, under the device's own node key.

The SuperLink's open-source Control API asks for no credential, so it listens on loopback and
what passes here is a list of names, not a path. The node key in Flower's signature headers
must be the key of the caller's certificate: a device cannot act as another node, and a
revoked device has no way in even before its node is unregistered.
"""

import ssl
from base64 import b64decode
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Final, Self

import httpx
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from atoll.federation.superlink import BUNDLED
from atoll.fleet.identity import Peer, public_pem
from atoll.server.errors import Forbidden, NotFound, Unavailable

FLEET_CALLS: Final = frozenset(
    {
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
        *BUNDLED,
    }
)
"""Flower's Fleet API without register-node and unregister-node: the hub does these.

With the two calls that the embedded SuperLink has besides.
"""

PUBLIC_KEY_HEADER: Final = "flwr-public-key"
"""Base64 of the node's SubjectPublicKeyInfo in PEM (flwr's ``NodeAuthHttpInterceptor``)."""

_SENT_ON: Final = ("content-type", "content-length", "accept", "user-agent")
_FLOWER: Final = "flwr-"
_SENT_BACK: Final = ("content-type", "content-length")


class FleetFront:
    """Forwards Fleet calls to the SuperLink at ``address``; use it as an async context."""

    def __init__(self, address: str, ca_pem: str, timeout: float = 60.0) -> None:
        context = ssl.create_default_context(cadata=ca_pem)
        self._client = httpx.AsyncClient(
            base_url=f"https://{address}",
            verify=context,
            timeout=timeout,
            trust_env=False,  # a proxy is no place for this
            # A device that waits for a message holds one.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def forward(self, request: Request, peer: Peer) -> Response:
        """Stream the request to the SuperLink and its answer back.

        Raises :class:`NotFound` for any other call, :class:`Forbidden` for another node's
        key, :class:`Unavailable` when the SuperLink does not answer.
        """
        call = request.path_params["call"]
        if call not in FLEET_CALLS:
            raise NotFound("there is nothing here")
        keys = request.headers.getlist(PUBLIC_KEY_HEADER)
        if len(keys) != 1 or not _is_key_of(keys[0], peer):
            raise Forbidden(
                "the node key is not that of the device's certificate",
                "use the device's own key as Flower node key",
                code="foreign-node-key",
            )
        outgoing = self._client.build_request(
            "POST", f"/v1/fleet/{call}", headers=_headers(request), content=_body(request)
        )
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.TransportError as error:
            raise Unavailable(
                f"the SuperLink does not answer ({type(error).__name__})", "try again shortly"
            ) from error
        return StreamingResponse(
            answer.aiter_raw(),
            status_code=answer.status_code,
            headers={
                name: value
                for name, value in answer.headers.items()
                if name in _SENT_BACK or name.startswith(_FLOWER)
            },
            background=BackgroundTask(answer.aclose),
        )


def _headers(request: Request) -> list[tuple[str, str]]:
    sent_on = [
        (name, value)
        for name, value in request.headers.items()
        if name in _SENT_ON or name.startswith(_FLOWER)
    ]
    return [*sent_on, ("accept-encoding", "identity")]


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        yield chunk


def _is_key_of(header: str, peer: Peer) -> bool:
    try:
        return b64decode(header, validate=True) == public_pem(peer.key)
    except ValueError:
        return False
