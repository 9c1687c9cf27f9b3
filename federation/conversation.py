"""One round: the hub's side of a private sum, carried by Flower messages.

The sum names the phases and the payloads; this module sends them, attaches the training
instruction to the contribution, and keeps book of who dropped out, why, and how many bytes
went over the wire.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from atoll.federation import codec, control, layout, messages, parameters, release, robust
from atoll.federation.cohort import Cohort
from atoll.federation.errors import BadMessage
from atoll.federation.exchange import Clock, converse
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.riders import Riders
from atoll.privacy import update
from atoll.privacy.errors import BadParameters, Refused, SumFailed
from atoll.privacy.keystream import Keystream
from atoll.privacy.modes import HubSession
from atoll.privacy.plain import Collected, PlainHubSession
from atoll.privacy.sums import CONTRIBUTE, Ask, HubSum, RoundKey, SumSpec, Total


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round as it went.

    ``survivors`` are the devices in the sum, none when the round was thrown away; ``dropped``
    the other trainers of the round's cohort, with the reason. ``loss`` is the mean of what
    survivors reported; ``epsilon`` what the population has spent so far. Bytes are payload of
    all devices together. ``clip_norm`` is the clipping norm that the round used. Of ``drawn``
    trainers ``connected`` were there when it began. A ``lost`` round broke off, and nothing
    else is known of it. ``accuracy`` is the share of ``evaluated`` held-back examples that the
    weights after it got right, in ``evaluate_seconds`` more; none where nobody was asked.
    """

    round: int
    seconds: float
    survivors: tuple[str, ...]
    dropped: Mapping[str, str]
    loss: float | None
    epsilon: float | None
    bytes_up: int
    bytes_down: int
    clip_norm: float
    drawn: int = 0
    connected: int = 0
    lost: bool = False
    accuracy: float | None = None
    evaluated: int = 0
    evaluate_seconds: float = 0.0


