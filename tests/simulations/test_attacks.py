"""Each attack does what its paper says; rules withstand those that outweigh a mean."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.federation import robust
from atoll.federation.task import Examples, Split, Task
from atoll.privacy.plain import PlainHubSession, PlainParty
from atoll.privacy.sums import CONTRIBUTE, RoundKey, SumSpec
from atoll.simulations import attacks, digits, liars
from atoll.simulations.attacks import Attack, Field, Found
from atoll.simulations.digits import Digits
from atoll.simulations.liars import Overheard

BOUND = 1000
SPEC = SumSpec(RoundKey("run", 1), 4, BOUND, 3, 1)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    dealt, kept = digits.deal(tmp_path_factory.mktemp("digits"), 7, 100.0, 0)
    return Field(dealt, kept, 1)


def sent(party, term, spec=SPEC):
    """What the hub gets of one party."""
    hub = PlainHubSession().collect(spec, ["p"])
    ask = hub.start()
    term = np.array(term, dtype=np.int64)
    hub.receive("p", party.answer(spec, CONTRIBUTE, ask.payloads["p"], term))
    return hub.advance().values.tolist()


def forging(forge):
    return liars.Forging(PlainParty("p"), forge)


@given(st.lists(st.integers(-BOUND, BOUND), min_size=4, max_size=4))
def test_a_sign_is_flipped_and_nothing_else(term):
    assert sent(forging(liars.scaled(-1.0)), term) == [-value for value in term]


def test_an_update_is_scaled_as_far_as_the_hub_lets_it_through():
    assert sent(forging(liars.scaled(5.0)), [1, -20, 300, -1000]) == [5, -100, 1000, -1000]


def test_scaling_by_the_liars_share_replaces_the_mean_of_converged_devices():
    # Bagdasaryan et al.: where honest updates cancel, the mean is what the liars want.
    devices, lying, wanted = 15, 3, np.array([3.0, -7.0, 0.0, 10.0])
    (scaled,) = (one for one in attacks.attacks(devices, lying) if one.name == "scaled")
    lie = scaled.forge(Overheard())(wanted.astype(np.int64), SPEC)
    honest = np.random.default_rng(0).normal(size=(devices - lying, 4))
    rows = np.concatenate([honest - honest.mean(axis=0), [lie] * lying])
    np.testing.assert_allclose(robust.mean(rows), wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("devices", "lying", "share"), [(15, 3, 7 / 12), (50, 12, 24 / 38), (51, 24, 25 / 27)]
)
def test_z_leaves_as_many_honest_devices_outside_as_make_a_majority(devices, lying, share):
    z = liars.little_z(devices, lying)
    assert 0.5 * (1 + math.erf(z / math.sqrt(2))) == pytest.approx(share)


def test_a_little_is_the_honest_mean_less_z_deviations():
    overheard, terms = Overheard(), np.array([[10, 0, -4, 100], [20, 0, 4, 300], [30, 0, 0, 200]])
    for term in terms:
        assert sent(overheard.of(PlainParty("p")), term) == term.tolist()
    wanted = np.rint(terms.mean(axis=0) - 1.5 * terms.std(axis=0)).tolist()
    assert sent(forging(liars.little(overheard, 1.5)), [9, 9, 9, 9]) == wanted
    later = SumSpec(RoundKey("run", 2), 4, BOUND, 3, 1)
    assert sent(forging(liars.little(overheard, 1.5)), [9, 9, 9, 9], later) == [9, 9, 9, 9]


def test_a_little_passes_for_honest_where_a_loud_lie_does_not():
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(12, 2000))
    little = honest.mean(axis=0) - honest.std(axis=0)
    chosen = robust.krum(np.concatenate([honest, [little] * 3]), 3)
    assert (chosen == little).all()
    loud = honest.mean(axis=0) - 20 * honest.std(axis=0)
    assert not (robust.krum(np.concatenate([honest, [loud] * 3]), 3) == loud).all()


class Two:
    """Two images of two classes."""

    name, input_shape, channels, classes = "two", (1, 8, 8), ("grey",), ("a", "b", "c")

    def model(self, seed: int):
        return torch.nn.Identity()

    def load(self, data: Path, split: Split) -> Examples:
        return Examples(np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 2, 2]))


def test_labels_are_flipped_in_training_alone():
    bent = liars.label_flip(Two())
    assert isinstance(bent, Task)
    assert bent.load(Path(), "train").y.tolist() == [2, 1, 0, 0]
    assert bent.load(Path(), "test").y.tolist() == [0, 1, 2, 2]
    assert (bent.name, bent.classes) == ("two", ("a", "b", "c"))


def test_a_backdoor_marks_half_of_the_examples_and_leaves_the_rest():
    task = Two()
    bent = liars.backdoor(task, liars.corner, 1).load(Path(), "train")
    assert bent.y.tolist() == [1, 1, 2, 2]
    assert bent.x.sum(axis=(1, 2, 3)).tolist() == [4, 4, 0, 0]
    assert bent.x[0, 0, -2:, -2:].tolist() == [[1, 1], [1, 1]]
    assert task.load(Path(), "train").x.sum() == 0


def test_the_digits_are_a_task_and_no_image_is_in_two_places(tmp_path):
    everything = digits.dataset()
    assert everything.x.shape == (1797, 1, 8, 8)
    assert (everything.x.min(), everything.x.max()) == (0, 1)
    dealt, kept = digits.deal(tmp_path, 9, 0.1, 3)
    parts = [Digits().load(directory, "train") for directory in dealt]
    assert isinstance(Digits(), Task)
    assert all(len(part.y) for part in parts)
    images = sorted(image.tobytes() for part in (*parts, kept) for image in part.x)
    assert images == sorted(image.tobytes() for image in everything.x)
    assert len(Digits().load(dealt[0], "test").y) == 0


def test_an_even_deal_gives_every_device_of_every_class(tmp_path):
    even, _ = digits.deal(tmp_path / "even", 7, 100.0, 0)
    odd, _ = digits.deal(tmp_path / "odd", 7, 0.1, 0)
    classes = [
        [len(set(Digits().load(one, "train").y.tolist())) for one in dealt] for dealt in (even, odd)
    ]
    assert min(classes[0]) == 10
    assert np.mean(classes[1]) < 8


def plays(ground, rule, name, count=6):
    (attack,) = (one for one in attacks.attacks(7, 1) if one.name == name)
    return attacks.play(ground, attacks.plan_for(rule, 7, 1, count, 0), attack)


def test_without_a_liar_all_rules_but_krum_learn_as_the_mean_does(ground):
    mean = plays(ground, "mean", "none")
    assert mean.accuracy > 0.8
    for rule in ("median", "trimmed-mean", "multi-krum", "bulyan", "norm-bound"):
        assert plays(ground, rule, "none").accuracy > mean.accuracy - 0.05


def test_a_scaled_update_replaces_the_mean_and_no_robust_rule(ground):
    assert plays(ground, "mean", "scaled").accuracy < 0.6
    for rule in ("median", "trimmed-mean", "multi-krum", "bulyan"):
        assert plays(ground, rule, "scaled").accuracy > 0.8


def test_a_backdoor_enters_the_mean_and_leaves_the_rest_of_it_nearly_right(ground):
    entered = plays(ground, "mean", "backdoor")
    assert entered.triggered > 0.8
    kept_out = plays(ground, "multi-krum", "backdoor")
    assert kept_out.triggered < 0.2
    assert kept_out.accuracy > 0.8


def test_equal_seeds_find_the_same(ground):
    once = plays(ground, "bulyan", "little, z_max", count=2)
    assert once == plays(ground, "bulyan", "little, z_max", count=2)


def test_the_command_prints_every_rule_and_attack(capsys, monkeypatch):
    monkeypatch.setattr(attacks, "RULES", ("mean", "krum"))
    monkeypatch.setattr(attacks, "attacks", lambda *_: (Attack("none"), Attack("idle")))
    assert attacks.main(["--json", "--rounds", "1"]) == 0
    found = [Found(**one) for one in json.loads(capsys.readouterr().out)]
    assert [(one.rule, one.attack) for one in found] == [
        ("mean", "none"),
        ("mean", "idle"),
        ("krum", "none"),
        ("krum", "idle"),
    ]
    # Liars that do nothing wrong change nothing.
    assert found[0].accuracy == found[1].accuracy
    header, *rows = attacks.table([*found, Found("krum", "backdoor", 0.5, 0.25)]).splitlines()
    assert header.split() == ["rule", "none", "idle", "backdoor"]
    assert rows[1].split()[-2:] == ["50.0%", "(25%)"]
