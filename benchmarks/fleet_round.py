"""What a round over devices on this machine takes, beside stock SuperNodes.

    python -m benchmarks.fleet_round [--json] [--devices 10] [--rounds 6] [--peer-rounds 3]

Ours: warm nodes, each a process with what a training process has imported, over the embedded
SuperLink with TLS and registered node keys (:mod:`benchmarks.fleet_device`). They train one layer
of a million float32 weights, 4 MB, on one batch of ten rows. That training, the making of terms
from real updates, the sum and the step are all in the figure; it is the median of the rounds after
the first, in which torch is loaded. Devices speak to the SuperLink itself and not through the
hub's front.

Stock: Flower's own SuperLink and SuperNodes, over TLS without node keys, with the same weights and
a client that trains nothing and sends them back (:mod:`benchmarks.peers.stock_app`).

Memory is resident memory of a device that is connected and waits for its first round, the largest
of all; for a SuperNode, with the processes that it keeps. That torch is not loaded is checked.
"""

import argparse
import hashlib
import io
import json
import os
import socket
import ssl
import statistics
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psutil
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab

from atoll.federation.flower import (
    Program,
    SuperLinkAdmin,
    TlsFiles,
    superexec_command,
    superlink_command,
)
from atoll.fleet.authority import Authority
from atoll.fleet.identity import Identity
from atoll.server.supervisor import Address, Child, Supervisor
from benchmarks.fleet_server import PARAMETERS
from benchmarks.peers import stock_app
from benchmarks.rows import Row, report

GOAL_DEVICES: Final = 10
GOAL_SECONDS: Final = 1.0
GOAL_MB: Final = 160.0
MODES: Final = ("plain", "secagg")
_DONE: Final = 900.0
_LOOK: Final = 1.0
"""Seconds between looks whether it is done; each costs the SuperLink a request."""

_PLAN: Final = """
name = "{mode}"
task = "square"
model = "square"
rounds = {rounds}
cohort = {{ min_devices = {devices}, round_timeout = 120 }}
training = {{ batch_size = 10, local_epochs = 1 }}
privacy = {{ mode = "{mode}", noise_multiplier = 0.0 }}
"""

_STOCK: Final = """\
[project]
name = "stock"
version = "1.0.0"

[tool.flwr.app]
publisher = "atoll"

[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_app:client"

[tool.flwr.app.config]
devices = 0
rounds = 0
parameters = 0
result = ""
"""


class NotDone(Exception):
    """Something did not come to its end; the message says what, and what its log says."""


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of a round, by privacy mode, and bytes that a waiting device occupies."""

    rounds: Mapping[str, float]
    memory: int


@dataclass(frozen=True)
class Site:
    """A hub's place on this machine: its certificates, its port, its processes."""

    folder: Path
    authority: Authority
    tls: TlsFiles
    port: int
    processes: Supervisor

    @property
    def address(self) -> Address:
        """Where the SuperLink listens."""
        return Address("127.0.0.1", self.port)

    def start(self, name: str, program: Program, **more: str) -> None:
        """Start a program."""
        ready = self.address if name == "superlink" else None
        # What they run is in this checkout, which nobody installs.
        paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(paths), **program.env, **more}
        self.processes.start(Child(name, program.argv, ready, 60.0, environment))

    def wait(self, what: str, ready: Callable[[], object], log: str) -> None:
        """Wait until ``ready``; raise :class:`NotDone` with the end of a log after a long time."""
        deadline = time.monotonic() + _DONE
        while not ready():
            if time.monotonic() > deadline:
                raise NotDone(f"waited {_DONE:g} s for {what}: {self.said(log)[-2000:]}")
            time.sleep(_LOOK)

    def said(self, name: str) -> str:
        """Return what a program has said."""
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")

    def occupied(self, names: Sequence[str]) -> int:
        """Return the most bytes that one of the programs occupies, with those it started."""
        return max(map(_resident, filter(None, map(self.processes.pid, names))))


