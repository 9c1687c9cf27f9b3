"""One round: the hub's side of a private sum, carried by Flower messages.

The sum names the phases and the payloads; this module sends them, attaches the training
instruction to the contribution, and keeps book of who dropped out, why, and how many bytes
went over the wire.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.federation import asks, codec, control, messages, release, robust
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.errors import BadMessage
from atoll.federation.exchange import converse
from atoll.federation.parameters import Vector
from atoll.federation.riders import Riders
from atoll.federation.run import RoundReport, Run
from atoll.privacy import update
from atoll.privacy.errors import BadParameters, Refused, SumFailed
from atoll.privacy.plain import Collected, PlainHubSession
from atoll.privacy.sums import CONTRIBUTE, Ask, HubSum, RoundKey, SumSpec, Total


class Learned(NamedTuple):
    """What a round says: the mean update, or what a robust rule makes of them, float64 ``(n,)``.

    ``clip_norm`` is the next clipping norm, ``control`` the hub's next control variate, float32
    ``(n,)``, empty where there are none.
    """

    mean: npt.NDArray[np.float64]
    clip_norm: float
    control: Vector


class Conversation:
    """The conversation of the round that has begun with those of ``drawn`` who are ``present``.

    ``drawn`` are the round's trainers; ``state`` is the run's before it.
    """

    def __init__(
        self, run: Run, state: Checkpoint, drawn: Sequence[str], present: Sequence[str]
    ) -> None:
        self._run, self._state, self._drawn = run, state, drawn
        connected = set(present)
        self._connected = len(connected)
        self._present = [name for name in drawn if name in connected]
        self._spec = release.update_spec(run.plan, state.clip_norm or run.plan.privacy.clip_norm)
        self._started = run.clock.now()
        self._survivors: tuple[str, ...] = ()
        self._dropped: dict[str, str] = {}
        self._losses: dict[str, float] = {}
        self._up = self._down = 0
        self.why = ""
        """Why the round was thrown away, if it was."""

    def learn(self) -> Learned | None:
        """Return what the devices' sum says, or none when the round is thrown away."""
        spec, plan = self._spec, self._run.plan
        if len(self._present) < plan.cohort.min_devices:
            self.why = (
                f"drawn {len(self._drawn)}, connected of these {len(self._present)}, "
                f"needed {plan.cohort.min_devices}"
            )
            return None
        sums = SumSpec(
            key=RoundKey(self._run.name, self._state.begun),
            length=release.values(plan, len(self._state.weights)) + spec.riders,
            bound=spec.bound,
            parties=len(self._present),
            min_survivors=plan.cohort.min_devices,
        )
        try:
            hub = self._open(sums)
            step: Ask | Total = hub.start()
            while isinstance(step, Ask):
                self._phase(hub, step, sums)
                step = hub.advance()
        except (SumFailed, Refused) as error:
            self.why = str(error)
            return None
        self._survivors = tuple(step.survivors)
        if isinstance(step, Collected):
            return self._spread(self._combined(step))
        noised = update.release(step.values, spec, self._run.entropy)
        return self._spread(self._learned(update.decode(noised, spec)))

    def _spread(self, learned: Learned) -> Learned:
        """Return what was learned, of all coordinates."""
        plan, length = self._run.plan, len(self._state.weights)
        sent = codec.places(plan.codec, length, plan.seed, self._run.name, self._state.begun)
        return learned._replace(mean=codec.spread(plan.codec, learned.mean, sent, length))

    def _open(self, sums: SumSpec) -> HubSum:
        """Return the hub's side of the sum, which keeps its terms where the rule looks at them."""
        rule, session = self._run.plan.aggregation.rule, self._run.session
        if rule == "mean":
            return session.open(sums, self._present)
        if not isinstance(session, PlainHubSession):
            raise BadParameters(f"{rule} looks at every update; only plain sums keep them")
        return session.collect(sums, self._present)

    def _combined(self, total: Collected) -> Learned:
        asked = self._run.plan.aggregation
        made = robust.combine(total.terms, asked.rule, asked.byzantine, asked.trim)
        # The rules scale with what they are given, so that the terms need not be decoded first.
        return Learned(made / self._spec.scale, self._spec.clip_norm, self._state.control)

    def _learned(self, sums: update.Sums) -> Learned:
        plan, riders = self._run.plan, Riders.of(self._run.plan)
        trainers = len(self._run.cohort.trainers)
        devices = release.devices(plan, trainers, self._connected, len(self._survivors))
        mean, shared = control.following(
            plan, riders.mean(sums, self._spec, devices), self._state.control, devices / trainers
        )
        clip_norm = riders.next_clip_norm(plan, self._spec.clip_norm, sums, devices)
        return Learned(mean, clip_norm, shared)

    @property
    def counted(self) -> dict[str, int]:
        """The last round of each device whose sum its term is in, this one included."""
        return {**self._state.counted, **dict.fromkeys(self._survivors, self._state.begun)}

    def report(self, epsilon: float | None) -> RoundReport:
        """Say how the round went."""
        losses = [self._losses[name] for name in self._survivors if name in self._losses]
        present = set(self._present)
        dropped = {
            name: self._dropped.get(name, self.why or self._late)
            if name in present
            else "not connected"
            for name in self._drawn
            if name not in self._survivors
        }
        return RoundReport(
            round=self._state.begun,
            seconds=self._run.clock.now() - self._started,
            survivors=self._survivors,
            dropped=dropped,
            loss=float(np.mean(losses)) if losses else None,
            epsilon=epsilon,
            bytes_up=self._up,
            bytes_down=self._down,
            clip_norm=self._spec.clip_norm,
            drawn=len(self._drawn),
            connected=len(self._present),
        )

    @property
    def _late(self) -> str:
        """Say why a device that did not fail is not in the sum."""
        enough = self._run.plan.cohort.enough
        if enough is not None and len(self._survivors) >= enough:
            return f"{enough} others were faster, and they were enough"
        return "its term did not get into the sum"

    def _phase(self, hub: HubSum, ask: Ask, sums: SumSpec) -> None:
        """Send one phase to its parties and fold in each reply as it comes."""
        run, contribution = self._run, ask.phase == CONTRIBUTE
        enough = run.plan.cohort.enough if contribution else None
        taken = 0
        contents = {
            name: messages.pack(asks.term(run, self._state, sums, ask, name))
            for name in ask.payloads
        }
        if contribution:
            messages.share(contents.values(), asks.training(run, self._state, self._spec))
        self._down += sum(messages.size(content) for content in contents.values())
        for name, content, failure in converse(
            run.grid,
            run.cohort.nodes,
            messages.TRAIN if contribution else messages.SUM,
            contents,
            run.plan.cohort.round_timeout,
            group=str(self._state.begun),
            clock=run.clock,
        ):
            if content is None:
                self._dropped[name] = failure
                continue
            self._up += messages.size(content)
            try:
                hub.receive(name, messages.unpack(content, messages.SumReply).payload)
                if contribution:
                    loss = messages.unpack(content, messages.TrainReply).loss
                    if math.isfinite(loss):
                        self._losses[name] = loss
                taken += 1
            except (Refused, BadMessage) as error:
                self._dropped[name] = str(error)
            if taken == enough:
                break
