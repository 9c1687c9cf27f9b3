"""The dashboard in a real browser: pages load clean, drift is seen, a click approves."""

import json
import sys
from pathlib import Path

import pytest
from sqlalchemy import select, update

from atoll.server import schema
from atoll.server.sessions import new_login_code

sys.path.insert(0, str(Path(__file__).parent))

from browser import Tab, browser, chromium  # after the path
from dashboard_fleet import (  # after the path
    DRIFTED,
    NOW,
    RELEASED_RUN,
    add_rounds,
    new_hub,
    running,
    seed,
    served,
)

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="needs chromium (apt-get install chromium)"
)

LIVE = "document.documentElement.dataset.stream === 'live'"

CONTRAST = """
(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const style = getComputedStyle(e);
    if (!own || !e.checkVisibility() || e.closest('svg, .unseen')) continue;
    const [a, b] = [light(parse(style.color)), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(`${e.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return bad;
})()
"""
"""Every visible text whose contrast is below 4.5:1 (WCAG 2.2, 1.4.3)."""


@pytest.fixture
def hub(tmp_path):
    hub = new_hub(tmp_path)
    seed(hub)
    return hub


@pytest.fixture
def url(hub):
    with served(hub) as url:
        yield url


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as tab:
        yield tab


@pytest.fixture
def tab(chrome: Tab, hub, url) -> Tab:
    """A page signed in as an admin by a one-time link."""
    chrome.look(1280, 900)
    with hub.store.begin() as connection:
        code = new_login_code(connection, "admin", NOW)
    chrome.open(f"{url}/login?code={code}")
    chrome.until(f"document.querySelector('.loop') && {LIVE}")
    chrome.complaints.clear()
    return chrome


def proposed(hub) -> str:
    with hub.store.read() as connection:
        query = select(schema.runs.c.id).where(schema.runs.c.state == "proposed")
        return connection.execute(query).scalar_one()


def test_every_page_loads_without_a_complaint(tab, hub, url):
    pages = [
        "/",
        "/devices",
        f"/devices/{DRIFTED}",
        "/models",
        "/runs",
        f"/runs/{RELEASED_RUN}",
        f"/runs/{proposed(hub)}",
        "/alerts",
        "/privacy",
        "/audit",
    ]
    for path in pages:
        for width, scheme in ((1280, "light"), (420, "dark")):
            tab.look(width, 900, scheme)
            tab.open(url + path)
            tab.until(LIVE)
            assert tab.text("h1").strip(), path
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), path
            assert tab.run(CONTRAST) == [], path
            plots = tab.run("document.querySelectorAll('.plot').length")
            assert tab.run("document.querySelectorAll('.plot canvas').length") == plots
    assert tab.complaints == []


def test_the_drift_alert_is_seen_wherever_one_looks(tab, url):
    assert f"{DRIFTED} drifts" in tab.text("main")
    assert "drifted" in tab.text(".loop li:last-child")
    assert tab.text(".tabs .count").startswith("2")
    tab.click(f"a[href='/devices/{DRIFTED}']")
    tab.until("document.querySelectorAll('.histogram.drifted').length >= 2")
    assert "ax:mean" in tab.text("#drift")


def test_a_click_and_a_confirmation_approve_a_proposed_run(tab, hub, url):
    run = proposed(hub)
    tab.open(url + "/runs")
    tab.until(LIVE)
    tab.click(f"[data-opens='approve-{run}']")
    tab.until(f"document.getElementById('approve-{run}').open")
    tab.click(f"#approve-{run} [data-closes]")
    tab.until(f"!document.getElementById('approve-{run}').open")
    assert proposed(hub) == run

    tab.click(f"[data-opens='approve-{run}']")
    tab.until(f"document.getElementById('approve-{run}').open")
    tab.click(f"#approve-{run} button[type=submit]")

    tab.until(f"location.pathname === '/runs/{run}' && document.readyState === 'complete'")
    assert "approved" in tab.text("main .head")
    with hub.store.read() as connection:
        row = connection.execute(select(schema.runs).where(schema.runs.c.id == run)).one()
    assert (row.state, row.approved_by) == ("approved", "admin")
    assert tab.complaints == []


