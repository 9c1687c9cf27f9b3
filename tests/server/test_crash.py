"""kill -9 in the middle of a run, of each process that carries it: the run ends as if nothing was.

A real hub in a process of its own with its SuperLink and executor, and devices, each a process with
a warm node, one of which stops in round 2 until somebody has been killed. What the run must come to
is what the in-process engine makes of the same plan.
"""

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sqlalchemy import insert, select
from waves import PLAN, Fleet, write

from atoll.federation import plan as plans  # after the path
from atoll.federation.checkpoints import Checkpoints
from atoll.fleet.identity import Identity
from atoll.fleet.token import EnrolmentToken
from atoll.privacy.ledger import MemoryStore
from atoll.server import audit, schema
from atoll.server.hub import free_port
from atoll.server.settings import Settings
from atoll.server.store import Store

HERE = Path(__file__).parent
DEVICES = ("device-1", "device-2", "device-3")
TOML = PLAN.format(mode="plain", rounds=3, least=2, noise=0.0, more="")
PROGRAM = """
import sys
from pathlib import Path
from atoll.server.hub import run_hub
from atoll.server.settings import Settings
run_hub(Settings(data=Path(sys.argv[1]), device_bind="127.0.0.1", device_port=int(sys.argv[2]),
    operator_port=0, mqtt_bind="127.0.0.1", mqtt_port=0), print)
"""


DEVICE = """
import sys, threading
from pathlib import Path
from waves import Waves
from atoll.edge_agent.queries import Rows, handlers
from atoll.federation import client_app
from atoll.federation.warm_node import WarmNode
from atoll.privacy.plain import PlainParty

class Gated(Waves):
    def load(self, data, split):
        gate = data / "gate"
        if split == "train" and gate.exists():
            left = int(gate.read_text())
            gate.write_text(str(left - 1))
            if left == 1:
                (data / "reached").touch()
                while gate.exists():
                    threading.Event().wait(0.05)
        return super().load(data, split)

url, home = sys.argv[1], Path(sys.argv[2])
data, party = home / "data", PlainParty(home.name)
sound = handlers(lambda split: Rows(*Waves().load(data, split)))
app = client_app.build(Gated(), data, lambda _: party, sound)
node = WarmNode(
    url, ca=home / "ca.pem", certificate=home / "cert.pem", key=home / "key.pem"
)
node.serve(app, threading.Event())
"""


