"""What devices train and what of it they send: the sections training, layers and codec of a plan.

Each section refuses by itself what its own fields say against one another; messages name fields
in full, as they stand in the file.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from atoll.federation.ranges import NonNegativeFloat, Positive, PositiveFloat

CodecKind = Literal["none", "random-mask", "top-k"]
Number = Literal["float32", "float16"]


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
                'training.weight_cap belongs to training.weighting = "capped": give both or '
                "neither of them"
            )
        if self.server_beta2 is not None and self.strategy not in ("fedadam", "fedyogi"):
            raise ValueError(
                f"training.server_beta2 belongs to fedadam and fedyogi; {self.strategy} keeps no "
                "moving second moment: leave it out, or change training.strategy"
            )
        if self.server_tau is not None and self.strategy == "fedavg":
            raise ValueError(
                "training.server_tau belongs to fedadam, fedyogi and fedadagrad; fedavg adapts "
                "nothing: leave it out, or change training.strategy"
            )
        if self.momentum >= 1 and (self.step_cap is not None or self.control_steps is not None):
            raise ValueError(
                f"training.momentum = {self.momentum:g} never lets a gradient go, so steps have no "
                "weights to divide an update by: lower it, or leave training.step_cap and "
                "training.control_steps out"
            )
        if self.control_steps is not None and (self.proximal or self.step_cap is not None):
            raise ValueError(
                "training.control_steps corrects what training.proximal and training.step_cap make "
                "up for, and reckons with neither: leave those out, or training.control_steps"
            )
        if self.learning_rate * self.proximal >= 2 * (1 + self.momentum):
            raise ValueError(
                f"training.proximal = {self.proximal:g} at training.learning_rate = "
                f"{self.learning_rate:g} pulls past where it pulls to, farther with each step: "
                "lower either of them"
            )


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
            raise ValueError(
                "layers.lora_layers and layers.lora_rank belong together: give both or neither"
            )
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(
                "layers.lora_alpha scales adapters, and there are none: give layers.lora_layers "
                "and layers.lora_rank, or leave it out"
            )


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
                'codec.share belongs to codec.kind = "random-mask" and "top-k": give both or '
                "neither of them"
            )
        if self.kind == "none" and self.error_feedback:
            raise ValueError(
                "codec.error_feedback without codec.kind: nothing is left out to be fed back; "
                "give codec.kind, or leave it out"
            )

    @property
    def feedback(self) -> bool:
        """Whether devices keep what they did not send."""
        return self.kind == "top-k" if self.error_feedback is None else self.error_feedback
