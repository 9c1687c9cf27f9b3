"""A run as the executor starts it: read from the store, carried out, settled in the store."""

import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sqlalchemy import insert, select, update
from waves import PLAN, Fleet, Waves, plan_of

from atoll.federation.bundled_grid import BundledGrid  # after the path
from atoll.federation.engine import InProcessGrid
from atoll.federation.errors import LinkError, RoundFailed
from atoll.federation.exchange import Clock
from atoll.fleet import bundle as bundles
from atoll.server import audit, claims, schema, server_app
from atoll.server.claims import Start
from atoll.server.settings import Settings
from atoll.server.store import Store

NOW = 5000.0


class Hub:
    """A store with a fleet of in-process devices enrolled in it."""

    def __init__(self, root, **fleet):
        self.fleet = Fleet(root / "devices", **fleet)
        self.settings = Settings(data=root / "hub")
        self.settings.data.mkdir()
        self.store = Store(self.settings.database_url)
        self.store.migrate()
        with self.store.begin() as connection:
            for name, member in self.fleet.cohort.members.items():
                role = "train" if name in self.fleet.cohort.trainers else "evaluate"
                connection.execute(
                    insert(schema.devices).values(
                        id=name,
                        labels={"role": role},
                        certificate=member.certificate.decode(),
                        serial=name,
                        expires_at=9e9,
                        node_id=str(member.node_id),
                        enrolled_at=0.0,
                    )
                )

    def run(self, plan_toml, run="r1", state="running"):
        with self.store.begin() as connection:
            connection.execute(
                insert(schema.runs).values(
                    id=run,
                    plan=plan_toml,
                    name="waves",
                    model="waves",
                    state=state,
                    created_at=0.0,
                    created_by="me",
                    metrics={},
                )
            )
        server_app.execute(
            self.fleet.grid,
            self.store,
            self.settings,
            Start(run, 0, "1"),
            tasks=lambda _: Waves(),
            now=lambda: NOW,
            clock=self.fleet.grid.clock,
        )
        return self.row(run)

    def row(self, run="r1"):
        with self.store.read() as connection:
            found = connection.execute(select(schema.runs).where(schema.runs.c.id == run))
            return found.mappings().one()


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.store.close()


def _plan(*, rounds=3, least=2, noise=0.02, labels='{ role = "train" }'):
    text = PLAN.format(mode="plain", rounds=rounds, least=least, noise=noise, more="")
    return text.replace("min_devices", f"labels = {labels}, min_devices")


def test_a_sound_run_is_gated_with_its_rounds_metrics_ledger_and_bundle(hub):
    row = hub.run(_plan())
    assert (row["state"], row["reason"], row["ended_at"]) == ("gated", "", NOW)
    assert row["stage"] == "gate"
    assert row["metrics"]["accuracy"].keys() == {"known", "unseen", "all"}
    assert all(gate["passed"] for gate in row["metrics"]["gates"])
    assert bundles.read(hub.settings.candidates / "r1").run == "r1"
    with hub.store.read() as connection:
        rounds = connection.execute(select(schema.rounds).order_by(schema.rounds.c.round)).all()
        charged = connection.execute(select(schema.ledger)).all()
        [entry] = audit.entries(connection)
    assert [(one.round, one.survivors) for one in rounds] == [
        (number, list(hub.fleet.cohort.trainers)) for number in (1, 2, 3)
    ]
    assert rounds[-1].epsilon == pytest.approx(row["metrics"]["epsilon"])
    assert [one.population for one in charged] == ["waves"] * 3
    assert entry["action"] == "run.gated"


def test_a_run_whose_gates_fail_is_rejected_and_names_them(hub):
    plan = _plan(rounds=1).replace("training = {", "training = { server_learning_rate = 1e-9,")
    row = hub.run(plan)
    assert row["state"] == "rejected"
    assert "better than chance" in row["reason"]
    assert not hub.settings.candidates.exists()


def test_a_plan_that_the_fleet_cannot_fill_fails_with_what_to_do(hub):
    row = hub.run(_plan(least=4))
    assert row["state"] == "failed"
    assert "enrol more, or lower cohort.min_devices" in row["reason"]


def test_devices_that_stay_away_fail_the_run_after_the_timeout(tmp_path):
    hub = Hub(tmp_path)
    for node in (1, 2):
        hub.fleet.grid.disconnect(node)
    row = hub.run(_plan())
    assert row["state"] == "failed"
    assert "connected" in row["reason"]
    hub.store.close()


