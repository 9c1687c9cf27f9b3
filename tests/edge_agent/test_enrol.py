"""Joining a fleet, as a user does, and renewing; every problem is one sentence."""

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bench
import pytest

from atoll.edge_agent import credentials
from atoll.edge_agent.database import Database
from atoll.edge_agent.enrol import enrol
from atoll.edge_agent.errors import (
    AlreadyEnrolled,
    DataUnwritable,
    HubError,
    HubUnreachable,
    HubUntrusted,
)
from atoll.edge_agent.paths import Paths
from atoll.edge_agent.renew import renew
from atoll.fleet.errors import BadIdentity
from atoll.fleet.identity import Identity, peer_of
from atoll.fleet.token import EnrolmentToken
from atoll.fleet.wire import Desired

AGENT = Path(sys.executable).with_name("atoll-agent")
NOW = datetime.now(UTC)


def agent(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(AGENT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def problem(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("atoll-agent: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_enrols_shows_and_refuses_to_enrol_twice(hub, tmp_path):
    data = tmp_path / "device"
    done = agent("enrol", "--token", hub.token(), "--data", data, "--json")
    assert json.loads(done.stdout) == {"device": "watch-1", "hub": hub.url}
    identity = Paths(data).identity
    files = {file.name: file.stat().st_mode & 0o777 for file in identity.iterdir()}
    assert files.keys() == {"key.pem", "seal.pem", "cert.pem", "ca.pem", "hub.json", "root.json"}
    assert files["key.pem"] == files["seal.pem"] == 0o600
    assert data.stat().st_mode & 0o077 == 0
    peer = peer_of((identity / "cert.pem").read_bytes(), hub.authority.cert_pem, NOW)
    assert peer.device == "watch-1"
    shown = agent("status", "--data", data)
    assert shown.returncode == 0
    assert "watch-1" in shown.stdout
    problem(agent("enrol", "--token", hub.token(), "--data", data), str(identity))


def test_a_device_may_choose_its_name_where_the_token_lets_it(hub, tmp_path):
    facts = enrol(hub.token(None), Paths(tmp_path / "a"), "porch", NOW)
    assert facts.device == "porch"
    problem(
        agent("enrol", "--token", hub.token("x"), "--device", "y", "--data", tmp_path / "b"),
        "the token is for device 'x'",
    )


def test_a_used_token_is_refused_and_leaves_nothing(hub, tmp_path):
    token = hub.token()
    enrol(token, Paths(tmp_path / "a"), None, NOW)
    done = agent("enrol", "--token", token, "--data", tmp_path / "b")
    problem(done, "the token was used before")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["agent.lock"]


@pytest.mark.parametrize("spoil", [lambda t: t[:-3], lambda t: "hello", lambda t: t.swapcase()])
def test_a_slip_in_the_token_is_caught_before_the_network(hub, tmp_path, spoil):
    done = agent("enrol", "--token", spoil(hub.token()), "--data", tmp_path / "d")
    problem(done, "atoll device token")
    assert not hub.requests


def test_another_hub_at_the_address_is_not_trusted_and_sent_nothing(hub, tmp_path):
    with bench.hub_at(tmp_path / "other") as other:
        token = EnrolmentToken(other.url, hub.authority.fingerprint, "secret", "w").encode()
        problem(agent("enrol", "--token", token, "--data", tmp_path / "d"), "not the one")
        assert [path for _, path, _ in other.requests] == ["/v1/ca"]


def test_a_hub_that_is_away_is_told(tmp_path):
    token = EnrolmentToken(
        f"https://127.0.0.1:{bench.free_port()}", "ab" * 32, "secret", None
    ).encode()
    problem(agent("enrol", "--token", token, "--data", tmp_path / "d"), "cannot be reached")


def test_something_else_behind_the_address_is_told(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        token = EnrolmentToken(
            f"https://127.0.0.1:{listener.getsockname()[1]}", "ab" * 32, "secret", None
        ).encode()
        import threading

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"220 smtp ready\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HubError):
            enrol(token, Paths(tmp_path / "d"), None, NOW)
        thread.join()


def test_a_directory_that_cannot_be_written_is_told(hub, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataUnwritable, match="--data"):
        enrol(hub.token(), Paths(tmp_path / "file" / "device"), None, NOW)
    assert hub.requests == []


def test_a_certificate_that_is_not_valid_now_is_not_kept(hub, tmp_path):
    hub.issued_at = NOW - timedelta(days=90)
    with pytest.raises(HubUntrusted, match="clock"):
        enrol(hub.token(), Paths(tmp_path / "d"), None, NOW)
    assert not Paths(tmp_path / "d").identity.exists()


def test_an_identity_of_unknown_kind_is_not_overwritten(hub, tmp_path):
    paths = Paths(tmp_path / "d")
    paths.identity.mkdir(parents=True)
    with pytest.raises(AlreadyEnrolled):
        enrol(hub.token(), paths, None, NOW)


def test_run_and_status_without_enrolment_say_what_to_do(tmp_path):
    problem(agent("run", "--data", tmp_path / "d"), "atoll-agent enrol --token")
    problem(agent("status", "--data", tmp_path / "d"), "atoll-agent enrol --token")
    problem(agent("status", ATOLL_AGENT_DATA=str(tmp_path / "e")), str(tmp_path / "e"))


def test_a_port_in_use_is_told(hub, tmp_path):
    bench.enrolled(hub, tmp_path / "d")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = agent("run", "--data", tmp_path / "d", "--serve-port", port)
        problem(done, f"cannot serve on port {port}")
        assert "--serve-port" in done.stderr


def test_a_key_that_does_not_fit_its_certificate_is_told(hub, tmp_path):
    paths = bench.enrolled(hub, tmp_path / "d")
    Identity.new().save(paths.identity)
    problem(agent("run", "--data", paths.data), "enrol again")


@pytest.mark.parametrize("arguments", [["enrol"], ["run", "--serve-port", "x"], ["frobnicate"]])
def test_wrong_usage_is_exit_status_two(arguments):
    done = agent(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_help_tells_the_exit_statuses():
    done = agent("run", "--help")
    assert done.returncode == 0
    assert "Exit status" in done.stdout


def test_renews_at_two_thirds_of_the_life_and_keeps_its_keys(hub, tmp_path):
    paths = bench.enrolled(hub, tmp_path / "d")
    before = (paths.identity / "cert.pem").read_bytes()
    key = (paths.identity / "key.pem").read_bytes()
    assert not renew(paths, NOW + timedelta(days=19))
    assert (paths.identity / "cert.pem").read_bytes() == before
    assert renew(paths, NOW + timedelta(days=21))
    after = (paths.identity / "cert.pem").read_bytes()
    assert after != before
    assert (paths.identity / "key.pem").read_bytes() == key
    assert peer_of(after, hub.authority.cert_pem, NOW).device == "watch-1"


def test_a_renewal_that_fails_leaves_the_old_certificate(hub, tmp_path):
    paths = bench.enrolled(hub, tmp_path / "d")
    before = (paths.identity / "cert.pem").read_bytes()
    hub.issued_at = NOW - timedelta(days=90)
    with pytest.raises(BadIdentity):
        renew(paths, NOW + timedelta(days=21))
    hub.close()
    with pytest.raises(HubUnreachable):
        renew(paths, NOW + timedelta(days=21))
    assert (paths.identity / "cert.pem").read_bytes() == before


def test_a_foreign_hub_is_not_talked_to(hub, tmp_path):
    paths = bench.enrolled(hub, tmp_path / "d")
    with bench.hub_at(tmp_path / "other") as other:
        who = credentials.load(paths)
        from atoll.edge_agent.hub import Hub

        client = Hub(other.url, who.context())
        with pytest.raises(HubUntrusted, match="not to be trusted"):
            client.call("GET", "/v1/ca")
        client.pool.clear()


def test_an_expired_certificate_is_told_with_the_remedy(hub, tmp_path):
    hub.life = timedelta(seconds=2)
    paths = Paths(tmp_path / "d")
    now = datetime.now(UTC)
    enrol(hub.token(), paths, None, now)
    who = credentials.load(paths)
    bench.wait_until(lambda: datetime.now(UTC) > now + timedelta(seconds=4), "the expiry")
    with pytest.raises(HubUntrusted, match=r"expired.*enrol again"):
        renew(paths, datetime.now(UTC))
    assert who.certificate.exists()


def test_a_foreign_certificate_is_told_with_the_remedy(hub, tmp_path):
    with bench.hub_at(tmp_path / "other") as other:
        paths = bench.enrolled(other, tmp_path / "d")
        (paths.identity / "ca.pem").write_bytes(hub.authority.cert_pem)
        from atoll.edge_agent.hub import Hub

        client = Hub(hub.url, credentials.load(paths).context())
        with pytest.raises(HubUntrusted, match="enrol again"):
            client.call("GET", "/v1/tuf/metadata/timestamp.json")
        client.pool.clear()


def test_enrolling_anew_forgets_what_the_earlier_identity_left_but_not_the_examples(hub, tmp_path):
    paths = Paths(tmp_path / "a")
    enrol(hub.token(None), paths, "porch", NOW)
    database = Database(paths.database)
    database.put("desired", Desired(version=57))
    database.close()
    (paths.models / "m").mkdir(parents=True)
    paths.examples.mkdir()
    shutil.rmtree(paths.identity)
    enrol(hub.token(None), paths, "roof", NOW)
    assert not paths.database.exists()
    assert not paths.models.exists()
    assert paths.examples.exists()
