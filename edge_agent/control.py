"""The agent's control process: ``python -m atoll.edge_agent.control``.

One queue of events, fed by the broker connection, the children and signals; one thread that
takes each through :func:`atoll.edge_agent.core.step` and carries out what it says. Kept small
because it is what always runs: no numpy, no HTTP client, no cryptography; those live in the
serving process and in short-lived children.
"""

import argparse
import heapq
import logging
import os
import queue
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

import atoll.fleet.wire as wire
from atoll.edge_agent import actions, core, credentials, events, facts, health, link, slots
from atoll.edge_agent.children import Ended, Said
from atoll.edge_agent.crew import Crew
from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import AgentError, DiskFull, PortInUse
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.paths import Lock, Paths
from atoll.edge_agent.sender import Sender
from atoll.fleet.errors import BadMessage

VERSION: Final = "0.1.0"
HOST: Final = "127.0.0.1"
HEALTH_SECONDS: Final = 30.0
DRAIN_SECONDS: Final = 3.0
Happening = events.Input | link.Signal | Said | Ended

log = logging.getLogger("atoll.agent")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How ``atoll-agent run`` was called."""

    data: Path
    serve_port: int = 0
    window_rows: int = 256
    window_seconds: float = 60.0
    health_seconds: float = HEALTH_SECONDS
    task: str | None = None
    allow_plain: bool = False
    """Whether this device sends updates that the hub can read."""
    least_noise: float = 0.0
    least_devices: int = 1
    """What this device asks of plans (:class:`atoll.federation.client_app.Floor`)."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What ``atoll-agent status`` shows of the running process."""

    boot: int = 0
    linked: bool = False
    serve_url: str | None = None
    reported: wire.Reported | None = None
    link_error: str | None = None
    """Why there is no connection; none while there is one."""
    last_error: str | None = None


STATUS_KEY: Final = "status"


