"""A plan: everything that decides what a federated run does, in one TOML file.

Plans are data. The same plan and seed on the in-process engine give the same model.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from atoll.federation.errors import BadPlan
from atoll.federation.rule import Rule, needed
from atoll.privacy.mode import Mode

Positive = Annotated[int, Meta(ge=1)]
CodecKind = Literal["none", "random-mask", "top-k"]
Number = Literal["float32", "float16"]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]


RIDER_NOISE: Final = 5.0
"""Noise multiplier of a rider over that of the update, unless the plan says otherwise."""


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one device does in one round, and what the hub makes of the mean."""

    local_epochs: Positive = 1
    batch_size: Positive = 32
    learning_rate: PositiveFloat = 0.05
    momentum: NonNegativeFloat = 0.9
    proximal: NonNegativeFloat = 0.0
    """μ of FedProx (Li et al., MLSys 2020): μ/2·‖w - w₀‖² is added to the local loss."""
    step_cap: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    """FedNova (Wang et al., NeurIPS 2020): an update is divided by its effective local steps.

    Devices with more data take more steps and would pull the mean their way. The mean of what
    is divided is multiplied by the mean number of effective steps, which rides in the same sum
    (:mod:`atoll.federation.riders`); a device of more steps than ``step_cap`` counts there as one
    of so many. ``privacy.clip_norm`` is then that of one effective step. None: nothing is divided.
    """
    control_steps: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    """SCAFFOLD (Karimireddy et al., ICML 2020): gradients are corrected for how devices differ.

    A device then keeps a control variate from round to round, and its change rides behind the
    update in a term twice as long (:mod:`atoll.federation.control`). So many local steps are those
    of an ordinary device; they make the change as long as the update. None: nothing is corrected.
    """
    deadline: PositiveFloat | None = None
    """Seconds of local training after which a device sends what it has come to (partial work).

    A slow device then takes fewer steps instead of dropping out, as FedProx has it (Li et al.,
    MLSys 2020, definition 2). With ``step_cap`` what it sends counts as much as others' updates.
    A run with a deadline is not repeatable. None: all epochs, however long they take.
    """
    strategy: Literal["fedavg", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    """What the hub makes of the mean update (:mod:`atoll.federation.strategies`).

    It works on sums that are decoded already, so it costs no privacy.
    """
    server_learning_rate: PositiveFloat | None = None
    """η of the strategy; none: 1 for ``fedavg``, 0.1 for the others."""
    server_momentum: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """β1: how much of the last step the next one keeps; with ``fedavg`` it makes FedAvgM.

    None: 0.9 for ``fedadam`` and ``fedyogi``, 0 for the others.
    """
    server_beta2: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """How much of the last second moment the next one keeps; none: 0.99."""
    server_tau: PositiveFloat | None = None
    """τ: root second moments well below it hardly count. None: 1e-3."""
    averaged_rounds: Positive = 1
    """The result is the mean of the weights after each of the last so many rounds.

    Weights near the end circle around where they belong, noise keeps them circling, and the
    mean lies closer (Polyak and Juditsky 1992; for noised training De et al., arXiv
    2204.13650). It costs no privacy either.
    """

    weighting: Literal["equal", "capped"] = "equal"
    """How much a device's update counts in the mean.

    ``equal``: as much as any other. ``capped``: w = min(examples, ``weight_cap``) /
    ``weight_cap``, so that the mean is Σw·Δ/Σw; being at most one, w is inside the sensitivity.
    Σw rides in the same sum with noise of its own (:mod:`atoll.federation.riders`).
    """
    weight_cap: Positive | None = None
    """Examples from which on a device's weight is one."""

    def __post_init__(self) -> None:
        """Refuse what would be ignored, and a proximal term that diverges by itself."""
        if (self.weighting == "capped") != (self.weight_cap is not None):
            raise ValueError(
                'weight_cap belongs to weighting = "capped": give both or neither of them'
            )
        if self.server_beta2 is not None and self.strategy not in ("fedadam", "fedyogi"):
            raise ValueError(
                f"server_beta2 belongs to fedadam and fedyogi; {self.strategy} keeps no moving "
                "second moment: leave it out, or change strategy"
            )
        if self.server_tau is not None and self.strategy == "fedavg":
            raise ValueError(
                "server_tau belongs to fedadam, fedyogi and fedadagrad; fedavg adapts nothing: "
                "leave it out, or change strategy"
            )
        if self.momentum >= 1 and (self.step_cap is not None or self.control_steps is not None):
            raise ValueError(
                f"momentum = {self.momentum:g} never lets a gradient go, so steps have no weights "
                "to divide an update by: lower momentum, or leave step_cap and control_steps out"
            )
        if self.control_steps is not None and (self.proximal or self.step_cap is not None):
            raise ValueError(
                "control_steps corrects what proximal and step_cap make up for, and reckons with "
                "neither: leave those out, or control_steps"
            )
        if self.learning_rate * self.proximal >= 2 * (1 + self.momentum):
            raise ValueError(
                f"proximal = {self.proximal:g} at learning_rate = {self.learning_rate:g} pulls "
                "past where it pulls to, farther with each step: lower either of them"
            )


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
                "size takes devices in turns and sampling_rate draws them, so that nobody can "
                "tell whose turn it is: leave one of them out"
            )
        if self.size < self.min_devices:
            raise ValueError(
                f"size = {self.size} is below min_devices = {self.min_devices}: every round would "
                "be thrown away; raise size or lower min_devices"
            )

    def _check_enough(self) -> None:
        if self.enough is None:
            return
        if self.enough < self.min_devices:
            raise ValueError(
                f"enough = {self.enough} ends a round below min_devices = {self.min_devices}: "
                "raise enough, or leave it out"
            )
        if self.sampling_rate is not None:
            raise ValueError(
                "with enough, who is in a round depends on how fast the others are, and "
                "sampling_rate promises that it does not: leave one of them out"
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
                "rider_noise_multiplier without noise_multiplier protects nothing: "
                "set noise_multiplier, or leave both out"
            )

    @property
    def rider_noise(self) -> float:
        """σ of the noise on a rider over its sensitivity; 0 without noise."""
        if self.rider_noise_multiplier is not None:
            return self.rider_noise_multiplier
        return RIDER_NOISE * self.noise_multiplier


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
                f'rule = "{self.rule}" with byzantine = {self.byzantine}: a mean withstands no '
                "lying device, and any other rule has to know how many to withstand"
            )
        if self.trim is not None and self.rule != "trimmed-mean":
            raise ValueError(f'trim belongs to rule = "trimmed-mean", not to "{self.rule}"')


