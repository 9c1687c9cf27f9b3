"""The port that devices reach, on a real hub: who gets in, and that nothing else is there."""

import json
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now as flower_now
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from sqlalchemy import select

from atoll.fleet.authority import Authority
from atoll.fleet.identity import peer_of
from atoll.server import enrolment
from atoll.server.schema import devices

Running = Any
Device = Any

PROTECTED = [
    ("POST", "/v1/renew"),
    ("GET", "/v1/tuf/metadata/timestamp.json"),
    ("GET", "/v1/tuf/targets/m/1/manifest.json"),
    ("POST", "/v1/fleet/pull-messages"),
]


@pytest.fixture(scope="session")
def device(running: Running) -> Device:
    return running.enrolled("port-1")


@pytest.fixture
def as_device(running: Running, device: Device) -> Iterator[httpx.Client]:
    with running.device_client(device) as client:
        yield client


def signed(device: Device, key_of: Device | None = None) -> dict[str, str]:
    """Return Flower's signature headers, naming the key of ``key_of`` if given."""
    timestamp = flower_now().isoformat()
    signature = sign_message((key_of or device).identity.key, timestamp.encode())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode((key_of or device).identity.public_pem()).decode(),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        "content-type": PROTOBUF_MEDIA_TYPE,
    }


def activation(device: Device) -> bytes:
    request = ActivateNodeRequest(public_key=device.identity.public_pem(), heartbeat_interval=30)
    return request.SerializeToString()


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]


def test_anyone_may_fetch_the_ca_and_check_it_against_the_token(running: Running) -> None:
    with running.device_client(None) as client:
        assert client.get("/v1/ca").text == running.ca


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_nothing_else_is_there_without_a_certificate(
    running: Running, method: str, path: str
) -> None:
    with running.device_client(None) as client:
        answer = client.request(method, path)
        assert code(answer) == (401, "unauthenticated")
        assert answer.json()["remedy"]


def test_a_foreign_certificate_ends_the_handshake(running: Running) -> None:
    now = datetime.now(UTC)
    stranger = running.device("port-foreign")
    other = Authority.create("another CA", now)
    stranger.keep(other.issue_device(stranger.csr().encode(), stranger.name, now).decode())
    with running.device_client(stranger) as client, pytest.raises(httpx.TransportError):
        client.get("/v1/ca")


def test_an_expired_certificate_ends_the_handshake(running: Running) -> None:
    late = running.device("port-expired")
    then = datetime.now(UTC) - timedelta(days=60)
    authority = running.hub.context.authority
    certificate = authority.issue_device(late.csr().encode(), late.name, then, timedelta(days=30))
    late.keep(certificate.decode())
    with running.device_client(late) as client, pytest.raises(httpx.TransportError):
        client.get("/v1/ca")


def test_a_server_certificate_of_the_ca_is_no_devices(running: Running, tmp_path: Path) -> None:
    files = running.hub.context.settings.tls
    context = ssl.create_default_context(cadata=running.ca)
    context.load_cert_chain(files / "hub.cert.pem", files / "hub.key.pem")
    url = running.hub.context.addresses.device_url
    with httpx.Client(base_url=url, verify=context, trust_env=False) as client:
        assert code(client.post("/v1/renew", json={"csr": ""})) == (403, "bad-certificate")


def test_a_certificate_that_was_never_enrolled_is_refused(running: Running) -> None:
    stray = running.device("port-stray")
    authority = running.hub.context.authority
    stray.keep(authority.issue_device(stray.csr().encode(), stray.name, datetime.now(UTC)).decode())
    with running.device_client(stray) as client:
        assert code(client.post("/v1/fleet/pull-messages")) == (403, "not-enrolled")


def test_revocation_reaches_a_connection_that_is_kept_alive(running: Running) -> None:
    revoked = running.enrolled("port-revoked")
    context = running.hub.context
    with running.device_client(revoked) as client:
        assert code(client.get("/v1/tuf/metadata/none.json")) == (404, "not-found")
        pool = client._transport._pool  # type: ignore[attr-defined]
        before = list(pool.connections)
        with context.store.begin() as connection:
            enrolment.revoke(connection, "port-revoked", actor="t", now=time.time(), reason="lost")
        assert code(client.get("/v1/tuf/metadata/none.json")) == (403, "revoked")
        assert list(pool.connections) == before  # the same connection


