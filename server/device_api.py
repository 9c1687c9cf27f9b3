"""The port that devices reach: enrolment, renewal, signed files, and the way to the SuperLink.

All paths are here and none is made from a request: a path that is not listed is answered
404 whatever its spelling, so the SuperLink's ``/v1/control`` and ``/v1/runtime`` cannot be
reached by ``//``, ``..`` or encoded slashes. Each request is judged by its connection's
client certificate (:class:`atoll.server.peers.Peers`); only the first two routes go without.
"""

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoll.fleet.identity import Peer
from atoll.server import enrolment
from atoll.server.answers import error_response, inside
from atoll.server.context import HubContext
from atoll.server.errors import BadInput, HubError, NotFound, TooLarge, Unavailable
from atoll.server.fleet_front import FleetFront
from atoll.server.peers import Attempts, Peers, Traffic
from atoll.server.tls_app import peer_certificate

log = logging.getLogger(__name__)

MAX_JSON: Final = 64 * 1024
"""Largest JSON body, in bytes; a certificate request has about 1,500."""

_FAILURES: Final = 20
_FAILURE_SECONDS: Final = 60.0
_VERSIONED: Final = re.compile(r"\d+\.[a-z]+\.json")
_IMMUTABLE: Final = "private, max-age=31536000, immutable"


class EnrolRequest(msgspec.Struct, frozen=True):
    """What a new device sends."""

    secret: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    csr: Annotated[str, msgspec.Meta(max_length=20_000)]
    device: str | None = None


class RenewRequest(msgspec.Struct, frozen=True):
    """What a device sends for its next certificate."""

    csr: Annotated[str, msgspec.Meta(max_length=20_000)]


_Body = TypeVar("_Body", EnrolRequest, RenewRequest)


def create_device_app(hub: HubContext, traffic: Traffic, front: FleetFront) -> ASGIApp:
    """Return the ASGI app of the device port; ``traffic`` receives the bytes it moves."""
    api = _DeviceApi(hub, front)
    routes = [
        Route("/v1/ca", api.authority),
        Route("/v1/enrol", api.enrol, methods=["POST"]),
        Route("/v1/renew", api.of_device(api.renew), methods=["POST"]),
        Route("/v1/tuf/metadata/{name}", api.of_device(api.metadata)),
        Route("/v1/tuf/targets/{path:path}", api.of_device(api.target)),
        Route("/v1/fleet/{call}", api.of_device(api.fleet), methods=["POST"]),
    ]

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with front:
            yield

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HubError: _refuse, 404: _missing, 405: _missing, 500: _broken},
    )
    app.router.redirect_slashes = False
    return Metered(app, hub.settings.max_body, traffic)


