"""Flower's device side: one warm node that calls a ClientApp in this process.

Stock SuperNodes start a process for every message. This one speaks the same Fleet protocol
through flwr's own client and serializers and keeps the ClientApp, torch and the data loaded.

    WarmNode(base_url, ca=..., certificate=..., key=...).serve(client_app, stop)

Every request carries two proofs: the TLS client certificate, which the hub's front checks,
and Flower's node headers, which the SuperLink behind it checks. The latter are a P-384
signature over a timestamp (fresh to 300 s) and the public key; path and body are not signed,
so the front may pass a request on as it came, and the clocks must roughly agree.

flwr's own loop ends the process when something is wrong (``flwr_exit``, SIGINT to itself)
and installs signal handlers; nothing of that is used here.
"""

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

import httpx
from atoll.federation.errors import LinkError
from atoll.federation.flower import answer
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
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

FASTEST_POLL: Final = 0.1
SLOWEST_POLL: Final = 2.0
_POLL_SHARE: Final = 0.25
"""The wait for a message grows by at most this share."""
_HEARTBEAT: Final = 10
"""Seconds promised between signs of life; after two promises without one the hub drops us."""
_SLOWEST_RETRY: Final = 20.0
_PART_PATIENCE: Final = 60.0

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def poll_delay(idle: float) -> float:
    """Return the seconds to wait before asking again, ``idle`` seconds after the last message.

    A quarter of the time waited so far: prompt while messages flow, and never adding more
    than that share to a wait, up to :data:`SLOWEST_POLL`.
    """
    return min(max(idle * _POLL_SHARE, FASTEST_POLL), SLOWEST_POLL)


class WarmNode:
    """A device's node. ``base_url`` is the hub's front, such as ``https://hub:8443``.

    ``ca``, ``certificate`` and ``key`` are PEM files, read at each connect so that a renewed
    certificate is used; ``key`` is the P-384 key of both TLS and Flower.
    """

    def __init__(self, base_url: str, *, ca: Path, certificate: Path, key: Path) -> None:
        self._base_url = base_url.rstrip("/")
        self._ca, self._certificate, self._key = ca, certificate, key

    def serve(self, app: ClientApp, stop: threading.Event) -> None:
        """Answer messages until ``stop`` is set.

        Raises :class:`LinkError` when the first connection fails or the hub refuses this
        device. A connection lost later is taken up again with back-off.
        """
        attempt = 0
        connected = False
        while not stop.is_set():
            try:
                with _Connection(
                    self._base_url, self._ca, self._certificate, self._key
                ) as connection:
                    connected, attempt = True, 0
                    connection.serve(app, stop)
            except _Lost as lost:
                if not connected:
                    raise LinkError(
                        f"the hub at {self._base_url} cannot be reached ({lost}); "
                        "check the address and that the hub runs"
                    ) from lost
                attempt += 1
                delay = min(2.0**attempt, _SLOWEST_RETRY) * random.uniform(0.5, 1)  # noqa: S311  # spreads load, guards nothing
                _log.warning("lost the hub (%s); trying again in %.1f s", lost, delay)
                stop.wait(delay)


class _Lost(Exception):
    """The hub is away; trying again later makes sense."""


class _Skip(Exception):
    """This message cannot be used; the next one may be."""


