"""A hub's database as it looks after the loop has gone round, and its dashboard being served.

Ten people's watches serve a release; ``watch-07`` is worn the wrong way round since a while.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from sqlalchemy import insert, update

from atoll.fleet.authority import Authority
from atoll.fleet.counts import pack_all
from atoll.fleet.features import FeatureSpec, features
from atoll.fleet.profile import Profile, build, count
from atoll.server import auth, schema, watch
from atoll.server.audit import record
from atoll.server.context import Addresses, HubContext
from atoll.server.events import Bus
from atoll.server.operator_api import create_operator_app
from atoll.server.settings import Settings
from atoll.server.store import Store, sqlite_url
from atoll.server.tls_app import WebServer
from atoll.server.watch_rules import Rules
from atoll.server.web import mount

NOW = 1_790_000_000.0
CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
CLASSES = ("pendulum", "abduction", "elevation", "internal", "external", "trapezius", "row")
MODEL = "shoulder"
DRIFTED = "watch-07"
RULES = Rules(baseline_rows=150, current_rows=150)
PLAN = """\
name = "shoulder-he"
task = "spar"
model = "shoulder"
rounds = 12
seed = 1

[training]
local_epochs = 2

[cohort]
labels = { split = "train" }
min_devices = 6

[privacy]
mode = "he"
clip_norm = 1.0
noise_multiplier = 0.8
delta = 1e-5
budget_epsilon = 60.0
"""
RELEASED_RUN = "5f1c09aa7e21"


class NoFleet:
    """Broker and SuperLink of a hub that has neither: remembers what it was asked to stop."""

    def __init__(self) -> None:
        self.stopped: list[str] = []

    def follow(self) -> None:
        """There is nobody to tell."""

    def register_node(self, public_key_pem: bytes) -> str:
        return "1"

    def unregister_node(self, node_id: str) -> None:
        """There is nobody to forget."""

    def start_run(self, app: str, config: Mapping[str, bool | int | float | str]) -> str:
        return "1"

    def run_status(self, run_id: str) -> str:
        return "running"

    def stop_run(self, run_id: str) -> None:
        self.stopped.append(run_id)


def new_hub(directory: Path, clock: Callable[[], float] = lambda: NOW) -> HubContext:
    """Return a hub with an empty database."""
    store = Store(sqlite_url(directory / "hub.db"))
    store.migrate()
    nobody = NoFleet()
    return HubContext(
        settings=Settings(data=directory),
        store=store,
        authority=Authority.create("Atoll", datetime.fromtimestamp(NOW, UTC)),
        clock=clock,
        membership=nobody,
        nodes=nobody,
        bus=Bus(),
        addresses=Addresses("https://localhost:8443", "http://localhost", "localhost", 8883, ""),
    )


def add_operators(hub: HubContext) -> dict[str, str]:
    """Add one operator per role, named like it; return their tokens."""
    with hub.store.begin() as connection:
        return {role: auth.create(connection, role, role, NOW) for role in auth.ROLES}


def profile(rows: int = 2400) -> Profile:
    """Return a reference profile counted on synthetic signals of everyone."""
    rng = np.random.default_rng(1)
    spec = FeatureSpec(kind="channel-stats", channels=CHANNELS)
    x, p = signals(rng, rows, offset=0.0), scores(rng, rows)
    found = features(spec, x)
    edges = {
        name: tuple(
            np.unique(np.quantile(found.column(name), np.linspace(0, 1, 33)[1:-1])).tolist()
        )
        for name in spec.names
    }
    empty = build(spec, edges, CLASSES)
    return empty.with_counts(count(empty, found, p), rows)


def signals(rng: np.random.Generator, rows: int, *, offset: float, turned: bool = False):
    """Return float32 ``(rows, 6, 20)``: means that differ by row; ``turned`` swaps two axes."""
    means = rng.normal(offset + np.array([0.2, -0.9, 0.3, 0, 0, 0]), 0.3, size=(rows, 6))
    spread = rng.gamma(4.0, 0.1, size=(rows, 6)) * np.array([1, 1, 1, 3, 3, 3])
    x = rng.standard_normal((rows, 6, 20)) * spread[:, :, None] + means[:, :, None]
    if turned:
        x[:, [0, 1]] = x[:, [1, 0]] * np.array([1, -1])[None, :, None]
    return x.astype(np.float32)


def scores(rng: np.random.Generator, rows: int, sharp: float = 6.0):
    """Return probabilities ``(rows, classes)``."""
    logits = rng.standard_normal((rows, len(CLASSES))) * sharp / 2
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def add_device(hub: HubContext, name: str, number: int, *, release: int | None = 1) -> None:
    """Enrol a device that is online and serves ``release``."""
    now = hub.clock()
    serves = {"model": MODEL if release else None, "release": release}
    with hub.store.begin() as connection:
        connection.execute(
            insert(schema.devices).values(
                id=name,
                labels={"person": f"{number}", "split": "train" if number <= 8 else "unseen"},
                certificate="",
                serial=f"{number:032x}",
                expires_at=now + 29 * 86400,
                node_id=str(9_000_000_000_000_000_000 + number),
                enrolled_at=now - 3600,
                online=True,
                boot=1,
                last_seen=now - number,
                serve_url=f"http://127.0.0.1:{9000 + number}",
                agent_version="0.1.0",
                https_up=11_400_000 + 70_000 * number,
                https_down=13_900_000 + 90_000 * number,
                mqtt_up=48_000 + 900 * number,
            )
        )
        connection.execute(
            insert(schema.twins).values(
                device=name,
                desired_version=4,
                desired={"version": 4, "train": False} | serves,
                published_version=4,
                reported={
                    "desired_version": 4,
                    "state": "serving" if release else "idle",
                    "error": None,
                }
                | serves,
                reported_at=now - 60,
            )
        )
        connection.execute(
            insert(schema.health).values(
                device=name,
                received_at=now - 20,
                body={
                    "rss": {"control": 46_000_000 + number, "serving": 88_000_000},
                    "disk_free": 21_000_000_000,
                    "outbox_waiting": 0,
                    "outbox_dropped": 0,
                    "bytes_up": 900,
                    "bytes_down": 800,
                    "latency_p50": 0.42,
                    "latency_p95": 0.91,
                    "power": "battery" if number == 5 else "mains",
                    "network": "wifi",
                    "accelerator": "none",
                    "examples": 512,
                },
            )
        )


def add_windows(
    hub: HubContext,
    reference: Profile,
    device: str,
    windows: int,
    *,
    seed: int,
    rows: int = 25,
    offset: float = 0.0,
    turned: bool = False,
    release: int = 1,
) -> None:
    """Let ``device`` ship ``windows`` windows of ``rows`` rows each."""
    rng = np.random.default_rng(seed)
    with hub.store.begin() as connection:
        for number in range(windows):
            x = signals(rng, rows, offset=offset, turned=turned)
            p = scores(rng, rows, sharp=2.0 if turned else 6.0)
            counts = count(reference, features(reference.features, x), p)
            message = connection.execute(
                insert(schema.messages)
                .values(
                    device=device,
                    boot=seed,
                    seq=number,
                    device_at=hub.clock(),
                    received_at=hub.clock(),
                    kind="window",
                    body=b"",
                )
                .returning(schema.messages.c.id)
            ).scalar_one()
            connection.execute(
                insert(schema.windows).values(
                    message=message,
                    device=device,
                    model=MODEL,
                    release=release,
                    received_at=hub.clock(),
                    start=hub.clock() - 10,
                    end=hub.clock(),
                    rows=rows,
                    counts=msgspec.msgpack.encode(pack_all(counts)),
                )
            )


def add_run(hub: HubContext, run: str, *, state: str, rounds: int, begun: float, **values) -> None:
    """Add a run that completed some rounds."""
    with hub.store.begin() as connection:
        connection.execute(
            insert(schema.runs).values(
                id=run,
                plan=PLAN,
                name="shoulder-he",
                model=MODEL,
                state=state,
                created_at=begun - 20,
                created_by="admin",
                approved_by="approver",
                started_at=begun,
                **({"metrics": {}} | values),
            )
        )
        add_rounds(connection, run, range(1, rounds + 1), begun)


def add_rounds(connection, run: str, numbers: range, begun: float) -> None:
    """Add rounds and their charges."""
    trainers = [f"watch-{n:02d}" for n in range(1, 9)]
    for n in numbers:
        late = {"watch-03": "no answer within 60 s"} if n == 4 else {}
        connection.execute(
            insert(schema.rounds).values(
                run=run,
                round=n,
                started_at=begun + 9 * n,
                seconds=7.6 + 0.2 * (n % 3),
                survivors=[name for name in trainers if name not in late],
                dropped=late,
                loss=0.12 + 1.7 * 0.72**n,
                epsilon=4.1 * n**0.62 + 1.2,
                bytes_up=3_400_000 - 425_000 * len(late),
                bytes_down=3_500_000 + (560_000 if n % 3 == 0 else 0),
                clip_norm=1.0,
                drawn=8,
                connected=8 - len(late),
                accuracy=0.97 - 0.5 * 0.7**n if n % 3 == 0 else None,
                evaluated=640 if n % 3 == 0 else 0,
                evaluate_seconds=0.8 if n % 3 == 0 else 0.0,
            )
        )
        connection.execute(
            insert(schema.ledger).values(
                population=MODEL,
                charge=f"{run}/{n}",
                event={"kind": "gaussian", "noise_multiplier": 0.8, "sampling": None},
                at=begun + 9 * n,
            )
        )


METRICS = {
    "accuracy": {
        "known": {"float": 0.9714, "int8": 0.9703},
        "unseen": {"float": 0.8461, "int8": 0.8452},
    },
    "gates": [
        {
            "name": "int8 within one point, known people",
            "rule": "accuracy.known.float - accuracy.known.int8 < 0.01",
            "passed": True,
            "detail": "accuracy = {'known': {'float': 0.9714, 'int8': 0.9703}}",
        },
        {"name": "privacy budget", "rule": "privacy.epsilon <= 60.0", "passed": True, "detail": ""},
    ],
    "privacy": {"epsilon": 20.3, "delta": 1e-5},
    "spread": {
        name: {
            "devices": devices, "rows": 130 * devices, "accuracy": mean + 0.001, "mean": mean,
            "std": 0.021, "worst": mean - 0.06, "worst_tenth": mean - 0.06, "best": 0.995,
        }
        for name, devices, mean in [("all", 10, 0.946), ("known", 8, 0.969), ("hand=left", 6, 0.94)]
    },
    "spread_left_out": {"unseen": "2 devices, fewer than cohort.min_devices = 3"},
    "fairness": {
        "devices": 10,
        "groups": {
            "left": {"devices": 10, "rows": 660, "accuracy": 0.951},
            "right": {"devices": 10, "rows": 640, "accuracy": 0.938},
        },
        "left_out": {"both": "on 1 of 10 devices; cohort.min_devices is 3"},
        "compared": 6,
        "by_class": {name: {} for name in CLASSES},
        "equalised_odds": 0.081, "equalised_odds_mean": 0.032,
        "equal_opportunity": 0.081, "equal_opportunity_mean": 0.03,
        "demographic_parity": 0.02, "demographic_parity_mean": 0.01,
        "demographic_parity_ratio": 0.89, "demographic_parity_ratio_mean": 0.95,
    },
    "cohort": {
        "rule": 'device.power == "mains"', "trainers": 8, "eligible": 7,
        "left_out": {"watch-05": "device.power = battery"},
    },
    "turns": {"devices": 8, "fewest": 4, "most": 5},
}  # fmt: skip


def add_release(hub: HubContext, reference: Profile) -> None:
    """Publish release 1, rolled out to every device."""
    names = [f"watch-{n:02d}" for n in range(1, 11)]
    sizes = {"model.onnx": 41_233, "profile.msgpack": 4_102, "golden.npz": 77_120, "card.md": 2_310}
    files = {
        name: {"sha256": f"{i:064x}", "length": n} for i, (name, n) in enumerate(sizes.items())
    }
    with hub.store.begin() as connection:
        connection.execute(
            insert(schema.releases).values(
                model=MODEL,
                release=1,
                fallback=None,
                run=RELEASED_RUN,
                manifest={
                    "model": MODEL,
                    "task": "spar",
                    "run": RELEASED_RUN,
                    "created": NOW - 2000,
                    "input": {"name": "x", "shape": [6, 200], "dtype": "float32"},
                    "output": {"name": "logits"},
                    "classes": list(CLASSES),
                    "channels": list(CHANNELS),
                    "metrics": {"accuracy.known.int8": 0.9703, "accuracy.unseen.int8": 0.8452},
                    "files": files,
                },
                profile=reference.encode(),
                published_at=NOW - 1900,
                published_by="admin",
            )
        )
        connection.execute(
            insert(schema.rollouts).values(
                model=MODEL,
                release=1,
                state="done",
                canaries=[names[0]],
                targets=names,
                created_at=NOW - 1800,
                created_by="admin",
                updated_at=NOW - 1500,
            )
        )


def add_charges_of_other_units(connection) -> None:
    """Charge the model's population for examples and for served rows, too."""
    release = {"kind": "gaussian", "sampling": None}
    for charge, event in [
        (f"{RELEASED_RUN}/examples", {"noise_multiplier": 1.1, "sampling": 0.02, "times": 200}),
        *((f"telemetry/{n}", {"noise_multiplier": 30.0, "unit": "row"}) for n in range(1, 7)),
    ]:
        unit = {"unit": "example"} if charge.endswith("examples") else {}
        connection.execute(
            insert(schema.ledger).values(
                population=MODEL, charge=charge, event=release | unit | event, at=NOW - 1800
            )
        )


