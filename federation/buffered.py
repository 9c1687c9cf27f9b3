"""Asynchronous rounds: updates are folded in as they come, and so many of them make a step.

    run_buffered(run, initial) -> Outcome

FedBuff (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022).
The hub keeps ``concurrency`` devices training, each on the weights that there were when it was
asked. An update that comes back after τ further steps is folded in with weight 1/√(1 + τ);
``buffer`` of them are divided by their number, the plan's strategy makes a step of that, and the
next step's buffer is empty (:mod:`atoll.federation.buffer`). So a slow device holds up nobody, and
what it learned counts all the same, though less.

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

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from flwr.app import RecordDict

from atoll.federation import asks, messages, progress, selection, training
from atoll.federation.buffer import Buffer
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.errors import BadMessage, BadPlan, RoundFailed
from atoll.federation.exchange import Outstanding, Reply
from atoll.federation.parameters import Vector
from atoll.federation.plan import Asynchrony
from atoll.federation.progress import PATIENCE, Outcome
from atoll.federation.run import Run
from atoll.privacy.errors import BadParameters, BudgetExceeded, Refused, SumFailed
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Ask, HubSum, Integers, RoundKey, SumSpec, Total

STRIDE: Final = 1 << 20
"""Requests are numbered from a step's number times this, so that no restart repeats a number."""


def run_buffered(run: Run, initial: Vector) -> Outcome:
    """Run the plan's steps; arguments and errors are those of ``rounds.run_rounds``."""
    plan, least = run.plan, run.plan.cohort.min_devices
    if plan.asynchrony is None:
        raise BadPlan("a plan without [asynchrony] runs in rounds")
    state = progress.resumed(run, initial)
    devices = _Devices(run, plan.asynchrony)
    failures, hoped = 0, len(run.cohort.trainers)
    if state.begun > state.ended:
        state = progress.given_up(run, state)
    while state.begun < plan.rounds + state.lost:
        _, present = progress.gathered(run, hoped)
        hoped = least
        number = state.begun + 1
        try:
            epsilon = run.charge(number, len(present))
        except BudgetExceeded:
            return Outcome.of(state, "budget")
        state = progress.saved(run, replace(state, begun=number))
        began = run.clock.now()
        buffer = devices.fill(state, present)
        state = replace(state, turns=selection.after(state.turns, buffer.asked))
        if buffer.makes_a_step:
            failures = 0
            state = progress.stepped(state, buffer.learned(run.entropy), plan, run.running)
            state = replace(state, counted={**state.counted, **buffer.folded})
        else:
            failures += 1
        state = progress.saved(run, replace(state, ended=number))
        progress.tell(run, state, buffer.report(number, run.clock.now() - began, epsilon))
        if failures == PATIENCE:
            raise RoundFailed(
                f"{PATIENCE} steps in a row were thrown away: {buffer.why}; look at why devices "
                "drop out, then start the run again"
            )
    return Outcome.of(state, "complete")


class _Task(NamedTuple):
    """What a device was asked: under which number, at which version, and who reads its term."""

    number: int
    version: int
    hub: HubSum


class _Devices:
    """Devices that train, over all steps."""

    def __init__(self, run: Run, wanted: Asynchrony) -> None:
        self._run, self._wanted = run, wanted
        self._outstanding = Outstanding(run.grid, run.clock)
        self._nodes = run.cohort.nodes
        self._tasks: dict[str, _Task] = {}
        self._come: deque[Reply] = deque()

    def fill(self, state: Checkpoint, present: Sequence[str]) -> Buffer:
        """Return the step's buffer, full, or with what came when there is nobody left to ask.

        What comes after it is full waits for the next one.
        """
        buffer = Buffer.empty(self._run.plan, self._wanted, len(state.weights))
        work = asks.training(self._run, state, buffer.spec)
        numbers = iter(range(state.begun * STRIDE, (state.begun + 1) * STRIDE))
        free = (name for name in present if name not in self._tasks)
        left = deque(sorted(free, key=lambda name: state.turns.get(name, 0)))
        while True:
            while self._come and not buffer.full:
                self._take(self._come.popleft(), buffer, state.trained)
            if buffer.full:
                return buffer
            while left and len(self._tasks) < self._wanted.concurrency:
                self._ask(left.popleft(), next(numbers), work, state, buffer)
            if not self._tasks:
                return buffer
            self._come.extend(self._outstanding.wait())

    def _ask(
        self, name: str, number: int, work: messages.TrainAsk, state: Checkpoint, buffer: Buffer
    ) -> None:
        run = self._run
        key = RoundKey(run.name, number)
        sums = SumSpec(key, len(buffer.total), buffer.spec.bound, self._wanted.buffer, 1)
        hub = run.session.open(sums, [name])
        step = hub.start()
        if not isinstance(step, Ask):
            raise BadParameters("a plain sum asks for terms first")
        content = messages.pack(asks.term(run, state, sums, step, name), work)
        buffer.down += messages.size(content)
        buffer.asked.append(name)
        self._tasks[name] = _Task(number, state.trained, hub)
        timeout, group = run.plan.cohort.round_timeout, str(state.begun)
        self._outstanding.send(name, self._nodes[name], messages.TRAIN, content, timeout, group)

    def _take(self, reply: Reply, buffer: Buffer, version: int) -> None:
        """Fold a reply in, or note why it is not."""
        name, task = reply.device, self._tasks.pop(reply.device)
        if reply.content is None:
            buffer.failed[name] = reply.failure
            return
        buffer.up += messages.size(reply.content)
        staleness = version - task.version
        if late := buffer.too_old(staleness):
            buffer.failed[name] = late
            return
        try:
            term, loss = _read(name, task, reply.content)
        except (Refused, SumFailed, BadMessage) as error:
            buffer.failed[name] = str(error)
            return
        buffer.fold(name, task.number, term, loss, staleness, self._rounding(name, task))

    def _rounding(self, name: str, task: _Task) -> Keystream:
        """Return what a weighed term is rounded with: repeatable where nothing is secret."""
        plan = self._run.plan
        if plan.privacy.noise_multiplier:
            return self._run.entropy
        seed = training.local_seed(plan.seed, self._run.name, task.number, f"hub/{name}")
        return Keystream.replayable(seed)


def _read(name: str, task: _Task, content: RecordDict) -> tuple[Integers, float]:
    task.hub.receive(name, messages.unpack(content, messages.SumReply).payload)
    loss = messages.unpack(content, messages.TrainReply).loss
    total = task.hub.advance()
    if not isinstance(total, Total):
        raise SumFailed("a plain sum has one phase")
    return total.values, loss
