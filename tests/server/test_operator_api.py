"""The operator API on a real hub: roles, the audit line of every change, and who may reach it."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import insert

from atoll.server import audit, auth
from atoll.server.schema import alerts
from atoll.server.store import Store

Running = Any

PLAN = """\
name = "api-test"
task = "spar"
model = "api-test"
rounds = 1
"""

# Least role, method, path and body: each is tried by every role.
ROUTES: list[tuple[str, str, str, object]] = [
    ("viewer", "GET", "/devices", None),
    ("viewer", "GET", "/runs", None),
    ("viewer", "GET", "/models", None),
    ("viewer", "GET", "/targets", None),
    ("viewer", "GET", "/drift", None),
    ("viewer", "GET", "/alerts", None),
    ("viewer", "GET", "/ledger", None),
    ("viewer", "GET", "/audit", None),
    ("viewer", "POST", "/login-link", None),
    ("operator", "POST", "/tokens", {"labels": {"a": "b"}}),
    ("operator", "POST", "/devices/nobody/revoke", None),
    ("operator", "POST", "/runs/none/cancel", None),
    ("operator", "GET", "/candidates/none/manifest.json", None),
    ("operator", "POST", "/models/none/roll-out", {"release": 1}),
    ("operator", "POST", "/models/none/roll-back", None),
    ("operator", "POST", "/alerts/999999/acknowledge", None),
    ("approver", "POST", "/runs/none/approve", None),
    ("approver", "POST", "/models/none/releases", {"run": "none", "targets": "{}"}),
    ("admin", "GET", "/operators", None),
    ("admin", "POST", "/operators/nobody/revoke", None),
]


@pytest.fixture(scope="session")
def tokens(running: Running) -> dict[str, str]:
    """One operator of each role."""
    store, now = running.hub.context.store, running.hub.context.clock()
    with store.begin() as connection:
        return {role: auth.create(connection, f"api-{role}", role, now) for role in auth.ROLES}


@pytest.fixture
def admin(running: Running, tokens: dict[str, str]) -> Iterator[httpx.Client]:
    with running.operator_client(tokens["admin"]) as client:
        yield client


@pytest.mark.parametrize("role", auth.ROLES)
@pytest.mark.parametrize(("least", "method", "path", "body"), ROUTES)
def test_a_role_may_what_it_should_and_no_more(
    running: Running,
    tokens: dict[str, str],
    role: str,
    least: str,
    method: str,
    path: str,
    body: object,
) -> None:
    with running.operator_client(tokens[role]) as client:
        answer = client.request(method, path, json=body)
    allowed = auth.ROLES.index(role) >= auth.ROLES.index(least)  # type: ignore[arg-type]
    assert (answer.status_code != 403) == allowed
    if answer.status_code >= 400:
        assert set(answer.json()) == {"error", "message", "remedy"}


@pytest.mark.parametrize("token", [None, "", "nonsense", "atollop_" + "x" * 43])
@pytest.mark.parametrize(("least", "method", "path", "body"), ROUTES)
def test_nothing_is_there_without_a_token(
    running: Running, token: str | None, least: str, method: str, path: str, body: object
) -> None:
    with running.operator_client(token) as client:
        answer = client.request(method, path, json=body)
    assert answer.status_code == 401
    assert answer.json()["error"] == "unauthenticated"


def test_every_route_that_changes_something_is_in_the_table(running: Running) -> None:
    with running.operator_client(None) as client:
        described = client.get("/openapi.json").json()["paths"]
    open_to_all = {"/health", "/stream", "/devices/{device}", "/runs/{run}"}
    known = {(method, path.split("/")[1]) for _, method, path, _ in ROUTES}
    for whole, methods in described.items():
        path = whole.removeprefix("/api/v1")
        for method in methods:
            assert path in open_to_all or (method.upper(), path.split("/")[1]) in known


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "", "127.0.0.1.evil"])
def test_other_host_names_are_refused(running: Running, host: str) -> None:
    with running.operator_client(None) as client:
        answer = client.get("/health", headers={"host": host})
        assert answer.status_code == 421
        assert answer.json()["error"] == "unknown-host"
        for known in ("localhost:1", "127.0.0.1", "LOCALHOST"):
            assert client.get("/health", headers={"host": known}).status_code == 200


def test_bodies_over_the_limit_and_without_length_are_refused(admin: httpx.Client) -> None:
    assert admin.post("/runs", json={"plan": "x" * 9_000_000}).status_code == 413
    assert admin.post("/runs", content=iter([b"{}"])).status_code == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokens", {"ttl": -1}),
        ("/tokens", {"device": "Not A Name"}),
        ("/tokens", {"unknown": 1}),
        ("/runs", {"plan": "name = 1"}),
        ("/runs", {"plan": "not toml ["}),
        ("/runs", {"plan": PLAN.replace("spar", "missing")}),
        ("/operators", {"name": "x", "role": "king"}),
    ],
)
def test_requests_that_cannot_be_understood_say_why(
    admin: httpx.Client, path: str, body: object
) -> None:
    answer = admin.post(path, json=body)
    assert answer.status_code == 422
    assert answer.json()["error"] == "bad-input"
    assert answer.json()["message"]


def test_what_is_not_there_is_told_in_json(admin: httpx.Client) -> None:
    for path in ("/nothing", "/devices/nobody", "/runs/none", "/devices/a/b/c"):
        answer = admin.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"] == "not-found"


def last_entry(store: Store) -> dict[str, Any]:
    with store.read() as connection:
        audit.verify(connection)
        return dict(audit.entries(connection, limit=1, newest_first=True)[0])


def test_an_operator_can_be_added_used_and_revoked(running: Running, admin: httpx.Client) -> None:
    made = admin.post("/operators", json={"name": "ann", "role": "viewer"}).json()
    with running.operator_client(made["token"]) as ann:
        assert ann.get("/devices").status_code == 200
        assert admin.post("/operators", json={"name": "ann", "role": "admin"}).status_code == 409
        assert admin.post("/operators/ann/revoke").status_code == 200
        assert ann.get("/devices").status_code == 401
    listed = {one["name"]: one for one in admin.get("/operators").json()}
    assert listed["ann"]["revoked_at"] is not None
    assert "token" not in str(listed)
    entry = last_entry(running.hub.context.store)
    assert (entry["actor"], entry["action"], entry["subject"]) == (
        "api-admin",
        "operator.revoke",
        "ann",
    )


def test_the_last_admin_stays(store: Store) -> None:
    from atoll.server.errors import Conflict

    with store.begin() as connection:
        auth.create(connection, "only", "admin", 0.0)
        with pytest.raises(Conflict, match="last admin"):
            auth.revoke(connection, "only", 1.0)


def test_a_run_is_approved_by_somebody_else(running: Running, tokens: dict[str, str]) -> None:
    store = running.hub.context.store
    with (
        running.operator_client(tokens["approver"]) as approver,
        running.operator_client(tokens["operator"]) as operator,
        running.operator_client(tokens["admin"]) as admin,
    ):
        own = approver.post("/runs", json={"plan": PLAN}).json()["id"]
        refused = approver.post(f"/runs/{own}/approve")
        assert (refused.status_code, refused.json()["error"]) == (403, "four-eyes")
        assert approver.post(f"/runs/{own}/cancel").json()["state"] == "cancelled"
        assert approver.post(f"/runs/{own}/cancel").status_code == 409
        shown = operator.get(f"/runs/{own}").json()
        assert (shown["state"], shown["rounds"], shown["plan"]) == ("cancelled", [], PLAN)

        # These two do start; they are stopped at once.
        others = operator.post("/runs", json={"plan": PLAN, "reason": "drift"}).json()["id"]
        assert approver.post(f"/runs/{others}/approve").json()["state"] == "approved"
        entry = last_entry(store)
        assert (entry["action"], entry["facts"]["own"]) == ("run.approve", False)
        assert approver.post(f"/runs/{others}/cancel").status_code == 200

        admins = admin.post("/runs", json={"plan": PLAN}).json()["id"]
        assert admin.post(f"/runs/{admins}/approve").status_code == 200
        with store.read() as connection:
            approvals = [
                entry["facts"]["own"]  # type: ignore[index, call-overload]
                for entry in audit.entries(connection, limit=1000)
                if entry["action"] == "run.approve" and entry["subject"] == admins
            ]
        assert approvals == [True]
        assert admin.post(f"/runs/{admins}/cancel").status_code == 200


def test_alerts_are_acknowledged_once(running: Running, admin: httpx.Client) -> None:
    with running.hub.context.store.begin() as connection:
        number = connection.execute(
            insert(alerts)
            .values(at=1.0, kind="device", severity="error", device="x", text="t")
            .returning(alerts.c.id)
        ).scalar_one()
    assert number in [one["id"] for one in admin.get("/alerts").json()]
    assert admin.post(f"/alerts/{number}/acknowledge").status_code == 200
    assert admin.post(f"/alerts/{number}/acknowledge").status_code == 409
    assert number not in [one["id"] for one in admin.get("/alerts").json()]
    assert number in [one["id"] for one in admin.get("/alerts", params={"all": True}).json()]


def test_the_audit_log_is_served_with_its_root(admin: httpx.Client) -> None:
    log = admin.get("/audit", params={"limit": 1000}).json()
    leaves = [audit.leaf_hash(audit.canonical(entry)) for entry in log["entries"]]
    assert log["size"] == len(leaves)
    assert log["root"] == audit.root(leaves).hex()


def test_a_revoked_device_loses_broker_and_superlink(
    running: Running, admin: httpx.Client, wait_until: Callable[..., None]
) -> None:
    running.enrolled("api-gone")
    node = admin.get("/devices/api-gone").json()["node_id"]
    assert node is not None
    assert admin.post("/devices/api-gone/revoke", json={"reason": "lost"}).status_code == 200
    shown = admin.get("/devices/api-gone").json()
    assert (shown["node_id"], shown["online"]) == (None, False)
    config = (running.hub.context.settings.data / "broker" / "nats.conf").read_text()
    assert "CN=api-gone" not in config


def test_changes_are_streamed(running: Running, admin: httpx.Client) -> None:
    heard = threading.Event()

    def listen() -> None:
        with admin.stream("GET", "/stream") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:") and heard.is_set():
                    return
                heard.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert heard.wait(10)
    with running.operator_client(admin.headers["authorization"].split()[1]) as other:
        other.post("/tokens", json={})
    listener.join(10)
    assert not listener.is_alive()
