"""Whose updates are in a step, how they are hidden, and what the hub makes of them.

The sections cohort, privacy, aggregation and asynchrony of a plan. Each section refuses by itself
what its own fields say against one another; messages name fields in full, as they stand in the
file.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from atoll.federation.ranges import NonNegativeFloat, Positive, PositiveFloat
from atoll.federation.rule import Rule
from atoll.privacy.mode import Mode

RIDER_NOISE: Final = 5.0
"""Noise multiplier of a rider over that of the update, unless the plan says otherwise."""


class Cohort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who takes part: devices carrying all of ``labels`` train; all devices evaluate.

    With a ``sampling_rate`` each round draws its cohort (Poisson sampling): every enrolled
    trainer, connected or not, is in with that probability, independently of the others. Those
    of them who are connected take part. A cohort below ``min_devices`` is not waited for: the
    round is thrown away, and charged, as any other that ends below it.

    Sampling lowers ε where nobody can tell who took part (amplification). So the ledger counts
    on it only under ``noise = "central"``, with a mean over the *expected* cohort and with
    ``min_devices`` far enough below that (:func:`atoll.federation.release.amplification`). What
    it says then holds against those who see the released models and nothing else. It does not
    hold against the hub, which draws the cohort, nor, in the modes whose devices see each
    other's names, against the devices of a round: against them a round costs what it would
    without sampling.
    """

    labels: dict[str, str] = {}
    min_devices: Positive = 2
    """Fewer survivors than this and a round is thrown away."""
    round_timeout: PositiveFloat = 120.0
    """Seconds before a device that has not answered counts as dropped out."""
    enough: Positive | None = None
    """So many contributions end a round's wait for more; who has not answered yet drops out.

    The round is then as fast as its ``enough`` fastest devices, and slow ones take part less
    often. Below the size of the cohort, that is over-selection (Bonawitz et al., MLSys 2019, ask
    130 %). None: everyone is waited for, ``round_timeout`` at most.
    """
    sampling_rate: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Probability with which an enrolled trainer is in a round's cohort; none: everyone is."""
    rule: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    """Which of them may train, in CEL over what is known of each (``device.power == "mains"``).

    Looked at anew before each round; whoever falls short sits it out, and a fact that is not known
    leaves its device out. The facts are the hub's (:mod:`atoll.server.cohort_rule`). With a
    ``sampling_rate`` rounds are charged in full.
    """
    size: Positive | None = None
    """At most so many trainers a round, in turns: those who were asked least come first."""

    def __post_init__(self) -> None:
        """Refuse turns that are to be secret, and rounds that could never be large enough."""
        self._check_size()
        self._check_enough()

    def _check_size(self) -> None:
        if self.size is None:
            return
        if self.sampling_rate is not None:
            raise ValueError(
                "cohort.size takes devices in turns and cohort.sampling_rate draws them, so that "
                "nobody can tell whose turn it is: leave one of them out"
            )
        if self.size < self.min_devices:
            raise ValueError(
                f"cohort.size = {self.size} is below cohort.min_devices = {self.min_devices}: "
                "every round would be thrown away; raise cohort.size or lower cohort.min_devices"
            )

    def _check_enough(self) -> None:
        if self.enough is None:
            return
        if self.enough < self.min_devices:
            raise ValueError(
                f"cohort.enough = {self.enough} ends a round below cohort.min_devices = "
                f"{self.min_devices}: raise it, or leave it out"
            )
        if self.sampling_rate is not None:
            raise ValueError(
                "with cohort.enough, who is in a round depends on how fast the others are, and "
                "cohort.sampling_rate promises that it does not: leave one of them out"
            )

    @property
    def picks(self) -> bool:
        """Whether a round may leave out trainers that are there, other than by a secret draw."""
        return self.rule is not None or self.size is not None

    def in_a_round(self, trainers: int) -> int:
        """Return how many of so many trainers a round has at most."""
        return trainers if self.size is None else min(self.size, trainers)


class ExamplePrivacy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """DP-SGD on the device: each example is protected, whoever sees the device's update.

    Local training is then ``steps`` steps on Poisson samples instead of epochs, and
    ``training.batch_size`` is the most examples worked on at once
    (:mod:`atoll.federation.example_privacy`).
    """

    noise_multiplier: Annotated[float, Meta(gt=0, le=64)]
    """σ of the noise on each step's sum of clipped gradients, over ``clip_norm``."""
    clip_norm: PositiveFloat
    """Largest L2 norm of one example's gradient."""
    sampling_rate: Annotated[float, Meta(gt=0, le=1)]
    """Probability with which an example is in a step's batch, independently of all others."""
    steps: Positive
    """Steps per round."""
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    budget_epsilon: PositiveFloat | None = None
    """Refuse rounds past this ε of an example; none records without refusing."""


