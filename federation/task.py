"""What a user writes to have a model trained: one class, found by its entry point.

A package that offers a task names it in its metadata::

    [project.entry-points."atoll.tasks"]
    gestures = "my_package:Gestures"

It is installed on hub and devices alike; the hub never sends code. The hub calls
:meth:`Task.model` for the initial weights and the export; only devices call
:meth:`Task.load`.
"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from atoll.federation.errors import TaskMissing

if TYPE_CHECKING:
    from torch import nn

Split = Literal["train", "test"]


class Examples(NamedTuple):
    """Examples on a device: ``x`` float32 ``(n, *input_shape)``, ``y`` int64 ``(n,)``."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]


@runtime_checkable
class Task(Protocol):
    """A classification task."""

    name: str
    input_shape: tuple[int, ...]
    """Shape of one example, without the batch axis."""
    channels: tuple[str, ...]
    """Names along the first axis of an example: signal channels, or tabular columns."""
    classes: tuple[str, ...]

    def model(self, seed: int) -> "nn.Module":
        """Return a freshly initialised model: ``(n, *input_shape)`` → logits ``(n, classes)``.

        The same ``seed`` gives the same weights.
        """
        ...

    def load(self, data: Path, split: Split) -> Examples:
        """Read this device's examples from its data directory.

        Raises :class:`atoll.federation.errors.DataMissing` when there are none.
        """
        ...


def find(name: str) -> Task:
    """Return the installed task called ``name``; raise :class:`TaskMissing` if there is none."""
    found = entry_points(group="atoll.tasks")
    try:
        kind = found[name].load()
    except KeyError:
        raise TaskMissing(name, sorted(found.names)) from None
    task: Task = kind()
    return task
