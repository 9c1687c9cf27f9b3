"""Smaller updates: which coordinates of a change a device sends, and what becomes of the others.

    sketch = Sketch(kind, share, places, residual)
    chosen = sketch.chosen(change)                what of a change is clipped and rounded
    sketch.term(chosen, noised, riders)           what enters the sum, riders behind it
    sketch.left(chosen, clipped, spec, weight)    what the device keeps for its next round
    spread(codec, mean, places, length)           on the hub: back to the whole vector

**Random mask** (Konečný et al., "Federated Learning: Strategies for Improving Communication
Efficiency", 2016). The plan's seed, the run and the round pick ``share`` of the coordinates, the
same for all devices, so that any sum, masked, encrypted or noised, is over these alone. A device
clips what is left after the mask: the sensitivity is the clipping norm, and it spends none of it
on what it does not send. Without error feedback the hub multiplies by n/m, so that over masks the
mean is what it would have been ("subsampling", ibid.), and noise with it. With error feedback
nothing is multiplied: what is left out comes later (Stich, Cordonnier and Jaggi, "Sparsified SGD
with Memory", NeurIPS 2018).

**Top-k** (ibid.): a device sends its own largest coordinates, zeros elsewhere. Which they are
says something of its data, and terms that are hidden must be equally long, so it is for ``plain``
alone; there a term with many zeros is written sparsely (:mod:`atoll.privacy.sparse`). Sums,
clipping and the hub's noise on all coordinates are as they were.

**Error feedback** (Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019). A device adds
to its change what it kept of earlier ones, and keeps what the sum does not get: the coordinates
that it did not send, and how far rounding went off in the others. So over the rounds that counted,
what was decoded adds up to the changes, less the last residual. Three things are not kept. What
clipping cuts off: a clipping norm is how much one device may say, and what is beyond it would
pile up for later. Noise: a device that took its own back would undo it. And the change of a round
that did not count: the hub's weights have not moved by it, so the next change has it in it again.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.federation.parameters import Vector
from atoll.federation.plan import Codec, CodecKind
from atoll.privacy import update
from atoll.privacy.errors import BadUpdate
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Integers
from atoll.privacy.update import UpdateSpec

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
"""Coordinates, ascending, none twice."""


def count(length: int, share: float) -> int:
    """Return how many coordinates of ``length`` a share is: one at least."""
    return max(1, min(length, math.ceil(length * share)))


def summed(codec: Codec, length: int) -> int:
    """Return how many coordinates a sum over updates of ``length`` has, riders aside."""
    return count(length, codec.share or 1.0) if codec.kind == "random-mask" else length


def rounded(codec: Codec, length: int) -> int:
    """Return how many values of an update of ``length`` are clipped and rounded."""
    return count(length, codec.share or 1.0)


def mask(length: int, share: float, seed: int, run: str, number: int) -> Places:
    """Return the coordinates of a round: each set of so many is as likely as another.

    No secret, and the same on every machine.
    """
    wanted = count(length, share)
    key = int.from_bytes(
        hashlib.sha256(f"atoll/mask/{seed}/{run}/{number}".encode()).digest()[:8], "big"
    )
    keys = Keystream.replayable(key).words(length)
    last = np.partition(keys, wanted - 1)[wanted - 1]
    # Equal keys, of which there are hardly any, are taken from the front.
    return np.flatnonzero(keys <= last)[:wanted]


def places(codec: Codec, length: int, seed: int, run: str, number: int) -> Places | None:
    """Return the coordinates that a plan's round sums; none are all of them."""
    if codec.kind != "random-mask":
        return None
    return mask(length, codec.share or 1.0, seed, run, number)


def top(values: npt.ArrayLike, share: float) -> Places:
    """Return the coordinates of the largest magnitudes; of equal ones those in front."""
    sizes = np.abs(np.asarray(values, np.float64))
    order = np.argsort(-sizes, kind="stable")[: count(sizes.size, share)]
    return np.sort(order)


class Chosen(NamedTuple):
    """A change with what was kept of earlier ones, ``(n,)``; of these the ``values`` at ``places``.

    No places are all of them.
    """

    wanted: Floats
    places: Places | None
    values: Floats


@dataclass(frozen=True, slots=True)
class Sketch:
    """A device's side of a codec in one round.

    ``mask`` are the round's coordinates under ``random-mask``. ``residual`` float32 ``(n,)`` is
    what the device kept, none where it keeps nothing.
    """

    kind: CodecKind = "none"
    share: float = 1.0
    mask: Places | None = None
    residual: Vector | None = None

    def chosen(self, change: npt.ArrayLike) -> Chosen:
        """Return what of ``change``, ``(n,)``, this round sends.

        Raises :class:`BadUpdate` for NaN and Inf, in what is not sent too: it would be kept.
        """
        wanted = np.asarray(change, np.float64)
        if self.kind == "none" and self.residual is None:
            return Chosen(wanted, None, wanted)
        if not np.isfinite(wanted).all():
            raise BadUpdate("the update holds NaN or Inf; the device's training diverged")
        if self.residual is not None:
            wanted = wanted + self.residual
        places = top(wanted, self.share) if self.kind == "top-k" else self.mask
        return Chosen(wanted, places, wanted if places is None else wanted[places])

    def term(self, chosen: Chosen, integers: Integers, riders: int) -> Integers:
        """Return what enters the sum, from what the ``chosen`` values and ``riders`` became."""
        if self.kind != "top-k" or chosen.places is None:
            return integers
        term = np.zeros(chosen.wanted.size + riders, np.int64)
        term[chosen.places] = integers[: chosen.places.size]
        term[chosen.wanted.size :] = integers[chosen.places.size :]
        return term

    def left(
        self, chosen: Chosen, clipped: update.Clipped, spec: UpdateSpec, weight: float
    ) -> Vector | None:
        """Return the next residual, float32 ``(n,)``: what a sum with these integers lacks.

        None where nothing is kept. ``clipped`` holds no noise yet; ``weight`` is that by which
        the device weighed them.
        """
        if self.residual is None:
            return None
        said = clipped.values[: chosen.values.size] / (spec.scale * weight)
        left = chosen.wanted.copy()
        left[... if chosen.places is None else chosen.places] = (
            update.clipped(chosen.values, spec) - said
        )
        return left.astype(np.float32)


WHOLE: Final = Sketch()
"""Sends everything and keeps nothing."""


def spread(codec: Codec, mean: Floats, sent: Places | None, length: int) -> Floats:
    """Return what a mean of those ``sent`` says of all ``length`` coordinates: zero of others."""
    if sent is None:
        return mean
    whole = np.zeros(length)
    whole[sent] = mean if codec.feedback else mean * (length / sent.size)
    return whole
