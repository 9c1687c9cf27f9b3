"""The hub's one MQTT connection: durable, acknowledged by hand, published through by others.

The session is durable (``clean_session`` off) and messages are acknowledged by whoever took
them, after its commit; what was not acknowledged comes again. Packet ids begin anew with each
connection, so every message remembers the connection it came by, and an acknowledgement for
an earlier one is dropped.
"""

import logging
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from atoll.server.supervisor import Address

log = logging.getLogger(__name__)

_KEEPALIVE: Final = 30
_RETRY_SECONDS: Final = (1, 15)
_MAX_WAITING: Final = 65_535


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message from a device, not acknowledged yet."""

    topic: str
    payload: bytes
    retained: bool
    """Kept by the broker from before, not sent just now."""
    connection: int
    mid: int
    qos: int


class Link:
    """Connects to the broker, again and again, and hands each message to ``receive``.

    ``receive`` is called by the network thread and must not block.
    """

    def __init__(
        self,
        address: Address,
        client_id: str,
        tls: ssl.SSLContext,
        topics: Sequence[str],
        receive: Callable[[Incoming], None],
    ) -> None:
        self._address = address
        self._topics = topics
        self._receive = receive
        self._connection = 0
        self._online = threading.Event()
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=False,
            protocol=MQTTProtocolVersion.MQTTv311,
            manual_ack=True,
        )
        self._client.tls_set_context(tls)
        self._client.max_queued_messages_set(_MAX_WAITING)
        self._client.reconnect_delay_set(*_RETRY_SECONDS)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._message

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._client.connect_async(self._address.host, self._address.port, _KEEPALIVE)
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnect; the broker keeps what comes for us until we are back."""
        self._client.disconnect()
        self._client.loop_stop()
        self._online.clear()

    @property
    def online(self) -> bool:
        """Whether the connection stands."""
        return self._online.is_set()

    def wait_online(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the connection."""
        return self._online.wait(timeout)

    def ack(self, message: Incoming) -> None:
        """Tell the broker that ``message`` is safe here."""
        if message.connection == self._connection:
            self._client.ack(message.mid, message.qos)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> MQTTMessageInfo:
        """Send at QoS 1; the result says when the broker has it."""
        return self._client.publish(topic, payload, qos=1, retain=retain)

    def _connected(
        self,
        client: Client,
        _userdata: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            log.warning("the broker refused the hub: %s", reason)
            return
        self._connection += 1
        client.subscribe([(topic, 1) for topic in self._topics])
        self._online.set()

    def _disconnected(
        self,
        _client: Client,
        _userdata: object,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._online.clear()
        if reason.is_failure:
            log.info("the connection to the broker ended: %s", reason)

    def _message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        self._receive(
            Incoming(
                message.topic,
                bytes(message.payload),
                message.retain,
                self._connection,
                message.mid,
                message.qos,
            )
        )


def published(info: MQTTMessageInfo, timeout: float) -> bool:
    """Wait for the broker's acknowledgement of a publish, up to ``timeout`` seconds."""
    if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
        return False
    try:
        info.wait_for_publish(timeout)
    except (RuntimeError, ValueError):  # the connection ended, or the queue is full
        return False
    return info.is_published()


def client_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a TLS context that trusts our CA alone and shows the hub's own certificate."""
    context = ssl.create_default_context(cafile=str(ca))
    context.load_cert_chain(certificate, key)
    return context
