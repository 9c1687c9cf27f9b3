"""The numbers that ride behind an update: what a device says, what the hub reads.

Small statistics need no message of their own: each is one more coordinate of the sum, a number
in [-1, 1] with noise of its own (:mod:`atoll.privacy.update`). In this order, where they ride:

- the device's *weight* w = min(examples, cap)/cap;
- w times its update's *effective steps* over the most that count, where the update is divided by
  them (FedNova, Wang et al., NeurIPS 2020; :func:`atoll.federation.strategies.effective_steps`);
- whether its update's norm was within the clipping norm, b = 0 or 1, as (b - p)/max(p, 1 - p)
  for the share p of updates that shall be. At p = 1/2 this is the paper's b - 1/2 over its
  sensitivity 1/2 (Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private Learning
  with Adaptive Clipping", NeurIPS 2021). Minus p rather than 1/2, so that a device that is not
  there counts neither way, and nothing need be known of how many were.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from atoll.federation.plan import Plan
from atoll.federation.strategies import effective_steps
from atoll.privacy.update import Sums, UpdateSpec

Floats = npt.NDArray[np.float64]

FARTHEST: Final = 2.0**20
"""The clipping norm moves by this factor at most from where the plan lets it start."""


@dataclass(frozen=True, slots=True)
class Riders:
    """Which numbers ride.

    ``weight_cap`` is how many examples weigh one, 0 for equal weights; ``clip_quantile`` the
    share of updates that shall be within the clipping norm, 0 when the norm is fixed;
    ``most_steps`` the most effective steps that count, 0 when updates are not divided by them.
    """

    weight_cap: int = 0
    clip_quantile: float = 0.0
    most_steps: float = 0.0

    @classmethod
    def of(cls, plan: Plan) -> "Riders":
        """Return those of a plan."""
        training, adaptive = plan.training, plan.privacy.clip == "adaptive"
        return cls(
            training.weight_cap or 0,
            plan.privacy.clip_quantile if adaptive else 0.0,
            effective_steps(training.step_cap or 0, training),
        )

    @property
    def count(self) -> int:
        """How many coordinates they take."""
        return bool(self.weight_cap) + bool(self.most_steps) + bool(self.clip_quantile)

    def weight(self, examples: int) -> float:
        """Return a device's weight, in [0, 1]."""
        return min(examples, self.weight_cap) / self.weight_cap if self.weight_cap else 1.0

    def values(self, examples: int, *, within: bool, steps: float) -> tuple[float, ...]:
        """Return what a device says.

        ``within``: its update's norm is within the clipping norm; ``steps``: the effective steps
        by which it has divided its update, 0 if by none.
        """
        values = [self.weight(examples)] if self.weight_cap else []
        if self.most_steps:
            values.append(self.weight(examples) * min(steps / self.most_steps, 1.0))
        if self.clip_quantile:
            values.append((within - self.clip_quantile) / self._reach)
        return tuple(values)

    def mean(self, sums: Sums, spec: UpdateSpec, devices: float) -> Floats:
        """Return the mean update, float64 ``(n,)``: Σw·Δ/Σw; of divided ones, times Σw·s/Σw.

        The s are effective steps, and their mean FedNova's τ_eff for which equal devices come to
        FedAvg.
        ``devices`` is how many there were, or are expected to be; with equal weights it is Σw.
        A noisy Σw may come out anywhere, zero and below included. It is taken as at least what
        it is when every device has one example, and as at least the standard deviation that
        its noise is set for, below which it says nothing. So noise can shorten a step, and
        lengthen it only so far. The mean of steps is taken as one at least, and as the most that
        count at most.
        """
        weights, steps = float(devices), 1.0
        if self.weight_cap:
            least = max(devices / self.weight_cap, spec.rider_noise_multiplier)
            weights = max(float(sums.riders[0]), least)
        if self.most_steps:
            said = float(sums.riders[1 if self.weight_cap else 0]) * self.most_steps / weights
            steps = min(max(said, 1.0), self.most_steps)
        return sums.update / (weights / steps)

    def next_clip_norm(self, plan: Plan, clip_norm: float, sums: Sums, devices: float) -> float:
        """Return the clipping norm of the next round: C·exp(-η·(b̄ - p)); a fixed one stays.

        The noisy b̄ - p is cut to what a share can be, so that one round moves the norm by a
        factor of exp(±η) at most, and in all it moves by :data:`FARTHEST` at most: updates of
        zero, say, would otherwise take it to zero with them.
        """
        quantile = self.clip_quantile
        if not quantile:
            return clip_norm
        excess = float(sums.riders[-1]) * self._reach / devices
        excess = min(max(excess, -quantile), 1 - quantile)
        moved = clip_norm * math.exp(-plan.privacy.clip_rate * excess)
        start = plan.privacy.clip_norm
        return min(max(moved, start / FARTHEST), start * FARTHEST)

    @property
    def _reach(self) -> float:
        return max(self.clip_quantile, 1 - self.clip_quantile)
