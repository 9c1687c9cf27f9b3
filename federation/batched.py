"""Local training of many clients as one computation, for simulations on one machine.

    train(model, weights, clients, training) -> one Trained per client, in their order

What :func:`atoll.federation.training.train` does for one client, done for a chunk of them at
once: parameters are stacked along a first axis and ``torch.func.vmap`` maps the gradient over
it, so that small networks cost a few large operations instead of many small ones. A client's
batches are those of ``training.train``, row for row, from the same seed; the arithmetic is
the same up to the order of float32 additions. (At a kink, such as which of two pixels is the
largest, a last bit can tip a client over, as another build of torch can.) Clients of different
sizes share a step: short batches are padded, and the padding weighs nothing.

Not every network can be mapped. One with statistics of batches, one that changes itself as it
runs, one that draws at random in training (dropout, augmentation): :func:`check` finds them
by computing two steps both ways, and raises :class:`Unbatchable`. The client's own path is
then the only one.

Nor is every network worth it. What is saved is the cost of starting operations; once a step's
own work outweighs that, a processor computes many different convolutions no faster than one
after the other, and its caches hold less of them. :func:`worthwhile` says which it is.

Memory is bounded by the chunk, whatever the cohort: clients are taken from their iterable a
chunk at a time.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from atoll.federation import training as alone
from atoll.federation.errors import DataMissing, Unbatchable
from atoll.federation.parameters import Vector, flatten
from atoll.federation.plan import Training
from atoll.federation.task import Examples
from atoll.federation.training import Trained

MOST_AT_ONCE: Final = 64
"""Clients of a chunk at most; more of them make no step faster."""
CHUNK_BYTES: Final = 1 << 28
"""Stacked weights, their gradients and momenta take about so much at most."""
WORTHWHILE: Final = 2_500_000
"""Multiplications of a step up to which a CPU gains by it.

Measured with one thread (``benchmarks/simulation.py``): three to five times faster far below, even
at two to three million, slower by a third at seventy million.
"""
UNDERSTOOD: Final = frozenset(
    {
        "local_epochs",
        "batch_size",
        "learning_rate",
        "momentum",
        "control_steps",
        # These say what the hub does with an update, and nothing about how it is made.
        "strategy",
        "server_learning_rate",
        "server_momentum",
        "server_beta2",
        "server_tau",
        "step_cap",
        "averaged_rounds",
        "weighting",
        "weight_cap",
    }
)
"""Fields of :class:`Training` that are heeded here; another one must have its default."""

_COPIES: Final = 4
_TOLERANCE: Final = 1e-4
_PROBES: Final = (5, 3)
"""Rows of the clients with which a network is tried."""


class Client(NamedTuple):
    """What one client trains on, and the seed of its batch order.

    ``correction`` float32 ``(n,)``, or none, is added to each of its gradients.
    """

    examples: Examples
    seed: int
    correction: Vector | None = None


def train(
    model: nn.Module,
    weights: Vector,
    clients: Iterable[Client],
    training: Training,
    *,
    device: torch.device | None = None,
    at_once: int | None = None,
) -> Iterator[Trained]:
    """Yield what each client's local SGD from ``weights`` leads to, in the clients' order.

    ``device`` computes, a GPU where there is one; ``at_once`` clients share a computation. The
    model must have passed :func:`check`; it is left as it was. Raises :class:`DataMissing` for
    a client without examples.
    """
    where = device or default_device()
    stack = _Stack(model, weights, training, where)
    size = at_once or chunk_size(len(weights))
    waiting = iter(clients)
    while chunk := list(islice(waiting, size)):
        yield from stack.train(chunk)


def default_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chunk_size(parameters: int) -> int:
    """Return how many clients of a model with so many ``parameters`` share a computation."""
    return max(1, min(MOST_AT_ONCE, CHUNK_BYTES // (4 * _COPIES * max(parameters, 1))))


def worthwhile(
    model: nn.Module, shape: Sequence[int], training: Training, device: torch.device
) -> bool:
    """Return whether clients train faster together, by a step's work; on a GPU always."""
    return device.type != "cpu" or multiplications(model, shape) * training.batch_size <= WORTHWHILE


