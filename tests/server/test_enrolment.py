"""Who comes into the fleet, under which name, with which key, and for how long."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import pytest
from sqlalchemy import select, update

from atoll.fleet.authority import Authority
from atoll.fleet.identity import Identity, peer_of
from atoll.fleet.token import EnrolmentToken
from atoll.server import audit, enrolment
from atoll.server.enrolment import BadToken, Enrolled
from atoll.server.errors import BadInput, Conflict, Forbidden, NotFound
from atoll.server.schema import devices, dropped_nodes, enrolment_tokens, twins
from atoll.server.store import Store

DAY = 86_400.0
LIFE = timedelta(days=30)


class Clock(Protocol):
    now: float

    def __call__(self) -> float: ...


Together = Callable[[int, Callable[[int], object]], None]


class Desk:
    """Makes tokens and enrols devices with them, at the clock's time."""

    def __init__(self, store: Store, authority: Authority, clock: Clock) -> None:
        self.store = store
        self.authority = authority
        self.clock = clock

    def token(self, device: str | None = None, life: float = DAY, **labels: str) -> str:
        with self.store.begin() as connection:
            text = enrolment.new_token(
                connection,
                url="https://127.0.0.1:8443",
                ca_sha256=self.authority.fingerprint,
                device=device,
                labels=labels,
                life=life,
                actor="ann",
                now=self.clock(),
            )
        return EnrolmentToken.decode(text).secret

    def enrol(
        self,
        secret: str,
        device: str | None = None,
        identity: Identity | None = None,
        csr: bytes | None = None,
    ) -> Enrolled:
        csr = csr or (identity or Identity.new()).csr("new-device")
        with self.store.begin() as connection:
            return enrolment.enrol(
                connection,
                self.authority,
                secret=secret,
                device=device,
                csr=csr,
                now=self.clock(),
                life=LIFE,
            )

    def row(self, device: str) -> dict[str, Any]:
        with self.store.read() as connection:
            found = connection.execute(select(devices).where(devices.c.id == device)).mappings()
            return dict(found.one())

    def peer(self, certificate: bytes) -> Any:
        from datetime import UTC, datetime

        return peer_of(
            certificate, self.authority.cert_pem, datetime.fromtimestamp(self.clock(), UTC)
        )

    def check(self, certificate: bytes) -> bool:
        with self.store.read() as connection:
            return enrolment.check(connection, self.peer(certificate))

    def revoke(self, device: str) -> None:
        with self.store.begin() as connection:
            enrolment.revoke(connection, device, actor="ann", now=self.clock(), reason="lost")


@pytest.fixture
def desk(store: Store, authority: Authority, clock: Clock) -> Desk:
    return Desk(store, authority, clock)


def test_a_token_lets_one_device_in_with_the_tokens_name_and_labels(desk: Desk) -> None:
    enrolled = desk.enrol(desk.token("watch-1", role="train"))
    assert (enrolled.device, enrolled.labels) == ("watch-1", {"role": "train"})
    assert desk.peer(enrolled.certificate).device == "watch-1"
    assert desk.row("watch-1")["labels"] == {"role": "train"}
    assert desk.check(enrolled.certificate) is False
    with desk.store.read() as connection:
        assert connection.execute(select(twins.c.desired_version)).scalar_one() == 0
        assert [entry["action"] for entry in audit.entries(connection)] == [
            "token.create",
            "device.enrol",
        ]


def test_the_secret_is_not_in_the_database(desk: Desk) -> None:
    secret = desk.token("watch-1")
    with desk.store.read() as connection:
        row = connection.execute(select(enrolment_tokens)).one()
    assert secret not in str(row)


def test_a_token_without_name_takes_the_devices(desk: Desk) -> None:
    assert desk.enrol(desk.token(), "watch-2").device == "watch-2"


def test_tokens_that_let_nobody_in_say_why(desk: Desk, clock: Clock) -> None:
    used, old = desk.token("watch-1"), desk.token("watch-2", life=60)
    desk.enrol(used)
    clock.now += 61
    for secret, code in ((used, "token-used"), (old, "token-expired"), ("x", "token-unknown")):
        with pytest.raises(BadToken) as caught:
            desk.enrol(secret)
        assert caught.value.code == code
        assert "atoll device token" in caught.value.remedy


def test_of_devices_that_show_one_token_at_once_one_gets_in(desk: Desk, together: Together) -> None:
    secret = desk.token()
    let_in: list[str] = []
    refused: list[str] = []

    def knock(number: int) -> None:
        try:
            let_in.append(desk.enrol(secret, f"watch-{number}").device)
        except BadToken as error:
            refused.append(error.code)

    together(6, knock)
    assert len(let_in) == 1
    assert refused == ["token-used"] * 5


def test_a_request_that_is_refused_leaves_the_token_unspent(desk: Desk) -> None:
    secret = desk.token("watch-1")
    for csr in (b"no request", Identity.new().csr("x").replace(b"M", b"N", 1)):
        with pytest.raises(BadInput):
            desk.enrol(secret, csr=csr)
    with pytest.raises(BadInput, match="for 'watch-1' and not for 'watch-9'"):
        desk.enrol(secret, "watch-9")
    assert desk.enrol(secret).device == "watch-1"


