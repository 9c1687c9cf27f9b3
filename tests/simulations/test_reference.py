import json

import msgspec
import numpy as np
import pytest
import torch

from atoll.federation import plan as plans
from atoll.simulations import reference, spar


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return spar.split_people(tmp_path_factory.mktemp("people"), [3, 4, 9])


@pytest.fixture(scope="module")
def plan():
    plan = plans.load(reference.PLAN)
    training = msgspec.structs.replace(plan.training, local_epochs=1)
    return msgspec.structs.replace(plan, rounds=4, training=training)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_federation_without_noise_learns_and_is_repeatable(people, plan):
    said = []
    first = reference.federated_plain(people, 0, plan, said.append)
    assert first.known > 0.4
    assert 0 <= first.unseen <= 1
    assert [text for text in said if "round 4 of 4" in text]
    assert reference.federated_plain(people, 0, plan) == first


def test_central_training_learns_what_lies_in_one_place(people, plan, monkeypatch):
    monkeypatch.setattr(reference, "CENTRAL_EPOCHS", 6)
    found = reference.central(people, 0, plan)
    assert found.known > 0.8
    assert reference.central(people, 0, plan) == found


def test_the_summary_is_the_mean_over_the_seeds():
    rows = [
        {"name": "central", "seed": 0, "known": 0.9, "unseen": 0.5, "seconds": 1.0},
        {"name": "central", "seed": 1, "known": 1.0, "unseen": 0.7, "seconds": 1.0},
    ]
    found = reference.summary(rows)
    assert found["central"] == {"known": pytest.approx(0.95), "unseen": pytest.approx(0.6)}
    assert json.loads(json.dumps(found))["rows"] == rows
    assert np.isclose(found["central"]["known"], 0.95)