class Privacy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How updates are hidden, bounded and noised, and what may be spent.

    ``noise_multiplier`` is σ of the noise on the *sum* over ``clip_norm`` (L2), held for the
    minimum number of survivors; 0 turns noise off and the run has no ε.

    ``noise`` says who adds it. ``distributed``: every device a share, so that nobody ever sees
    a sum without noise. ``central``: the hub, to the sum that it has opened. That is less noise
    when more than the minimum survive, and ε then holds against those who see the models; the
    hub, and in ``he`` the two devices that open the sum, see it bare.
    """

    mode: Mode = "secagg"
    clip_norm: PositiveFloat = 1.0
    bits: Annotated[int, Meta(ge=4, le=24)] = 16
    """Bits of one quantised value, sign included."""
    noise_multiplier: NonNegativeFloat = 0.0
    noise: Literal["distributed", "central"] = "distributed"
    colluders: Annotated[int, Meta(ge=0)] = 0
    """Devices that may pool what they know: they know, and could subtract, their own noise.

    The others' shares alone make up the noise then. Central noise has no shares to know.
    """
    clip: Literal["fixed", "adaptive"] = "fixed"
    """``adaptive``: ``clip_norm`` is where the clipping norm starts, and it follows the norm
    below which ``clip_quantile`` of the updates lie (Andrew, Thakkar, McMahan and Ramaswamy,
    NeurIPS 2021), by a factor of exp(-``clip_rate``·(share - ``clip_quantile``)) a round.
    """
    clip_quantile: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    clip_rate: PositiveFloat = 0.2
    rider_noise_multiplier: PositiveFloat | None = None
    """σ of the noise on a number that rides in the sum, over that number's sensitivity.

    None: five times ``noise_multiplier``. One rider then lowers the multiplier that the ledger
    is charged with by 2 %, two by 4 %.
    """
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    budget_epsilon: PositiveFloat | None = None
    """Refuse rounds past this ε; none records without refusing."""
    telemetry_noise: NonNegativeFloat = 0.0
    """The noise multiplier of what devices that serve the model count, per served row; 0 is off."""
    examples: ExamplePrivacy | None = None
    """Protects each example besides, on the device; composes with the noise for a device."""

    def __post_init__(self) -> None:
        """Refuse noise on riders where the update has none."""
        if self.rider_noise_multiplier is not None and not self.noise_multiplier:
            raise ValueError(
                "privacy.rider_noise_multiplier without privacy.noise_multiplier protects "
                "nothing: set privacy.noise_multiplier, or leave both out"
            )

    @property
    def rider_noise(self) -> float:
        """σ of the noise on a rider over its sensitivity; 0 without noise."""
        if self.rider_noise_multiplier is not None:
            return self.rider_noise_multiplier
        return RIDER_NOISE * self.noise_multiplier


class Aggregation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the hub makes of a round's updates: their mean, or what withstands lying devices.

    Rules other than the mean look at every update (:mod:`atoll.federation.robust`), so they work
    in ``plain`` alone, without noise for a device (one device may move their result further
    than a mean, so ε would be wrong) and without weights or an adaptive clipping norm, which
    devices could lie about. Noise on examples is the device's own and goes with all of them.
    """

    rule: Rule = "mean"
    byzantine: Annotated[int, Meta(ge=0)] = 0
    """How many devices of a round may send anything; a round needs as many more as withstand it."""
    trim: Annotated[float, Meta(gt=0, lt=0.5)] | None = None
    """Share of a trimmed mean's values cut off at either end; none: ``byzantine`` of them."""

    def __post_init__(self) -> None:
        """Refuse a rule against nobody, and a number that would be ignored."""
        if (self.rule == "mean") != (self.byzantine == 0):
            raise ValueError(
                f'aggregation.rule = "{self.rule}" with aggregation.byzantine = {self.byzantine}: '
                "a mean withstands no lying device, and any other rule has to know how many to "
                "withstand"
            )
        if self.trim is not None and self.rule != "trimmed-mean":
            raise ValueError(
                'aggregation.trim belongs to aggregation.rule = "trimmed-mean", not to '
                f'"{self.rule}": leave it out'
            )


class Asynchrony(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FedBuff (Nguyen et al., AISTATS 2022): nobody waits for anybody's round to end.

    Devices train on the weights there are when they are asked, and the hub steps whenever
    ``buffer`` updates have come in (:mod:`atoll.federation.buffered`). ``rounds`` counts steps.
    """

    buffer: Positive
    """K: so many updates make a step."""
    concurrency: Positive
    """M: so many devices train at a time."""
    max_staleness: Annotated[int, Meta(ge=0)] | None = None
    """An update that is more steps old than this is dropped; none: however old, it counts."""
