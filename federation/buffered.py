"""Asynchronous rounds: updates are folded in as they come, and so many of them make a step.

    run_buffered(grid, plan, cohort, session, charge, on_round, initial, *, run,
                 checkpoints=None, clock=SYSTEM_CLOCK, entropy=None, left_out=None) -> Outcome

FedBuff (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022).
The hub keeps ``concurrency`` devices training, each on the weights that there were when it was
asked. An update that comes back after τ further steps is folded in with weight 1/√(1 + τ);
``buffer`` of them are divided by their number, the plan's strategy makes a step of that, and the
next step's buffer is empty. So a slow device holds up nobody, and what it learned counts all the
same, though less.

Whoever was asked least often is asked next, and a device once in a step at most. So it is in a
buffer once at most, a weight is one at most, and the sum's sensitivity is one device's clipped
update, as in a round. The ledger is charged for a step before any update is asked for in it. A
weight multiplies integers, which are rounded again without bias; riders are not weighed, so that
means of them are those of the devices in the buffer.

This is for ``plain`` sums alone. A masked or an encrypted sum knows its cohort before its first
term, and here a cohort is whoever has come in; the paper trusts an enclave with the buffer
instead. And noise is the hub's, or none: a device's share would be weighed with its update.

When nobody is left to ask and a buffer is not full, it makes a step from ``cohort.min_devices``
on, and is thrown away below. The state is saved after each step; a hub that ends takes the updates
of its buffer and of those in training with it. The step under way then stays charged, and one more
at the end takes its place, as for rounds (:mod:`atoll.federation.rounds`).

Reports are of steps: survivors are those in the buffer, and dropped those whose update came to
nothing while it was filled. Every request is a sum of its own to a device, with a number of its
own that only grows.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from atoll.federation import interim, messages, release, selection, training
from atoll.federation.checkpoints import Checkpoint, Checkpoints
from atoll.federation.cohort import Cohort, await_trainers
from atoll.federation.conversation import Conversation, Learned, RoundReport, Setting
from atoll.federation.errors import BadMessage, BadPlan, RoundFailed
from atoll.federation.exchange import SYSTEM_CLOCK, Clock, Outstanding, Reply
from atoll.federation.parameters import Vector
from atoll.federation.plan import Asynchrony, Plan
from atoll.federation.riders import Riders
from atoll.federation.rounds import PATIENCE, Outcome, broken_off, stepped
from atoll.privacy import modes, update
from atoll.privacy.errors import BadParameters, BudgetExceeded, Refused, SumFailed
from atoll.privacy.keystream import Keystream
from atoll.privacy.modes import HubSession
from atoll.privacy.sums import Ask, HubSum, Integers, RoundKey, SumSpec, Total

STRIDE: Final = 1 << 20
"""Requests are numbered from a step's number times this, so that no restart repeats a number."""


def weight(staleness: int) -> float:
    """Return what an update counts that is so many steps old (ibid., section 5)."""
    return 1 / math.sqrt(1 + staleness)


