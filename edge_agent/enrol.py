"""Enrolment: a token in, an identity on the disk out, or nothing at all.

The token names the hub and the fingerprint of its CA. The CA certificate itself is fetched
over a connection that trusts nobody; only when its fingerprint is the token's is anything
sent, over a connection that trusts that CA alone. The keys are made here and stay here. All
files are written into a temporary directory, which is renamed when it is complete.
"""

import contextlib
import shutil
import ssl
import tempfile
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from urllib3.exceptions import InsecureRequestWarning

from atoll.edge_agent.credentials import HUB_FILE, HubFacts, Mqtt
from atoll.edge_agent.errors import (
    AgentError,
    AlreadyEnrolled,
    HubError,
    HubRefused,
    HubUntrusted,
)
from atoll.edge_agent.hub import Hub, not_a_hub
from atoll.edge_agent.paths import Lock, Paths, make, sync_tree, translate
from atoll.fleet.errors import BadIdentity
from atoll.fleet.files import PUBLIC, sync_directory, write_atomic
from atoll.fleet.identity import Identity, fingerprint, peer_of, public_pem
from atoll.fleet.token import EnrolmentToken
from atoll.fleet.topics import check_device_id


class _Enrolment(msgspec.Struct):
    """The hub's answer to an enrolment."""

    device: str
    certificate: str
    ca: str
    mqtt: Mqtt
    root: str
    labels: dict[str, str] = {}
    boot: int = 0


def enrol(token_text: str, paths: Paths, device: str | None, now: datetime) -> HubFacts:
    """Enrol this device; return what the hub told.

    Raises :class:`AgentError` (already enrolled, running, hub unreachable or refusing,
    directory not writable, disk full) or a :class:`atoll.fleet.errors.FleetError` for a token
    or device id that cannot be used. Nothing is left on the disk then.
    """
    token = EnrolmentToken.decode(token_text)
    if device is not None:
        check_device_id(device)
        if token.device is not None and token.device != device:
            raise AgentError(
                f"the token is for device {token.device!r}, not {device!r}: leave out --device, "
                "or ask for another token"
            )
    with Lock(paths), _staging(paths) as staging:
        identity = Identity.new()
        # The certificate's subject is the hub's to choose; a request only proves the keys.
        csr = identity.csr(device or token.device or "new-device")
        answer = _ask(token, device, csr.decode())
        try:
            peer = peer_of(answer.certificate.encode(), answer.ca.encode(), now)
        except BadIdentity as error:
            raise HubUntrusted(
                f"the hub issued a certificate that cannot be used ({error}): check this "
                "device's clock, then ask for a new token"
            ) from error
        if public_pem(peer.key) != identity.public_pem() or peer.device != answer.device:
            raise HubUntrusted("the hub issued a certificate for another key: do not use this hub")
        facts = HubFacts(answer.device, token.url, answer.mqtt, answer.labels, answer.boot)
        identity.save(staging)
        for name, content in (
            ("cert.pem", answer.certificate.encode()),
            ("ca.pem", answer.ca.encode()),
            ("root.json", answer.root.encode()),
            (HUB_FILE, msgspec.json.format(msgspec.json.encode(facts))),
        ):
            write_atomic(staging / name, content, PUBLIC)
        sync_tree(staging)
        _forget(paths)
        staging.rename(paths.identity)
        sync_directory(paths.data)
        return facts


def _forget(paths: Paths) -> None:
    """Remove what an earlier identity left: another hub or name counts from 1 again.

    The device's own examples stay.
    """
    for end in ("", "-wal", "-shm"):
        paths.database.with_name(paths.database.name + end).unlink(missing_ok=True)
    for directory in (paths.tuf, paths.models):
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _staging(paths: Paths) -> Iterator[Path]:
    """Give a directory to fill; whatever is left of it afterwards is removed."""
    if paths.identity.exists():
        try:
            known = msgspec.json.decode((paths.identity / HUB_FILE).read_bytes(), type=HubFacts)
        except (OSError, msgspec.DecodeError):
            raise AlreadyEnrolled(paths.identity, "unknown") from None
        raise AlreadyEnrolled(paths.identity, known.device)
    make(paths.data)
    try:
        staging = Path(tempfile.mkdtemp(prefix=".identity-", dir=paths.data))
    except OSError as error:
        raise translate(error, paths.data) from error
    try:
        yield staging
    except OSError as error:
        raise translate(error, paths.data) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _ask(token: EnrolmentToken, device: str | None, csr: str) -> _Enrolment:
    ca = _authority(token)
    trusting = ssl.create_default_context(cadata=ca)
    hub = Hub(token.url, trusting)
    try:
        answer = hub.ask(
            "/v1/enrol", {"secret": token.secret, "device": device, "csr": csr}, _Enrolment
        )
    except HubRefused as error:
        raise HubError(
            f"{error}; a token works once and for a limited time: ask the hub's operator for a "
            "new one if this one is used or expired"
        ) from error
    if fingerprint(answer.ca.encode()) != token.ca_sha256:
        raise HubUntrusted(_foreign(token.url))
    return answer


def _authority(token: EnrolmentToken) -> str:
    """Return the CA certificate (PEM) whose fingerprint the token carries."""
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE  # what comes is compared with the token's fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)
        ca = Hub(token.url, nobody).call("GET", "/v1/ca")
    try:
        same = fingerprint(ca) == token.ca_sha256
    except BadIdentity as error:
        raise not_a_hub(token.url) from error
    if not same:
        raise HubUntrusted(_foreign(token.url))
    return ca.decode("ascii")


def _foreign(url: str) -> str:
    return (
        f"the hub at {url} is not the one that issued this token (its CA certificate differs): "
        "check the network between, and ask the hub's operator for a new token"
    )
