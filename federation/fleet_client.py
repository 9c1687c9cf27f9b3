"""The Fleet API as a device calls it: flwr's client over mTLS, and what its failures mean.

Every request carries two proofs: the TLS client certificate, which the hub's front checks,
and Flower's node headers, which the SuperLink behind it checks. The latter are a P-384
signature over a timestamp (good for 300 s, and 5 s into the future) and the public key. Path
and body are not signed, so a front may pass a request on as it came, and the clocks of device
and hub must roughly agree.
"""

import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import (
    ProtobufCall,
    ProtobufClientInterceptor,
    ProtobufRequestContext,
)
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage

from atoll.federation.errors import LinkError
from atoll.federation.superlink import FETCH, SEND
from atoll.federation.transport import Transport, distrusts
from atoll.privacy import frames
from atoll.privacy.errors import Refused

_BUSY: Final = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)
_SECONDS: Final = 30.0

_OCTETS: Final = {"content-type": "application/octet-stream"}

_Result = TypeVar("_Result")


class Lost(Exception):  # says what happened
    """The hub is away; trying again later makes sense."""


class Skip(Exception):  # says what to do
    """The SuperLink does not want this request; the next one may be welcome."""


class FleetClient:
    """A device's connection to the hub; ``fleet`` are the calls, to be made through ``call``.

    ``ca``, ``certificate`` and ``key`` are PEM files; ``key`` is the P-384 key of both TLS
    and Flower. Raises :class:`LinkError` when they cannot be used.
    """

    def __init__(self, base_url: str, ca: Path, certificate: Path, key: Path) -> None:
        self.base_url = base_url
        self._bundled = True
        self._heard = ""
        """The last message that came whole; the hub hands it over until it hears of that."""
        try:
            private = load_pem_private_key(key.read_bytes(), password=None)
            context = ssl.create_default_context(cafile=ca)
            context.load_cert_chain(certificate, key)
        except (OSError, ValueError) as error:
            raise LinkError(
                f"the device's identity beside {key} cannot be read ({error}); enrol again"
            ) from error
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise LinkError(f"{key} holds no elliptic-curve key; enrol again")
        public = private.public_key()
        self.public_key = public_key_to_bytes(public)
        self.fleet = _Fleet(
            base_url,
            verify=context,
            interceptors=[_Version(), NodeAuthHttpInterceptor(private, public)],
        )

    def call(self, request: Callable[[], _Result]) -> _Result:
        """Make a request and say of a failure what it means for us.

        Raises :class:`Lost`, :class:`Skip`, or :class:`LinkError` when this device is refused.
        """
        try:
            return request()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            known = FlowerError.from_json(error.response.text)
            said = known.message if known else f"HTTP {status}"
            if status >= httpx.codes.INTERNAL_SERVER_ERROR or status in _BUSY:
                raise Lost(said) from error
            if status == httpx.codes.UNAUTHORIZED or known is None:
                raise LinkError(
                    f"the hub at {self.base_url} refuses this device ({said}); if it was not "
                    "revoked, check its clock, then enrol it again"
                ) from error
            raise Skip(said) from error
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ConnectError) and distrusts(error):
                raise LinkError(
                    f"the hub at {self.base_url} and this device do not trust each other's "
                    f"certificates ({error}); check the clock, then enrol again"
                ) from error
            raise Lost(str(error) or type(error).__name__) from error

    def fetch(self, request: PullMessagesRequest) -> tuple[PullMessagesResponse, list[bytes]]:
        """Wait a moment for a message; return it and its parts, in the order of its tree.

        Parts that did not come are empty or missing. A stock SuperLink has no such call; then
        this is its pull, which does not wait.
        """
        if self._bundled:
            asked = frames.pack({"heard": self._heard}, [request.SerializeToString()])
            body = self.call(lambda: self._bundle(FETCH, asked, request))
            if body is not None:
                found = PullMessagesResponse()
                try:
                    head, *parts = frames.unpack(body).parts
                    found.ParseFromString(head)
                except (Refused, ValueError, DecodeError) as error:
                    raise Skip(f"the hub's answer cannot be read ({error})") from error
                if parts and all(parts):
                    self._heard = found.message_object_trees[0].object_id
                return found, parts
        return self.call(lambda: self.fleet.PullMessages(request)), []

    def send(self, request: PushMessagesRequest, parts: Sequence[bytes]) -> bool:
        """Send a message with all of its parts; false where only the single calls are known."""
        if not self._bundled:
            return False
        body = frames.pack({}, [request.SerializeToString(), *parts])
        return self.call(lambda: self._bundle(SEND, body, request)) is not None

    def _bundle(self, name: str, body: bytes, message: ProtobufMessage) -> bytes | None:
        """Make a bundled call; none, and none any more, where it is not known."""
        found = self.fleet.raw(name, body, message)
        if found.status_code == httpx.codes.NOT_FOUND:
            self._bundled = False
            return None
        found.raise_for_status()
        return found.content

    @property
    def waits(self) -> bool:
        """Whether :meth:`fetch` waits at the hub, so that the caller need not."""
        return self._bundled

    def close(self) -> None:
        """Close the connection."""
        self.fleet.close()


class _Version:
    """Tells the SuperLink our flwr version; flwr's own interceptor may end the process."""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the headers."""
        add_headers(context.request, self._headers)
        return call_next(context)


class _Fleet(FleetHttpClient):
    """flwr's Fleet client without redirects and proxies, and quick with what is large."""

    def __init__(
        self,
        base_url: str,
        *,
        verify: ssl.SSLContext,
        interceptors: Sequence[ProtobufClientInterceptor],
    ) -> None:
        super().__init__(base_url, interceptors=interceptors, verify=verify)
        self._url = base_url
        self._client.close()
        self._client = httpx.Client(transport=Transport(verify), timeout=_SECONDS, trust_env=False)

    def raw(self, call: str, body: bytes, message: ProtobufMessage) -> httpx.Response:
        """Make a call that flwr does not know, with the headers of those it knows."""
        request = self._client.build_request(
            "POST", f"{self._url}/v1/fleet/{call}", content=body, headers=_OCTETS
        )
        return self._send(ProtobufRequestContext(call, message, request))
