"""Several signed integers in one slot, so that adding slots adds each of them.

With ``radix`` R > 2·parties·bound, the integers v₀, v₁, … of a slot are the balanced digits
of v₀ + v₁·R + v₂·R² …: every digit of a sum of such slots stays within ±(R-1)/2, so nothing
ever carries and the digits come back one by one. The last slot of each block stays empty.
"""

from dataclasses import dataclass

import numpy as np

from atoll.privacy.bfv import SLOTS, plain_modulus
from atoll.privacy.errors import BadParameters
from atoll.privacy.sums import Integers, SumSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """How a term lies in blocks of 4096 slots."""

    length: int
    radix: int
    per_slot: int
    modulus: int

    @classmethod
    def of(cls, spec: SumSpec, plain_bits: int) -> "Layout":
        """Return the densest layout; raise :class:`BadParameters` when one value is too wide."""
        modulus = plain_modulus(plain_bits)
        radix = 2 * spec.parties * spec.bound + 1
        per_slot = 0
        while radix ** (per_slot + 1) <= modulus:
            per_slot += 1
        if per_slot == 0:
            raise BadParameters(
                f"a sum of {spec.parties} values up to {spec.bound} is wider than the "
                f"{plain_bits} bits of a slot; lower privacy.bits or "
                "privacy.noise_multiplier"
            )
        return cls(spec.length, radix, per_slot, modulus)

    @property
    def blocks(self) -> int:
        """How many blocks a term takes."""
        return -(-self.length // (self.per_slot * (SLOTS - 1)))

    def pack(self, values: Integers) -> Integers:
        """Return int64 ``(blocks, 4096)`` from ``(length,)``; the last slots stay empty."""
        room = np.zeros(self.blocks * (SLOTS - 1) * self.per_slot, dtype=np.int64)
        room[: self.length] = values
        digits = room.reshape(self.blocks, self.per_slot, SLOTS - 1)
        slots = np.zeros((self.blocks, SLOTS), dtype=np.int64)
        for place in range(self.per_slot):
            slots[:, :-1] += digits[:, place] * self.radix**place
        return slots

    def unpack(self, slots: Integers) -> tuple[Integers, Integers]:
        """Return the values and the last slots, each centred, of a sum of packed terms."""
        half = self.radix // 2
        digits = np.empty((self.blocks, self.per_slot, SLOTS - 1), dtype=np.int64)
        left = slots[:, :-1].copy()
        for place in range(self.per_slot):
            # Once by division and back: numpy divides by a constant far faster than it takes
            # the remainder.
            higher = (left + half) // self.radix
            digits[:, place] = left - higher * self.radix
            left = higher
        return digits.reshape(-1)[: self.length], slots[:, -1]
