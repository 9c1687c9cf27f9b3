"""What the parts of a running hub share, handed to each of them instead of looked up.

Only seams stand here: :class:`Membership` is :class:`atoll.server.membership.Fleet`, and
:class:`Nodes` is :class:`atoll.federation.flower.SuperLinkAdmin`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from atoll.server.events import Bus
from atoll.server.settings import Settings
from atoll.server.store import Store

if TYPE_CHECKING:
    from atoll.federation.flower import RunStatus
    from atoll.fleet.identity import Authority

Clock = Callable[[], float]
"""Returns Unix seconds, UTC."""


class Membership(Protocol):
    """Makes broker and SuperLink agree with the store about who belongs to the fleet."""

    def follow(self) -> None:
        """Do so now; what fails is logged and tried again by the scheduler."""
        ...


class Nodes(Protocol):
    """The SuperLink as the hub sees it; :class:`atoll.federation.flower.SuperLinkAdmin`."""

    def register_node(self, public_key_pem: bytes) -> str:
        """Admit a device's node key; return Flower's node id in decimal."""
        ...

    def unregister_node(self, node_id: str) -> None:
        """Refuse the node from now on."""
        ...

    def start_run(self, app: str, config: Mapping[str, bool | int | float | str]) -> str:
        """Start the ServerApp ``module:attribute``; return Flower's run id in decimal."""
        ...

    def run_status(self, run_id: str) -> "RunStatus":
        """Return how a run stands with Flower."""
        ...

    def stop_run(self, run_id: str) -> None:
        """Stop a run."""
        ...


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the parts listen, once they do: ports are the chosen ones, never 0."""

    device_url: str
    """``https://host:port`` by which devices reach the hub."""
    operator_url: str
    """``http://host:port`` of the API and the dashboard."""
    mqtt_host: str
    mqtt_port: int
    superlink: str
    """``host:port`` of the SuperLink, reachable from the hub alone."""


@dataclass(frozen=True, slots=True)
class HubContext:
    """What the parts of a running hub share."""

    settings: Settings
    store: Store
    authority: "Authority"
    clock: Clock
    membership: Membership
    nodes: Nodes
    bus: Bus
    addresses: Addresses

    @property
    def tuf(self) -> Path:
        """The TUF repository's directory, with ``metadata/`` and ``targets/``."""
        return self.settings.tuf

    def utc(self) -> datetime:
        """Return the clock's time as an aware datetime."""
        return datetime.fromtimestamp(self.clock(), UTC)
