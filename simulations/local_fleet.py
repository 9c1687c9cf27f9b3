"""A hub and its devices on this machine, each the real program in a process of its own.

The demo and the end-to-end test drive it. Everything goes through what a user has: the
commands ``atoll`` and ``atoll-agent``, and the operator API.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx

from atoll.server.supervisor import Child, Supervisor, last_lines

HUB_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.2
LOOPBACK: Final = (
    *("--host", "127.0.0.1", "--device-bind", "127.0.0.1", "--mqtt-bind", "127.0.0.1"),
    *("--device-port", "0", "--mqtt-port", "0", "--operator-port", "0"),
)
"""A hub on free ports that this machine alone can reach."""

_Found = TypeVar("_Found")


class FleetFailed(Exception):
    """The hub or a device did not do what was asked; the message says what and where to look."""


class LocalFleet:
    """A hub and devices under ``root``; ended, all of them, when the block is left.

    ``root/hub`` and ``root/devices/<id>`` are the data directories; ``root/logs`` holds what
    each process said.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hub = root / "hub"
        self._processes = Supervisor(root / "logs")
        self._api: httpx.Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._api is not None:
            self._api.close()
        self._processes.close()

    @property
    def operator(self) -> Mapping[str, Any]:
        """What the hub wrote to ``operator.json``: at least ``url`` and ``token``."""
        facts: dict[str, Any] = json.loads((self.hub / "operator.json").read_text())
        return facts

    def device_data(self, device: str) -> Path:
        """Return a device's data directory."""
        return self.root / "devices" / device

    def start_hub(self, *options: str) -> None:
        """Start ``atoll hub`` on free ports and wait until its API answers."""
        command = [*_program("atoll"), "hub", "--data", str(self.hub), *LOOPBACK, *options]
        (self.hub / "operator.json").unlink(missing_ok=True)
        self._processes.start(Child("hub", command, grace=20.0))
        self.wait("the hub to answer", self._connect, HUB_SECONDS)

    def _connect(self) -> bool:
        if self._processes.pid("hub") is None:
            raise FleetFailed(f"the hub ended: {last_lines(self.root / 'logs' / 'hub.log')}")
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
            operator = self.operator
            headers = {"Authorization": f"Bearer {operator['token']}"}
            api = httpx.Client(base_url=f"{operator['url']}/api/v1", headers=headers, timeout=30.0)
            if api.get("/devices").is_success:
                self._api = api
                return True
            api.close()
        return False

    def call(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 -- JSON
        """Call the operator API and return the JSON; raise :class:`FleetFailed` on an error."""
        if self._api is None:
            raise FleetFailed("the hub has not been started")
        reply = self._api.request(method, path, json=body)
        if not reply.is_success:
            raise FleetFailed(f"{method} {path}: {reply.text}")
        return reply.json()

    def atoll(self, *arguments: str) -> str:
        """Run an ``atoll`` command against the hub and return what it printed."""
        return _run([*_program("atoll"), *arguments, "--data", str(self.hub)])

    def enrol(self, device: str, labels: Mapping[str, str]) -> None:
        """Make a token for a device and enrol it with ``atoll-agent enrol``."""
        token = self.call("POST", "/tokens", {"device": device, "labels": dict(labels)})
        data = str(self.device_data(device))
        _run([*_program("atoll-agent"), "enrol", "--token", token["token"], "--data", data])

    def start_device(self, device: str, *options: str) -> None:
        """Start ``atoll-agent run`` for an enrolled device; it comes online by and by."""
        data = str(self.device_data(device))
        command = [*_program("atoll-agent"), "run", "--data", data, "--serve-port", "0", *options]
        self._processes.start(Child(device, command, grace=15.0))

    def stop_device(self, device: str) -> None:
        """End a device's agent."""
        self._processes.stop(device)

    def devices(self) -> dict[str, dict[str, Any]]:
        """Return every device as the API tells it, by id."""
        return {device["id"]: device for device in self.call("GET", "/devices")}

    def wait(
        self,
        what: str,
        ready: Callable[[], _Found | None],
        seconds: float,
        every: float = POLL_SECONDS,
    ) -> _Found:
        """Wait until ``ready`` returns something true and return that.

        Raises :class:`FleetFailed` after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = ready()
            if found:
                return found
            if time.monotonic() > deadline:
                raise FleetFailed(
                    f"waited {seconds:.0f} s for {what}; the logs are in {self.root / 'logs'} "
                    f"and {self.hub / 'logs'}"
                )
            time.sleep(every)


def _program(name: str) -> list[str]:
    """Return the command of a console script of this very installation."""
    script = Path(sys.executable).with_name(name)
    if not script.exists():
        raise FleetFailed(f"{script} is missing; install Atoll into this environment")
    return [sys.executable, str(script)]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise FleetFailed(f"{' '.join(command[1:3])} failed: {said}")
    return done.stdout
