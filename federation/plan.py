"""A plan: everything that decides what a federated run does, in one TOML file.

Plans are data. The same plan and seed on the in-process engine give the same model. The sections
stand in :mod:`atoll.federation.plan_training` and :mod:`~atoll.federation.plan_rounds`, what they
refuse in each other in :mod:`~atoll.federation.plan_checks`.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from atoll.federation import plan_checks
from atoll.federation.errors import BadPlan
from atoll.federation.plan_rounds import (
    RIDER_NOISE,
    Aggregation,
    Asynchrony,
    Cohort,
    ExamplePrivacy,
    Privacy,
)
from atoll.federation.plan_training import Codec, CodecKind, Layers, Number, Training
from atoll.federation.ranges import Positive

__all__ = [
    "RIDER_NOISE",
    "Aggregation",
    "Asynchrony",
    "Codec",
    "CodecKind",
    "Cohort",
    "ExamplePrivacy",
    "Layers",
    "Number",
    "Plan",
    "Privacy",
    "Training",
    "load",
    "loads",
    "read",
]

_WHERE: Final = re.compile(r" - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_FIELD: Final = re.compile(
    r"Object (?P<what>contains unknown|missing required) field `(?P<name>.*)`$"
)


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
        """Refuse what the sections say against one another."""
        plan_checks.check_privacy(self.privacy, self.cohort, self.training, self.layers)
        plan_checks.check_rule(self.aggregation, self.cohort, self.privacy, self.training)
        plan_checks.check_codec(self.codec, self.aggregation, self.privacy, self.training)
        plan_checks.check_asynchrony(
            self.asynchrony,
            self.aggregation,
            self.cohort,
            self.privacy,
            self.training,
            self.codec,
        )


def loads(text: str) -> Plan:
    """Read a plan from TOML; raise :class:`BadPlan` naming the field at fault in full."""
    try:
        values = tomllib.loads(text)
        _check_finite(values, "")
        return msgspec.convert(values, Plan)
    except tomllib.TOMLDecodeError as error:
        raise BadPlan(f"not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise BadPlan(_in_full(error)) from error


def load(path: Path) -> Plan:
    """Read a plan file; raise :class:`BadPlan` naming the file and the field at fault."""
    text = read(path)
    try:
        return loads(text)
    except BadPlan as error:
        raise BadPlan(f"{path}: {error}") from error


def read(path: Path) -> str:
    """Return the text of a plan file; raise :class:`BadPlan` if it has none.

    A byte order mark, which some editors put before UTF-8, is left out.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadPlan(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadPlan(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}), which "
            "a plan's TOML is written in: save it as UTF-8"
        ) from error


def _check_finite(values: Mapping[str, object], section: str) -> None:
    """Raise :class:`BadPlan` for TOML's inf and nan: some ranges of fields would let them pass."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_finite(value, f"{section}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise BadPlan(f"{section}{name} = {value}: a plan's numbers are finite")


def _in_full(error: msgspec.ValidationError) -> str:
    """Say what is wrong with which field, by its name as it stands in the file."""
    if isinstance(error.__cause__, ValueError):
        return str(error.__cause__)  # a section's refusal, or the plan's: it names its fields
    text = str(error)
    where = _WHERE.search(text)
    path = where["path"] if where else ""
    said = text[: where.start()] if where else text
    field = _FIELD.match(said)
    if field is None:
        return f"{path}: {said[:1].lower()}{said[1:]}"
    name = f"{path}.{field['name']}" if path else field["name"]
    if field["what"] == "missing required":
        return f"{name} is missing"
    return f"{name} is no field of a plan: leave it out, or mend its name"
