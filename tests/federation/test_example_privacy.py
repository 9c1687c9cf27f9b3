"""DP-SGD against per-example autograd, and its noise and samples against their distributions."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from atoll.federation import example_privacy, lora, parameters
from atoll.federation.errors import DataMissing
from atoll.federation.example_privacy import SENSITIVITY, Noise
from atoll.federation.plan import ExamplePrivacy, Training
from atoll.federation.task import Examples
from atoll.federation.training import Sgd
from atoll.privacy.errors import BadParameters
from atoll.privacy.keystream import Keystream
from atoll.simulations import spar_net

CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Steps this small are work for one thread; two wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Twice(nn.Module):
    """Goes through one of its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


class Sidestep(nn.Module):
    """Uses a layer's weights behind the layer's back, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + x.square() @ self.head.weight.T


class Centred(nn.Module):
    """Takes the batch's mean off each example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0][:, -1])


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def convolution(padding_mode: str = "zeros") -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode=padding_mode),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    )


def spar() -> nn.Module:
    """The SPAR network without its augmentation, which no loop could repeat."""
    net = spar_net.build(CLASSES, 0)
    net.worn = nn.Identity()
    return net


def four_axes() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(3 * 2 * 5, CLASSES))


GHOST = [(linear, (5,)), (convolution, (2, 10)), (spar, (6, 200))]


def adapted(padding_mode: str) -> nn.Module:
    """Adapters begin at zero, where a wrong norm does not show."""
    model = convolution(padding_mode)
    lora.adapt(model, ["0"], 1, 1.0, 0)
    return model


ONE_BY_ONE = [
    (lambda: convolution("circular"), (2, 10)),
    (four_axes, (2, 5, 4)),
    (Twice, (5,)),
]


def made(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def data(rows: int, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Examples:
    rng = np.random.default_rng(seed)
    x = (scale * rng.normal(size=(rows, *shape))).astype(np.float32)
    return Examples(x, rng.integers(0, CLASSES, rows))


def privacy(clip_norm: float = 1.0, **other: float) -> ExamplePrivacy:
    return ExamplePrivacy(
        clip_norm=clip_norm,
        **({"noise_multiplier": 1.0, "sampling_rate": 0.25, "steps": 1} | other),
    )


def summed(model: nn.Module, examples: Examples, clip_norm: float, chunk: int) -> np.ndarray:
    """The sum before noise, in steps of the grid."""
    with example_privacy._expected_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape, sgd = examples.x.shape[1:], Sgd(model, Training())
        clipping = example_privacy._Clipping(
            model, shape, sgd, privacy(clip_norm), len(examples.y), np.zeros
        )
        x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
        for one in torch.split(torch.arange(len(y)), chunk):
            clipping.add(x[one], y[one])
        held = [p.summed_grad.flatten() for p in clipping.optimiser.params]
        clipping.close()
        return torch.cat(held).numpy()


def each(model: nn.Module, examples: Examples) -> np.ndarray:
    """Every example's gradient by itself, float64 ``(rows, parameters)``."""
    model = model.double().train()
    found = []
    for x, y in zip(torch.from_numpy(examples.x), torch.from_numpy(examples.y), strict=True):
        loss = nn.functional.cross_entropy(model(x[None].double()), y[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]).numpy())
    model.float()
    return np.stack(found)


@pytest.mark.parametrize(("build", "shape"), GHOST + ONE_BY_ONE)
@pytest.mark.parametrize("clip_norm", [0.3, 1e4])
def test_the_sum_is_that_of_gradients_clipped_one_by_one(build, shape, clip_norm):
    model, examples = made(build, 1), data(10, shape, 2)
    got = summed(model, examples, clip_norm, chunk=4) * (clip_norm / SENSITIVITY)
    gradients = each(model, examples)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    clipped = gradients * np.minimum(1, clip_norm / norms)
    assert (norms > 0.3).any()
    assert (norms < 1e4).all()
    # 0.1 % below the norm where it clips; where it does not, three chunks' rounding.
    allowed = 1e-3 * np.linalg.norm(clipped, axis=1).sum() * (clip_norm < 1)
    rounding = 1.5 * math.sqrt(got.size) * clip_norm / SENSITIVITY
    assert np.linalg.norm(got - clipped.sum(axis=0)) < allowed + rounding + 1e-5


@pytest.mark.parametrize(
    ("build", "shape", "ghost"), [(*g, True) for g in GHOST] + [(*f, False) for f in ONE_BY_ONE]
)
def test_ghost_clipping_is_used_exactly_where_its_norms_are_right(build, shape, ghost):
    with example_privacy._expected_warnings():
        assert example_privacy._follows_ghost(made(build, 3), shape) is ghost


@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    clip_norm=st.sampled_from([1e-4, 0.1, 7.3]),
    chunk=st.integers(2, 6),
    which=st.integers(0, 5),
)
@settings(max_examples=25)
def test_one_example_moves_the_sum_by_no_more_than_the_sensitivity(
    seed, scale, clip_norm, chunk, which
):
    model, examples = made(convolution, seed), data(6, (2, 10), seed, scale)
    there = summed(model, examples, clip_norm, chunk)
    examples.x[which] = np.nan
    gone = summed(model, examples, clip_norm, chunk)
    moved = (there - gone).astype(object)
    assert sum(moved * moved) <= SENSITIVITY**2


