"""The serving process: ``python -m atoll.edge_agent.serving``, a child of the control process.

Speaks the Open Inference Protocol v2 on a socket that the control process bound. It starts
with no model; the control process has it load one, which it makes ready beside the one that
serves and then puts in its place: requests under way finish on the old one, and none is
dropped. Commands: ``{"kind": "load", "model", "release", "directory"}``; answers
``accepted`` or ``rejected``.
"""

import argparse
import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import AgentError, BadModel
from atoll.edge_agent.events import Release
from atoll.edge_agent.loading import Ready, prepare
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.parent import Parent
from atoll.edge_agent.paths import Paths
from atoll.edge_agent.protocol import BadRequest, answer, describe, parse
from atoll.edge_agent.watching import Latencies, Watch, packing
from atoll.fleet.errors import FleetError
from atoll.fleet.wire import Window

MAX_BODY: Final = 16 * 1024 * 1024
TICK_SECONDS: Final = 1.0
LATENCY_SECONDS: Final = 10.0
LENGTH_HEADER: Final = "inference-header-content-length"
VERSION: Final = "0.1.0"


@dataclass(frozen=True, slots=True)
class Serving:
    """A release and its open window; replaced as one."""

    ready: Ready
    watch: Watch


class Service:
    """What serves now. One attribute is replaced to swap, so a request sees one release."""

    def __init__(self, watch_of: Callable[[Ready], Watch]) -> None:
        self._watch_of = watch_of
        self._load_lock = threading.Lock()
        self.latencies = Latencies()
        self.now: Serving | None = None

    def load(self, release: Release, directory: Path) -> None:
        """Make a release ready and swap to it; raise and stay on the present one otherwise.

        Raises :class:`FleetError` or :class:`BadModel`.
        """
        with self._load_lock:
            ready = prepare(release, directory)
            before, self.now = self.now, Serving(ready, self._watch_of(ready))
        if before is not None:
            before.watch.flush()

    def infer(self, serving: Serving, body: bytes, json_length: int | None) -> Response:
        """Answer one request; raises :class:`BadRequest`, :class:`BadModel`."""
        started = time.perf_counter()
        ready = serving.ready
        wanted = parse(body, json_length, ready.inputs, ready.outputs)
        values = ready.runtime.run(wanted.feeds)
        done = answer(ready.release.model, str(ready.release.number), wanted, values, ready.outputs)
        serving.watch.saw(
            wanted.feeds[ready.manifest.input.name], values[ready.manifest.output.name]
        )
        self.latencies.add((time.perf_counter() - started) * 1000)
        if done.json_length is None:
            return Response(done.body, media_type="application/json")
        return Response(
            done.body,
            media_type="application/octet-stream",
            headers={LENGTH_HEADER: str(done.json_length)},
        )


