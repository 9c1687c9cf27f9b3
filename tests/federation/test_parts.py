"""Weights as vectors, message records, plans, and the exchange's book-keeping."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch
from blobs import Blobs
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.federation import messages, parameters, plan, task, training
from atoll.federation.errors import BadMessage, BadPlan, DataMissing, TaskMissing
from atoll.federation.exchange import FASTEST_POLL, poll_delay
from atoll.federation.flower import TlsFiles, superexec_command, superlink_command
from atoll.federation.plan import CodecKind, Number
from atoll.privacy.update import Placement

KINDS = (
    messages.SumAsk,
    messages.TrainAsk,
    messages.EvaluateAsk,
    messages.QueryAsk,
    messages.SumReply,
    messages.TrainReply,
    messages.EvaluateReply,
    messages.QueryReply,
)
VALUES = {
    str: st.text(max_size=20),
    bytes: st.binary(max_size=50),
    int: st.integers(0, 2**62),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    **{kind: st.sampled_from(get_args(kind)) for kind in (Placement, CodecKind, Number)},
}


def records() -> st.SearchStrategy[messages.Record]:
    return st.one_of(
        st.builds(
            kind, **{field.name: VALUES[field.type] for field in msgspec.structs.fields(kind)}
        )
        for kind in KINDS
    )


@given(records())
@settings(max_examples=60)
def test_a_record_survives_flowers_wire_format(record: messages.Record) -> None:
    content = messages.pack(record)
    (name,) = content.config_records
    raw = content.config_records[name].deflate()
    there = RecordDict({name: ConfigRecord.inflate(raw)})
    assert messages.unpack(there, type(record)) == record


@given(records())
@settings(max_examples=30)
def test_unknown_fields_are_ignored_and_missing_ones_refused(record: messages.Record) -> None:
    content = messages.pack(record)
    (name,) = content.config_records
    content.config_records[name]["of-the-future"] = "yes"
    assert messages.unpack(content, type(record)) == record
    del content.config_records[name][next(iter(msgspec.structs.asdict(record)))]
    with pytest.raises(BadMessage):
        messages.unpack(content, type(record))


def test_training_of_which_no_examples_are_spoken_is_plain_epochs() -> None:
    ask = messages.TrainAsk(
        task="t",
        weights=b"",
        seed=0,
        local_epochs=1,
        batch_size=32,
        learning_rate=0.1,
        momentum=0.9,
        clip_norm=1.0,
        bits=16,
        noise_multiplier=0.0,
    )
    content = messages.pack(ask)
    (name,) = content.config_records
    for field in [field for field in content.config_records[name] if field.startswith("example")]:
        del content.config_records[name][field]
    assert messages.unpack(content, messages.TrainAsk) == ask
    assert ask.example_steps == 0


def test_a_message_without_the_record_is_refused() -> None:
    with pytest.raises(BadMessage, match="'sum'"):
        messages.unpack(RecordDict(), messages.SumReply)


@given(st.floats(min_value=0, max_value=1e6), st.floats(min_value=0.1, max_value=2))
def test_a_wait_grows_by_a_fifth_at_most(waited: float, slowest: float) -> None:
    assert FASTEST_POLL <= poll_delay(waited, slowest) <= slowest
    assert poll_delay(waited, slowest) <= max(waited / 5, FASTEST_POLL) * (1 + 1e-12)


def test_the_size_of_a_message_is_its_payload() -> None:
    content = messages.pack(messages.SumReply(payload=b"12345"), messages.TrainReply(loss=1.0))
    assert messages.size(content) == 5


@given(st.integers(0, 2**31))
@settings(max_examples=10)
def test_weights_survive_the_vector_and_the_wire(seed: int) -> None:
    model, other = Blobs().model(seed), Blobs().model(seed + 1)
    vector = parameters.flatten(model)
    assert vector.dtype == np.float32
    parameters.unflatten(other, parameters.from_bytes(parameters.to_bytes(vector)))
    assert np.array_equal(parameters.flatten(other), vector)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(BadMessage, match="do not fit"):
        parameters.unflatten(Blobs().model(0), np.zeros(3, np.float32))
    with pytest.raises(BadMessage, match="no float32"):
        parameters.from_bytes(b"12345")


def test_a_plan_names_the_field_at_fault() -> None:
    text = 'name = "p"\ntask = "t"\nmodel = "m"\n'
    assert plan.loads(text).privacy.mode == "secagg"
    with pytest.raises(BadPlan, match="rounds"):
        plan.loads(text + "rounds = 0\n")
    with pytest.raises(BadPlan, match="nonsense"):
        plan.loads(text + "nonsense = 1\n")
    examples = "[privacy.examples]\nclip_norm = 1.0\nsampling_rate = 0.1\nsteps = 5\n"
    with pytest.raises(BadPlan, match="noise_multiplier"):
        plan.loads(text + examples)
    with pytest.raises(BadPlan, match="noise_multiplier"):
        plan.loads(text + examples + "noise_multiplier = 0.0\n")
    read = plan.loads(text + examples + "noise_multiplier = 0.9\n").privacy.examples
    assert read == plan.ExamplePrivacy(0.9, 1.0, 0.1, 5)
    with pytest.raises(BadPlan, match="TOML"):
        plan.loads("=")


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("cohort = { sampling_rate = 0 }", "sampling_rate"),
        ("cohort = { sampling_rate = 1.5 }", "sampling_rate"),
        ("cohort = { min_devices = 3 }\nprivacy = { colluders = 3 }", "nobody would be left"),
        ("privacy = { colluders = -1 }", "colluders"),
        ('training = { weighting = "capped" }', "weight_cap"),
        ("training = { weight_cap = 9 }", "weight_cap"),
        ("privacy = { rider_noise_multiplier = 2.0 }", "protects nothing"),
        ("privacy = { noise_multiplier = 1.0, rider_noise_multiplier = 0 }", "rider_noise"),
        ("privacy = { clip_quantile = 1 }", "clip_quantile"),
        ('privacy = { noise = "local" }', "noise"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(section: str, says: str) -> None:
    text = 'name = "p"\ntask = "t"\nmodel = "m"\n'
    with pytest.raises(BadPlan, match=says):
        plan.loads(text + section)


def test_the_noise_of_riders_follows_the_updates() -> None:
    assert plan.Privacy().rider_noise == 0
    assert plan.Privacy(noise_multiplier=0.6).rider_noise == pytest.approx(3.0)
    assert plan.Privacy(noise_multiplier=0.6, rider_noise_multiplier=2.0).rider_noise == 2.0


def test_a_missing_task_names_the_remedy() -> None:
    with pytest.raises(TaskMissing, match="install"):
        task.find("no-such-task")


def test_flowers_programs_send_nothing_home_and_install_nothing(tmp_path: Path) -> None:
    tls = TlsFiles(tmp_path / "ca", tmp_path / "cert", tmp_path / "key")
    link = superlink_command("127.0.0.1", 1234, tls, tmp_path)
    executor = superexec_command("127.0.0.1:1234", tls.ca, tmp_path)
    for program in (link, executor):
        assert Path(program.argv[0]).exists()
        assert program.env["FLWR_TELEMETRY_ENABLED"] == "0"
        assert program.env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert program.env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
        assert program.env["FLWR_HOME"] == str(tmp_path)
    assert "--enable-supernode-auth" in link.argv
    assert "--insecure" not in link.argv
    assert link.argv[link.argv.index("--isolation") + 1] == "process"


def test_local_training_steps_as_torchs_own_optimiser_does() -> None:
    rng = np.random.default_rng(0)
    examples = task.Examples(
        rng.normal(size=(32, 2)).astype(np.float32), rng.integers(0, 2, 32).astype(np.int64)
    )
    settings_ = plan.Training(local_epochs=3, batch_size=32, learning_rate=0.1, momentum=0.9)
    start = parameters.flatten(Blobs().model(1))
    ours = training.train(Blobs().model(0), start, examples, settings_, seed=5)

    model = Blobs().model(1).train()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    for _ in range(3):
        theirs.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        theirs.step()
    np.testing.assert_allclose(ours.weights, parameters.flatten(model), atol=1e-5)
    assert abs(ours.loss - float(loss.detach())) < 1e-5


def test_a_trainer_loads_neither_torchs_compiler_nor_opacus(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
import numpy as np
from atoll.federation import client_app, parameters, plan, training
from blobs import Blobs, write
data = write(Path(sys.argv[1]), 1)
start = parameters.flatten(Blobs().model(0))
training.train(Blobs().model(0), start, Blobs().load(data, "train"), plan.Training(), 1)
print(sorted({"torch._dynamo", "torch._inductor", "opacus"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_no_examples_is_said_and_a_single_last_row_is_left_out() -> None:
    start = parameters.flatten(Blobs().model(0))
    none = task.Examples(np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
    with pytest.raises(DataMissing):
        training.train(Blobs().model(0), start, none, plan.Training(), 0)
    assert training.evaluate(Blobs().model(0), start, none) == (0, 0, 0.0)
    nine = task.Examples(np.ones((9, 2), np.float32), np.zeros(9, np.int64))
    done = training.train(Blobs().model(0), start, nine, plan.Training(batch_size=8), 0)
    assert np.isfinite(done.weights).all()