@contextmanager
def site() -> Iterator[Site]:
    """Make a hub's certificates and find it a port; end every process afterwards."""
    with tempfile.TemporaryDirectory() as root:
        folder, now = Path(root), datetime.now(UTC)
        authority = Authority.create("Atoll benchmark", now)
        key, certificate = authority.issue_server(["localhost"], ["127.0.0.1"], now)
        tls = TlsFiles(folder / "ca.pem", folder / "tls.pem", folder / "tls-key.pem")
        tls.ca.write_bytes(authority.cert_pem)
        tls.certificate.write_bytes(certificate)
        tls.key.write_bytes(key)
        with Supervisor(folder / "logs") as processes:
            yield Site(folder, authority, tls, _free_port(), processes)


def ours(devices: int, rounds: int) -> Took:
    """Run the plans of all modes over warm nodes."""
    with site() as hub:
        home, address = hub.folder / "flower", str(hub.address)
        hub.start("superlink", superlink_command("127.0.0.1", hub.port, hub.tls, home))
        executor = superexec_command(address, hub.tls.ca, home, os.getpid())
        hub.start("superexec", executor, BENCH_FOLDER=str(hub.folder))
        admin = SuperLinkAdmin(address, hub.authority.cert_pem)
        names = [f"device-{number}" for number in range(devices)]
        nodes, certificates = {}, {}
        for name in names:
            identity, public = _identity(hub, name)
            nodes[name] = admin.register_node(public)
            certificates[name] = (identity / "cert.pem").read_text()
            command = [sys.executable, "-m", "benchmarks.fleet_device", f"https://{address}"]
            hub.start(name, Program([*command, str(identity), str(hub.folder), name], {}))
        active = '/activate-node HTTP/1.1" 200'
        hub.wait("devices", lambda: hub.said("superlink").count(active) >= devices, "device-0")
        memory = hub.occupied(names)
        for name in names:
            assert "libtorch" not in Path(f"/proc/{hub.processes.pid(name)}/maps").read_text()
        took = {}
        for mode in MODES:
            job = {
                "plan": _PLAN.format(mode=mode, rounds=rounds, devices=devices),
                "nodes": nodes,
                "certificates": certificates,
            }
            (hub.folder / "job.json").write_text(json.dumps(job))
            run = admin.start_run("benchmarks.fleet_server:server", {})
            took[mode] = _result(hub, admin, run, hub.folder / f"{mode}.json", mode)
        admin.close()
    return Took(took, memory)


def stock(devices: int, rounds: int) -> Took:
    """Run Flower's own programs."""
    with site() as hub:
        home, address = hub.folder / "flower", str(hub.address)
        quiet = superlink_command("127.0.0.1", hub.port, hub.tls, home).env
        scripts = Path(sysconfig.get_path("scripts"))
        link = [
            str(scripts / "flower-superlink"),
            *("--host", "127.0.0.1", "--port", str(hub.port)),
            *("--ssl-ca-certfile", str(hub.tls.ca)),
            *("--ssl-certfile", str(hub.tls.certificate)),
            *("--ssl-keyfile", str(hub.tls.key)),
            "--disable-runtime-dependency-installation",
        ]
        hub.start("superlink", Program(link, quiet))
        names = [f"node-{number}" for number in range(devices)]
        for name in names:
            node = [
                str(scripts / "flower-supernode"),
                *("--root-certificates", str(hub.tls.ca), "--superlink", address),
                *("--host", "127.0.0.1", "--port", str(_free_port())),
            ]
            hub.start(name, Program(node, quiet), FLWR_HOME=str(hub.folder / name))
        active = '/activate-node HTTP/1.1" 200'
        hub.wait("SuperNodes", lambda: hub.said("superlink").count(active) >= devices, "node-0")
        memory = hub.occupied(names)
        result = hub.folder / "stock.json"
        admin = SuperLinkAdmin(address, hub.authority.cert_pem)
        config = {
            "devices": devices,
            "rounds": rounds,
            "parameters": PARAMETERS,
            "result": str(result),
        }
        run = _start_stock(address, hub.authority.cert_pem, config)
        took = {"stock": _result(hub, admin, run, result, "stock")}
        admin.close()
    return Took(took, memory)


