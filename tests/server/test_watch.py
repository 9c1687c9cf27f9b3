"""Watching: drift is seen on the device that drifts, said once, and waits for a person."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import case, insert, select, update

from atoll.edge_agent.database import Database
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.watching import Noised, Watch
from atoll.fleet import topics
from atoll.fleet.drift import DeviceVerdict
from atoll.fleet.profile import Profile
from atoll.fleet.samples import Tally
from atoll.privacy.keystream import Keystream
from atoll.server import schema, watch
from atoll.server.context import HubContext
from atoll.server.intake import read, store_batch
from atoll.server.link import Incoming
from atoll.server.watch_rules import WINDOWS, Counted, Rules, decide, judge, split
from atoll.server.web_devices import device as device_page

sys.path.insert(0, str(Path(__file__).parent))

from dashboard_fleet import (  # after the path
    MODEL,
    NOW,
    RULES,
    add_device,
    add_release,
    add_run,
    add_windows,
    new_hub,
    profile,
    scores,
    signals,
)

REFERENCE: Profile = profile(1200)


@pytest.fixture
def hub(tmp_path: Path) -> HubContext:
    """Three devices serve a release that a run has made."""
    hub = new_hub(tmp_path)
    add_run(hub, "5f1c09aa7e21", state="published", rounds=1, begun=NOW - 100)
    add_release(hub, REFERENCE)
    for number in (1, 2, 3):
        add_device(hub, f"watch-0{number}", number)
    return hub


def baseline(hub: HubContext, windows: int = 12) -> None:
    for number in (1, 2, 3):
        add_windows(hub, REFERENCE, f"watch-0{number}", windows, seed=number)


def rows(hub: HubContext, table, **equal):
    with hub.store.read() as connection:
        query = select(table).where(*(table.c[key] == value for key, value in equal.items()))
        return connection.execute(query).mappings().all()


def test_the_turned_device_alone_drifts(hub):
    baseline(hub)
    watch.tick(hub.store, NOW, RULES)
    for number in (1, 2, 3):
        turned = number == 2
        add_windows(hub, REFERENCE, f"watch-0{number}", 6, seed=10 + number, turned=turned)

    done = watch.tick(hub.store, NOW + 1, RULES)

    assert {row["device"]: row["state"] for row in rows(hub, schema.drift)} == {
        "watch-01": "stable",
        "watch-02": "drifted",
        "watch-03": "stable",
    }
    assert [serving.device for serving in done.opened] == ["watch-02"]
    [alert] = rows(hub, schema.alerts)
    assert (alert["device"], alert["kind"], alert["closed_at"]) == ("watch-02", "drift", None)
    assert "ax:mean" in alert["text"]


def test_an_alert_is_not_repeated_and_closes_when_the_device_is_stable_again(hub):
    baseline(hub)
    watch.tick(hub.store, NOW, RULES)
    for turn in range(3):
        add_windows(hub, REFERENCE, "watch-02", 6, seed=20 + turn, turned=True)
        watch.tick(hub.store, NOW + turn, RULES)
    assert len(rows(hub, schema.alerts)) == 1
    assert len(rows(hub, schema.runs, state="proposed")) == 1

    add_windows(hub, REFERENCE, "watch-02", 8, seed=30)
    done = watch.tick(hub.store, NOW + 9, RULES)

    assert [serving.device for serving in done.closed] == ["watch-02"]
    [alert] = rows(hub, schema.alerts)
    assert alert["closed_at"] == NOW + 9


def test_drift_proposes_the_latest_plan_and_waits(hub):
    baseline(hub)
    watch.tick(hub.store, NOW, RULES)
    add_windows(hub, REFERENCE, "watch-01", 6, seed=40, turned=True)
    add_windows(hub, REFERENCE, "watch-03", 6, seed=41, turned=True)

    done = watch.tick(hub.store, NOW + 1, RULES)

    [run] = rows(hub, schema.runs, state="proposed")
    [latest] = rows(hub, schema.runs, state="published")
    assert list(done.proposed) == [run["id"]]
    assert run["plan"] == latest["plan"]
    assert (run["created_by"], run["approved_by"], run["started_at"]) == ("hub", None, None)
    assert "watch-01" in run["reason"]
    assert "watch-03" in run["reason"]


@pytest.mark.parametrize("state", watch.UNDER_WAY)
def test_nothing_is_proposed_while_a_run_of_the_model_is_under_way(hub, state):
    baseline(hub)
    watch.tick(hub.store, NOW, RULES)
    add_run(hub, "c0ffee5ca1ab", state=state, rounds=0, begun=NOW)
    add_windows(hub, REFERENCE, "watch-01", 6, seed=40, turned=True)

    done = watch.tick(hub.store, NOW + 1, RULES)

    assert len(done.opened) == 1
    assert not done.proposed


def test_a_model_that_no_run_made_has_nothing_to_propose(hub):
    with hub.store.begin() as connection:
        connection.execute(update(schema.runs).values(model="another"))
    baseline(hub)
    watch.tick(hub.store, NOW, RULES)
    add_windows(hub, REFERENCE, "watch-01", 6, seed=40, turned=True)
    assert not watch.tick(hub.store, NOW + 1, RULES).proposed
    assert len(rows(hub, schema.alerts)) == 1


def test_too_few_rows_is_a_state_of_its_own(hub):
    baseline(hub, windows=3)
    watch.tick(hub.store, NOW, RULES)
    assert {row["state"] for row in rows(hub, schema.drift)} == {"too-few-rows"}
    assert not rows(hub, schema.alerts)


def test_only_devices_with_new_windows_are_assessed(hub):
    baseline(hub)
    assert len(watch.tick(hub.store, NOW, RULES).assessed) == 3
    assert not watch.tick(hub.store, NOW + 1, RULES).assessed
    add_windows(hub, REFERENCE, "watch-03", 1, seed=50)
    assert [s.device for s in watch.tick(hub.store, NOW + 2, RULES).assessed] == ["watch-03"]


def test_windows_of_a_release_that_no_longer_serves_are_passed_over(hub):
    baseline(hub)
    with hub.store.begin() as connection:
        connection.execute(
            update(schema.twins)
            .where(schema.twins.c.device == "watch-01")
            .values(reported={"model": MODEL, "release": 2, "state": "serving"})
        )
    assessed = watch.tick(hub.store, NOW, RULES).assessed
    assert {serving.device for serving in assessed} == {"watch-02", "watch-03"}


def test_counts_that_do_not_fit_the_profile_are_left_out(hub):
    baseline(hub)
    with hub.store.begin() as connection:
        first = select(schema.windows.c.message).where(schema.windows.c.device == "watch-01")
        message = connection.execute(first.limit(1)).scalar_one()
        connection.execute(
            update(schema.windows)
            .where(schema.windows.c.message == message)
            .values(counts=b"\xc1 not MessagePack", rows=10_000)
        )
    watch.tick(hub.store, NOW, RULES)
    [row] = rows(hub, schema.drift, device="watch-01")
    assert row["state"] == "stable"
    assert row["detail"]["baseline_rows"] == 150


def test_a_plan_whose_task_is_gone_is_not_proposed(hub):
    baseline(hub)
    watch.tick(hub.store, NOW, RULES)
    with hub.store.begin() as connection:
        connection.execute(
            insert(schema.runs).values(
                id="0123456789ab", plan='name = "x"\ntask = "gone"\nmodel = "shoulder"',
                name="x", model=MODEL, state="failed", created_at=NOW, created_by="a", metrics={},
            )
        )  # fmt: skip
    add_windows(hub, REFERENCE, "watch-01", 6, seed=40, turned=True)
    done = watch.tick(hub.store, NOW + 1, RULES)
    assert (len(done.opened), len(done.proposed)) == (1, 0)


sizes = st.lists(st.integers(min_value=0, max_value=80), max_size=40)


@settings(max_examples=60)
@given(sizes=sizes, baseline_rows=st.integers(1, 200), current_rows=st.integers(1, 200))
def test_no_window_counts_for_both_sides_and_none_is_read_in_vain(
    sizes, baseline_rows, current_rows
):
    windows = [
        Counted(i, Tally({"v": np.array([n], dtype=np.int64)}, n)) for i, n in enumerate(sizes)
    ]
    rules = Rules(baseline_rows=baseline_rows, current_rows=current_rows)

    found = split(windows, reversed(windows), rules)

    before, now = found.baseline.rows, found.current.rows
    assert before + now <= sum(sizes)
    if sum(sizes) < baseline_rows:
        assert (before, now) == (sum(sizes), 0)
    else:
        assert before >= baseline_rows
        assert before - baseline_rows < max(sizes)
        assert now < current_rows + max(sizes)
        assert now >= min(sum(sizes) - before, current_rows)
    for side in (found.baseline, found.current):
        assert sum(int(vector.sum()) for vector in side.counts.values()) == side.rows


@pytest.mark.parametrize(
    ("state", "alerted", "action"),
    [
        ("drifted", False, "open"),
        ("drifted", True, "nothing"),
        ("stable", True, "close"),
        ("stable", False, "nothing"),
        ("too-few-rows", True, "nothing"),
        ("too-few-rows", False, "nothing"),
    ],
)
def test_an_alert_opens_once_and_closes_only_when_stable(state, alerted, action):
    assert decide(state, alerted=alerted) == action


def test_without_windows_after_the_baseline_nothing_is_judged():
    found = judge(REFERENCE, split([], [], Rules()), Rules())
    assert found == DeviceVerdict(
        state="too-few-rows", rows=0, score=0.0, variables={}, population={}
    )


# ---- with noise, from the device's counting to the verdict


class Wrist:
    """A device that serves and counts, and an outbox from which the hub is sent everything."""

    def __init__(self, hub: HubContext, directory: Path, number: int, z: float) -> None:
        self.hub, self.name = hub, f"watch-0{number}"
        self._database = Database(directory / f"{self.name}.db")
        self._outbox = Outbox(self._database)
        self._outbox.start_boot()
        self._rng = np.random.default_rng(number)
        self._watch = Watch(
            MODEL,
            1,
            REFERENCE,
            Noised(z, len(REFERENCE.variables), self._stream),
            lambda window: self._outbox.enqueue(window, NOW),
            lambda: NOW,
            rows=256,
            seconds=60.0,
        )

    def _stream(self) -> Keystream:
        return Keystream.replayable(int(self._rng.integers(2**32)))

    def serves(self, windows: int, *, turned: bool = False) -> None:
        """Serve, and send each window twice, as when an acknowledgement is lost."""
        for _ in range(windows):
            x = signals(self._rng, 256, offset=0.0, turned=turned)
            p = scores(self._rng, 256, sharp=2.0 if turned else 6.0)
            self._watch.saw(x, np.log(p))
        items = self._outbox.waiting(999)
        topic = topics.topic(self.name, "telemetry")
        batch = [
            read(Incoming(topic, item.payload, retained=False, connection=1, mid=1, qos=1))
            for item in (*items, *items)
        ]
        with self.hub.store.begin() as connection:
            assert store_batch(connection, batch, NOW) == set()
        self._outbox.settle([item.id for item in items])

    def close(self) -> None:
        self._database.close()


def test_drift_is_seen_through_the_noise_and_on_no_other_device(hub, tmp_path):
    z = 1.0
    wrists = [Wrist(hub, tmp_path, number, z) for number in (1, 2, 3)]
    for wrist in wrists:
        wrist.serves(6)
    watch.tick(hub.store, NOW, RULES)
    assert {row["state"] for row in rows(hub, schema.drift)} <= {"too-few-rows", "stable"}

    for wrist in wrists:
        wrist.serves(6, turned=wrist.name == "watch-02")
    done = watch.tick(hub.store, NOW + 1, RULES)

    assert {row["device"]: row["state"] for row in rows(hub, schema.drift)} == {
        "watch-01": "stable",
        "watch-02": "drifted",
        "watch-03": "stable",
    }
    assert [serving.device for serving in done.opened] == ["watch-02"]
    assert len(rows(hub, schema.windows)) == 36  # each once
    for row in rows(hub, schema.drift):
        read_windows = row["detail"]["current_rows"] / 256
        sigma = z * np.sqrt(2 * len(REFERENCE.variables) * read_windows)
        assert row["detail"]["noise"] == pytest.approx(sigma, rel=0.01)
        with hub.store.read() as connection:
            page = device_page(connection, row["device"], NOW, 1e9, RULES)
        assert page["drift"]["detail"]["noise"] == row["detail"]["noise"]
        assert all(
            bar.height > 0 for h in page["histograms"] for _, _, b in h["drawings"] for bar in b
        )
    for wrist in wrists:
        wrist.close()


def test_noise_that_drowns_the_counts_leaves_too_few_rows_and_no_alert(hub, tmp_path):
    wrist = Wrist(hub, tmp_path, 1, 60.0)
    wrist.serves(8)
    watch.tick(hub.store, NOW, RULES)
    wrist.serves(8, turned=True)
    watch.tick(hub.store, NOW + 1, RULES)
    wrist.close()
    [row] = rows(hub, schema.drift)
    assert row["state"] == "too-few-rows"
    assert row["rows"] > RULES.baseline_rows
    assert not rows(hub, schema.alerts)


def test_counts_that_are_not_packed_as_the_window_says_are_left_out(hub, tmp_path):
    wrist = Wrist(hub, tmp_path, 1, 0.5)
    wrist.serves(2)
    wrist.close()
    add_windows(hub, REFERENCE, "watch-01", 8, seed=3)
    with hub.store.begin() as connection:
        otherwise = case((schema.windows.c.noise > 0, 0.0), else_=1.0)
        connection.execute(update(schema.windows).values(noise=otherwise))
    watch.tick(hub.store, NOW, RULES)
    [row] = rows(hub, schema.drift)
    assert row["rows"] == 0


def noisy(rows: int, sigma: float) -> Tally:
    return Tally({"v": np.array([rows, 0, 0, 0])}, rows, sigma)


def test_noised_windows_are_read_until_they_are_worth_what_is_asked_for():
    windows = [Counted(i, noisy(256, 10.0)) for i in range(40)]
    rules = Rules(baseline_rows=300, current_rows=600)
    found = split(windows, reversed(windows), rules)
    one = windows[0].tally.worth
    assert one == pytest.approx(256**2 / (256 + 400))
    assert found.baseline.rows == 256 * -(-300 // one)
    assert found.current.rows == 256 * -(-600 // one)


def test_a_window_whose_noise_takes_more_than_its_rows_bring_is_left_out():
    windows = [
        Counted(0, noisy(256, 10.0)),
        Counted(1, noisy(1, 10.0)),
        Counted(2, noisy(256, 10.0)),
    ]
    found = split(windows, reversed(windows), Rules(baseline_rows=10**6))
    assert found.baseline.rows == 512
    assert found.baseline.noise == pytest.approx(10 * np.sqrt(2))


def test_noise_without_end_is_not_read_without_end():
    read_so_far = []

    def endless():
        for number in range(10**9):
            read_so_far.append(number)
            yield Counted(number, noisy(1, 1e6))

    found = split(endless(), [], Rules())
    assert len(read_so_far) == WINDOWS
    assert found.current == Tally()