def test_a_renewed_certificate_takes_over_when_it_is_first_used(running: Running) -> None:
    device = running.enrolled("port-renew")
    with running.device_client(device) as old:
        answer = old.post("/v1/renew", json={"csr": device.csr()})
        assert answer.status_code == 200
        assert code(old.get("/v1/tuf/metadata/none.json")) == (404, "not-found")
        device.keep(answer.json()["certificate"])
        with running.device_client(device) as new:
            assert code(new.get("/v1/tuf/metadata/none.json")) == (404, "not-found")
        assert code(old.get("/v1/tuf/metadata/none.json")) == (403, "superseded")


def test_enrolment_answers_with_all_that_a_device_needs(running: Running) -> None:
    device = running.device("port-new")
    secret = running.token(None, {"role": "train"})
    context = running.hub.context
    with running.device_client(None) as client:
        answer = client.post(
            "/v1/enrol", json={"secret": secret, "csr": device.csr(), "device": "port-new"}
        )
        facts = answer.json()
        assert facts["device"] == "port-new"
        assert facts["labels"] == {"role": "train"}
        assert facts["ca"] == running.ca
        assert facts["mqtt"] == {
            "host": context.addresses.mqtt_host,
            "port": context.addresses.mqtt_port,
        }
        assert json.loads(facts["root"])["signed"]["_type"] == "root"
        peer = peer_of(facts["certificate"].encode(), facts["ca"].encode(), datetime.now(UTC))
        assert peer.device == "port-new"
        other = running.device("port-other")
        again = client.post("/v1/enrol", json={"secret": secret, "csr": other.csr()})
        assert code(again) == (403, "token-used")
    with context.store.read() as connection:
        row = connection.execute(select(devices).where(devices.c.id == "port-new")).one()
    assert row.node_id is not None


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"secret": 1, "csr": ""}', b"\xff"])
def test_an_enrolment_that_cannot_be_read_is_refused(running: Running, body: bytes) -> None:
    with running.device_client(None) as client:
        assert code(client.post("/v1/enrol", content=body)) == (422, "bad-input")


def test_a_body_over_the_limit_is_refused(running: Running, as_device: httpx.Client) -> None:
    big = json.dumps({"csr": "x" * 70_000})
    assert code(as_device.post("/v1/renew", content=big)) == (413, "too-large")


def test_guessing_tokens_is_slowed_down(store: Any, authority: Authority, clock: Any) -> None:
    from atoll.server.errors import TooMany
    from atoll.server.peers import Attempts

    attempts = Attempts(3, 60.0, clock)
    for _ in range(3):
        attempts.check("10.0.0.1")
        attempts.failed("10.0.0.1")
    with pytest.raises(TooMany):
        attempts.check("10.0.0.1")
    attempts.check("10.0.0.2")
    clock.now += 61
    attempts.check("10.0.0.1")


def test_a_device_speaks_to_the_superlink_under_its_own_key(
    device: Device, as_device: httpx.Client
) -> None:
    answer = as_device.post(
        "/v1/fleet/activate-node", headers=signed(device), content=activation(device)
    )
    assert answer.status_code == 200, answer.text
    assert ActivateNodeResponse.FromString(answer.content).node_id


def test_another_devices_node_key_is_refused(
    running: Running, device: Device, as_device: httpx.Client
) -> None:
    other = running.enrolled("port-2")
    answer = as_device.post(
        "/v1/fleet/activate-node", headers=signed(device, other), content=activation(other)
    )
    assert code(answer) == (403, "foreign-node-key")


def test_a_second_node_key_cannot_be_slipped_in(
    running: Running, device: Device, as_device: httpx.Client
) -> None:
    other = running.enrolled("port-3")
    both = [*signed(device).items(), *signed(other).items()]
    for headers in (both, both[::-1]):
        answer = as_device.post(
            "/v1/fleet/activate-node", headers=headers, content=activation(other)
        )
        assert code(answer) == (403, "foreign-node-key")


@pytest.mark.parametrize(
    "call", ["register-node", "unregister-node", "Pull-Messages", "pull-messages/", "x", "..", ""]
)
def test_other_fleet_calls_are_not_there(
    device: Device, as_device: httpx.Client, call: str
) -> None:
    answer = as_device.post(f"/v1/fleet/{call}", headers=signed(device))
    assert code(answer) == (404, "not-found")


