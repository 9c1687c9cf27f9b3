"""A Flower Grid on Flower's simulation runtime: the same ClientApps in Ray's processes.

    with ray_grid({"device-1": make_app_of_one, "device-2": make_app_of_two}) as grid:
        run_rounds(Run(grid, …), initial)      # its node ids are grid.nodes["device-1"], …

With it a run uses every core of a machine, or of several: ``address`` names a Ray cluster that is
there, and without one it lasts as long as the block, on this machine alone. An app is made in
the process that runs it, from something that can be pickled; it may hold what cannot.

All that touches the runtime's internals is here, written for flwr 1.41. ``flwr run`` and the
deprecated ``run_simulation`` both end in what this uses: an in-memory link state, the grid over
it, and ``vce_api.run_api``, the loop that carries messages to a *backend* and replies back. Their
backend gives each message to whichever Ray actor is idle, with the ClientApp made anew. A party
to a private sum remembers between phases what must not leave its process, and a TenSEAL context
cannot be pickled. So the backend here is our own: an actor holds some of the nodes for good,
dealt out in turn, and keeps their apps.

Replies, errors among them, are those of a real node (:func:`atoll.federation.flower.answer`). An
actor that dies, with its machine or for want of memory, is an error reply from each of its nodes
in every phase to come. Nothing is sent home by Flower or Ray, and no dashboard is started.
"""

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import ray
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend import Backend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from atoll.federation.errors import LinkError
from atoll.federation.flower import answer, claim_run

MakeApp = Callable[[], ClientApp]
"""Makes a node's ClientApp where it runs; can be pickled."""

OBJECT_STORE: Final = 200 * 1024 * 1024
"""Bytes of shared memory for messages on their way; Ray writes to disk what is more."""
_RUN: Final = 1
_START: Final = 120.0
"""Seconds for all actors to be up."""
_LOOK: Final = 5.0
"""Seconds for a cluster's address to answer."""
_AHEAD: Final = 2
"""Messages under way for each actor: one in work and one that waits."""
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default to come, without the warning of it
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


class RayGrid(InMemoryGrid):
    """Flower's in-memory grid; ``nodes`` are the node ids by device.

    :meth:`pull_messages` raises :class:`LinkError` once the runtime has ended.
    """

    def __init__(self, factory: LinkStateFactory, nodes: Mapping[str, int]) -> None:
        super().__init__(factory)
        self.nodes = dict(nodes)
        self.broken: Exception | None = None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies there are to ``message_ids``, each once."""
        if self.broken is not None:
            raise LinkError(f"the simulation on Ray has ended ({self.broken})") from self.broken
        return super().pull_messages(message_ids)


@contextmanager
def ray_grid(makers: Mapping[str, MakeApp], address: str | None = None) -> Iterator[RayGrid]:
    """Return a grid over one node for each of ``makers``, for a block.

    ``address`` is that of a Ray cluster: ``host:port``, or ``auto`` on a machine that is part of
    one. Its machines need the same Atoll and Python. Raises :class:`LinkError` when there is no
    Ray to be had.
    """
    claim_run(_RUN)
    factory = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
    )
    run = _registered(factory)
    numbers = vce_api._register_nodes(len(makers), factory)  # noqa: SLF001 -- see the docstring
    contexts = vce_api._register_node_info_stores(numbers, run)  # noqa: SLF001
    grid = RayGrid(factory, dict(zip(makers, numbers, strict=True)))
    grid.set_run(run)
    with _silent(logging.getLogger("flwr")), _ray(address):
        backend = _Pinned(_hosts({grid.nodes[name]: maker for name, maker in makers.items()}))
        stop = threading.Event()

        def carry() -> None:
            try:
                vce_api.run_api(
                    _no_app, lambda: backend, numbers, factory, contexts, stop, VceMetrics()
                )
            except Exception as error:  # noqa: BLE001  # whatever ended it: whoever pulls is told
                grid.broken = error

        runtime = threading.Thread(target=carry, name="simulation-runtime")
        runtime.start()
        try:
            yield grid
        finally:
            stop.set()
            backend.end()
            runtime.join()


class _Host:
    """An actor: some of the nodes, their apps made when first asked and kept from then on."""

    def __init__(self, makers: Mapping[int, MakeApp]) -> None:
        import torch

        torch.set_num_threads(1)  # an actor has one core, and sums of floats one order
        claim_run(_RUN)
        self._makers = makers
        self._apps: dict[int, ClientApp] = {}

    def ready(self) -> bool:
        """Say that the process is there."""
        return True

    def answer(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Return a node's reply, and its context as it is then."""
        node = message.metadata.dst_node_id
        if node not in self._apps:
            self._apps[node] = self._makers[node]()
        return answer(self._apps[node], message, context), context


