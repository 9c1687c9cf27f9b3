"""The dashboard: pages for people, on the operator's port.

:func:`mount` hangs it under the API as an application of its own, so that its errors are pages
while the API's are JSON. Pages are plain HTML that works without scripts but for the dialogs;
htmx replaces what has changed when the stream says so (:mod:`atoll.server.stream`). Nothing
is fetched from elsewhere and nothing is inline, which the Content-Security-Policy enforces.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI
from jinja2 import Environment
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from atoll.server import web_views
from atoll.server.api_models import acknowledge_alert
from atoll.server.api_runs import approve_run, cancel_run
from atoll.server.auth import Operator, authenticate
from atoll.server.context import HubContext
from atoll.server.errors import HubError, NotFound, Unauthenticated
from atoll.server.sessions import close_session, open_session, use_login_code
from atoll.server.stream import Changes, events
from atoll.server.watch_rules import Rules
from atoll.server.web_access import COOKIE, check_origin, local_path, set_cookie, viewer
from atoll.server.web_pages import TABS, Page, pages
from atoll.server.web_render import HEADERS, STATIC, templates

log = logging.getLogger(__name__)


def mount(app: FastAPI, hub: HubContext, rules: Rules | None = None) -> Changes:
    """Add the dashboard to the operator's application, after all of the API's own routes.

    ``rules`` are those of :func:`atoll.server.watch.tick`. Whoever stops the server calls
    ``close()`` of what is returned first, or it waits for open streams.
    """
    web = _Web(hub, Changes(hub.store, hub.bus))
    app.mount("/", web.application(pages(hub, rules or Rules())))
    return web.changes


class _Static(StaticFiles):
    """Files whose address holds their digest: they may be kept for good."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:  # noqa: ANN401  Starlette's own signature
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


