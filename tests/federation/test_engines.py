"""One ServerApp, one ClientApp, one plan: the same model in process, on Ray and on a SuperLink."""

import dataclasses
import gc
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import mortal
import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from links import HERE, Hub, wait_for
from sqlalchemy import insert

from atoll.federation import parameters, plan, rounds
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort, Member
from atoll.federation.errors import LinkError
from atoll.federation.evaluation import ask
from atoll.federation.exchange import SYSTEM_CLOCK
from atoll.federation.ray_engine import RayGrid, ray_grid
from atoll.federation.run import RoundReport, Run
from atoll.federation.warm_node import WarmNode
from atoll.fleet.certificates import private_pem
from atoll.privacy.ledger import Ledger, MemoryStore
from atoll.privacy.modes import hub_session
from atoll.server import runs, schema
from atoll.server.charging import event_of
from atoll.server.claims import Start
from atoll.server.runs import ATTEMPT_KEY, RUN_KEY, SERVER_APP
from atoll.server.server_app import execute
from atoll.server.settings import Settings
from atoll.server.store import Store
from atoll.simulations import devices
from atoll.simulations.devices import Device, Fleet
from atoll.simulations.digits import Digits

PLAN = """
name = "parity"
task = "digits"
model = "digits"
rounds = 2
seed = 7
training = {{ learning_rate = 0.1, server_momentum = 0.5, local_epochs = 3 }}
cohort = {{ min_devices = 3, round_timeout = 90 }}
privacy = {{ mode = "{mode}", clip_norm = 2.0, noise_multiplier = {noise} }}
"""
RUN = "exact"
EXACT = PLAN.format(mode="plain", noise=0)


def dealt(kept: Path) -> list[Device]:
    return devices.dealt(plan.loads(EXACT), 3, kept)


@contextmanager
def unheard() -> Iterator[None]:
    """Let Ray leave files and processes of its own for the garbage collector to find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Device], RayGrid]]:
    """Run devices on Ray, and one that can be asked to die."""
    mine = dealt(tmp_path_factory.mktemp("ray"))
    makers = {device.name: device.app for device in mine} | {"mortal": mortal.app}
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PYTHONPATH", path)
        with unheard():
            grid = stack.enter_context(ray_grid(makers))
        yield mine, grid
        with unheard():
            stack.close()


@contextmanager
def on_superlink(hub: Hub, dealt: list[Device]) -> Iterator[tuple[list[Device], dict[str, int]]]:
    """Enrol devices at a hub and run them as warm nodes.

    They share this process, and so torch's generator of random numbers: one at a time.
    """
    enrolled, nodes, stop, turn = [], {}, threading.Event(), threading.Lock()

    def in_turn(app: ClientApp) -> ClientApp:
        def answer(message: Message, context: Context) -> Message:
            with turn:
                return app(message, context)

        return cast("ClientApp", answer)

    threads = []
    for device in dealt:
        directory, mine = hub.identity(device.name)
        nodes[device.name] = int(hub.admin.register_node(mine.public_pem()))
        enrolled.append(
            dataclasses.replace(
                device,
                certificate=(directory / "cert.pem").read_bytes(),
                ca=hub.authority.cert_pem,
                key=private_pem(mine.key),
                seal=private_pem(mine.seal),
            )
        )
        node = WarmNode(
            hub.front.url,
            ca=directory / "ca.pem",
            certificate=directory / "cert.pem",
            key=directory / "key.pem",
        )
        threads.append(
            threading.Thread(target=node.serve, args=(in_turn(enrolled[-1].app()), stop))
        )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for thread in threads:
            thread.start()
        yield enrolled, nodes
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)


@contextmanager
def begun(data: Path, dealt: list[Device], nodes: Mapping[str, int]) -> Iterator[Store]:
    """Open a hub's store with the devices enrolled in it and the run that has been started."""
    data.mkdir(exist_ok=True)
    store = Store(Settings(data=data).database_url)
    store.migrate()
    with store.begin() as connection:
        for device in dealt:
            connection.execute(
                insert(schema.devices).values(
                    id=device.name,
                    labels={},
                    certificate=device.certificate.decode(),
                    serial=device.name,
                    expires_at=9e9,
                    node_id=str(nodes[device.name]),
                    enrolled_at=0.0,
                )
            )
        connection.execute(
            insert(schema.runs).values(
                id=RUN,
                plan=EXACT,
                name="parity",
                model="digits",
                state="running",
                created_at=0.0,
                created_by="me",
                metrics={},
            )
        )
    yield store
    store.close()


def shown(store: Store) -> dict[str, Any]:
    with store.read() as connection:
        return runs.show(connection, RUN)


def here(data: Path, dealt: list[Device], fleet: Fleet) -> dict[str, Any]:
    """Carry the plan out in this process and return what came of it."""
    with begun(data, dealt, fleet.nodes) as store:
        execute(fleet.grid, store, Settings(data=data), Start(RUN, 0, "1"), clock=fleet.clock)
        return shown(store)