class Learned(NamedTuple):
    """What a round says: the mean update, or what a robust rule makes of them, float64 ``(n,)``.

    ``clip_norm`` is the next clipping norm, ``control`` the hub's next control variate, float32
    ``(n,)``, empty where there are none.
    """

    mean: npt.NDArray[np.float64]
    clip_norm: float
    control: Vector


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays the same through a run; ``entropy`` is what the hub's noise is drawn from.

    ``frozen`` is the digest of what nobody trains (:class:`atoll.federation.layout.Layout`).
    """

    grid: Grid
    plan: Plan
    cohort: Cohort
    run: str
    clock: Clock
    entropy: Keystream
    frozen: str = ""


class Conversation:
    """One round's conversation with those of the ``drawn`` trainers who are ``present``.

    ``counted`` is the last round of each device whose sum its term is in; it is told to it.
    ``shared`` is the hub's control variate, empty while there is none.
    """

    def __init__(
        self,
        setting: Setting,
        number: int,
        weights: Vector,
        clip_norm: float,
        drawn: Sequence[str],
        present: Sequence[str],
        counted: Mapping[str, int],
        shared: Vector,
    ) -> None:
        self._setting, self._number = setting, number
        self._weights, self._drawn = weights, drawn
        self._counted, self._shared = counted, shared
        connected = set(present)
        self._connected = len(connected)
        self._present = [name for name in drawn if name in connected]
        self._spec = release.update_spec(setting.plan, clip_norm)
        self._started = setting.clock.now()
        self._survivors: tuple[str, ...] = ()
        self._dropped: dict[str, str] = {}
        self._losses: dict[str, float] = {}
        self._up = self._down = 0
        self.why = ""
        """Why the round was thrown away, if it was."""

    def learn(self, session: HubSession) -> Learned | None:
        """Return what the devices' sum says, or none when the round is thrown away."""
        spec, plan = self._spec, self._setting.plan
        if len(self._present) < plan.cohort.min_devices:
            self.why = (
                f"drawn {len(self._drawn)}, connected of these {len(self._present)}, "
                f"needed {plan.cohort.min_devices}"
            )
            return None
        sums = SumSpec(
            key=RoundKey(self._setting.run, self._number),
            length=release.values(plan, len(self._weights)) + spec.riders,
            bound=spec.bound,
            parties=len(self._present),
            min_survivors=plan.cohort.min_devices,
        )
        try:
            hub = self._open(session, sums)
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
        noised = update.release(step.values, spec, self._setting.entropy)
        return self._spread(self._learned(update.decode(noised, spec)))

    def _spread(self, learned: Learned) -> Learned:
        """Return what was learned, of all coordinates."""
        plan, length = self._setting.plan, len(self._weights)
        sent = codec.places(plan.codec, length, plan.seed, self._setting.run, self._number)
        return learned._replace(mean=codec.spread(plan.codec, learned.mean, sent, length))

    def _open(self, session: HubSession, sums: SumSpec) -> HubSum:
        """Return the hub's side of the sum, which keeps its terms where the rule looks at them."""
        rule = self._setting.plan.aggregation.rule
        if rule == "mean":
            return session.open(sums, self._present)
        if not isinstance(session, PlainHubSession):
            raise BadParameters(f"{rule} looks at every update; only plain sums keep them")
        return session.collect(sums, self._present)

    def _combined(self, total: Collected) -> Learned:
        asked = self._setting.plan.aggregation
        made = robust.combine(total.terms, asked.rule, asked.byzantine, asked.trim)
        # The rules scale with what they are given, so that the terms need not be decoded first.
        return Learned(made / self._spec.scale, self._spec.clip_norm, self._shared)

    def _learned(self, sums: update.Sums) -> Learned:
        plan, riders = self._setting.plan, Riders.of(self._setting.plan)
        trainers = len(self._setting.cohort.trainers)
        devices = release.devices(plan, trainers, self._connected, len(self._survivors))
        mean, shared = control.following(
            plan, riders.mean(sums, self._spec, devices), self._shared, devices / trainers
        )
        clip_norm = riders.next_clip_norm(plan, self._spec.clip_norm, sums, devices)
        return Learned(mean, clip_norm, shared)

    @property
    def counted(self) -> dict[str, int]:
        """The last round of each device whose sum its term is in, this one included."""
        return {**self._counted, **dict.fromkeys(self._survivors, self._number)}

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
            round=self._number,
            seconds=self._setting.clock.now() - self._started,
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
        enough = self._setting.plan.cohort.enough
        if enough is not None and len(self._survivors) >= enough:
            return f"{enough} others were faster, and they were enough"
        return "its term did not get into the sum"

    def _phase(self, hub: HubSum, ask: Ask, sums: SumSpec) -> None:
        """Send one phase to its parties and fold in each reply as it comes."""
        setting, contribution = self._setting, ask.phase == CONTRIBUTE
        enough = setting.plan.cohort.enough if contribution else None
        taken = 0
        contents = {
            name: messages.pack(self._sum_ask(sums, ask.phase, name, payload))
            for name, payload in ask.payloads.items()
        }
        if contribution:
            messages.share(contents.values(), self.work)
        self._down += sum(messages.size(content) for content in contents.values())
        for name, content, failure in converse(
            setting.grid,
            setting.cohort.nodes,
            messages.TRAIN if contribution else messages.SUM,
            contents,
            setting.plan.cohort.round_timeout,
            group=str(self._number),
            clock=setting.clock,
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
            counted=self._counted.get(name, 0),
        )

    @property
    def work(self) -> messages.TrainAsk:
        """The instruction to train, one for all devices."""
        plan, spec, riders = self._setting.plan, self._spec, Riders.of(self._setting.plan)
        examples = plan.privacy.examples
        weights, downlink = parameters.downlink(self._weights, plan.codec.downlink)
        return messages.TrainAsk(
            task=plan.task,
            weights=weights,
            seed=plan.seed,
            local_epochs=plan.training.local_epochs,
            batch_size=plan.training.batch_size,
            learning_rate=plan.training.learning_rate,
            momentum=plan.training.momentum,
            clip_norm=spec.clip_norm,
            bits=spec.bits,
            noise_multiplier=spec.noise_multiplier,
            colluders=spec.colluders,
            noise=spec.placement,
            weight_cap=riders.weight_cap,
            clip_quantile=riders.clip_quantile,
            rider_noise_multiplier=spec.rider_noise_multiplier,
            example_steps=examples.steps if examples else 0,
            example_noise_multiplier=examples.noise_multiplier if examples else 0.0,
            example_clip_norm=examples.clip_norm if examples else 0.0,
            example_sampling_rate=examples.sampling_rate if examples else 0.0,
            proximal=plan.training.proximal,
            most_steps=riders.most_steps,
            layers=layout.encode(plan.layers),
            frozen=self._setting.frozen,
            codec=plan.codec.kind,
            codec_share=plan.codec.share or 1.0,
            feedback=plan.codec.feedback,
            downlink=downlink,
            seconds=plan.training.deadline or 0.0,
            control=parameters.to_bytes(self._shared),
            control_scale=control.scale(plan.training),
            control_retained=control.retained(plan),
        )