def multiplications(model: nn.Module, shape: Sequence[int]) -> int:
    """Return how many a forward pass of one example takes, in layers with matrices of weights."""
    counted = 0

    def count(layer: nn.Module, _: object, out: object) -> None:
        nonlocal counted
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and isinstance(out, Tensor) and weight.ndim > 1:
            counted += weight.numel() * (out.numel() // len(weight))

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return counted


def check(model: nn.Module, shape: Sequence[int], classes: int, training: Training) -> None:
    """Raise :class:`Unbatchable` for a model that does not train here as it does alone.

    ``shape`` is that of one example. Two clients of random examples are trained both ways, and
    the results compared; the model's weights are left as they were.
    """
    for field in Training.__struct_fields__:
        if field not in UNDERSTOOD and getattr(training, field) != getattr(Training(), field):
            raise Unbatchable(f"training.{field} is for clients that train one by one")
    for name, module in model.named_modules():
        # Padding would be part of the statistics, whether they are kept or not.
        if isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 -- torch's own base
            raise Unbatchable(f"layer {name!r} takes statistics of its batches")
    weights = flatten(model)
    brief = Training(
        local_epochs=1, batch_size=3, learning_rate=training.learning_rate, momentum=0.9
    )
    rng = np.random.default_rng(0)
    clients = [
        Client(
            Examples(
                rng.normal(size=(rows, *shape)).astype(np.float32),
                rng.integers(0, classes, rows),
            ),
            seed=rows,
        )
        for rows in _PROBES
    ]
    cpu = torch.device("cpu")
    try:
        with warnings.catch_warnings():
            # Torch warns of operations that it would run for one client after the other.
            warnings.simplefilter("error", UserWarning)
            together = list(train(model, weights, clients, brief, device=cpu))
    except (RuntimeError, ValueError, UserWarning) as error:
        raise Unbatchable(f"it cannot be mapped over clients: {_first_line(error)}") from error
    with _restored(model):
        one_by_one = [alone.train(model, weights, *_split(client, brief)) for client in clients]
    for mapped, own in zip(together, one_by_one, strict=True):
        if not np.allclose(mapped.weights, own.weights, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise Unbatchable("trained with others it comes out different: it changes as it runs")


def _split(client: Client, training: Training) -> tuple[Examples, Training, int]:
    return client.examples, training, client.seed


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give the model back its state and mode after the block."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    mode = model.training
    try:
        yield
    finally:
        model.load_state_dict(state)
        model.train(mode)


class _Schedule(NamedTuple):
    """Which rows each client of a chunk trains on in each step; the busiest clients first.

    ``rows`` int64 ``(steps, clients, batch)`` are places in the chunk's examples, one client
    after the other; of them the first ``counts`` ``(steps, clients)`` are real. ``last`` bool
    ``(steps, clients)`` marks the last epoch. ``active`` is how many clients take each step.
    """

    rows: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    last: npt.NDArray[np.bool_]
    active: Sequence[int]


def _batches(rows: int, training: Training, seed: int) -> list[tuple[npt.NDArray[np.int64], bool]]:
    """Return a client's batches in order, and whether each is of the last epoch.

    The draws of :func:`atoll.federation.training.train`, from a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        (batch.numpy(), epoch == training.local_epochs - 1)
        for epoch in range(training.local_epochs)
        for batch in torch.split(torch.randperm(rows, generator=generator), training.batch_size)
        if len(batch) > 1 or rows == 1
    ]


def _schedule(clients: Sequence[Client], training: Training) -> tuple[_Schedule, list[int]]:
    """Return the schedule, and which client has each of its places."""
    plans = [_batches(len(c.examples.y), training, c.seed) for c in clients]
    order = sorted(range(len(clients)), key=lambda i: -len(plans[i]))
    starts = np.cumsum([0, *(len(c.examples.y) for c in clients)])
    steps = len(plans[order[0]])
    # A batch size of one leaves a client of several rows nothing to do.
    width = max((len(batch) for plan in plans for batch, _ in plan), default=1)
    rows = np.zeros((steps, len(clients), width), np.int64)
    counts = np.zeros((steps, len(clients)), np.int64)
    last = np.zeros((steps, len(clients)), np.bool_)
    for place, i in enumerate(order):
        # Padding repeats a row of the client's own, so that it is as harmless as its data.
        rows[:, place] = starts[i]
        for step, (batch, final) in enumerate(plans[i]):
            rows[step, place, : len(batch)] = starts[i] + batch
            counts[step, place] = len(batch)
            last[step, place] = final
    active = [int(np.count_nonzero(counts[step])) for step in range(steps)]
    return _Schedule(rows, counts, last, active), order


class _Stack:
    """A model's trainable parameters, once for each client of a chunk."""

    def __init__(
        self, model: nn.Module, weights: Vector, training: Training, device: torch.device
    ) -> None:
        self._training, self._device = training, device
        self._layout = _layout(model, weights)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        start = {
            name: torch.from_numpy(weights[span].copy()).reshape(shape).to(device)
            for name, (span, shape) in self._layout.items()
        }
        self._weights = weights
        self._start = {name: start[name] for name in self._layout if name in trained}
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        fixed = {
            name: start.get(name, value.detach().to(device))
            for name, value in held.items()
            if name not in trained
        }
        self._gradients = _gradients(model, fixed)
        self._model = model

    def train(self, clients: Sequence[Client]) -> list[Trained]:
        """Return what each of ``clients`` comes to."""
        if not all(len(client.examples.y) for client in clients):
            raise DataMissing("a simulated device has no training examples")
        plan, order = _schedule(clients, self._training)
        x = self._tensor(np.concatenate([client.examples.x for client in clients]))
        y = self._tensor(np.concatenate([client.examples.y for client in clients]))
        rows, counts, last = map(self._tensor, (plan.rows, plan.counts, plan.last))
        places = torch.arange(plan.rows.shape[2], device=self._device)
        values = {
            name: value.expand(len(clients), *value.shape).clone()
            for name, value in self._start.items()
        }
        velocity = {name: torch.zeros_like(value) for name, value in values.items()}
        corrections = self._corrections([clients[i] for i in order])
        losses, seen = torch.zeros(2, len(clients), device=self._device)
        before = self._model.training
        self._model.train()
        try:
            for step, active in enumerate(plan.active):
                width = int(plan.counts[step].max())
                at, count = rows[step, :active, :width], counts[step, :active]
                weight = (places[:width] < count[:, None]) / count[:, None]
                now = {name: value[:active] for name, value in values.items()}
                gradients, loss = self._gradients(now, x[at], y[at], weight)
                for name, correction in corrections.items():
                    gradients[name] = gradients[name] + correction[:active]
                self._descend(now, velocity, gradients)
                real = count * last[step, :active]
                losses[:active] += loss * real
                seen[:active] += real
        finally:
            self._model.train(before)
        mean = (losses / seen.clamp(min=1)).cpu().numpy()
        places_of = {i: place for place, i in enumerate(order)}
        vectors = self._vectors(values, len(clients))
        return [
            Trained(
                vectors[places_of[i]],
                float(mean[places_of[i]]),
                int(np.count_nonzero(plan.counts[:, places_of[i]])),
            )
            for i in range(len(clients))
        ]

    def _corrections(self, clients: Sequence[Client]) -> dict[str, Tensor]:
        """Return what is added to each client's gradients, by parameter; nothing for none."""
        given = [client.correction for client in clients]
        if all(correction is None for correction in given):
            return {}
        none = np.zeros_like(self._weights)
        stacked = self._tensor(np.stack([none if one is None else one for one in given]))
        return {
            name: stacked[:, span].reshape(len(clients), *shape)
            for name, (span, shape) in self._layout.items()
            if name in self._start
        }

    def _descend(
        self,
        values: Mapping[str, Tensor],
        velocity: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Take one step of :class:`atoll.federation.training.Sgd`."""
        for name, value in values.items():
            moving = velocity[name][: len(value)]
            moving.mul_(self._training.momentum).add_(gradients[name])
            value.sub_(moving, alpha=self._training.learning_rate)

    def _vectors(self, values: Mapping[str, Tensor], clients: int) -> npt.NDArray[np.float32]:
        """Return the weights of each client's model, float32 ``(clients, n)``."""
        out = np.tile(self._weights, (clients, 1))
        for name, value in values.items():
            span, _ = self._layout[name]
            out[:, span] = value.reshape(clients, -1).cpu().numpy()
        return out

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _layout(model: nn.Module, weights: Vector) -> dict[str, tuple[slice, torch.Size]]:
    """Return where each entry of the state dict lies in the vector of weights, and its shape."""
    layout, at = {}, 0
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            layout[name] = (slice(at, at + value.numel()), value.shape)
            at += value.numel()
    if weights.shape != (at,):
        raise ValueError(f"weights of shape {weights.shape} do not fit a model of {at} values")
    return layout


_Gradients = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], tuple[dict[str, Tensor], Tensor]]


def _gradients(model: nn.Module, fixed: dict[str, Tensor]) -> _Gradients:
    """Return a function of stacked ``(parameters, x, y, weight)``: gradients, and losses."""

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        logits = functional_call(model, (values, fixed), (x,))
        return nn.functional.cross_entropy(logits, y, reduction="none") @ weight

    mapped: _Gradients = vmap(grad_and_value(loss), randomness="error")
    return mapped
