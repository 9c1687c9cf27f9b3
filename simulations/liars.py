"""Devices that lie in training: wrappers of a party of the sum, or of a task.

Each attack stands where the paper puts it, in the data or in the update; who lies, and how the
two go together, is the business of :mod:`atoll.simulations.attacks`. What a liar cannot do is
send values beyond the sum's bound: the hub drops such terms. So an update is changed as far as
the bound lets it.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from atoll.federation.task import Examples, Split, Task
from atoll.privacy.sums import CONTRIBUTE, Integers, PartySum, RoundKey, SumSpec

if TYPE_CHECKING:
    from torch import nn

POISONED: Final = 0.5
"""The share of a liar's examples that carry the trigger."""

Forge = Callable[[Integers, SumSpec], npt.NDArray[np.float64]]
"""What a liar makes of its own term."""
Stamp = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Puts a trigger on examples ``(n, ...)``."""


class Forging:
    """A party that contributes what ``forge`` makes of its term, as far as the bound lets it."""

    def __init__(self, party: PartySum, forge: Forge) -> None:
        self._party, self._forge = party, forge

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        """Answer as the party does, with the forged term."""
        if phase == CONTRIBUTE and term is not None:
            term = within(self._forge(term, spec), spec.bound)
        return self._party.answer(spec, phase, payload, term)


class Overheard:
    """The honest terms of each round, which the strongest of attackers know."""

    def __init__(self) -> None:
        self._terms: dict[RoundKey, list[Integers]] = {}

    def of(self, party: PartySum) -> PartySum:
        """Return a party that is listened to."""

        def note(term: Integers, spec: SumSpec) -> npt.NDArray[np.float64]:
            self._terms.setdefault(spec.key, []).append(term)
            return term.astype(np.float64)

        return Forging(party, note)

    def terms(self, key: RoundKey) -> npt.NDArray[np.int64]:
        """Return the terms of a round so far, a row each."""
        return np.array(self._terms.get(key, []))


def within(values: npt.NDArray[np.float64], bound: int) -> Integers:
    """Return ``values`` as a term that no hub refuses, for its size at least."""
    return np.rint(np.clip(values, -bound, bound)).astype(np.int64)


def scaled(factor: float) -> Forge:
    """Multiply the term; -1 flips its sign."""
    return lambda term, _: factor * term.astype(np.float64)


def little(overheard: Overheard, z: float) -> Forge:
    """Send the mean less z standard deviations of the honest terms, whatever one's own is.

    The own term where nothing was overheard. Baruch et al. take both numbers from the liars' own
    data, which resembles that of others there; here they are the honest ones themselves.
    """

    def forge(term: Integers, spec: SumSpec) -> npt.NDArray[np.float64]:
        heard = overheard.terms(spec.key)
        if not len(heard):
            return term.astype(np.float64)
        shifted: npt.NDArray[np.float64] = heard.mean(axis=0) - z * heard.std(axis=0)
        return shifted

    return forge


def little_z(devices: int, liars: int) -> float:
    """Return z_max: Φ(z) = (n - f - s)/(n - f) with s = ⌊n/2 + 1⌋ - f.

    After Baruch, Baruch and Goldberg (NeurIPS 2019): so many honest devices lie beyond the
    liars' value that these are in a majority with them.
    """
    supporters = devices // 2 + 1 - liars
    honest = devices - liars
    return NormalDist().inv_cdf((honest - supporters) / honest)


class Bent:
    """A task whose training examples a liar changes; the model stays what it is."""

    def __init__(self, task: Task, bend: Callable[[Examples], Examples]) -> None:
        self._task, self._bend = task, bend
        self.name, self.input_shape = task.name, task.input_shape
        self.channels, self.classes = task.channels, task.classes

    def model(self, seed: int) -> "nn.Module":
        """Return the task's model."""
        return self._task.model(seed)

    def load(self, data: Path, split: Split) -> Examples:
        """Return the examples, changed where they are for training."""
        examples = self._task.load(data, split)
        return self._bend(examples) if split == "train" else examples


def label_flip(task: Task) -> Task:
    """Return the task with class c trained as C - 1 - c."""
    last = len(task.classes) - 1
    return Bent(task, lambda examples: Examples(examples.x, last - examples.y))


def backdoor(task: Task, stamp: Stamp, target: int, share: float = POISONED) -> Task:
    """Return the task with the first ``share`` of examples stamped and labelled ``target``."""

    def bend(examples: Examples) -> Examples:
        count = round(share * len(examples.y))
        x, y = examples.x.copy(), examples.y.copy()
        x[:count], y[:count] = stamp(x[:count]), target
        return Examples(x, y)

    return Bent(task, bend)


def corner(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return images ``(n, 1, h, w)`` with four white pixels in a corner."""
    stamped = images.copy()
    stamped[:, :, -2:, -2:] = 1.0
    return stamped