class Layers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the model's weights devices train, and which of these they keep to themselves.

    Patterns name entries of the model's state dict (``head.*``), as :mod:`fnmatch` reads them;
    ``batchnorm`` stands for all that belongs to layers which normalise over a batch. What they
    come to is :mod:`atoll.federation.layout`.
    """

    local: tuple[str, ...] = ()
    """Trained, and never leave the device (FedPer, Arivazhagan et al. 2019; FedBN, Li et al. 2021).

    A run with such layers publishes no model: what it has is not whole.
    """
    trained: tuple[str, ...] = ()
    """These alone are trained, and travel; others stay as the task's model has them. None: all."""
    lora_layers: tuple[str, ...] = ()
    """Layers whose weights stay as they are and get low-rank adapters (LoRA, Hu et al. 2021).

    The adapters are trained and travel, and besides them what ``trained`` and ``local`` name.
    """
    lora_rank: Positive | None = None
    lora_alpha: PositiveFloat | None = None
    """α: what an adapter adds is scaled by α over the rank. None: the rank, so by one."""
    fine_tune: tuple[str, ...] = ()
    """At evaluation a device trains these on, with its own examples, and tells both accuracies."""
    fine_tune_epochs: Positive = 1

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if bool(self.lora_layers) != (self.lora_rank is not None):
            raise ValueError("lora_layers and lora_rank belong together: give both or neither")
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("lora_alpha scales adapters, and there are none: give lora_rank")


