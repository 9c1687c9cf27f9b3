"""A plan's rounds on many simulated devices, in this process.

    run(plan, simulated, cohort, on_round) -> Ended

A round is a real one without its messages: the ledger is charged, a cohort drawn, each device
of it trains on its own examples and encodes its update with the plan's clipping, weight, riders
and share of the noise; the integers are added up, released, decoded, and the hub takes its
step. Each rule is the one that hub and devices use (:mod:`atoll.privacy.update`,
:mod:`atoll.federation.riders`, :mod:`~atoll.federation.release`, :func:`rounds.stepped`). What
hides terms on their way (masks, encryption) changes no sum and is left out.

Without noise the result is that of :class:`atoll.federation.engine.InProcessGrid` with the same
seed, run name and cohort, up to the float32 additions of :mod:`atoll.federation.batched`. All
draws, noise included, come from the seed, so a simulation can be replayed and protects nobody.

Nothing is kept per device: memory depends on the model and on what is trained at once, never
on how many devices there are. Control variates are the exception: one vector for each device that
has taken part.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from torch import nn

from atoll.federation import (
    batched,
    codec,
    control,
    layout,
    local_update,
    parameters,
    release,
    rounds,
    training,
)
from atoll.federation.batched import Client
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.codec import Sketch
from atoll.federation.cohort import draw
from atoll.federation.control import Control
from atoll.federation.conversation import Learned
from atoll.federation.errors import BadPlan, RoundFailed, Unbatchable
from atoll.federation.layout import Layout
from atoll.federation.parameters import Vector
from atoll.federation.plan import Codec, Cohort, Layers, Plan, Privacy
from atoll.federation.riders import Riders
from atoll.federation.task import Task
from atoll.federation.training import Trained
from atoll.privacy import modes, update
from atoll.privacy.errors import BadUpdate, BudgetExceeded
from atoll.privacy.keystream import Keystream
from atoll.privacy.ledger import Event, FixedSample, Gaussian, Ledger, MemoryStore
from atoll.privacy.sums import Integers
from atoll.privacy.update import UpdateSpec
from atoll.server.pipeline import event_of
from atoll.simulations.populations import Population, Simulated, evaluated_on
from atoll.simulations.workers import Workers

RUN: Final = "simulation"
HUB: Final = "hub"
"""Whom the hub's draws are seeded for; no device has this name."""
EVERY: Final = 10
"""Rounds from one evaluation to the next, unless the plan says; the last is followed by one."""
EVALUATORS: Final = 50
"""Devices on whose held-back examples weights are evaluated."""
NO_CONTROL: Final = np.zeros(0, np.float32)
BLOCK: Final = 4096
"""Devices for which a Poisson draw tosses its coins at once."""
PART: Final = 25
"""Devices of a cohort that one worker trains together; with fewer, operations cost more each."""

_HEEDED: Final = {
    Plan: {
        *("name", "task", "model", "rounds", "evaluate_every", "seed"),
        *("training", "cohort", "privacy", "gates", "layers", "codec"),
    },
    Cohort: {"labels", "min_devices", "round_timeout", "sampling_rate"},
    Privacy: {
        *("mode", "clip_norm", "bits", "noise_multiplier", "noise", "colluders", "clip"),
        *("clip_quantile", "clip_rate", "rider_noise_multiplier", "delta", "budget_epsilon"),
        "telemetry_noise",
    },
    Layers: {"trained", "lora_layers", "lora_rank", "lora_alpha"},
    Codec: {"kind", "share", "error_feedback", "downlink"},
}
"""What a simulation knows how to do; another field must have its default."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round as it went: of ``drawn`` devices ``survivors`` are in the sum.

    ``survivors`` is 0 when the round was thrown away, and ``loss`` none. ``accuracy`` is none
    in rounds that were not followed by an evaluation. ``seconds`` leave the evaluation out.
    """

    round: int
    seconds: float
    drawn: int
    survivors: int
    loss: float | None
    epsilon: float | None
    clip_norm: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Ended:
    """Where a simulation ended: float32 weights ``(n,)``; how many rounds are in them.

    ``engine`` says how devices trained: ``batched``, or ``one by one`` for ``reason``.
    """

    weights: Vector
    rounds: int
    ended: Literal["complete", "budget"]
    accuracy: float
    engine: Literal["batched", "one by one"]
    reason: str


Train = Callable[[Vector, Iterable[Client]], Iterator[Trained]]


class Trainer(NamedTuple):
    """How devices train: weights and clients to what they come to, in order."""

    train: Train
    engine: Literal["batched", "one by one"]
    reason: str = ""


