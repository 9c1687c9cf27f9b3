"""Federated averaging under a private sum: the rounds of one plan.

For each round the ledger is charged first; then the hub's side of the sum leads. Phases
before the contribution are messages of their own, the contribution rides with the training
instruction, phases after it open the sum. Terms weigh equally, so that the sum's sensitivity
is one device's clipped update. A round with too few survivors is thrown away: the weights
stay, the charge stands, and the next round goes on; :data:`PATIENCE` of them in a row end
the run with :class:`RoundFailed`.

    run_rounds(grid, plan, cohort, session, charge, on_round, initial, *, run, task=plan.task,
               checkpoints=None, clock=SYSTEM_CLOCK) -> Outcome

With no noise a run on the in-process engine is repeatable from ``plan.seed``: batch order
and stochastic rounding on a device draw from (seed, round, device). With noise they draw
from the system's entropy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from atoll.federation import messages, parameters
from atoll.federation.checkpoints import Checkpoint, Checkpoints
from atoll.federation.errors import BadMessage, RoundFailed
from atoll.federation.exchange import SYSTEM_CLOCK, Clock, exchange
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.privacy import update
from atoll.privacy.errors import BudgetExceeded, Refused, SumFailed
from atoll.privacy.sums import CONTRIBUTE, Ask, HubSum, RoundKey, SumSpec, Total
from flwr.serverapp import Grid

PATIENCE: Final = 3
"""Rounds in a row that may be thrown away before the run is given up."""


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the cohort: its Flower node and its certificate (PEM)."""

    node_id: int
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who takes part: all by device id, and which of them train and which evaluate."""

    members: Mapping[str, Member]
    trainers: Sequence[str]
    evaluators: Sequence[str]

    @property
    def nodes(self) -> dict[str, int]:
        """Flower node ids by device."""
        return {device: member.node_id for device, member in self.members.items()}


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round as it went.

    ``survivors`` are the devices in the sum, none when the round was thrown away; ``dropped``
    the other trainers, with the reason. ``loss`` is the mean of what survivors reported;
    ``epsilon`` what the population has spent so far. Bytes are payload of all devices together.
    """

    round: int
    seconds: float
    survivors: tuple[str, ...]
    dropped: Mapping[str, str]
    loss: float | None
    epsilon: float | None
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended: float32 weights ``(n,)`` and how many rounds are in them."""

    weights: Vector
    rounds: int
    ended: Literal["complete", "budget"]


class SumSession(Protocol):
    """The hub's side of all sums of a plan (:func:`atoll.privacy.modes.hub_session`)."""

    def open(self, spec: SumSpec, parties: Sequence[str]) -> HubSum:
        """Return the hub's side of one sum."""
        ...


