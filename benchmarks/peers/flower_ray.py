"""Flower's simulation on Ray; run by :func:`benchmarks.peers.environments.run`.

Its arguments:

- ``folder``: of ``weights.npy``, float32 ``(n,)``, and for training of ``x.npy`` float32
  ``(clients, rows, …)`` and ``y.npy`` int64 ``(clients, rows)``
- ``work``: ``train`` a network; or ``echo``, send the weights back
- ``clients``: how many there are; each takes part in every round
- ``warm``, ``rounds``: rounds before those that are timed, and these
- ``actors``, ``threads``: Ray's workers, and torch's threads in each
- ``network``: its name, and ``dropout``, in :mod:`benchmarks.peers.networks`
- ``batch``, ``rate``: of the training
- ``result``: where to write the last weights, or null

Prints ``seconds`` of each timed round, from choosing clients to the mean of what they sent, as
:class:`flwr.serverapp.strategy.FedAvg` goes about it; Ray's start is before them.

Workers import this file, so that each keeps its network from one message to the next; the
data is mapped and not sent.
"""

import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from networks import NETWORKS
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

KEYS = ("network", "dropout", "threads", "batch", "rate")
"""What clients hear of the setting besides their work."""

client = ClientApp()


@cache
def network(name: str, dropout: float) -> nn.Module:
    """Return the network that a worker keeps."""
    return NETWORKS[name](dropout)


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Train on the client's rows, or send the weights back."""
    given: ConfigRecord = message.content["config"]
    arrays: ArrayRecord = message.content["arrays"]
    rows, loss = 1, 0.0
    if given["work"] == "train":
        torch.set_num_threads(given["threads"])
        net = network(given["network"], given["dropout"]).to(DEVICE)
        net.load_state_dict(arrays.to_torch_state_dict())
        rows, loss = train(net, int(context.node_config["partition-id"]), given)
        arrays = ArrayRecord(net.state_dict())
    metrics = MetricRecord({"num-examples": rows, "loss": loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def train(net: nn.Module, place: int, given: ConfigRecord) -> tuple[int, float]:
    """Take one epoch of SGD; return the rows and their mean loss."""
    folder = Path(given["folder"])
    x = torch.from_numpy(np.array(np.load(folder / "x.npy", mmap_mode="r")[place])).to(DEVICE)
    y = torch.from_numpy(np.array(np.load(folder / "y.npy", mmap_mode="r")[place])).to(DEVICE)
    descent = torch.optim.SGD(net.parameters(), given["rate"])
    net.train()
    total = 0.0
    for some_x, some_y in zip(x.split(given["batch"]), y.split(given["batch"]), strict=True):
        descent.zero_grad()
        loss = nn.functional.cross_entropy(net(some_x), some_y)
        loss.backward()
        descent.step()
        total += float(loss.detach()) * len(some_y)
    return len(y), total / len(y)


def state_of(weights: np.ndarray, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the flat vector as Flower sends it: by the network's tensors, or as one."""
    if given["work"] == "echo":
        return {"weights": torch.from_numpy(weights)}
    net = NETWORKS[given["network"]](given["dropout"])
    nn.utils.vector_to_parameters(torch.from_numpy(weights), net.parameters())
    return dict(net.state_dict())


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Run the rounds."""
    server, ended = ServerApp(), []
    weights = np.load(Path(given["folder"]) / "weights.npy")
    config = {key: given[key] for key in ("work", "folder")} | {
        key: given[key] for key in KEYS if key in given
    }

    @server.main()
    def serve(grid: Grid, _: Context) -> None:
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=given["clients"],
            min_available_nodes=given["clients"],
        )
        result = strategy.start(
            grid,
            ArrayRecord(state_of(weights, given)),
            num_rounds=given["warm"] + given["rounds"],
            train_config=ConfigRecord(config),
            evaluate_fn=lambda *_: ended.append(time.perf_counter()),
        )
        if given.get("result"):
            state = result.arrays.to_torch_state_dict()
            np.save(given["result"], torch.cat([v.flatten() for v in state.values()]).numpy())

    gpus = float(torch.cuda.is_available())
    run_simulation(
        server,
        client,
        given["clients"],
        backend_config={
            "init_args": {
                "num_cpus": given["actors"],
                "num_gpus": int(gpus),
                "log_to_driver": False,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": gpus / given["actors"]},
        },
    )
    return {"seconds": np.diff(ended)[given["warm"] :].tolist()}


if __name__ == "__main__":
    import flower_ray  # by its name: workers then import it too, instead of being sent a copy

    print(json.dumps(flower_ray.main(json.loads(sys.argv[1]))))