class _Endpoints:
    """The protocol's endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def _named(self, request: Request) -> Serving:
        serving = self._service.now
        if serving is None:
            raise HTTPException(503, "no model serves yet")
        model = request.path_params["model"]
        version = request.path_params.get("version")
        release = serving.ready.release
        if model != release.model or version not in {None, str(release.number)}:
            raise HTTPException(
                404, f"not served here; {release.model!r} version {release.number} is"
            )
        return serving

    async def server(self, _: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return _json({"name": "atoll-agent", "version": VERSION, "extensions": extensions})

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        ready = self._service.now is not None
        return _json({"ready": ready}, 200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        release = self._named(request).ready.release
        return _json({"name": release.model, "ready": True})

    async def model(self, request: Request) -> Response:
        now = self._named(request).ready
        return _json(
            {
                "name": now.release.model,
                "versions": [str(now.release.number)],
                "platform": now.runtime.platform,
                "inputs": [describe(port) for port in now.inputs],
                "outputs": [describe(port) for port in now.outputs],
            }
        )

    async def infer(self, request: Request) -> Response:
        serving = self._named(request)
        body = await _body(request)
        length = request.headers.get(LENGTH_HEADER)
        if length is not None and not (length.isascii() and length.isdigit()):
            raise HTTPException(400, f"{LENGTH_HEADER} is not a number")
        try:
            return await run_in_threadpool(
                self._service.infer, serving, body, None if length is None else int(length)
            )
        except BadRequest as error:
            raise HTTPException(400, str(error)) from error
        except (BadModel, FleetError) as error:
            raise HTTPException(500, str(error)) from error


def application(service: Service) -> Starlette:
    """Return the ASGI application."""
    end = _Endpoints(service)
    routes = [
        Route("/v2", end.server),
        Route("/v2/health/live", end.live),
        Route("/v2/health/ready", end.ready),
    ]
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route(path, end.model),
            Route(f"{path}/ready", end.model_ready),
            Route(f"{path}/infer", end.infer, methods=["POST"]),
        ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refuse})


async def _refuse(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return _json({"error": error.detail}, error.status_code)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request may have up to {MAX_BODY} bytes")
    return bytes(body)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


class _Program:
    """The process around the service: the parent's commands, the outbox, the clock."""

    def __init__(self, paths: Paths, parent: Parent, rows: int, seconds: float) -> None:
        self._outbox = Outbox(Database(paths.database))
        self._parent = parent
        self._rows, self._seconds = rows, seconds
        self.service = Service(self._watch)
        self._server: uvicorn.Server | None = None
        self._ending = False

    def _watch(self, ready: Ready) -> Watch:
        release = ready.release
        return Watch(
            release.model,
            release.number,
            ready.profile,
            packing(ready.manifest.telemetry_noise, ready.profile),
            self._enqueue,
            time.time,
            self._rows,
            self._seconds,
        )

    def _enqueue(self, window: Window) -> None:
        try:
            self._outbox.enqueue(window, time.time())
        except AgentError as error:
            sys.stderr.write(f"a window of counts is lost: {error}\n")
            return
        self._parent.tell({"kind": "queued"})

    def command(self, message: dict[str, Any]) -> None:
        """Carry out one command of the parent."""
        if message.get("kind") != "load":
            return
        release = Release(message["model"], message["release"])
        told = {"model": release.model, "release": release.number}
        try:
            self.service.load(release, Path(message["directory"]))
        except (FleetError, BadModel) as error:
            self._parent.tell({"kind": "rejected", "error": str(error), **told})
            return
        self._parent.tell({"kind": "accepted", **told})

    def end(self) -> None:
        """Stop serving; the window that is open is closed on the way out."""
        self._ending = True
        if self._server is not None:
            self._server.should_exit = True

    async def _ticks(self) -> None:
        told = time.monotonic()
        while not self._ending:
            await asyncio.sleep(TICK_SECONDS)
            if (now := self.service.now) is not None:
                await run_in_threadpool(now.watch.tick)
            quantiles = self.service.latencies.quantiles()
            if quantiles is not None and time.monotonic() - told >= LATENCY_SECONDS:
                told = time.monotonic()
                self._parent.tell({"kind": "latency", "p50": quantiles[0], "p95": quantiles[1]})

    async def serve(self, bound: socket.socket) -> None:
        """Serve until told to end."""
        config = uvicorn.Config(
            application(self.service),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
        self._server = uvicorn.Server(config)
        bound.listen(config.backlog)  # from here on a client waits rather than being refused
        self._parent.tell({"kind": "up"})
        ticks = asyncio.create_task(self._ticks())
        try:
            if not self._ending:
                await self._server.serve(sockets=[bound])
        finally:
            ticks.cancel()
            if (now := self.service.now) is not None:
                now.watch.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the serving process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--window-rows", type=int, default=256)
    parser.add_argument("--window-seconds", type=float, default=60.0)
    given = parser.parse_args(arguments)
    parent = Parent()
    program = _Program(Paths(given.data), parent, given.window_rows, given.window_seconds)
    parent.listen(program.command, program.end)
    asyncio.run(program.serve(socket.socket(fileno=given.fd)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
