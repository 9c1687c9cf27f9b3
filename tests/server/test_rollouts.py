"""Rollouts over real tables: whom they tell, when, and what they leave behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, delete, insert, select, update

from atoll.fleet.wire import Reported
from atoll.privacy.accounting import Gaussian, Unnoised, from_json
from atoll.server import rollouts
from atoll.server.errors import BadInput, Conflict, NotFound
from atoll.server.schema import alerts, audit, devices, ledger, releases, twins
from atoll.server.schema import rollouts as table
from atoll.server.store import Store, sqlite_url

MODEL = "gestures"
FLEET = ("ant", "bee", "cat")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(sqlite_url(tmp_path / "hub.db"))
    store.migrate()
    with store.begin() as connection:
        for position, device in enumerate(FLEET):
            connection.execute(
                insert(devices).values(
                    id=device,
                    labels={},
                    certificate="",
                    serial=device,
                    expires_at=1e12,
                    enrolled_at=0.0,
                    online=device != "ant",
                    last_seen=float(position),
                )
            )
            connection.execute(insert(twins).values(device=device, desired={"version": 0}))
        for release, fallback in ((1, None), (2, 1)):
            connection.execute(
                insert(releases).values(
                    model=MODEL,
                    release=release,
                    fallback=fallback,
                    manifest={},
                    profile=b"",
                    published_at=0.0,
                    published_by="op",
                )
            )
    return store


def wanted(store: Store) -> dict[str, int | None]:
    with store.read() as connection:
        return {row.device: row.desired.get("release") for row in connection.execute(select(twins))}


def report(store: Store, device: str, state: str, **facts: Any) -> None:
    with store.begin() as connection:
        row = connection.execute(select(twins).where(twins.c.device == device)).one()
        body = {
            "desired_version": row.desired_version,
            "model": MODEL,
            "release": row.desired.get("release") if state == "serving" else None,
            "state": state,
            **facts,
        }
        reported = msgspec.to_builtins(msgspec.convert(body, Reported))
        connection.execute(
            update(twins).where(twins.c.device == device).values(reported=reported, reported_at=1.0)
        )


def start(store: Store, **how: Any) -> int:
    with store.begin() as connection:
        return rollouts.start(connection, MODEL, actor="op", now=1.0, **how)


def state(store: Store, rollout: int) -> tuple[str, str]:
    with store.read() as connection:
        row = connection.execute(select(table).where(table.c.id == rollout)).one()
        return row.state, row.reason


def test_the_newest_release_goes_to_one_online_device_and_then_to_the_rest(store: Store) -> None:
    rollout = start(store)
    assert rollouts.tick(store, 2.0) == [rollout]
    assert wanted(store) == {"ant": None, "bee": None, "cat": 2}
    assert rollouts.tick(store, 3.0) == []
    report(store, "cat", "serving")
    assert rollouts.tick(store, 4.0) == [rollout]
    assert wanted(store) == {"ant": 2, "bee": 2, "cat": 2}
    assert state(store, rollout)[0] == "rolling"
    for device in ("ant", "bee"):
        report(store, device, "serving")
    rollouts.tick(store, 5.0)
    assert state(store, rollout) == ("done", "")
    assert rollouts.tick(store, 6.0) == []


def test_a_failing_canary_halts_the_rollout_and_raises_an_alert(store: Store) -> None:
    rollout = start(store, canaries=["bee"])
    rollouts.tick(store, 2.0)
    report(store, "bee", "failed", error="golden check failed")
    rollouts.tick(store, 3.0)
    assert state(store, rollout) == ("halted", "bee: golden check failed")
    assert wanted(store) == {"ant": None, "bee": 1, "cat": None}
    with store.read() as connection:
        (alert,) = connection.execute(select(alerts)).all()
        actions = [
            msgspec.json.decode(row.entry)["action"]
            for row in connection.execute(select(audit).order_by(audit.c.index))
        ]
    assert "golden check failed" in alert.text
    assert actions == ["rollout.start", "rollout.halted"]


def test_rolling_back_returns_those_told_to_the_signed_fallback(store: Store) -> None:
    rollout = start(store, canaries=["cat"])
    rollouts.tick(store, 2.0)
    with store.begin() as connection:
        done = rollouts.roll_back(connection, MODEL, actor="op", now=3.0, reason="looks odd")
    assert done == rollout
    assert wanted(store) == {"ant": None, "bee": None, "cat": 1}
    with store.begin() as connection, pytest.raises(Conflict, match="rolled-back"):
        rollouts.roll_back(connection, MODEL, actor="op", now=4.0, reason="again")


def test_a_release_without_a_fallback_cannot_be_rolled_back(store: Store) -> None:
    with store.begin() as connection:
        connection.execute(delete(releases).where(releases.c.release == 2))
    start(store, release=1)
    with store.begin() as connection, pytest.raises(Conflict, match="no release to fall back to"):
        rollouts.roll_back(connection, MODEL, actor="op", now=4.0, reason="")


def test_going_back_is_refused_once_a_newer_release_is_signed(store: Store) -> None:
    start(store, release=1)
    with store.begin() as connection, pytest.raises(Conflict, match="release 2 is signed since"):
        rollouts.roll_back(connection, MODEL, actor="op", now=4.0, reason="")


def test_a_new_rollout_supersedes_one_that_runs(store: Store) -> None:
    older = start(store, release=1)
    newer = start(store, release=2)
    assert state(store, older) == ("superseded", "release 2 is rolled out instead")
    assert state(store, newer)[0] == "canary"


def test_what_cannot_be_rolled_out_is_refused_and_nothing_is_written(store: Store) -> None:
    with store.begin() as connection, pytest.raises(NotFound, match="has not been published"):
        rollouts.start(connection, "unheard-of", actor="op", now=1.0)
    with pytest.raises(NotFound, match="release 9"):
        start(store, release=9)
    with pytest.raises(BadInput, match="canaries must be among the devices: dog"):
        start(store, canaries=["dog"])
    with store.read() as connection:
        assert not connection.execute(select(table)).all()


def charged(store: Store) -> dict[str, object]:
    """Return the events of the model's ledger by charge."""
    query = select(ledger.c.charge, ledger.c.event).where(ledger.c.population == MODEL)
    with store.read() as connection:
        return {row.charge: from_json(row.event) for row in connection.execute(query)}


