"""A whole hub in one process, with broker, SuperLink and executor as its children.

    with Hub(settings) as hub:
        hub.context.addresses.device_url
        hub.wait()

:func:`run_hub` is that for a terminal. Starting is all or nothing: whatever was started is
ended again, in reverse, when a later part cannot start.
"""

import fcntl
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from sqlalchemy import update

from atoll.federation import flower
from atoll.federation.errors import LinkError
from atoll.fleet.authority import Authority
from atoll.fleet.errors import FleetError
from atoll.server import operator_file, publishing, repository, runs, web
from atoll.server.broker import Broker
from atoll.server.brokers import open_broker
from atoll.server.context import Addresses, HubContext
from atoll.server.device_api import create_device_app
from atoll.server.duties import duties
from atoll.server.errors import AlreadyRunning, CannotStart
from atoll.server.events import Bus
from atoll.server.exporting import Exporter
from atoll.server.fleet_front import FleetFront
from atoll.server.ingest import TOPICS, Ingest
from atoll.server.link import Link, client_context
from atoll.server.membership import Fleet
from atoll.server.mlflow import Mlflow
from atoll.server.operator_api import create_operator_app
from atoll.server.peers import Traffic
from atoll.server.scheduler import Duty, Scheduler
from atoll.server.schema import devices
from atoll.server.settings import Settings
from atoll.server.store import Store
from atoll.server.supervisor import Address, Child, Supervisor
from atoll.server.tls_app import WebServer, listen, server_context
from atoll.server.tls_files import HubTls, open_authority, open_tls

log = logging.getLogger(__name__)

_LOCAL: Final = "127.0.0.1"
_SUPERLINK_SECONDS: Final = 60.0


