"""What the agent's tests are made of: a small model, a signed repository, a hub, a broker."""

import json
import queue
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from atoll.edge_agent.paths import Paths
from atoll.fleet import bundle, profile, topics, trust, wire
from atoll.fleet.authority import Authority
from atoll.fleet.features import FeatureSpec
from atoll.fleet.token import EnrolmentToken

SHAPE = (2, 4)
CLASSES = ("still", "walk", "run")
CHANNELS = ("ax", "ay")


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# A model and its bundle


def weights(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32)


def onnx_model(seed: int) -> bytes:
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weights(seed), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def examples(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype(np.float32)


def logits(x: np.ndarray, seed: int) -> np.ndarray:
    return x.reshape(len(x), -1) @ weights(seed)


def write_bundle(
    directory: Path,
    seed: int = 1,
    model: str = "gait",
    golden_error: float = 0.0,
    telemetry_noise: float = 0.0,
) -> bundle.Manifest:
    spec = FeatureSpec(kind="channel-stats", channels=CHANNELS)
    edges = dict.fromkeys(spec.names, (-1.0, -0.5, 0.0, 0.5, 1.0))
    x = examples(5)
    golden = bundle.Golden(x, (logits(x, seed) + golden_error).astype(np.float32), 1e-3)
    manifest = bundle.Manifest(
        model=model,
        task="gait",
        run="r1",
        created=0.0,
        input=bundle.Input("x", SHAPE),
        output=bundle.Output("logits"),
        classes=CLASSES,
        channels=CHANNELS,
        telemetry_noise=telemetry_noise,
    )
    contents = {
        bundle.MODEL: onnx_model(seed),
        bundle.PROFILE: profile.build(spec, edges, CLASSES).encode(),
        bundle.GOLDEN: bundle.encode_golden(golden),
        bundle.CARD: b"# A small model\n",
    }
    return bundle.write(directory, manifest, contents)


# A signed repository


class Repository:
    """A TUF repository on disk, as a hub publishes it."""

    def __init__(self, directory: Path) -> None:
        self.metadata, self.targets_dir = directory / "metadata", directory / "targets"
        self.metadata.mkdir(parents=True)
        self.targets_dir.mkdir()
        self.signers = {
            role: CryptoSigner.generate_ed25519()
            for role in ("root", "targets", "snapshot", "timestamp")
        }
        expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=2)
        self.root = Root(expires=expires, consistent_snapshot=True)
        for role, signer in self.signers.items():
            self.root.add_key(signer.public_key, role)
        self.targets = Targets(expires=expires)
        self.snapshot = Snapshot(expires=expires)
        self.timestamp = Timestamp(expires=expires)
        self.root_text = self._write("root", self.root, "1.root.json")
        self.publish()

    def _write(
        self, role: str, signed: object, name: str, signer: CryptoSigner | None = None
    ) -> bytes:
        metadata = Metadata(signed)  # type: ignore[arg-type]  # one of the four roles
        metadata.sign(signer or self.signers[role])
        data = metadata.to_bytes()
        (self.metadata / name).write_bytes(data)
        return data

    def add(self, directory: Path, model: str, release: int, fallback: int | None = None) -> None:
        """Sign a bundle as a release and publish it."""
        custom = trust.TargetInfo(release, fallback).custom()
        for file in bundle.FILES:
            data = (directory / file).read_bytes()
            path = trust.target_path(model, release, file)
            target = TargetFile.from_data(path, data, ["sha256"])
            target.unrecognized_fields["custom"] = custom
            self.targets.targets[path] = target
            stored = self.targets_dir / model / str(release) / f"{target.hashes['sha256']}.{file}"
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_bytes(data)
        self.targets.version += 1
        self.publish()

    def publish(self, targets_signer: CryptoSigner | None = None) -> None:
        version = self.targets.version
        self._write("targets", self.targets, f"{version}.targets.json", targets_signer)
        self.snapshot.meta["targets.json"] = MetaFile(version)
        self.snapshot.version += 1
        self._write("snapshot", self.snapshot, f"{self.snapshot.version}.snapshot.json")
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.timestamp.version += 1
        self._write("timestamp", self.timestamp, "timestamp.json")


# A hub