def at_superlink(data: Path, hub: Hub, dealt: list[Device]) -> dict[str, Any]:
    """Have the hub's ServerApp carry the plan out, in a process that the executor starts."""
    with on_superlink(hub, dealt) as (enrolled, nodes), begun(data, enrolled, nodes) as store:
        flower = hub.admin.start_run(SERVER_APP, {RUN_KEY: RUN, ATTEMPT_KEY: 0})
        wait_for(lambda: hub.admin.run_status(flower).state == "finished", 200, "the run")
        return shown(store)


def test_one_plan_gives_one_model_on_all_three_engines(
    hub: Hub, ray: tuple[list[Device], RayGrid], tmp_path: Path
) -> None:
    folders = {"local": tmp_path / "local", "ray": tmp_path / "ray", "fleet": hub.folder / "data"}
    mine = dealt(tmp_path / "kept")
    with devices.in_process(mine) as fleet:
        first = here(folders["local"], mine, fleet)
    on_cores, grid = ray
    found = {
        "ray": here(folders["ray"], on_cores, Fleet(grid, grid.nodes, SYSTEM_CLOCK)),
        "fleet": at_superlink(folders["fleet"], hub, dealt(tmp_path / "kept-at-hub")),
    }
    assert first["state"] == "gated", first["reason"]
    weights = Checkpoints(folders["local"] / "runs" / RUN).load(RUN)
    assert weights is not None
    assert np.abs(weights.weights - parameters.flatten(Digits().model(7))).max() > 0.01
    for engine, ended in found.items():
        assert ended["state"] == "gated", ended["reason"]
        # Integers are added, so the order in which devices answer changes no bit.
        other = Checkpoints(folders[engine] / "runs" / RUN).load(RUN)
        assert other is not None
        assert other.weights.tobytes() == weights.weights.tobytes(), engine
        for file in ("model.onnx", "profile.msgpack", "golden.npz"):
            one, two = (folders[name] / "candidates" / RUN / file for name in ("local", engine))
            assert one.read_bytes() == two.read_bytes(), (engine, file)
        assert told(ended) == told(first), engine


def told(ended: dict[str, Any]) -> tuple[object, ...]:
    """Return what a run says of itself, but for times and what its messages weigh."""
    measured = {name: value for name, value in ended["metrics"].items() if name != "rounds"}
    rounds = [
        (one["round"], one["survivors"], one["dropped"], one["loss"], one["epsilon"])
        for one in ended["rounds"]
    ]
    return measured, rounds


class Ended(NamedTuple):
    weights: bytes
    survivors: list[tuple[str, ...]]
    epsilons: list[float | None]


def trained(text: str, dealt: list[Device], fleet: Fleet) -> Ended:
    """Run a plan's rounds over ``dealt``, charged as a run's are."""
    members = {
        device.name: Member(fleet.nodes[device.name], device.certificate) for device in dealt
    }
    cohort = Cohort(members, sorted(members), sorted(members))
    heard: list[RoundReport] = []
    asked = plan.loads(text)
    ledger = Ledger(MemoryStore(), "digits", None, 1e-5)

    def charge(number: int, connected: int) -> float:
        return ledger.charge(str(number), event_of(asked, connected)).epsilon_pld

    run = Run(
        fleet.grid,
        asked,
        cohort,
        name=text,
        session=hub_session(asked.privacy.mode, cohort.roster),
        charge=charge,
        on_round=heard.append,
        clock=fleet.clock,
    )
    outcome = rounds.run_rounds(run, parameters.flatten(Digits().model(asked.seed)))
    return Ended(
        outcome.weights.tobytes(),
        [report.survivors for report in heard],
        [report.epsilon for report in heard],
    )


def test_a_party_keeps_its_secrets_from_phase_to_phase_on_ray_too(
    ray: tuple[list[Device], RayGrid], tmp_path: Path
) -> None:
    mine = dealt(tmp_path)
    on_cores, grid = ray
    there = Fleet(grid, grid.nodes, SYSTEM_CLOCK)
    with devices.in_process(mine) as fleet:
        for mode in ("secagg", "he"):
            text = PLAN.format(mode=mode, noise=0)
            first = trained(text, mine, fleet)
            assert first.survivors == [("device-1", "device-2", "device-3")] * 2
            assert trained(text, on_cores, there) == first
        noised = PLAN.format(mode="secagg", noise=1)
        first, second = trained(noised, mine, fleet), trained(noised, on_cores, there)
    assert first.weights != second.weights
    assert first.epsilons == second.epsilons
    assert 0 < (first.epsilons[0] or 0) < (first.epsilons[1] or 0) < math.inf


def test_a_process_that_dies_is_an_error_of_its_own_devices(
    ray: tuple[list[Device], RayGrid],
) -> None:
    grid = ray[1]
    assert set(grid.get_node_ids()) == set(grid.nodes.values())
    node = {"mortal": grid.nodes["mortal"]}
    assert ask(grid, node, "echo", b"ping", 30) == {"mortal": b"PING"}
    assert ask(grid, node, "die", b"", 30) == {}
    began = time.monotonic()
    assert ask(grid, node, "echo", b"ping", 30) == {}
    assert time.monotonic() - began < 30  # told at once, not found out by waiting


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1", "127.0.0.1:ray"])
def test_where_no_ray_is_a_sentence_says_so_at_once(address: str) -> None:
    with pytest.raises(LinkError, match="no Ray cluster answers at"), ray_grid({}, address):
        pass