def trainer_of(task: Task, plan: Plan) -> Trainer:
    """Return the batched trainer, or the device's own where that is faster or the only one."""
    shape, settings = layout.of(task, plan.seed, plan.layers), plan.training
    model = shape.model

    def alone(weights: Vector, clients: Iterable[Client]) -> Iterator[Trained]:
        for client in clients:
            yield training.train(
                model,
                weights,
                client.examples,
                settings,
                client.seed,
                correction=client.correction,
            )

    if not batched.worthwhile(model, task.input_shape, settings, batched.default_device()):
        return Trainer(
            _of_part(shape, alone),
            "one by one",
            "on a CPU that is faster for a network of this size",
        )
    try:
        batched.check(model, task.input_shape, len(task.classes), settings)
    except Unbatchable as error:
        return Trainer(_of_part(shape, alone), "one by one", str(error))
    return Trainer(
        _of_part(shape, lambda weights, clients: batched.train(model, weights, clients, settings)),
        "batched",
    )


def _of_part(shape: Layout, train: Train) -> Train:
    """Return what trains on all weights as what is told, and tells, of those that travel."""

    def all_of(client: Client) -> Client:
        given = client.correction
        return client if given is None else client._replace(correction=shape.alone(given))

    def on_part(weights: Vector, clients: Iterable[Client]) -> Iterator[Trained]:
        for done in train(shape.whole(weights), map(all_of, clients)):
            yield done._replace(weights=shape.travelling(done.weights))

    return on_part


