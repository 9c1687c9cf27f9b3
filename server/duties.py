"""What the hub's scheduler does, and how often."""

from atoll.server import desired, repository, rollouts, watch
from atoll.server.context import HubContext
from atoll.server.link import Link
from atoll.server.peers import Traffic
from atoll.server.runs import Runner
from atoll.server.scheduler import Duty, mark_silent


def duties(hub: HubContext, link: Link, traffic: Traffic, runner: Runner) -> list[Duty]:
    """Return the duties of a running hub; each tells the dashboard what it has changed."""

    def publish_desired() -> None:
        if desired.tick(hub.store, link):
            hub.bus.publish("devices")

    def run() -> None:
        if runner.tick():
            hub.bus.publish("runs", "devices", "audit")

    def roll() -> None:
        if rollouts.tick(hub.store, hub.clock()):
            hub.bus.publish("models", "devices", "alerts", "audit")

    def look() -> None:
        seen = watch.tick(hub.store, hub.clock())
        if seen.assessed or seen.closed:
            hub.bus.publish("drift", "alerts", "runs")

    def sign() -> None:
        repository.refresh(hub.tuf, hub.settings.online_keys, hub.utc())

    def silent() -> None:
        if mark_silent(hub.store, hub.clock, hub.settings.offline_seconds):
            hub.bus.publish("devices")

    return [
        Duty("publishing desired states", publish_desired),
        Duty("runs", run, every=1.0),
        Duty("rollouts", roll),
        Duty("watching", look, every=1.0),
        Duty("telling broker and SuperLink of the fleet", hub.membership.follow, every=5.0),
        Duty("counting traffic", lambda: traffic.flush(hub.store), every=2.0),
        Duty("noticing silent devices", silent, every=5.0),
        Duty("keeping the model repository fresh", sign, every=600.0),
    ]