class _Pinned(Backend):
    """Flower's seam to what computes: each node's messages go to the actor that holds it."""

    def __init__(self, hosts: Mapping[int, Any]) -> None:
        super().__init__({})
        self._hosts = hosts

    def build(self, app_fn: MakeApp) -> None:
        """Do nothing: the actors are there, and make apps of their own."""

    @property
    def num_workers(self) -> int:
        """How many messages are under way at most."""
        return _AHEAD * len(set(self._hosts.values()))

    def is_worker_idle(self) -> bool:
        """Say that a message may come: actors have queues."""
        return True

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Return a node's reply; an actor that is gone raises."""
        host = self._hosts[message.metadata.dst_node_id]
        return cast("tuple[Message, Context]", ray.get(host.answer.remote(message, context)))

    def terminate(self) -> None:
        """Do nothing: whoever made the actors ends them."""

    def end(self) -> None:
        """End the actors, whatever they are at."""
        for host in set(self._hosts.values()):
            ray.kill(host)


def _registered(factory: LinkStateFactory) -> Run:
    """Return a run that the link state takes messages for, as ``run_simulation`` makes it."""
    run = Run.create_empty(_RUN)
    run.federation_id = NOOP_FEDERATION_ID
    run.primary_task_id = _RUN
    state = cast("InMemoryLinkState", factory.state())
    state.run_ids[_RUN] = RunRecord(run=run)
    state.task_store[_RUN] = Task(task_id=_RUN, run_id=_RUN)
    return run


def _hosts(makers: Mapping[int, MakeApp]) -> dict[int, Any]:
    """Return each node's actor: an actor for each core, nodes dealt out in turn; all are up."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's
    cores = max(1, int(resources.get("CPU", 1)))
    shares = [dict(list(makers.items())[first::cores]) for first in range(cores)]
    remote = ray.remote(_Host).options(num_cpus=1, scheduling_strategy="SPREAD")
    hosts: Sequence[Any] = [remote.remote(share) for share in shares if share]
    try:
        ray.get([host.ready.remote() for host in hosts], timeout=_START)
    except ray.exceptions.RayError as error:
        raise LinkError(f"the processes on Ray did not start: {error}") from error
    return {node: host for host, share in zip(hosts, shares, strict=False) for node in share}


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Connect to Ray for a block, or have one of our own, whose files go with it."""
    _look(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        own: dict[str, Any] = {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_temp_dir": folder,
        }
        try:
            with _environment(_QUIET):  # Ray's processes are started with it
                ray.init(address=address or "local", **quiet, **({} if address else own))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"at {address}" if address else "on this machine"
            raise LinkError(f"Ray {where} cannot be used: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def _look(address: str | None) -> None:
    """Raise :class:`LinkError` where nobody listens: Ray would try for ten minutes."""
    if address in (None, "auto"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _LOOK).close()
    except (OSError, ValueError, OverflowError) as error:
        raise LinkError(
            f"no Ray cluster answers at {address} ({error}); give host:port as `ray start --head` "
            "prints it"
        ) from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Have environment variables for a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Keep a logger silent for a block: what it would say of a reply is in the reply."""
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _no_app() -> ClientApp:
    raise NotImplementedError("nodes have apps of their own")
