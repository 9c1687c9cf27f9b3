"""A real hub for the tests of its ports, and its parts alone for the tests of its decisions."""

import os
import pwd
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from atoll.federation.errors import LinkError
from atoll.federation.flower import RunStatus
from atoll.fleet.authority import Authority
from atoll.fleet.identity import Identity
from atoll.fleet.token import EnrolmentToken
from atoll.server import enrolment
from atoll.server.hub import Hub
from atoll.server.settings import Settings
from atoll.server.store import Store, sqlite_url

NOW = 1_790_000_000.0


@dataclass
class Clock:
    """Time that a test moves."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)


@dataclass
class Nodes:
    """A SuperLink that remembers what it was told; ``down`` makes it refuse.

    ``started`` hears of each run that it starts; when it is ``lossy``, who asked does not.
    """

    registered: dict[str, bytes] = field(default_factory=dict)
    runs: dict[str, RunStatus] = field(default_factory=dict)
    down: bool = False
    lossy: bool = False
    started: Callable[[str], None] = lambda _: None

    def register_node(self, public_key_pem: bytes) -> str:
        self._check()
        if public_key_pem in self.registered.values():
            raise LinkError("Public key already in use.")
        node = str(1000 + len(self.registered))
        self.registered[node] = public_key_pem
        return node

    def unregister_node(self, node_id: str) -> None:
        self._check()
        self.registered.pop(node_id, None)

    def start_run(self, app: str, config: Mapping[str, bool | int | float | str]) -> str:
        self._check()
        run = str(len(self.runs) + 1)
        self.runs[run] = RunStatus("running", "", f"{app} {dict(config)}")
        self.started(run)
        if self.lossy:
            raise LinkError("the SuperLink cannot be reached")
        return run

    def run_status(self, run_id: str) -> RunStatus:
        self._check()
        return self.runs[run_id]

    def stop_run(self, run_id: str) -> None:
        self.runs[run_id] = RunStatus("finished", "stopped", "")

    def _check(self) -> None:
        if self.down:
            raise LinkError("the SuperLink is down")


@dataclass
class Device:
    """A device of a test: its keys, and its certificate once it has one."""

    name: str
    directory: Path
    identity: Identity = field(default_factory=Identity.new)

    def csr(self) -> str:
        return self.identity.csr(self.name).decode()

    def keep(self, certificate: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.identity.save(self.directory)
        (self.directory / "cert.pem").write_text(certificate)

    def tls(self, ca: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=ca)
        context.load_cert_chain(self.directory / "cert.pem", self.directory / "key.pem")
        return context


@dataclass
class RunningHub:
    """A real hub on loopback, with its broker and SuperLink."""

    hub: Hub
    root: Path

    @property
    def ca(self) -> str:
        return self.hub.context.authority.cert_pem.decode()

    @contextmanager
    def device_client(self, device: Device | None) -> Iterator[httpx.Client]:
        """Talk to the device port as ``device``, or without certificate."""
        context = device.tls(self.ca) if device else ssl.create_default_context(cadata=self.ca)
        url = self.hub.context.addresses.device_url
        with httpx.Client(base_url=url, verify=context, trust_env=False, timeout=10) as client:
            yield client

    @contextmanager
    def operator_client(self, token: str | None) -> Iterator[httpx.Client]:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = self.hub.context.addresses.operator_url + "/api/v1"
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=10) as client:
            yield client

    def token(self, device: str | None, labels: Mapping[str, str] | None = None) -> str:
        """Return the secret of a fresh enrolment token."""
        context = self.hub.context
        with context.store.begin() as connection:
            text = enrolment.new_token(
                connection,
                url=context.addresses.device_url,
                ca_sha256=context.authority.fingerprint,
                device=device,
                labels=labels or {},
                life=3600.0,
                actor="test",
                now=context.clock(),
            )
        return EnrolmentToken.decode(text).secret

    def device(self, name: str) -> Device:
        return Device(name, self.root / name)

    def enrolled(self, name: str) -> Device:
        """Return a device that has just enrolled."""
        device = self.device(name)
        with self.device_client(None) as client:
            answer = client.post(
                "/v1/enrol", json={"secret": self.token(name), "csr": device.csr()}
            )
        assert answer.status_code == 200, answer.text
        device.keep(answer.json()["certificate"])
        return device


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(sqlite_url(tmp_path / "hub.db"))
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create("test CA", datetime.fromtimestamp(NOW, UTC) - timedelta(days=1))


def settings(data: Path) -> Settings:
    """Settings of a hub that keeps to loopback and takes free ports."""
    return Settings(
        data=data,
        device_bind="127.0.0.1",
        device_port=0,
        operator_port=0,
        mqtt_bind="127.0.0.1",
        mqtt_port=0,
    )


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    root = tmp_path_factory.mktemp("hub")
    with Hub(settings(root / "data")) as hub:
        yield RunningHub(hub, root / "devices")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of our own."""
    programs = [shutil.which(name) for name in ("initdb", "postgres")]
    if None in programs:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="atoll[postgres] is not installed")
    initdb, server = map(str, programs)
    data = Path("/tmp") / f"atoll-pg-{os.getpid()}"  # a path that another user may enter
    data.mkdir(mode=0o700)
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = "nobody"
        os.chown(data, pwd.getpwnam(user).pw_uid, -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    cluster = data / "cluster"
    process = None
    try:
        subprocess.run(
            [initdb, "-D", cluster, "-U", "atoll", "-A", "trust", "--no-sync"],
            check=True,
            user=user,
            **quiet,
        )
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}"]
        process = subprocess.Popen(
            [server, "-D", cluster, "-p", str(port), "-F", *options], user=user, **quiet
        )
        wait_until(lambda: _listens(port), "PostgreSQL answering")
        yield f"postgresql://atoll@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            process.terminate()
            process.wait(20)
        shutil.rmtree(data, ignore_errors=True)


def _listens(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(f"postgresql://atoll@127.0.0.1:{port}/postgres").close()
    except psycopg.OperationalError:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str, deadline: float = 40.0) -> None:
    """Return once the condition holds; fail, saying what did not happen, at the deadline."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {deadline:g} s")
        time.sleep(0.02)


@pytest.fixture(scope="session", name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


@pytest.fixture(name="hub_settings")
def hub_settings_fixture() -> Callable[[Path], Settings]:
    return settings


@pytest.fixture
def new_device(tmp_path: Path) -> Callable[[str], Device]:
    return lambda name: Device(name, tmp_path / "devices" / name)


def together(count: int, do: Callable[[int], object]) -> None:
    """Run ``do`` in threads that begin at once; raise what any of them raised."""
    gate = threading.Barrier(count)
    failed: list[BaseException] = []

    def one(number: int) -> None:
        gate.wait()
        try:
            do(number)
        except BaseException as error:  # noqa: BLE001  raised again by whoever waits
            failed.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.fixture(name="together")
def together_fixture() -> Callable[[int, Callable[[int], object]], None]:
    return together
