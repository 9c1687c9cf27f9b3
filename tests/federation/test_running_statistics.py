"""Running statistics become what devices measured, whatever the strategy makes of the weights."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blobs import Blobs, write
from cohorts import fleet, plan_of
from torch import nn

from atoll.federation import layout, progress, rounds, training
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.conversation import Learned
from atoll.federation.parameters import Vector
from atoll.federation.plan import Layers, Plan
from atoll.federation.running_statistics import Running
from atoll.federation.task import Examples, Split


class Small(Blobs):
    """Values so small that their variances fall from where they begin, one, to next to nothing."""

    def load(self, data: Path, split: Split) -> Examples:
        good = super().load(data, split)
        return Examples(good.x * np.float32(0.05), good.y)


NONE = np.zeros(0, np.float32)


def with_training(**training: object) -> Plan:
    made = plan_of("plain", count=8)
    return msgspec.structs.replace(
        made, training=msgspec.structs.replace(made.training, **training)
    )


def test_of_a_model_they_are_what_normalisation_measured_and_the_variances_among_it() -> None:
    # 24 values of a layer; weight, bias, running mean and running variance of eight each; 18 more.
    running = layout.of(Blobs(), 0).running
    assert running is not None
    assert np.flatnonzero(running.places).tolist() == list(range(40, 56))
    assert np.flatnonzero(running.variances).tolist() == list(range(48, 56))


def test_a_weight_that_two_layers_share_is_none_of_them() -> None:
    class Shared(Blobs):
        def model(self, seed: int) -> nn.Module:
            net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
            net[2].weight = net[0].weight
            return net

    assert layout.of(Shared(), 0).running is None


@pytest.mark.parametrize("layers", [Layers(local=("batchnorm",)), Layers(trained=("3.*",))])
def test_where_none_of_them_travels_there_are_none(layers: Layers) -> None:
    assert layout.of(Blobs(), 0, layers).running is None


def test_momentum_carries_weights_on_and_statistics_to_the_mean() -> None:
    running = Running(np.array([False, True, True]), np.array([False, False, True]))
    the_plan = with_training(server_momentum=0.5, server_learning_rate=1.0)
    state = Checkpoint.fresh("run", np.array([1, 1, 1], np.float32))
    for number, change in enumerate(([-1.0, -1.0, -0.75], [0.0, 0.0, 0.0], [0.0, 0.0, -9.0]), 1):
        learned = Learned(np.array(change), 1.0, NONE)
        state = progress.stepped(replace(state, begun=number), learned, the_plan, running)
        weight = [0.0, -0.5, -0.75][number - 1]  # 1 - 1, then half of the last step, and a quarter
        variance = [0.25, 0.25, 0.0][number - 1]
        assert state.weights.tolist() == [weight, 0.0, variance]


@pytest.mark.parametrize(
    "asked", [{"server_momentum": 0.9}, {"strategy": "fedadam", "server_learning_rate": 0.3}]
)
def test_no_strategy_takes_a_variance_below_zero(tmp_path: Path, asked: dict[str, object]) -> None:
    the_plan, task = with_training(**asked), Small()
    shape, here = (
        layout.of(task, the_plan.seed),
        fleet(tmp_path, 3, {f"device-{one}": task for one in (1, 2, 3)}),
    )
    held_back = task.load(write(tmp_path / "other", 9), "test")

    def loss(weights: Vector) -> float:
        return training.evaluate(shape.model, shape.whole(weights), held_back).loss

    done = here.run(the_plan, task=task)
    blind = rounds.run_rounds(here.of(the_plan, run="blind"), shape.initial)
    assert shape.running is not None
    assert (done.weights[shape.running.variances] > 0).all()
    assert loss(done.weights) < 0.3
    # What would come of it were statistics weights like any other.
    assert (blind.weights[shape.running.variances] < 0).any()
