"""A client of the hub's operator API, for the command line.

Finds the hub as a person would expect: by the ``operator.json`` in its data directory, or by
``$ATOLL_URL`` and ``$ATOLL_TOKEN`` from another machine. Speaks plain :mod:`http.client`, so
that it starts fast and needs nothing that a bare installation lacks.

What can go wrong, with the exit status that a command ends with:

Failure              1   refused, or failed, for the reason it names
├── Misuse           2   the command or a file given to it is wrong
├── NoHub            3   there is no hub to talk to; start it, or correct the address
└── NotAllowed       4   the token is not accepted, or its role may not
"""

import http.client
import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import quote, urlencode, urlsplit

PREFIX: Final = "/api/v1"
TIMEOUT: Final = 30.0
CHUNK: Final = 1024 * 1024


class Failure(Exception):
    """A command cannot do what it was asked; the message is one sentence for the user."""

    exit_status: ClassVar[int] = 1
    code: str = ""
    """The hub's stable word for its refusal."""


class Misuse(Failure):
    """The command, or a file given to it, is wrong."""

    exit_status = 2


class NoHub(Failure):
    """There is no hub to talk to."""

    exit_status = 3


class NotAllowed(Failure):
    """The hub does not let this caller do it."""

    exit_status = 4


@dataclass(frozen=True, slots=True)
class Access:
    """Where a hub is and what it lets us in by."""

    url: str
    token: str = field(repr=False)
    source: str
    """Where both were found, for messages."""


def default_data(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where a hub keeps its data unless told otherwise.

    The same as :func:`atoll.server.settings.default_data`, without what that imports.
    """
    if given := environment.get("ATOLL_DATA"):
        return Path(given)
    home = environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "atoll" / "hub"


def find_access(data: Path | None, environment: Mapping[str, str] = os.environ) -> Access:
    """Return access to the hub with data directory ``data``.

    Without ``data``: by ``$ATOLL_URL`` and ``$ATOLL_TOKEN`` if they are set, else of the
    default data directory. Raises :class:`NoHub`, :class:`NotAllowed` or :class:`Misuse`.
    """
    url, token = environment.get("ATOLL_URL", ""), environment.get("ATOLL_TOKEN", "")
    if data is None and (url or token):
        if not (url and token):
            lacking = "ATOLL_TOKEN" if url else "ATOLL_URL"
            raise Misuse(f"${lacking} is not set, and the other one is: set both or neither")
        return Access(url.rstrip("/"), token.strip(), "$ATOLL_URL and $ATOLL_TOKEN")
    path = (data or default_data(environment)) / "operator.json"
    try:
        facts = json.loads(path.read_bytes())
        return Access(str(facts["url"]).rstrip("/"), str(facts["token"]), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise NoHub(
            f"there is no {path}: is the hub running? Start it with `atoll hub`, name its data "
            "directory with --data, or set $ATOLL_URL and $ATOLL_TOKEN"
        ) from None
    except PermissionError:
        raise NotAllowed(
            f"{path} cannot be read: run this as the user that runs the hub, or set $ATOLL_URL "
            "and $ATOLL_TOKEN"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoHub(f"{path} cannot be used ({error}): restart the hub, which writes it") from error


class HubClient:
    """Calls the operator API. Every method raises a :class:`Failure` of the kind that fits."""

    def __init__(self, access: Access, timeout: float = TIMEOUT) -> None:
        """Raise :class:`Misuse` for a URL that is none."""
        self._access = access
        self._timeout = timeout
        try:
            self._parts = urlsplit(access.url)
            self._port = self._parts.port
        except ValueError:
            self._parts = urlsplit("")
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise Misuse(
                f"{access.url!r} (from {access.source}) is not the URL of a hub: it begins with "
                "http:// or https://"
            )
        if not (access.token.isascii() and access.token.isprintable()):
            raise Misuse(f"the token from {access.source} has characters that no token has")

    @property
    def url(self) -> str:
        """The hub's operator URL."""
        return self._access.url

    def get(self, *path: str, query: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401 -- JSON
        """Return what is there."""
        return self._json("GET", path, None, query)

    def post(self, *path: str, body: object = None) -> Any:  # noqa: ANN401 -- JSON
        """Post ``body`` as JSON and return the answer."""
        return self._json("POST", path, {} if body is None else body)

    def fetch(self, *path: str) -> bytes:
        """Return what is there, byte for byte."""
        with self._response("GET", path, None) as response:
            return response.read()

    def download(self, *path: str, to: Path) -> None:
        """Save what is there as ``to``; a partial file is not left behind."""
        part = to.with_name(f".{to.name}.part")
        try:
            with self._response("GET", path, None) as response, part.open("wb") as file:
                while data := response.read(CHUNK):
                    file.write(data)
            part.replace(to)
        except OSError as error:
            raise Failure(f"cannot write {to}: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)

    def _json(
        self,
        method: str,
        path: tuple[str, ...],
        body: object,
        query: Mapping[str, str] | None = None,
    ) -> Any:  # noqa: ANN401 -- JSON
        with self._response(method, path, body, query) as response:
            data = response.read()
        try:
            return json.loads(data)
        except ValueError:
            raise self._stranger() from None

    @contextmanager
    def _response(
        self,
        method: str,
        path: tuple[str, ...],
        body: object,
        query: Mapping[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        headers = {"Authorization": f"Bearer {self._access.token}", "Accept": "application/json"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        where = self._parts.path + PREFIX + "".join("/" + quote(part, safe="") for part in path)
        if query:
            where += "?" + urlencode(query)
        try:
            try:
                connection.request(method, where, data, headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from error
            if response.status >= http.client.BAD_REQUEST:
                raise self._refusal(response.status, response.read(CHUNK))
            try:
                yield response
            except http.client.HTTPException as error:
                raise self._unreachable(error) from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host = self._parts.hostname or ""
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                host, self._port, timeout=self._timeout, context=context
            )
        return http.client.HTTPConnection(host, self._port, timeout=self._timeout)

    def _unreachable(self, error: Exception) -> NoHub:
        if isinstance(error, TimeoutError):
            why = f"no answer in {self._timeout:g} s"
        elif isinstance(error, http.client.HTTPException):
            return self._stranger()
        else:
            why = (getattr(error, "strerror", None) or str(error)).lower()
        return NoHub(
            f"the hub at {self.url} cannot be reached ({why}): start it with `atoll hub`, or "
            f"correct the address from {self._access.source}"
        )

    def _stranger(self) -> NoHub:
        return NoHub(
            f"what answers at {self.url} is not an Atoll hub: correct the address from "
            f"{self._access.source}"
        )

    def _refusal(self, status: int, body: bytes) -> Failure:
        try:
            said = json.loads(body)
            message, code = str(said["message"]), str(said["error"])
            remedy = str(said.get("remedy", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            return self._stranger()
        if status == http.client.UNAUTHORIZED:
            message = f"the hub at {self.url} does not accept the token from {self._access.source}"
            remedy = "use a current one; the hub writes its own anew into operator.json"
        kind = NotAllowed if status in (401, 403) else Failure
        failure = kind(f"{message}; {remedy}" if remedy else message)
        failure.code = code
        return failure