@dataclass
class _Web:
    """The pages' handlers; one for each hub."""

    hub: HubContext
    changes: Changes
    templates: Environment = field(default_factory=templates)

    def application(self, shown: Sequence[Page]) -> Starlette:
        """Return the dashboard as an application."""
        forms = {
            "/runs/{name}/approve": self._approve,
            "/runs/{name}/cancel": self._cancel,
            "/alerts/{number:int}/acknowledge": self._acknowledge,
        }
        return Starlette(
            routes=[
                *(Route(page.path, self._show(page)) for page in shown),
                *(Route(path, self._act(act), methods=["POST"]) for path, act in forms.items()),
                Route("/login", self._login_page),
                Route("/login", self._login, methods=["POST"]),
                Route("/logout", self._logout, methods=["POST"]),
                Route("/events", self._events),
                Mount("/static", _Static(directory=STATIC)),
            ],
            exception_handlers={
                HubError: self._problem,
                HTTPException: self._http_problem,
                Exception: self._broken,
            },
        )

    def _show(self, page: Page) -> Callable[[Request], Response]:
        def show(request: Request) -> Response:
            operator = viewer(self.hub, request)
            marks = self.changes.look()  # before reading: rather told twice than not at all
            seen = self.changes.words(marks, page.subjects)
            with self.hub.store.read() as connection:
                view = page.load(connection, request)
                open_alerts = web_views.open_alerts(connection)
            query = urlencode({"about": " ".join(page.subjects), "seen": seen})
            frame = {
                "title": page.title,
                "layout": "fragment.html" if "hx-request" in request.headers else "layout.html",
                "tabs": TABS,
                "tab": page.tab,
                "viewer": operator,
                "open_alerts": open_alerts,
                "here": request.url.path,
                "stream": f"/events?{query}",
            }
            return self._render(page.template, frame | view)

        return show

    def _act(
        self, act: Callable[[Request, Operator], str]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def posted(request: Request) -> Response:
            check_origin(request)
            operator = await run_in_threadpool(viewer, self.hub, request)
            after = await run_in_threadpool(act, request, operator)
            return RedirectResponse(after, status_code=303)

        return posted

    def _approve(self, request: Request, operator: Operator) -> str:
        name: str = request.path_params["name"]
        operator.require("approver")
        approve_run(name, self.hub, operator)
        return f"/runs/{name}"

    def _cancel(self, request: Request, operator: Operator) -> str:
        name: str = request.path_params["name"]
        operator.require("operator")
        cancel_run(name, self.hub, operator)
        return f"/runs/{name}"

    def _acknowledge(self, request: Request, operator: Operator) -> str:
        operator.require("operator")
        acknowledge_alert(request.path_params["number"], self.hub, operator)
        return "/alerts"

    def _login_page(self, request: Request) -> Response:
        after = local_path(request.query_params.get("next", "/"))
        code = request.query_params.get("code")
        if code is None:
            return self._login_form(after)
        now = self.hub.clock()
        with self.hub.store.begin() as connection:
            name = use_login_code(connection, code, now)
            secret = open_session(connection, name, now) if name else None
        if secret is None:
            return self._login_form(
                after,
                "this link was used already or is too old",
                "paste a token, or make a new link",
            )
        # Not a redirect: followed from a link elsewhere, it would go without a Strict cookie.
        response = self._render("signed_in.html", {"title": "Signed in", "next": after})
        response.headers["Refresh"] = f"0; url={after}"
        set_cookie(request, response, secret)
        return response

    async def _login(self, request: Request) -> Response:
        check_origin(request)
        form = await request.form()
        token, after = str(form.get("token", "")).strip(), local_path(str(form.get("next", "/")))
        return await run_in_threadpool(self._sign_in, request, token, after)

    def _sign_in(self, request: Request, token: str, after: str) -> Response:
        now = self.hub.clock()
        try:
            with self.hub.store.begin() as connection:
                operator = authenticate(connection, token)
                secret = open_session(connection, operator.name, now)
        except Unauthenticated as error:
            return self._login_form(after, error.message, error.remedy)
        response = RedirectResponse(after, status_code=303)
        set_cookie(request, response, secret)
        return response

    def _login_form(self, after: str, problem: str = "", remedy: str = "") -> Response:
        values = {"title": "Sign in", "next": after, "problem": problem, "remedy": remedy}
        return self._render("login.html", values, status=401 if problem else 200)

    async def _logout(self, request: Request) -> Response:
        check_origin(request)
        await run_in_threadpool(self._forget, request.cookies.get(COOKIE, ""))
        response = RedirectResponse("/login", status_code=303)
        response.delete_cookie(COOKIE)
        return response

    def _forget(self, secret: str) -> None:
        with self.hub.store.begin() as connection:
            close_session(connection, secret)

    async def _events(self, request: Request) -> Response:
        await run_in_threadpool(viewer, self.hub, request)
        wanted = request.query_params.get("about", "").split()
        subjects = [subject for subject in self.changes.subjects if subject in wanted]
        last = request.headers.get("last-event-id") or request.query_params.get("seen")

        def admitted() -> bool:
            try:
                viewer(self.hub, request)
            except Unauthenticated:
                return False
            return True

        return StreamingResponse(
            events(self.changes, subjects, last, admitted),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    def _problem(self, request: Request, error: Exception) -> Response:
        problem = error if isinstance(error, HubError) else HubError(str(error))
        if isinstance(problem, Unauthenticated):
            return self._sign_in_first(request)
        values = {
            "title": "Problem",
            "heading": "Not found" if isinstance(problem, NotFound) else "That did not work",
            "message": problem.message,
            "remedy": problem.remedy,
        }
        return self._render("error.html", values, status=problem.status)

    def _broken(self, request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        values = {
            "title": "Problem",
            "heading": "The hub failed to show this",
            "message": "this is a fault of the hub, not of yours",
            "remedy": "look into the hub's log for the reason, and try again",
        }
        return self._render("error.html", values, status=500)

    def _http_problem(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        if status == 404:
            found = NotFound("there is no such page", "begin at the overview")
            return self._problem(request, found)
        values = {
            "title": "Problem",
            "heading": "That did not work",
            "message": "this address does not take such a request",
            "remedy": "begin at the overview",
        }
        return self._render("error.html", values, status=status)

    def _sign_in_first(self, request: Request) -> Response:
        if request.url.path == "/events":
            return Response(status_code=401)
        query = urlencode({"next": request.url.path}) if request.method == "GET" else ""
        address = f"/login?{query}" if query else "/login"
        if "hx-request" in request.headers:
            return Response(status_code=401, headers={"HX-Redirect": address})
        return RedirectResponse(address, status_code=303)

    def _render(self, template: str, values: dict[str, Any], status: int = 200) -> HTMLResponse:
        text = self.templates.get_template(template).render(now=self.hub.clock(), **values)
        return HTMLResponse(text, status_code=status, headers=HEADERS)
