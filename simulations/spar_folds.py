"""SPAR's people as devices in five folds, as the published accuracies are cross-validated.

Burns et al. 2018 (arXiv 1802.01489v1, of the ten people whose recordings seglearn ships) test
each classifier twice: on windows of people whom it knows, by five folds in time, and on people
whom it has never seen, by five folds of people.

- :func:`in_time`: of every recording the fold's fifth is tested on, the other four train.
- :func:`of_people`: two people are tested on, the other eight train.

Every person who trains is a device. Windows are cut within a part, so that no test window shares
a sample with a training one.
"""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.federation.task import Examples
from atoll.simulations.partition import DealtPopulation
from atoll.simulations.spar import (
    FILE,
    PEOPLE,
    TEST_STEP,
    TRAIN_STEP,
    split_people,
    windows,
)

FOLDS: Final = 5


class Recording(NamedTuple):
    """One set of one exercise: ``signal`` is float32 ``(samples, 6)``."""

    person: int
    exercise: int
    signal: npt.NDArray[np.float32]


class _Part(NamedTuple):
    """The samples ``[begin, end)`` of a recording."""

    of: Recording
    begin: int
    end: int


def recordings() -> list[Recording]:
    """Return all recordings; raise :class:`atoll.federation.errors.DataMissing` without them."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for person, directory in split_people(Path(folder), PEOPLE).items():
            with np.load(directory / FILE, allow_pickle=False) as held:
                signals = np.split(held["signal"], held["starts"][1:-1])
                found += [
                    Recording(person, int(label), signal)
                    for label, signal in zip(held["label"], signals, strict=True)
                ]
    return found


def in_time(sets: Sequence[Recording], fold: int) -> DealtPopulation:
    """Return everybody, to be tested on a fifth of each recording: the ``fold``-th, from 0."""
    train, test = [], []
    for one in sets:
        length = len(one.signal)
        begin, end = (length * edge // FOLDS for edge in (fold, fold + 1))
        test.append(_Part(one, begin, end))
        train += [_Part(one, 0, begin), _Part(one, end, length)]
    return _dealt(train, test)


def of_people(sets: Sequence[Recording], fold: int) -> DealtPopulation:
    """Return all but two people, to be tested on those two: the ``fold``-th pair, from 0."""
    parts = [_Part(one, 0, len(one.signal)) for one in sets]
    people = sorted({one.person for one in sets})
    each = len(people) // FOLDS
    unseen = people[fold * each : (fold + 1) * each]
    return _dealt(
        [part for part in parts if part.of.person not in unseen],
        [part for part in parts if part.of.person in unseen],
    )


def _dealt(train: Sequence[_Part], test: Sequence[_Part]) -> DealtPopulation:
    people = sorted({part.of.person for part in train})
    held = tuple(
        _cut((part for part in train if part.of.person == person), TRAIN_STEP) for person in people
    )
    return DealtPopulation(held, _cut(test, TEST_STEP))


def _cut(parts: Iterable[_Part], step: int) -> Examples:
    x: list[npt.NDArray[np.float32]] = []
    y: list[int] = []
    for part in parts:
        cut = list(windows(part.of.signal, part.begin, part.end, step))
        x += cut
        y += [part.of.exercise] * len(cut)
    return Examples(np.stack(x).astype(np.float32), np.asarray(y, dtype=np.int64))
