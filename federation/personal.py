"""A device's own layers, from round to round, and its model at evaluation.

What leaves the device of these layers are counts of right answers. They are no part of a sum, so
it does not matter for them which rounds counted: a round begins with what the last one before
it came to, and the same round, asked again, with the same.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from atoll.federation import layout, messages, parameters, training
from atoll.federation.errors import DataMissing
from atoll.federation.kept import Carried, Kept
from atoll.federation.layout import Layout
from atoll.federation.parameters import Vector
from atoll.federation.plan import Layers, Training
from atoll.federation.task import Examples, Task
from atoll.federation.training import Evaluated
from atoll.privacy.errors import BadUpdate

LOSS_DIGITS: Final = 3
"""Decimals of the loss that a device tells: enough to follow training, too few for the differences
from which a hub that asks again and again would have a gradient."""

LOCAL: Final = "local"
"""The name under which a device keeps its own layers: one for a run, whatever it asks for."""

_LATEST: Final = 2**62


@dataclass(frozen=True, slots=True)
class Mine:
    """The model as this run lays it out, and this device's layers of it."""

    layout: Layout
    layers: Layers
    _carried: Carried

    @classmethod
    def of(cls, task: Task, seed: int, layers: str, frozen: str, kept: Kept, run: str) -> "Mine":
        """Return them as the hub asks for them.

        Raises :class:`BadMessage`, for other frozen weights than the hub's too, and
        :class:`atoll.federation.errors.BadPlan` for layers that the model lacks.
        """
        asked = layout.decode(layers)
        shape = layout.of(task, seed, asked)
        shape.check(frozen)
        return cls(shape, asked, Carried(kept, run, LOCAL))

    def before(self, number: int) -> Vector:
        """Return the layers with which round ``number`` begins, float32."""
        fresh = self.layout.local(self.layout.start)
        found = self._carried.as_of(number - 1, lambda: fresh)
        # Of a run that has changed its mind about which layers stay, nothing is kept.
        mine = np.array_equal(found[len(fresh) :], self._mark)
        return found[: len(fresh)] if mine else fresh

    def keep(self, number: int, before: Vector, whole: Vector) -> None:
        """Keep the layers to which round ``number`` came; raise :class:`BadUpdate` for NaN, Inf."""
        if self.layers.local:
            after = self.layout.local(whole)
            if not np.isfinite(after).all():
                raise BadUpdate("this device's own layers hold NaN or Inf; its training diverged")
            marked = [np.concatenate([layers, self._mark]) for layers in (before, after)]
            self._carried.put(number, *marked)

    @property
    def _mark(self) -> Vector:
        """Return what stands behind kept layers: the digest of which layers they are."""
        digest = hashlib.sha256("\0".join(sorted(self.layers.local)).encode()).digest()
        return np.frombuffer(digest, np.uint8).astype(np.float32)

    def latest(self) -> Vector:
        """Return the layers as they are now, float32; the initial ones before the first round."""
        return self.before(_LATEST)


def evaluate(
    task: Task, data: Path, ask: messages.EvaluateAsk, kept: Kept, *, tune: bool
) -> messages.EvaluateReply:
    """Return how the hub's weights do with this device's layers, and after fine-tuning if asked.

    What a fine-tuned model gets right tells of the examples it was tuned on, to the hub and without
    noise; a device that does not ``tune`` says nothing of it.
    Raises what :meth:`Mine.of` does.
    """
    mine = Mine.of(task, ask.seed, ask.layers, ask.frozen, kept, ask.run)
    whole = mine.layout.whole(parameters.from_bytes(ask.weights), mine.latest())
    test = task.load(data, "test")
    done = training.evaluate(mine.layout.model, whole, test)
    tuned = -1
    if mine.layers.fine_tune and tune:
        with suppress(DataMissing):
            tuned = _tuned(mine, whole, task.load(data, "train"), test, ask).correct
    return messages.EvaluateReply(
        rows=done.rows,
        correct=done.correct,
        loss=round(done.loss, LOSS_DIGITS),
        correct_tuned=tuned,
    )


def _tuned(
    mine: Mine, whole: Vector, examples: Examples, test: Examples, ask: messages.EvaluateAsk
) -> Evaluated:
    how = Training(
        local_epochs=mine.layers.fine_tune_epochs,
        batch_size=ask.batch_size,
        learning_rate=ask.learning_rate,
        momentum=ask.momentum,
    )
    mine.layout.tune(mine.layers.fine_tune)
    seed = training.local_seed(ask.seed, ask.run, 0, "fine-tune")
    done = training.train(mine.layout.model, whole, examples, how, seed)
    return training.evaluate(mine.layout.model, done.weights, test)
