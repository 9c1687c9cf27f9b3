"""The agent's HTTPS client: the hub's device API, over TLS that trusts one CA.

Only short-lived processes import this (enrolment, renewal, downloads); the control process
never does, for memory.
"""

import ssl
from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec
import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, SSLError

from atoll.edge_agent.errors import HubError, HubRefused, HubUnreachable, HubUntrusted

TIMEOUT: Final = urllib3.Timeout(connect=10, read=30)
MAX_ANSWER: Final = 4 * 1024 * 1024


_Answer = TypeVar("_Answer")


class _Problem(msgspec.Struct):
    """The hub's error body."""

    message: str
    remedy: str = ""


class Hub:
    """The device API at ``url``, reached with ``context``; counts body bytes both ways."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        self.url = url.rstrip("/")
        self.pool = urllib3.PoolManager(
            ssl_context=context, timeout=TIMEOUT, retries=False, maxsize=1
        )
        self.bytes_up = 0
        self.bytes_down = 0

    def call(self, method: str, path: str, body: object = None) -> bytes:
        """Return the answer's body.

        Raises :class:`HubUnreachable`, :class:`HubUntrusted` or :class:`HubRefused`.
        """
        data = None if body is None else msgspec.json.encode(body)
        headers: Mapping[str, str] = {} if data is None else {"Content-Type": "application/json"}
        try:
            response = self.pool.request(
                method, self.url + path, body=data, headers=headers, preload_content=False
            )
            with response:
                answer = response.read(MAX_ANSWER)
        except HTTPError as error:
            raise translate(error, self.url) from error
        self.bytes_up += len(data or b"")
        self.bytes_down += len(answer)
        if response.status >= 400:
            raise refusal(response.status, answer)
        return bytes(answer)

    def ask(self, path: str, body: object, kind: type[_Answer]) -> _Answer:
        """POST JSON and return the answer as a ``kind``; errors as :meth:`call`."""
        try:
            return msgspec.json.decode(self.call("POST", path, body), type=kind)
        except msgspec.DecodeError as error:
            raise not_a_hub(self.url) from error


def refusal(status: int, answer: bytes) -> HubRefused:
    """Return the hub's own words for an error status."""
    try:
        problem = msgspec.json.decode(answer, type=_Problem)
    except msgspec.DecodeError:
        return HubRefused(status, f"the hub answered with HTTP status {status}")
    said = ": ".join(part.strip().rstrip(".") for part in (problem.message, problem.remedy) if part)
    return HubRefused(status, f"the hub refused: {said}")


def not_a_hub(url: str) -> HubUnreachable:
    """Return the error for something else than a hub behind an address."""
    return HubUnreachable(url, "what answers there is not an Atoll hub")


def translate(error: HTTPError, url: str) -> HubError:
    """Return our error for one of urllib3's."""
    inner: BaseException = error
    if isinstance(inner, MaxRetryError) and inner.reason is not None:
        inner = inner.reason
    if isinstance(inner, SSLError):
        return _untrusted(inner, url)
    if isinstance(inner, NewConnectionError):
        cause = inner.__cause__ or inner.__context__
        reason = (
            cause.strerror if isinstance(cause, OSError) and cause.strerror else "no connection"
        )
        return HubUnreachable(url, reason)
    if isinstance(inner.__cause__ or inner.__context__, TimeoutError):
        return HubUnreachable(url, "no answer in time")
    if "reset" in str(inner):
        return _cut_off(url)
    return HubUnreachable(url, str(inner) or type(inner).__name__)


def _untrusted(error: SSLError, url: str) -> HubError:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return HubUntrusted(
            f"the hub at {url} shows a certificate that is not to be trusted ({_detail(error)}): "
            "check the clock and that the address is your hub's, or enrol again with a new token"
        )
    for sign in ("ALERT_CERTIFICATE", "ALERT_UNKNOWN_CA", "CERTIFICATE_REQUIRED", "CERT"):
        if sign in text.upper().replace(" ", "_"):
            return HubUntrusted(
                f"the hub at {url} does not accept this device's certificate ({_detail(error)}): "
                "it is expired, revoked or another hub's; ask for a new token and enrol again"
            )
    if "EOF occurred" in text:
        return _cut_off(url)
    return HubUnreachable(url, f"no TLS connection: {_detail(error)}")


def _cut_off(url: str) -> HubUntrusted:
    """Return the error for a connection that ended without a word.

    TLS 1.3 judges a client's certificate after the client is done, and the server's alert is
    often lost with the connection.
    """
    return HubUntrusted(
        f"the hub at {url} ended the connection, as it does when this device's certificate is "
        "expired, revoked or another hub's: if trying again does not help, ask for a new token "
        "and enrol again"
    )


def _detail(error: SSLError) -> str:
    for inner in (*error.args, error.__cause__, error.__context__):
        if isinstance(inner, ssl.SSLCertVerificationError):
            return str(inner.verify_message)
        if isinstance(inner, ssl.SSLError) and inner.reason:
            return inner.reason.lower().replace("_", " ")
    return str(error)
