"""Real brokers with real certificates on loopback, and MQTT clients that record what they hear."""

import os
import queue
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from atoll.fleet.identity import HUB_SERVICE, Authority, Identity, peer_of
from atoll.server.broker import Broker, TlsFiles
from atoll.server.brokers import ExternalBroker, open_broker
from atoll.server.mosquitto import find_program
from atoll.server.supervisor import Address, Child, Supervisor

DEADLINE = 10.0


def wait_until(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Return once the condition holds; fail, saying what did not happen, at the deadline."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {deadline:g} s")
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Credentials:
    """Files of one certificate."""

    certificate: Path
    key: Path

    @classmethod
    def write(cls, directory: Path, key: bytes, certificate: bytes) -> "Credentials":
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "key.pem").write_bytes(key)
        (directory / "cert.pem").write_bytes(certificate)
        return cls(directory / "cert.pem", directory / "key.pem")


class Pki:
    """A certificate authority and what it has issued."""

    def __init__(self, directory: Path, now: datetime) -> None:
        self.directory = directory
        self.now = now
        self.authority = Authority.create("Test hub", now)
        self.authority.save(directory / "ca")
        self.ca = directory / "ca" / "cert.pem"
        server = Credentials.write(
            directory / "server", *self.authority.issue_server(["localhost"], ["127.0.0.1"], now)
        )
        self.server = TlsFiles(self.ca, server.certificate, server.key)
        self.hub = self.service(HUB_SERVICE)

    def service(self, name: str) -> Credentials:
        key, certificate = self.authority.issue_service(name, self.now)
        return Credentials.write(self.directory / "services" / name, key, certificate)

    def device(self, name: str, issued: datetime | None = None) -> Credentials:
        home = self.directory / "devices" / name
        identity = Identity.new()
        identity.save(home)
        certificate = self.authority.issue_device(
            identity.csr(name), name, issued or self.now, timedelta(days=30)
        )
        (home / "cert.pem").write_bytes(certificate)
        return Credentials(home / "cert.pem", home / "key.pem")

    def serial(self, device: Credentials) -> str:
        return peer_of(
            device.certificate.read_bytes(), self.authority.cert_pem, datetime.now(UTC)
        ).serial


