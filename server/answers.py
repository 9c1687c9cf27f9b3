"""What both HTTP ports answer with: errors in one shape, and files of one directory."""

import re
from pathlib import Path
from typing import Final

from starlette.responses import JSONResponse

from atoll.server.errors import HubError, NotFound

_SEGMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEEPEST: Final = 6


def error_response(error: HubError, status: int | None = None) -> JSONResponse:
    """Return ``{"error", "message", "remedy"}``, which every error of the hub has."""
    return JSONResponse(
        {"error": error.code, "message": error.message, "remedy": error.remedy},
        status_code=error.status if status is None else status,
    )


def inside(root: Path, name: str) -> Path:
    """Return the regular file ``name`` below ``root``; raise :class:`NotFound` for any other.

    Names have up to six plain segments; links that lead out of ``root`` are not followed.
    """
    parts = name.split("/")
    if len(parts) > _DEEPEST or not all(_SEGMENT.fullmatch(part) for part in parts):
        raise NotFound(f"there is no file {name!r}")
    path = root.joinpath(*parts).resolve()
    if not path.is_relative_to(root.resolve()) or not path.is_file():
        raise NotFound(f"there is no file {name!r}")
    return path
