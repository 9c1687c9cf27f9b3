"""Rounds of pfl-research; run by :func:`benchmarks.peers.environments.run`.

As ``benchmarks/image_classification/pytorch/train.py`` of apple/pfl-research sets up CIFAR-10,
less what could only cost time: privacy, evaluation, and callbacks but the one that reads the clock.
Under ``torch.distributed.run`` each process trains its part of the cohort, as pfl does it.

Its arguments:

- ``network``: its name, and ``dropout``, in :mod:`benchmarks.peers.networks`
- ``folder``: of ``weights.npy``, float32 ``(n,)``, ``x.npy`` float32 ``(users, rows, …)`` and
  ``y.npy`` int64 ``(users, rows)``
- ``cohort``, ``batch``, ``rate``: of a round
- ``first``: whether channels of images come first in memory already, which is not how pfl has
  its data
- ``warm``, ``rounds``: rounds before those that are timed, and these
- ``threads``: torch's, in each process
- ``result``: where to write the last weights, or null

Prints ``seconds`` of each timed round.
"""

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import NETWORKS
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn

given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
np.random.seed(0)  # noqa: NPY002 -- what pfl draws from
torch.manual_seed(0)


def loss(self: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy; pfl calls it."""
    self.train()
    return nn.functional.cross_entropy(self(x), y)


def metrics(self: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Weighted]:
    """Return the loss; pfl asks for such a function."""
    with torch.no_grad():
        return {"loss": Weighted(float(loss(self, x, y)) * len(x), len(x))}


class Clock(TrainingProcessCallback):
    """Notes when rounds end."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,  # noqa: ARG002 -- as pfl calls it; so are the others
        model: PyTorchModel,  # noqa: ARG002
        *,
        central_iteration: int,  # noqa: ARG002
    ) -> tuple[bool, Metrics]:
        """Do nothing else."""
        self.ended.append(time.perf_counter())
        return False, Metrics()


def main() -> dict[str, Any]:
    """Run the rounds."""
    folder = Path(given["folder"])
    net = NETWORKS[given["network"]](given["dropout"])
    nn.utils.vector_to_parameters(
        torch.from_numpy(np.load(folder / "weights.npy")), net.parameters()
    )
    net.loss = types.MethodType(loss, net)
    net.metrics = types.MethodType(metrics, net)
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    x = torch.from_numpy(np.load(folder / "x.npy"))
    y = torch.from_numpy(np.load(folder / "y.npy"))
    if given.get("first"):
        x = x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    users = range(len(y))
    dealt = {user: Dataset((x[user], y[user]), user_id=str(user)) for user in users}
    dataset = FederatedDataset(dealt.__getitem__, get_user_sampler("minimize_reuse", users))
    backend = SimulatedBackend(dataset, dataset, postprocessors=[WeightByUser()])
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(given["warm"] + given["rounds"], 10**9, given["cohort"], None),
        backend,
        model,
        NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=given["rate"],
            local_batch_size=given["batch"],
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if given.get("result"):
        np.save(
            given["result"], nn.utils.parameters_to_vector(net.parameters()).detach().cpu().numpy()
        )
    return {"seconds": np.diff(clock.ended)[given["warm"] - 1 :].tolist()}


if __name__ == "__main__":
    said = main()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(said))