@dataclass
class Mqtt:
    """An MQTT client: what it was told is in ``messages``, in order."""

    client: Client
    messages: "queue.Queue[MQTTMessage]" = field(default_factory=queue.Queue)
    connected: ReasonCode | None = None
    lost: bool = False

    def next(self, deadline: float = DEADLINE) -> MQTTMessage:
        try:
            return self.messages.get(timeout=deadline)
        except queue.Empty:
            pytest.fail(f"no message came within {deadline:g} s")

    def heard(self) -> list[tuple[str, bytes]]:
        """Empty the queue."""
        found = []
        while not self.messages.empty():
            message = self.messages.get_nowait()
            found.append((message.topic, message.payload))
        return found

    def subscribe(self, topic: str, qos: int) -> None:
        """Subscribe and wait for the answer, whatever it is."""
        answered: list[int] = []
        self.client.on_subscribe = lambda *told: answered.append(told[2])
        result, mid = self.client.subscribe(topic, qos)
        assert result == 0
        wait_until(lambda: mid in answered, f"the answer to subscribing {topic}")

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish and wait for the broker's acknowledgement."""
        self.client.publish(topic, payload, qos, retain).wait_for_publish(DEADLINE)

    def drop(self) -> None:
        """Break the connection without a word, as a lost network does."""
        connection = self.client.socket()
        assert connection is not None
        connection.shutdown(socket.SHUT_RDWR)
        self.client.loop_stop()

    def leave(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@dataclass
class World:
    """A running broker, its authority, and whoever connects."""

    kind: str
    broker: Broker
    supervisor: Supervisor
    pki: Pki
    clients: list[Mqtt] = field(default_factory=list)
    wait = staticmethod(wait_until)

    def mqtt(
        self,
        credentials: Credentials | None,
        client_id: str,
        *,
        clean: bool = True,
        will: tuple[str, bytes] | None = None,
        username: str | None = None,
        manual_ack: bool = False,
        tls: bool = True,
    ) -> Mqtt:
        """Return a client that has begun to connect."""
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=clean,
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        if tls:
            context = ssl.create_default_context(cafile=str(self.pki.ca))
            if credentials is not None:
                context.load_cert_chain(credentials.certificate, credentials.key)
            client.tls_set_context(context)
        if will is not None:
            client.will_set(*will, qos=1, retain=True)
        if username is not None:
            client.username_pw_set(username, "")
        made = Mqtt(client)

        def on_connect(*told: object) -> None:
            assert isinstance(told[3], ReasonCode)
            made.connected = told[3]

        def on_disconnect(*_: object) -> None:
            made.lost = True

        client.on_connect = on_connect
        client.on_disconnect = on_disconnect
        client.on_message = lambda _client, _data, message: made.messages.put(message)
        self.clients.append(made)
        try:
            client.connect(self.broker.address.host, self.broker.address.port, keepalive=30)
        except (OSError, ssl.SSLError):
            made.lost = True
        client.loop_start()
        return made

    def connect(self, credentials: Credentials, client_id: str, **options: object) -> Mqtt:
        """Return a client that is connected."""
        made = self.mqtt(credentials, client_id, **options)  # type: ignore[arg-type]  # handed through
        wait_until(lambda: made.connected is not None or made.lost, f"connecting {client_id}")
        assert made.connected == 0, f"{client_id} was refused: {made.connected}"
        return made

    def device(self, name: str, **options: object) -> Mqtt:
        home = self.pki.directory / "devices" / name
        return self.connect(Credentials(home / "cert.pem", home / "key.pem"), name, **options)

    def hub(self, **options: object) -> Mqtt:
        return self.connect(self.pki.hub, self.broker.client_id, **options)

    def refuses(self, credentials: Credentials | None, client_id: str, **options: object) -> None:
        """Fail unless the broker turns this client away."""
        made = self.mqtt(credentials, client_id, **options)  # type: ignore[arg-type]  # handed through
        wait_until(lambda: made.lost or made.connected is not None, "an answer")
        assert made.connected is None or made.connected != 0

    def tell(self, *devices: str, revoked: tuple[str, ...] = ()) -> None:
        """List these devices to the running broker."""
        self.broker.write_config(devices, revoked)
        self.broker.reload(self.supervisor.pid("broker"))

    def restart(self) -> None:
        self.supervisor.stop("broker")
        child = self.broker.child()
        assert child is not None
        self.supervisor.start(child)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    made = Pki(tmp_path_factory.mktemp("pki"), datetime.now(UTC))
    for name in ("reef", "sandbar"):
        made.device(name)
    return made


@pytest.fixture(scope="session")
def mosquitto() -> None:
    if shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip("mosquitto is not installed (apt install mosquitto)")
    find_program()


@pytest.fixture
def external(tmp_path: Path, pki: Pki, mosquitto: None) -> Iterator[World]:
    """A broker that its own operator has set up from the files that the hub wrote for it."""
    home = tmp_path / "broker"
    address = Address("127.0.0.1", free_port())
    broker = ExternalBroker(f"mqtts://{address}", home, pki.authority)
    broker.write_config(["reef", "sandbar"])
    if os.geteuid() == 0:  # it would become the user mosquitto, who cannot enter our directory
        with (home / "mosquitto.conf").open("a") as file:
            file.write("user root\n")
    command = [str(find_program()), "-c", "mosquitto.conf"]
    with Supervisor(tmp_path / "logs") as supervisor:
        supervisor.start(Child("broker", command, ready=address, directory=home))
        made = World("external", broker, supervisor, pki)
        yield made
        for client in made.clients:
            client.leave()


@pytest.fixture(params=["nats", "mosquitto"])
def world(request: pytest.FixtureRequest, tmp_path: Path, pki: Pki) -> Iterator[World]:
    """A broker that knows the devices ``reef`` and ``sandbar``."""
    kind = str(request.param)
    if kind == "mosquitto":
        request.getfixturevalue("mosquitto")
    broker = open_broker(
        kind, tmp_path / "broker", Address("127.0.0.1", free_port()), pki.server, pki.authority
    )
    broker.write_config(["reef", "sandbar"])
    child = broker.child()
    assert child is not None
    with Supervisor(tmp_path / "logs") as supervisor:
        supervisor.start(child)
        made = World(kind, broker, supervisor, pki)
        yield made
        for client in made.clients:
            client.leave()