class Crashing:
    """A hub in a process of its own, and three devices."""

    def __init__(self, root: Path, wait_until: Callable[..., None]) -> None:
        self.root, self.wait_until = root, wait_until
        self.settings = Settings(data=root / "data")
        self.port = free_port("127.0.0.1")
        self.gate = root / "device-2" / "data" / "gate"
        self.reached = self.gate.with_name("reached")
        package = root / "site" / "waves_task-1.0.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: waves-task\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text("[atoll.tasks]\nwaves = waves:Waves\n")
        path = [str(HERE), str(root / "site"), os.environ.get("PYTHONPATH", "")]
        self.environment = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        self.hub = self.start()
        self.store = Store(self.settings.database_url)
        for number, name in enumerate(DEVICES, 1):
            write(root / name / "data", number)
            self.enrol(name)
        url = f"https://127.0.0.1:{self.port}"
        self.devices = [self.program(DEVICE, url, str(root / name)) for name in DEVICES]

    def program(self, text: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.root / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", text, *arguments],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start(self) -> "subprocess.Popen[bytes]":
        self.settings.operator_file.unlink(missing_ok=True)
        hub = self.program(PROGRAM, str(self.settings.data), str(self.port))
        self.wait_until(
            lambda: self.settings.operator_file.exists() or hub.poll() is not None, "a start", 60
        )
        assert hub.poll() is None, (self.root / "log").read_text()
        return hub

    def enrol(self, name: str) -> None:
        told = json.loads(self.settings.operator_file.read_text())
        headers = {"authorization": f"Bearer {told['token']}"}
        with httpx.Client(trust_env=False, headers=headers, base_url=told["url"]) as client:
            made = client.post("/api/v1/tokens", json={"device": name}).json()
        mine, directory = Identity.new(), self.root / name
        mine.save(directory)
        ca = (self.settings.ca / "cert.pem").read_text()
        context = ssl.create_default_context(cadata=ca)
        with httpx.Client(verify=context, trust_env=False, base_url=told["device_url"]) as client:
            asked = {
                "secret": EnrolmentToken.decode(made["token"]).secret,
                "csr": mine.csr(name).decode(),
            }
            answer = client.post("/v1/enrol", json=asked)
        assert answer.status_code == 200, answer.text
        (directory / "cert.pem").write_text(answer.json()["certificate"])
        (directory / "ca.pem").write_text(ca)

    def run(self, run: str) -> None:
        """Start a run and return in the middle of its second round."""
        self.reached.unlink(missing_ok=True)
        self.gate.write_text("2")
        with self.store.begin() as connection:
            connection.execute(
                insert(schema.runs).values(
                    id=run,
                    plan=TOML.replace('model = "waves"', f'model = "{run}"'),
                    name="waves",
                    model=run,
                    state="approved",
                    created_at=0.0,
                    created_by="me",
                    metrics={},
                )
            )
        self.wait_until(
            lambda: self.reached.exists() or self.row(run).state not in {"approved", "running"},
            "the second round",
            90,
        )
        assert self.reached.exists(), self.row(run)

    def row(self, run: str) -> Any:
        with self.store.read() as connection:
            return connection.execute(select(schema.runs).where(schema.runs.c.id == run)).one()

    def process(self, program: str) -> int:
        """Return the id of the hub's process that runs ``program``."""
        mine = str(self.settings.data)
        for directory in Path("/proc").iterdir():
            if directory.name.isdecimal():
                with suppress(OSError):
                    command = (directory / "cmdline").read_text()
                    told = command + (directory / "environ").read_text()
                    if program in command and mine in told:
                        return int(directory.name)
        pytest.fail(f"there is no {program}")

    def end(self) -> None:
        self.store.close()
        for process in (*self.devices, self.hub):
            process.terminate()
        try:
            self.hub.wait(30)
        finally:
            for process in (*self.devices, self.hub):
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def crashing(
    tmp_path_factory: pytest.TempPathFactory, wait_until: Callable[..., None]
) -> Iterator[Crashing]:
    made = Crashing(tmp_path_factory.mktemp("crashing"), wait_until)
    yield made
    made.end()


def kill_the_run(made: Crashing) -> None:
    os.kill(made.process("flwr-serverapp"), signal.SIGKILL)


def kill_the_superlink(made: Crashing) -> None:
    os.kill(made.process("atoll.federation.superlink"), signal.SIGKILL)


def kill_the_hub(made: Crashing) -> None:
    made.hub.kill()
    made.hub.wait()
    made.hub = made.start()


@pytest.mark.parametrize("kill", [kill_the_run, kill_the_superlink, kill_the_hub])
def test_a_run_of_which_a_process_was_killed_ends_as_one_that_was_not_disturbed(
    crashing: Crashing, tmp_path: Path, kill: Callable[[Crashing], None]
) -> None:
    run = kill.__name__.replace("_", "-")
    crashing.run(run)
    kill(crashing)
    crashing.gate.unlink()
    crashing.wait_until(
        lambda: crashing.row(run).state not in {"approved", "running"}, "the run's end", 120
    )
    row = crashing.row(run)

    plan = plans.loads(TOML.replace('model = "waves"', f'model = "{run}"'))
    undisturbed, ledger = Checkpoints(tmp_path / "undisturbed"), MemoryStore()
    Fleet(tmp_path / "fleet", count=3, unseen=0).run(
        plan, store=ledger, run=run, checkpoints=undisturbed
    )
    wanted, found = undisturbed.load(run), Checkpoints(crashing.settings.runs / run).load(run)
    assert wanted is not None
    assert found is not None
    assert row.state == "gated", row.reason
    assert row.attempt > 1
    assert np.array_equal(found.result, wanted.result)
    assert (found.begun, found.ended, found.trained, found.lost) == (3, 3, 3, 0)
    with crashing.store.read() as connection:
        charged = connection.execute(
            select(schema.ledger.c.charge, schema.ledger.c.event)
            .where(schema.ledger.c.charge.startswith(f"{run}/"))
            .order_by(schema.ledger.c.id)
        ).all()
        rounds = connection.execute(
            select(schema.rounds).where(schema.rounds.c.run == run).order_by(schema.rounds.c.round)
        ).all()
        actions = [
            entry["action"] for entry in audit.entries(connection) if entry["subject"] == run
        ]
    assert [tuple(one) for one in charged] == list(ledger.events(run))
    assert [(one.round, one.survivors) for one in rounds] == [
        (number, list(DEVICES)) for number in (1, 2, 3)
    ]
    assert actions == ["run.resume"] * (row.attempt - 1) + ["run.gated"]
    assert all(device.poll() is None for device in crashing.devices)