def run_buffered(
    grid: Grid,
    plan: Plan,
    cohort: Cohort,
    session: HubSession,
    charge: Callable[[int, int], float | None],
    on_round: Callable[[RoundReport], None],
    initial: Vector,
    *,
    run: str,
    checkpoints: Checkpoints | None = None,
    clock: Clock = SYSTEM_CLOCK,
    entropy: Keystream | None = None,
    left_out: selection.LeftOut | None = None,
    frozen: str = "",
) -> Outcome:
    """Run the plan's steps; arguments and errors are those of ``rounds.run_rounds``."""
    if plan.asynchrony is None:
        raise BadPlan("a plan without [asynchrony] runs in rounds")
    left_out = selection.judged(plan.cohort.rule, left_out)
    setting = Setting(grid, plan, cohort, run, clock, entropy or Keystream.fresh(), frozen)
    state = (checkpoints.load(run) if checkpoints else None) or Checkpoint.fresh(run, initial)
    _check(plan, cohort, len(initial))
    devices = _Devices(setting, session, plan.asynchrony)
    least, hoped, failures = plan.cohort.min_devices, len(cohort.trainers), 0
    if state.begun > state.ended:
        state = replace(state, ended=state.begun, lost=state.lost + 1)
        _save(state, checkpoints)
        on_round(broken_off(state, cohort, plan.privacy.clip_norm))
    while state.begun < plan.rounds + state.lost:
        timeout = plan.cohort.round_timeout
        allowed = selection.await_allowed(
            cohort.trainers, left_out, least=least, timeout=timeout, clock=clock
        )
        present = await_trainers(
            grid,
            replace(cohort, trainers=allowed),
            least=least,
            hoped=min(hoped, len(allowed)),
            timeout=timeout,
            clock=clock,
        )
        hoped = least
        number = state.begun + 1
        try:
            epsilon = charge(number, len(present))
        except BudgetExceeded:
            return Outcome(state.result, state.trained, "budget", state.turns)
        state = replace(state, begun=number)
        _save(state, checkpoints)
        began = clock.now()
        buffer = devices.fill(state, present)
        state = replace(state, turns=selection.after(state.turns, buffer.asked))
        if len(buffer.folded) >= least:
            failures = 0
            state = stepped(state, buffer.learned(setting), plan)
            state = replace(state, counted={**state.counted, **buffer.folded})
        else:
            failures += 1
        state = replace(state, ended=number)
        _save(state, checkpoints)
        report = buffer.report(number, clock.now() - began, epsilon, least)
        on_round(report)
        if report.survivors and interim.due(plan, state.trained):
            on_round(interim.measured(report, setting, state.result))
        if failures == PATIENCE:
            raise RoundFailed(
                f"{PATIENCE} steps in a row were thrown away: {len(buffer.folded)} updates came "
                f"in and a step needs {least}; look at why devices drop out, then start the run "
                "again"
            )
    return Outcome(state.result, state.trained, "complete", state.turns)


def _check(plan: Plan, cohort: Cohort, parameters: int) -> None:
    trainers = len(cohort.trainers)
    spec = release.update_spec(plan, plan.privacy.clip_norm)
    modes.check(plan.privacy.mode, spec, release.values(plan, parameters), trainers)
    release.check_population(plan, trainers)


def _save(state: Checkpoint, checkpoints: Checkpoints | None) -> None:
    if checkpoints:
        checkpoints.save(state)


class _Task(NamedTuple):
    """What a device was asked: under which number, at which version, and who reads its term."""

    number: int
    version: int
    hub: HubSum


@dataclass
class _Buffer:
    """The updates of one step, added up as they come, and the book of them."""

    spec: update.UpdateSpec
    riders: Riders
    total: Integers
    folded: dict[str, int] = field(default_factory=dict)
    """Whose updates are in it, and under which number each was asked for."""
    failed: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Who was asked while it was filled."""
    losses: list[float] = field(default_factory=list)
    up: int = 0
    down: int = 0

    def fold(self, device: str, task: _Task, term: Integers, counts: float, rng: Keystream) -> None:
        """Add a device's term, which ``counts`` so much."""
        self.total += update.weighed(term, counts, self.spec.riders, self.spec, rng)
        self.folded[device] = task.number

    def learned(self, setting: Setting) -> Learned:
        """Return the sum over the number of updates in it."""
        noised = update.release(self.total, self.spec, setting.entropy)
        mean = self.riders.mean(
            update.decode(noised, self.spec), self.spec, float(len(self.folded))
        )
        return Learned(mean, self.spec.clip_norm, np.zeros(0, np.float32))

    def report(self, number: int, seconds: float, epsilon: float | None, least: int) -> RoundReport:
        """Say how the step went; thrown away, it has no survivors."""
        kept = len(self.folded) >= least
        why = f"{len(self.folded)} updates came in and a step needs {least}"
        thrown = {} if kept else dict.fromkeys(self.folded, why)
        return RoundReport(
            round=number,
            seconds=seconds,
            survivors=tuple(sorted(self.folded)) if kept else (),
            dropped={**self.failed, **thrown},
            loss=float(np.mean(self.losses)) if kept and self.losses else None,
            epsilon=epsilon,
            bytes_up=self.up,
            bytes_down=self.down,
            clip_norm=self.spec.clip_norm,
            drawn=len(self.folded) + len(self.failed),
            connected=len(self.folded) + len(self.failed),
        )


