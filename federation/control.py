"""SCAFFOLD: what a device's gradients differ by from all devices', and how each step undoes it.

    control = Control(own, shared, scale, retained)     a device's, in one round
    training.train(..., correction=control.correction)
    sent = control.sent(change, reach, trained)         float64 (2n,), clipped and summed as one
    own = control.following(update.clipped(sent, spec))
    mean, shared = following(plan, mean, shared, share) at the hub

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (ICML 2020),
algorithm 1 with option II. Device i holds a control variate cᵢ, the hub their mean c, all zero at
first. To each gradient the device adds c - cᵢ, so that its steps go where everybody's would; behind
its update Δ = yᵢ - x it sends what changed of cᵢ⁺ = cᵢ - c - Δ/(K·η), and c moves by the mean of
that times the share of the devices that took part. Over all devices c is the mean of the cᵢ.

**K** is the count of effective steps (:func:`atoll.federation.strategies.effective_steps`), the
paper's number of steps without momentum. The correction is part of the gradient, and momentum
carries it as it carries the rest: then cᵢ⁺ is a mean of gradients, and where all devices' gradients
add up to zero no step moves. (Flower's ``niid_bench`` corrects beside the momentum and divides by
the number of steps; the two are one at momentum zero, and with momentum its steps do not stand
still there.)

**One vector.** Update and change are clipped together, to one L2 sensitivity, noised and summed
as one term of 2n values, twice the bytes of FedAvg. The change is multiplied by the reach K·η of
an ordinary device of ``training.control_steps``, the same for all: it is then as long as an
update. The device keeps what it sent after clipping, so that clipping leaves c the mean.

**Noise** on the changes would add up in c from round to round without bound. So with noise a
device sends cᵢ⁺ - ρ·cᵢ and the hub takes c⁺ = ρ·c + mean; with everybody taking part c is still
the mean of the cᵢ, and what noise has put in fades by ρ a round. ρ = 1 is the paper's.

**Single examples** under ``privacy.examples`` are protected as without: a device's variate is made
of noised gradients and added to such (Noble, Bellet and Dieuleveut, AISTATS 2022).

A running statistic has no gradient: its part of every control variate stays zero. A device that
has lost its cᵢ begins at zero again. Until c forgets the lost one, c is off the mean by cᵢ/N, and
the model settles where the gradients' sum is off by as much; without noise c never forgets it.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan, Training
from atoll.federation.strategies import effective_steps

Floats = npt.NDArray[np.float64]

RETAINED: Final = 0.9
"""ρ under noise. The noise in c is then that of one round times 1/√(1 - ρ²) = 2.3."""


def reach(steps: int, training: Training) -> float:
    """Return how far ``steps`` local steps of a constant gradient of length 1 carry."""
    return training.learning_rate * effective_steps(steps, training)


def scale(training: Training) -> float:
    """Return what changes of control variates are multiplied by in a term; 0 without them."""
    return reach(training.control_steps or 0, training)


def retained(plan: Plan) -> float:
    """Return ρ of a plan."""
    return RETAINED if plan.privacy.noise_multiplier else 1.0


class Control(NamedTuple):
    """A device's control variate and the hub's, float32 ``(n,)`` each, as a round begins.

    ``scale`` multiplies the change in a term; ``retained`` is ρ.
    """

    own: Vector
    shared: Vector
    scale: float
    retained: float

    @property
    def correction(self) -> Vector:
        """What is added to each gradient, float32 ``(n,)``."""
        return self.shared - self.own

    def sent(self, change: Vector, reach: float, trained: npt.NDArray[np.bool_]) -> Floats:
        """Return ``change`` ``(n,)`` and the scaled change of the control variate behind it.

        ``reach`` is that of the steps that led there; none leave the variate as it is.
        ``trained`` ``(n,)`` says which weights have gradients.
        """
        own, shared = self.own.astype(np.float64), self.shared.astype(np.float64)
        after = own - shared - np.where(trained, change, 0.0) / reach if reach else own
        return np.concatenate([change, self.scale * (after - self.retained * own)])

    def following(self, sent: Floats) -> Vector:
        """Return the device's next control variate, of which ``sent`` ``(2n,)`` told."""
        moved = sent[len(self.own) :] / self.scale
        return (self.retained * self.own + moved).astype(np.float32)


def following(plan: Plan, mean: Floats, shared: Vector, share: float) -> tuple[Floats, Vector]:
    """Return the mean update ``(n,)`` and the hub's next control variate, of a round's mean.

    ``shared`` is the present one, empty while it is zero; ``share`` of all trainers took part.
    Without control variates that is what was given.
    """
    factor = scale(plan.training)
    if not factor:
        return mean, shared
    update, moved = np.split(mean, 2)
    before = shared if len(shared) else np.zeros(len(update))
    forgotten = (1 - retained(plan)) * before
    return update, (before + share * (moved / factor - forgotten)).astype(np.float32)