def test_a_clipped_example_uses_the_sensitivity_up_to_a_thousandth():
    model, examples = made(linear, 0), data(1, (5,), 0, scale=1e3)
    norm = np.linalg.norm(summed(model, examples, 0.01, chunk=1))
    assert 0.999 * SENSITIVITY < norm <= SENSITIVITY


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_counts_as_zero(bad):
    model, examples = made(linear, 0), data(9, (5,), 0)
    without = Examples(np.delete(examples.x, 4, axis=0), np.delete(examples.y, 4))
    examples.x[4] = bad
    got = summed(model, examples, 1.0, chunk=9)
    np.testing.assert_allclose(got, summed(model, without, 1.0, chunk=9), atol=20)
    only = Examples(examples.x[4:5], examples.y[4:5])
    noise: Noise = lambda count: np.zeros(count, np.int64)  # noqa: E731
    start = parameters.flatten(model)
    same = example_privacy.descend(
        model, start, only, Training(), privacy(), batches=[np.zeros(1, int)], noise=noise, seed=0
    )
    assert np.array_equal(same.weights, start)
    assert math.isnan(same.loss)


def test_memory_is_bounded_by_chunks_that_add_up_to_the_same():
    examples = data(24, (2, 10), 5)
    sums = [summed(made(convolution, 1), examples, 0.2, chunk) for chunk in (2, 5, 24)]
    for one in sums[1:]:
        # 24 roundings of half a step, and float32.
        np.testing.assert_allclose(one, sums[0], atol=12 + 1e-5 * SENSITIVITY)


def test_a_step_goes_down_the_noised_sum_over_the_expected_size_of_a_batch():
    examples, how = data(8, (5,), 1), Training(learning_rate=0.5, momentum=0.9)
    start = parameters.flatten(made(linear, 1))
    drawn = [np.arange(start.size) * 1000, np.arange(start.size)[::-1] * 3000]
    left = iter(drawn)
    batches = [np.arange(8), np.zeros(0, int)]
    done = example_privacy.descend(
        made(linear, 2),
        start,
        examples,
        how,
        privacy(2.0),
        batches=batches,
        noise=lambda count: next(left)[:count],
        seed=0,
    )
    first = summed(made(linear, 1), examples, 2.0, chunk=32) + drawn[0]
    velocities = [first, 0.9 * first + drawn[1]]
    wanted = start - 0.5 * sum(velocities) * (2.0 / SENSITIVITY) / (8 * 0.25)
    np.testing.assert_allclose(done.weights, wanted, atol=1e-6)


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0])
def test_an_empty_batch_is_a_step_of_noise_of_the_right_variance_on_the_grid(noise_multiplier):
    model = nn.Linear(200, CLASSES * 20)
    start = np.zeros(201 * CLASSES * 20, np.float32)
    rate = 2.0**-40
    done = example_privacy.train(
        model,
        start,
        data(4, (200,), 0),
        Training(learning_rate=4 * rate, momentum=0.0),
        privacy(1.0, noise_multiplier=noise_multiplier, sampling_rate=rate),
        Keystream.replayable(1),
    )
    # From zero, at a learning rate of the batch's expected size, clipping at 1: no rounding.
    noise = done.weights.astype(np.float64) * SENSITIVITY
    near = np.abs(noise) < 2**24
    assert near.mean() > 0.999
    assert np.array_equal(noise[near], np.round(noise[near]))
    square = float(noise @ noise) / (noise_multiplier * SENSITIVITY) ** 2
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], noise.size)
    assert low < square < high
    assert math.isnan(done.loss)