def run_rounds(
    grid: Grid,
    plan: Plan,
    cohort: Cohort,
    session: SumSession,
    charge: Callable[[int], float | None],
    on_round: Callable[[RoundReport], None],
    initial: Vector,
    *,
    run: str,
    checkpoints: Checkpoints | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Outcome:
    """Run the plan's rounds, or those that are left of them.

    ``charge`` is called before round ``r`` starts and returns the ε spent so far (none when
    nothing bounds it); when it raises :class:`BudgetExceeded` the run ends with what has been
    trained. ``on_round`` hears of every round, thrown away or not. Raises
    :class:`RoundFailed` when too few devices are there.
    """
    state = (checkpoints.load(run) if checkpoints else None) or Checkpoint(
        run=run, begun=0, completed=0, trained=0, weights=initial
    )
    update_spec = _update_spec(plan)
    await_trainers(grid, plan, cohort, clock, everyone=True)
    failures = 0
    for number in range(state.begun + 1, plan.rounds + 1):
        present = await_trainers(grid, plan, cohort, clock, everyone=False)
        try:
            epsilon = charge(number)
        except BudgetExceeded:
            return Outcome(state.weights, state.trained, "budget")
        state = Checkpoint(run, number, state.completed, state.trained, state.weights)
        if checkpoints:
            checkpoints.save(state)
        started = clock.now()
        talk = _Round(grid, plan, cohort, run, number, state.weights, present, clock)
        mean = talk.mean(session, update_spec)
        if mean is None:
            failures += 1
        else:
            failures = 0
            stepped = state.weights + plan.training.server_learning_rate * mean
            state = Checkpoint(run, number, number, state.trained + 1, stepped.astype(np.float32))
            if checkpoints:
                checkpoints.save(state)
        on_round(talk.report(clock.now() - started, epsilon))
        if failures == PATIENCE:
            raise RoundFailed(
                f"{PATIENCE} rounds in a row had too few devices ({talk.why}); "
                "look at why they drop out, then start the run again"
            )
    return Outcome(state.weights, state.trained, "complete")


def await_trainers(
    grid: Grid, plan: Plan, cohort: Cohort, clock: Clock, *, everyone: bool
) -> list[str]:
    """Return the trainers that are connected, waiting for them up to the round's timeout.

    Waits for all (``everyone``) or for the plan's minimum; raises :class:`RoundFailed` when
    the minimum is not there in time.
    """
    deadline = clock.now() + plan.cohort.round_timeout
    enough = len(cohort.trainers) if everyone else plan.cohort.min_devices
    while True:
        online = set(grid.get_node_ids())
        present = [name for name in cohort.trainers if cohort.members[name].node_id in online]
        if len(present) >= enough:
            return present
        if clock.now() >= deadline:
            break
        clock.pause(0.5)
    if len(present) < plan.cohort.min_devices:
        raise RoundFailed(
            f"{len(present)} of {len(cohort.trainers)} training devices are connected and the "
            f"plan needs {plan.cohort.min_devices}; check that their agents run, or lower "
            "cohort.min_devices"
        )
    return present


class _Round:
    """One round's conversation."""

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        cohort: Cohort,
        run: str,
        number: int,
        weights: Vector,
        present: Sequence[str],
        clock: Clock,
    ) -> None:
        self._grid, self._plan, self._cohort, self._clock = grid, plan, cohort, clock
        self._run, self._number, self._weights = run, number, weights
        self._present = present
        self._survivors: tuple[str, ...] = ()
        self._dropped = {name: "not connected" for name in cohort.trainers if name not in present}
        self._losses: dict[str, float] = {}
        self._up = self._down = 0
        self.why = ""

    def mean(self, session: SumSession, spec: update.UpdateSpec) -> np.ndarray | None:
        """Return the mean update, float64 ``(n,)``, or none when the round is thrown away."""
        sums = SumSpec(
            key=RoundKey(self._run, self._number),
            length=len(self._weights),
            bound=spec.bound,
            parties=len(self._present),
            min_survivors=self._plan.cohort.min_devices,
        )
        hub = session.open(sums, list(self._present))
        try:
            step = hub.start()
            ask: Ask | Total = step
            while isinstance(ask, Ask):
                self._phase(hub, ask, sums)
                ask = hub.advance()
        except SumFailed as error:
            self.why = str(error)
            return None
        self._survivors = tuple(ask.survivors)
        return update.decode(ask.values, spec, len(ask.survivors))

    def _phase(self, hub: HubSum, ask: Ask, sums: SumSpec) -> None:
        contribution = ask.phase == CONTRIBUTE
        work = [self._work()] if contribution else []
        replies = exchange(
            self._grid,
            self._cohort.nodes,
            messages.TRAIN if contribution else messages.SUM,
            {
                name: messages.pack(self._sum_ask(sums, ask.phase, name, payload), *work)
                for name, payload in ask.payloads.items()
            },
            self._plan.cohort.round_timeout,
            group=str(self._number),
            clock=self._clock,
        )
        self._down += replies.bytes_down
        self._up += replies.bytes_up
        self._dropped.update(replies.failed)
        for name, content in replies.content.items():
            try:
                hub.receive(name, messages.unpack(content, messages.SumReply).payload)
                if contribution:
                    self._losses[name] = messages.unpack(content, messages.TrainReply).loss
            except (Refused, BadMessage) as error:
                self._dropped[name] = str(error)

    def _sum_ask(self, sums: SumSpec, phase: str, name: str, payload: bytes) -> messages.SumAsk:
        return messages.SumAsk(
            mode=self._plan.privacy.mode,
            phase=phase,
            payload=payload,
            party=name,
            run=self._run,
            round=self._number,
            length=sums.length,
            bound=sums.bound,
            parties=sums.parties,
            min_survivors=sums.min_survivors,
        )

    def _work(self) -> messages.TrainAsk:
        local, privacy = self._plan.training, self._plan.privacy
        return messages.TrainAsk(
            task=self._plan.task,
            weights=parameters.to_bytes(self._weights),
            seed=self._plan.seed,
            local_epochs=local.local_epochs,
            batch_size=local.batch_size,
            learning_rate=local.learning_rate,
            momentum=local.momentum,
            clip_norm=privacy.clip_norm,
            bits=privacy.bits,
            noise_multiplier=privacy.noise_multiplier,
            survivors=self._plan.cohort.min_devices,
        )

    def report(self, seconds: float, epsilon: float | None) -> RoundReport:
        """Say how the round went."""
        losses = [self._losses[name] for name in self._survivors if name in self._losses]
        dropped = {
            name: self._dropped.get(name, self.why or "its term is not in the sum")
            for name in self._cohort.trainers
            if name not in self._survivors
        }
        return RoundReport(
            round=self._number,
            seconds=seconds,
            survivors=self._survivors,
            dropped=dropped,
            loss=float(np.mean(losses)) if losses else None,
            epsilon=epsilon,
            bytes_up=self._up,
            bytes_down=self._down,
        )


def _update_spec(plan: Plan) -> update.UpdateSpec:
    return update.UpdateSpec(
        clip_norm=plan.privacy.clip_norm,
        bits=plan.privacy.bits,
        noise_multiplier=plan.privacy.noise_multiplier,
        survivors=plan.cohort.min_devices,
    )