def test_a_device_whose_answer_was_lost_gets_its_certificate_again(desk: Desk) -> None:
    secret, identity = desk.token("watch-1"), Identity.new()
    first = desk.enrol(secret, identity=identity)
    again = desk.enrol(secret, identity=identity)
    assert again.certificate == first.certificate
    with pytest.raises(BadToken):
        desk.enrol(secret, identity=Identity.new())


@pytest.mark.parametrize("device", ["Watch", "a/b", "", "x" * 64, "-a"])
def test_names_that_cannot_be_used_are_refused(desk: Desk, device: str) -> None:
    with pytest.raises(BadInput):
        desk.token(device)
    secret = desk.token()
    with pytest.raises(BadInput):
        desk.enrol(secret, device)


def test_no_device_takes_anothers_name_with_an_open_token(desk: Desk) -> None:
    desk.enrol(desk.token("watch-1"))
    with pytest.raises(Conflict) as caught:
        desk.enrol(desk.token(), "watch-1")
    assert caught.value.code == "device-taken"


def test_a_name_rests_until_the_certificate_of_the_old_key_has_run_out(
    desk: Desk, clock: Clock
) -> None:
    desk.enrol(desk.token("watch-1"))
    with desk.store.begin() as connection:
        connection.execute(update(devices).values(node_id="77"))
    secret = desk.token("watch-1", life=60 * DAY)
    with pytest.raises(Conflict, match="valid until"):
        desk.enrol(secret)
    clock.now += 30 * DAY + 1
    renewed = desk.enrol(secret)
    assert desk.check(renewed.certificate) is False
    assert desk.row("watch-1")["node_id"] is None
    with desk.store.read() as connection:
        assert connection.execute(select(dropped_nodes.c.node_id)).scalars().all() == ["77"]


def test_a_device_that_kept_its_key_may_enrol_again_at_any_time(desk: Desk) -> None:
    identity = Identity.new()
    before = desk.enrol(desk.token("watch-1"), identity=identity)
    after = desk.enrol(desk.token("watch-1"), identity=identity)
    assert desk.check(after.certificate) is False
    with pytest.raises(Forbidden) as caught:
        desk.check(before.certificate)
    assert caught.value.code == "superseded"


def test_a_renewal_survives_a_lost_answer_and_ends_the_certificate_before(
    desk: Desk, clock: Clock
) -> None:
    identity = Identity.new()
    old = desk.enrol(desk.token("watch-1"), identity=identity).certificate

    def renew() -> bytes:
        clock.now += DAY
        with desk.store.begin() as connection:
            return enrolment.renew(
                connection,
                desk.authority,
                desk.peer(old),
                csr=identity.csr("watch-1"),
                now=clock(),
                life=LIFE,
            )

    lost, new = renew(), renew()
    assert desk.check(old) is False
    with pytest.raises(Forbidden, match="replaced"):
        desk.check(lost)
    assert desk.check(new) is True
    with desk.store.begin() as connection:
        enrolment.settle_renewal(connection, desk.peer(new))
    assert desk.check(new) is False
    with pytest.raises(Forbidden, match="replaced"):
        desk.check(old)
    assert desk.row("watch-1")["expires_at"] == pytest.approx(clock() + 30 * DAY, abs=1)


def test_a_renewal_keeps_the_keys(desk: Desk) -> None:
    certificate = desk.enrol(desk.token("watch-1")).certificate
    with desk.store.begin() as connection, pytest.raises(BadInput, match="keeps"):
        enrolment.renew(
            connection,
            desk.authority,
            desk.peer(certificate),
            csr=Identity.new().csr("watch-1"),
            now=desk.clock(),
            life=LIFE,
        )


def test_a_revoked_device_is_out_and_stays_out(desk: Desk) -> None:
    identity = Identity.new()
    certificate = desk.enrol(desk.token("watch-1"), identity=identity).certificate
    with desk.store.begin() as connection:
        connection.execute(update(devices).values(node_id="77", online=True))
    desk.revoke("watch-1")
    with pytest.raises(Forbidden) as caught:
        desk.check(certificate)
    assert caught.value.code == "revoked"
    row = desk.row("watch-1")
    assert (row["online"], row["node_id"]) == (False, None)
    with desk.store.read() as connection:
        assert connection.execute(select(dropped_nodes.c.node_id)).scalars().all() == ["77"]
        assert audit.entries(connection, newest_first=True)[0]["facts"] == {"reason": "lost"}
    with pytest.raises(Conflict, match="was revoked"):
        desk.enrol(desk.token("watch-1"), identity=identity)
    with pytest.raises(Conflict, match="already"):
        desk.revoke("watch-1")
    with pytest.raises(NotFound):
        desk.revoke("nobody")


def test_a_certificate_of_the_ca_for_a_device_never_enrolled_is_refused(desk: Desk) -> None:
    from datetime import UTC, datetime

    now = datetime.fromtimestamp(desk.clock(), UTC)
    stray = desk.authority.issue_device(Identity.new().csr("stray"), "stray", now, LIFE)
    with pytest.raises(Forbidden) as caught:
        desk.check(stray)
    assert caught.value.code == "not-enrolled"
