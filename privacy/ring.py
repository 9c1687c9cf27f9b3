"""Vectors of integers as words modulo 2**(8·bytes), and the masks that hide them.

A word holds one or more signed integers as the balanced digits of a radix wide enough for the
sum of all parties (:mod:`atoll.privacy.packing` does the same in the slots of a ciphertext), so a
sum of words is the word of the sum, and a mask that is uniform over the words hides it wholly.
Digits per word and bytes per word are chosen so that a value takes the fewest bytes: two values
of 20 bits share five bytes.

On the wire a vector is its words' low bytes in one plane and the high bytes in others, of widths
that numpy has, so that adding one needs no unpacking.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from atoll.privacy.errors import BadParameters, Refused
from atoll.privacy.sums import Integers, SumSpec

Words = npt.NDArray[np.uint64]

MAX_BYTES: Final = 8
_CHUNK: Final = 1 << 15
"""Words masked at a time: they and a stretch of mask stay in the processor's cache."""
_BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class Ring:
    """How a vector of ``length`` values lies in words: ``per_word`` digits of ``radix`` in each."""

    length: int
    radix: int
    per_word: int
    word_bytes: int

    @classmethod
    def of(cls, spec: SumSpec) -> "Ring":
        """Return the smallest layout; raise :class:`BadParameters` when a value is too wide."""
        radix = 2 * spec.parties * spec.bound + 1
        fits = [
            (size / count, size, count)
            for size in range(1, MAX_BYTES + 1)
            if (count := _digits(radix, 8 * size))
        ]
        if not fits:
            raise BadParameters(
                f"a sum of {spec.parties} values up to {spec.bound} does not fit 64 bits; "
                "lower privacy.bits or privacy.noise_multiplier"
            )
        _, size, count = min(fits)
        return cls(spec.length, radix, count, size)

    @property
    def words(self) -> int:
        """How many words a vector takes."""
        return -(-self.length // self.per_word)

    @property
    def size(self) -> int:
        """How many bytes a vector takes."""
        return self.words * self.word_bytes

    @property
    def planes(self) -> "tuple[_Plane, ...]":
        """Return the planes, low bytes first."""
        found, shift = [], 0
        for width in (8, 4, 2, 1):
            if self.word_bytes * 8 - shift >= width * 8:
                found.append(_Plane(np.dtype(f"<u{width}"), shift))
                shift += width * 8
        return tuple(found)

    def pack(self, values: Integers) -> Words:
        """Return the words of ``values``, int64 ``(length,)``; modulo 2**64, not yet the ring's."""
        return self._join(self._digits(values))

    def _digits(self, values: Integers) -> Integers:
        """Return ``values`` as ``(per_word, words)``, zeros behind them."""
        missing = self.words * self.per_word - self.length
        full = np.pad(values, (0, missing)) if missing else values
        return full.reshape(self.per_word, self.words)

    def _join(self, digits: Integers) -> Words:
        words: Integers = digits[0].copy()
        for place in range(1, self.per_word):
            words += digits[place] * np.int64(self.radix**place)
        return words.view(np.uint64)

    def unpack(self, words: Words) -> Integers:
        """Return the values of a sum, int64 ``(length,)``, from its words."""
        unused = np.uint64(64 - 8 * self.word_bytes)
        # The highest bit of the ring becomes the sign.
        left: Integers = (words << unused).view(np.int64) >> np.int64(unused)
        if self.per_word == 1:
            return left
        half = self.radix // 2
        digits = np.empty((self.per_word, self.words), dtype=np.int64)
        for place in range(self.per_word):
            rest = (left + half) // self.radix
            digits[place] = left - rest * self.radix
            left = rest
        return digits.reshape(-1)[: self.length]

    def masked(self, values: Integers, masks: Iterable["Mask"]) -> bytearray:
        """Return the wire form of ``values``, int64 ``(length,)``, under ``masks``."""
        digits, masking = self._digits(values), _Masking(self, masks)
        wire, planes, start = bytearray(self.size), [], 0
        for plane in self.planes:
            planes.append(np.frombuffer(wire, plane.dtype, self.words, start))
            start += planes[-1].nbytes
        for start in range(0, self.words, _CHUNK):
            words = self._join(digits[:, start : start + _CHUNK])
            masking.add(words)
            for plane, out in zip(self.planes, planes, strict=True):
                out[start : start + _CHUNK] = words >> np.uint64(plane.shift)
        return wire


class _Plane(NamedTuple):
    """Bytes of every word: as which integers, and how far they stand above the lowest bit."""

    dtype: "np.dtype[Any]"
    shift: int


class RunningSum:
    """The sum of vectors as they arrive: one vector's memory, whatever the number of parties."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        *low, top = ring.planes
        # Twice a plane's width holds the carries of as many vectors as a plane has values.
        wide = [np.dtype(f"<u{2 * plane.dtype.itemsize}") for plane in low]
        self._sums = [np.zeros(ring.words, dtype=dtype) for dtype in (*wide, top.dtype)]
        self._left = min((1 << 8 * plane.dtype.itemsize for plane in low), default=1 << 63)

    def add(self, data: "bytes | bytearray | memoryview") -> None:
        """Add a vector in its wire form; raise :class:`Refused` for one of another size."""
        size = memoryview(data).nbytes
        if size != self._ring.size:
            raise Refused(f"{size} bytes instead of {self._ring.size}")
        if not self._left:
            raise Refused("more vectors than this sum has room for")
        self._left -= 1
        start = 0
        for plane, total in zip(self._ring.planes, self._sums, strict=True):
            part = np.frombuffer(data, dtype=plane.dtype, count=self._ring.words, offset=start)
            np.add(total, part, out=total)
            start += part.nbytes

    def words(self) -> Words:
        """Return the sum."""
        total = np.zeros(self._ring.words, dtype=np.uint64)
        for plane, part in zip(self._ring.planes, self._sums, strict=True):
            total += part.astype(np.uint64) << np.uint64(plane.shift)
        return total


class Mask(NamedTuple):
    """A mask by its 32-byte key, which masks one vector and does nothing else; or its negative."""

    key: bytes
    negative: bool = False


def add_masks(words: Words, ring: Ring, masks: Iterable[Mask]) -> None:
    """Add masks to ``words`` in place."""
    masking = _Masking(ring, masks)
    for start in range(0, ring.words, _CHUNK):
        masking.add(words[start : start + _CHUNK])


class _Masking:
    """Masks, a stretch of words at a time: AES-256 in counter mode by key, plane by plane."""

    def __init__(self, ring: Ring, masks: Iterable[Mask]) -> None:
        self._ring = ring
        self._streams = [
            (np.subtract if mask.negative else np.add, _streams(mask.key, len(ring.planes)))
            for mask in masks
        ]
        self._zeros = memoryview(bytes(_CHUNK * MAX_BYTES))
        self._drawn = bytearray(len(self._zeros) + _BLOCK)

    def add(self, words: Words) -> None:
        """Add the next stretch of every mask to ``words``, at most a chunk, in place."""
        planes, size = self._ring.planes, words.size
        sums = [words, *_zeros(self._ring, size)[1:]]
        for change, encryptors in self._streams:
            for plane, encryptor, total in zip(planes, encryptors, sums, strict=True):
                encryptor.update_into(self._zeros[: size * plane.dtype.itemsize], self._drawn)
                change(total, np.frombuffer(self._drawn, plane.dtype, size), out=total)
        for plane, total in zip(planes[1:], sums[1:], strict=True):
            words += total.astype(np.uint64) << np.uint64(plane.shift)


def _zeros(ring: Ring, size: int) -> "list[npt.NDArray[Any]]":
    """Return a sum for each plane: the highest may lose its carries, those below may not."""
    *low, top = ring.planes
    return [*(np.zeros(size, dtype=np.uint64) for _ in low), np.zeros(size, dtype=top.dtype)]


def _streams(key: bytes, count: int) -> Sequence[CipherContext]:
    """Return a keystream per plane; their counters are 2**120 blocks apart."""
    return [
        Cipher(algorithms.AES256(key), modes.CTR(bytes([plane]) + bytes(_BLOCK - 1))).encryptor()
        for plane in range(count)
    ]


def _digits(radix: int, bits: int) -> int:
    """Return how many balanced digits of ``radix`` fit ``bits`` bits, the sign included."""
    count = 0
    while radix ** (count + 1) <= 1 << bits:
        count += 1
    return count