def _identity(hub: Site, device: str) -> tuple[Path, bytes]:
    """Make a device's identity; return its directory and its public key."""
    directory = hub.folder / "identities" / device
    directory.mkdir(parents=True)
    mine = Identity.new()
    mine.save(directory)
    issued = hub.authority.issue_device(mine.csr(device), device, datetime.now(UTC))
    (directory / "cert.pem").write_bytes(issued)
    (directory / "ca.pem").write_bytes(hub.authority.cert_pem)
    return directory, mine.public_pem()


def _result(hub: Site, admin: SuperLinkAdmin, run: str, result: Path, what: str) -> float:
    """Wait for a run's end; return the median of its rounds after the first."""
    hub.wait(f"the {what} run", lambda: admin.run_status(run).state == "finished", "superlink")
    if not result.exists():
        raise NotDone(f"{admin.run_status(run)}: {hub.said('superlink')[-2000:]}")
    seconds: list[float] = json.loads(result.read_text())
    print(f"{what}: {[round(one, 2) for one in seconds]}", file=sys.stderr, flush=True)
    return statistics.median(seconds[1:])


def _start_stock(address: str, ca: bytes, config: Mapping[str, bool | int | float | str]) -> str:
    """Start a run of :mod:`benchmarks.peers.stock_app`, sent as Flower sends apps."""
    files = {
        "pyproject.toml": _STOCK.encode(),
        "stock_app.py": Path(stock_app.__file__).read_bytes(),
    }
    listing = "\n".join(
        f"{name},{hashlib.sha256(content).hexdigest()},{8 * len(content)}"
        for name, content in files.items()
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as bundle:
        for name, content in {**files, ".info/CONTENT": listing.encode()}.items():
            bundle.writestr(zipfile.ZipInfo(name), content)
    content = out.getvalue()
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
        override_config=user_config_to_proto(dict(config)),
    )
    context = ssl.create_default_context(cadata=ca.decode("ascii"))
    with closing(ControlHttpClient(f"https://{address}", verify=context)) as client:
        return str(client.StartRun(request).run_id)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _resident(pid: int) -> int:
    root = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (root, *root.children(recursive=True)))


def rows(devices: int, mine: Took, theirs: Took) -> list[Row]:
    """Return what both took; goals are set for :data:`GOAL_DEVICES`."""
    goals = devices == GOAL_DEVICES
    peer = theirs.rounds["stock"]
    found = [
        Row(
            case=f"{devices} local devices, 4 MB model, {mode}",
            metric="round, with the training of one batch",
            unit="s",
            ours=seconds,
            peer=peer,
            peer_name="stock SuperNodes, nothing trained",
            ratio=peer / seconds,
            goal=GOAL_SECONDS if goals else None,
            met=seconds <= GOAL_SECONDS if goals else None,
        )
        for mode, seconds in mine.rounds.items()
    ]
    memory = mine.memory / 1e6
    found.append(
        Row(
            case=f"{devices} local devices",
            metric="memory of a device that waits, torch not loaded",
            unit="MB",
            ours=memory,
            peer=theirs.memory / 1e6,
            peer_name="a stock SuperNode",
            ratio=theirs.memory / mine.memory,
            goal=GOAL_MB if goals else None,
            met=memory <= GOAL_MB if goals else None,
        )
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet_round")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--devices", type=int, default=GOAL_DEVICES)
    parser.add_argument("--rounds", type=int, default=6, help="at least 2")
    parser.add_argument("--peer-rounds", type=int, default=3, help="at least 2")
    given = parser.parse_args(arguments)
    mine, theirs = ours(given.devices, given.rounds), stock(given.devices, given.peer_rounds)
    return report(rows(given.devices, mine, theirs), given.json)


if __name__ == "__main__":
    sys.exit(main())
