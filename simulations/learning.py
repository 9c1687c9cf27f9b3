"""What a simulated round learns from the devices that were drawn.

Each trains on its own examples and encodes its update with the plan's clipping, weight, riders and
share of the noise; the integers are added up by workers, released and decoded. Nothing is kept per
device but control variates, one vector for each that has taken part.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.federation import batched, codec, control, local_update, parameters, release, training
from atoll.federation.batched import Client
from atoll.federation.codec import Sketch
from atoll.federation.control import Control
from atoll.federation.conversation import Learned
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.riders import Riders
from atoll.federation.training import Trained
from atoll.privacy import update
from atoll.privacy.errors import BadUpdate
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Integers
from atoll.privacy.update import UpdateSpec
from atoll.simulations.populations import Population
from atoll.simulations.trainers import Trainer
from atoll.simulations.workers import Workers

NO_CONTROL: Final = np.zeros(0, np.float32)
PART: Final = 25
"""Devices of a cohort that one worker trains together; with fewer, operations cost more each."""


class Order(NamedTuple):
    """What devices are told in a round."""

    number: int
    weights: Vector
    clip_norm: float
    shared: Vector
    sketch: Sketch


Crew = Workers[Order, tuple[list[float], dict[int, Vector]]]
"""Trains parts of cohorts; each says its devices' losses, and what they carry on."""


class Heard(NamedTuple):
    """What a round came to: so many devices are in it, none when it was thrown away."""

    learned: Learned | None
    survivors: int
    loss: float | None


_NOTHING: Final = Heard(None, 0, None)


@dataclass(frozen=True)
class Devices:
    """The devices of a simulation, and what a round learns from some of them."""

    plan: Plan
    population: Population
    cohort: int | None
    trainer: Trainer
    run: str
    trained: npt.NDArray[np.bool_] = dataclasses.field(
        default_factory=lambda: np.ones((), np.bool_)
    )
    """Which weights have gradients, ``(n,)``."""
    own: dict[int, Vector] = dataclasses.field(default_factory=dict)
    """The control variates of those that have taken part, where the plan has any."""

    @property
    def on_gpu(self) -> bool:
        """Whether a cohort trains on a GPU, all at once."""
        return self.trainer.engine == "batched" and batched.default_device().type != "cpu"

    def learn(
        self,
        number: int,
        weights: Vector,
        clip_norm: float,
        drawn: Sequence[int],
        entropy: Keystream,
        shared: Vector = NO_CONTROL,
        crew: Crew | None = None,
    ) -> Heard:
        """Return what the sum over ``drawn`` says; nothing when too few are in it.

        ``shared`` is the hub's control variate, empty while there is none; ``crew`` trains,
        otherwise this process.
        """
        plan, riders = self.plan, Riders.of(self.plan)
        if len(drawn) < plan.cohort.min_devices:
            return _NOTHING
        spec = release.update_spec(plan, clip_norm)
        how = plan.codec
        weights = parameters.from_bytes(*parameters.downlink(weights, how.downlink))
        places = codec.places(how, len(weights), plan.seed, self.run, number)
        sketch = Sketch(how.kind, how.share or 1.0, places)
        crew = crew or self.crew(len(weights), 1)
        order = Order(number, weights, clip_norm, shared, sketch)
        total, heard = crew.sum(order, self._parts(drawn))
        losses = [loss for part, _ in heard for loss in part]
        following = {device: own for _, part in heard for device, own in part.items()}
        if len(losses) < plan.cohort.min_devices:
            return _NOTHING
        sums = update.decode(update.release(total, spec, entropy), spec)
        size = self.population.size
        devices = self.cohort or release.devices(plan, size, size, len(losses))
        mean, shared = control.following(
            plan, riders.mean(sums, spec, devices), shared, devices / size
        )
        mean = codec.spread(how, mean, places, len(weights))
        learned = Learned(mean, riders.next_clip_norm(plan, clip_norm, sums, devices), shared)
        self.own.update(following)
        return Heard(learned, len(losses), float(np.mean(losses)))

    def crew(self, length: int, workers: int) -> Crew:
        """Return what trains parts of cohorts, for a model of ``length`` values."""
        plan = self.plan
        riders = release.update_spec(plan, plan.privacy.clip_norm).riders
        # What devices carry is here, and a GPU knows nothing of forks.
        here = control.scale(plan.training) or self.on_gpu
        return Workers(self.add, release.values(plan, length) + riders, 1 if here else workers)

    def _parts(self, drawn: Sequence[int]) -> list[Sequence[int]]:
        """Return the cohort in parts that do not depend on who trains them, alike in size."""
        if self.on_gpu or not drawn:
            return [drawn]
        size = PART if self.trainer.engine == "batched" else 1
        count = math.ceil(len(drawn) / size)
        return [
            drawn[len(drawn) * i // count : len(drawn) * (i + 1) // count] for i in range(count)
        ]

    def add(
        self, order: Order, part: Sequence[int], total: Integers
    ) -> tuple[list[float], dict[int, Vector]]:
        """Add the terms of a part of the cohort to ``total``; return losses and what is carried."""
        plan, weights = self.plan, order.weights
        spec = release.update_spec(plan, order.clip_norm)
        losses, following = [], {}
        for trained, client in self._trained(order.number, weights, part, order.shared):
            change, mine = trained.weights - weights, client.control
            reach = control.reach(trained.steps, plan.training)
            sent = mine.sent(change, reach, self.trained) if mine else change
            try:
                total += _term(sent, trained.steps, client, spec, plan, order.sketch)
            except BadUpdate:
                continue
            losses.append(trained.loss)
            if mine:
                following[client.device] = mine.following(update.clipped(sent, spec))
        return losses, following

    def _control(self, device: int, weights: Vector, shared: Vector) -> Control | None:
        """Return a device's control variates, if the plan has any."""
        scale = control.scale(self.plan.training)
        if not scale:
            return None
        own = self.own.get(device, np.zeros_like(weights))
        shared = shared if len(shared) else np.zeros_like(weights)
        return Control(own, shared, scale, control.retained(self.plan))

    def _trained(
        self, number: int, weights: Vector, drawn: Sequence[int], shared: Vector
    ) -> Iterator[tuple[Trained, "_Told"]]:
        """Yield what each device trained, and who it is; examples are made as they are needed."""
        told: deque[_Told] = deque()

        def clients() -> Iterator[Client]:
            for device in drawn:
                seed = training.local_seed(self.plan.seed, self.run, number, name_of(device))
                mine = self._control(device, weights, shared)
                correction = mine.correction if mine else None
                client = Client(self.population.examples(device, "train"), seed, correction)
                told.append(_Told(device, len(client.examples.y), seed, mine))
                yield client

        for trained in self.trainer.train(weights, clients()):
            yield trained, told.popleft()


class _Told(NamedTuple):
    """What encoding an update asks of its device."""

    device: int
    rows: int
    seed: int
    control: Control | None


def name_of(device: int) -> str:
    """Return the id that a simulated device has in seeds."""
    return f"device-{device}"


def _term(
    sent: Vector | npt.NDArray[np.float64],
    steps: int,
    told: _Told,
    spec: UpdateSpec,
    plan: Plan,
    sketch: Sketch,
) -> Integers:
    """Return a device's term."""
    how = plan.training
    return local_update.encoded(
        sent,
        told.rows,
        steps,
        how,
        Riders.of(plan),
        spec,
        Keystream.replayable(told.seed),
        sketch,
    ).term
