"""The SPAR task: which of seven shoulder exercises a wrist-worn watch sees.

Ten people did seven physiotherapy exercises with each arm, recorded at 50 Hz by the watch's
accelerometer (g) and gyroscope (rad/s): D. M. Burns et al., "Shoulder physiotherapy exercise
recognition: machine learning the inertial signals from a smartwatch", Physiological
Measurement 39 (2018) 075007, arXiv 1802.01489. The recordings ship with the package
``seglearn``; only its data file is read, its code is never imported.

:func:`split_people` deals the recordings out, one file a person, which is all that a simulated
device gets. :class:`Spar` is the task that hub and devices share.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from atoll.federation.errors import DataMissing
from atoll.federation.task import Examples, Groups, Split

if TYPE_CHECKING:
    from torch import nn

PEOPLE: Final = tuple(range(1, 11))
RATE_HZ: Final = 50
WINDOW: Final = 4 * RATE_HZ
TRAIN_STEP: Final = RATE_HZ
"""Denser windows repeat each other: with these, eight people average twice for the same work."""
TEST_STEP: Final = RATE_HZ // 2
TRAIN_SHARE: Final = 0.7
GAP: Final = RATE_HZ
"""Samples between the two blocks, which neither uses: neighbours in time resemble each other."""
FILE: Final = "recordings.npz"


def dataset() -> Path:
    """Return where seglearn keeps the recordings; raise :class:`DataMissing` without it."""
    found = importlib.util.find_spec("seglearn")
    origin = Path(found.origin) if found is not None and found.origin else None
    path = origin.parent / "data" / "watch_dataset.npy" if origin else None
    if path is None or not path.is_file():
        raise DataMissing("the SPAR recordings are missing; pip install seglearn==1.2.5")
    return path


def split_people(out_dir: Path, people: Iterable[int] = PEOPLE) -> dict[int, Path]:
    """Write each person's recordings to ``out_dir/person-NN/recordings.npz``.

    Returns the person's directory by number. The file holds plain arrays: ``signal`` float32
    ``(samples, 6)``, all recordings one after the other; ``starts`` int64 ``(recordings + 1,)``,
    where each begins and the last ends; ``label`` int64 and ``side`` int64 ``(recordings,)``.
    """
    # The file that seglearn ships is a pickled dict; what is written is not.
    held: dict[str, Any] = np.load(dataset(), allow_pickle=True).item()
    subject = np.asarray(held["subject"]).astype(np.int64)
    written = {}
    for person in people:
        mine = np.flatnonzero(subject == person)
        if not len(mine):
            raise DataMissing(f"SPAR has no person {person}; there are 1 to {subject.max()}")
        signals = [np.asarray(held["X"][i], dtype=np.float32) for i in mine]
        directory = out_dir / f"person-{person:02d}"
        directory.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            directory / FILE,
            signal=np.concatenate(signals),
            starts=np.cumsum([0, *map(len, signals)]).astype(np.int64),
            label=np.asarray(held["y"])[mine].astype(np.int64),
            side=np.asarray(held["side"])[mine].astype(np.int64),
        )
        written[person] = directory
    return written


def block(samples: int, split: Split) -> tuple[int, int]:
    """Return ``[begin, end)`` of a split's part of a recording: first train, gap, then test."""
    cut = int(samples * TRAIN_SHARE)
    return (0, cut) if split == "train" else (cut + GAP, samples)


def windows(
    signal: npt.NDArray[np.float32], begin: int, end: int, step: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the windows, ``(6, WINDOW)``, that lie in ``[begin, end)`` of ``(samples, 6)``."""
    for start in range(begin, end - WINDOW + 1, step):
        yield signal[start : start + WINDOW].T


class Spar:
    """Seven shoulder exercises from four seconds of a watch's six inertial channels."""

    name = "spar"
    input_shape: tuple[int, ...] = (6, WINDOW)
    channels: tuple[str, ...] = ("ax", "ay", "az", "wx", "wy", "wz")
    classes: tuple[str, ...] = (
        "pendulum",
        "abduction",
        "forward elevation",
        "internal rotation",
        "external rotation",
        "trapezius extension",
        "row",
    )

    groups: tuple[str, ...] = ("left", "right")
    """The arm that wears the watch: seglearn's ``side``, 0 and 1."""

    def model(self, seed: int) -> "nn.Module":
        """Return the network of :mod:`atoll.simulations.spar_net`, initialised from ``seed``."""
        from atoll.simulations.spar_net import build

        return build(len(self.classes), seed)

    def load(self, data: Path, split: Split) -> Examples:
        """Cut this person's recordings into windows of four seconds.

        A recording's first 70 % is for training and its end for testing, a second apart, so
        no test window shares a sample with a training window.
        """
        return self._cut(data, split, TRAIN_STEP if split == "train" else TEST_STEP)[0]

    def group_of(self, data: Path, split: Split) -> Groups:
        """Return on which arm each window was recorded."""
        return self._cut(data, split, TRAIN_STEP if split == "train" else TEST_STEP)[1]

    def held_back(self, data: Path, step: int) -> Examples:
        """Cut the test windows at another ``step`` (samples), as a wearer's live traffic."""
        return self._cut(data, "test", step)[0]

    def _cut(self, data: Path, split: Split, step: int) -> tuple[Examples, Groups]:
        path = data / FILE
        try:
            with np.load(path, allow_pickle=False) as held:
                signal, starts, label = held["signal"], held["starts"], held["label"]
                side = held["side"]
        except FileNotFoundError:
            raise DataMissing(f"no recordings at {path}; put the person's {FILE} there") from None
        except (OSError, ValueError, KeyError) as error:
            raise DataMissing(f"{path} cannot be read as recordings: {error}") from error
        x: list[npt.NDArray[np.float32]] = []
        y: list[int] = []
        arms: list[int] = []
        for i, exercise in enumerate(label):
            whole = signal[starts[i] : starts[i + 1]]
            cut = list(windows(whole, *block(len(whole), split), step))
            x += cut
            y += [int(exercise)] * len(cut)
            arms += [int(side[i])] * len(cut)
        if not x:
            raise DataMissing(f"{path} holds no recording of four seconds or more")
        examples = Examples(np.stack(x).astype(np.float32), np.asarray(y, dtype=np.int64))
        return examples, np.asarray(arms, dtype=np.int64)
