"""Running means and variances of batch normalisation, which travel among the weights.

They follow no gradient. A strategy's momentum or its adaptive step would carry them past what any
device measured, and a variance below zero, after which the network says NaN. So they move by the
round's mean, whatever the strategy; and a variance that noise, or rounding, takes below zero is
zero, which makes of a release no further one.

The mean is that of what devices measured where each sends its change as it is: not under FedNova,
which divides each device's change by its steps, where these are unlike. Under FedBuff older changes
count less.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.federation.parameters import Vector

Floats = npt.NDArray[np.float64]


class Running(NamedTuple):
    """Where they lie in the hub's vector: ``places`` all, ``variances`` those of them; ``(n,)``."""

    places: npt.NDArray[np.bool_]
    variances: npt.NDArray[np.bool_]

    def followed(self, weights: Vector, update: Floats, mean: Floats) -> Floats:
        """Return the weights after ``update``, the strategy's, of the round's ``mean`` change.

        All are ``(n,)``.
        """
        following = weights + np.where(self.places, mean, update)
        floor = np.where(self.variances, 0.0, -np.inf)
        return np.maximum(following, floor)
