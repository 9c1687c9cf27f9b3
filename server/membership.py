"""Tells broker and SuperLink who belongs to the fleet, as often as it takes.

The store says who is enrolled. These functions make the two others agree with it and may be
repeated at will: after an enrolment or a revocation, when a part came back, and by the
scheduler as long as something is left to do. Enrolment so never fails for a part that is down.
"""

import logging
import threading
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import delete, select, update

from atoll.fleet.identity import public_pem, read_certificate
from atoll.server.broker import Broker
from atoll.server.context import Clock, Nodes
from atoll.server.schema import devices, dropped_nodes
from atoll.server.store import Store

log = logging.getLogger(__name__)


class Fleet:
    """Keeps broker and SuperLink in step with the store.

    ``broker_pid`` returns the process id of our broker while it runs. ``refused`` are the
    errors by which the SuperLink says no or does not answer; they are logged and tried again.
    """

    def __init__(
        self,
        store: Store,
        broker: Broker,
        broker_pid: Callable[[], int | None],
        nodes: Nodes,
        clock: Clock,
        refused: type[Exception] | tuple[type[Exception], ...],
    ) -> None:
        self._store = store
        self._broker = broker
        self._broker_pid = broker_pid
        self._nodes = nodes
        self._clock = clock
        self._refused = refused
        self._broker_lock = threading.Lock()
        self._nodes_lock = threading.Lock()
        self._told: tuple[frozenset[str], frozenset[str]] | None = None

    def follow(self) -> None:
        """Make both agree with the store; whatever fails is logged, for the next time."""
        try:
            self.tell_broker()
        except OSError as error:
            log.error("cannot write the broker's configuration: %s", error)  # noqa: TRY400  the error says it all
        self.tell_superlink()

    def tell_broker(self) -> None:
        """List the enrolled devices to the broker, if the list has changed.

        Raises :class:`OSError` when the configuration cannot be written.
        """
        with self._broker_lock:
            with self._store.read() as connection:
                rows = connection.execute(
                    select(
                        devices.c.id,
                        devices.c.serial,
                        devices.c.previous_serial,
                        devices.c.revoked_at,
                    )
                ).all()
            members = frozenset(row.id for row in rows if row.revoked_at is None)
            revoked = frozenset(
                serial
                for row in rows
                if row.revoked_at is not None
                for serial in (row.serial, row.previous_serial)
                if serial is not None
            )
            if (members, revoked) != self._told:
                self._broker.write_config(members, revoked)
                self._broker.reload(self._broker_pid())
                self._told = (members, revoked)

    def tell_superlink(self) -> None:
        """Register the node keys that are not, and unregister those of dropped devices."""
        with self._nodes_lock:
            with self._store.read() as connection:
                dropped = connection.execute(select(dropped_nodes.c.node_id)).scalars().all()
                new = connection.execute(
                    select(devices.c.id, devices.c.certificate).where(
                        devices.c.node_id.is_(None), devices.c.revoked_at.is_(None)
                    )
                ).all()
            for node in dropped:
                self._drop(node)
            for device, certificate in new:
                self._register(device, certificate)

    def forget_nodes(self) -> None:
        """Note that the SuperLink has started anew and knows no node any more."""
        with self._nodes_lock, self._store.begin() as connection:
            connection.execute(update(devices).values(node_id=None))
            connection.execute(delete(dropped_nodes))

    def _drop(self, node: str) -> None:
        try:
            self._nodes.unregister_node(node)
        except self._refused as error:
            log.warning("node %s is not unregistered yet: %s", node, error)
            return
        with self._store.begin() as connection:
            connection.execute(delete(dropped_nodes).where(dropped_nodes.c.node_id == node))

    def _register(self, device: str, certificate: str) -> None:
        key = read_certificate(certificate.encode()).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError(f"the certificate of {device!r} holds no EC key")
        try:
            node = self._nodes.register_node(public_pem(key))
        except self._refused as error:
            log.warning("device %s is not registered for training yet: %s", device, error)
            return
        with self._store.begin() as connection:
            kept = connection.execute(
                update(devices)
                .where(
                    devices.c.id == device,
                    devices.c.certificate == certificate,
                    devices.c.revoked_at.is_(None),
                )
                .values(node_id=node)
            )
            if kept.rowcount == 0:  # revoked or replaced meanwhile
                connection.execute(
                    dropped_nodes.insert().values(node_id=node, device=device, at=self._clock())
                )
