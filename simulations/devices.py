"""Devices of a run that has no hub: who they are, what they hold, and what runs them.

    devices = dealt(plan, 8, kept)      or      devices = found(plan, folder, kept)
    with in_process(devices) as fleet:      # or on_ray(devices, address)
        run(fleet.grid, fleet.nodes, fleet.clock)

``atoll plan run --engine local`` and ``--engine ray`` take from here what a hub has by enrolment.
A device is that of a real fleet: the installed task, the ClientApp, the agent's answers to
questions, and keys certified by an authority, which is made for the occasion and forgotten.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import torch
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from atoll.edge_agent.queries import Rows, handlers
from atoll.federation import client_app
from atoll.federation import task as tasks
from atoll.federation.engine import InProcessGrid
from atoll.federation.errors import BadPlan, DataMissing
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.kept import KeptFiles
from atoll.federation.plan import Plan
from atoll.federation.task import Examples, Split, Task
from atoll.fleet.certificates import private_pem
from atoll.fleet.errors import BadDeviceId
from atoll.fleet.identity import Authority, Identity, Peer, peer_of
from atoll.fleet.queries import Split as Asked
from atoll.fleet.topics import check_device_id
from atoll.privacy.modes import PartyIdentity, party_session
from atoll.simulations import populations
from atoll.simulations.populations import (
    ROWS,
    DirichletPopulation,
    PeoplePopulation,
    Population,
    Simulated,
)

if TYPE_CHECKING:
    from torch import nn

LABELS: Final = "labels.toml"
"""A device's labels, beside its examples: TOML, ``name = "value"`` a line."""


Heard = Callable[[int, int], None]
"""Hears after each device how many are done, and of how many."""


def _unheard(done: int, total: int) -> None:
    del done, total


class Fleet(NamedTuple):
    """Devices that run: a grid over them, their node ids by name, and the clock to wait by."""

    grid: Grid
    nodes: Mapping[str, int]
    clock: Clock


@dataclass(frozen=True)
class Device:
    """A device as it can be sent to another process; ``certificate``, ``ca`` and keys are PEM.

    ``task`` gives the task with this device's examples; ``data`` is the directory that it reads,
    ``kept`` the one for what training carries from round to round.
    """

    name: str
    labels: Mapping[str, str]
    certificate: bytes
    task: Callable[[], Task]
    data: Path
    kept: Path
    ca: bytes
    key: bytes = dataclasses.field(repr=False)
    seal: bytes = dataclasses.field(repr=False)

    def app(self) -> ClientApp:
        """Return its ClientApp."""
        task = self.task()
        key: Any = load_pem_private_key(self.key, None)
        seal: Any = load_pem_private_key(self.seal, None)

        def peer(certificate: bytes) -> Peer:
            return peer_of(certificate, self.ca, datetime.now(UTC))

        @functools.cache
        def rows(split: Asked) -> Rows:
            return Rows(*task.load(self.data, split))

        me = PartyIdentity(self.name, key, seal, peer)
        return client_app.build(
            task,
            self.data,
            lambda mode: party_session(mode, me),
            handlers(rows),
            kept=KeptFiles(self.kept),
        )


class Dealt:
    """A task whose examples are dealt out to this device, wherever it is asked to look for them."""

    def __init__(self, task: Task, population: Population, device: int) -> None:
        self.name, self.input_shape = task.name, task.input_shape
        self.channels, self.classes = task.channels, task.classes
        self._task, self._population, self._device = task, population, device

    def model(self, seed: int) -> "nn.Module":
        """Return the task's model."""
        return self._task.model(seed)

    def load(self, data: Path, split: Split) -> Examples:
        """Return what the device was dealt."""
        del data
        return self._population.examples(self._device, split)


def dealt(plan: Plan, count: int, kept: Path, heard: Heard = _unheard) -> list[Device]:
    """Return ``count`` devices with examples of the plan's task, which its seed deals out.

    All carry the labels that the plan asks for. Each process that runs some of them deals anew
    and comes to the same. ``heard`` follows the making of keys. Raises what
    :func:`atoll.simulations.populations.named` does.
    """
    _population(plan.task, count, plan.seed)
    width = len(str(count))
    sources = {
        f"device-{number:0{width}d}": (
            functools.partial(_dealt, plan.task, count, plan.seed, number - 1),
            Path(),
            plan.cohort.labels,
        )
        for number in range(1, count + 1)
    }
    return _enrolled(sources, kept, heard)


