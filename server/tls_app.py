"""TLS servers inside this process, and the caller's certificate where the app can see it.

uvicorn verifies client certificates but does not pass them on. The ASGI TLS extension asks
for a parsed chain that ``ssl`` does not give, so the DER of the leaf travels in the scope's
``state`` under :data:`PEER_CERTIFICATE`; it belongs to the connection, and is there again in
every request on it.
"""

import asyncio
import errno
import ssl
import threading
from pathlib import Path
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from atoll.server.errors import CannotStart, PortTaken

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from uvicorn.protocols.http.h11_impl import H11Protocol as HTTPProtocol
else:  # h11 or httptools, whichever is installed
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as HTTPProtocol

PEER_CERTIFICATE: Final = "peer_certificate"

_GRACE_SECONDS: Final = 3


class PeerCertificateProtocol(HTTPProtocol):
    """uvicorn's HTTP protocol with the client's certificate in the request state."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Remember the certificate of the connection."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        self.app_state = {**self.app_state, PEER_CERTIFICATE: certificate}


def server_context(key: Path, certificate: Path, ca_pem: str) -> ssl.SSLContext:
    """Return a TLS server context that verifies a client certificate if one is shown.

    A certificate of another authority, or one that has expired, ends the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(cadata=ca_pem)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def listen(host: str, port: int, *, option: str) -> socket:
    """Return a bound socket; raise :class:`PortTaken` or :class:`CannotStart`.

    ``option`` names the setting that chooses another port.
    """
    listener = socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM)
    try:
        listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"port {port} on {host} is in use", f"stop what uses it, or give {option}"
            ) from error
        raise CannotStart(
            f"cannot listen on {host} port {port}: {error.strerror}", f"change it with {option}"
        ) from error
    return listener


class WebServer:
    """One ASGI app served on a bound socket by a thread of its own."""

    def __init__(
        self, app: "ASGIApp", listener: socket, *, name: str, tls: ssl.SSLContext | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=PeerCertificateProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody tells us who they are by a header
            timeout_graceful_shutdown=_GRACE_SECONDS,
            timeout_keep_alive=75,
        )
        config.load()
        config.ssl = tls
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def name(self) -> str:
        """What the server is called."""
        return self._thread.name

    @property
    def port(self) -> int:
        """The port that was chosen."""
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def alive(self) -> bool:
        """Whether the server still serves."""
        return self._thread.is_alive()

    def start(self, deadline: float = 15.0) -> None:
        """Serve; return once requests are answered. Raises :class:`CannotStart`."""
        self._thread.start()
        pause = threading.Event()
        waited = 0.0
        while not self._server.started:
            if not self._thread.is_alive() or waited > deadline:
                raise CannotStart(f"the {self._thread.name} server did not start", "see the log")
            pause.wait(0.01)
            waited += 0.01

    def stop(self) -> None:
        """Finish the requests there are, for a few seconds, and end."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(_GRACE_SECONDS + 5)
        self._listener.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])


def peer_certificate(state: Any) -> bytes | None:  # noqa: ANN401  starlette's State is untyped
    """Return the DER certificate of the request's connection, or none."""
    certificate: bytes | None = getattr(state, PEER_CERTIFICATE, None)
    return certificate
