"""The pages of the dashboard: their addresses, what they read, and what changes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection
from starlette.requests import Request

from atoll.fleet.bundle import CARD
from atoll.server import web_views
from atoll.server.context import HubContext
from atoll.server.events import Subject
from atoll.server.watch_rules import Rules
from atoll.server.web_devices import device, devices
from atoll.server.web_privacy import privacy, summary
from atoll.server.web_runs import run, runs

TABS: Final = (
    ("overview", "/", "Overview"),
    ("devices", "/devices", "Devices"),
    ("models", "/models", "Models"),
    ("runs", "/runs", "Runs"),
    ("alerts", "/alerts", "Alerts"),
    ("privacy", "/privacy", "Privacy"),
    ("audit", "/audit", "Audit"),
)

Load = Callable[[Connection, Request], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its tab, its address, what it reads, and the subjects that change it."""

    tab: str
    path: str
    title: str
    template: str
    subjects: Sequence[Subject]
    load: Load


def pages(hub: HubContext, rules: Rules) -> Sequence[Page]:
    """Return the pages of a hub."""
    silent = hub.settings.offline_seconds

    def overview(connection: Connection, _: Request) -> dict[str, Any]:
        view = web_views.overview(connection, hub.clock(), silent)
        return view | {"privacy": summary(connection)}

    def one_device(connection: Connection, request: Request) -> dict[str, Any]:
        name = request.path_params["name"]
        return device(connection, name, hub.clock(), silent, rules) | {"title": name}

    def one_run(connection: Connection, request: Request) -> dict[str, Any]:
        view = run(connection, request.path_params["name"])
        return view | {"title": f"Run of {view['row']['name']}"}

    def card(run_id: str) -> str:
        path = hub.settings.candidates / run_id / CARD
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    everything: Sequence[Subject] = ("devices", "runs", "models", "alerts", "drift")
    about_device: Sequence[Subject] = ("devices", "alerts", "drift")
    return (
        Page("overview", "/", "Overview", "overview.html", everything, overview),
        Page(
            "devices",
            "/devices",
            "Devices",
            "devices.html",
            about_device,
            lambda c, _: devices(c, hub.clock(), silent),
        ),
        Page("devices", "/devices/{name}", "", "device.html", about_device, one_device),
        Page(
            "models",
            "/models",
            "Models",
            "models.html",
            ("models", "devices", "runs", "alerts"),
            lambda c, _: web_views.models(c, hub.clock(), silent, card),
        ),
        Page("runs", "/runs", "Runs", "runs.html", ("runs", "alerts"), lambda c, _: runs(c)),
        Page("runs", "/runs/{name}", "", "run.html", ("runs", "alerts"), one_run),
        Page(
            "alerts",
            "/alerts",
            "Alerts",
            "alerts.html",
            ("alerts",),
            lambda c, _: web_views.alerts(c),
        ),
        Page(
            "privacy",
            "/privacy",
            "Privacy",
            "privacy.html",
            ("runs", "alerts"),
            lambda c, _: privacy(c),
        ),
        Page(
            "audit",
            "/audit",
            "Audit",
            "audit.html",
            ("audit", "alerts"),
            lambda c, _: web_views.audit(c),
        ),
    )
