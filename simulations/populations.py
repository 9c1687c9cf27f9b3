"""Data for many simulated devices, made when a device is asked for it.

A :class:`Population` is a number of devices and a rule for what each holds. It keeps the pool
that all draw from and nothing per device, so that a hundred thousand devices take no more
memory than a hundred. A device's examples are a function of (seed, number): the same whenever
they are asked for.

The pools are far smaller than the populations drawn from them, so devices share examples:
what is simulated is the *number* of devices and how they differ, not so much data.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from atoll.federation.errors import BadPlan
from atoll.federation.task import Examples, Split, Task
from atoll.simulations import digits, fashion, partition
from atoll.simulations.spar import PEOPLE, Spar, split_people

ALPHA: Final = 0.5
"""Of the Dirichlet distribution of classes: 0.1 is devices of one or two classes, 100 is all alike.

After Hsu, Qi and Brown, arXiv 1909.06335, where 0.5 is in the middle of what is tried.
"""
ROWS: Final = 50
"""Training examples of a device on average."""
_TEST_SHARE: Final = 0.2

Indices = npt.NDArray[np.int64]


class Population(Protocol):
    """Simulated devices, numbered from 0."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def examples(self, device: int, split: Split) -> Examples:
        """Return what a device holds: one example at least."""
        ...


@runtime_checkable
class Tested(Protocol):
    """What a population has besides when weights are tested on one set, as in published tables."""

    @property
    def tested_on(self) -> Examples:
        """The test set; no device holds any of it to train on."""
        ...


def evaluated_on(population: Population, devices: int) -> Iterator[Examples]:
    """Yield what weights are evaluated on: the test set, or what ``devices`` held back."""
    if isinstance(population, Tested):
        yield population.tested_on
        return
    asked = min(devices, population.size)
    for place in range(asked):
        yield population.examples(place * population.size // asked, "test")


@dataclass(frozen=True)
class DirichletPopulation:
    """Devices that differ in their classes, drawn from one pool.

    Each has its own mix of the classes, from a symmetric Dirichlet distribution of ``alpha``,
    and draws its examples by it, with replacement: 1 + Poisson(``rows`` - 1) for training, a
    fifth of that for testing, from different parts of the pool.
    """

    size: int
    train: Examples
    test: Examples
    seed: int
    alpha: float = ALPHA
    rows: int = ROWS

    def examples(self, device: int, split: Split) -> Examples:
        """Return what a device holds."""
        mix, own = np.random.default_rng([self.seed, device]), split == "test"
        pool = self.test if own else self.train
        classes = int(max(self.train.y.max(), self.test.y.max())) + 1
        shares = mix.dirichlet(np.full(classes, self.alpha))
        rng = np.random.default_rng([self.seed, device, own])
        mean = self.rows * (_TEST_SHARE if own else 1.0)
        labels = rng.choice(classes, 1 + rng.poisson(max(mean - 1, 0)), p=shares)
        return _take(pool, _of_classes(pool.y, labels, rng))


class Person(NamedTuple):
    """One person's examples."""

    train: Examples
    test: Examples


@dataclass(frozen=True)
class PeoplePopulation:
    """Devices that differ as people do: each has part of one person's recordings.

    Device i is like person i, counted round. It holds 1 + Poisson(``rows`` - 1) of the person's
    training examples, drawn with replacement, and all of those for testing.
    """

    size: int
    people: tuple[Person, ...]
    seed: int
    rows: int = ROWS

    def examples(self, device: int, split: Split) -> Examples:
        """Return what a device holds."""
        person = self.people[device % len(self.people)]
        if split == "test":
            return person.test
        pool = person.train
        rng = np.random.default_rng([self.seed, device])
        return _take(pool, rng.integers(0, len(pool.y), 1 + rng.poisson(self.rows - 1)))


class Simulated(NamedTuple):
    """A task, and devices that hold examples of it."""

    task: Task
    population: Population


def named(task: str, devices: int, seed: int) -> Simulated:
    """Return ``devices`` simulated devices with examples of ``task``.

    Raises :class:`BadPlan` for a task that there is no data of, and
    :class:`atoll.federation.errors.DataMissing` when its package is not installed.
    """
    try:
        make = _MAKERS[task]
    except KeyError:
        raise BadPlan(
            f"there is no data to simulate devices of the task {task!r}; there is for "
            f"{', '.join(sorted(_MAKERS))}"
        ) from None
    return make(devices, seed)


def _digits(devices: int, seed: int) -> Simulated:
    pools = digits.pools()
    return Simulated(digits.Digits(), DirichletPopulation(devices, *pools, seed))


def _spar(devices: int, seed: int) -> Simulated:
    task = Spar()
    with tempfile.TemporaryDirectory() as folder:
        dealt = split_people(Path(folder), PEOPLE)
        people = tuple(
            Person(task.load(dealt[person], "train"), task.load(dealt[person], "test"))
            for person in PEOPLE
        )
    return Simulated(task, PeoplePopulation(devices, people, seed))


def _fashion(devices: int, seed: int) -> Simulated:
    train, test = (fashion.dataset(fashion.place(), split) for split in ("train", "test"))
    parts = partition.dealt(train.y, devices, ALPHA, seed)
    held = tuple(_take(train, part) for part in parts)
    return Simulated(fashion.FashionMnist(), partition.DealtPopulation(held, test))


_MAKERS: Final[Mapping[str, Callable[[int, int], Simulated]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion,
    "spar": _spar,
}


def _of_classes(labels: Indices, wanted: Indices, rng: np.random.Generator) -> Indices:
    """Return a random place in ``labels`` of each class in ``wanted``, with replacement."""
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], wanted, side="left")
    stops = np.searchsorted(labels[by_class], wanted, side="right")
    return by_class[rng.integers(starts, stops)]


def _take(pool: Examples, rows: Indices) -> Examples:
    return Examples(pool.x[rows], pool.y[rows])