class _Connection:
    """One activated session with the SuperLink."""

    def __init__(self, base_url: str, ca: Path, certificate: Path, key: Path) -> None:
        self._base_url = base_url
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
        self._public = public_key_to_bytes(public)
        self._client = _Fleet(
            base_url,
            verify=context,
            interceptors=[_Version(), NodeAuthHttpInterceptor(private, public)],
        )
        self._node = Node()
        self._ended = threading.Event()
        self._broken: Exception | None = None
        self._heart = threading.Thread(target=self._beat, name="flower-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=_HEARTBEAT)
        try:
            activated = self._call(lambda: self._client.ActivateNode(request))
        except _Skip as refused:
            self._client.close()
            raise LinkError(
                f"the hub at {self._base_url} does not know this device's key ({refused}); "
                "enrol it again"
            ) from refused
        except BaseException:
            self._client.close()
            raise
        self._node = Node(node_id=activated.node_id)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except httpx.HTTPError as error:
            _log.debug("could not say goodbye to the hub: %s", error)
        self._client.close()

    def serve(self, app: ClientApp, stop: threading.Event) -> None:
        """Pull, answer and push until ``stop``; raises :class:`_Lost`."""
        last = time.monotonic()
        while not stop.is_set():
            if self._broken is not None:
                raise self._broken
            try:
                worked = self._one(app)
            except _Skip as skipped:
                _log.warning("left a message out: %s", skipped)
                worked = True
            if worked:
                last = time.monotonic()
            else:
                stop.wait(poll_delay(time.monotonic() - last))

    def _one(self, app: ClientApp) -> bool:
        """Answer one message; false when there is none."""
        request = PullMessagesRequest(node=self._node)
        response = self._call(lambda: self._client.PullMessages(request))
        if not response.messages_list:
            return False
        started = time.monotonic()
        message = self._fetch(response.messages_list[0], response.message_object_trees[0])
        run = message.metadata.run_id
        context = Context(run, self._node.node_id, {}, RecordDict(), {})
        reply = answer(app, message, context)
        if reply.has_error():
            _log.warning("%s failed: %s", message.metadata.message_type, reply.error.reason)
        worked = time.monotonic()
        self._push(reply, worked - started)
        _log.debug(
            "%s: %.3f s, of it %.3f s to send the reply",
            message.metadata.message_type,
            time.monotonic() - started,
            time.monotonic() - worked,
        )
        return True

    def _fetch(self, envelope: MessageProto, tree: ObjectTree) -> Message:
        """Pull a message's parts and put it together."""
        run, message_id = envelope.metadata.run_id, tree.object_id
        pull = make_pull_object_fn_protobuf(
            lambda part: self._call(lambda: self._client.PullObject(part)), self._node, run
        )
        try:
            contents = pull_objects(
                [part.object_id for part in iterate_object_tree(tree)],
                pull,
                initial_backoff=FASTEST_POLL,
                max_time=_PART_PATIENCE,
            )
        except ObjectPullError as error:
            raise _Skip(str(error)) from error
        received = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run, message_object_id=message_id
        )
        self._call(lambda: self._client.ConfirmMessageReceived(received))
        message = inflate_object_from_contents(message_id, contents)
        if not isinstance(message, Message):
            raise _Skip(f"a {type(message).__name__} came instead of a message")
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _push(self, reply: Message, seconds: float) -> None:
        """Send a reply's envelope, then those of its parts that the SuperLink lacks."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            response = self._call(lambda: self._client.PushMessages(request))
            try:
                push_objects(
                    get_all_nested_objects(reply),
                    make_push_object_fn_protobuf(
                        lambda part: self._call(lambda: self._client.PushObject(part)),
                        self._node,
                        reply.metadata.run_id,
                        response.session_id,
                    ),
                    object_ids_to_push=set(response.objects_to_push),
                )
            except ObjectPushError as error:
                raise _Skip(str(error)) from error

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_HEARTBEAT)
        while not self._ended.wait(_HEARTBEAT * random.uniform(0.4, 0.6)):  # noqa: S311  # spreads load, guards nothing
            try:
                if not self._call(lambda: self._client.SendNodeHeartbeat(request)).success:
                    self._broken = _Lost("the SuperLink no longer knows this session")
            except (_Lost, _Skip) as error:
                _log.debug("heartbeat: %s", error)
            except LinkError as refused:
                self._broken = refused

    def _call(self, request: Callable[[], _Result]) -> _Result:
        """Say of a failed request what it means for us."""
        try:
            return request()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            known = FlowerError.from_json(error.response.text)
            said = known.message if known else f"HTTP {status}"
            if status >= httpx.codes.INTERNAL_SERVER_ERROR or status in _BUSY:
                raise _Lost(said) from error
            if status == httpx.codes.UNAUTHORIZED or known is None:
                raise LinkError(
                    f"the hub at {self._base_url} refuses this device ({said}); if it was not "
                    "revoked, check its clock, then enrol it again"
                ) from error
            raise _Skip(said) from error
        except httpx.HTTPError as error:
            if isinstance(error.__cause__, ssl.SSLError) or "CERTIFICATE" in str(error):
                raise LinkError(
                    f"the hub at {self._base_url} and this device do not trust each other's "
                    f"certificates ({error}); enrol again"
                ) from error
            raise _Lost(str(error) or type(error).__name__) from error


_BUSY: Final = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)


class _Version:
    """Tells the SuperLink our flwr version; flwr's own interceptor may end the process."""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the headers."""
        add_headers(context.request, self._headers)
        return call_next(context)


class _Fleet(FleetHttpClient):
    """flwr's Fleet client over a client certificate, without proxies or redirects."""

    def __init__(
        self,
        base_url: str,
        *,
        verify: ssl.SSLContext,
        interceptors: Sequence[ProtobufClientInterceptor],
    ) -> None:
        super().__init__(base_url, interceptors=interceptors, verify=verify)
        self._client.close()
        self._client = httpx.Client(verify=verify, timeout=30.0, trust_env=False)
