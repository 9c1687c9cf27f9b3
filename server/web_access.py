"""Who is looking at the dashboard: login, the session's cookie, and the guard of its forms.

The cookie is HttpOnly and SameSite=Strict and holds a secret whose hash is in the database
(:mod:`atoll.server.sessions`). A form is accepted from the dashboard's own pages alone: the
browser's word for where a POST comes from (``Origin``, ``Sec-Fetch-Site``) must be us, which
with the cookie's rule keeps other sites from acting for whoever is signed in.
"""

from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from atoll.server.auth import Operator
from atoll.server.context import HubContext
from atoll.server.errors import Forbidden, Unauthenticated
from atoll.server.sessions import SESSION_SECONDS, session_operator

COOKIE: Final = "atoll_session"


def viewer(hub: HubContext, request: Request) -> Operator:
    """Return who is signed in; raise :class:`Unauthenticated` if nobody is."""
    secret = request.cookies.get(COOKIE, "")
    if secret:
        with hub.store.read() as connection:
            operator = session_operator(connection, secret, hub.clock())
        if operator is not None:
            return operator
    raise Unauthenticated("you are not signed in", "sign in")


def check_origin(request: Request) -> None:
    """Raise :class:`Forbidden` unless the request comes from one of our own pages."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    own = f"{request.url.scheme}://{request.url.netloc}"
    if site not in (None, "same-origin") or (origin is None and site is None):
        raise _foreign()
    if origin is not None and origin != own:
        raise _foreign()


def set_cookie(request: Request, response: Response, secret: str) -> None:
    """Give the browser its session."""
    response.set_cookie(
        COOKIE,
        secret,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def local_path(wanted: str) -> str:
    """Return ``wanted`` if it is a path on this site, else the overview."""
    parts = urlsplit(wanted)
    odd = parts.scheme or parts.netloc or not wanted.startswith("/") or wanted.startswith("//")
    return "/" if odd or "\\" in wanted or not wanted.isprintable() else wanted


def _foreign() -> Forbidden:
    return Forbidden(
        "the form was not sent from this dashboard",
        "open the dashboard and try again there",
        code="foreign-origin",
    )
