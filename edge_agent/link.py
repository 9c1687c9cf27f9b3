"""The connection to the broker: one paho client per connection, never reused.

paho keeps its own queue and sends all of it again on reconnect, past its in-flight limit. So
each connection gets a fresh client and a clean session, and the outbox decides what is sent:
whatever has no PUBACK yet is sent again by the caller. The ``desired`` topic is retained and
subscribed at QoS 0: each subscription is answered with the current state.
"""

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from atoll.fleet.topics import Leaf, topic

IN_FLIGHT: Final = 20
KEEPALIVE: Final = 30
GOODBYE_SECONDS: Final = 3.0


class Up(NamedTuple):
    """Connected, and subscribed to ``desired``."""

    generation: int


class Down(NamedTuple):
    """The connection could not be made, or ended."""

    generation: int
    reason: str


class Received(NamedTuple):
    """A payload on ``desired``."""

    generation: int
    payload: bytes


class Acknowledged(NamedTuple):
    """The broker's PUBACK for what :meth:`Link.publish` returned as ``mid``."""

    generation: int
    mid: int


Signal = Up | Down | Received | Acknowledged


@dataclass(frozen=True, slots=True)
class Broker:
    """Where to connect, and as whom; ``tls`` makes a context for each connection.

    Whoever connects under the same ``client_id`` takes a connection over, and not every broker
    ties it to the certificate: it must be one that nobody else can guess.
    """

    host: str
    port: int
    client_id: str
    tls: Callable[[], ssl.SSLContext] | None


class Link:
    """Connections to one broker, one at a time; signals go to ``emit`` from other threads.

    Every signal carries the generation of the connection it belongs to, so that a late one
    of a former connection can be told apart. ``up`` and ``down`` count payload and topic bytes.
    """

    def __init__(self, broker: Broker, device: str, emit: Callable[[Signal], object]) -> None:
        self._broker = broker
        self._device = device
        self._emit = emit
        self._client: Client | None = None
        self._will = b""
        self.generation = 0
        self.bytes_up = 0
        self.bytes_down = 0

    def connect(self, will: bytes) -> None:
        """Begin a new connection with ``will`` as the last will; answer by :class:`Up`/``Down``.

        Raises what the ``tls`` callable raises.
        """
        self.close()
        self.generation += 1
        self._will = will
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._broker.client_id,
            clean_session=True,
            reconnect_on_failure=False,
        )
        client.max_inflight_messages_set(IN_FLIGHT)
        client.will_set(topic(self._device, "status"), will, qos=1, retain=True)
        if self._broker.tls is not None:
            client.tls_set_context(self._broker.tls())
        _Callbacks(self, client, self.generation, self._emit)
        self._client = client
        threading.Thread(
            target=self._dial, args=(client, self.generation), name="link", daemon=True
        ).start()

    def _dial(self, client: Client, generation: int) -> None:
        try:
            client.connect(self._broker.host, self._broker.port, KEEPALIVE)
        except (OSError, ValueError) as error:
            self._emit(Down(generation, _why(error)))
            return
        client.loop_start()
        if self.generation != generation:  # closed while we were dialling
            client.disconnect()

    @property
    def desired_topic(self) -> str:
        """The topic this device reads."""
        return topic(self._device, "desired")

    def publish(self, leaf: Leaf, payload: bytes, *, retain: bool) -> int | None:
        """Hand one message over at QoS 1; return its ``mid``, or none when not connected."""
        if self._client is None:
            return None
        name = topic(self._device, leaf)
        info = self._client.publish(name, payload, qos=1, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return None
        self.bytes_up += len(payload) + len(name)
        return info.mid

    def close(self) -> None:
        """Say goodbye (publish the will ourselves) and disconnect; harmless when not connected."""
        client, self._client = self._client, None
        if client is None:
            return
        if client.is_connected():
            info = client.publish(topic(self._device, "status"), self._will, qos=1, retain=True)
            if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
                info.wait_for_publish(GOODBYE_SECONDS)
        self.generation += 1
        client.disconnect()
        client.loop_stop()


class _Callbacks:
    """Turns paho's callbacks of one client into signals of one generation."""

    def __init__(
        self, link: Link, client: Client, generation: int, emit: Callable[[Signal], object]
    ) -> None:
        self._link = link
        self._generation = generation
        self._emit = emit
        self._reason = ""
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish

    def _on_connect(
        self,
        client: Client,
        _userdata: object,
        _flags: object,
        code: ReasonCode,
        _properties: object,
    ) -> None:
        if code.is_failure:
            self._reason = f"the broker refused us: {code}"
            return
        client.subscribe(self._link.desired_topic, qos=0)

    def _on_subscribe(
        self,
        client: Client,
        _userdata: object,
        _mid: int,
        codes: list[ReasonCode],
        _properties: object,
    ) -> None:
        if any(code.is_failure for code in codes):
            self._reason = "the broker does not let us read our desired state"
            client.disconnect()
            return
        self._emit(Up(self._generation))

    def _on_disconnect(
        self,
        _client: Client,
        _userdata: object,
        _flags: object,
        code: ReasonCode,
        _properties: object,
    ) -> None:
        self._emit(Down(self._generation, self._reason or f"connection ended: {code}"))

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        self._link.bytes_down += len(message.payload) + len(message.topic)
        self._emit(Received(self._generation, bytes(message.payload)))

    def _on_publish(
        self, _client: Client, _userdata: object, mid: int, _code: ReasonCode, _properties: object
    ) -> None:
        # paho holds its lock here; the map from mid to message is the receiver's business.
        self._emit(Acknowledged(self._generation, mid))


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not to be trusted: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
