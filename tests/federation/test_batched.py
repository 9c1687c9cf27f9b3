"""Clients trained together come out as each does by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from atoll.federation import batched, parameters, training
from atoll.federation.batched import Client
from atoll.federation.errors import DataMissing, Unbatchable
from atoll.federation.plan import Training
from atoll.federation.task import Examples

CLASSES = 3
SHAPE = (2, 8, 8)
CLOSE = 1e-5


def seeded(*layers: nn.Module) -> nn.Module:
    net = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return net


def mlp() -> nn.Module:
    return seeded(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def convolutional() -> nn.Module:
    return seeded(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


def client(rows: int, seed: int, shape: tuple[int, ...] = SHAPE) -> Client:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, *shape)).astype(np.float32)
    return Client(Examples(x, rng.integers(0, CLASSES, rows)), seed)


def how(epochs: int = 3, batch: int = 4, momentum: float = 0.9) -> Training:
    return Training(local_epochs=epochs, batch_size=batch, learning_rate=0.05, momentum=momentum)


def alone(model: nn.Module, weights, clients, asked):
    return [training.train(model, weights, one.examples, asked, one.seed) for one in clients]


def agree(together, one_by_one) -> None:
    assert len(together) == len(one_by_one)
    for mine, own in zip(together, one_by_one, strict=True):
        np.testing.assert_allclose(mine.weights, own.weights, rtol=CLOSE, atol=CLOSE)
        assert mine.loss == pytest.approx(own.loss, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("build", [mlp, convolutional])
@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_ragged_clients_come_out_as_they_do_alone(build, at_once) -> None:
    # 9 and 5 rows end in a batch of one, which is left out; 1 row is a batch of one, which is not.
    clients = [client(rows, seed) for seed, rows in enumerate([11, 1, 4, 9, 30, 1, 5, 2])]
    model = build()
    weights = parameters.flatten(model)
    together = list(batched.train(model, weights, clients, how(), at_once=at_once))
    agree(together, alone(build(), weights, clients, how()))
    moved = [np.abs(one.weights - weights).max() for one in together]
    assert min(moved) > 100 * CLOSE


@settings(max_examples=25)
@given(
    rows=some.lists(some.integers(1, 12), min_size=1, max_size=5),
    batch=some.integers(1, 13),
    epochs=some.integers(1, 3),
    momentum=some.sampled_from([0.0, 0.5]),
)
def test_any_sizes_and_batches_agree(rows, batch, epochs, momentum) -> None:
    clients = [client(count, seed) for seed, count in enumerate(rows)]
    asked = how(epochs, batch, momentum)
    model = mlp()
    weights = parameters.flatten(model)
    agree(
        list(batched.train(model, weights, clients, asked)), alone(mlp(), weights, clients, asked)
    )


@settings(max_examples=15)
@given(
    rows=some.lists(some.tuples(some.integers(1, 12), some.booleans()), min_size=1, max_size=5),
    momentum=some.sampled_from([0.0, 0.5]),
)
def test_each_clients_gradients_are_corrected_by_its_own(rows, momentum) -> None:
    def build() -> nn.Module:
        net = mlp()
        net[3].bias.requires_grad = False
        return net

    weights, rng = parameters.flatten(build()), np.random.default_rng(3)
    clients = [
        client(count, seed)._replace(
            correction=rng.normal(size=len(weights)).astype(np.float32) if corrected else None
        )
        for seed, (count, corrected) in enumerate(rows)
    ]
    asked = how(momentum=momentum)
    one_by_one = [
        training.train(build(), weights, one.examples, asked, one.seed, correction=one.correction)
        for one in clients
    ]
    agree(list(batched.train(build(), weights, clients, asked)), one_by_one)


def test_what_is_frozen_and_what_is_constant_stays() -> None:
    def build() -> nn.Module:
        net = mlp()
        net[1].weight.requires_grad = False
        net.register_buffer("kept", torch.ones(2))
        return net

    weights = parameters.flatten(build())
    clients = [client(6, 1), client(3, 2)]
    together = list(batched.train(build(), weights, clients, how()))
    agree(together, alone(build(), weights, clients, how()))
    held = build()
    parameters.unflatten(held, together[0].weights)
    assert torch.equal(held[1].weight, build()[1].weight)


def test_the_model_the_weights_and_the_random_state_are_left_as_they_were() -> None:
    model = mlp()
    weights = parameters.flatten(model)
    kept, state = weights.copy(), torch.random.get_rng_state()
    model.eval()
    batched.check(model, SHAPE, CLASSES, how())
    list(batched.train(model, weights, [client(5, 1)], how()))
    assert np.array_equal(weights, kept)
    assert np.array_equal(parameters.flatten(model), kept)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training


def test_clients_are_taken_a_chunk_at_a_time() -> None:
    taken = []

    def lazily():
        for seed in range(7):
            taken.append(seed)
            yield client(4, seed)

    model = mlp()
    results = batched.train(model, parameters.flatten(model), lazily(), how(), at_once=3)
    next(results)
    assert taken == [0, 1, 2]


def test_a_chunk_of_a_large_model_is_small_and_never_empty() -> None:
    assert batched.chunk_size(1) == batched.MOST_AT_ONCE
    assert batched.chunk_size(4_000_000) == 4
    assert batched.chunk_size(10**10) == 1


class Clamped(nn.Module):
    """Changes its weights as it runs, by a way round autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.inner[3].weight.data.clamp_(-0.05, 0.05)
        return self.inner(x)


