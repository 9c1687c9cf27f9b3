"""Choosing a broker, and what each is configured with; how they behave is in contracts/."""

import json
import re
import signal
import socket
import ssl
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from atoll.fleet.errors import BadDeviceId
from atoll.fleet.identity import HUB_SERVICE, Authority, Identity
from atoll.server import mosquitto, nats
from atoll.server.broker import TlsFiles, hub_client_id
from atoll.server.brokers import ExternalBroker, open_broker, parse_url
from atoll.server.errors import CannotStart
from atoll.server.supervisor import Address, Supervisor

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
LISTEN = Address("0.0.0.0", 8883)  # noqa: S104 -- never bound here
FILES = TlsFiles(Path("/t/ca.pem"), Path("/t/cert.pem"), Path("/t/key.pem"))


@pytest.fixture(scope="module")
def authority():
    return Authority.create("Test hub", datetime.now(UTC))


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        ("nats", nats.NatsBroker),
        ("mosquitto", mosquitto.MosquittoBroker),
        ("mqtts://broker.example:8884", ExternalBroker),
    ],
)
def test_the_setting_names_the_broker(wanted, kind, tmp_path, authority):
    assert isinstance(open_broker(wanted, tmp_path, LISTEN, FILES, authority), kind)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtts://broker.example", ("broker.example", 8883)),
        ("mqtts://10.0.0.7:1", ("10.0.0.7", 1)),
        ("mqtts://[::1]:9999/", ("::1", 9999)),
    ],
)
def test_a_broker_url_is_host_and_port(url, address):
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url", ["", "mqtt://x", "mqtts://", "mqtts://x:99999", "mqtts://u:p@x", "mqtts://x/y", "emqx"]
)
def test_any_other_url_is_refused_with_the_remedy(url):
    with pytest.raises(CannotStart, match="mqtts://host:port"):
        parse_url(url)


def test_the_hub_reaches_a_broker_of_its_own_by_loopback(tmp_path, authority):
    for kind in ("nats", "mosquitto"):
        assert open_broker(kind, tmp_path, LISTEN, FILES, authority).address == (
            "127.0.0.1",
            8883,
        )


def test_the_hubs_client_id_is_secret_and_lasts(tmp_path):
    first = hub_client_id(tmp_path / "a")
    assert first == hub_client_id(tmp_path / "a")
    assert first != hub_client_id(tmp_path / "b")
    assert len(first) >= 36
    assert (tmp_path / "a" / "client-id").stat().st_mode & 0o777 == 0o600


def test_nats_grants_each_device_its_own_subjects_alone():
    config = nats.config_for(LISTEN, FILES, Path("/s"), ["reef"])
    users = {user["user"]: user for user in config["authorization"]["users"]}
    assert set(users) == {"CN=_hub", "CN=reef"}
    assert users["CN=reef"]["permissions"] == {
        "publish": {
            "allow": [f"atoll.v1.reef.{it}" for it in ("reported", "telemetry", "event", "status")]
        },
        "subscribe": {"allow": ["atoll.v1.reef.desired"]},
    }
    assert all(user["allowed_connection_types"] == ["MQTT"] for user in users.values())


@pytest.mark.parametrize("device", ["_hub", "a b", "reef.>", "*", "", "x\nuser y"])
def test_no_name_can_smuggle_rights_into_a_configuration(device):
    with pytest.raises(BadDeviceId):
        nats.config_for(LISTEN, FILES, Path("/s"), [device])
    with pytest.raises(BadDeviceId):
        mosquitto.rules_for([device])


def test_nats_server_comes_with_the_package():
    program = nats.find_program()
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("nats-server")


def test_an_external_brokers_operator_finds_what_to_configure(tmp_path, authority):
    broker = ExternalBroker("mqtts://broker.example", tmp_path, authority, lambda: NOW)
    broker.write_config(["reef"], ["0a1b"])
    assert (tmp_path / "ca.pem").read_bytes() == authority.cert_pem
    rules = (tmp_path / "rules.acl").read_text()
    assert "pattern write atoll/v1/%u/telemetry" in rules
    assert "pattern read atoll/v1/%u/desired" in rules
    assert "user _hub\ntopic write atoll/v1/+/desired" in rules
    revoked = x509.load_pem_x509_crl((tmp_path / "revoked.crl").read_bytes())
    assert revoked.get_revoked_certificate_by_serial_number(0x0A1B) is not None
    assert broker.child() is None
    certificate = (tmp_path / "server.pem").read_bytes()
    broker.write_config([])
    assert (tmp_path / "server.pem").read_bytes() == certificate  # only renewed when it is due
    later = ExternalBroker(
        "mqtts://broker.example", tmp_path, authority, lambda: NOW + timedelta(days=300)
    )
    later.write_config([])
    assert (tmp_path / "server.pem").read_bytes() != certificate


