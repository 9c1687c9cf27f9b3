"""The loop from enrolment to serving with the real programs: a hub and three devices."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from atoll.simulations.local_fleet import LocalFleet
from atoll.simulations.spar import Spar, split_people
from atoll.simulations.traffic import feed

PEOPLE = {"ant": 1, "bee": 2, "cat": 3}
ROLES = {"ant": "train", "bee": "train", "cat": "evaluate"}
PLAN = """
name = "short"
task = "spar"
model = "exercises"
rounds = 10
[training]
local_epochs = 2
server_momentum = 0.5
averaged_rounds = 3
[cohort]
labels = { role = "train" }
min_devices = 2
rule = "device.rows >= 64 && !device.drifted"
[privacy]
mode = "he"
clip_norm = 1.0
noise_multiplier = 0.01
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    root = tmp_path_factory.mktemp("fleet")
    with LocalFleet(root) as fleet:
        fleet.start_hub()
        dealt = split_people(root / "recordings", PEOPLE.values())
        for device, person in PEOPLE.items():
            fleet.enrol(device, {"role": ROLES[device]})
            dealt[person].rename(fleet.device_data(device) / "data")
            fleet.start_device(device, "--window-rows", "16", "--health-seconds", "1")
        fleet.wait("all online", lambda: all(d["online"] for d in fleet.devices().values()), 60)
        yield fleet


@pytest.fixture(scope="module")
def run(fleet: LocalFleet) -> dict[str, Any]:
    run = fleet.call("POST", "/runs", {"plan": PLAN})["id"]
    fleet.call("POST", f"/runs/{run}/approve")

    def ended() -> dict[str, Any] | None:
        seen: dict[str, Any] = fleet.call("GET", f"/runs/{run}")
        return seen if seen["state"] not in {"approved", "running"} else None

    return fleet.wait("the run to end", ended, 240)


@pytest.fixture(scope="module")
def released(fleet: LocalFleet, run: dict[str, Any]) -> dict[str, Any]:
    assert run["state"] == "gated", run["reason"]
    fleet.atoll("model", "publish", run["id"], "--keys", str(fleet.hub / "offline-keys"))
    fleet.atoll("model", "roll-out", "exercises")

    def done() -> dict[str, Any] | None:
        (model,) = fleet.call("GET", "/models")
        rollout: dict[str, Any] = model["rollouts"][0]
        assert rollout["state"] != "halted", rollout["reason"]
        return rollout if rollout["state"] == "done" else None

    return fleet.wait("the rollout to end", done, 90)


def test_a_run_trains_under_encryption_and_charges_the_ledger(
    fleet: LocalFleet, run: dict[str, Any]
) -> None:
    assert [one["round"] for one in run["rounds"]] == list(range(1, 11))
    assert all(sorted(one["survivors"]) == ["ant", "bee"] for one in run["rounds"])
    (spent,) = fleet.call("GET", "/ledger?delta=1e-5")
    assert spent["charges"] == 10
    assert spent["epsilon"] == pytest.approx(run["rounds"][-1]["epsilon"], rel=1e-6)


def test_the_run_knows_what_its_rule_asked_and_how_groups_and_devices_fare(
    fleet: LocalFleet, run: dict[str, Any]
) -> None:
    facts = run["metrics"]
    assert (facts["cohort"]["eligible"], facts["cohort"]["left_out"]) == (2, {})
    health = fleet.call("GET", "/devices/ant")["health"]
    rows = len(Spar().load(fleet.device_data("ant") / "data", "train").y)
    assert health["examples"] <= rows < 2 * health["examples"]
    assert health["accelerator"]
    assert facts["fairness"]["groups"].keys() == {"left", "right"}
    assert 0 <= facts["fairness"]["equalised_odds"] <= 1
    assert facts["spread"]["known"]["devices"] == 2
    assert "unseen" in facts["spread_left_out"]


def test_every_device_serves_the_signed_release(
    fleet: LocalFleet, released: dict[str, Any]
) -> None:
    assert len(released["canaries"]) == 1
    for device in fleet.devices().values():
        assert device["reported"]["state"] == "serving"
        assert device["reported"]["release"] == released["release"]
        metadata = httpx.get(f"{device['serve_url']}/v2/models/exercises").json()
        assert metadata["versions"] == [str(released["release"])]


@pytest.mark.usefixtures("released")
def test_what_a_device_serves_comes_to_the_hub_as_counts(fleet: LocalFleet) -> None:
    device = fleet.devices()["cat"]
    rows = Spar().load(fleet.device_data("cat") / "data", "test")
    served = feed(device["serve_url"], "exercises", rows)
    assert served.rows == len(rows.y)

    def counted() -> bool:
        found = {row["device"]: row["rows"] for row in fleet.call("GET", "/drift")}
        return bool(found.get("cat"))

    fleet.wait("the windows at the hub", counted, 90)


@pytest.mark.usefixtures("released")
def test_a_revoked_device_is_out_everywhere_within_seconds(fleet: LocalFleet) -> None:
    fleet.atoll("device", "revoke", "bee", "--yes")
    fleet.wait("bee to be offline", lambda: not fleet.devices()["bee"]["online"], 20)
