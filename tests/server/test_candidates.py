"""What a candidate's manifest and card say of the counts that its devices will ship."""

import sys
from pathlib import Path

import numpy as np
import pytest

from atoll.federation import plan as plans
from atoll.fleet import bundle as bundles
from atoll.fleet.bundle import Golden, Manifest
from atoll.fleet.features import FeatureSpec
from atoll.fleet.profile import build
from atoll.server import candidates

sys.path.insert(0, str(Path(__file__).parent))

from waves import PLAN, Waves  # after the path

FACTS = {
    "accuracy": {},
    "rows": {},
    "privacy": {},
    "rounds": {"trained": 1},
    "devices": {"trainers": 2},
}


def written(out: Path, more: str) -> Manifest:
    plan = plans.loads(PLAN.format(rounds=1, least=2, mode="plain", noise=0.0, more=more))
    golden = Golden(np.zeros((1, 2, 32), np.float32), np.zeros((1, 3), np.float32), 0.1)
    spec = FeatureSpec(kind="channel-stats", channels=Waves.channels)
    return candidates.write(
        out,
        plan=plan,
        task=Waves(),
        run="r1",
        created=0.0,
        model=b"a model",
        profile=build(spec, {}, Waves.classes),
        golden=golden,
        facts=FACTS,
        verdicts=[],
        weights={"in": "11" * 32, "out": "22" * 32},
    )


def test_the_plans_telemetry_noise_is_in_the_manifest_that_is_signed(tmp_path: Path) -> None:
    manifest = written(tmp_path, ", telemetry_noise = 1.5")
    assert manifest.telemetry_noise == 1.5
    assert bundles.read(tmp_path).telemetry_noise == 1.5
    assert "with Gaussian noise of 1.5 times" in (tmp_path / bundles.CARD).read_text()


def test_counts_go_without_noise_unless_the_plan_says_so(tmp_path: Path) -> None:
    assert written(tmp_path, "").telemetry_noise == 0
    card = (tmp_path / bundles.CARD).read_text()
    assert "ships the counts without noise" in card
    assert "11" * 32 in card
    assert "22" * 32 in card


def test_a_manifest_from_before_there_was_noise_asks_for_none(tmp_path: Path) -> None:
    data = written(tmp_path, "").encode()
    before = b"\n".join(line for line in data.splitlines() if b"telemetry_noise" not in line)
    assert before != data
    assert Manifest.decode(before.replace(b",\n}", b"\n}")).telemetry_noise == 0


@pytest.mark.parametrize("noise", [b"-1", b"null", b'"1"', b"1e999"])
def test_a_manifest_whose_noise_is_no_number_is_refused(tmp_path: Path, noise: bytes) -> None:
    data = written(tmp_path, ", telemetry_noise = 0.125").encode()
    assert b"0.125" in data
    with pytest.raises(bundles.BadBundle):
        Manifest.decode(data.replace(b"0.125", noise))
