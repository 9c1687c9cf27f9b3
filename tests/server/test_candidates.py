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
from atoll.server import candidates, model_card

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


PLAIN = 'name = "p"\ntask = "t"\nmodel = "m"\n'


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "",
            [
                "Each device counted the same.",
                "Updates were sent whole.",
                "The weights are those after the last round.",
            ],
        ),
        (
            "privacy = { noise_multiplier = 1.0 }\ncohort = { min_devices = 7 }\n",
            ["Each device added its share of the noise; it is in full with the shares of 7."],
        ),
        (
            "privacy = { noise_multiplier = 1.0, colluders = 2 }\ncohort = { min_devices = 7 }\n",
            ["with the shares of 7, 2 of whom may know theirs."],
        ),
        (
            'privacy = { noise_multiplier = 1.0, noise = "central" }\n',
            ["The hub added the noise, to the sum that it had opened."],
        ),
        (
            'training = { weighting = "capped", weight_cap = 1200, averaged_rounds = 3 }\n',
            ["A device counted by its examples, up to 1,200."],
        ),
        (
            'codec = { kind = "random-mask", share = 0.1, downlink = "float16" }\n',
            [
                "Of an update a share of 0.1 was sent (`random-mask`, without error feedback), and",
                "and weights went to devices as float16 where it can hold them.",
            ],
        ),
        (
            'codec = { kind = "top-k", share = 0.05 }\nprivacy = { mode = "plain" }\n',
            ["Of an update a share of 0.05 was sent (`top-k`, with error feedback)."],
        ),
        (
            'asynchrony = { buffer = 2, concurrency = 3 }\nprivacy = { mode = "plain" }\n',
            ["Each device counted the same, and less the older its update was."],
        ),
    ],
)
def test_the_card_says_what_the_mean_was_made_of(more: str, says: list[str]) -> None:
    said = "\n".join(model_card.mean(plans.loads(PLAIN + more), {"rounds": {}}))
    for sentence in says:
        assert sentence in said
    assert ("noise" in said) == ("noise_multiplier" in more)


@pytest.mark.parametrize(
    ("averaged", "says"),
    [
        (0, "The weights are those after the last round."),
        (2, "The weights are the mean of those after each of the last 2 rounds."),
    ],
)
def test_the_card_says_how_many_rounds_were_averaged_and_not_how_many_were_asked_for(
    averaged: int, says: str
) -> None:
    asked = plans.loads(PLAIN + "training = { averaged_rounds = 3 }\n")
    assert says in model_card.mean(asked, {"rounds": {"averaged": averaged}})


def test_a_rule_that_is_no_mean_weighs_no_device_and_the_bundles_card_says_the_rest(
    tmp_path: Path,
) -> None:
    median = (
        'aggregation = { rule = "median", byzantine = 1 }\nprivacy = { mode = "plain" }\n'
        "cohort = { min_devices = 3 }\n"
    )
    assert "counted" not in "\n".join(model_card.mean(plans.loads(PLAIN + median), {"rounds": {}}))
    written(tmp_path, "")
    assert "Updates were sent whole." in (tmp_path / bundles.CARD).read_text()


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
