"""Exact sums under BFV encryption: the one place that touches TenSEAL.

Ring dimension 4096 and one 60-bit coefficient modulus, where 128-bit security would allow
109 bits (Homomorphic Encryption Standard 2018, table 1). Nothing here multiplies, so there is
no key switching and no second modulus to pay for. Devices share the secret key, so they
encrypt with it: half of such a ciphertext is pseudo-random and travels as its seed, which is
31 KB for 4096 slots instead of 62.

**Noise.** A fresh symmetric ciphertext carries noise below 21.5: a centred binomial of at
most 21, and half for rounding the scaled message. Decryption is exact while the noise of the
sum stays below q/2t. :func:`max_terms` is that bound taken at its worst, so a sum within it
never decodes to anything but the sum. SEAL counts what room there is in whole bits, and
without one left :meth:`Key.decrypt` refuses, which is from q/4t on: 4096 at 46 bits, where the
noise of the 380 terms allowed has a standard deviation of 64.

SEAL through ``tenseal.sealapi`` reads and writes files alone; ``memfd`` is a file in memory.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
import tenseal.sealapi as seal

from atoll.privacy.errors import BadParameters, Refused
from atoll.privacy.sums import Integers

SLOTS: Final = 4096
COEFFICIENT_BITS: Final = 60
MIN_PLAIN_BITS: Final = 30
MAX_PLAIN_BITS: Final = 46
NOISE_PER_TERM: Final = 21.5
MAX_CIPHERTEXT: Final = 80_000
"""Bytes; a sum of ciphertexts, which no longer has a seed, takes 66,000."""

Ciphertext = Any
"""SEAL's own object; it can be added and saved, not pickled."""


@lru_cache(maxsize=1)
def _modulus() -> seal.Modulus:
    """Return q, the largest prime of 60 bits that suits the ring."""
    return seal.CoeffModulus.Create(SLOTS, [COEFFICIENT_BITS])[0]


def max_terms(plain_bits: int) -> int:
    """Return how many fresh ciphertexts can be added under a plain modulus of that size."""
    return int((_modulus().value() / 2.0 ** (plain_bits + 1) - 1) / NOISE_PER_TERM)


def plain_bits_for(terms: int) -> int:
    """Return the largest plain modulus, in bits, that leaves room for ``terms``."""
    for bits in range(MAX_PLAIN_BITS, MIN_PLAIN_BITS - 1, -1):
        if max_terms(bits) >= terms:
            return bits
    raise BadParameters(
        f"{terms} devices are too many for one encrypted sum, which takes "
        f"{max_terms(MIN_PLAIN_BITS)}; plan smaller cohorts"
    )


@lru_cache(maxsize=8)
def plain_modulus(bits: int) -> int:
    """Return the prime that counts in slots of ``bits`` bits."""
    if not MIN_PLAIN_BITS <= bits <= MAX_PLAIN_BITS:
        raise Refused(f"a plain modulus of {bits} bits")
    return int(seal.PlainModulus.Batching(SLOTS, bits).value())


class Adder:
    """What the hub can do without a key: read, add and write ciphertexts."""

    def __init__(self, plain_bits: int) -> None:
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
        parameters.set_poly_modulus_degree(SLOTS)
        parameters.set_coeff_modulus([_modulus()])
        self.modulus = plain_modulus(plain_bits)
        parameters.set_plain_modulus(self.modulus)
        self.context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)  # noqa: FBT003 (SEAL takes it by position)
        self._evaluator = seal.Evaluator(self.context)

    def read(self, data: bytes) -> Ciphertext:
        """Return the ciphertext in ``data``; raise :class:`Refused` when there is none."""
        if not 0 < len(data) <= MAX_CIPHERTEXT:
            raise Refused(f"{len(data)} bytes are no ciphertext")
        ciphertext = seal.Ciphertext()
        _load(lambda path: ciphertext.load(self.context, path), data, "ciphertext")
        if ciphertext.size() != 2 or ciphertext.is_ntt_form() or ciphertext.is_transparent():
            raise Refused("a ciphertext that encryption does not make")
        return ciphertext

    def add(self, total: Ciphertext, term: Ciphertext) -> None:
        """Add ``term`` to ``total`` in place."""
        self._evaluator.add_inplace(total, term)

    def write(self, ciphertext: Ciphertext) -> bytes:
        """Return the bytes of a ciphertext."""
        return _save(ciphertext.save)


class Key:
    """A secret key: encrypts and decrypts 4096 slots at a time."""

    def __init__(self, plain_bits: int, secret: bytes | None = None) -> None:
        """Read the key in ``secret``, or make one.

        Raises :class:`Refused` for bytes that are no key for these parameters.
        """
        self._adder = Adder(plain_bits)
        self.plain_bits = plain_bits
        self.modulus = self._adder.modulus
        context = self._adder.context
        if secret is None:
            key = seal.KeyGenerator(context).secret_key()
        else:
            key = seal.SecretKey()
            _load(lambda path: key.load(context, path), secret, "key")
        self._key = key
        self._encoder = seal.BatchEncoder(context)
        self._encryptor = seal.Encryptor(context, key)
        self._decryptor = seal.Decryptor(context, key)

    def secret(self) -> bytes:
        """Return the bytes of the key."""
        return _save(self._key.save)

    def encrypt(self, slots: Integers) -> bytes:
        """Encrypt int64 ``(4096,)`` in ``±(modulus-1)/2``."""
        plain = seal.Plaintext()
        self._encoder.encode(slots.tolist(), plain)
        return _save(self._encryptor.encrypt_symmetric(plain).save)

    def decrypt(self, data: bytes) -> Integers:
        """Return the 4096 slots; raise :class:`Refused` for what cannot be decoded exactly."""
        ciphertext = self._adder.read(data)
        if self._decryptor.invariant_noise_budget(ciphertext) <= 0:
            raise Refused("a ciphertext with too much noise to decode, or under another key")
        plain = seal.Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return np.array(self._encoder.decode_int64(plain), dtype=np.int64)


def _save(save: Callable[[str], None]) -> bytes:
    file = os.memfd_create("atoll")
    try:
        save(f"/proc/self/fd/{file}")
        return os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)


def _load(load: Callable[[str], None], data: bytes, what: str) -> None:
    file = os.memfd_create("atoll")
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(file, data[written:], written)
        load(f"/proc/self/fd/{file}")
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        raise Refused(f"bytes that are no {what}: {error}") from error
    finally:
        os.close(file)
