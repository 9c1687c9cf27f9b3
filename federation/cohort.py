"""Who takes part in a run, and which of them are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from flwr.serverapp import Grid

from atoll.federation.errors import RoundFailed
from atoll.federation.exchange import Clock
from atoll.privacy.keystream import Keystream

Name = TypeVar("Name", str, int)
"""What a device is called: by its id, or by its number in a simulation."""

_LOOK_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the cohort: its Flower node and its certificate (PEM)."""

    node_id: int
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who takes part: all by device id, and which of them train and which evaluate.

    ``labels`` are those of the devices that carry any.
    """

    members: Mapping[str, Member]
    trainers: Sequence[str]
    evaluators: Sequence[str]
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def nodes(self) -> dict[str, int]:
        """Flower node ids by device."""
        return {device: member.node_id for device, member in self.members.items()}

    @property
    def roster(self) -> dict[str, bytes]:
        """Certificates of the trainers, as :func:`atoll.privacy.modes.hub_session` takes them."""
        return {device: self.members[device].certificate for device in self.trainers}


def draw(names: Sequence[Name], rate: float, entropy: Keystream) -> list[Name]:
    """Return a Poisson sample of ``names``: each is in with probability ``rate``, on its own.

    ``rate`` is rounded up to a multiple of 2**-53. ``entropy`` is ``Keystream.fresh()``, but
    for tests: whoever can predict the draw has no use for what is proved of it.
    """
    coins = entropy.uniform(len(names)) < rate
    return [name for name, drawn in zip(names, coins, strict=True) if drawn]


def await_trainers(
    grid: Grid, cohort: Cohort, *, least: int, hoped: int, timeout: float, clock: Clock
) -> list[str]:
    """Return the trainers that are connected, once ``hoped`` of them are or time is up.

    Raises :class:`RoundFailed` when ``least`` are not there after ``timeout`` seconds.
    """
    deadline = clock.now() + timeout
    while True:
        online = set(grid.get_node_ids())
        present = [name for name in cohort.trainers if cohort.members[name].node_id in online]
        late = clock.now() >= deadline
        if len(present) >= hoped or (late and len(present) >= least):
            return present
        if late:
            raise RoundFailed(
                f"{len(present)} of {len(cohort.trainers)} training devices are connected and "
                f"the plan needs {least}; check that their agents run, or lower "
                "cohort.min_devices"
            )
        clock.pause(_LOOK_SECONDS)
