"""Refusals of a plan name its fields in full, as they stand in the file, and say what to do."""

import re

import pytest

from atoll.federation import layout, plan, release
from atoll.federation.errors import BadPlan
from atoll.privacy.errors import BadParameters

HEAD = 'name = "p"\ntask = "t"\nmodel = "m"\n'
PLAIN = 'privacy.mode = "plain"\n'
ROBUST = PLAIN + 'cohort.min_devices = 9\naggregation = { rule = "median", byzantine = 2 }\n'
ASYNC = PLAIN + "asynchrony = { buffer = 3, concurrency = 4 }\n"
EXAMPLES = (
    "[privacy.examples]\nnoise_multiplier = 1.0\nclip_norm = 1.0\nsampling_rate = 0.1\nsteps = 3\n"
)

OF_ONE_SECTION = [
    ("training.weighting = 'capped'", ["training.weight_cap", "training.weighting"]),
    ("training.server_beta2 = 0.9", ["training.server_beta2", "training.strategy"]),
    ("training.server_tau = 0.1", ["training.server_tau", "training.strategy"]),
    (
        "training = { momentum = 1.0, step_cap = 3 }",
        ["training.momentum", "training.step_cap", "training.control_steps"],
    ),
    (
        "training = { control_steps = 3, proximal = 0.1 }",
        ["training.control_steps", "training.proximal", "training.step_cap"],
    ),
    (
        "training = { learning_rate = 1.0, proximal = 9.0 }",
        ["training.learning_rate", "training.proximal"],
    ),
    ("cohort = { size = 3, sampling_rate = 0.1 }", ["cohort.size", "cohort.sampling_rate"]),
    ("cohort = { size = 1 }", ["cohort.size", "cohort.min_devices"]),
    ("cohort = { enough = 1 }", ["cohort.enough", "cohort.min_devices"]),
    ("cohort = { enough = 3, sampling_rate = 0.1 }", ["cohort.enough", "cohort.sampling_rate"]),
    (
        "privacy.rider_noise_multiplier = 1.0",
        ["privacy.rider_noise_multiplier", "privacy.noise_multiplier"],
    ),
    ("aggregation.rule = 'krum'", ["aggregation.rule", "aggregation.byzantine"]),
    (
        "aggregation = { rule = 'krum', byzantine = 1, trim = 0.1 }",
        ["aggregation.trim", "aggregation.rule"],
    ),
    ("layers.lora_rank = 2", ["layers.lora_layers", "layers.lora_rank"]),
    ("layers.lora_alpha = 2.0", ["layers.lora_alpha", "layers.lora_rank"]),
    ("codec.share = 0.5", ["codec.share", "codec.kind"]),
    ("codec.error_feedback = true", ["codec.error_feedback", "codec.kind"]),
]
BETWEEN_SECTIONS = [
    ("privacy.colluders = 2", ["privacy.colluders", "cohort.min_devices"]),
    (
        "training.step_cap = 3\n" + EXAMPLES,
        ["training.step_cap", "[privacy.examples]", "privacy.examples.steps"],
    ),
    (
        "training.deadline = 3.0\n" + EXAMPLES,
        ["training.deadline", "[privacy.examples]", "privacy.examples.steps"],
    ),
    (
        "privacy.noise_multiplier = 1.0\nlayers.fine_tune = ['a']",
        ["layers.fine_tune", "privacy.noise_multiplier"],
    ),
    ("layers.fine_tune = ['a']\n" + EXAMPLES, ["layers.fine_tune", "[privacy.examples]"]),
    ("aggregation = { rule = 'median', byzantine = 1 }", ["aggregation.rule", "privacy.mode"]),
    (
        ROBUST + "privacy.noise_multiplier = 1.0",
        ["aggregation.rule", "privacy.noise_multiplier"],
    ),
    (ROBUST + "privacy.clip = 'adaptive'", ["aggregation.rule", "privacy.clip"]),
    (
        ROBUST + "training = { weighting = 'capped', weight_cap = 3 }",
        ["aggregation.rule", "training.weighting"],
    ),
    (ROBUST + "training.step_cap = 3", ["aggregation.rule", "training.step_cap"]),
    (ROBUST + "training.control_steps = 3", ["aggregation.rule", "training.control_steps"]),
    (
        PLAIN + "aggregation = { rule = 'krum', byzantine = 2 }",
        ["aggregation.rule", "cohort.min_devices", "aggregation.byzantine"],
    ),
    (
        ROBUST.replace('"median"', '"trimmed-mean", trim = 0.1'),
        ["aggregation.trim", "cohort.min_devices"],
    ),
    (
        "codec = { kind = 'random-mask', share = 0.5 }\ntraining.control_steps = 3",
        ["codec.kind", "training.control_steps"],
    ),
    ("codec = { kind = 'top-k', share = 0.5 }", ["codec.kind", "privacy.mode"]),
    (
        PLAIN + "privacy.noise_multiplier = 1.0\ncodec = { kind = 'top-k', share = 0.5 }",
        ["codec.kind", "privacy.noise"],
    ),
    (
        ROBUST + "codec = { kind = 'top-k', share = 0.5 }",
        ["aggregation.rule", "codec.kind", "codec.error_feedback"],
    ),
    (
        ASYNC.replace("plain", "secagg"),
        ["[asynchrony]", "privacy.mode"],
    ),
    (
        ASYNC + "privacy.noise_multiplier = 1.0",
        ["[asynchrony]", "privacy.noise", "privacy.noise_multiplier"],
    ),
    (
        ASYNC + "cohort.min_devices = 3\naggregation = { rule = 'median', byzantine = 1 }",
        ["aggregation.rule", "[asynchrony]"],
    ),
    (ASYNC + "cohort.size = 3", ["cohort.size", "[asynchrony]"]),
    (ASYNC + "cohort.enough = 3", ["cohort.enough", "[asynchrony]"]),
    (ASYNC + "cohort.sampling_rate = 0.5", ["cohort.sampling_rate", "[asynchrony]"]),
    (ASYNC + "privacy.clip = 'adaptive'", ["privacy.clip", "[asynchrony]"]),
    (ASYNC + "training.control_steps = 3", ["training.control_steps", "[asynchrony]"]),
    (
        ASYNC + "codec = { kind = 'random-mask', share = 0.5 }",
        ["codec.kind", "[asynchrony]"],
    ),
    (ASYNC + "cohort.min_devices = 4", ["asynchrony.buffer", "cohort.min_devices"]),
]
OF_ONE_FIELD = [
    ("training.learning_rate = inf", ["training.learning_rate"]),
    ("privacy.budget_epsilon = inf", ["privacy.budget_epsilon"]),
    ("[privacy.examples]\nclip_norm = nan", ["privacy.examples.clip_norm"]),
    ("training.proximal = -nan", ["training.proximal"]),
    ("training.learning_rate = 1e400", ["training.learning_rate"]),
    ("rounds = 0", ["rounds"]),
    ("nonsense = 1", ["nonsense"]),
    ("privacy.mode = 'clear'", ["privacy.mode"]),
    ("privacy.noise_multiplier = -1.0", ["privacy.noise_multiplier"]),
    ("privacy.noise_multipler = 1.0", ["privacy.noise_multipler"]),
    ("privacy = 1", ["privacy"]),
    ("cohort.min_devices = 0", ["cohort.min_devices"]),
    ("cohort.labels.x = 1", ["cohort.labels"]),
    ("layers.local = [1]", ["layers.local"]),
    ("[privacy.examples]\nsteps = 1", ["privacy.examples.noise_multiplier"]),
    (EXAMPLES + "delta = 2.0", ["privacy.examples.delta"]),
    (ASYNC.replace("buffer = 3, ", ""), ["asynchrony.buffer"]),
]