def asks_for_noise(store: Store, release: int, noise: float) -> None:
    with store.begin() as connection:
        connection.execute(
            update(releases)
            .where(releases.c.release == release)
            .values(manifest={"telemetry_noise": noise})
        )


def test_telemetry_is_charged_before_the_first_device_is_told_of_a_release(store: Store) -> None:
    asks_for_noise(store, 1, 1.5)
    asks_for_noise(store, 2, 0.75)
    start(store, canaries=["cat"])
    assert charged(store) == {}
    assert wanted(store)["cat"] is None
    rollouts.tick(store, 2.0)
    assert wanted(store)["cat"] == 2
    # The other release is where its devices may have to go back to.
    assert charged(store) == {
        f"telemetry/{MODEL}/1": Gaussian(1.5),
        f"telemetry/{MODEL}/2": Gaussian(0.75),
    }


def test_a_release_is_charged_once_whatever_devices_windows_and_rollouts(store: Store) -> None:
    asks_for_noise(store, 1, 0.5)
    for turn in range(2):
        rollout = start(store, release=1)
        rollouts.tick(store, 2.0)
        for device in ("cat", "ant", "bee"):  # the canary first
            report(store, device, "serving")
            rollouts.tick(store, 3.0)
        assert state(store, rollout)[0] == "done", turn
    assert charged(store) == {f"telemetry/{MODEL}/1": Gaussian(0.5)}


def test_counts_without_noise_are_in_the_ledger_for_what_they_are(store: Store) -> None:
    start(store)
    rollouts.tick(store, 2.0)
    assert charged(store) == {
        f"telemetry/{MODEL}/1": Unnoised(),
        f"telemetry/{MODEL}/2": Unnoised(),
    }


class Interrupted(Store):
    """A store in which somebody else gets in once, right after the first read."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        super().__init__(store.url)
        self._meanwhile: list[Callable[[], object]] = [meanwhile]

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with super().read() as connection:
            yield connection
        while self._meanwhile:
            self._meanwhile.pop()()


def test_a_rollout_that_starts_during_a_tick_waits_for_its_charge(store: Store) -> None:
    asks_for_noise(store, 2, 1.0)
    first = start(store, release=1, canaries=["cat"])
    second = [0]

    def meanwhile() -> None:
        second[0] = start(store, release=2, canaries=["bee"])

    interrupted = Interrupted(store, meanwhile)
    rollouts.tick(interrupted, 2.0)
    interrupted.close()
    assert state(store, first)[0] == "superseded"
    assert wanted(store) == {"ant": None, "bee": None, "cat": None}
    assert f"telemetry/{MODEL}/2" not in charged(store)
    assert rollouts.tick(store, 3.0) == second
    assert wanted(store)["bee"] == 2
    assert charged(store)[f"telemetry/{MODEL}/2"] == Gaussian(1.0)
