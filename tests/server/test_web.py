"""The dashboard over HTTP: who gets in, what pages say, what forms may do, how streams end."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import insert, select, update

from atoll.server import auth, schema
from atoll.server.sessions import CODE_SECONDS, SESSION_SECONDS, new_login_code
from atoll.server.web_format import FILTERS

sys.path.insert(0, str(Path(__file__).parent))

from dashboard_fleet import (  # after the path
    DRIFTED,
    MODEL,
    NOW,
    RELEASED_RUN,
    add_device,
    add_operators,
    add_rounds,
    new_hub,
    running,
    seed,
    served,
)

PAGES = ("/", "/devices", "/models", "/runs", "/alerts", "/privacy", "/audit")


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """A hub after the loop has gone round, served: hub, URL and tokens by role."""
    hub = new_hub(tmp_path_factory.mktemp("hub"))
    tokens = seed(hub)
    with served(hub) as url:
        yield hub, url, tokens


@pytest.fixture
def empty(tmp_path):
    """A hub that was just started, served: hub, URL, tokens by role and the clock."""
    clock = Clock()
    hub = new_hub(tmp_path, clock)
    tokens = add_operators(hub)
    with served(hub) as url:
        yield hub, url, tokens, clock


@contextmanager
def signed_in(url: str, token: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Origin": url}) as client:
        answer = client.post("/login", data={"token": token})
        assert answer.status_code == 303, answer.text
        yield client


def proposed(hub) -> str:
    with hub.store.read() as connection:
        query = select(schema.runs.c.id).where(schema.runs.c.state == "proposed")
        return connection.execute(query).scalar_one()


def pages_of(hub) -> list[str]:
    return [
        *PAGES,
        f"/devices/{DRIFTED}",
        "/devices/watch-11",
        f"/runs/{RELEASED_RUN}",
        f"/runs/{proposed(hub)}",
    ]


def test_without_a_session_every_page_leads_to_the_login(seeded):
    hub, url, _ = seeded
    for path in pages_of(hub):
        answer = httpx.get(url + path)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/login?next=")
    assert httpx.get(url + "/events").status_code == 401
    assert httpx.get(url + "/", headers={"HX-Request": "true"}).headers["hx-redirect"]


def test_every_page_is_whole_and_holds_nothing_inline(seeded):
    hub, url, tokens = seeded
    with signed_in(url, tokens["viewer"]) as client:
        for path in pages_of(hub):
            answer = client.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert not re.search(r"<script(?![^>]*\bsrc=\"/static/)", answer.text), path
            assert not re.search(r"<style|\sstyle=|\son[a-z]+=\"|https?://(?!127)", answer.text), (
                path
            )
            for address in re.findall(r"(?:src|href)=\"(/static/[^\"]+)\"", answer.text):
                file = client.get(address)
                assert file.status_code == 200
                assert "immutable" in file.headers["cache-control"]


def test_a_fragment_is_the_page_without_its_frame(seeded):
    _, url, tokens = seeded
    with signed_in(url, tokens["viewer"]) as client:
        whole = client.get("/devices").text
        part = client.get("/devices", headers={"HX-Request": "true"}).text
        assert part.startswith('<div id="app"')
        assert "<html" not in part
        assert part.strip() in re.sub(r"\s+(?=</body>)", "", whole)


def test_a_runs_page_says_how_devices_and_groups_fare_and_who_was_left_out(seeded):
    _, url, tokens = seeded
    with signed_in(url, tokens["viewer"]) as client:
        run = client.get(f"/runs/{RELEASED_RUN}").text
        assert "7 of 8 devices may train by" in run
        assert "<td>device.power = battery</td>" in run
        assert re.search(r"known</th><td[^>]*>8</td><td[^>]*>97\.0", run)
        assert "Not shown: unseen (2 devices, fewer than" in run
        assert re.search(r"Equalised odds, difference</th><td[^>]*>0\.081", run)
        assert "Equalised odds can be told of 6 of 7 classes" in run
        device = client.get("/devices/watch-05").text
        assert "<dt>Power</dt><dd>battery</dd>" in device
        assert "512 or more to train on" in device


def test_pages_say_what_the_tables_hold(seeded):
    _, url, tokens = seeded
    with signed_in(url, tokens["viewer"]) as client:
        overview = client.get("/").text
        assert "1 of 10 devices; a run is proposed" in overview
        assert "waits for approval" in overview
        assert f"{DRIFTED} drifts" in client.get("/alerts").text
        device = client.get(f"/devices/{DRIFTED}").text
        assert device.count("<figure") == 14
        assert "its first 150 rows" in device
        assert "everyone" in device
        run = client.get(f"/runs/{RELEASED_RUN}").text
        assert "97.14" in run
        assert "int8 within one point" in run
        plots = re.findall(r"data-plot=\"([^\"]+)\"", run)
        assert len(plots) == 5
        assert len(json.loads(plots[0].replace("&#34;", '"'))["x"]) == 12
        assert "every entry matches" in client.get("/audit").text
        assert "shoulder 1" in client.get("/models").text


@pytest.mark.parametrize(
    ("noise", "words"), [(9.17, "60 rows, noise of σ = 9.2 on each count"), (0.0, "60 rows, l")]
)
def test_a_devices_page_says_what_noise_its_counts_carry(empty, noise, words):
    hub, url, tokens, _ = empty
    add_device(hub, "watch-01", 1)
    verdict = {"at": NOW, "state": "stable", "rows": 60, "score": 0.2, "detail": {"noise": noise}}
    with hub.store.begin() as connection:
        connection.execute(
            insert(schema.drift).values(device="watch-01", model=MODEL, release=1, **verdict)
        )
    with signed_in(url, tokens["viewer"]) as client:
        assert words in client.get("/devices/watch-01").text


def test_the_privacy_page_has_an_account_for_each_unit(seeded):
    _, url, tokens = seeded
    with signed_in(url, tokens["viewer"]) as client:
        page = client.get("/privacy").text
        headings = re.findall(r"<h2>([^<]+)</h2>", page)
        assert headings == [
            f"{MODEL}, per device",
            f"{MODEL}, per example",
            f"{MODEL}, per row",
        ]
        assert "200 times Gaussian noise" in page
        assert "a served row was counted" in page
        bearer = {"Authorization": f"Bearer {tokens['viewer']}"}
        api = client.get("/api/v1/ledger", headers=bearer).json()
    assert [(one["unit"], one["charges"]) for one in api] == [
        ("device", 14),
        ("example", 1),
        ("row", 6),
    ]


def test_empty_pages_say_what_to_type(empty):
    _, url, tokens, _ = empty
    told = {
        "/": "atoll device token",
        "/devices": "atoll-agent enrol --token",
        "/models": "atoll model publish",
        "/runs": "atoll plan run",
        "/alerts": "No alert is open",
        "/privacy": "Nothing has been charged",
        "/audit": "Nothing has been recorded",
    }
    with signed_in(url, tokens["viewer"]) as client:
        for path, words in told.items():
            answer = client.get(path)
            assert answer.status_code == 200
            assert words in answer.text


def test_what_is_not_there_is_a_page_with_a_remedy(seeded):
    _, url, tokens = seeded
    with signed_in(url, tokens["viewer"]) as client:
        for path in ("/nothing", "/devices/nobody", "/runs/none", "/static/none.js"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert "What to do:" in answer.text
            assert "<script" not in client.get("/devices/<script>").text


def test_a_wrong_token_lets_nobody_in(empty):
    _, url, tokens, _ = empty
    answer = httpx.post(url + "/login", data={"token": "atollop_no"}, headers={"Origin": url})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "unknown or was revoked" in answer.text
    assert tokens["admin"] not in answer.text


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(empty):
    hub, url, tokens, clock = empty
    answer = httpx.post(url + "/login", data={"token": tokens["viewer"]}, headers={"Origin": url})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    secret = answer.cookies["atoll_session"]
    with hub.store.read() as connection:
        kept = connection.execute(select(schema.sessions)).one()
    assert secret not in map(str, kept)

    with signed_in(url, tokens["viewer"]) as client:
        assert client.get("/").status_code == 200
        clock.now += SESSION_SECONDS + 1
        assert client.get("/").status_code == 303


def test_a_login_link_works_once_and_not_for_long(empty):
    hub, url, _, clock = empty
    with hub.store.begin() as connection:
        code, late = (new_login_code(connection, "admin", clock.now) for _ in range(2))
    with httpx.Client(base_url=url) as client:
        answer = client.get("/login", params={"code": code})
        assert answer.headers["refresh"] == "0; url=/"
        assert client.get("/").status_code == 200
    again = httpx.get(url + "/login", params={"code": code})
    assert again.status_code == 401
    assert "set-cookie" not in again.headers
    clock.now += CODE_SECONDS + 1
    assert httpx.get(url + "/login", params={"code": late}).status_code == 401


def test_signing_out_and_being_revoked_end_the_session(empty):
    hub, url, tokens, clock = empty
    with signed_in(url, tokens["viewer"]) as client:
        kept = dict(client.cookies)
        assert client.post("/logout").status_code == 303
        assert httpx.get(url + "/", cookies=kept).status_code == 303
    with signed_in(url, tokens["operator"]) as client:
        with hub.store.begin() as connection:
            auth.revoke(connection, "operator", clock.now)
        assert client.get("/").status_code == 303


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_from_elsewhere_is_refused(seeded, headers):
    hub, url, tokens = seeded
    run = proposed(hub)
    with signed_in(url, tokens["approver"]) as client:
        del client.headers["Origin"]
        answer = client.post(f"/runs/{run}/approve", headers=headers)
        assert answer.status_code == 403
        assert "not sent from this dashboard" in answer.text
    assert proposed(hub) == run


def test_roles_bound_what_forms_do(tmp_path):
    hub = new_hub(tmp_path)
    tokens = seed(hub)
    run = proposed(hub)
    with hub.store.read() as connection:
        alert = connection.execute(
            select(schema.alerts.c.id).where(schema.alerts.c.kind == "drift")
        ).scalar_one()
    with served(hub) as url:
        with signed_in(url, tokens["viewer"]) as client:
            assert "<button" not in client.get(f"/runs/{run}").text.partition("<main")[2]
            assert "Acknowledge" not in client.get("/alerts").text
            for path in (f"/runs/{run}/approve", f"/runs/{run}/cancel"):
                assert client.post(path).status_code == 403
            assert client.post(f"/alerts/{alert}/acknowledge").status_code == 403
        with signed_in(url, tokens["operator"]) as client:
            assert client.post(f"/runs/{run}/approve").status_code == 403
            assert client.post(f"/alerts/{alert}/acknowledge").status_code == 303
            assert "by operator" in client.get("/alerts").text
            assert client.post("/alerts/9999/acknowledge").status_code == 404
        with signed_in(url, tokens["approver"]) as client:
            assert client.post(f"/runs/{run}/approve").status_code == 303
            assert client.post(f"/runs/{run}/approve").status_code == 409
            assert client.post(f"/runs/{run}/cancel").status_code == 303
            audit = client.get("/audit").text
    with hub.store.read() as connection:
        row = connection.execute(select(schema.runs).where(schema.runs.c.id == run)).one()
    assert (row.state, row.approved_by) == ("cancelled", "approver")
    for action in ("run.propose", "run.approve", "run.cancel", "alert.acknowledge"):
        assert action in audit


def lines_until(
    client: httpx.Client, path: str, wanted: str, act, seconds: float = 15
) -> list[str]:
    """Read a stream until ``wanted`` comes; call ``act`` when it is open."""
    seen: list[str] = []
    deadline = time.monotonic() + seconds
    with client.stream("GET", path, timeout=seconds) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if not seen:
                act()
            seen.append(line)
            if line.startswith(wanted):
                return seen
            assert time.monotonic() < deadline
    raise AssertionError(f"the stream ended without {wanted!r}: {seen}")


def test_the_stream_tells_of_a_round_that_another_process_wrote(tmp_path):
    hub = new_hub(tmp_path)
    token = seed(hub)["viewer"]
    run = running(hub, rounds=1)

    def another_round() -> None:
        with hub.store.begin() as connection:
            add_rounds(connection, run, range(2, 3), NOW)

    with served(hub) as url, signed_in(url, token) as client:
        page = client.get(f"/runs/{run}").text
        address = re.search(r"hx-sse:connect=\"([^\"]+)\"", page)
        assert address
        path = address[1].replace("&amp;", "&")
        first = lines_until(client, path, "data: runs", another_round)
        mark = next(line for line in first if line.startswith("id: "))[4:]

        # Whoever saw that mark is told nothing; whoever saw an older one is told at once.
        with client.stream("GET", path, headers={"Last-Event-ID": mark}, timeout=15) as answer:
            assert next(answer.iter_lines()) == ": here"
        lines_until(client, "/events?about=runs&seen=older", "data: runs", lambda: None)


def test_a_server_with_open_streams_stops_within_seconds(tmp_path):
    hub = new_hub(tmp_path)
    token = add_operators(hub)["viewer"]
    ended = threading.Event()

    with ExitStack() as held:
        with served(hub) as url:
            client = held.enter_context(signed_in(url, token))
            opened = threading.Event()

            def listen() -> None:
                with client.stream("GET", "/events?about=runs", timeout=30) as answer:
                    for _line in answer.iter_lines():
                        opened.set()
                ended.set()

            reader = threading.Thread(target=listen, daemon=True)
            reader.start()
            assert opened.wait(10)
            asked = time.monotonic()
        assert time.monotonic() - asked < 2, "the server waited for the stream"
        assert ended.wait(10)
        reader.join(10)


def test_an_altered_audit_log_is_said_to_be_broken(tmp_path):
    hub = new_hub(tmp_path)
    token = seed(hub)["viewer"]
    with hub.store.begin() as connection:
        connection.execute(
            update(schema.audit).where(schema.audit.c.index == 1).values(entry=b"{}")
        )
    with served(hub) as url, signed_in(url, token) as client:
        answer = client.get("/audit")
        assert answer.status_code == 200
        assert "Entry 1 of the audit log is missing or was altered" in answer.text


def words_of(page: str) -> str:
    """Return what a page says, without its tags, in one line."""
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_a_running_runs_page_tells_where_its_rounds_stand(tmp_path):
    hub = new_hub(tmp_path)
    token = seed(hub)["viewer"]
    run = running(hub, rounds=5)
    with served(hub) as url, signed_in(url, token) as client:
        said = words_of(client.get(f"/runs/{run}").text)
    # Five rounds of 7.8, 8.0, 7.6, 7.8, 8.0 s and 0.8 s of evaluating in one; seven to come.
    assert f"round 6 of 12; about {round(7 * (39.2 + 0.8) / 5)} s of training left" in said
    right = words_of(FILTERS["percent"](0.97 - 0.5 * 0.7**3))  # of round 3, the last that asked
    assert f"loss 0.449 accuracy {right} in the last sum 8 of 8 devices ε 12.3" in said
    assert "from devices 15.8 MiB to devices 17.2 MiB" in said


def test_a_lost_round_is_not_one_more_than_planned(tmp_path):
    hub = new_hub(tmp_path)
    token = seed(hub)["viewer"]
    run = running(hub, rounds=13)
    with hub.store.begin() as connection:
        r = schema.rounds.c
        connection.execute(
            update(schema.rounds)
            .where(r.run == run, r.round == 2)
            .values(survivors=[], lost=True, loss=None, accuracy=None, seconds=0.0)
        )
        connection.execute(
            update(schema.runs).where(schema.runs.c.id == run).values(state="gated", stage="gate")
        )
    with served(hub) as url, signed_in(url, token) as client:
        for path in (f"/runs/{run}", "/runs"):
            said = words_of(client.get(path).text)
            assert "12 of 12 rounds, 1 lost" in said
            assert "13 of 12" not in said
        assert "lost: it broke off" in client.get(f"/runs/{run}").text


def test_rounds_from_before_they_were_counted_are_shown_without(tmp_path):
    hub = new_hub(tmp_path)
    token = seed(hub)["viewer"]
    run = running(hub, rounds=3)
    blank = ("bytes_up", "bytes_down", "clip_norm", "drawn", "connected", "accuracy", "evaluated")
    with hub.store.begin() as connection:
        connection.execute(update(schema.rounds).values(dict.fromkeys(blank)))
    with served(hub) as url, signed_in(url, token) as client:
        page = client.get(f"/runs/{run}")
        assert page.status_code == 200
        said = words_of(page.text)
    assert "round 4 of 12" in said
    assert "8 of 8 devices" in said
    assert "from devices –" in said
    assert "Accuracy on held-back" not in said


def test_the_norm_that_adapted_is_shown_with_where_it_began(tmp_path):
    hub = new_hub(tmp_path)
    token = seed(hub)["viewer"]
    run = running(hub, rounds=2)
    with hub.store.begin() as connection:
        plan = hub_plan(connection, run).replace("[privacy]", '[privacy]\nclip = "adaptive"')
        mine = schema.runs.c.id == run
        connection.execute(update(schema.runs).where(mine).values(plan=plan))
        r = schema.rounds.c
        connection.execute(
            update(schema.rounds).where(r.run == run, r.round == 2).values(clip_norm=0.625)
        )
    with served(hub) as url, signed_in(url, token) as client:
        said = words_of(client.get(f"/runs/{run}").text)
    assert "clip 0.625 adapted from 1" in said
    assert "Clipping norm" in said


def hub_plan(connection, run: str) -> str:
    query = select(schema.runs.c.plan).where(schema.runs.c.id == run)
    return connection.execute(query).scalar_one()