def found(plan: Plan, folder: Path, kept: Path, heard: Heard = _unheard) -> list[Device]:
    """Return a device for each folder in ``folder``, which holds what the plan's task reads.

    ``heard`` follows the making of keys.
    Raises :class:`BadPlan` for folders that are no devices or whose labels cannot be read, and
    :class:`atoll.federation.errors.DataMissing` when the task can read none of them.
    """
    make = functools.partial(tasks.find, plan.task)
    folders = _folders(folder)
    task, why = make(), ""
    for data in folders:
        try:
            task.load(data, "train")
        except DataMissing as error:
            why = why or str(error)
        else:
            sources = {data.name: (make, data, _labels(data)) for data in folders}
            return _enrolled(sources, kept, heard)
    raise DataMissing(f"the task {plan.task!r} finds examples in no folder of {folder}: {why}")


@contextmanager
def in_process(devices: Sequence[Device], heard: Heard = _unheard) -> Iterator[Fleet]:
    """Run devices in this process, one after the other; time stands still while they compute.

    ``heard`` follows the making of their ClientApps.
    Torch has one thread meanwhile, as on a device, so that sums of floats have one order.
    """
    nodes = {device.name: number for number, device in enumerate(devices, 1)}
    apps = {}
    for device in devices:
        apps[nodes[device.name]] = device.app()
        heard(len(apps), len(devices))
    grid = InProcessGrid(apps)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Fleet(grid, nodes, grid.clock)
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_ray(devices: Sequence[Device], address: str | None) -> Iterator[Fleet]:
    """Run devices in Ray's processes (:func:`atoll.federation.ray_engine.ray_grid`)."""
    from atoll.federation.ray_engine import ray_grid

    with ray_grid({device.name: device.app for device in devices}, address) as grid:
        yield Fleet(grid, grid.nodes, SYSTEM_CLOCK)


_Source = tuple[Callable[[], Task], Path, Mapping[str, str]]


def _enrolled(sources: Mapping[str, _Source], kept: Path, heard: Heard) -> list[Device]:
    """Give each device keys and a certificate, of an authority that nobody will see again."""
    now = datetime.now(UTC)
    authority = Authority.create("Atoll without a hub", now)
    devices = []
    for name, (task, data, labels) in sources.items():
        mine = Identity.new()
        devices.append(
            Device(
                name,
                dict(labels),
                authority.issue_device(mine.csr(name), name, now),
                task,
                data,
                kept / name,
                authority.cert_pem,
                private_pem(mine.key),
                private_pem(mine.seal),
            )
        )
        heard(len(devices), len(sources))
    return devices


def _folders(folder: Path) -> list[Path]:
    """Return the devices' folders, absolute, since other processes look for them too."""
    try:
        inside = sorted(folder.resolve().iterdir())
    except OSError as error:
        raise BadPlan(f"{folder} cannot be read: {error.strerror}") from error
    folders = [one for one in inside if one.is_dir() and not one.name.startswith(".")]
    if not folders:
        raise BadPlan(f"{folder} has no folders: there must be one for each device")
    for one in folders:
        try:
            check_device_id(one.name)
        except BadDeviceId as error:
            raise BadPlan(f"the folder {one} cannot be a device: {error}") from error
    return folders


def _labels(data: Path) -> dict[str, str]:
    try:
        return msgspec.toml.decode((data / LABELS).read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadPlan(
            f'{data / LABELS} cannot be read as labels, name = "value" a line: {error}'
        ) from error


def _dealt(task: str, devices: int, seed: int, device: int) -> Task:
    simulated = _population(task, devices, seed)
    return Dealt(simulated.task, simulated.population, device)


@functools.lru_cache(maxsize=1)
def _population(task: str, devices: int, seed: int) -> Simulated:
    """Return devices that share out all the examples there are, with :data:`ROWS` at the least."""
    simulated = populations.named(task, devices, seed)
    population = simulated.population
    if isinstance(population, DirichletPopulation):
        population = dataclasses.replace(population, rows=_rows(len(population.train.y), devices))
    elif isinstance(population, PeoplePopulation):
        examples = sum(len(person.train.y) for person in population.people)
        population = dataclasses.replace(population, rows=_rows(examples, devices))
    return Simulated(simulated.task, population)


def _rows(examples: int, devices: int) -> int:
    return max(ROWS, examples // devices)
