"""Which device a request on the device port comes from, and how much it moved."""

import ssl
import threading
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

from sqlalchemy import update

from atoll.fleet.errors import BadIdentity
from atoll.fleet.identity import Peer, peer_of
from atoll.server import enrolment
from atoll.server.context import Clock
from atoll.server.errors import Forbidden, TooMany, Unauthenticated
from atoll.server.schema import devices
from atoll.server.store import Store

_REMEMBERED: Final = 4096


class Peers:
    """Judges the client certificates of requests, on fresh and on kept-alive connections."""

    def __init__(self, store: Store, ca_pem: bytes, clock: Clock) -> None:
        self._store = store
        self._ca = ca_pem
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Peer] = OrderedDict()

    def admit(self, certificate: bytes | None) -> Peer:
        """Return who shows this DER certificate.

        The certificate is judged anew for each request: it may have been revoked, replaced or
        run out since the handshake. Raises :class:`Unauthenticated` or :class:`Forbidden`.
        """
        if certificate is None:
            raise Unauthenticated(
                "this needs a device certificate", "enrol the device with `atoll-agent enrol`"
            )
        peer = self._peer(certificate)
        with self._store.read() as connection:
            renewed = enrolment.check(connection, peer)
        if renewed:
            with self._store.begin() as connection:
                enrolment.settle_renewal(connection, peer)
        return peer

    def _peer(self, certificate: bytes) -> Peer:
        now = datetime.fromtimestamp(self._clock(), UTC)
        with self._lock:
            known = self._known.get(certificate)
        if known is not None and now <= known.not_after:
            return known
        try:
            peer = peer_of(ssl.DER_cert_to_PEM_cert(certificate).encode(), self._ca, now)
        except BadIdentity as error:
            raise Forbidden(str(error), "enrol again", code="bad-certificate") from error
        with self._lock:
            self._known[certificate] = peer
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return peer


class Moved(NamedTuple):
    """Bytes from and to a device."""

    up: int
    down: int


class Traffic:
    """Counts bytes per device in memory, for :meth:`flush` to add up in the store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moved: dict[str, Moved] = {}

    def add(self, device: str, *, up: int = 0, down: int = 0) -> None:
        """Count."""
        with self._lock:
            before = self._moved.get(device, Moved(0, 0))
            self._moved[device] = Moved(before.up + up, before.down + down)

    def flush(self, store: Store) -> None:
        """Add what was counted since the last time to the devices' rows."""
        with self._lock:
            moved, self._moved = self._moved, {}
        if not moved:
            return
        try:
            self._write(store, moved)
        except BaseException:
            for device, bytes_ in moved.items():
                self.add(device, up=bytes_.up, down=bytes_.down)
            raise

    @staticmethod
    def _write(store: Store, moved: Mapping[str, Moved]) -> None:
        with store.begin() as connection:
            for device, bytes_ in moved.items():
                connection.execute(
                    update(devices)
                    .where(devices.c.id == device)
                    .values(
                        https_up=devices.c.https_up + bytes_.up,
                        https_down=devices.c.https_down + bytes_.down,
                    )
                )


class Attempts:
    """Refuses an address that failed too often: ``limit`` times within ``seconds``."""

    def __init__(self, limit: int, seconds: float, clock: Clock) -> None:
        self._limit = limit
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._failed: OrderedDict[str, list[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raise :class:`TooMany` when ``address`` has to wait."""
        since = self._clock() - self._seconds
        with self._lock:
            recent = [at for at in self._failed.get(address, ()) if at > since]
        if len(recent) >= self._limit:
            raise TooMany(
                "too many failed attempts from this address",
                f"wait {self._seconds:.0f} seconds",
            )

    def failed(self, address: str) -> None:
        """Note a failure; of addresses the latest thousand are remembered."""
        now = self._clock()
        with self._lock:
            kept = [at for at in self._failed.pop(address, []) if at > now - self._seconds]
            self._failed[address] = [*kept, now]
            if len(self._failed) > 1000:
                self._failed.popitem(last=False)
