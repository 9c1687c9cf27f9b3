"""Turns views into pages: the templates, their filters, and the headers of every page."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
from jinja2.runtime import Context

from atoll.server.web_format import FILTERS, ago

STATIC: Final = Path(__file__).with_name("static")
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer a form's Origin would be null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def templates() -> Environment:
    """Return the dashboard's templates; a name that a view forgot is an error."""
    environment = Environment(
        loader=PackageLoader("atoll.server"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.filters["ago"] = _ago
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.globals["static"] = _address
    return environment


@pass_context
def _ago(context: Context, at: float | None) -> str:
    return ago(at, context["now"])


@cache
def _address(name: str) -> str:
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()
    return f"/static/{name}?v={digest[:12]}"