def test_sizes_of_sampled_batches_are_binomial():
    stream, rows, rate = Keystream.replayable(2), 40, 0.3
    batches = [example_privacy.poisson(rows, rate, stream) for _ in range(4000)]
    sizes = np.bincount([len(batch) for batch in batches], minlength=rows + 1)
    expected = stats.binom.pmf(np.arange(rows + 1), rows, rate) * len(batches)
    kept = expected >= 5
    assert (
        stats.chisquare(
            [*sizes[kept], sizes[~kept].sum()], [*expected[kept], expected[~kept].sum()]
        ).pvalue
        > 1e-4
    )
    # And every example is as likely as every other.
    times = np.bincount(np.concatenate(batches), minlength=rows)
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], len(batches), rate)
    assert (low < times).all()
    assert (times < high).all()
    assert np.array_equal(example_privacy.poisson(5, 1.0, stream), np.arange(5))


@pytest.mark.parametrize(
    ("build", "shape"), [(linear, (5,)), (lambda: spar_net.build(CLASSES, 0), (6, 200))]
)
def test_every_draw_is_the_keystreams(build, shape):
    def run(key: int, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 -- what must not be used
        before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
        model = made(build, 0)
        done = example_privacy.train(
            model,
            parameters.flatten(model),
            data(12, shape, 0),
            Training(batch_size=4),
            privacy(steps=3, sampling_rate=0.5),
            Keystream.replayable(key),
        )
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
        return done.weights

    first = run(1, 10)
    assert np.array_equal(first, run(1, 11))
    assert np.isclose(first, run(2, 10)).mean() < 1e-3


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (5,), "'1' .BatchNorm1d. mixes"),
        (nn.Sequential(nn.Linear(5, 4), nn.SyncBatchNorm(4)), (5,), "'1' .SyncBatchNorm. mixes"),
        (nn.Sequential(Centred(), nn.Linear(5, 3)), (5,), "depends on others"),
        (
            nn.Sequential(
                nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(10, 3)
            ),
            (2, 5),
            "'0.running_mean' takes up statistics",
        ),
        (Sidestep(), (5,), "'head.weight'"),
        (Recurrent(), (7, 4), "cannot follow layer 'cells'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_whose_examples_cannot_be_told_apart_is_refused(model, shape, why):
    with pytest.raises(BadParameters, match=why):
        example_privacy.check(model, shape)


def test_a_model_too_large_for_the_grid_is_refused():
    assert example_privacy._kept(example_privacy.MAX_PARAMETERS) >= 0.999
    with pytest.raises(BadParameters, match="too large"):
        example_privacy._kept(example_privacy.MAX_PARAMETERS + 1)


def test_a_model_is_left_without_opacus_hooks():
    model = made(linear, 0)
    start, stream = parameters.flatten(model), Keystream.replayable(0)
    example_privacy.train(model, start, data(4, (5,), 0), Training(), privacy(), stream)
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_no_examples_is_said():
    with pytest.raises(DataMissing):
        example_privacy.train(
            made(linear, 0),
            parameters.flatten(made(linear, 0)),
            data(0, (5,), 0),
            Training(),
            privacy(),
            Keystream.replayable(0),
        )


@pytest.mark.parametrize(("padding_mode", "ghost"), [("zeros", True), ("circular", False)])
def test_a_wrong_norm_shows_though_adapters_begin_at_zero(padding_mode: str, ghost: bool) -> None:  # noqa: FBT001
    model = made(lambda: adapted(padding_mode), 0)
    before = parameters.flatten(model)
    with example_privacy._expected_warnings():
        assert example_privacy._follows_ghost(model, (2, 10)) is ghost
    assert np.array_equal(parameters.flatten(model), before)