class Hub:
    """A running hub; start it as a context manager or with :meth:`start` and :meth:`stop`."""

    context: HubContext
    ingest: Ingest

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        patience: float = 15.0,
    ) -> None:
        """``patience``: seconds to wait for the broker to let the hub in."""
        self._settings = settings
        self._clock = clock
        self._patience = patience
        self._parts = ExitStack()
        self._stopped = threading.Event()
        self._servers: list[WebServer] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start every part; raise :class:`CannotStart` with nothing left running."""
        try:
            self._start()
        except (OSError, FleetError) as error:
            self.stop()
            raise _explained(error, self._settings.data) from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every part, the last one started first."""
        self._stopped.set()
        self._parts.close()

    def end(self) -> None:
        """Have :meth:`wait` return; safe in a signal handler."""
        self._stopped.set()

    def wait(self) -> None:
        """Wait for :meth:`end`; raise :class:`CannotStart` if a port stops answering."""
        while not self._stopped.wait(0.5):
            for server in self._servers:
                if not server.alive:
                    raise CannotStart(f"the {server.name} server has ended", "see the log")

    def _start(self) -> None:
        settings = self._settings
        now = datetime.fromtimestamp(self._clock(), UTC)
        settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._parts.enter_context(_lock(settings.data))
        device_port = listen(settings.device_bind, settings.device_port, option="--device-port")
        self._parts.callback(device_port.close)
        operator_port = listen(
            settings.operator_bind, settings.operator_port, option="--operator-port"
        )
        self._parts.callback(operator_port.close)
        authority = open_authority(settings.ca, now)
        tls = open_tls(authority, settings.ca / "cert.pem", settings.tls, settings.host, now)
        store = Store(settings.database_url)
        self._parts.callback(store.close)
        store.migrate()
        repository.ensure(settings.tuf, settings.offline_keys, settings.online_keys, now)
        for release in publishing.reconcile(store, settings, self._clock()):
            log.warning("%s was signed and not recorded; it is now", release)

        supervisor = self._parts.enter_context(
            Supervisor(settings.data / "logs", restarted=lambda name: self._again(name, store))
        )
        broker = self._broker(tls, authority)
        superlink, nodes = self._superlink(supervisor, tls)
        self._fleet = Fleet(
            store,
            broker,
            lambda: supervisor.pid("broker"),
            nodes,
            self._clock,
            refused=LinkError,
        )
        if settings.superlink is None:
            self._fleet.forget_nodes()
        self.context = HubContext(
            settings=settings,
            store=store,
            authority=authority,
            clock=self._clock,
            membership=self._fleet,
            nodes=nodes,
            bus=Bus(),
            addresses=Addresses(
                device_url=_url("https", settings.host, device_port),
                operator_url=_url("http", settings.operator_bind, operator_port),
                mqtt_host=settings.host if broker.child() else broker.address.host,
                mqtt_port=broker.address.port,
                superlink=superlink,
            ),
        )
        link, self.ingest = self._messaging(supervisor, broker, tls)
        traffic = Traffic()
        self._parts.callback(traffic.flush, store)
        runner = runs.Runner(store, nodes, self._clock, settings.runs)
        runner.recover()
        scheduler = Scheduler(duties(self.context, link, traffic, runner))
        scheduler.start()
        self._parts.callback(scheduler.stop)
        if settings.mlflow is not None:
            self._export(store, settings.mlflow)
        self._serve(tls, device_port, operator_port, traffic)
        operator_file.write(self.context)

    def _export(self, store: Store, url: str) -> None:
        """Tell MLflow of runs, in a thread of its own: it may be slow, and nothing waits for it."""
        mlflow = self._parts.enter_context(Mlflow(url))
        exporter = Exporter(store, self._settings.runs, mlflow, self._clock)
        telling = Scheduler([Duty("exporting to MLflow", exporter.tick, every=2.0)])
        telling.start()
        self._parts.callback(telling.stop)

    def _broker(self, tls: HubTls, authority: Authority) -> Broker:
        settings = self._settings
        port = settings.mqtt_port or free_port(settings.mqtt_bind)
        return open_broker(
            settings.broker,
            settings.data / "broker",
            Address(settings.mqtt_bind, port),
            tls.broker,
            authority,
        )

    def _superlink(self, supervisor: Supervisor, tls: HubTls) -> tuple[str, flower.SuperLinkAdmin]:
        """Start the SuperLink, or take the one given, and the executor beside it."""
        settings = self._settings
        home = settings.data / "superlink"
        home.mkdir(mode=0o700, exist_ok=True)
        ca = settings.superlink_ca or settings.ca / "cert.pem"
        try:
            ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise CannotStart(
                f"{ca} cannot be used as the SuperLink's CA: {error}",
                "give its certificate in PEM with --superlink-ca",
            ) from error
        if settings.superlink is None:
            port = settings.superlink_port or free_port(_LOCAL)
            address = f"{_LOCAL}:{port}"
            files = flower.TlsFiles(tls.superlink.ca, tls.superlink.certificate, tls.superlink.key)
            program = flower.superlink_command(_LOCAL, port, files, home)
            supervisor.start(
                Child(
                    "superlink",
                    program.argv,
                    ready=Address(_LOCAL, port),
                    ready_timeout=_SUPERLINK_SECONDS,
                    environment=program.env,
                )
            )
        else:
            address = settings.superlink
        nodes = flower.SuperLinkAdmin(address, ca.read_bytes())
        self._parts.callback(nodes.close)
        _wait(nodes.ready, _SUPERLINK_SECONDS, f"the SuperLink at {address} does not answer")
        executor = flower.superexec_command(address, ca, home)
        supervisor.start(
            Child(
                "executor",
                executor.argv,
                environment={
                    **executor.env,
                    "ATOLL_DATA": str(settings.data),
                    "ATOLL_DATABASE": settings.database_url,
                },
            )
        )
        return address, nodes

    def _messaging(
        self, supervisor: Supervisor, broker: Broker, tls: HubTls
    ) -> tuple[Link, Ingest]:
        hub = self.context
        hub.membership.follow()  # the broker reads who may connect when it starts
        child = broker.child()
        if child is not None:
            _all_offline(hub.store)
            supervisor.start(child)
        ingest = Ingest(hub.store, hub.clock, hub.bus)
        link = Link(
            broker.address,
            broker.client_id,
            client_context(tls.hub.ca, tls.hub.certificate, tls.hub.key),
            TOPICS,
            ingest.receive,
        )
        ingest.start(link)
        self._parts.callback(ingest.stop)
        link.start()
        self._parts.callback(link.stop)
        if not link.wait_online(self._patience):
            raise CannotStart(
                f"the broker at {broker.address} does not let the hub in",
                "check the address, its CA, and the permissions of the user _hub",
            )
        return link, ingest

    def _serve(
        self,
        tls: HubTls,
        device_port: socket.socket,
        operator_port: socket.socket,
        traffic: Traffic,
    ) -> None:
        hub = self.context
        ca = (hub.settings.superlink_ca or hub.settings.ca / "cert.pem").read_text()
        front = FleetFront(hub.addresses.superlink, ca)
        secure = server_context(tls.api.key, tls.api.certificate, hub.authority.cert_pem.decode())
        device_app = create_device_app(hub, traffic, front)
        operator_app = create_operator_app(hub)
        changes = web.mount(operator_app, hub)
        operator_app.state.changes = changes
        for server in (
            WebServer(device_app, device_port, name="device", tls=secure),
            WebServer(operator_app, operator_port, name="operator"),
        ):
            self._parts.callback(server.stop)
            server.start()
            self._servers.append(server)
        self._parts.callback(changes.close)

    def _again(self, child: str, store: Store) -> None:
        """After a child came back: a broker lost its connections, a SuperLink all it knew."""
        if child == "broker":
            _all_offline(store)
        elif child == "superlink":
            self._fleet.forget_nodes()
            self._fleet.follow()


