"""Flower's device side: one warm node that calls a ClientApp in this process.

    WarmNode(base_url, ca=..., certificate=..., key=...).serve(client_app, stop)

Stock SuperNodes start a process for every message. This one speaks the same Fleet protocol
through flwr's own client and serializers and keeps the ClientApp, torch and the data loaded.
flwr's own loop ends the process when something is wrong (``flwr_exit``, SIGINT to itself)
and installs signal handlers; nothing of that is used here.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

import httpx
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
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
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

from atoll.federation.errors import LinkError
from atoll.federation.exchange import FASTEST_POLL, poll_delay
from atoll.federation.fleet_client import FleetClient, Lost, Skip
from atoll.federation.flower import answer, laid_out_once

SLOWEST_POLL: Final = 2.0
_HEARTBEAT: Final = 10
"""Seconds promised between signs of life, the least that Flower takes; after two promises
without one the SuperLink counts us as gone."""
_SLOWEST_RETRY: Final = 20.0
_TRIES: Final = 5
"""Tries at one request before the session is given up: about 15 s, enough for a hub's restart."""
_ADMISSIONS: Final = 2
"""Tries at being let in again after a refusal: a SuperLink that came back has other node ids, and
for a moment knows none."""
_PART_PATIENCE: Final = 60.0

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


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
        device, which a device that has been connected asks about :data:`_ADMISSIONS` times. A
        connection lost later is taken up again with back-off. The ClientApp stays, so that what
        it remembers of a round outlives the SuperLink that asked.
        """
        attempt = refusals = 0
        connected = False
        while not stop.is_set():
            client = FleetClient(self._base_url, self._ca, self._certificate, self._key)
            try:
                with _Session(client, stop) as session:
                    connected, attempt, refusals = True, 0, 0
                    session.serve(app)
            except Lost as lost:
                if not connected:
                    raise LinkError(
                        f"the hub at {self._base_url} cannot be reached ({lost}); "
                        "check the address and that the hub runs"
                    ) from lost
                attempt += 1
                delay = _back_off(attempt)
                _log.warning("lost the hub (%s); trying again in %.1f s", lost, delay)
                stop.wait(delay)
            except LinkError as refused:
                if not connected or refusals == _ADMISSIONS:
                    raise
                refusals += 1
                _log.warning("%s; asking again", refused)
                stop.wait(_back_off(refusals))
            finally:
                client.close()


class _Session:
    """One activation of our node at the SuperLink."""

    def __init__(self, client: FleetClient, stop: threading.Event) -> None:
        self._client, self._fleet, self._stop = client, client.fleet, stop
        self._node = Node()
        self._ended = threading.Event()
        self._broken: Exception | None = None
        self._heart = threading.Thread(target=self._beat, name="flower-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        request = ActivateNodeRequest(
            public_key=self._client.public_key, heartbeat_interval=_HEARTBEAT
        )
        try:
            activated = self._client.call(lambda: self._fleet.ActivateNode(request))
        except Skip as refused:
            raise LinkError(
                f"the hub at {self._client.base_url} does not know this device's key "
                f"({refused}); enrol it again"
            ) from refused
        self._node = Node(node_id=activated.node_id)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        try:
            self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except httpx.HTTPError as error:
            _log.debug("could not say goodbye to the hub: %s", error)

    def serve(self, app: ClientApp) -> None:
        """Pull, answer and push until told to stop; raises :class:`Lost`."""
        last = time.monotonic()
        while not self._stop.is_set():
            if self._broken is not None:
                raise self._broken
            try:
                worked = self._one(app)
            except Skip as skipped:
                _log.warning("left a message out: %s", skipped)
                worked = True
            if worked:
                last = time.monotonic()
            elif not self._client.waits:
                self._stop.wait(poll_delay(time.monotonic() - last, SLOWEST_POLL))

    def _one(self, app: ClientApp) -> bool:
        """Answer one message; false when there is none."""
        request = PullMessagesRequest(node=self._node)
        response, parts = self._persist(lambda: self._client.fetch(request))
        if not response.messages_list:
            return False
        started = time.monotonic()
        message = self._fetch(response.messages_list[0], response.message_object_trees[0], parts)
        fetched = time.monotonic()
        context = Context(message.metadata.run_id, self._node.node_id, {}, RecordDict(), {})
        reply = answer(app, message, context)
        answered = time.monotonic()
        self._push(reply, answered - fetched)
        _log.debug(
            "%s: %.3f s to fetch, %.3f s to answer, %.3f s to send",
            message.metadata.message_type,
            fetched - started,
            answered - fetched,
            time.monotonic() - answered,
        )
        if reply.has_error():
            _log.warning("%s failed: %s", message.metadata.message_type, reply.error.reason)
        return True

    def _fetch(self, envelope: MessageProto, tree: ObjectTree, parts: Sequence[bytes]) -> Message:
        """Put a message together from its parts; pull them if any did not come along."""
        run, message_id = envelope.metadata.run_id, tree.object_id
        names = [part.object_id for part in iterate_object_tree(tree)]
        if len(parts) == len(names) and all(parts):
            contents = dict(zip(names, parts, strict=True))
        else:
            contents = self._pull(run, message_id, names)
        message = inflate_object_from_contents(message_id, contents)
        if not isinstance(message, Message):
            raise Skip(f"a {type(message).__name__} came instead of a message")
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _pull(self, run: int, message_id: str, names: Sequence[str]) -> dict[str, bytes]:
        """Pull a message's parts one by one and confirm that it is here."""
        try:
            contents = pull_objects(
                list(names),
                make_pull_object_fn_protobuf(
                    lambda part: self._persist(lambda: self._fleet.PullObject(part)),
                    self._node,
                    run,
                ),
                initial_backoff=FASTEST_POLL,
                max_time=_PART_PATIENCE,
            )
        except ObjectPullError as error:
            raise Skip(str(error)) from error
        received = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run, message_object_id=message_id
        )
        self._persist(lambda: self._fleet.ConfirmMessageReceived(received))
        return contents

    def _push(self, reply: Message, seconds: float) -> None:
        """Send a reply with its parts: at once, or where that is not known one by one."""
        with laid_out_once([reply]):
            reply.metadata.__dict__["_message_id"] = reply.object_id
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            objects = get_all_nested_objects(reply)
            parts = [part.deflate() for part in objects.values()]
            if self._persist(lambda: self._client.send(request, parts)):
                return
            response = self._persist(lambda: self._fleet.PushMessages(request))
            try:
                push_objects(
                    objects,
                    make_push_object_fn_protobuf(
                        lambda part: self._persist(lambda: self._fleet.PushObject(part)),
                        self._node,
                        reply.metadata.run_id,
                        response.session_id,
                    ),
                    object_ids_to_push=set(response.objects_to_push),
                )
            except ObjectPushError as error:
                raise Skip(str(error)) from error

    def _persist(self, request: Callable[[], _Result]) -> _Result:
        """Make a request that may be repeated, so that a moment's absence costs no round."""
        for attempt in range(1, _TRIES):
            try:
                return self._client.call(request)
            except Lost as lost:
                delay = _back_off(attempt)
                _log.info("the hub is away (%s); trying again in %.1f s", lost, delay)
                if self._stop.wait(delay):
                    raise
        return self._client.call(request)

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_HEARTBEAT)
        while not self._ended.wait(_HEARTBEAT * _jitter() * 0.5):
            try:
                if not self._client.call(lambda: self._fleet.SendNodeHeartbeat(request)).success:
                    self._broken = Lost("the SuperLink no longer knows this session")
            except (Lost, Skip) as error:
                _log.debug("heartbeat: %s", error)
            except LinkError as refused:
                self._broken = refused


def _back_off(attempt: int) -> float:
    return float(min(2.0 ** (attempt - 1), _SLOWEST_RETRY)) * _jitter()


def _jitter() -> float:
    """Spread the fleet's requests; guards nothing."""
    return random.uniform(0.7, 1.0)  # noqa: S311  # see above
