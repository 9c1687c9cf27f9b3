"""A run's record: what ran, what came in and out, and that it can be had again."""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, select

sys.path.insert(0, str(Path(__file__).parent))

from test_server_app import Hub, _plan  # after the path
from waves import Fleet, Waves, plan_of

from atoll.federation import parameters
from atoll.federation.checkpoints import Checkpoints
from atoll.fleet import bundle as bundles
from atoll.server import audit, record, schema
from atoll.server.errors import NotFound
from atoll.server.record import NAME
from atoll.server.recording import MemoryRecorder, merged
from atoll.simulations.spar import Spar


def digests(root: Path, **more: Any) -> dict[str, Any]:
    """Run the plan on a fleet of its own and return the digests of weights in and out."""
    recorder = MemoryRecorder()
    plan = msgspec.structs.replace(plan_of(rounds=2), **more)
    Fleet(root).run(plan, recorder)
    return recorder.recorded["weights"]


def test_a_run_that_is_replayed_ends_with_the_same_weights(tmp_path: Path) -> None:
    """In ``plain`` without noise: same plan, run id and data, devices with other keys."""
    first = digests(tmp_path / "a")
    assert digests(tmp_path / "b") == first
    assert first["in"] != first["out"]
    other = digests(tmp_path / "c", seed=4)
    assert {other["in"], other["out"]}.isdisjoint({first["in"], first["out"]})


def test_the_weights_that_come_in_are_the_seeds(tmp_path: Path) -> None:
    initial = parameters.flatten(Waves().model(3))
    expected = hashlib.sha256(initial.astype("<f4").tobytes()).hexdigest()
    assert digests(tmp_path) == {
        "in": expected,
        "out": digests(tmp_path / "again")["out"],
        "parameters": len(initial),
    }


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    hub = Hub(tmp_path_factory.mktemp("hub"))
    with hub.store.begin() as connection:  # of another run, whose id begins alike
        connection.execute(
            insert(schema.ledger).values(population="m", charge="r11/1", event={}, at=0.0)
        )
    row = hub.run(_plan(rounds=2).replace('name = "waves"', 'name = "waves"\nevaluate_every = 2'))
    assert row["state"] == "gated", row["reason"]
    data = (hub.settings.runs / "r1" / NAME).read_bytes()
    yield hub, row, data, json.loads(data)
    hub.store.close()


def test_the_record_says_what_ran(settled: Any) -> None:
    _, row, _, told = settled
    assert told["plan"]["text"] == row["plan"]
    assert told["plan"]["sha256"] == hashlib.sha256(row["plan"].encode()).hexdigest()
    assert told["seed"] == 3
    [attempt] = told["attempts"].values()
    assert attempt["versions"]["torch"] == version("torch")
    assert attempt["versions"]["atoll"] == version("atoll")
    assert attempt["devices"] == {"train": 3, "evaluate": 4}
    assert told["task"]["class"] == "waves:Waves"
    source = Path(sys.modules["waves"].__file__ or "").read_bytes()
    assert told["task"]["source"] == hashlib.sha256(source).hexdigest()
    assert (told["state"], told["ended_at"]) == ("gated", 5000.0)


def test_the_record_has_the_digest_of_every_file_of_the_candidate(settled: Any) -> None:
    hub, _, _, told = settled
    candidate = hub.settings.candidates / "r1"
    assert told["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in candidate.iterdir()
    }
    assert set(told["files"]) == set(bundles.FILES)


def test_the_record_names_the_charges_of_this_run_alone(settled: Any) -> None:
    hub, _, _, told = settled
    assert [entry["charge"] for entry in told["ledger"]] == ["r1/1", "r1/2"]
    with hub.store.read() as connection:
        ids = connection.execute(
            select(schema.ledger.c.id).where(schema.ledger.c.charge.like("r1/%"))
        )
        assert [entry["id"] for entry in told["ledger"]] == list(ids.scalars())


def test_the_record_counts_devices_and_names_none(settled: Any) -> None:
    _, row, data, told = settled
    assert [(one["drawn"], one["connected"], one["in_sum"]) for one in told["rounds"]] == [
        (3, 3, 3)
    ] * 2
    assert row["metrics"]["by_device"]
    assert b"device-" not in data