SECTIONS = {
    "training": plan.Training,
    "cohort": plan.Cohort,
    "privacy": plan.Privacy,
    "privacy.examples": plan.ExamplePrivacy,
    "aggregation": plan.Aggregation,
    "layers": plan.Layers,
    "codec": plan.Codec,
    "asynchrony": plan.Asynchrony,
}
COMPOUND = {
    field for section in SECTIONS.values() for field in section.__struct_fields__ if "_" in field
}
"""Names that are no words of English, so that they can only mean the field."""


def short(said: str) -> list[str]:
    """Return the fields in ``said`` that stand there without their section."""
    return [word for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", said) if word in COMPOUND]


def is_in(name: str, said: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", said) is not None


@pytest.mark.parametrize(
    ("text", "names"), [*OF_ONE_SECTION, *BETWEEN_SECTIONS, *OF_ONE_FIELD], ids=lambda one: None
)
def test_a_refusal_names_its_fields_in_full(text: str, names: list[str]) -> None:
    with pytest.raises(BadPlan) as refused:
        plan.loads(HEAD + text)
    said = str(refused.value)
    assert [name for name in names if not is_in(name, said)] == [], said
    assert short(said) == [], said
    assert "$" not in said


@pytest.mark.parametrize(
    ("text", "trainers", "names"),
    [
        ("privacy = { noise_multiplier = 0.1, bits = 4 }", 8, ["privacy.bits"]),
        ("privacy = { noise_multiplier = 1.0, delta = 0.2 }", 8, ["privacy.delta"]),
        ("cohort.sampling_rate = 0.1", 8, ["cohort.sampling_rate", "cohort.min_devices"]),
        ("cohort.enough = 2", 8, ["cohort.enough"]),
        ("cohort.min_devices = 9", 8, ["cohort.min_devices"]),
        (ASYNC, 2, ["asynchrony.buffer"]),
        ("privacy = { noise_multiplier = 1e9, bits = 24 }", 8, ["privacy.noise_multiplier"]),
    ],
    ids=lambda one: None,
)
def test_what_does_not_fit_the_fleet_is_named_in_full(text, trainers, names) -> None:
    with pytest.raises(BadParameters) as refused:
        release.check_population(plan.loads(HEAD + text), trainers)
    said = str(refused.value)
    assert [name for name in names if not is_in(name, said)] == [], said
    assert short(said) == [], said


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252"])
def test_a_file_that_is_not_utf_8_is_named_with_the_remedy(tmp_path, encoding: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(HEAD + "# Geräte für den Versuch\n", encoding=encoding)
    for reading in (plan.load, plan.read):
        with pytest.raises(BadPlan, match="save it as UTF-8") as refused:
            reading(path)
        assert str(refused.value).startswith(f"{path} is not UTF-8")


def test_a_byte_order_mark_is_no_part_of_a_plan(tmp_path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(HEAD, encoding="utf-8-sig")
    assert plan.load(path) == plan.loads(HEAD)
    assert plan.read(path) == HEAD


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(BadPlan, match=r"cannot read .*none\.toml: No such file"):
        plan.load(tmp_path / "none.toml")


def test_the_refusals_of_layers_can_be_read_on_a_device() -> None:
    """They travel as JSON, without the plan around them."""
    with pytest.raises(layout.BadMessage, match=r"layers\.lora_layers and layers\.lora_rank"):
        layout.decode('{"lora_rank": 2}')