def listen_on(port: int) -> socket.socket:
    """Bind the serving port, without listening yet; raise :class:`PortInUse`.

    The control process holds it, so that a serving process that restarts or changes keeps the
    address that was announced, and a port that is taken is told before anything starts.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise PortInUse(port, getattr(error, "strerror", None) or str(error)) from error
    return bound


class Control:
    """The running agent."""

    def __init__(
        self,
        settings: Settings,
        paths: Paths,
        who: credentials.Credentials,
        database: Database,
        bound: socket.socket,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ) -> None:
        self._settings = settings
        self._paths = paths
        self._who = who
        self._database = database
        self._bound = bound
        self._chance = chance or random.Random()  # noqa: S311  # spreads retries, no secret
        self._events: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        outbox = Outbox(database)
        boot = outbox.start_boot(who.hub.boot)
        broker = link.Broker(who.hub.mqtt.host, who.hub.mqtt.port, who.client_id(), who.context)
        self._link = link.Link(broker, who.hub.device, self._events.put)
        self._sender = Sender(outbox, self._link, boot, clock)
        self._crew = Crew(paths.data, self._events.put)
        self._timers: list[tuple[float, int, events.Part | None]] = []
        self._timer_number = 0
        self._state = core.State()
        self._url = f"http://{HOST}:{bound.getsockname()[1]}"
        self._status = Status(boot=boot, serve_url=self._url)
        self._running = True

    def stop(self) -> None:
        """Ask the agent to end; may be called from a signal handler."""
        self._events.put(events.Stop())

    def run(self) -> None:
        """Run until stopped; on return no child is left."""
        installed = slots.installed(self._database)
        release = events.Release(installed.model, installed.release) if installed else None
        self._database.put(STATUS_KEY, self._status)
        self._events.put(events.Begin(self._database.get("desired", wire.Desired), release))
        self._after(None, self._settings.health_seconds)
        try:
            while self._running:
                for event in self._next():
                    self._survive(event)
                self._sender.pump()
        finally:
            self._goodbye()

    def _next(self) -> list[Happening]:
        """Wait for an event or a timer, and return all there are."""
        patience = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        found: list[Happening] = []
        try:
            found.append(self._events.get(timeout=patience))
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            pass
        while self._timers and self._timers[0][0] <= time.monotonic():
            part = heapq.heappop(self._timers)[2]
            if part is None:
                self._report_health()
                self._after(None, self._settings.health_seconds)
            else:
                found.append(events.Due(part))
        return found

    def _after(self, part: events.Part | None, delay: float) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (time.monotonic() + delay, self._timer_number, part))

    # Events

    def _survive(self, event: Happening) -> None:
        """Handle an event; a full disk costs what could not be written, not the agent.

        Each write is one that is made again after a restart: what was installed is fetched,
        what was acknowledged is sent again, what is desired is read again.
        """
        with self._surviving():
            self._handle(event)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except DiskFull as error:
            log.error("%s", error)  # noqa: TRY400  # a sentence, no traceback

    def _handle(self, event: Happening) -> None:
        match event:
            case link.Up() | link.Down() | link.Received() | link.Acknowledged():
                if event.generation == self._link.generation:
                    self._signal(event)
            case Said() | Ended():
                meant = self._crew.understand(event)
                if meant is not None:
                    self._take(meant)
                elif isinstance(event, Said) and event.message.get("kind") == "counted":
                    self._report_health()  # a run may wait for just that
            case _:
                self._take(event)

    def _signal(self, event: link.Signal) -> None:
        match event:
            case link.Up():
                self._sender.up()
                log.info("connected to the broker")
                self._note(linked=True, link_error=None)
                self._take(events.LinkUp())
                self._report_health()
            case link.Down(_, reason):
                self._sender.down()
                log.warning("no connection to the broker: %s", reason)
                self._note(linked=False, link_error=f"no connection to the broker: {reason}")
                self._take(events.LinkDown(reason))
            case link.Received(_, payload):
                try:
                    self._take(events.Wanted(wire.decode(payload, wire.Desired)))
                except BadMessage as error:
                    detail = f"desired state: {error}"
                    self._tell(wire.Event(kind="unreadable", severity="warning", detail=detail))
            case link.Acknowledged(_, mid):
                self._sender.acknowledged(mid)

    # Actions

    def _take(self, event: events.Input) -> None:
        self._state, todo = core.step(self._state, event)
        for action in todo:
            with self._surviving():  # the state has moved on: what else follows must be done
                self._do(action)

    def _do(self, action: actions.Action) -> None:  # noqa: C901  # one arm per kind of action
        match action:
            case actions.Connect():
                try:
                    self._sender.connect()
                except AgentError as error:
                    self._events.put(link.Down(self._link.generation, str(error)))
            case actions.Announce():
                self._announce()
            case actions.Report(reported):
                if reported != self._status.reported:
                    log.info("%s", _sentence(reported, self._url))
                    self._note(reported=reported)
                self._sender.enqueue(reported)
            case actions.Tell(event):
                self._tell(event)
            case actions.Remember(desired):
                self._database.put("desired", desired)
            case actions.Fetch(release):
                serving = slots.installed(self._database)
                slot = slots.spare(self._paths.models, release.model, serving)
                self._crew.fetch(release, slot.name, slots.last(self._database, release.model))
            case actions.Load(release):
                directory = slots.holding(self._paths.models, release)
                if directory is None:
                    gone = "its files are gone from the disk"
                    self._events.put(events.Rejected(release, gone))
                else:
                    self._crew.load(release, directory)
            case actions.Install(release):
                slots.install(self._database, self._paths.models, release)
            case actions.Start("serving"):
                rows, seconds = self._settings.window_rows, self._settings.window_seconds
                self._crew.serve(self._bound.fileno(), rows, seconds)
            case actions.Start("trainer"):
                chosen = self._settings
                self._crew.train(
                    chosen.task,
                    allow_plain=chosen.allow_plain,
                    least_noise=chosen.least_noise,
                    least_devices=chosen.least_devices,
                )
            case actions.Finish(part):
                self._crew.finish(part)
            case actions.Renew():
                self._crew.renew()
            case actions.After(part, delay):
                self._after(part, delay * self._chance.uniform(0.75, 1.25))
            case actions.Quit():
                self._running = False
            case _:
                pass

    # Messages

    def _announce(self) -> None:
        self._sender.enqueue(
            wire.Birth(
                boot=self._status.boot,
                agent_version=VERSION,
                serve_url=self._url,
                labels=self._who.hub.labels,
            )
        )

    def _tell(self, event: wire.Event) -> None:
        level = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
        log.log(level[event.severity], "%s: %s", event.kind, event.detail)
        if event.severity != "info":
            self._note(last_error=f"{event.kind}: {event.detail}")
        self._sender.enqueue(event)

    def _report_health(self) -> None:
        if not self._sender.linked:
            return  # old health is of no use; do not let it pile up
        counts, told = self._sender.counts(), facts.look(Path("/"))
        self._sender.enqueue(
            wire.Health(
                rss=health.resident({"control": os.getpid(), **self._crew.pids}),
                disk_free=health.disk_free(self._paths.data),
                outbox_waiting=counts.waiting,
                outbox_dropped=counts.dropped,
                bytes_up=self._link.bytes_up + self._crew.bytes_up,
                bytes_down=self._link.bytes_down + self._crew.bytes_down,
                latency_p50=self._crew.latency[0],
                latency_p95=self._crew.latency[1],
                power=told.power,
                network=told.network,
                accelerator=told.accelerator,
                examples=self._crew.examples,
            )
        )

    def _note(self, **changes: bool | str | wire.Reported | None) -> None:
        status = msgspec.structs.replace(self._status, **changes)
        if status != self._status:
            self._status = status
            with self._surviving():  # the next note writes all of it
                self._database.put(STATUS_KEY, status)

    def _goodbye(self) -> None:
        """End the children, send what they left for us, announce our death."""
        self._crew.finish_all()
        self._sender.drain(self._next_signal, DRAIN_SECONDS)
        self._link.close()
        self._note(linked=False)
        self._bound.close()

    def _next_signal(self, seconds: float) -> link.Acknowledged | link.Down | None:
        deadline = time.monotonic() + seconds
        try:
            while True:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
                if (
                    isinstance(event, link.Acknowledged | link.Down)
                    and event.generation == self._link.generation
                ):
                    return event
        except queue.Empty:
            return None


def _sentence(reported: wire.Reported, url: str) -> str:
    match reported.state:
        case "serving":
            return f"serving {reported.model} release {reported.release} at {url}"
        case "failed":
            return f"stayed on release {reported.release}: {reported.error}"
        case other:
            return other


def start(settings: Settings) -> None:
    """Run an agent until SIGTERM or SIGINT; raise :class:`AgentError` when it cannot start."""
    paths = Paths(settings.data.resolve())
    who = credentials.load(paths)
    with Lock(paths):
        who.context()
        bound = listen_on(settings.serve_port)
        database = Database(paths.database)
        control = Control(settings, paths, who, database, bound)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: control.stop())
        try:
            control.run()
        finally:
            database.close()


def main(arguments: list[str] | None = None) -> int:
    """Run the control process; return its exit status."""
    parser = argparse.ArgumentParser(prog="atoll-agent run")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--serve-port", type=int, default=0)
    parser.add_argument("--window-rows", type=int, default=256)
    parser.add_argument("--window-seconds", type=float, default=60.0)
    parser.add_argument("--health-seconds", type=float, default=HEALTH_SECONDS)
    parser.add_argument("--task")
    parser.add_argument("--allow-plain", action="store_true")
    parser.add_argument("--least-noise", type=float, default=0.0)
    parser.add_argument("--least-devices", type=int, default=1)
    given = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        start(msgspec.convert(vars(given), Settings, strict=False))
    except AgentError as error:
        sys.stderr.write(f"atoll-agent: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
