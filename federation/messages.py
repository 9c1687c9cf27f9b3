"""What hub and device say to each other in a run, as Flower records.

Each struct is one ``ConfigRecord`` under its tag, so a message costs the fewest objects that
Flower's object store asks for, and a record that is the same for every device (the weights)
is stored once. Readers ignore fields they do not know; fields are only ever added with a
default.

Flower routes by message type: :data:`TRAIN` carries the contribution to the sum, with the
weights it starts from; :data:`SUM` every other phase of the sum; :data:`EVALUATE` and
:data:`QUERY` say their names.
"""

from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec
from flwr.app import ConfigRecord, RecordDict

from atoll.federation.errors import BadMessage
from atoll.federation.plan import CodecKind, Number
from atoll.privacy.sums import RoundKey, SumSpec
from atoll.privacy.update import Placement

TRAIN: Final = "train"
SUM: Final = "train.sum"
EVALUATE: Final = "evaluate"
QUERY: Final = "query"


class SumAsk(msgspec.Struct, frozen=True, kw_only=True, tag="sum"):
    """One phase of a private sum for one party (see :mod:`atoll.privacy.sums`).

    ``counted`` is the last round of the run whose sum this party's term is known to be in, 0 for
    none: up to it, what the device carries from round to round stands
    (:mod:`atoll.federation.kept`). It is here because :class:`TrainAsk` is one record for all.
    """

    mode: str
    phase: str
    payload: bytes
    party: str
    run: str
    round: int
    length: int
    bound: int
    parties: int
    min_survivors: int
    counted: int = 0

    @property
    def spec(self) -> SumSpec:
        """What this sum is about."""
        return SumSpec(
            key=RoundKey(self.run, self.round),
            length=self.length,
            bound=self.bound,
            parties=self.parties,
            min_survivors=self.min_survivors,
        )


class TrainAsk(msgspec.Struct, frozen=True, kw_only=True, tag="train"):
    """Local training: ``weights`` is a little-endian vector of the numbers that ``downlink`` says.

    How the update becomes a term is :class:`atoll.privacy.update.UpdateSpec`, whose fewest
    survivors the :class:`SumAsk` says; what rides is :class:`atoll.federation.riders.Riders`.
    ``proximal`` is μ of FedProx; with ``most_steps`` above 0 the update is divided by its effective
    steps (:func:`atoll.federation.strategies.effective_steps`).
    With ``control_scale`` above 0 gradients are corrected by control variates, of which
    ``control`` is the hub's, float32 little-endian, empty while it is zero
    (:mod:`atoll.federation.control`).
    With ``seconds`` above 0, local training ends after so many with what it has come to.
    ``layers`` says what travels and ``frozen`` digests the rest (:mod:`atoll.federation.layout`);
    the codec's fields are those of :class:`atoll.federation.plan.Codec`.
    With ``example_steps`` above 0 it is DP-SGD (:class:`atoll.federation.plan.ExamplePrivacy`).
    """

    task: str
    weights: bytes
    seed: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    clip_norm: float
    bits: int
    noise_multiplier: float
    colluders: int = 0
    noise: Placement = "distributed"
    weight_cap: int = 0
    clip_quantile: float = 0.0
    rider_noise_multiplier: float = 0.0
    example_steps: int = 0
    example_noise_multiplier: float = 0.0
    example_clip_norm: float = 0.0
    example_sampling_rate: float = 0.0
    proximal: float = 0.0
    most_steps: float = 0.0
    seconds: float = 0.0
    control: bytes = b""
    control_scale: float = 0.0
    control_retained: float = 1.0
    layers: str = ""
    frozen: str = ""
    codec: CodecKind = "none"
    codec_share: float = 1.0
    feedback: bool = False
    downlink: Number = "float32"


class EvaluateAsk(msgspec.Struct, frozen=True, kw_only=True, tag="evaluate"):
    """Evaluation of ``weights`` (float32 little-endian) on a split of the device's data.

    With layers of its own (``layers``, as in :class:`TrainAsk`), the device adds those that it
    came to in ``run``. ``batch_size``, ``learning_rate`` and ``momentum`` are those of fine-tuning.
    """

    task: str
    weights: bytes
    split: str
    run: str = ""
    seed: int = 0
    layers: str = ""
    frozen: str = ""
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.0


class QueryAsk(msgspec.Struct, frozen=True, kw_only=True, tag="query"):
    """A question whose payload this folder does not read."""

    name: str
    payload: bytes


class SumReply(msgspec.Struct, frozen=True, kw_only=True, tag="sum"):
    """A party's answer to a phase."""

    payload: bytes


class TrainReply(msgspec.Struct, frozen=True, kw_only=True, tag="train"):
    """Mean training loss over the last local epoch.

    Reported in the clear, as evaluation counts are: ε speaks of the model alone.
    """

    loss: float


class EvaluateReply(msgspec.Struct, frozen=True, kw_only=True, tag="evaluate"):
    """How the weights did on ``rows`` examples; ``loss`` is the mean cross-entropy.

    ``correct_tuned`` is how many were right after fine-tuning, -1 where there was none.
    """

    rows: int
    correct: int
    loss: float
    correct_tuned: int = -1


class QueryReply(msgspec.Struct, frozen=True, kw_only=True, tag="query"):
    """The answer to a :class:`QueryAsk`."""

    payload: bytes


Record = (
    SumAsk | TrainAsk | EvaluateAsk | QueryAsk | SumReply | TrainReply | EvaluateReply | QueryReply
)
Kind = TypeVar(
    "Kind",
    SumAsk,
    TrainAsk,
    EvaluateAsk,
    QueryAsk,
    SumReply,
    TrainReply,
    EvaluateReply,
    QueryReply,
)


def pack(*records: Record) -> RecordDict:
    """Return the content of a Flower message."""
    return RecordDict(
        {_tag(type(record)): ConfigRecord(msgspec.structs.asdict(record)) for record in records}
    )


def share(contents: Iterable[RecordDict], record: Record) -> None:
    """Add one record to all of ``contents``: it is there once, and is laid out and hashed once."""
    shared = ConfigRecord(msgspec.structs.asdict(record))
    for content in contents:
        content[_tag(type(record))] = shared


def unpack(content: RecordDict, kind: type[Kind]) -> Kind:
    """Read and validate one record; raise :class:`BadMessage` when it is missing or malformed."""
    record = content.get(_tag(kind))
    if not isinstance(record, ConfigRecord):
        raise BadMessage(f"the message carries no {_tag(kind)!r} record")
    fields = dict(record)
    fields["type"] = _tag(kind)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise BadMessage(f"{_tag(kind)} record: {error}") from error


def size(content: RecordDict) -> int:
    """Return the bytes of payload that a message carries; Flower's envelope is not counted."""
    return sum(
        len(value)
        for record in content.values()
        if isinstance(record, ConfigRecord)
        for value in record.values()
        if isinstance(value, bytes)
    )


def _tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)
