"""The operator port: JSON under ``/api/v1`` for programs, and the dashboard for people.

Programs show a bearer token; the dashboard has sessions of its own and is mounted here by
:mod:`atoll.server.web`. Whatever changes something writes a line in the audit log, in the same
transaction. Requests whose ``Host`` is not one of ours are refused, so that a web page
elsewhere cannot reach the port under a name it had resolve to loopback (DNS rebinding).
"""

import html
import logging
from collections.abc import Collection
from importlib.metadata import version
from typing import Final

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from sqlalchemy import select
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from atoll.server import api_fleet, api_models, api_runs
from atoll.server.answers import error_response
from atoll.server.api_access import Hub, Viewer
from atoll.server.context import HubContext
from atoll.server.errors import BadInput, HubError, NotFound, TooLarge
from atoll.server.schema import operators
from atoll.server.stream import Changes, events

log = logging.getLogger(__name__)

PREFIX: Final = "/api/v1"
_METHODS: Final = ["GET", "POST", "PUT", "PATCH", "DELETE"]
MAX_BODY: Final = 8 * 1024 * 1024


def create_operator_app(hub: HubContext) -> FastAPI:
    """Return the app of the operator port, with ``hub`` as ``app.state.hub``."""
    app = FastAPI(
        title="Atoll",
        version=version("atoll"),
        description=__doc__.partition("\n")[0],
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere, beside the session cookie
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.hub = hub
    router = APIRouter(prefix=PREFIX)
    router.include_router(api_fleet.router)
    router.include_router(api_runs.router)
    router.include_router(api_models.router)
    router.add_api_route("/stream", stream, tags=["hub"])
    router.add_api_route("/docs", docs, include_in_schema=False)
    router.add_api_route("/health", health, tags=["hub"])
    router.add_api_route(  # without it, the dashboard would answer with a page
        "/{path:path}", nothing, methods=_METHODS, include_in_schema=False
    )
    app.include_router(router)
    app.add_exception_handler(HubError, _refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(500, _broken)
    app.add_middleware(KnownHost, known=allowed_hosts(hub))
    return app


def allowed_hosts(hub: HubContext) -> frozenset[str]:
    """Return the names under which the operator port answers."""
    settings = hub.settings
    return frozenset(
        {"localhost", "127.0.0.1", "[::1]", settings.operator_bind, *settings.operator_hosts}
    )


class KnownHost:
    """Refuses requests for any ``Host`` but the known ones, and bodies over the limit."""

    def __init__(self, app: ASGIApp, known: Collection[str]) -> None:
        self._app = app
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            if _name(host) not in self._known:
                refusal = HubError(
                    f"this port does not answer as {host!r}",
                    "use the URL that the hub printed, or start it with --operator-host",
                    code="unknown-host",
                )
                await error_response(refusal, 421)(scope, receive, send)
                return
            length = headers.get(b"content-length", b"0")
            if b"transfer-encoding" in headers or not length.isdigit() or int(length) > MAX_BODY:
                refusal = TooLarge(
                    f"the body must state its length and have at most {MAX_BODY} bytes"
                )
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def health(hub: Hub) -> dict[str, str | float]:
    """Say that the hub is up; needs no token and tells nothing else."""
    return {"status": "ok", "version": version("atoll"), "now": hub.clock()}


def docs(request: Request) -> HTMLResponse:
    """List the API in plain HTML, from its OpenAPI description."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, about in methods.items():
            text = about.get("description") or about.get("summary", "")
            rows.append(
                f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code>"
                f"</td><td>{html.escape(text)}</td></tr>"
            )
    return HTMLResponse(
        "<!doctype html><meta charset=utf-8><title>Atoll API</title>"
        f"<h1>Atoll API</h1><p>Described for programs in <a href='{PREFIX}/openapi.json'>"
        "openapi.json</a>. Send <code>Authorization: Bearer &lt;token&gt;</code>.</p>"
        f"<table>{''.join(rows)}</table>"
    )


def nothing(path: str) -> None:
    """Refuse what is not there, in JSON."""
    raise NotFound(f"there is nothing at {PREFIX}/{path}", f"see {PREFIX}/docs")


def stream(request: Request, hub: Hub, who: Viewer) -> StreamingResponse:
    """Say by server-sent events (``changed``) which subjects have changed, while it is open."""
    changes: Changes = request.app.state.changes

    def admitted() -> bool:
        with hub.store.read() as connection:
            live = select(operators.c.name).where(
                operators.c.name == who.name, operators.c.revoked_at.is_(None)
            )
            return connection.execute(live).first() is not None

    last = request.headers.get("last-event-id")
    return StreamingResponse(
        events(changes, changes.subjects, last, admitted),
        media_type="text/event-stream",
        headers={"cache-control": "no-store"},
    )


def _name(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


async def _refuse(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HubError):
        raise error
    return error_response(error)


async def _invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return error_response(BadInput(f"{where}: {first['msg']}", "see /api/v1/docs"))


async def _http(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == NotFound.status:
        return error_response(NotFound("there is nothing here", "see /api/v1/docs"))
    refusal = HubError(str(error.detail), code="http-error")
    return error_response(refusal, error.status_code)


async def _broken(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(HubError("the hub failed to answer", "see its log"))
