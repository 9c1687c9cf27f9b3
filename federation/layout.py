"""Which of a model's weights travel, which stay on a device, and which stay as they were.

    layout = of(task, seed, layers)
    layout.initial                       what the hub begins with, float32 (n,)
    layout.whole(weights, local)         all weights of ``layout.model``, from their parts
    layout.travelling(whole)             and back
    layout.local(whole)
    layout.exported(weights)             the plain model that ships

Everything that makes a model from the hub's vector, or a vector from a model, comes through
here, on hub and devices alike. The hub's vector (its checkpoints, strategies, sums, bytes) holds
what travels and nothing else.

- *local* entries are trained with the others and never leave the device: a head (FedPer,
  Arivazhagan et al., arXiv 1912.00818), or normalisation over batches with its running statistics
  (FedBN, Li et al., ICLR 2021). They begin as the task's model has them.
- *frozen* entries are neither trained nor sent: everything but what ``trained`` names, or but
  adapters (:mod:`atoll.federation.lora`). Hub and devices each take them from the task's model
  at the plan's seed. :attr:`Layout.frozen` is a digest by which they notice if theirs differ.

Integer entries (a batch counter) stay on each side, as in :mod:`atoll.federation.parameters`.
"""

import copy
import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.federation.errors import BadMessage, BadPlan
from atoll.federation.parameters import Vector, flatten, unflatten
from atoll.federation.plan import Layers
from atoll.federation.running_statistics import Running
from atoll.federation.task import Task

if TYPE_CHECKING:
    from torch import nn

BATCHNORM: Final = "batchnorm"
"""Stands for every entry of the layers that normalise over a batch."""

EVERYTHING: Final = Layers()
"""All weights are trained, and travel."""

Kind = TypeVar("Kind", np.float32, np.bool_)
_Places = npt.NDArray[np.bool_]