def run_hub(settings: Settings, say: Callable[[str], None]) -> None:
    """Run a hub until SIGINT or SIGTERM; ``say`` is told where things are.

    Call it from the main thread. Raises :class:`CannotStart`.
    """
    hub = Hub(settings)
    started = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        hub.end()
        if not started:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with hub:
            started = True
            for line in operator_file.greeting(hub.context):
                say(line)
            hub.wait()
            say("Stopping…")
    except KeyboardInterrupt:
        say("Stopped.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port(host: str) -> int:
    """Return a port that was free a moment ago, for a program that cannot be told 0."""
    with listen(host, 0, option="another port") as probe:
        port: int = probe.getsockname()[1]
        return port


def _lock(data: Path) -> ExitStack:
    """Hold the data directory; raise :class:`AlreadyRunning` when another hub does."""
    held = ExitStack()
    file = held.enter_context((data / "lock").open("ab"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise AlreadyRunning(
            f"another hub is running on {data}", "stop it, or give --data another directory"
        ) from error
    return held


def _all_offline(store: Store) -> None:
    with store.begin() as connection:
        connection.execute(update(devices).where(devices.c.online).values(online=False))


def _url(scheme: str, host: str, port: socket.socket) -> str:
    shown = {"0.0.0.0": _LOCAL, "::": "[::1]"}.get(host, host)  # noqa: S104  read, not bound
    if ":" in shown and not shown.startswith("["):
        shown = f"[{shown}]"
    return f"{scheme}://{shown}:{port.getsockname()[1]}"


def _wait(ready: Callable[[], bool], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not ready():
        if time.monotonic() > deadline:
            raise CannotStart(complaint, "check that it runs and that the address is right")
        pause.wait(0.1)


def _explained(error: OSError | FleetError, data: Path) -> CannotStart:
    if isinstance(error, FleetError):
        return CannotStart(f"the hub's files in {data} cannot be used: {error}")
    where = error.filename or data
    return CannotStart(
        f"cannot use {where}: {error.strerror or error}",
        "make room, or give --data a directory that you may write to",
    )
