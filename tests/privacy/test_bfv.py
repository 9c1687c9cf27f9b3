"""Encrypted blocks add exactly up to the limit, and bytes that are none are refused."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.privacy import bfv
from atoll.privacy.errors import BadParameters, Refused

BITS = bfv.MAX_PLAIN_BITS


@pytest.fixture(scope="module")
def key():
    return bfv.Key(BITS)


@pytest.fixture(scope="module")
def adder():
    return bfv.Adder(BITS)


@pytest.fixture(scope="module")
def block(key):
    return key.encrypt(np.arange(bfv.SLOTS))


def test_the_extremes_survive(key):
    half = key.modulus // 2
    slots = np.resize(np.array([half, -half, 0, 1, -1]), bfv.SLOTS)
    assert (key.decrypt(key.encrypt(slots)) == slots).all()


@pytest.mark.parametrize(("bits", "terms"), [(46, 380), (45, 761), (44, 1524)])
def test_the_limit_of_terms_is_the_worst_case_of_the_noise(bits, terms):
    assert bfv.max_terms(bits) == terms
    q, t = bfv._modulus().value(), bfv.plain_modulus(bits)
    assert terms * bfv.NOISE_PER_TERM < q / (2 * t)
    assert bfv.plain_bits_for(terms) == bits
    assert bfv.plain_bits_for(terms + 1) == bits - 1


def test_more_terms_than_any_key_can_add_are_refused():
    with pytest.raises(BadParameters, match="plan smaller cohorts"):
        bfv.plain_bits_for(bfv.max_terms(bfv.MIN_PLAIN_BITS) + 1)


def test_as_many_terms_as_allowed_add_exactly(key, adder):
    rng = np.random.default_rng(0)
    reach = key.modulus // 2 // bfv.max_terms(BITS)
    wanted = np.zeros(bfv.SLOTS, dtype=np.int64)
    total = None
    for _ in range(bfv.max_terms(BITS)):
        slots = rng.integers(-reach, reach, bfv.SLOTS, endpoint=True)
        wanted += slots
        term = adder.read(key.encrypt(slots))
        if total is None:
            total = term
        else:
            adder.add(total, term)
    assert (key.decrypt(adder.write(total)) == wanted).all()


EVERY_SIZE = range(bfv.MIN_PLAIN_BITS, bfv.MAX_PLAIN_BITS + 1)


@pytest.mark.parametrize("bits", EVERY_SIZE)
def test_no_fresh_block_is_noisier_than_the_rule_says(bits):
    key, adder = bfv.Key(bits), bfv.Adder(bits)
    half = key.modulus // 2
    slots = np.random.default_rng(bits).integers(-half, half, bfv.SLOTS, endpoint=True)
    q = bfv._modulus().value()
    for _ in range(8):
        fresh = adder.read(key.encrypt(slots))
        # SEAL's budget is ⌊log2(q / (2·t·noise))⌋, or one less.
        assert _budget(key, fresh) + 1 >= np.log2(q / (2 * key.modulus * bfv.NOISE_PER_TERM))


@pytest.mark.parametrize("bits", EVERY_SIZE)
def test_as_many_terms_as_any_modulus_allows_add_exactly_and_far_more_do_not(bits):
    key, adder = bfv.Key(bits), bfv.Adder(bits)
    terms = bfv.max_terms(bits)
    reach = key.modulus // 2 // terms
    rng = np.random.default_rng(bits)

    # Millions of terms: blocks of their own, as often as it takes. The noise of one block
    # repeated would add up as that of no cohort does.
    own = 64
    blocks = [rng.integers(-reach, reach, bfv.SLOTS, endpoint=True) for _ in range(own)]
    batch = _sum(adder, [adder.read(key.encrypt(block)) for block in blocks])
    rest = [adder.read(key.encrypt(block)) for block in blocks[: terms % own]]
    total = _sum(adder, [_times(adder, batch, terms // own), *rest])
    wanted = np.sum(blocks, axis=0) * (terms // own)
    wanted += np.sum([np.zeros(bfv.SLOTS, dtype=np.int64), *blocks[: terms % own]], axis=0)
    assert np.abs(wanted).max() <= key.modulus // 2
    assert _budget(key, total) > 0
    assert (key.decrypt(adder.write(total)) == wanted).all()

    one = adder.read(key.encrypt(np.ones(bfv.SLOTS, dtype=np.int64)))
    with pytest.raises(Refused, match="too much noise"):
        key.decrypt(adder.write(_times(adder, one, 16 * terms)))


def _budget(key, ciphertext):
    return key._decryptor.invariant_noise_budget(ciphertext)


def _sum(adder, ciphertexts):
    total = adder.read(adder.write(ciphertexts[0]))
    for term in ciphertexts[1:]:
        adder.add(total, term)
    return total


def _times(adder, ciphertext, count):
    """Return the sum of ``count`` times the same ciphertext, by doubling."""
    total = adder.read(adder.write(ciphertext))
    for digit in f"{count:b}"[1:]:
        adder.add(total, total)
        if digit == "1":
            adder.add(total, ciphertext)
    return total


def test_a_block_travels_as_half_of_itself_and_a_seed(key, adder, block):
    assert len(block) < 34_000
    assert len(adder.write(adder.read(block))) > 60_000


def test_a_key_is_read_back_whole(key, block):
    again = bfv.Key(BITS, key.secret())
    assert (again.decrypt(block) == np.arange(bfv.SLOTS)).all()


def test_another_key_opens_nothing(block):
    with pytest.raises(Refused, match="under another key"):
        bfv.Key(BITS).decrypt(block)


def test_a_block_for_other_parameters_is_refused(adder):
    with pytest.raises(Refused, match="no ciphertext"):
        adder.read(bfv.Key(BITS - 1).encrypt(np.zeros(bfv.SLOTS, dtype=np.int64)))


@given(data=st.data())
@settings(max_examples=200)
def test_changed_blocks_are_refused_or_read_and_never_crash(adder, block, data):
    kind = data.draw(st.sampled_from(["cut", "flip", "head", "noise"]))
    if kind == "cut":
        changed = block[: data.draw(st.integers(0, len(block) - 1))]
    elif kind == "noise":
        changed = data.draw(st.binary(max_size=500))
    else:
        reach = 130 if kind == "head" else len(block)
        place = data.draw(st.integers(0, reach - 1))
        value = data.draw(st.integers(0, 255))
        changed = block[:place] + bytes([value]) + block[place + 1 :]
    try:
        read = adder.read(changed)
    except Refused:
        return
    assert kind in {"flip", "head"}
    assert read.size() == 2


@given(data=st.data())
@settings(max_examples=60)
def test_changed_keys_are_refused_or_read_and_never_crash(key, data):
    secret = key.secret()
    place = data.draw(st.integers(0, min(len(secret), 200) - 1))
    changed = secret[:place] + bytes([data.draw(st.integers(0, 255))]) + secret[place + 1 :]
    with suppress(Refused):
        bfv.Key(BITS, changed)


@pytest.mark.parametrize("size", [0, bfv.MAX_CIPHERTEXT + 1])
def test_sizes_no_ciphertext_has_are_not_even_read(adder, size):
    with pytest.raises(Refused, match="are no ciphertext"):
        adder.read(bytes(size))


def test_a_modulus_outside_the_range_is_refused():
    for bits in (bfv.MIN_PLAIN_BITS - 1, bfv.MAX_PLAIN_BITS + 1):
        with pytest.raises(Refused, match="plain modulus"):
            bfv.plain_modulus(bits)