def test_a_missing_evaluator_is_waited_for_and_then_left_out(hub):
    hub.fleet.grid.disconnect(4)
    row = hub.run(_plan())
    assert row["state"] == "gated", row["reason"]
    assert row["metrics"]["accuracy"].keys() == {"known", "all"}
    assert row["metrics"]["devices"] == {"trainers": 3, "asked": 4, "evaluated": 3}
    assert hub.fleet.grid.clock.now() >= 30.0


def test_what_nobody_foresaw_fails_the_run_and_is_raised(hub):
    def broken(_name):
        raise AttributeError("no such thing")

    with hub.store.begin() as connection:
        connection.execute(
            insert(schema.runs).values(
                id="r2",
                plan=_plan(),
                name="waves",
                model="waves",
                state="running",
                created_at=0.0,
                created_by="me",
                metrics={},
            )
        )
    with pytest.raises(AttributeError):
        server_app.execute(
            hub.fleet.grid,
            hub.store,
            hub.settings,
            Start("r2", 0, "1"),
            tasks=broken,
            now=lambda: NOW,
            clock=hub.fleet.grid.clock,
        )
    assert hub.row("r2")["state"] == "failed"
    assert "no such thing" in hub.row("r2")["reason"]


class Lost(InProcessGrid):
    """A grid of a SuperLink that is gone."""

    def get_node_ids(self):
        raise httpx.ConnectError("nobody there")


def test_a_run_that_flower_no_longer_carries_is_left_to_be_taken_up_again(hub):
    apart, hub.fleet.grid = hub.fleet.grid, BundledGrid(Lost({}))
    hub.fleet.grid.clock = apart.clock
    with pytest.raises(LinkError, match="no longer carries"):
        hub.run(_plan())
    assert (hub.row()["state"], hub.row()["ended_at"]) == ("running", None)
    assert claims.ended(hub.settings.runs / "r1", 0)


@pytest.mark.parametrize("told", [SystemExit, KeyboardInterrupt])
def test_a_run_whose_process_is_told_to_end_is_left_to_be_taken_up_again(hub, told):
    def ends(_nodes):
        raise told

    hub.fleet.grid.push_messages = ends
    with pytest.raises(told):
        hub.run(_plan())
    assert hub.row()["state"] == "running"


def test_a_run_that_was_started_anew_is_left_alone_at_the_next_round(hub):
    push = hub.fleet.grid.push_messages

    def superseded(sent):
        with hub.store.begin() as connection:
            connection.execute(update(schema.runs).values(attempt=1, flower_run=None))
        return push(sent)

    hub.fleet.grid.push_messages = superseded
    row = hub.run(_plan())
    assert (row["state"], row["reason"], row["ended_at"]) == ("running", "", None)
    with hub.store.read() as connection:
        assert connection.execute(select(schema.ledger.c.charge)).scalars().all() == ["r1/1"]


def test_devices_that_the_superlink_is_yet_to_be_told_of_are_waited_for(hub):
    known = hub.fleet.cohort.members["device-1"].node_id
    table = schema.devices
    with hub.store.begin() as connection:
        connection.execute(update(table).where(table.c.id == "device-1").values(node_id=None))
    clock = hub.fleet.grid.clock

    def told(seconds):
        clock.pause(seconds)
        with hub.store.begin() as connection:
            connection.execute(
                update(table).where(table.c.id == "device-1").values(node_id=str(known))
            )

    server_app.await_nodes(hub.store, plan_of(), Clock(clock.now, told))
    with hub.store.read() as connection:
        assert "device-1" in server_app.cohort_of(connection, plan_of()).trainers
    assert clock.now() < 1.0


def test_a_cancelled_run_stays_cancelled(hub):
    assert hub.run(_plan(rounds=1), state="cancelled")["state"] == "cancelled"


def test_revoked_devices_and_those_without_a_node_take_no_part(hub):
    with hub.store.begin() as connection:
        table = schema.devices
        for device, gone in (("device-1", {"revoked_at": 1.0}), ("device-4", {"node_id": None})):
            connection.execute(update(table).where(table.c.id == device).values(**gone))
        cohort = server_app.cohort_of(connection, plan_of())
        with pytest.raises(RoundFailed):
            server_app.cohort_of(connection, plan_of(least=3))
    assert cohort.evaluators == cohort.trainers == ["device-2", "device-3"]
    assert isinstance(hub.fleet.grid, InProcessGrid)