CONTROL = [
    "/v1/control/start-run",
    "/v1/control/list-runs",
    "/v1/runtime/pull-messages",
    "/v1/runtime/get-nodes",
    "//v1/control/start-run",
    "/v1//control/start-run",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/%2e%2e%2fcontrol%2fstart-run",
    "/v1/fleet/..%252fcontrol%252fstart-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2fstart-run",
    "/v1/fleet/..\\control\\start-run",
    "/v1/fleet/..;/control/start-run",
    "/V1/CONTROL/start-run",
    "/v1/tuf/targets/../../../v1/control/start-run",
    "https://127.0.0.1/v1/control/start-run",
]


def raw(running: Running, device: Device | None, path: str, method: str = "POST") -> int:
    """Send the path as it is, which an HTTP client would tidy; return the status."""
    context = device.tls(running.ca) if device else ssl.create_default_context(cadata=running.ca)
    port = int(running.hub.context.addresses.device_url.rpartition(":")[2])
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n"
        f"Content-Type: {PROTOBUF_MEDIA_TYPE}\r\nConnection: close\r\n"
    )
    for name, value in (signed(device) if device else {}).items():
        if name != "content-type":
            request += f"{name}: {value}\r\n"
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall((request + "\r\n").encode())
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize("path", CONTROL)
def test_the_superlinks_control_and_runtime_are_not_there(
    running: Running, device: Device, path: str
) -> None:
    assert raw(running, device, path) in {404, 400}
    assert raw(running, None, path) in {404, 400, 401}


def test_the_superlink_itself_listens_on_loopback_alone(running: Running) -> None:
    host, _, port = running.hub.context.addresses.superlink.partition(":")
    assert host == "127.0.0.1"
    listening = {
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{int(port):04X}")
    }
    assert listening == {f"0100007F:{int(port):04X}"}


@pytest.fixture(scope="session")
def tuf(running: Running) -> Path:
    root: Path = running.hub.context.tuf
    target = root / "targets" / "gesture" / "1" / "abc.model.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(bytes(range(256)) * 4)
    (root / "secret.txt").write_text("secret")
    (root / "targets" / "link").symlink_to(root / "secret.txt")
    return root


def test_targets_can_be_resumed(tuf: Path, as_device: httpx.Client) -> None:
    path = "/v1/tuf/targets/gesture/1/abc.model.onnx"
    whole = as_device.get(path)
    assert len(whole.content) == 1024
    part = as_device.get(path, headers={"range": "bytes=1000-", "if-range": whole.headers["etag"]})
    assert part.status_code == 206
    assert part.content == whole.content[1000:]
    assert part.headers["content-range"] == "bytes 1000-1023/1024"
    assert as_device.get(path, headers={"range": "bytes=2000-"}).status_code == 416


@pytest.mark.parametrize(
    "path",
    [
        "/v1/tuf/targets/../secret.txt",
        "/v1/tuf/targets/%2e%2e/secret.txt",
        "/v1/tuf/targets/..%2fsecret.txt",
        "/v1/tuf/targets/link",
        "/v1/tuf/targets//etc/passwd",
        "/v1/tuf/targets/%2fetc%2fpasswd",
        "/v1/tuf/targets/gesture",
        "/v1/tuf/targets/",
        "/v1/tuf/metadata/..%2fsecret.txt",
        "/v1/tuf/metadata/../secret.txt",
        "/v1/tuf/metadata/%00",
    ],
)
def test_no_path_leads_out_of_the_repository(
    running: Running, device: Device, tuf: Path, path: str
) -> None:
    assert raw(running, device, path, "GET") in {404, 400}


def test_bytes_are_counted_per_device(
    running: Running, tuf: Path, wait_until: Callable[..., None]
) -> None:
    counted = running.enrolled("port-count")
    with running.device_client(counted) as client:
        for _ in range(3):
            client.get("/v1/tuf/targets/gesture/1/abc.model.onnx")
        client.post("/v1/renew", content=b"x" * 5000)
    store = running.hub.context.store

    def row() -> Any:
        with store.read() as connection:
            return connection.execute(
                select(devices.c.https_up, devices.c.https_down).where(devices.c.id == "port-count")
            ).one()

    wait_until(lambda: row().https_down > 3 * 1024 and row().https_up > 5000, "counting")
    assert row().https_down < 3 * 1024 + 10_000
    assert row().https_up < 10_000


def test_many_requests_at_once_are_served(
    running: Running, device: Device, tuf: Path, together: Callable[..., None]
) -> None:
    def fetch(_number: int) -> None:
        with running.device_client(device) as client:
            for _ in range(5):
                assert client.get("/v1/tuf/targets/gesture/1/abc.model.onnx").status_code == 200

    together(6, fetch)
    assert threading.active_count() < 100
