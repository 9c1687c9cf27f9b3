"""What the devices and the server side of :mod:`benchmarks.fleet_round` run, in their processes.

    python -m benchmarks.fleet_apps URL IDENTITY_DIR DATA_DIR DEVICE     # a device, until SIGTERM

``server`` is the ServerApp, loaded by Flower's executor; its job and its result are files in
``$BENCH_FOLDER``.
"""

import json
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from atoll.edge_agent import trainer  # so that a device here weighs what a real one weighs
from atoll.federation import client_app, plan, rounds
from atoll.federation.bundled_grid import BundledGrid
from atoll.federation.task import Examples, Split
from atoll.federation.warm_node import WarmNode
from atoll.fleet.identity import Identity, Peer, peer_of
from atoll.privacy.modes import PartyIdentity, hub_session, party_session

if TYPE_CHECKING:
    from torch import nn

WIDTH: Final = 1000
ROWS: Final = 10


class Square:
    """One layer of ``WIDTH`` squared weights, so 4 MB of them, and one batch of random rows."""

    name = "square"
    input_shape = (WIDTH,)
    channels = tuple(f"x{number}" for number in range(WIDTH))
    classes = tuple(f"y{number}" for number in range(WIDTH))

    def model(self, seed: int) -> "nn.Module":
        """Return the layer; what it begins with comes from the hub."""
        import torch
        from torch import nn

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Linear(WIDTH, WIDTH, bias=False)

    def load(self, data: Path, split: Split) -> Examples:
        """Return the rows, the same on every device."""
        del data, split
        rng = np.random.default_rng(0)
        x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        return Examples(x, rng.integers(0, WIDTH, ROWS))


server = ServerApp()


@server.main()
def serve(grid: Grid, _: Context) -> None:
    """Run the plan and write what each round took."""
    folder = Path(os.environ["BENCH_FOLDER"])
    job = json.loads((folder / "job.json").read_text())
    the_plan = plan.loads(job["plan"])
    members = {
        name: rounds.Member(int(node), job["certificates"][name].encode())
        for name, node in job["nodes"].items()
    }
    cohort = rounds.Cohort(members, sorted(members), sorted(members))
    seconds: list[float] = []

    def on_round(report: rounds.RoundReport) -> None:
        if report.dropped:
            raise RuntimeError(f"devices dropped out: {report.dropped}")
        seconds.append(report.seconds)

    rounds.run_rounds(
        BundledGrid(grid),
        the_plan,
        cohort,
        hub_session(the_plan.privacy.mode, cohort.roster),
        lambda *_: None,
        on_round,
        np.zeros(WIDTH * WIDTH, np.float32),
        run=the_plan.name,
    )
    (folder / f"{the_plan.name}.json").write_text(json.dumps(seconds))


def device(url: str, identity: Path, data: Path, name: str) -> None:
    """Answer the hub as a training process does, until SIGTERM."""
    mine, ca = Identity.load(identity), (identity / "ca.pem").read_bytes()

    def peer(certificate: bytes) -> Peer:
        return peer_of(certificate, ca, datetime.now(UTC))

    me = PartyIdentity(name, mine.key, mine.seal, peer)
    app = client_app.build(Square(), data, lambda mode: party_session(mode, me), {})
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    os.environ["OMP_NUM_THREADS"] = "1"  # as trainer.main does
    files = (identity / "ca.pem", identity / "cert.pem", identity / "key.pem")
    node = WarmNode(url, ca=files[0], certificate=files[1], key=files[2])
    print(f"up, beside {trainer.__name__}", flush=True)
    node.serve(app, stop)


if __name__ == "__main__":
    device(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