def test_rounds_say_what_they_moved_and_how_right_the_weights_are(settled: Any) -> None:
    _, row, _, told = settled
    one, two = told["rounds"]
    assert one["bytes_up"] > 0
    assert two["bytes_down"] > one["bytes_down"]  # the evaluators' copies of the weights
    assert (one["accuracy"], two["evaluated"]) == (None, 480)
    assert two["accuracy"] == pytest.approx(row["metrics"]["accuracy"]["all"]["float"], abs=0.01)
    assert row["metrics"]["rounds"]["bytes_down"] == one["bytes_down"] + two["bytes_down"]


def test_the_audit_log_has_the_digest_of_the_record(settled: Any) -> None:
    hub, _, data, _ = settled
    with hub.store.read() as connection:
        [entry] = audit.entries(connection)
        assert record.read(connection, hub.settings.runs / "r1", "r1") == data
    assert entry["facts"]["record"] == hashlib.sha256(data).hexdigest()


def test_the_card_refers_to_the_record_and_the_record_to_the_card(settled: Any) -> None:
    hub, _, _, told = settled
    card = (hub.settings.candidates / "r1" / bundles.CARD).read_text()
    assert "atoll plan record r1" in card
    assert told["weights"]["in"] in card
    assert told["weights"]["out"] in card


def test_a_run_that_failed_has_a_record_of_what_was_known(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.run(_plan(least=4))
    told = json.loads((hub.settings.runs / "r1" / NAME).read_bytes())
    assert (told["state"], told["rounds"], told["ledger"]) == ("failed", [], [])
    assert "enrol more" in told["reason"]
    hub.store.close()


def test_a_record_of_a_run_that_goes_on_is_made_anew(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    with hub.store.begin() as connection:
        connection.execute(
            insert(schema.runs).values(
                id="r2",
                plan="rounds = 1",
                name="n",
                model="m",
                state="running",
                created_at=0.0,
                created_by="me",
                metrics={"accuracy": float("nan")},
            )
        )
        stale = hub.settings.runs / "r2" / NAME
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"of another time")
        told = json.loads(record.read(connection, stale.parent, "r2"))
        assert (told["state"], told["metrics"]) == ("running", {"accuracy": None})
        with pytest.raises(NotFound):
            record.read(connection, hub.settings.runs / "r3", "r3")
    hub.store.close()


def test_an_attempt_after_the_first_adds_to_the_record(tmp_path: Path) -> None:
    """And rounds of earlier attempts count in what is summed up at the end."""
    fleet, recorder = Fleet(tmp_path), MemoryRecorder()
    kept = Checkpoints(tmp_path / "run")
    plan = msgspec.structs.replace(plan_of(rounds=2, more=', clip = "adaptive"'))
    fleet.run(plan, recorder, checkpoints=kept)
    first = recorder.facts
    again = fleet.run(plan, recorder, checkpoints=kept)
    assert again.facts["rounds"]["bytes_up"] == first["rounds"]["bytes_up"] > 0
    last = recorder.rounds_told()[-1].clip_norm
    assert last != plan.privacy.clip_norm
    assert again.facts["privacy"]["clip_norm"] == last
    card = (tmp_path / "candidate" / bundles.CARD).read_text()
    assert f"an L2 norm of {last:.4g} in the last round, adapted from 4" in card


def test_facts_are_merged_however_deep() -> None:
    before = {"attempts": {"1": {"at": 1.0}}, "weights": {"in": "a"}, "seed": 1}
    facts = {"attempts": {"2": {"at": 2.0}}, "weights": {"out": "b"}, "seed": 2}
    assert merged(before, facts) == {
        "attempts": {"1": {"at": 1.0}, "2": {"at": 2.0}},
        "weights": {"in": "a", "out": "b"},
        "seed": 2,
    }


def test_a_task_that_a_package_offers_is_named_with_its_version() -> None:
    told = record.of_task("spar", Spar())
    assert (told["package"], told["version"]) == ("atoll", version("atoll"))
    assert "package" not in record.of_task("spar", Waves())
