"""The agent's child processes: how each is started, and what its messages mean.

``serving`` and ``trainer`` run on; ``fetch`` and ``renew`` do one thing. The result of one of
the latter counts once the process has ended, so that the next can be started at once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from atoll.edge_agent import events
from atoll.edge_agent.children import Ended, Process, Said
from atoll.edge_agent.events import Release

NO_CHANGES: Final[Mapping[str, str]] = MappingProxyType({})
ONE_THREAD: Final = MappingProxyType({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
"""For the training process: torch's threads would starve what serves."""


class Crew:
    """The children that run now; what they say goes to ``emit`` from other threads."""

    def __init__(self, data: Path, emit: Callable[[Said | Ended], object]) -> None:
        self._data = data
        self._emit = emit
        self._running: dict[str, Process] = {}
        self._excuses: dict[str, str] = {}
        self._results: dict[str, events.Input] = {}
        self._fetching: Release | None = None
        self.bytes_up = 0
        self.bytes_down = 0
        self.latency: tuple[float | None, float | None] = (None, None)
        self.examples: int | None = None
        """How many the training process counted, as :func:`atoll.edge_agent.facts.bucket`."""

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: process.pid for name, process in self._running.items()}

    def serve(self, bound: int, rows: int, seconds: float) -> None:
        """Start the serving process on a bound socket's file descriptor."""
        windows = ["--window-rows", str(rows), "--window-seconds", str(seconds)]
        self._start("serving", "serving", ["--fd", str(bound), *windows], [bound])

    def load(self, release: Release, slot: Path) -> None:
        """Have the serving process check a slot and serve it if it is good."""
        if "serving" in self._running:
            facts = {"model": release.model, "release": release.number, "directory": str(slot)}
            self._running["serving"].say({"kind": "load", **facts})

    def train(
        self, task: str | None, *, allow_plain: bool, least_noise: float, least_devices: int
    ) -> None:
        """Start the training process."""
        chosen = ["--least-noise", str(least_noise), "--least-devices", str(least_devices)]
        chosen += [] if task is None else ["--task", task]
        chosen += ["--allow-plain"] if allow_plain else []
        self._start("trainer", "trainer", chosen, environment=ONE_THREAD)

    def fetch(self, release: Release, slot: str, current: int | None) -> None:
        """Start a download."""
        self._fetching = release
        arguments = ["--slot", slot, "--model", release.model, "--release", str(release.number)]
        if current is not None:
            arguments += ["--current", str(current)]
        self._start("fetch", "updates", arguments)

    def renew(self) -> None:
        """Start a look at the certificate."""
        self._start("renew", "renew", [])

    def finish(self, name: str) -> None:
        """Ask a child to end."""
        if name in self._running:
            self._running[name].stop()

    def finish_all(self) -> None:
        """End every child and wait for it."""
        for process in self._running.values():
            process.stop()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _start(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] = NO_CHANGES,
    ) -> None:
        if name not in self._running:
            self._running[name] = Process(
                name,
                f"atoll.edge_agent.{module}",
                ["--data", str(self._data), *arguments],
                self._emit,
                pass_fds,
                environment,
            )

    def understand(self, told: Said | Ended) -> events.Input | None:
        """Return the event that a child's message or end amounts to, if any."""
        process = self._running.get(told.child)
        if process is None or process.pid != told.pid:
            return None
        if isinstance(told, Said):
            return self._said(told.child, told.message)
        del self._running[told.child]
        return self._ended(told.child, told.how, time.monotonic() - process.started)

    def _said(self, name: str, message: dict[str, Any]) -> events.Input | None:
        """Read a message; children are ours, so its fields are trusted."""
        self.bytes_up += int(message.get("bytes_up", 0))
        self.bytes_down += int(message.get("bytes_down", 0))
        release = Release(str(message.get("model")), int(message.get("release") or 0))
        match message["kind"]:
            case "up":
                return events.ChildUp(_part(name))
            case "accepted":
                return events.Accepted(release)
            case "rejected":
                return events.Rejected(release, str(message["error"]))
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
                self.latency = (message["p50"], message["p95"])
            case "counted":
                self.examples = int(message["examples"])
            case "failed":
                self._excuses[name] = str(message["error"])
            case _:
                pass  # "queued": that we woke up is enough
        return None

    def _ended(self, name: str, how: str, lasted: float) -> events.Input | None:
        excuse = self._excuses.pop(name, "")
        if excuse:
            how = f"{how}: {excuse}"
        result = self._results.pop(name, None)
        if name in {"serving", "trainer"}:
            return events.ChildDown(_part(name), how, lasted)
        if result is not None:
            return result
        if name == "renew":
            return events.RenewFailed(f"the renewal process {how}")
        if self._fetching is not None:
            error = f"the download process {how}"
            return events.FetchFailed(self._fetching, error, final=False)
        return None


def _part(name: str) -> events.ChildPart:
    return "serving" if name == "serving" else "trainer"
