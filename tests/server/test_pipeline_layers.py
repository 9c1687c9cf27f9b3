"""Plans that train a part of a model, or keep a part on devices, through the whole pipeline."""

import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from waves import Fleet, Waves, plan_of

from atoll.edge_agent.onnx import Onnx  # after the path
from atoll.federation import layout
from atoll.federation.plan import Codec, Layers
from atoll.fleet import bundle as bundles
from atoll.server import export, policy
from atoll.server.recording import MemoryRecorder


def test_a_run_with_layers_that_stay_ends_after_evaluation_and_says_why(tmp_path: Path) -> None:
    plan = msgspec.structs.replace(plan_of(), layers=Layers(local=("6.*",)))
    recorder = MemoryRecorder()
    result = Fleet(tmp_path).run(plan, recorder)
    assert result.manifest is None
    assert result.refused == "no layers stay on devices (layers.local = 147)"
    assert list(recorder.stages) == ["train", "evaluate"]
    assert not (tmp_path / "candidate").exists()
    # What those with a head of their own got right is told; the last one has never trained.
    assert result.facts["accuracy"]["known"]["float"] > 0.9
    assert result.facts["accuracy"]["unseen"]["float"] < 0.9
    assert result.facts["layers"] == {"travelling": 912, "local": 147, "frozen": 0}
    assert result.facts.keys() - {"gates"} <= policy.FACTS


@pytest.mark.parametrize("mode", ["plain", "secagg"])
def test_adapters_are_merged_into_a_candidate_of_the_plain_graph(tmp_path: Path, mode: str) -> None:
    layers = Layers(lora_layers=("2",), lora_rank=4, trained=("0.*", "6.*"))
    plan = msgspec.structs.replace(
        plan_of(mode=mode, rounds=6), layers=layers, codec=Codec(downlink="float16")
    )
    result = Fleet(tmp_path).run(plan)
    assert result.manifest is not None, result.refused
    shape = layout.of(Waves(), plan.seed, layers)
    counts = shape.counts()
    assert counts == {
        "travelling": 4 * (12 * 5 + 12) + 12 * 15 + 147,
        "local": 0,
        "frozen": 12 * 61,
    }
    plain = export.to_onnx(Waves().model(plan.seed), Waves.input_shape)
    merged = export.to_onnx(shape.exported(shape.initial + 1), Waves.input_shape)
    assert list(export.operators(merged)) == list(export.operators(plain))
    directory = tmp_path / "candidate"
    golden = bundles.read_golden(directory)
    runtime = Onnx((directory / bundles.MODEL).read_bytes())
    got = runtime.run({"input": golden.inputs})["logits"]
    bundles.golden_check(golden.expected, got, golden.tolerance)
    card = (directory / bundles.CARD).read_text()
    assert f"Trained were {counts['travelling']} weights" in card
    assert "732 are as the task has them" in card


def test_what_fine_tuning_would_bring_is_among_the_facts(tmp_path: Path) -> None:
    layers = Layers(fine_tune=("6.*",), fine_tune_epochs=2)
    recorder = MemoryRecorder()
    result = Fleet(tmp_path).run(msgspec.structs.replace(plan_of(), layers=layers), recorder)
    assert result.manifest is not None, result.refused
    told = result.facts["fine_tuned"]
    assert told.keys() == {"known", "unseen", "all"}
    assert all(0.8 < one["after"] <= 1 for one in told.values())
    assert told["known"]["before"] == pytest.approx(
        result.facts["accuracy"]["known"]["float"], abs=0.005
    )
    assert result.facts.keys() - {"gates"} <= policy.FACTS
