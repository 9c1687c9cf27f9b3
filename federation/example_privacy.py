"""DP-SGD on the device: each single example is protected, whoever sees the device's update.

    Poisson sample → clip each example's gradient → sum on a grid → discrete noise → step

After Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016). Neighbouring data sets
differ in one example whose gradients are there or zero; how many examples a device holds is
not hidden. What a device makes of the noised steps costs nothing more: momentum, the update,
its own clipping and noise, every sum.

**Clipping** is Opacus' ghost clipping (Li et al., arXiv 2110.05679): norms from activations
and backpropagated errors, no gradient per example. Where a layer has no such rule, Opacus takes
its gradients example by example with ``torch.func``, which also is right for a layer that
reparametrises its weights. Opacus finds layers by hooks and trusts its rules for them; where
either fails, a norm comes out too small and nothing says so. So before any real example is
touched, made-up ones are compared with autograd's own gradients (:func:`check`).

**Sensitivity.** A sum of floats depends on what else is in it, and so may differ by more than
one clipped gradient. Here each chunk's sum is put on a grid of ``clip_norm / 2**22`` and the
chunks add up as integers. Rounding n parameters moves the difference of two sums by less than
√n grid steps; gradients are clipped by as much more, and by :data:`FLOAT_SHARE` more again for
torch's arithmetic within a chunk. Together that is less than 0.1 % of ``clip_norm``, taken off
the gradients, not off the noise. The latter is a margin and no bound: float32 errs by some 1e-6,
but where a model subtracts large numbers from each other an example's gradient can come out
longer than it was clipped to (by 0.2 % at inputs 3,000 times their signal). Scale inputs.

**Noise** is the exact discrete Gaussian on that grid, from the caller's keystream. Opacus'
own is ``torch.normal``: predictable, and its floats' gaps tell what was added to them (Mironov,
CCS 2012). Its secure mode needs torchcsprng, which current torch does not load.

A model's own randomness (dropout, augmentation) is torch's, from a secret seed: it is part of
the gradients, and privacy does not rest on it. The mean training loss is reported in the clear
as in :mod:`atoll.federation.training`: ε speaks of the model alone.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from atoll.federation.errors import DataMissing
from atoll.federation.parameters import Vector, flatten, unflatten
from atoll.federation.plan import ExamplePrivacy, Training
from atoll.federation.task import Examples
from atoll.federation.training import Sgd, Trained, few_threads
from atoll.privacy.errors import BadParameters, BadUpdate
from atoll.privacy.keystream import Keystream
from atoll.privacy.noise import discrete_gaussian

SENSITIVITY: Final = 1 << 22
"""``clip_norm`` in steps of the grid: by how much one example changes a sum at most."""
FLOAT_SHARE: Final = 2.0**-11
"""Part of ``clip_norm`` that is left to the errors of float arithmetic."""
MAX_PARAMETERS: Final = 1 << 22
"""Up to here rounding takes no larger part than :data:`FLOAT_SHARE`."""

_PROBES: Final = 3
_STIR: Final = 0.1
_TOLERANCE: Final = 1e-3

Indices = npt.NDArray[np.int64]
Noise = Callable[[int], npt.NDArray[np.int64]]
"""Draws so many values, in steps of the grid."""


def train(
    model: nn.Module,
    weights: Vector,
    examples: Examples,
    training: Training,
    privacy: ExamplePrivacy,
    stream: Keystream,
    *,
    correction: Vector | None = None,
) -> Trained:
    """Run DP-SGD from ``weights``; every secret draw is from ``stream``, fresh on a device.

    The loss is the mean over the examples of all steps, NaN when no step had any. Raises
    :class:`DataMissing` when there are no examples, :class:`BadParameters` for a model that
    cannot be trained so, :class:`BadUpdate` when training diverged.
    """
    rows, rate = len(examples.y), privacy.sampling_rate
    seed = int(stream.below(2**63, 1)[0])
    sigma = privacy.noise_multiplier * SENSITIVITY
    return descend(
        model,
        weights,
        examples,
        training,
        privacy,
        batches=(poisson(rows, rate, stream) for _ in range(privacy.steps)),
        noise=lambda count: discrete_gaussian(sigma, count, stream),
        seed=seed,
        correction=correction,
    )


def poisson(rows: int, rate: float, stream: Keystream) -> Indices:
    """Return which of ``rows`` examples are in a batch: each with probability ``rate``.

    Exactly, that is the next multiple of 2**-53. The batch may be empty.
    """
    return np.flatnonzero(stream.uniform(rows) < rate)


def descend(
    model: nn.Module,
    weights: Vector,
    examples: Examples,
    training: Training,
    privacy: ExamplePrivacy,
    *,
    batches: Iterable[Indices],
    noise: Noise,
    seed: int,
    correction: Vector | None = None,
) -> Trained:
    """Take one step per batch; :func:`train` with the draws given.

    ``correction`` ``(n,)`` is added to each noised gradient (:mod:`atoll.federation.control`). It
    costs nothing more, being made of what earlier noised steps came to.
    A batch is worked on ``training.batch_size`` examples at a time. An empty one is a step of
    noise alone. An example whose loss or gradient is not finite counts as zero.
    """
    rows = len(examples.y)
    if rows == 0:
        raise DataMissing("this device has no training examples")
    with few_threads(), torch.random.fork_rng(devices=[]), _expected_warnings():
        torch.manual_seed(seed)
        # Before the hub's weights: with those it likes, gradients might be 0 and faults unseen.
        shape, sgd = examples.x.shape[1:], Sgd(model, training, correction)
        clipping = _Clipping(model, shape, sgd, privacy, rows, noise)
        unflatten(model, weights)
        x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
        loss_sum, seen, steps = 0.0, 0, 0
        for batch in batches:
            for chunk in torch.split(torch.from_numpy(batch), training.batch_size):
                loss, counted = clipping.add(x[chunk], y[chunk])
                loss_sum, seen = loss_sum + loss, seen + counted
            clipping.step()
            steps += 1
        clipping.close()
        return Trained(flatten(model), loss_sum / seen if seen else math.nan, steps)


def check(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Raise :class:`BadParameters` for a model whose examples cannot be clipped one by one."""
    with few_threads(), torch.random.fork_rng(devices=[]), _expected_warnings():
        torch.manual_seed(0)
        _follows_ghost(model, input_shape)


