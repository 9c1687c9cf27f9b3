"""Words add up as their values do, in the fewest bytes, and masks hide and come off."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from atoll.privacy.errors import BadParameters, Refused
from atoll.privacy.ring import Mask, Ring, RunningSum, add_masks
from atoll.privacy.sums import RoundKey, SumSpec


def ring_for(length, bound, parties):
    return Ring.of(SumSpec(RoundKey("run", 1), length, bound, parties, 1))


@given(st.data())
def test_a_sum_of_masked_words_is_the_word_of_the_sum(data):
    parties = data.draw(st.integers(1, 6))
    bound = data.draw(st.one_of(st.integers(1, 300), st.integers(1, (2**63 - 1) // (2 * parties))))
    length = data.draw(st.integers(1, 70))
    ring = ring_for(length, bound, parties)
    edges = st.sampled_from([-bound, bound, 0])
    values = [
        np.array(
            data.draw(
                st.lists(
                    st.one_of(edges, st.integers(-bound, bound)), min_size=length, max_size=length
                )
            ),
            dtype=np.int64,
        )
        for _ in range(parties)
    ]
    keys = [data.draw(st.binary(min_size=32, max_size=32)) for _ in range(parties)]
    total = RunningSum(ring)
    for value, key in zip(values, keys, strict=True):
        sent = ring.masked(value, [Mask(key)])
        assert len(sent) == ring.size
        total.add(sent)
    words = total.words()
    add_masks(words, ring, [Mask(key, negative=True) for key in keys])
    assert ring.unpack(words).tolist() == np.sum(values, axis=0).tolist()


@pytest.mark.parametrize(
    ("bound", "parties", "bits"),
    [(32_767, 10, 20), (255, 10, 64 / 5), (32_767, 100, 24), (127, 2, 64 / 7), (2**42, 5, 48)],
)
def test_values_take_the_fewest_bits(bound, parties, bits):
    ring = ring_for(120_000, bound, parties)
    assert 8 * ring.size / ring.length == pytest.approx(bits, abs=1e-3)


def test_every_choice_of_bytes_and_digits_holds_the_largest_sum():
    for size in range(1, 9):
        for parties in (1, 3, 1000):
            bound = (2 ** (8 * size) - 1) // (2 * parties)
            if bound < 1 or parties * bound >= 2**63:
                continue
            ring = ring_for(3, bound, parties)
            total = RunningSum(ring)
            for _ in range(parties):
                total.add(ring.masked(np.full(3, -bound, dtype=np.int64), []))
            assert ring.unpack(total.words()).tolist() == [-bound * parties] * 3


def test_a_mask_is_aes_in_counter_mode_by_planes():
    ring = ring_for(100_000, 32_767, 10)  # five bytes: planes of four and one
    words = np.zeros(ring.words, dtype=np.uint64)
    add_masks(words, ring, [Mask(bytes(range(32)))])
    planes = []
    for plane, size in enumerate((4, 1)):
        cipher = Cipher(
            algorithms.AES256(bytes(range(32))), modes.CTR(bytes([plane]) + bytes(15))
        ).encryptor()
        planes.append(np.frombuffer(cipher.update(bytes(ring.words * size)), dtype=f"<u{size}"))
    wanted = planes[0].astype(np.uint64) + (planes[1].astype(np.uint64) << np.uint64(32))
    assert np.array_equal(words, wanted)


def test_opposite_masks_cancel_over_many_chunks():
    ring = ring_for(300_001, 100, 3)
    values = np.arange(ring.length, dtype=np.int64) % 100
    both = [Mask(bytes(32)), Mask(bytes(32), negative=True)]
    assert ring.masked(values, both) == ring.masked(values, [])
    assert ring.masked(values, both[:1]) != ring.masked(values, [])


def test_a_vector_of_another_size_is_refused():
    ring = ring_for(10, 100, 3)
    with pytest.raises(Refused, match="bytes instead of"):
        RunningSum(ring).add(bytes(ring.size + 1))


def test_what_no_word_holds_is_refused():
    with pytest.raises(BadParameters, match="64 bits"):
        ring_for(1, 2**62, 5)
