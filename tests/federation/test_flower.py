"""The contract with flwr: our hub and device side against a real SuperLink."""

import json
import re
import threading
from pathlib import Path

import pytest
from blobs import Blobs, write
from links import Hub, wait_for

from atoll.federation import client_app
from atoll.federation.errors import LinkError
from atoll.federation.warm_node import SLOWEST_POLL, WarmNode
from atoll.fleet.identity import Authority, Identity
from atoll.privacy.plain import PlainParty

PLAN = """
name = "contract"
task = "blobs"
model = "blobs"
rounds = {rounds}
cohort = {{ min_devices = 2, round_timeout = {timeout} }}
privacy = {{ mode = "he" }}
"""


def node_of(identity: Path, url: str) -> WarmNode:
    return WarmNode(
        url, ca=identity / "ca.pem", certificate=identity / "cert.pem", key=identity / "key.pem"
    )


def app(tmp_path: Path) -> object:
    return client_app.build(Blobs(), tmp_path, lambda _: PlainParty("x"), {})


@pytest.mark.parametrize("superlink", ["hub", "stock_hub"])
def test_an_encrypted_run_completes_without_a_killed_node(
    superlink: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub: Hub = request.getfixturevalue(superlink)
    nodes, data, identities = {}, {}, {}
    for number, device in enumerate(["one", "two", "three"]):
        identities[device], mine = hub.identity(device)
        nodes[device] = hub.admin.register_node(mine.public_pem())
        data[device] = write(tmp_path / device, number)
    (data["three"] / "stall-after").write_text("1")
    (data["one"] / "forgetful").touch()
    job = {
        "plan": PLAN.format(rounds=2, timeout=90),
        "nodes": nodes,
        "certificates": {name: (at / "cert.pem").read_text() for name, at in identities.items()},
        "trainers": list(nodes),
    }
    (hub.folder / "job1.json").write_text(json.dumps(job))
    with (
        hub.node("one", identities["one"], data["one"]),
        hub.node("two", identities["two"], data["two"]),
        hub.node("three", identities["three"], data["three"]) as third,
    ):
        run = hub.admin.start_run("contract_app:app", {"job": "job1"})
        wait_for((data["three"] / "stalled").exists, 60, "the third to train again")
        third.kill()
        wait_for(lambda: hub.admin.run_status(run).state == "finished", 150, "the run")
    status = hub.admin.run_status(run)
    assert status.outcome == "completed", status.detail
    result = json.loads((hub.folder / "result.json").read_text())
    rounds = result["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2]
    assert rounds[0]["survivors"] == ["one", "three", "two"]
    assert rounds[1]["survivors"] == ["one", "two"]
    assert set(rounds[1]["dropped"]) == {"three"}
    assert result["rows"] == {"one": 60, "two": 60}
    assert result["answers"] == {"one": "PING", "two": "PING"}
    bundled = 'POST /v1/runtime/send-messages HTTP/1.1" 200'
    assert (bundled in (hub.folder / "superlink.log").read_text()) == (superlink == "hub")
    # Answers were lost, and no message with them.
    lost = "the connection was cut" in (hub.folder / "one.log").read_text()
    assert lost == (superlink == "hub")
    spent = re.findall(
        r"^(\S+): ([0-9.]+) s to fetch", (hub.folder / "one.log").read_text(), re.MULTILINE
    )
    assert {kind for kind, _ in spent} == {"train", "train.sum", "evaluate", "query"}


def test_asynchronous_steps_do_not_wait_for_a_node_that_stalls(hub: Hub, tmp_path: Path) -> None:
    nodes, data, identities = {}, {}, {}
    for number, device in enumerate(["quick", "swift", "stalled"]):
        identities[device], mine = hub.identity(device)
        nodes[device] = hub.admin.register_node(mine.public_pem())
        data[device] = write(tmp_path / device, number)
    (data["stalled"] / "stall-after").write_text("0")
    plain = PLAN.format(rounds=3, timeout=90).replace('"he"', '"plain"')
    job = {
        "plan": f"{plain}asynchrony = {{ buffer = 2, concurrency = 3 }}",
        "nodes": nodes,
        "certificates": {name: (at / "cert.pem").read_text() for name, at in identities.items()},
        "trainers": list(nodes),
    }
    (hub.folder / "job2.json").write_text(json.dumps(job))
    (hub.folder / "result.json").unlink(missing_ok=True)
    with (
        hub.node("quick", identities["quick"], data["quick"]),
        hub.node("swift", identities["swift"], data["swift"]),
        hub.node("stalled", identities["stalled"], data["stalled"]) as third,
    ):
        run = hub.admin.start_run("contract_app:app", {"job": "job2"})
        wait_for(lambda: hub.admin.run_status(run).state == "finished", 150, "the run")
        third.kill()
    status = hub.admin.run_status(run)
    assert status.outcome == "completed", status.detail
    result = json.loads((hub.folder / "result.json").read_text())
    assert [entry["survivors"] for entry in result["rounds"]] == [["quick", "swift"]] * 3
    # Were it waited for, it would be among the dropped.
    assert [entry["dropped"] for entry in result["rounds"]] == [{}] * 3


def test_a_run_that_the_superlink_does_not_know_has_failed_and_may_be_stopped(hub: Hub) -> None:
    status = hub.admin.run_status("12345")
    assert (status.state, status.outcome) == ("finished", "failed")
    assert "restarted" in status.detail
    hub.admin.stop_run("12345")


def test_a_key_that_is_not_registered_is_refused(hub: Hub, tmp_path: Path) -> None:
    identity, _ = hub.identity("unknown")
    with pytest.raises(LinkError, match="enrol"):
        node_of(identity, hub.front.url).serve(app(tmp_path), threading.Event())


def test_an_unregistered_node_is_refused_from_then_on(hub: Hub, tmp_path: Path) -> None:
    identity, mine = hub.identity("revoked")
    node = hub.admin.register_node(mine.public_pem())
    stop, ended = threading.Event(), threading.Event()
    refusals = []

    def serve() -> None:
        try:
            node_of(identity, hub.front.url).serve(app(tmp_path), stop)
        except LinkError as error:
            refusals.append(str(error))
        ended.set()

    threading.Thread(target=serve, daemon=True).start()
    try:
        assert not ended.wait(1)
        hub.admin.unregister_node(node)
        hub.admin.unregister_node(node)
        assert ended.wait(2 * SLOWEST_POLL + 5)
    finally:
        stop.set()
    assert "enrol it again" in refusals[0]


def test_a_certificate_of_another_authority_is_refused(hub: Hub, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    foreign = Authority.create("foreign", datetime.now(UTC))
    identity, mine = hub.identity("foreign", foreign)
    hub.admin.register_node(mine.public_pem())
    with pytest.raises(LinkError):
        node_of(identity, hub.front.url).serve(app(tmp_path), threading.Event())


def test_a_hub_that_is_away_at_the_start_is_an_error_that_says_so(hub: Hub, tmp_path: Path) -> None:
    identity, _ = hub.identity("early")
    with pytest.raises(LinkError, match="cannot be reached"):
        node_of(identity, "https://127.0.0.1:9").serve(app(tmp_path), threading.Event())


def test_a_broken_connection_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    identity, mine = hub.identity("broken")
    hub.admin.register_node(mine.public_pem())
    stop = threading.Event()
    errors = []

    def serve() -> None:
        try:
            node_of(identity, hub.front.url).serve(app(tmp_path), stop)
        except LinkError as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        before = hub.front.passed
        wait_for(lambda: hub.front.passed > before + 8, 20, "the node to ask")
        hub.front.cut()
        before = hub.front.passed
        wait_for(lambda: hub.front.passed > before + 8, 20, "the node to ask again")
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
    assert errors == []


def test_admin_errors_are_link_errors(hub: Hub) -> None:
    with pytest.raises(LinkError):
        hub.admin.register_node(b"no key")
    key = Identity.new().public_pem()
    hub.admin.register_node(key)
    with pytest.raises(LinkError):
        hub.admin.register_node(key)