class _Clipping:
    """The model with Opacus' hooks, its optimiser and its loss, bound together."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        sgd: Sgd,
        privacy: ExamplePrivacy,
        rows: int,
        noise: Noise,
    ) -> None:
        length = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ghost = _follows_ghost(model, input_shape)
        self._module = _hooked(model, privacy.clip_norm * _kept(length), ghost=ghost)
        self.optimiser = _GridOptimizer(sgd, privacy, rows, noise)
        criterion = nn.CrossEntropyLoss(reduction="sum")
        self._loss = DPLossFastGradientClipping(self._module, self.optimiser, criterion, "sum")

    def add(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, int]:
        """Add a chunk's clipped gradients to the sum; return its loss and how many counted."""
        while len(y):
            for parameter in self._module.trainable_parameters:
                parameter._norm_sample = None  # noqa: SLF001 -- where Opacus leaves the norms
            loss = self._loss(self._module(x), y)
            loss.backward()
            finite = torch.isfinite(self._module.per_sample_gradient_norms)
            if finite.all():
                self.optimiser.signal_skip_step()
                self.optimiser.step()
                return float(loss.item()), len(y)
            x, y = x[finite], y[finite]
        return 0.0, 0

    def step(self) -> None:
        """Add noise to the sum and go one step down."""
        self.optimiser.zero_grad(set_to_none=True)
        self.optimiser.step()

    def close(self) -> None:
        """Take Opacus' hooks off the model."""
        self._module.to_standard_module()