def seed(hub: HubContext) -> dict[str, str]:
    """Fill the database; return the operators' tokens by role."""
    tokens = add_operators(hub)
    reference = profile()
    add_run(
        hub, "0a77e2b1c944", state="failed", rounds=2, begun=NOW - 9000, ended_at=NOW - 8900,
        reason="the run's process failed; see logs/superexec.log in the hub's data directory",
        stage="train",
    )  # fmt: skip
    add_run(
        hub, RELEASED_RUN, state="published", rounds=12, begun=NOW - 2400,
        ended_at=NOW - 2240, metrics=METRICS, stage="gate",
    )  # fmt: skip
    add_release(hub, reference)
    for number in range(1, 11):
        name = f"watch-{number:02d}"
        add_device(hub, name, number)
        add_windows(hub, reference, name, 12, seed=number, offset=0.01 * number)
    add_device(hub, "watch-11", 11, release=None)
    add_device(hub, "watch-12", 12, release=None)
    with hub.store.begin() as connection:
        d = schema.devices
        connection.execute(
            update(d).where(d.c.id == "watch-10").values(online=False, last_seen=NOW - 5000)
        )
        connection.execute(
            update(d).where(d.c.id == "watch-12").values(online=False, revoked_at=NOW - 600)
        )
        connection.execute(
            insert(schema.alerts).values(
                at=NOW - 7000, kind="device", severity="error", device="watch-10",
                text="outbox: full, 14 telemetry messages dropped",
            )
        )  # fmt: skip
        for action, subject in (("device.enrol", "watch-01"), ("run.approve", RELEASED_RUN)):
            record(connection, "approver", action, subject, NOW - 2500)
        record(connection, "admin", "release.publish", f"{MODEL}/1", NOW - 1900, run=RELEASED_RUN)
        add_charges_of_other_units(connection)
    watch.tick(hub.store, NOW - 100, RULES)
    add_windows(hub, reference, DRIFTED, 8, seed=77, offset=0.07, turned=True)
    watch.tick(hub.store, NOW - 30, RULES)
    return tokens


def running(hub: HubContext, rounds: int = 5) -> str:
    """Add a run that is in the middle of training; return its id."""
    run = "c0ffee5ca1ab"
    add_run(hub, run, state="running", rounds=rounds, begun=NOW - 60, stage="train")
    return run


@contextmanager
def served(hub: HubContext, port: int = 0) -> Iterator[str]:
    """Serve API and dashboard as the hub does, on a free port if none is given; give the URL."""
    app = create_operator_app(hub)
    changes = mount(app, hub, RULES)
    server = WebServer(app, socket.create_server(("127.0.0.1", port)), name="operator")
    server.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        changes.close()
        server.stop()
        assert not server.alive