def test_a_run_is_rejected_with_the_keyboard_alone(tab, hub, url):
    run = proposed(hub)
    tab.open(f"{url}/runs/{run}")
    tab.until(LIVE)
    tab.run(f"document.querySelector(\"[data-opens='reject-{run}']\").focus()")
    tab.press("Enter", 13)
    tab.until(f"document.getElementById('reject-{run}').open")
    assert tab.run("document.activeElement.closest('dialog') !== null")
    tab.press("Enter", 13)
    tab.until("document.querySelector('main .head')?.innerText.includes('cancelled')")


def test_a_new_round_appears_without_a_reload(tab, hub, url):
    run = running(hub, rounds=3)
    tab.open(f"{url}/runs/{run}")
    tab.until(f"{LIVE} && document.querySelector('.plot canvas')")
    tab.run("window.__same = true; document.querySelector('details').open = true")
    assert "round 4 of 12" in tab.text("main")

    with hub.store.begin() as connection:  # as the run's own process does: no hint on the bus
        add_rounds(connection, run, range(4, 6), NOW)

    tab.until("document.querySelector('main').innerText.includes('round 6 of 12')")
    assert tab.run("window.__same") is True
    assert tab.run("document.querySelector('details').open") is True
    points = "JSON.parse(document.querySelector('.plot').dataset.plot).x.length"
    assert tab.run(points) == 5
    assert tab.run("document.querySelectorAll('.plot canvas').length") == 5

    with hub.store.begin() as connection:  # an accuracy comes after its round
        r = schema.rounds.c
        connection.execute(
            update(schema.rounds).where(r.run == run, r.round == 5).values(accuracy=0.625)
        )
    tab.until("document.querySelector('#progress').innerText.includes('62.5')")
    assert tab.complaints == []


def test_an_update_leaves_an_open_question_alone(tab, hub, url):
    run = proposed(hub)
    tab.open(url + "/")
    tab.until(LIVE)
    tab.click(f"[data-opens='approve-{run}']")
    tab.until(f"document.getElementById('approve-{run}').open")

    with hub.store.begin() as connection:
        d = schema.devices.c
        connection.execute(
            update(schema.devices).where(d.id == "watch-10").values(online=True, last_seen=NOW)
        )
    hub.bus.publish("devices")

    tab.until("document.querySelector('.tile dd').innerText.startsWith('11')")
    assert tab.run(f"document.getElementById('approve-{run}').open") is True
    tab.click(f"#approve-{run} button[type=submit]")
    tab.until(f"location.pathname === '/runs/{run}'")


def test_an_alert_is_acknowledged_and_leaves_the_count(tab, hub, url):
    tab.open(url + "/alerts")
    tab.until(LIVE)
    with hub.store.read() as connection:
        drift = select(schema.alerts.c.id).where(schema.alerts.c.kind == "drift")
        alert = connection.execute(drift).scalar_one()
    tab.click(f"#alert-{alert} button")
    tab.until(f"document.querySelector('#alert-{alert}').innerText.includes('acknowledged')")
    assert tab.text(".tabs .count").startswith("1")


def test_a_lost_stream_is_said_and_found_again(chrome, tmp_path):
    hub = new_hub(tmp_path)
    seed(hub)
    with hub.store.begin() as connection:
        code = new_login_code(connection, "admin", NOW)
    with served(hub) as url:
        chrome.open(f"{url}/login?code={code}")
        chrome.until(f"document.querySelector('.loop') && {LIVE}")
        port = int(url.rpartition(":")[2])
    chrome.until("document.querySelector('.live').innerText === 'reconnecting'")
    with served(hub, port):
        chrome.until(LIVE)
    chrome.open("about:blank")
    chrome.complaints.clear()


def test_who_is_not_signed_in_sees_the_login_page(chrome, url):
    chrome.call("Network.clearBrowserCookies")
    chrome.open(url + "/privacy")
    assert chrome.run("location.pathname") == "/login"
    assert chrome.run("document.activeElement.id") == "token"
    wrong = json.dumps("atollop_wrong")
    chrome.run(f"document.getElementById('token').value = {wrong}")
    chrome.click("button[type=submit]")
    chrome.until("document.querySelector('[role=alert]')?.innerText.includes('revoked')")
    chrome.complaints.clear()  # the browser notes the 401
