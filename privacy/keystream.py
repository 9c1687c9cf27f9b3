"""Random words from AES-256 in counter mode.

Noise that protects people must not be predictable, which rules out numpy's generators; and a
decision must be replayable in a test, which rules out ``os.urandom`` deep inside. A keystream
is both: unpredictable under a fresh key, the same again under the same key.
"""

import hashlib
import os
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES: Final = 32

_WORD: Final = np.dtype("<u8")
_HALF: Final = np.dtype("<u4")


class Keystream:
    """A stream of uniform 64-bit words under a 32-byte ``key``, which is used for nothing else.

    Not for use by two threads at once.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a keystream key has {KEY_BYTES} bytes, not {len(key)}")
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def fresh(cls) -> "Keystream":
        """Return a keystream that nobody can predict."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def replayable(cls, seed: int) -> "Keystream":
        """Return the keystream of a seed, for simulations and for runs without noise.

        Never for noise that protects anybody.
        """
        return cls(hashlib.sha256(f"atoll keystream {seed}".encode()).digest())

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return ``count`` uniform words."""
        data = self._encryptor.update(bytes(count * _WORD.itemsize))
        return np.frombuffer(data, dtype=_WORD).astype(np.uint64, copy=False)

    def below(self, limit: int, count: int) -> npt.NDArray[np.int64]:
        """Return ``count`` integers, exactly uniform in ``[0, limit)``; ``limit`` ≤ 2**63."""
        if not 1 <= limit <= 2**63:
            raise ValueError(f"limit {limit} is outside 1 to 2**63")
        out = np.zeros(count, dtype=np.int64)
        if limit == 1:
            return out
        shift = np.uint64(64 - (limit - 1).bit_length())
        filled = 0
        while filled < count:
            # A word of just enough bits is kept more than half the time.
            drawn = self.words((count - filled) * 2 + 16) >> shift
            kept = drawn[drawn < np.uint64(limit)][: count - filled]
            out[filled : filled + kept.size] = kept.astype(np.int64)
            filled += kept.size
        return out

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return ``count`` floats uniform on the 2**53 multiples of 2**-53 in ``[0, 1)``."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def fill(self, out: npt.NDArray[np.float64]) -> None:
        """Fill ``out`` with floats uniform on the 2**32 multiples of 2**-32 in ``[0, 1)``.

        Half the stream of :meth:`uniform`, and no copy, where so fine a grid is enough.
        """
        data = self._encryptor.update(bytes(out.size * _HALF.itemsize))
        np.multiply(np.frombuffer(data, dtype=_HALF), 2.0**-32, out=out)
