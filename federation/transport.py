"""An httpx transport over urllib3, for bodies of megabytes.

    httpx.Client(transport=Transport(context))

httpx's own hands each TLS record, 16 KB, through a parser, an iterator and a list: of the weights
of a 4 MB model that makes hundreds, and more work than reading them into one buffer. Here a request
is whole before it is sent, and an answer when it is returned; nothing is redirected, tried again or
sent through a proxy. Safe for use by several threads.
"""

import re
import ssl
from typing import Final

import httpx
import urllib3
from urllib3 import exceptions

_KEPT: Final = 4
"""Connections to a server that are kept for the next requests."""
_DISTRUST: Final = re.compile("CERTIFICATE|UNKNOWN_CA")
"""What OpenSSL says where a certificate is refused, here or by an alert from there."""


class Transport(httpx.BaseTransport):
    """Requests with TLS as ``context`` says.

    Raises :class:`httpx.ConnectError`, with what TLS says where one side does not trust the other's
    certificate; :class:`httpx.ConnectTimeout`, :class:`httpx.ReadTimeout`, and
    :class:`httpx.ReadError` for any other end of a connection. flwr gives up on an error that
    speaks of TLS and repeats a request after all others, so these do not.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._servers = urllib3.PoolManager(ssl_context=context, maxsize=_KEPT)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its whole answer."""
        limits = request.extensions.get("timeout", {})
        try:
            answer = self._servers.urlopen(
                request.method,
                str(request.url),
                body=request.read(),
                headers=urllib3.HTTPHeaderDict(request.headers.multi_items()),
                timeout=urllib3.Timeout(connect=limits.get("connect"), read=limits.get("read")),
                retries=False,
                redirect=False,
                decode_content=False,
            )
        except exceptions.NewConnectionError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        except exceptions.ConnectTimeoutError as error:
            raise httpx.ConnectTimeout(str(error), request=request) from error
        except exceptions.ReadTimeoutError as error:
            raise httpx.ReadTimeout(str(error), request=request) from error
        except exceptions.SSLError as error:
            if distrusts(error):
                raise httpx.ConnectError(str(error), request=request) from error
            raise httpx.ReadError("the connection broke", request=request) from error
        except (exceptions.HTTPError, MemoryError) as error:  # the latter for an absurd length
            raise httpx.ReadError(f"no answer ({type(error).__name__})", request=request) from error
        headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in answer.headers.items()
        ]
        return httpx.Response(answer.status, headers=headers, content=answer.data)

    def close(self) -> None:
        """Close the connections."""
        self._servers.clear()


def distrusts(error: Exception) -> bool:
    """Tell whether ``error`` is that one side does not trust the other's certificate."""
    return _DISTRUST.search(str(error)) is not None