class Layout:
    """A task's model, adapted as ``layers`` ask, and what becomes of each of its weights.

    ``start`` float32 ``(all,)`` are its initial weights, frozen ones included. Parameters that
    are not trained ask for no gradient. Raises :class:`BadPlan` for patterns that name nothing,
    and when nothing is left to travel.
    """

    def __init__(self, model: "nn.Module", layers: Layers, seed: int) -> None:
        from atoll.federation import lora

        self._plain = copy.deepcopy(model)
        if layers.lora_rank is not None:
            alpha = layers.lora_alpha or layers.lora_rank
            lora.adapt(model, _adapted(model, layers), layers.lora_rank, alpha, seed)
        self.model = model
        self.start = flatten(model)
        self._entries = [
            (name, value.numel())
            for name, value in model.state_dict().items()
            if value.is_floating_point()
        ]
        names = lora.plain_names(model)
        self._plain_names = {name: names[name] for name, _ in self._entries if name in names}
        self._batchnorm = _batchnorm(model)
        local = self._named("local", layers.local)
        named = self._named("trained", layers.trained)
        adapters = {name for name, _ in self._entries if name not in names}
        partial = bool(layers.trained or adapters)
        trained = named | adapters if partial else {name for name, _ in self._entries}
        both = sorted(name for name in named | local if names[name] != name)
        if both:
            raise BadPlan(
                f"{names[both[0]]!r} belongs to a layer with an adapter, which stays as it is: "
                "name that in layers.lora_layers, or in layers.trained or layers.local, not in both"
            )
        self._travels = self._places(trained - local)
        self._local = self._places(local)
        if not self._travels.any():
            raise BadPlan(
                "layers.local keeps all that is trained on the devices, so there is nothing to "
                "add up: name fewer layers in it"
            )
        self._everything = bool(self._travels.all())
        self._train({*trained, *local})

    @property
    def initial(self) -> Vector:
        """What the hub begins with, float32 ``(n,)``."""
        return self.travelling(self.start)

    @property
    def frozen(self) -> str:
        """A digest of the weights that nobody trains; empty when there are none."""
        rest = self.start[~(self._travels | self._local)]
        return hashlib.sha256(rest.astype("<f4").tobytes()).hexdigest() if rest.size else ""

    @property
    def running(self) -> Running | None:
        """Which of what travels are running statistics; none where there are none."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        names = {name for name, _ in self._entries} - parameters
        places = self.travelling(self._places(names))
        if not places.any():
            return None
        variances = {name for name in names if name.endswith("running_var")}
        return Running(places, self.travelling(self._places(variances)))

    def travelling(self, whole: npt.NDArray[Kind]) -> npt.NDArray[Kind]:
        """Return a copy of what travels of all weights, ``(n,)``."""
        return whole.copy() if self._everything else whole[self._travels]

    def local(self, whole: Vector) -> Vector:
        """Return a copy of what stays on a device."""
        return whole[self._local]

    def whole(self, travelling: Vector, local: Vector | None = None) -> Vector:
        """Return all weights; local ones begin anew when there are none that fit.

        Raises :class:`BadMessage` when ``travelling`` is not as long as what travels.
        """
        wanted = int(np.count_nonzero(self._travels))
        if travelling.shape != (wanted,):
            raise BadMessage(
                f"weights of shape {travelling.shape} do not fit a model of which {wanted} travel"
            )
        if self._everything:
            return travelling.copy()
        whole = self.start.copy()
        whole[self._travels] = travelling
        if local is not None and local.shape == (np.count_nonzero(self._local),):
            whole[self._local] = local
        return whole

    def alone(self, travelling: Vector) -> Vector:
        """Return ``travelling`` at its places, zero elsewhere, float32 ``(all,)``."""
        if self._everything:
            return travelling
        whole = np.zeros_like(self.start)
        whole[self._travels] = travelling
        return whole

    def exported(self, travelling: Vector) -> "nn.Module":
        """Return the task's plain model with these weights, adapters merged into theirs."""
        from atoll.federation import lora

        unflatten(self.model, self.whole(travelling))
        model = copy.deepcopy(self._plain)
        model.load_state_dict(lora.merged(self.model))
        return model

    def tune(self, patterns: Sequence[str]) -> None:
        """From here on train the entries that ``patterns`` name, and no others."""
        self._train(self._named("fine_tune", patterns))

    def counts(self) -> dict[str, int]:
        """Say how many weights travel, stay on devices, and stay as they were."""
        travels, local = (int(np.count_nonzero(one)) for one in (self._travels, self._local))
        return {"travelling": travels, "local": local, "frozen": self.start.size - travels - local}

    def check(self, frozen: str) -> None:
        """Raise :class:`BadMessage` unless ``frozen`` is this side's digest too."""
        if frozen != self.frozen:
            raise BadMessage(
                "the weights that nobody trains are others here than at the hub; install the "
                "same version of the task on both"
            )

    def _named(self, field: str, patterns: Sequence[str]) -> set[str]:
        """Return the entries that a field's ``patterns`` name, as the plain model has them."""
        plains = self._plain_names
        found: set[str] = set()
        for pattern in patterns:
            if pattern == BATCHNORM:
                mine = self._batchnorm & plains.keys()
            else:
                mine = {name for name, plain in plains.items() if fnmatchcase(plain, pattern)}
            if not mine:
                raise BadPlan(_nothing(field, pattern, list(plains.values())))
            found |= mine
        return found

    def _places(self, names: set[str]) -> _Places:
        return np.repeat(
            [name in names for name, _ in self._entries], [size for _, size in self._entries]
        )

    def _train(self, names: set[str]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)


def of(task: Task, seed: int, layers: Layers = EVERYTHING) -> Layout:
    """Return the layout of a task's model."""
    return Layout(task.model(seed), layers, seed)


def encode(layers: Layers) -> str:
    """Return layers as they travel: JSON, and nothing when nothing is asked."""
    return "" if layers == EVERYTHING else msgspec.json.encode(layers).decode()


def decode(text: str) -> Layers:
    """Read what :func:`encode` wrote; raise :class:`BadMessage` for anything else."""
    try:
        return msgspec.json.decode(text, type=Layers) if text else EVERYTHING
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadMessage(f"layers: {error}") from error


def _adapted(model: "nn.Module", layers: Layers) -> list[str]:
    """Return the layers that get adapters, in the model's order."""
    from atoll.federation import lora

    able = [name for name, layer in model.named_modules() if isinstance(layer, lora.KINDS)]
    for pattern in layers.lora_layers:
        if not any(fnmatchcase(name, pattern) for name in able):
            raise BadPlan(_nothing("lora_layers", pattern, able))
    return [name for name in able if any(fnmatchcase(name, p) for p in layers.lora_layers)]


def _batchnorm(model: "nn.Module") -> set[str]:
    """Return the entries of the layers that normalise over a batch."""
    from torch import nn

    return {
        f"{name}.{entry}" if name else entry
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 -- their only base
        for entry in layer.state_dict()
    }


def _nothing(field: str, pattern: str, names: Sequence[str]) -> str:
    some = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"layers.{field}: {pattern!r} names nothing of this model; there are {some or 'none'}"