def run(
    plan: Plan,
    simulated: Simulated,
    cohort: int | None,
    on_round: Callable[[Round], None],
    *,
    name: str = RUN,
    every: int = EVERY,
    start: Checkpoint | None = None,
    carried: dict[int, Vector] | None = None,
    keep: Callable[[Checkpoint, Round], None] | None = None,
    workers: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Ended:
    """Run the plan's rounds on ``simulated`` devices.

    ``name`` is the run's, from which devices' seeds come. A round's cohort is drawn as the plan
    says; ``cohort`` sets a fixed number of devices, each
    such set as likely, for a plan without a sampling rate. ``on_round`` hears of every round.
    ``keep`` gets the state after each, from which another run of the same goes on as its
    ``start`` and comes to the same end; ``carried`` is what devices carry by then, changed in
    place (:mod:`atoll.simulations.resumable`). So many ``workers`` train at once, if there is more
    than one to be trained by (:mod:`atoll.simulations.workers`); the result is the same.

    Raises :class:`BadPlan` for what cannot be simulated,
    :class:`atoll.privacy.errors.BadParameters` for a plan that cannot be private or decoded,
    and :class:`RoundFailed` when updates diverge round after round.
    """
    task, population = simulated
    shape = layout.of(task, plan.seed, plan.layers)
    initial = shape.initial
    check(plan, population.size, cohort, len(initial))
    trainer, trained = trainer_of(task, plan), shape.travelling(parameters.mask(shape.model))
    own = {} if carried is None else carried
    devices = _Devices(plan, population, cohort, trainer, name, trained, own)
    with devices.crew(len(initial), workers) as crew:
        state = start or Checkpoint.fresh(name, initial)
        return _rounds(devices, crew, shape, state, on_round, every, keep, clock)


def _rounds(
    devices: "_Devices",
    crew: "_Crew",
    shape: Layout,
    state: Checkpoint,
    on_round: Callable[[Round], None],
    every: int,
    keep: Callable[[Checkpoint, Round], None] | None,
    clock: Callable[[], float],
) -> Ended:
    """Run the rounds from ``state`` on."""
    plan, population, cohort, name = devices.plan, devices.population, devices.cohort, devices.run
    model = shape.model
    failures = 0
    ledger = Ledger(MemoryStore(), plan.model, plan.privacy.budget_epsilon, plan.privacy.delta)
    event = cost(plan, population.size, cohort)
    for past in range(1, state.ended + 1):
        ledger.charge(f"{name}/{past}", event)
    ended: Literal["complete", "budget"] = "complete"
    for number in range(state.ended + 1, plan.rounds + 1):
        began = clock()
        try:
            spent = ledger.charge(f"{name}/{number}", event).epsilon_pld
        except BudgetExceeded:
            ended = "budget"
            break
        state = replace(state, begun=number)
        # Each round has a stream of its own, so that no round needs those before it drawn again.
        entropy = Keystream.replayable(training.local_seed(plan.seed, name, number, HUB))
        clip_norm = state.clip_norm or plan.privacy.clip_norm
        drawn = devices.drawn(entropy)
        heard = devices.learn(number, state.weights, clip_norm, drawn, entropy, state.control, crew)
        if heard.learned is not None:
            failures = 0
            state = rounds.stepped(state, heard.learned, plan)
        elif len(drawn) >= plan.cohort.min_devices:
            failures += 1
        seconds = clock() - began
        looked = number % (plan.evaluate_every or every) == 0 and number < plan.rounds
        done = Round(
            round=number,
            seconds=seconds,
            drawn=len(drawn),
            survivors=heard.survivors,
            loss=heard.loss,
            epsilon=spent if math.isfinite(spent) else None,
            clip_norm=clip_norm,
            accuracy=accuracy(model, shape.whole(state.result), population) if looked else None,
        )
        state = replace(state, ended=number)
        if keep:
            keep(state, done)
        on_round(done)
        if failures == rounds.PATIENCE:
            raise RoundFailed(
                f"{failures} rounds in a row were thrown away: the updates of too many devices "
                "diverged; lower training.learning_rate"
            )
    return Ended(
        state.result,
        state.trained,
        ended,
        accuracy(model, shape.whole(state.result), population),
        devices.trainer.engine,
        devices.trainer.reason,
    )


def check(plan: Plan, size: int, cohort: int | None, length: int) -> None:
    """Raise :class:`BadPlan` or :class:`BadParameters` for what could not run.

    ``length`` is the number of the model's parameters.
    """
    for part in (plan, plan.cohort, plan.privacy, plan.layers, plan.codec):
        known = _HEEDED[type(part)]
        for field in msgspec.structs.fields(part):
            made = field.default_factory
            usual = field.default if made is msgspec.NODEFAULT else made()
            if field.name not in known and getattr(part, field.name) != usual:
                raise BadPlan(
                    f"{field.name} cannot be simulated; leave it out, or run the plan on devices"
                )
    if plan.codec.feedback:
        raise BadPlan(
            "simulated devices keep nothing, and error feedback is what a device keeps: use "
            'codec.kind = "random-mask" without error_feedback, or run the plan on devices'
        )
    if plan.training.deadline is not None:
        raise BadPlan(
            "simulated devices take no time that a deadline could end; leave training.deadline out"
        )
    if cohort is not None and plan.cohort.sampling_rate is not None:
        raise BadPlan(
            "the plan draws its cohorts by cohort.sampling_rate; leave a fixed size of the "
            "cohort out, or sampling_rate"
        )
    if cohort is not None and not plan.cohort.min_devices <= cohort <= size:
        raise BadPlan(
            f"a cohort of {cohort} must be at least cohort.min_devices "
            f"({plan.cohort.min_devices}) and at most the {size} devices there are"
        )
    spec = release.update_spec(plan, plan.privacy.clip_norm)
    modes.check(plan.privacy.mode, spec, release.rounded(plan, length), cohort or size)
    in_the_clear = msgspec.structs.replace(plan.privacy, mode="plain")
    release.check_population(msgspec.structs.replace(plan, privacy=in_the_clear), size)


def cost(plan: Plan, size: int, cohort: int | None) -> Event:
    """Return what a round costs a population of ``size`` devices.

    A fixed cohort is secret under the same condition as a sampled one, that the hub alone adds
    the noise; means are over its size, which is no secret.
    """
    event = event_of(plan, size)
    secret = cohort is not None and cohort < size and plan.privacy.noise == "central"
    if isinstance(event, Gaussian) and cohort is not None and secret:
        return Gaussian(event.noise_multiplier, FixedSample(cohort, size))
    return event


def accuracy(model: nn.Module, weights: Vector, population: Population) -> float:
    """Return the share that is right of what :data:`EVALUATORS` devices held back.

    Where a population comes with a test set, of that.
    """
    rows = correct = 0
    for held_back in evaluated_on(population, EVALUATORS):
        done = training.evaluate(model, weights, held_back)
        rows, correct = rows + done.rows, correct + done.correct
    return correct / rows


def sampled(size: int, rate: float, entropy: Keystream) -> list[int]:
    """Return a Poisson sample of the numbers below ``size``, in memory for the sample alone."""
    found: list[int] = []
    for start in range(0, size, BLOCK):
        found += draw(range(start, min(start + BLOCK, size)), rate, entropy)
    return found


def chosen(size: int, count: int, entropy: Keystream) -> list[int]:
    """Return ``count`` of the numbers below ``size``, each such set as likely as another.

    R. Floyd's algorithm (J. Bentley, "Programming Pearls", CACM 30:9, 1987): one draw each.
    """
    found: set[int] = set()
    for last in range(size - count, size):
        one = int(entropy.below(last + 1, 1)[0])
        found.add(last if one in found else one)
    return sorted(found)


class _Order(NamedTuple):
    """What devices are told in a round."""

    number: int
    weights: Vector
    clip_norm: float
    shared: Vector
    sketch: Sketch


_Crew = Workers[_Order, tuple[list[float], dict[int, Vector]]]


class _Heard(NamedTuple):
    learned: Learned | None
    survivors: int
    loss: float | None


_NOTHING: Final = _Heard(None, 0, None)


@dataclass(frozen=True)
class _Devices:
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

    def drawn(self, entropy: Keystream) -> Sequence[int]:
        """Return a round's cohort."""
        size, rate = self.population.size, self.plan.cohort.sampling_rate
        if rate is not None:
            return sampled(size, rate, entropy)
        return range(size) if self.cohort is None else chosen(size, self.cohort, entropy)

    def learn(
        self,
        number: int,
        weights: Vector,
        clip_norm: float,
        drawn: Sequence[int],
        entropy: Keystream,
        shared: Vector = NO_CONTROL,
        crew: "_Crew | None" = None,
    ) -> _Heard:
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
        order = _Order(number, weights, clip_norm, shared, sketch)
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
        return _Heard(learned, len(losses), float(np.mean(losses)))

    def crew(self, length: int, workers: int) -> "_Crew":
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
        self, order: "_Order", part: Sequence[int], total: Integers
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
