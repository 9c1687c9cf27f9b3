"""The mechanism as deployed survives the attack; each way to break it is found out."""

import json
from dataclasses import replace

import numpy as np
import pytest

from atoll.privacy.keystream import Keystream
from atoll.privacy.update import encode, quantise
from atoll.simulations import audit
from atoll.simulations.audit import Found, Setting, as_deployed, attack

SEED = 5
QUIET = Setting(noise_multiplier=8.0, rounds=4)


def stream(device, round_):
    return Keystream.replayable((round_ << 20) + device)


def without_noise(update, spec, device, round_):
    return quantise(update, spec, stream(device, round_)).values


def with_a_quarter_of_the_noise(update, spec, device, round_):
    less = replace(spec, noise_multiplier=spec.noise_multiplier / 4)
    return encode(update, less, stream(device, round_))


def without_clipping(update, spec, device, round_):
    noise = encode(np.zeros(update.size), spec, stream(device, round_))
    return np.rint(update * spec.scale).astype(np.int64) + noise


def with_the_same_noise_in_every_round(update, spec, device, round_):
    return encode(update, spec, stream(device, 0))


def test_the_mechanism_as_deployed_survives_and_the_attack_is_not_idle(capsys):
    assert audit.main(["--json"]) == 0
    found = [Found(**one) for one in json.loads(capsys.readouterr().out)]
    assert len(found) == len(audit.SETTINGS)
    assert all(one.holds for one in found)
    assert sum(one.at_least > 0.2 * one.accounted for one in found) >= 3


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_so_little_is_found_where_much_noise_was_added(seed):
    assert attack(QUIET, as_deployed(seed), seed).holds


@pytest.mark.parametrize(
    "broken",
    [
        without_noise,
        with_a_quarter_of_the_noise,
        without_clipping,
        with_the_same_noise_in_every_round,
    ],
)
def test_a_broken_mechanism_leaks_more_than_was_accounted(broken):
    found = attack(QUIET, broken, SEED)
    assert found.at_least > found.accounted
    assert not found.holds


def test_equal_seeds_find_the_same():
    small = Setting(noise_multiplier=1.0, rounds=2, canaries=100, bystanders=2, guesses=20)
    assert attack(small, as_deployed(3), 3) == attack(small, as_deployed(3), 3)


def test_the_table_names_every_setting(capsys, monkeypatch):
    small = Setting(noise_multiplier=1.5, rounds=1, canaries=100, bystanders=2, guesses=20)
    monkeypatch.setattr(audit, "SETTINGS", (small,))
    assert audit.main([]) == 0
    header, names, row = capsys.readouterr().out.splitlines()
    assert "95%" in header
    assert "accounted" in names
    assert row.split()[0] == "1.5"
