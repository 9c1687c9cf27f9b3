"""Any threshold of pieces is the secret; fewer say nothing of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.privacy import shamir
from atoll.privacy.errors import Refused


def is_prime(number):
    """Miller and Rabin, with the first 40 primes' worth of bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_the_modulus_is_the_smallest_prime_that_holds_32_bytes():
    assert is_prime(shamir.PRIME)
    assert not any(is_prime(2**256 + offset) for offset in range(1, 297, 2))


@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_pieces_is_the_secret(secret, data):
    count = data.draw(st.integers(1, 12))
    enough = data.draw(st.integers(1, count))
    pieces = dict(enumerate(shamir.split(secret, count, enough)))
    chosen = data.draw(st.permutations(sorted(pieces)))[:enough]
    assert shamir.combine({at: pieces[at] for at in chosen}) == secret


def test_the_pieces_of_a_known_polynomial_are_its_values():
    # 5 + 3x + 2x² at 1, 2, 3
    pieces = {at - 1: (5 + 3 * at + 2 * at * at).to_bytes(33) for at in (1, 2, 3)}
    assert int.from_bytes(shamir.combine(pieces)) == 5


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_one_piece_too_few_fits_every_secret(secret, other):
    pieces = dict(enumerate(shamir.split(secret, 5, 3)))
    two = {0: pieces[0], 1: pieces[1]}
    # The polynomial through two pieces and any other secret has degree 2 as well.
    points = {0: int.from_bytes(other), 1: int.from_bytes(two[0]), 2: int.from_bytes(two[1])}
    third = lagrange(points, 3)
    assert shamir.combine({**two, 2: third.to_bytes(33)}) == other


def lagrange(points, at):
    total = 0
    for x, y in points.items():
        term = y
        for z in points:
            if z != x:
                term = term * (at - z) * pow(x - z, -1, shamir.PRIME) % shamir.PRIME
        total = (total + term) % shamir.PRIME
    return total


def test_the_same_secret_is_split_anew_each_time():
    assert shamir.split(bytes(32), 3, 2) != shamir.split(bytes(32), 3, 2)


@pytest.mark.parametrize("pieces", [{}, {0: b""}, {0: bytes(32)}, {0: bytes([1]) + bytes(32)}])
def test_what_is_no_set_of_pieces_is_refused(pieces):
    with pytest.raises(Refused):
        shamir.combine(pieces)


@pytest.mark.parametrize(("size", "pieces", "enough"), [(31, 3, 2), (32, 2, 3), (32, 3, 0)])
def test_what_cannot_be_split_is_an_error(size, pieces, enough):
    with pytest.raises(ValueError, match="cannot split"):
        shamir.split(bytes(size), pieces, enough)
