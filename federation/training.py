"""What one device computes: a few epochs of SGD, or an evaluation.

Runs on the CPU with few threads, because a training device has other work. The same seed,
weights and examples give the same result on the same build of torch.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import nn

from atoll.federation.errors import DataMissing
from atoll.federation.parameters import Vector, flatten, trained, unflatten
from atoll.federation.plan import Training
from atoll.federation.task import Examples

THREADS: Final = 2
_EVALUATION_BATCH: Final = 256


class Trained(NamedTuple):
    """New weights float32 ``(n,)``, the mean cross-entropy over the last epoch, steps taken."""

    weights: Vector
    loss: float
    steps: int


class Evaluated(NamedTuple):
    """``correct`` of ``rows`` examples; ``loss`` is the mean cross-entropy."""

    rows: int
    correct: int
    loss: float


def local_seed(seed: int, run: str, round_number: int, party: str) -> int:
    """Return the seed of one device in one round: 0 ≤ seed < 2⁶³, unrelated to all others.

    The run is in it: were two runs to train alike, their sums over different cohorts could be
    subtracted to the last digit.
    """
    digest = hashlib.sha256(f"atoll/local/{seed}/{run}/{round_number}/{party}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def train(
    model: nn.Module,
    weights: Vector,
    examples: Examples,
    training: Training,
    seed: int,
    *,
    ended: Callable[[], bool] = lambda: False,
    correction: Vector | None = None,
) -> Trained:
    """Run local SGD from ``weights``, until it is done or ``ended`` says that time is up.

    That is asked after every step, so that one is taken at least. ``correction`` ``(n,)`` is added
    to each gradient (:mod:`atoll.federation.control`).

    A trailing batch of one row is left out when there are others: batch statistics need two.
    Raises :class:`DataMissing` when there are no examples.
    """
    rows = len(examples.y)
    if rows == 0:
        raise DataMissing("this device has no training examples")
    with few_threads(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unflatten(model, weights)
        learning(model)
        x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
        descent = Sgd(model, training, correction)
        loss_sum, seen, steps, late = 0.0, 0, 0, False
        for _ in range(training.local_epochs):
            if late:
                break
            loss_sum, seen = 0.0, 0
            for batch in torch.split(torch.randperm(rows), training.batch_size):
                if len(batch) == 1 and rows > 1:
                    continue
                descent.zero_grad()
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
                descent.step()
                loss_sum += float(loss.detach()) * len(batch)
                seen += len(batch)
                steps += 1
                if late := ended():
                    break
        return Trained(flatten(model), loss_sum / max(seen, 1), steps)


def learning(model: nn.Module) -> None:
    """Put ``model`` into training mode, but for what shall stay as it is.

    Normalisation over batches of which no parameter is trained goes on with the statistics that
    it has, as it will when the model is evaluated.
    """
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 -- their only base
            own = list(layer.parameters())
            layer.train(not own or any(parameter.requires_grad for parameter in own))


def local_steps(rows: int, training: Training) -> int:
    """Return how many steps :func:`train` takes on ``rows`` examples."""
    whole, rest = divmod(rows, training.batch_size)
    batches = whole * (training.batch_size > 1 or rows == 1)
    return training.local_epochs * (batches + (rest > 1 or rest == rows == 1))


class Sgd:
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD`` does it.

    The proximal term μ/2·‖w - w₀‖² adds its gradient, μ·(w - w₀), to that of the loss; w₀ are the
    parameters at the first step (FedProx, Li et al., MLSys 2020, with local SGD as its solver).
    A ``correction`` ``(n,)`` is added to it too, in the parameters that are trained (SCAFFOLD).

    Making the latter imports torch's compiler: 1.2 s and 70 MB that a device has no use for.
    This has of an optimiser what Opacus' optimisers ask of the one that they wrap.
    """

    def __init__(
        self, model: nn.Module, training: Training, correction: Vector | None = None
    ) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._rate, self._momentum = training.learning_rate, training.momentum
        self._proximal = training.proximal
        # Nothing but the gradient: what else there is would go through memory for nothing.
        self._straight = not self._momentum and not self._proximal and correction is None
        self._velocity = [p if self._straight else torch.zeros_like(p) for p in self._parameters]
        self._start: list[torch.Tensor] = []
        self._correction = _pieces(model, correction) if correction is not None else []
        self.param_groups = [{"params": self._parameters}]

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 -- torch's
        """Forget the gradients, or make them zero."""
        for parameter in self._parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Go one step down the parameters' gradients."""
        if self._proximal and not self._start:
            self._start = [parameter.detach().clone() for parameter in self._parameters]
        for i, (parameter, velocity) in enumerate(
            zip(self._parameters, self._velocity, strict=True)
        ):
            if parameter.grad is None and self._correction:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None and self._straight:
                parameter.sub_(parameter.grad, alpha=self._rate)
            elif parameter.grad is not None:
                velocity.mul_(self._momentum).add_(parameter.grad)
                if self._correction:
                    velocity.add_(self._correction[i])
                if self._proximal:
                    velocity.add_(parameter - self._start[i], alpha=self._proximal)
                parameter.sub_(velocity, alpha=self._rate)


def _pieces(model: nn.Module, vector: Vector) -> list[torch.Tensor]:
    """Return what of ``vector`` belongs to each parameter that is trained, in the model's order."""
    places = trained(model)
    return [
        torch.from_numpy(vector[places[name]]).reshape(value.shape)
        for name, value in model.named_parameters()
        if value.requires_grad
    ]


def evaluate(model: nn.Module, weights: Vector, examples: Examples) -> Evaluated:
    """Count how many examples the model gets right; no examples is a count of zero rows."""
    correct, loss_sum = 0, 0.0
    with few_threads(), torch.no_grad():
        unflatten(model, weights)
        model.eval()
        for start in range(0, len(examples.y), _EVALUATION_BATCH):
            stop = start + _EVALUATION_BATCH
            x = torch.from_numpy(np.ascontiguousarray(examples.x[start:stop]))
            y = torch.from_numpy(np.ascontiguousarray(examples.y[start:stop]))
            logits = model(x)
            loss_sum += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(dim=1) == y).sum())
    rows = len(examples.y)
    return Evaluated(rows, correct, loss_sum / rows if rows else 0.0)


@contextmanager
def few_threads() -> Iterator[None]:
    """Let torch use :data:`THREADS` threads at most."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