class _GridOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimiser, with sums in integers and exact noise.

    Opacus keeps a batch's sum in ``summed_grad``: here int64, in steps of the grid.
    """

    def __init__(self, sgd: Sgd, privacy: ExamplePrivacy, rows: int, noise: Noise) -> None:
        super().__init__(
            sgd,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.clip_norm,
            expected_batch_size=rows * privacy.sampling_rate,
            loss_reduction="sum",
        )
        self._grid = privacy.clip_norm / SENSITIVITY
        self._noise = noise

    def accumulate(self) -> None:
        """Add the gradients to the sum, rounded to the grid; no gradients add nothing."""
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p, dtype=torch.int64)
            if p.grad is not None:
                steps = torch.round(p.grad.double() / self._grid)
                if not torch.isfinite(steps).all():
                    raise BadUpdate("a gradient holds NaN or Inf; the device's training diverged")
                p.summed_grad += steps.to(torch.int64)

    def add_noise(self) -> None:
        """Set the gradients to the sum plus noise."""
        sizes = [p.numel() for p in self.params]
        drawn = torch.split(torch.from_numpy(self._noise(sum(sizes))), sizes)
        for p, mine in zip(self.params, drawn, strict=True):
            p.grad = ((p.summed_grad + mine.view_as(p)).double() * self._grid).to(p.dtype)

    def scale_grad(self) -> None:
        """Divide by the expected size of a batch; the actual one is secret."""
        for p in self.params:
            p.grad /= self.expected_batch_size


def _kept(length: int) -> float:
    """Return the part of ``clip_norm`` to which gradients of ``length`` values are clipped."""
    if length > MAX_PARAMETERS:
        raise BadParameters(
            f"a model of {length} parameters is too large to protect single examples in; "
            f"the grid is fine enough for {MAX_PARAMETERS}"
        )
    return 1 - FLOAT_SHARE - math.sqrt(length) / SENSITIVITY


def _follows_ghost(model: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Say whether Opacus' norms hold for the model by ghost clipping, or only without.

    Without, every layer's gradients are taken example by example. Raises
    :class:`BadParameters` when they hold neither way.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 -- its only base
            raise BadParameters(
                f"layer {name!r} ({type(layer).__name__}) mixes the examples of a batch, so none "
                "can be protected by itself; use GroupNorm or LayerNorm, or leave out "
                "[privacy.examples]"
            )
    why = ""
    for ghost in (True, False):
        try:
            why = _fault(_hooked(_stirred(model), 1.0, ghost=ghost), input_shape)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            own = [repr(name) for name, layer in model.named_modules() if _is_own(layer)]
            why = f"Opacus cannot follow layer {' or '.join(own) or 'types'} ({error})"
        if not why:
            return ghost
    raise BadParameters(
        f"the model's examples cannot be clipped one by one: {why}; change the model, or leave "
        "out [privacy.examples]"
    )


def _stirred(model: nn.Module) -> nn.Module:
    """Return a copy whose trained parameters have been moved a little, at random.

    Where one of them is zero, as an adapter's is at first, others have no gradient, and a wrong
    norm of that would not show.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=_STIR)
    return copied


def _is_own(layer: nn.Module) -> bool:
    """Say whether a layer has parameters and is none of those that Opacus has rules for."""
    ruled = GradSampleModuleFastGradientClipping.GRAD_SAMPLERS
    return type(layer) not in ruled and any(True for _ in layer.parameters(recurse=False))


def _hooked(
    model: nn.Module, clip_norm: float, *, ghost: bool
) -> GradSampleModuleFastGradientClipping:
    return GradSampleModuleFastGradientClipping(
        model.train(),
        loss_reduction="sum",
        max_grad_norm=clip_norm,
        use_ghost_clipping=ghost,
        force_functorch=not ghost,
    )


def _fault(module: GradSampleModuleFastGradientClipping, input_shape: tuple[int, ...]) -> str:
    """Compare made-up examples with autograd; return what is wrong, or nothing."""
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    x = torch.randn(_PROBES, *input_shape, requires_grad=True)
    logits = module(x)
    y = torch.arange(_PROBES) % logits.shape[1]
    losses = nn.functional.cross_entropy(logits, y, reduction="none")
    losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    module.disable_hooks()
    reach = torch.autograd.grad(
        losses[0], x, retain_graph=True, allow_unused=True, materialize_grads=True
    )[0]
    if reach[1:].any():
        return "one example's output depends on others of its batch"
    for name, before in buffers.items():
        if not torch.equal(before, module.get_buffer(name)):
            return f"buffer {_plain(name)!r} takes up statistics of the examples, without noise"
    names, parameters = zip(*_trainable(module), strict=True)
    exact = [
        torch.autograd.grad(
            one, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for one in losses
    ]
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        norms = torch.stack([gradients[i].norm() for gradients in exact])
        seen = getattr(parameter, "_norm_sample", None)
        if seen is None or not torch.allclose(seen, norms, rtol=_TOLERANCE, atol=_TOLERANCE**2):
            return f"Opacus' norms for {_plain(name)!r} are not those of its gradients"
    return ""


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _plain(name: str) -> str:
    return name.removeprefix("_module.")


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silence what torch says of a hooked first layer and of layers that ``vmap`` slows down.

    The input of the one needs no gradient; the others are slow, not wrong.
    """
    with warnings.catch_warnings():
        for message in ("Full backward hook is firing when gradients", "There is a performance"):
            warnings.filterwarnings("ignore", message, UserWarning)
        yield
