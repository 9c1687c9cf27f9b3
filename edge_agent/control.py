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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import atoll.fleet.wire as wire
import msgspec
from atoll.edge_agent import actions, core, credentials, events, health, link, slots
from atoll.edge_agent.children import Ended, Process, Said
from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import AgentError, DiskFull, PortInUse
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.paths import Lock, Paths
from atoll.fleet.errors import BadMessage

VERSION: Final = "0.1.0"
HOST: Final = "127.0.0.1"
HEALTH_SECONDS: Final = 30.0
DRAIN_SECONDS: Final = 3.0
NO_CHANGES: Final[Mapping[str, str]] = MappingProxyType({})
ONE_THREAD: Final = MappingProxyType({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
"""For the training process: torch's threads would starve what serves."""

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


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What ``atoll-agent status`` shows of the running process."""

    boot: int = 0
    linked: bool = False
    serve_url: str | None = None
    reported: wire.Reported | None = None
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
        self._outbox = Outbox(database)
        self._bound = bound
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311  # spreads retries, no secret
        self._events: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        broker = link.Broker(who.hub.mqtt.host, who.hub.mqtt.port, who.context)
        self._link = link.Link(broker, who.hub.device, self._events.put)
        self._linked = False
        self._will: bytes | None = None
        self._in_flight: dict[int, int] = {}
        self._children: dict[str, Process] = {}
        self._excuses: dict[str, str] = {}
        self._results: dict[str, events.Input] = {}
        self._timers: list[tuple[float, int, events.Part | None]] = []
        self._timer_number = 0
        self._state = core.State()
        self._https = [0, 0]
        self._latency: tuple[float | None, float | None] = (None, None)
        self._url = f"http://{HOST}:{bound.getsockname()[1]}"
        self._status = Status(boot=self._outbox.start_boot(), serve_url=self._url)
        self._running = True

    def stop(self) -> None:
        """Ask the agent to end; may be called from a signal handler."""
        self._events.put(events.Stop())

    def run(self) -> None:
        """Run until stopped; on return no child is left."""
        installed = slots.installed(self._database)
        release = events.Release(installed.model, installed.release) if installed else None
        self._database.put(STATUS_KEY, self._status)
        self._take(events.Begin(self._database.get("desired", wire.Desired), release))
        self._after(None, self._settings.health_seconds)
        try:
            while self._running:
                for event in self._next():
                    self._handle(event)
                self._pump()
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

    def _handle(self, event: Happening) -> None:
        match event:
            case link.Up() | link.Down() | link.Received() | link.Acknowledged():
                if event.generation == self._link.generation:
                    self._signal(event)
            case Said(name, pid, message):
                if self._is_current(name, pid):
                    self._said(name, message)
            case Ended(name, pid, how):
                if self._is_current(name, pid):
                    self._ended(name, how)
            case _:
                self._take(event)

    def _is_current(self, name: str, pid: int) -> bool:
        child = self._children.get(name)
        return child is not None and child.pid == pid

    def _signal(self, event: link.Signal) -> None:
        match event:
            case link.Up():
                self._linked = True
                self._will = None  # used up: the broker holds it now
                self._note(linked=True)
                log.info("connected to the broker")
                self._take(events.LinkUp())
            case link.Down(_, reason):
                self._in_flight.clear()
                self._linked = False
                self._note(linked=False, last_error=f"no connection to the broker: {reason}")
                log.warning("no connection to the broker: %s", reason)
                self._take(events.LinkDown(reason))
            case link.Received(_, payload):
                try:
                    self._take(events.Wanted(wire.decode(payload, wire.Desired)))
                except BadMessage as error:
                    detail = f"desired state: {error}"
                    self._tell(wire.Event(kind="unreadable", severity="warning", detail=detail))
            case link.Acknowledged(_, mid):
                item = self._in_flight.pop(mid, None)
                if item is not None:
                    self._outbox.settle([item])

    def _said(self, name: str, message: dict[str, Any]) -> None:
        """Turn a child's message into an event; children are ours, so keys are trusted."""
        self._https[0] += int(message.get("bytes_up", 0))
        self._https[1] += int(message.get("bytes_down", 0))
        release = events.Release(str(message.get("model")), int(message.get("release") or 0))
        match message.get("kind"):
            case "up" if name in {"serving", "trainer"}:
                self._take(events.ChildUp(_part(name)))
            case "accepted":
                self._take(events.Accepted(release))
            case "rejected":
                self._take(events.Rejected(release, str(message["error"])))
            case "fetched":
                self._results[name] = events.Fetched(release)
            case "fetch-failed":
                error, final = str(message["error"]), bool(message["final"])
                self._results[name] = events.FetchFailed(release, error, final)
            case "renewed":
                due_in, new = float(message["due_in"]), bool(message["new"])
                self._results[name] = events.Renewed(due_in, new)
            case "renew-failed":
                self._results[name] = events.RenewFailed(str(message["error"]))
            case "latency":
                self._latency = (message["p50"], message["p95"])
            case "failed":
                self._excuses[name] = str(message["error"])
            case _:
                pass  # "queued": waking up is enough, the pump looks

    def _ended(self, name: str, how: str) -> None:
        lasted = time.monotonic() - self._children.pop(name).started
        if excuse := self._excuses.pop(name, ""):
            how = f"{how}: {excuse}"
        result = self._results.pop(name, None)
        attempt = self._state.attempt
        if name in {"serving", "trainer"}:
            self._take(events.ChildDown(_part(name), how, lasted))
        elif result is not None:
            self._take(result)
        elif name == "renew":
            self._take(events.RenewFailed(f"the renewal process {how}"))
        elif attempt is not None:
            error = f"the download process {how}"
            self._take(events.FetchFailed(attempt.release, error, final=False))

    # Actions

    def _take(self, event: events.Input) -> None:
        self._state, todo = core.step(self._state, event)
        for action in todo:
            self._do(action)

    def _do(self, action: actions.Action) -> None:  # noqa: C901  # one arm per kind of action
        match action:
            case actions.Connect():
                self._connect()
            case actions.Announce():
                self._enqueue(
                    wire.Birth(
                        boot=self._status.boot,
                        agent_version=VERSION,
                        serve_url=self._url,
                        labels=self._who.hub.labels,
                    )
                )
            case actions.Report(reported):
                if reported != self._status.reported:
                    log.info("%s", _sentence(reported, self._url))
                    error = reported.error or self._status.last_error
                    self._note(reported=reported, last_error=error)
                self._enqueue(reported)
            case actions.Tell(event):
                self._tell(event)
            case actions.Remember(desired):
                self._database.put("desired", desired)
            case actions.Fetch(release):
                serving = slots.installed(self._database)
                slot = slots.spare(self._paths.models, release.model, serving)
                current = slots.last(self._database, release.model)
                self._start(
                    "fetch",
                    "atoll.edge_agent.updates",
                    [
                        *("--data", str(self._paths.data), "--slot", slot.name),
                        *("--model", release.model, "--release", str(release.number)),
                        *(() if current is None else ("--current", str(current))),
                    ],
                )
            case actions.Load(release):
                self._load(release)
            case actions.Install(release):
                slots.install(self._database, self._paths.models, release)
            case actions.Start("serving"):
                self._start(
                    "serving",
                    "atoll.edge_agent.serving",
                    [
                        *("--data", str(self._paths.data), "--fd", str(self._bound.fileno())),
                        *("--window-rows", str(self._settings.window_rows)),
                        *("--window-seconds", str(self._settings.window_seconds)),
                    ],
                    [self._bound.fileno()],
                )
            case actions.Start("trainer"):
                task = () if self._settings.task is None else ("--task", self._settings.task)
                arguments = ["--data", str(self._paths.data), *task]
                self._start(
                    "trainer", "atoll.edge_agent.trainer", arguments, environment=ONE_THREAD
                )
            case actions.Finish(part):
                if part in self._children:
                    self._children[part].stop()
            case actions.Renew():
                self._start("renew", "atoll.edge_agent.renew", ["--data", str(self._paths.data)])
            case actions.After(part, delay):
                self._after(part, delay * self._chance.uniform(0.75, 1.25))
            case actions.Quit():
                self._running = False
            case _:
                pass

    def _connect(self) -> None:
        self._in_flight.clear()
        self._linked = False
        if self._will is None:
            self._will = self._outbox.reserve(wire.Death(boot=self._status.boot), self._clock())
        try:
            self._link.connect(self._will)
        except AgentError as error:
            self._events.put(link.Down(self._link.generation, str(error)))

    def _load(self, release: events.Release) -> None:
        slot = slots.holding(self._paths.models, release)
        if slot is None:
            error = "its files are gone from the disk"
            self._events.put(events.Rejected(release, error))
        elif "serving" in self._children:
            self._children["serving"].say(
                {
                    "kind": "load",
                    "model": release.model,
                    "release": release.number,
                    "directory": str(slot),
                }
            )

    def _start(
        self,
        name: str,
        module: str,
        arguments: list[str],
        pass_fds: Iterable[int] = (),
        environment: Mapping[str, str] = NO_CHANGES,
    ) -> None:
        if name in self._children:
            return
        self._children[name] = Process(
            name, module, arguments, self._events.put, tuple(pass_fds), environment
        )

    def _finish_all(self) -> None:
        for child in self._children.values():
            child.stop()
        for child in self._children.values():
            child.wait()
        self._children.clear()

    # Messages

    def _tell(self, event: wire.Event) -> None:
        level = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
        log.log(level[event.severity], "%s: %s", event.kind, event.detail)
        if event.severity != "info":
            self._note(last_error=f"{event.kind}: {event.detail}")
        self._enqueue(event)

    def _enqueue(self, body: wire.Body) -> None:
        try:
            self._outbox.enqueue(body, self._clock())
        except DiskFull as error:
            log.error("message lost: %s", error)  # noqa: TRY400  # a sentence, not a traceback

    def _pump(self) -> None:
        """Hand over what waits, up to the in-flight limit."""
        room = link.IN_FLIGHT - len(self._in_flight)
        if not self._linked or room <= 0:
            return
        for item in self._outbox.waiting(room, set(self._in_flight.values())):
            mid = self._link.publish(item.leaf, item.payload, retain=item.retain)
            if mid is None:
                return
            self._in_flight[mid] = item.id

    def _report_health(self) -> None:
        if not self._linked:
            return  # old health is of no use; do not let it pile up
        counts = self._outbox.counts()
        pids = {name: child.pid for name, child in self._children.items()}
        self._enqueue(
            wire.Health(
                rss=health.resident({"control": os.getpid(), **pids}),
                disk_free=health.disk_free(self._paths.data),
                outbox_waiting=counts.waiting,
                outbox_dropped=counts.dropped,
                bytes_up=self._link.bytes_up + self._https[0],
                bytes_down=self._link.bytes_down + self._https[1],
                latency_p50=self._latency[0],
                latency_p95=self._latency[1],
            )
        )

    def _note(self, **changes: bool | str | wire.Reported | None) -> None:
        status = msgspec.structs.replace(self._status, **changes)
        if status != self._status:
            self._status = status
            self._database.put(STATUS_KEY, status)

    def _goodbye(self) -> None:
        """End the children, send what they left for us, announce our death."""
        self._finish_all()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._linked and time.monotonic() < deadline:
            self._pump()
            if not self._in_flight:
                break
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(event, link.Acknowledged | link.Down):
                self._handle(event)
        self._link.close()
        self._note(linked=False)
        self._bound.close()


def _part(name: str) -> events.ChildPart:
    return "serving" if name == "serving" else "trainer"


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
