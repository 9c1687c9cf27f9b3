"""A published data set dealt out to devices: each example on one of them, as papers split it.

    dealt(labels, devices, alpha, seed) -> the places of each device's examples

By labels, from a Dirichlet distribution: Yurochkin et al., "Bayesian Nonparametric Federated
Learning of Neural Networks" (ICML 2019), with the two rules that NIID-Bench adds (Li, Diao, Chen
and He, "Federated Learning on Non-IID Data Silos", ICDE 2022, arXiv 2102.02079): a device that
has its even share already gets nothing of the classes still to come, and a deal that leaves
a device with fewer than :data:`LEAST` examples is dealt anew. Draws are in the order of Flower's
baseline ``niid_bench``, so that its seed gives its devices.

Unlike the populations of :mod:`atoll.simulations.populations`, which draw with replacement for
any number of devices, this is as large as its data, and is kept in memory.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from atoll.federation.errors import BadPlan
from atoll.federation.task import Examples, Split

LEAST: Final = 10
"""Examples that every device has (ibid.)."""
_ATTEMPTS: Final = 1000

Indices = npt.NDArray[np.int64]


def dealt(labels: Indices, devices: int, alpha: float, seed: int) -> tuple[Indices, ...]:
    """Return the places in ``labels``, int64 ``(n,)``, of what each device holds.

    Class after class: its places are shuffled, and cut by shares from a symmetric Dirichlet
    distribution of ``alpha`` over the devices that are not full yet.

    Raises :class:`BadPlan` when there are too few examples for so many devices.
    """
    rng = np.random.default_rng(seed)
    full = len(labels) / devices
    for _ in range(_ATTEMPTS if full >= LEAST else 0):
        held: list[list[Indices]] = [[] for _ in range(devices)]
        sizes = np.zeros(devices, dtype=np.int64)
        for label in np.unique(labels):
            places = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(devices, alpha)) * (sizes < full)
            ends = (np.cumsum(shares / shares.sum()) * len(places)).astype(np.int64)
            for device, part in enumerate(np.split(places, ends[:-1])):
                held[device].append(part)
                sizes[device] += len(part)
        if sizes.min() >= LEAST:
            return tuple(np.concatenate(parts) for parts in held)
    raise BadPlan(
        f"{len(labels):,} examples do not give {devices:,} devices {LEAST} or more each at "
        f"alpha = {alpha:g}; simulate fewer devices"
    )


@dataclass(frozen=True)
class DealtPopulation:
    """Devices that hold ``held[i]`` each, and a test set beside them.

    ``tested_on`` is what a published accuracy is of: no hub has such examples, and no device.
    """

    held: tuple[Examples, ...]
    tested_on: Examples

    @property
    def size(self) -> int:
        """How many devices there are."""
        return len(self.held)

    def examples(self, device: int, split: Split) -> Examples:
        """Return what a device holds; for testing, what all are tested on."""
        return self.tested_on if split == "test" else self.held[device]
