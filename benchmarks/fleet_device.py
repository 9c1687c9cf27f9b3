"""A device of :mod:`benchmarks.fleet_round`, until SIGTERM.

    python -m benchmarks.fleet_device URL IDENTITY_DIR DATA_DIR DEVICE

What its process imports is what a training process imports, so that it weighs the same.
"""

import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from atoll.edge_agent import trainer
from atoll.federation import client_app
from atoll.federation.task import Examples, Split
from atoll.federation.warm_node import WarmNode
from atoll.fleet.identity import Identity, Peer, peer_of
from atoll.privacy.modes import PartyIdentity, party_session

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
