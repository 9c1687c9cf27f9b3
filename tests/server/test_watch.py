"""Watching: drift is seen on the device that drifts, said once, and waits for a person."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update

from atoll.fleet.drift import DeviceVerdict
from atoll.fleet.profile import Profile
from atoll.server import schema, watch
from atoll.server.context import HubContext
from atoll.server.watch_rules import Counted, Rules, decide, judge, split

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
    windows = [Counted(i, n, {"v": np.array([n], dtype=np.int64)}) for i, n in enumerate(sizes)]
    rules = Rules(baseline_rows=baseline_rows, current_rows=current_rows)

    found = split(windows, reversed(windows), rules)

    assert found.baseline_rows + found.current_rows <= sum(sizes)
    if sum(sizes) < baseline_rows:
        assert (found.baseline_rows, found.current_rows) == (sum(sizes), 0)
    else:
        assert found.baseline_rows >= baseline_rows
        assert found.baseline_rows - baseline_rows < max(sizes)
        assert found.current_rows < current_rows + max(sizes)
        left = sum(sizes) - found.baseline_rows
        assert found.current_rows >= min(left, current_rows)
    for counts, n in (
        (found.baseline, found.baseline_rows),
        (found.current, found.current_rows),
    ):
        assert sum(int(vector.sum()) for vector in counts.values()) == n


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
