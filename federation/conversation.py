"""One round: the hub's side of a private sum, carried by Flower messages.

The sum names the phases and the payloads; this module sends them, attaches the training
instruction to the contribution, and keeps book of who dropped out, why, and how many bytes
went over the wire.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from atoll.federation import messages, parameters
from atoll.federation.cohort import Cohort
from atoll.federation.errors import BadMessage
from atoll.federation.exchange import Clock, exchange
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.privacy import update
from atoll.privacy.errors import Refused, SumFailed
from atoll.privacy.modes import HubSession
from atoll.privacy.sums import CONTRIBUTE, Ask, HubSum, RoundKey, SumSpec, Total


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
class Setting:
    """What stays the same through a run."""

    grid: Grid
    plan: Plan
    cohort: Cohort
    run: str
    clock: Clock

    @property
    def update_spec(self) -> update.UpdateSpec:
        """How updates become integers; the noise holds for the least number of survivors."""
        return update.UpdateSpec(
            clip_norm=self.plan.privacy.clip_norm,
            bits=self.plan.privacy.bits,
            noise_multiplier=self.plan.privacy.noise_multiplier,
            survivors=self.plan.cohort.min_devices,
        )


class Conversation:
    """One round's conversation with the devices in ``present``."""

    def __init__(
        self, setting: Setting, number: int, weights: Vector, present: Sequence[str]
    ) -> None:
        self._setting, self._number = setting, number
        self._weights, self._present = weights, present
        self._started = setting.clock.now()
        self._survivors: tuple[str, ...] = ()
        self._dropped: dict[str, str] = {}
        self._losses: dict[str, float] = {}
        self._up = self._down = 0
        self.why = ""
        """Why the round was thrown away, if it was."""

    def mean(self, session: HubSession) -> npt.NDArray[np.float64] | None:
        """Return the mean update, float64 ``(n,)``, or none when the round is thrown away."""
        spec = self._setting.update_spec
        sums = SumSpec(
            key=RoundKey(self._setting.run, self._number),
            length=len(self._weights),
            bound=spec.bound,
            parties=len(self._present),
            min_survivors=self._setting.plan.cohort.min_devices,
        )
        try:
            hub = session.open(sums, list(self._present))
            step: Ask | Total = hub.start()
            while isinstance(step, Ask):
                self._phase(hub, step, sums)
                step = hub.advance()
        except SumFailed as error:
            self.why = str(error)
            return None
        self._survivors = tuple(step.survivors)
        return update.decode(step.values, spec, len(step.survivors))

    def report(self, epsilon: float | None) -> RoundReport:
        """Say how the round went."""
        losses = [self._losses[name] for name in self._survivors if name in self._losses]
        present = set(self._present)
        dropped = {
            name: self._dropped.get(name, self.why or "its term did not get into the sum")
            if name in present
            else "not connected"
            for name in self._setting.cohort.trainers
            if name not in self._survivors
        }
        return RoundReport(
            round=self._number,
            seconds=self._setting.clock.now() - self._started,
            survivors=self._survivors,
            dropped=dropped,
            loss=float(np.mean(losses)) if losses else None,
            epsilon=epsilon,
            bytes_up=self._up,
            bytes_down=self._down,
        )

    def _phase(self, hub: HubSum, ask: Ask, sums: SumSpec) -> None:
        """Send one phase to its parties and fold in what comes back in time."""
        setting, contribution = self._setting, ask.phase == CONTRIBUTE
        work = [self._work()] if contribution else []
        replies = exchange(
            setting.grid,
            setting.cohort.nodes,
            messages.TRAIN if contribution else messages.SUM,
            {
                name: messages.pack(self._sum_ask(sums, ask.phase, name, payload), *work)
                for name, payload in ask.payloads.items()
            },
            setting.plan.cohort.round_timeout,
            group=str(self._number),
            clock=setting.clock,
        )
        self._down += replies.bytes_down
        self._up += replies.bytes_up
        self._dropped.update(replies.failed)
        for name, content in replies.content.items():
            try:
                hub.receive(name, messages.unpack(content, messages.SumReply).payload)
                if contribution:
                    loss = messages.unpack(content, messages.TrainReply).loss
                    if math.isfinite(loss):
                        self._losses[name] = loss
            except (Refused, BadMessage) as error:
                self._dropped[name] = str(error)

    def _sum_ask(self, sums: SumSpec, phase: str, name: str, payload: bytes) -> messages.SumAsk:
        return messages.SumAsk(
            mode=self._setting.plan.privacy.mode,
            phase=phase,
            payload=payload,
            party=name,
            run=sums.key.run,
            round=sums.key.round,
            length=sums.length,
            bound=sums.bound,
            parties=sums.parties,
            min_survivors=sums.min_survivors,
        )

    def _work(self) -> messages.TrainAsk:
        plan, spec = self._setting.plan, self._setting.update_spec
        examples = plan.privacy.examples
        return messages.TrainAsk(
            task=plan.task,
            weights=parameters.to_bytes(self._weights),
            seed=plan.seed,
            local_epochs=plan.training.local_epochs,
            batch_size=plan.training.batch_size,
            learning_rate=plan.training.learning_rate,
            momentum=plan.training.momentum,
            clip_norm=spec.clip_norm,
            bits=spec.bits,
            noise_multiplier=spec.noise_multiplier,
            example_steps=examples.steps if examples else 0,
            example_noise_multiplier=examples.noise_multiplier if examples else 0.0,
            example_clip_norm=examples.clip_norm if examples else 0.0,
            example_sampling_rate=examples.sampling_rate if examples else 0.0,
        )
