"""What can go wrong at the hub, named for what the caller does next.

HubError                 a sentence and a remedy; the API answers with both
├── CannotStart          fix what the sentence names and start again (exit status 1)
│   ├── AlreadyRunning   another hub has this data directory
│   ├── PortTaken        choose another port
│   └── StoreUnusable    the database cannot be opened, or is of a newer Atoll
├── Unauthenticated      401: show a credential
├── Forbidden            403: ask someone with the role
├── NotFound             404: it is not there
├── Conflict             409: the state has moved on; look again
├── BadInput             422: change the request
├── TooLarge             413: send less
├── TooMany              429: wait
├── Unavailable          503: a part of the hub is down; try again
├── ExportRefused        502: a tracking server will not have a run; read why, do not repeat it
└── Superseded           the run is another process's now; end without a word
"""

from typing import ClassVar


class HubError(Exception):
    """Base of all errors raised by :mod:`atoll.server` on purpose.

    ``message`` says in one sentence what is wrong, ``remedy`` what to do about it, and
    ``code`` is a stable word for programs.
    """

    status: ClassVar[int] = 500
    code: str = "hub-error"

    def __init__(self, message: str, remedy: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class CannotStart(HubError):
    """The hub cannot start until the user changes something."""

    code = "cannot-start"


class AlreadyRunning(CannotStart):
    """Another hub holds the data directory."""

    code = "already-running"


class PortTaken(CannotStart):
    """A port that the hub needs is in use."""

    code = "port-taken"


class StoreUnusable(CannotStart):
    """The database cannot be opened, is damaged, or belongs to a newer Atoll."""

    code = "store-unusable"


class Unauthenticated(HubError):
    """No credential, or none that is known."""

    status = 401
    code = "unauthenticated"


class Forbidden(HubError):
    """A known caller without the right."""

    status = 403
    code = "forbidden"


class NotFound(HubError):
    """What the request names is not there."""

    status = 404
    code = "not-found"


class Conflict(HubError):
    """The state no longer allows it."""

    status = 409
    code = "conflict"


class BadInput(HubError):
    """A request that cannot be understood."""

    status = 422
    code = "bad-input"


class TooLarge(HubError):
    """A body over the limit."""

    status = 413
    code = "too-large"


class TooMany(HubError):
    """Too many attempts from one address."""

    status = 429
    code = "too-many"


class Unavailable(HubError):
    """A part of the hub that the request needs does not answer."""

    status = 503
    code = "unavailable"


class ExportRefused(HubError):
    """A tracking server that answers and will not have what it is told."""

    status = 502
    code = "export-refused"


class Superseded(HubError):
    """A run that another process works on now, or that nobody is to work on any more."""

    code = "superseded"