def test_each_revocation_list_is_signed_and_newer_than_the_last(tmp_path, authority):
    path = tmp_path / "revoked.crl"
    dates = []
    for _ in range(3):  # within one second
        mosquitto.write_revocations(path, authority, ["ff"], NOW)
        found = x509.load_pem_x509_crl(path.read_bytes())
        assert found.is_signature_valid(authority.cert.public_key())
        dates.append(found.last_update_utc)
    assert dates == sorted(set(dates))
    assert dates[-1] < NOW


@pytest.fixture
def world(tmp_path, authority):
    """A NATS broker that knows the device ``reef``, and files to connect with."""
    now = datetime.now(UTC)
    key, certificate = authority.issue_server(["localhost"], ["127.0.0.1"], now)
    identity = Identity.new()
    identity.save(tmp_path / "reef")
    files = {
        "ca.pem": authority.cert_pem,
        "key.pem": key,
        "cert.pem": certificate,
        "reef/cert.pem": authority.issue_device(identity.csr("reef"), "reef", now),
    }
    (tmp_path / "hub").mkdir()
    hub_key, hub_certificate = authority.issue_service(HUB_SERVICE, now)
    files |= {"hub/key.pem": hub_key, "hub/cert.pem": hub_certificate}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = Address(*probe.getsockname())
    tls = TlsFiles(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")
    broker = nats.NatsBroker(tmp_path / "broker", listen, tls)
    broker.write_config(["reef"])
    with Supervisor(tmp_path / "logs") as supervisor:
        supervisor.start(broker.child())
        yield tmp_path, broker, supervisor


def connect(world, who, client_id):
    home, broker, _ = world
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=False,
        reconnect_on_failure=False,
    )
    context = ssl.create_default_context(cafile=str(home / "ca.pem"))
    context.load_cert_chain(home / who / "cert.pem", home / who / "key.pem")
    client.tls_set_context(context)
    client.connect(*broker.address)
    client.loop_start()
    wait_until(client.is_connected)
    return client


def wait_until(condition, deadline=10.0):
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "hello",
    [
        '{"verbose":true}',
        '{"verbose":true,"user":"CN=_hub"}',
        '{"verbose":true,"user":"CN=_hub","pass":""}',
        '{"verbose":true,"user":"CN=reef","pass":""}',
    ],
)
def test_the_native_port_of_nats_is_on_loopback_and_lets_nobody_in(world, hello):
    home, _, _ = world
    log = (home / "logs" / "broker.log").read_text()
    found = re.search(r"Listening for client connections on (.*):(\d+)", log)
    assert found is not None
    assert found[1] == "127.0.0.1"
    with socket.create_connection((found[1], int(found[2])), 5) as connection:
        stream = connection.makefile("rwb")
        assert stream.readline().startswith(b"INFO ")
        stream.write(f"CONNECT {hello}\r\nPING\r\n".encode())
        stream.flush()
        assert b"Authorization Violation" in stream.readline()
        stream.close()


def test_nats_listens_nowhere_else(world):
    _, broker, supervisor = world
    pid = supervisor.pid("broker")
    listening = set()
    inodes = {
        str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()
    }
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.add(fields[1])
    assert len(listening) == 2  # MQTT, and the native port of the test above
    assert f"0100007F:{broker.address.port:04X}" in listening


def test_what_nats_has_acknowledged_survives_its_being_killed(world):
    _, broker, supervisor = world
    hub = connect(world, "hub", broker.client_id)
    answered = []
    hub.on_subscribe = lambda *told: answered.append(told)
    hub.subscribe("atoll/v1/+/event", 1)
    wait_until(lambda: answered)
    hub.disconnect()
    hub.loop_stop()
    reef = connect(world, "reef", "reef")
    for number in range(20):
        reef.publish("atoll/v1/reef/event", str(number), 1).wait_for_publish(10)
    before = supervisor.pid("broker")
    supervisor.signal("broker", signal.SIGKILL)
    wait_until(lambda: supervisor.pid("broker") not in (None, before))
    reef.loop_stop()

    def back():
        with socket.socket() as probe:
            return probe.connect_ex(broker.address) == 0

    wait_until(back)
    heard = []
    again = Client(
        CallbackAPIVersion.VERSION2,
        client_id=broker.client_id,
        clean_session=False,
        reconnect_on_failure=False,
    )
    again.on_message = lambda _client, _data, message: heard.append(int(message.payload))
    context = ssl.create_default_context(cafile=str(world[0] / "ca.pem"))
    context.load_cert_chain(world[0] / "hub" / "cert.pem", world[0] / "hub" / "key.pem")
    again.tls_set_context(context)
    again.connect(*broker.address)
    again.loop_start()
    wait_until(lambda: len(heard) == 20)
    again.disconnect()
    again.loop_stop()
    assert heard == list(range(20))


def test_a_configuration_is_json_whatever_the_paths_are(tmp_path, authority):
    odd = TlsFiles(tmp_path / 'a "b" {c}', tmp_path / "d#e", tmp_path / "$f")
    broker = nats.NatsBroker(tmp_path, LISTEN, odd)
    broker.write_config([])
    written = json.loads((tmp_path / "nats.conf").read_text())
    assert written["mqtt"]["tls"]["ca_file"] == str(odd.ca)
