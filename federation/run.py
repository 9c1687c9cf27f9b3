"""What a run is made of, and what it tells of each of its rounds.

    run = Run(grid, plan, cohort, "run-7", session, charge, on_round, clock=grid.clock)
    rounds.run_rounds(run, initial)          # or buffered.run_buffered
    evaluation.evaluate(run, weights)

All of it stays the same from the run's first round to its last question; what changes is in a
:class:`atoll.federation.checkpoints.Checkpoint`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.plan import Plan
from atoll.federation.running_statistics import Running
from atoll.federation.selection import LeftOut
from atoll.privacy.keystream import Keystream
from atoll.privacy.modes import HubSession

Charge = Callable[[int, int], float | None]
"""Charges a round, by its number and that of the trainers that are connected.

Returns the ε spent so far, none when nothing bounds it, and raises
:class:`atoll.privacy.errors.BudgetExceeded` for a round that would overspend.
"""


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round as it went.

    ``survivors`` are the devices in the sum, none when the round was thrown away; ``dropped``
    the other trainers of the round's cohort, with the reason. ``loss`` is the mean of what
    survivors reported; ``epsilon`` what the population has spent so far. Bytes are payload of
    all devices together. ``clip_norm`` is the clipping norm that the round used. Of ``drawn``
    trainers ``connected`` were there when it began. A ``lost`` round broke off, and nothing
    else is known of it. ``accuracy`` is the share of ``evaluated`` held-back examples that the
    weights after it got right, in ``evaluate_seconds`` more; none where nobody was asked.
    """

    round: int
    seconds: float
    survivors: tuple[str, ...]
    dropped: Mapping[str, str]
    loss: float | None
    epsilon: float | None
    bytes_up: int
    bytes_down: int
    clip_norm: float
    drawn: int = 0
    connected: int = 0
    lost: bool = False
    accuracy: float | None = None
    evaluated: int = 0
    evaluate_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """What stays the same through a run.

    ``name`` names the run to devices and must be the same after a restart. ``charge`` is called
    before a round starts. ``on_round`` hears of every round, thrown away or not, and again of one
    after which devices were asked for the accuracy. ``entropy`` is what cohorts and the hub's
    noise are drawn from: a fresh keystream, but for tests. ``left_out`` says before each round
    who may not train; a plan with a ``cohort.rule`` does not run without. ``frozen`` is the digest
    of the weights that nobody trains (:class:`atoll.federation.layout.Layout`); ``running`` says
    which of those that travel are running statistics.
    """

    grid: Grid
    plan: Plan
    cohort: Cohort
    name: str
    session: HubSession
    charge: Charge
    on_round: Callable[[RoundReport], None]
    checkpoints: Checkpoints | None = None
    clock: Clock = SYSTEM_CLOCK
    entropy: Keystream = field(default_factory=Keystream.fresh)
    left_out: LeftOut | None = None
    frozen: str = ""
    running: Running | None = None