class _DeviceApi:
    def __init__(self, hub: HubContext, front: FleetFront) -> None:
        self._hub = hub
        self._front = front
        self._peers = Peers(hub.store, hub.authority.cert_pem, hub.clock)
        self._attempts = Attempts(_FAILURES, _FAILURE_SECONDS, hub.clock)
        self._life = timedelta(days=hub.settings.certificate_days)

    def of_device(
        self, handler: Callable[[Request, Peer], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Let only admitted devices through to ``handler``."""

        async def guarded(request: Request) -> Response:
            certificate = peer_certificate(request.state)
            peer = await run_in_threadpool(self._peers.admit, certificate)
            request.scope["atoll.device"] = peer.device
            return await handler(request, peer)

        return guarded

    async def authority(self, _request: Request) -> Response:
        return PlainTextResponse(
            self._hub.authority.cert_pem.decode(), media_type="application/x-pem-file"
        )

    async def enrol(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        self._attempts.check(address)
        body = await _json(request, EnrolRequest)
        root = await run_in_threadpool(newest_root, self._hub.tuf)  # before the token is spent
        try:
            enrolled = await run_in_threadpool(self._enrol, body)
        except enrolment.BadToken:
            self._attempts.failed(address)
            raise
        request.scope["atoll.device"] = enrolled.device
        return JSONResponse(
            {
                "device": enrolled.device,
                "certificate": enrolled.certificate.decode(),
                "ca": self._hub.authority.cert_pem.decode(),
                "mqtt": {
                    "host": self._hub.addresses.mqtt_host,
                    "port": self._hub.addresses.mqtt_port,
                },
                "root": root,
                "labels": dict(enrolled.labels),
                "boot": enrolled.boot,
            }
        )

    def _enrol(self, body: EnrolRequest) -> enrolment.Enrolled:
        hub = self._hub
        with hub.store.begin() as connection:
            enrolled = enrolment.enrol(
                connection,
                hub.authority,
                secret=body.secret,
                device=body.device,
                csr=body.csr.encode(),
                now=hub.clock(),
                life=self._life,
            )
        hub.membership.follow()
        hub.bus.publish("devices", "audit")
        return enrolled

    async def renew(self, request: Request, peer: Peer) -> Response:
        body = await _json(request, RenewRequest)
        certificate = await run_in_threadpool(self._renew, peer, body)
        return JSONResponse({"certificate": certificate.decode()})

    def _renew(self, peer: Peer, body: RenewRequest) -> bytes:
        with self._hub.store.begin() as connection:
            return enrolment.renew(
                connection,
                self._hub.authority,
                peer,
                csr=body.csr.encode(),
                now=self._hub.clock(),
                life=self._life,
            )

    async def metadata(self, request: Request, _peer: Peer) -> Response:
        name = request.path_params["name"]
        path = await run_in_threadpool(inside, self._hub.tuf / "metadata", name)
        fixed = _VERSIONED.fullmatch(name) is not None
        return FileResponse(
            path,
            media_type="application/json",
            headers={"cache-control": _IMMUTABLE if fixed else "no-cache"},
        )

    async def target(self, request: Request, _peer: Peer) -> Response:
        path = await run_in_threadpool(
            inside, self._hub.tuf / "targets", request.path_params["path"]
        )
        return FileResponse(
            path,
            media_type="application/octet-stream",
            headers={"cache-control": _IMMUTABLE},
        )

    async def fleet(self, request: Request, peer: Peer) -> Response:
        return await self._front.forward(request, peer)


class Metered:
    """Limits request bodies and counts the bytes of each device's requests and answers."""

    def __init__(self, app: ASGIApp, max_body: int, traffic: Traffic) -> None:
        self._app = app
        self._max_body = max_body
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        up = _size_of(scope["headers"]) + len(scope.get("raw_path") or b"")
        down = body = 0

        async def metered_receive() -> Message:
            nonlocal up, body
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                up += size
                body += size
                if body > self._max_body:
                    raise TooLarge(
                        f"the request is larger than {self._max_body} bytes", "send less at once"
                    )
            return message

        async def metered_send(message: Message) -> None:
            nonlocal down
            if message["type"] == "http.response.start":
                down += _size_of(message.get("headers", ()))
            elif message["type"] == "http.response.body":
                down += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, metered_receive, metered_send)
        finally:
            device = scope.get("atoll.device")
            if device is not None:
                self._traffic.add(device, up=up, down=down)


def newest_root(tuf: Path) -> str:
    """Return the newest root metadata, which enrolment hands to a device as its trust.

    Raises :class:`Unavailable` when there is no repository.
    """
    roots = {
        int(path.name.partition(".")[0]): path
        for path in (tuf / "metadata").glob("*.root.json")
        if path.name.partition(".")[0].isdigit()
    }
    if not roots:
        raise Unavailable("the hub has no model repository yet", "try again when it has started")
    return roots[max(roots)].read_text(encoding="utf-8")


async def _json(request: Request, kind: type[_Body]) -> _Body:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_JSON:
            raise TooLarge(f"the request is larger than {MAX_JSON} bytes")
    try:
        return msgspec.json.decode(bytes(data), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"the request cannot be read: {error}") from error


def _size_of(headers: object) -> int:
    if not isinstance(headers, (list, tuple)):
        return 0
    return sum(len(name) + len(value) + 4 for name, value in headers)


async def _refuse(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HubError):
        raise error
    return error_response(error)


async def _missing(_request: Request, _error: Exception) -> Response:
    return error_response(NotFound("there is nothing here"))


async def _broken(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(HubError("the hub failed to answer", "see its log"))
