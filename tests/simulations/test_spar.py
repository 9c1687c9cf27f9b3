import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.federation import example_privacy, parameters, training
from atoll.federation import plan as plans
from atoll.federation.errors import DataMissing
from atoll.federation.task import Task, find, groups_of
from atoll.privacy.keystream import Keystream
from atoll.simulations import spar, spar_net
from atoll.simulations.reference import PLAN
from atoll.simulations.spar import Spar


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return spar.split_people(tmp_path_factory.mktemp("people"), [1, 3])


def test_the_task_is_found_by_its_entry_point():
    task = find("spar")
    assert isinstance(task, Task)
    assert task.name == "spar"
    assert len(task.channels) == task.input_shape[0]


def test_each_person_gets_a_file_of_their_own_without_pickle(people):
    assert set(people) == {1, 3}
    with np.load(people[1] / spar.FILE, allow_pickle=False) as held:
        assert held["signal"].dtype == np.float32
        assert held["starts"][-1] == len(held["signal"])
        assert len(held["label"]) == len(held["side"]) == len(held["starts"]) - 1 == 14
        assert set(held["label"]) == set(range(7))


def test_people_do_not_share_recordings(people):
    one, three = (np.load(people[person] / spar.FILE)["signal"] for person in (1, 3))
    assert not np.array_equal(one[:1000], three[:1000])


@given(st.integers(0, 100_000))
def test_no_sample_is_in_both_splits_and_a_second_lies_between(samples):
    _, train_end = spar.block(samples, "train")
    test_begin, test_end = spar.block(samples, "test")
    assert test_begin - train_end == spar.RATE_HZ
    assert train_end <= test_end <= samples or samples < spar.RATE_HZ


def test_windows_are_cut_from_the_recordings_as_they_are(people):
    with np.load(people[3] / spar.FILE) as held:
        signal, starts, label = held["signal"], held["starts"], held["label"]
    train, test = Spar().load(people[3], "train"), Spar().load(people[3], "test")
    assert train.x.shape[1:] == test.x.shape[1:] == Spar.input_shape
    assert train.x.dtype == np.float32
    assert train.y.dtype == np.int64
    np.testing.assert_array_equal(train.x[0], signal[: spar.WINDOW].T)
    assert train.y[0] == label[0]
    begin, end = spar.block(int(starts[-1] - starts[-2]), "test")
    last = signal[starts[-2] :][:end][begin:]
    at = (len(last) - spar.WINDOW) // spar.TEST_STEP * spar.TEST_STEP
    np.testing.assert_array_equal(test.x[-1], last[at : at + spar.WINDOW].T)
    assert set(train.y) == set(test.y) == set(range(7))


def test_a_window_belongs_to_the_arm_of_its_recording(people):
    with np.load(people[3] / spar.FILE) as held:
        starts, side = held["starts"], held["side"]
    begin_end = [spar.block(int(samples), "test") for samples in np.diff(starts)]
    cut = [len(range(a, b - spar.WINDOW + 1, spar.TEST_STEP)) for a, b in begin_end]
    rows = len(Spar().load(people[3], "test").y)
    found = groups_of(Spar(), people[3], "test", rows)
    np.testing.assert_array_equal(found, np.repeat(side, cut))
    assert set(found) == {0, 1}
    assert Spar.groups[0] == "left"


def test_live_traffic_is_the_held_back_part_cut_finer(people):
    coarse, fine = Spar().load(people[1], "test"), Spar().held_back(people[1], 5)
    assert len(fine.y) > 4 * len(coarse.y)
    np.testing.assert_array_equal(fine.x[::5][0], coarse.x[0])


def test_a_missing_or_damaged_file_says_what_to_do(tmp_path):
    with pytest.raises(DataMissing, match="no recordings"):
        Spar().load(tmp_path, "train")
    (tmp_path / spar.FILE).write_bytes(b"PK")
    with pytest.raises(DataMissing, match="cannot be read"):
        Spar().load(tmp_path, "train")
    with pytest.raises(DataMissing, match="no person 11"):
        spar.split_people(tmp_path, [11])


def test_the_same_seed_gives_the_same_weights_and_leaves_torch_alone():
    before = torch.random.get_rng_state()
    one, same, other = (parameters.flatten(Spar().model(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert 20_000 <= len(one) <= 60_000


def test_wearing_the_watch_differently_turns_and_scales_but_does_not_bend():
    worn = spar_net.Worn().train()
    x = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = worn(x)
    ratio = out[:, :3].norm(dim=1) / x[:, :3].norm(dim=1)
    np.testing.assert_allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)
    assert not torch.allclose(out, x)
    assert torch.equal(worn.eval()(x), x)


def test_filters_do_not_depend_on_the_scale_of_their_weights():
    conv = spar_net.StandardisedConv(6, 4, 5)
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
    before = conv(x)
    with torch.no_grad():
        conv.weight *= 10
        conv.weight += 1
    torch.testing.assert_close(conv(x), before, rtol=1e-3, atol=1e-3)


def test_the_demo_plan_is_one_that_can_run():
    plan = plans.load(PLAN)
    assert plan.task == Spar.name
    assert plan.privacy.mode == "he"
    assert plan.privacy.noise_multiplier > 0
    assert plan.cohort.labels == {"role": "train"}


def test_the_network_learns_with_each_window_protected(people):
    examples, model = Spar().load(people[1], "train"), Spar().model(0)
    start = parameters.flatten(model)
    done = example_privacy.train(
        model,
        start,
        examples,
        plans.Training(learning_rate=0.2),
        plans.ExamplePrivacy(noise_multiplier=0.5, clip_norm=1.0, sampling_rate=0.1, steps=30),
        Keystream.replayable(1),
    )
    before = training.evaluate(model, start, examples)
    after = training.evaluate(model, done.weights, examples)
    assert after.correct > 2 * before.correct