class Codec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How updates, and the weights that devices start from, are made smaller on their way.

    See :mod:`atoll.federation.codec`.
    """

    kind: CodecKind = "none"
    """``random-mask``: a share of the coordinates, drawn anew each round, the same for all devices
    (Konečný et al. 2016). ``top-k``: each device's own largest."""
    share: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Which share of the coordinates a device sends."""
    error_feedback: bool | None = None
    """Whether a device keeps what it did not send, and adds it to its next update.

    None: with ``top-k``, which goes wrong without, and not with ``random-mask``.
    """
    downlink: Number = "float32"
    """As what numbers weights travel to the devices in training."""

    def __post_init__(self) -> None:
        """Refuse a share of nothing, and feedback where nothing is left out."""
        if (self.kind == "none") != (self.share is None):
            raise ValueError(
                'share belongs to kind = "random-mask" and "top-k": give both or neither of them'
            )
        if self.kind == "none" and self.error_feedback:
            raise ValueError("error_feedback without a kind: nothing is left out to be fed back")

    @property
    def feedback(self) -> bool:
        """Whether devices keep what they did not send."""
        return self.kind == "top-k" if self.error_feedback is None else self.error_feedback


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A federated run."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    task: str
    model: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """The name under which the trained model is published."""
    rounds: Positive = 10
    evaluate_every: Positive | None = None
    """Ask all devices for the accuracy after every so many trained rounds; none: at the end alone.

    It costs a message with the weights to each device, and what they answer, examples and how
    many were right, comes in the clear and without noise (:mod:`atoll.federation.interim`).
    """
    seed: int = 0
    training: Training = Training()
    cohort: Cohort = Cohort()
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    layers: Layers = Layers()
    codec: Codec = Codec()
    asynchrony: Asynchrony | None = None
    """Steps without rounds; none: a round ends before the next one begins."""
    gates: dict[str, str] = {}
    """Rules that a candidate must pass besides the hub's own, by name, in CEL over the run's facts.

    Such as ``"fair to both sides" = "fairness.equalised_odds <= 0.1"``.
    """

    def __post_init__(self) -> None:
        """Refuse a round of colluders alone, a step cap without a meaning, an idle rule."""
        if self.privacy.colluders >= self.cohort.min_devices:
            raise ValueError(
                f"privacy.colluders = {self.privacy.colluders} must be below "
                f"cohort.min_devices = {self.cohort.min_devices}: nobody would be left to add "
                "noise; raise min_devices"
            )
        if self.training.step_cap is not None and self.privacy.examples is not None:
            raise ValueError(
                "training.step_cap evens out devices of unequal steps, and under "
                "[privacy.examples] all take privacy.examples.steps: leave training.step_cap out"
            )
        if self.training.deadline is not None and self.privacy.examples is not None:
            raise ValueError(
                "training.deadline ends local epochs, and under [privacy.examples] a device "
                "takes privacy.examples.steps: leave training.deadline out"
            )
        if self.aggregation.rule != "mean":
            _check_rule(self)
        if self.codec.kind != "none":
            _check_codec(self)
        if self.layers.fine_tune and (self.privacy.noise_multiplier or self.privacy.examples):
            raise ValueError(
                "layers.fine_tune tells how a model does that was tuned on a device's examples, "
                "without noise and off the ledger: leave it out, or the noise"
            )
        if self.asynchrony is not None:
            _check_asynchrony(self, self.asynchrony)


def _check_rule(plan: Plan) -> None:
    """Refuse a robust rule where it sees no updates, or where its result would be another's."""
    asked, least = plan.aggregation, plan.cohort.min_devices
    rule = f'aggregation.rule = "{asked.rule}"'
    if plan.privacy.mode != "plain":
        raise ValueError(
            f'{rule} looks at every update and in mode "{plan.privacy.mode}" the hub sees none: '
            'use privacy.mode = "plain", where devices allow it, or leave the rule out'
        )
    if plan.privacy.noise_multiplier:
        raise ValueError(
            f"{rule} with noise_multiplier = {plan.privacy.noise_multiplier:g}: that noise is "
            "calibrated for a mean, and one device may move this rule's result further; "
            "set noise_multiplier = 0, or leave the rule out"
        )
    if (
        plan.training.weighting != "equal"
        or plan.privacy.clip != "fixed"
        or plan.training.step_cap is not None
        or plan.training.control_steps is not None
    ):
        raise ValueError(
            f'{rule} takes every device for one: use weighting = "equal" and clip = "fixed", '
            "and leave control_steps and step_cap out"
        )
    fewest = needed(asked.rule, asked.byzantine)
    if least < fewest:
        raise ValueError(
            f"{rule} against {asked.byzantine} lying devices needs {fewest} updates or more: "
            f"raise cohort.min_devices (now {least}) or lower byzantine"
        )
    if asked.trim is not None and asked.trim * least + 1e-9 < asked.byzantine:
        raise ValueError(
            f"trim = {asked.trim:g} of {least} devices is less than the {asked.byzantine} that "
            "may lie: raise trim or cohort.min_devices"
        )


