"""The buffer of an asynchronous step: which updates it takes, what each counts, what they make.

Only decisions and sums; who is asked, and how updates come, is for
:mod:`atoll.federation.buffered`.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from atoll.federation import release
from atoll.federation.conversation import Learned
from atoll.federation.plan import Asynchrony, Plan
from atoll.federation.riders import Riders
from atoll.federation.run import RoundReport
from atoll.privacy import update
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Integers


def weight(staleness: int) -> float:
    """Return what an update counts that is so many steps old (FedBuff, section 5)."""
    return 1 / math.sqrt(1 + staleness)


@dataclass
class Buffer:
    """The updates of one step, added up as they come, and the book of them.

    ``total`` is int64 ``(n,)`` with what rides at its end; ``least`` updates make a step.
    """

    wanted: Asynchrony
    least: int
    spec: update.UpdateSpec
    riders: Riders
    total: Integers
    folded: dict[str, int] = field(default_factory=dict)
    """Whose updates are in it, and under which number each was asked for."""
    failed: dict[str, str] = field(default_factory=dict)
    """Whose updates came to nothing, and why."""
    losses: list[float] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Who was asked while it was filled."""
    up: int = 0
    """Bytes that came from devices meanwhile."""
    down: int = 0
    """And bytes that went to them."""

    @classmethod
    def empty(cls, plan: Plan, wanted: Asynchrony, parameters: int) -> "Buffer":
        """Return a buffer for updates of a model of ``parameters``."""
        spec = release.update_spec(plan, plan.privacy.clip_norm)
        length = release.values(plan, parameters) + spec.riders
        total = np.zeros(length, dtype=np.int64)
        return cls(wanted, plan.cohort.min_devices, spec, Riders.of(plan), total)

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return len(self.folded) == self.wanted.buffer

    @property
    def makes_a_step(self) -> bool:
        """Whether enough updates are in it."""
        return len(self.folded) >= self.least

    @property
    def why(self) -> str:
        """Why it would be thrown away."""
        return f"{len(self.folded)} updates came in and a step needs {self.least}"

    def too_old(self, staleness: int) -> str:
        """Say why an update so many steps old is not taken; nothing if it is."""
        most = self.wanted.max_staleness
        if most is None or staleness <= most:
            return ""
        return f"its update is {staleness} steps old, and {most} are allowed"

    def fold(
        self,
        device: str,
        number: int,
        term: Integers,
        loss: float,
        staleness: int,
        rounding: Keystream,
    ) -> None:
        """Add the term that ``device`` was asked for under ``number``.

        ``rounding`` is what the weighed integers are rounded with. A loss that is not finite is
        left out of the mean.
        """
        self.total += update.weighed(term, weight(staleness), self.spec.riders, self.spec, rounding)
        self.folded[device] = number
        if math.isfinite(loss):
            self.losses.append(loss)

    def learned(self, entropy: Keystream) -> Learned:
        """Return the sum, with the hub's noise, over the number of updates in it."""
        noised = update.release(self.total, self.spec, entropy)
        mean = self.riders.mean(
            update.decode(noised, self.spec), self.spec, float(len(self.folded))
        )
        return Learned(mean, self.spec.clip_norm, np.zeros(0, np.float32))

    def report(self, number: int, seconds: float, epsilon: float | None) -> RoundReport:
        """Say how the step went; thrown away, it has no survivors."""
        kept = self.makes_a_step
        thrown = {} if kept else dict.fromkeys(self.folded, self.why)
        return RoundReport(
            round=number,
            seconds=seconds,
            survivors=tuple(sorted(self.folded)) if kept else (),
            dropped={**self.failed, **thrown},
            loss=float(np.mean(self.losses)) if kept and self.losses else None,
            epsilon=epsilon,
            bytes_up=self.up,
            bytes_down=self.down,
            clip_norm=self.spec.clip_norm,
            drawn=len(self.folded) + len(self.failed),
            connected=len(self.folded) + len(self.failed),
        )