class _Devices:
    """Devices that train, over all steps."""

    def __init__(self, setting: Setting, session: HubSession, asked: Asynchrony) -> None:
        self._setting, self._session, self._asked = setting, session, asked
        self._outstanding = Outstanding(setting.grid, setting.clock)
        self._nodes = setting.cohort.nodes
        self._tasks: dict[str, _Task] = {}
        self._come: deque[Reply] = deque()

    def fill(self, state: Checkpoint, present: Sequence[str]) -> _Buffer:
        """Return the step's buffer, full, or with what came when there is nobody left to ask.

        What comes after it is full waits for the next one.
        """
        setting, plan = self._setting, self._setting.plan
        spec = release.update_spec(plan, plan.privacy.clip_norm)
        length = release.values(plan, len(state.weights)) + spec.riders
        sums = SumSpec(
            RoundKey(setting.run, state.begun), length, spec.bound, self._asked.buffer, 1
        )
        work = Conversation(
            setting,
            state.begun,
            state.weights,
            spec.clip_norm,
            present,
            present,
            state.counted,
            state.control,
        ).work
        buffer = _Buffer(spec, Riders.of(plan), np.zeros(length, dtype=np.int64))
        numbers = iter(range(state.begun * STRIDE, (state.begun + 1) * STRIDE))
        free = (name for name in present if name not in self._tasks)
        left = deque(sorted(free, key=lambda name: state.turns.get(name, 0)))
        while True:
            while self._come and len(buffer.folded) < self._asked.buffer:
                self._take(self._come.popleft(), buffer, state.trained)
            if len(buffer.folded) == self._asked.buffer:
                return buffer
            while left and len(self._tasks) < self._asked.concurrency:
                self._ask(left.popleft(), next(numbers), sums, work, state, buffer)
            if not self._tasks:
                return buffer
            self._come.extend(self._outstanding.wait())

    def _ask(
        self,
        name: str,
        number: int,
        sums: SumSpec,
        work: messages.TrainAsk,
        state: Checkpoint,
        buffer: _Buffer,
    ) -> None:
        setting = self._setting
        spec = replace(sums, key=RoundKey(setting.run, number))
        hub = self._session.open(spec, [name])
        step = hub.start()
        if not isinstance(step, Ask):
            raise BadParameters("a plain sum asks for terms first")
        content = messages.pack(self._sum_ask(spec, step, name, state.counted.get(name, 0)), work)
        buffer.down += messages.size(content)
        self._tasks[name] = _Task(number, state.trained, hub)
        buffer.asked.append(name)
        timeout = setting.plan.cohort.round_timeout
        self._outstanding.send(
            name, self._nodes[name], messages.TRAIN, content, timeout, str(state.begun)
        )

    def _sum_ask(self, spec: SumSpec, step: Ask, name: str, counted: int) -> messages.SumAsk:
        plan = self._setting.plan
        return messages.SumAsk(
            mode=plan.privacy.mode,
            phase=step.phase,
            payload=step.payloads[name],
            party=name,
            run=spec.key.run,
            round=spec.key.round,
            length=spec.length,
            bound=spec.bound,
            parties=spec.parties,
            min_survivors=plan.cohort.min_devices,
            counted=counted,
        )

    def _take(self, reply: Reply, buffer: _Buffer, version: int) -> None:
        """Fold a reply in, or note why it is not."""
        name, task = reply.device, self._tasks.pop(reply.device)
        if reply.content is None:
            buffer.failed[name] = reply.failure
            return
        buffer.up += messages.size(reply.content)
        staleness, most = version - task.version, self._asked.max_staleness
        if most is not None and staleness > most:
            buffer.failed[name] = f"its update is {staleness} steps old, and {most} are allowed"
            return
        try:
            term, loss = _read(name, task, reply.content)
        except (Refused, SumFailed, BadMessage) as error:
            buffer.failed[name] = str(error)
            return
        if math.isfinite(loss):
            buffer.losses.append(loss)
        buffer.fold(name, task, term, weight(staleness), self._rng(name, task))

    def _rng(self, name: str, task: _Task) -> Keystream:
        """Return what a weighed term is rounded with: repeatable where nothing is secret."""
        plan = self._setting.plan
        if plan.privacy.noise_multiplier:
            return self._setting.entropy
        seed = training.local_seed(plan.seed, self._setting.run, task.number, f"hub/{name}")
        return Keystream.replayable(seed)


def _read(name: str, task: _Task, content: RecordDict) -> tuple[Integers, float]:
    task.hub.receive(name, messages.unpack(content, messages.SumReply).payload)
    loss = messages.unpack(content, messages.TrainReply).loss
    total = task.hub.advance()
    if not isinstance(total, Total):
        raise SumFailed("a plain sum has one phase")
    return total.values, loss