def _check_codec(plan: Plan) -> None:
    """Refuse a codec where it would tell too much, save nothing, or lose what it keeps."""
    privacy, top = plan.privacy, plan.codec.kind == "top-k"
    if plan.training.control_steps is not None:
        raise ValueError(
            f'codec.kind = "{plan.codec.kind}" with training.control_steps: control variates are '
            "means of whole gradients; leave one of them out"
        )
    if top and privacy.mode != "plain":
        raise ValueError(
            f'codec.kind = "top-k" in mode "{privacy.mode}": which coordinates a device sends '
            "tells of its data, and masked or encrypted terms all have the model's length; use "
            '"random-mask", or privacy.mode = "plain", where devices allow it'
        )
    if top and privacy.noise_multiplier and privacy.noise == "distributed":
        raise ValueError(
            'codec.kind = "top-k" with distributed noise: it falls on every coordinate, and then '
            'all would be sent; use noise = "central", or "random-mask"'
        )
    if plan.aggregation.rule != "mean" and (top or plan.codec.feedback):
        raise ValueError(
            f'aggregation.rule = "{plan.aggregation.rule}" leaves updates out, and no device '
            'learns whether its own: use codec.kind = "random-mask" without error_feedback'
        )


def _check_asynchrony(plan: Plan, asked: Asynchrony) -> None:
    """Refuse what needs a cohort, or one version of everything that devices are told."""
    if plan.privacy.mode != "plain":
        raise ValueError(
            f'[asynchrony] folds updates in one by one, and mode "{plan.privacy.mode}" opens the '
            'sum of a cohort that is known before: use privacy.mode = "plain", where devices allow '
            "it, or leave [asynchrony] out"
        )
    if plan.privacy.noise_multiplier and plan.privacy.noise != "central":
        raise ValueError(
            "[asynchrony] weighs updates after devices have sent them, their noise too, which "
            'would then be less than accounted for: use noise = "central", or no noise'
        )
    kept_out = {
        "aggregation.rule": plan.aggregation.rule != "mean",
        "cohort.size": plan.cohort.size is not None,
        "cohort.enough": plan.cohort.enough is not None,
        "cohort.sampling_rate": plan.cohort.sampling_rate is not None,
        'privacy.clip = "adaptive"': plan.privacy.clip != "fixed",
        "training.control_steps": plan.training.control_steps is not None,
        # Masks are a round's, and the hub's weight leaves a part that no device would keep.
        "codec.kind": plan.codec.kind != "none",
    }
    for name, used in kept_out.items():
        if used:
            raise ValueError(f"{name} is for rounds: leave it out, or [asynchrony]")
    if asked.buffer < plan.cohort.min_devices:
        raise ValueError(
            f"asynchrony.buffer = {asked.buffer} is below cohort.min_devices = "
            f"{plan.cohort.min_devices}: raise buffer"
        )


def loads(text: str) -> Plan:
    """Read a plan from TOML; raise :class:`BadPlan` naming the field at fault."""
    try:
        return msgspec.convert(tomllib.loads(text), Plan)
    except tomllib.TOMLDecodeError as error:
        raise BadPlan(f"not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise BadPlan(str(error)) from error


def load(path: Path) -> Plan:
    """Read a plan file; raise :class:`BadPlan` naming the file and the field at fault."""
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadPlan(f"cannot read {path}: {error.strerror}") from error
    except (BadPlan, UnicodeDecodeError) as error:
        raise BadPlan(f"{path}: {error}") from error
