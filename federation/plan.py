"""A plan: everything that decides what a federated run does, in one TOML file.

Plans are data. The same plan and seed on the in-process engine give the same model.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from atoll.federation.errors import BadPlan

Positive = Annotated[int, Meta(ge=1)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one device does in one round."""

    local_epochs: Positive = 1
    batch_size: Positive = 32
    learning_rate: PositiveFloat = 0.05
    momentum: NonNegativeFloat = 0.9
    server_learning_rate: PositiveFloat = 1.0
    server_momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """How much of the last step the next one keeps (FedAvgM, Hsu et al., arXiv 1909.06335).

    It works on sums that are decoded already, so it costs no privacy.
    """
    averaged_rounds: Positive = 1
    """The result is the mean of the weights after each of the last so many rounds.

    Weights near the end circle around where they belong, noise keeps them circling, and the
    mean lies closer (Polyak and Juditsky 1992; for noised training De et al., arXiv
    2204.13650). It costs no privacy either.
    """


class Cohort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who takes part: devices carrying all of ``labels`` train; all devices evaluate."""

    labels: dict[str, str] = {}
    min_devices: Positive = 2
    """Fewer survivors than this and a round is thrown away."""
    round_timeout: PositiveFloat = 120.0
    """Seconds before a device that has not answered counts as dropped out."""


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
    """

    mode: Literal["plain", "he"] = "he"
    clip_norm: PositiveFloat = 1.0
    bits: Annotated[int, Meta(ge=4, le=24)] = 16
    """Bits of one quantised value, sign included."""
    noise_multiplier: NonNegativeFloat = 0.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    budget_epsilon: PositiveFloat | None = None
    """Refuse rounds past this ε; none records without refusing."""
    examples: ExamplePrivacy | None = None
    """Protects each example besides, on the device; composes with the noise for a device."""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A federated run."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    task: str
    model: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """The name under which the trained model is published."""
    rounds: Positive = 10
    seed: int = 0
    training: Training = Training()
    cohort: Cohort = Cohort()
    privacy: Privacy = Privacy()


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