class Counting(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = mlp(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


class Branching(nn.Module):
    """Looks at its examples to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.mean() > 0 else -self.inner(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (seeded(nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, CLASSES)), "statistics"),
        (
            seeded(nn.Flatten(), nn.BatchNorm1d(128, track_running_stats=False), nn.Linear(128, 3)),
            "statistics",
        ),
        (seeded(nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, CLASSES)), "random"),
        (Clamped(), "mapped|different"),
        (Counting(), "different"),
        (Branching(), "mapped"),
    ],
    ids=["batch norm", "batch norm without memory", "dropout", "surgery", "state", "branches"],
)
def test_a_model_that_others_would_change_is_refused(model, reason) -> None:
    before = parameters.flatten(model)
    with pytest.raises(Unbatchable, match=reason):
        batched.check(model, SHAPE, CLASSES, how())
    assert np.array_equal(parameters.flatten(model), before)


@pytest.mark.parametrize("build", [mlp, convolutional])
def test_other_models_are_not(build) -> None:
    batched.check(build(), SHAPE, CLASSES, how())


def test_every_field_of_training_is_understood_or_has_its_default() -> None:
    assert set(Training.__struct_fields__) >= batched.UNDERSTOOD
    batched.check(mlp(), SHAPE, CLASSES, Training())


def test_multiplications_are_counted_and_say_what_is_worthwhile() -> None:
    # 4 filters of 2·3·3 at 8·8 places, 6 of 4·3·3 at 2·2, and 24·3.
    count = 4 * 18 * 64 + 6 * 36 * 4 + 24 * CLASSES
    model = convolutional()
    assert batched.multiplications(model, SHAPE) == count
    cpu, most = torch.device("cpu"), batched.WORTHWHILE // count
    assert batched.worthwhile(model, SHAPE, how(batch=most), cpu)
    assert not batched.worthwhile(model, SHAPE, how(batch=most + 1), cpu)
    assert batched.worthwhile(model, SHAPE, how(batch=most + 1), torch.device("cuda"))
    assert model.training


def test_a_client_without_examples_is_an_error() -> None:
    model = mlp()
    with pytest.raises(DataMissing):
        list(batched.train(model, parameters.flatten(model), [client(0, 1)], how()))
