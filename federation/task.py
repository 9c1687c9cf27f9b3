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
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from atoll.federation.errors import BadGroups, TaskMissing

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


NO_GROUP: Final = -1
"""The group of an example of which none is known."""

Groups = npt.NDArray[np.int64]
"""The group of each example, int64 ``(n,)``: a place in :attr:`Grouped.groups`, or none."""


@runtime_checkable
class Grouped(Protocol):
    """What a task offers besides, to have it measured whether a model treats groups alike.

    A group is what a model should not depend on: of whom an example is, on which side a watch is
    worn. Devices count by it and never tell it of an example (:mod:`atoll.server.fairness`).
    """

    groups: tuple[str, ...]

    def group_of(self, data: Path, split: Split) -> Groups:
        """Return the group of each of the examples that :meth:`Task.load` reads, in its order.

        :data:`NO_GROUP` where it is not known: such examples are counted in no group.
        """
        ...


def groups_of(task: Task, data: Path, split: Split, rows: int) -> Groups | None:
    """Return the groups of the ``rows`` examples of a split; none for a task without groups.

    Raises :class:`BadGroups` for what are not groups of these examples.
    """
    if not isinstance(task, Grouped):
        return None
    found = np.asarray(task.group_of(data, split))
    if found.shape != (rows,) or found.dtype.kind not in "iu":
        raise BadGroups(
            f"task {task.name!r} gives groups of shape {found.shape} and type {found.dtype} for "
            f"{rows} examples; its group_of must return one whole number for each"
        )
    if rows and not NO_GROUP <= found.min() <= found.max() < len(task.groups):
        raise BadGroups(
            f"task {task.name!r} gives groups from {found.min()} to {found.max()}; its group_of "
            f"must return numbers below {len(task.groups)}, or {NO_GROUP} for none"
        )
    return found.astype(np.int64)


def find(name: str) -> Task:
    """Return the installed task called ``name``; raise :class:`TaskMissing` if there is none."""
    found = entry_points(group="atoll.tasks")
    try:
        kind = found[name].load()
    except KeyError:
        raise TaskMissing(name, sorted(found.names)) from None
    task: Task = kind()
    return task