@dataclass
class TestHub:
    """The device API over real TLS, small enough to be told to misbehave."""

    __test__ = False

    directory: Path
    authority: Authority = field(init=False)
    repository: Repository = field(init=False)
    secrets: dict[str, str | None] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range)"""
    break_after: int | None = None
    """Cut each target off after so many bytes."""
    life: timedelta = timedelta(days=30)
    issued_at: datetime | None = None
    broker_port: int = 1
    server: ThreadingHTTPServer = field(init=False)

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        self.authority = Authority.create("Test hub", now)
        self.repository = Repository(self.directory / "tuf")
        key, certificate = self.authority.issue_server(["localhost"], ["127.0.0.1"], now)
        (self.directory / "ca.pem").write_bytes(self.authority.cert_pem)
        (self.directory / "server.pem").write_bytes(key + certificate)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory / "server.pem")
        context.load_verify_locations(self.directory / "ca.pem")
        context.verify_mode = ssl.CERT_OPTIONAL
        self.server.socket = context.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        if not self.thread.is_alive():
            return
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def token(self, device: str | None = "watch-1") -> str:
        secret = f"secret-{len(self.secrets)}"
        self.secrets[secret] = device
        return EnrolmentToken(self.url, self.authority.fingerprint, secret, device).encode()

    def issue(self, csr: str, device: str) -> str:
        at = self.issued_at or datetime.now(UTC)
        return self.authority.issue_device(csr.encode(), device, at, self.life).decode()


def _handler(hub: TestHub) -> type[BaseHTTPRequestHandler]:  # noqa: C901  # one small server
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, extra: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (extra or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status: int, message: str, remedy: str) -> None:
            problem = {"error": "x", "message": message, "remedy": remedy}
            self.answer(status, json.dumps(problem).encode())

        def do_GET(self) -> None:
            hub.requests.append(("GET", self.path, self.headers.get("Range")))
            if self.path == "/v1/ca":
                return self.answer(200, hub.authority.cert_pem)
            if not self.connection.getpeercert():
                return self.refuse(401, "this needs a device certificate", "enrol the device")
            base = hub.directory / "tuf"
            path = base / self.path.removeprefix("/v1/tuf/")
            if not path.is_file():
                return self.refuse(404, "there is no such file", "")
            data = path.read_bytes()
            start = 0
            if wanted := self.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            part = data[start:]
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            if hub.break_after is not None and "/targets/" in self.path:
                self.send_response(206 if start else 200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part[: hub.break_after])
                self.wfile.flush()
                if len(part) > hub.break_after:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                return None
            return self.answer(206 if start else 200, part, headers if start else None)

        def do_POST(self) -> None:
            hub.requests.append(("POST", self.path, None))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/enrol":
                if body["secret"] not in hub.secrets:
                    return self.refuse(403, "the token was used before", "make a new one")
                device = hub.secrets.pop(body["secret"]) or body["device"]
                answer = {
                    "device": device,
                    "certificate": hub.issue(body["csr"], device),
                    "ca": hub.authority.cert_pem.decode(),
                    "mqtt": {"host": "127.0.0.1", "port": hub.broker_port},
                    "root": hub.repository.root_text.decode(),
                    "labels": {"role": "trainer"},
                }
                return self.answer(200, json.dumps(answer).encode())
            subject = dict(part[0] for part in self.connection.getpeercert()["subject"])
            answer = {"certificate": hub.issue(body["csr"], subject["commonName"])}
            return self.answer(200, json.dumps(answer).encode())

    return Handler


# A broker


@dataclass
class MqttBroker:
    """A real mosquitto with mutual TLS, and a hub client that hears everything."""

    directory: Path
    hub: TestHub
    port: int
    process: subprocess.Popen[bytes] | None = None
    heard: "queue.Queue[tuple[str, bytes]]" = field(default_factory=queue.Queue)
    envelopes: dict[str, list[wire.Envelope]] = field(default_factory=dict)
    client: Client | None = None

    def start(self) -> None:
        now = datetime.now(UTC)
        key, certificate = self.hub.authority.issue_service("_hub", now)
        (self.directory / "hub.key").write_bytes(key)
        (self.directory / "hub.pem").write_bytes(certificate)
        config = self.directory / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\n"
            f"cafile {self.hub.directory / 'ca.pem'}\n"
            f"certfile {self.hub.directory / 'server.pem'}\n"
            f"keyfile {self.hub.directory / 'server.pem'}\n"
            "require_certificate true\nuse_identity_as_username true\n"
            "allow_anonymous false\npersistence false\nuser root\n"
        )
        log = (self.directory / "mosquitto.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [mosquitto() or "mosquitto", "-c", str(config)], stdout=log, stderr=log
            )
        wait_until(self._listens, "the broker's start")
        client = Client(CallbackAPIVersion.VERSION2, client_id="_hub", clean_session=True)
        client.tls_set(
            str(self.hub.directory / "ca.pem"),
            str(self.directory / "hub.pem"),
            str(self.directory / "hub.key"),
        )
        subscribed = threading.Event()
        client.on_connect = lambda *_: client.subscribe(f"{topics.ROOT}/#", 1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _c, _u, message: self._hear(message.topic, message.payload)
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        assert subscribed.wait(10)
        self.client = client

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _hear(self, topic: str, payload: bytes) -> None:
        leaf = topics.parse(topic).leaf
        if leaf != "desired":
            self.envelopes.setdefault(leaf, []).append(wire.decode(payload, wire.Envelope))

    def bodies(self, kind: type) -> list:
        return [
            envelope.body
            for heard in list(self.envelopes.values())
            for envelope in list(heard)
            if isinstance(envelope.body, kind)
        ]

    def desire(self, device: str, desired: wire.Desired) -> None:
        assert self.client is not None
        self.client.publish(
            topics.topic(device, "desired"), wire.encode(desired), 1, retain=True
        ).wait_for_publish(10)

    def stop(self) -> None:
        if self.client is not None:
            self.client.disconnect()
            self.client.loop_stop()
            self.client = None
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


def mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")


@contextmanager
def hub_at(directory: Path) -> Iterator[TestHub]:
    directory.mkdir(parents=True, exist_ok=True)
    hub = TestHub(directory)
    try:
        yield hub
    finally:
        hub.close()


def enrolled(hub: TestHub, data: Path, device: str = "watch-1") -> Paths:
    from atoll.edge_agent.enrol import enrol

    paths = Paths(data)
    enrol(hub.token(device), paths, None, datetime.now(UTC))
    return paths
