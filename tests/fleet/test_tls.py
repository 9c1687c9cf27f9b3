"""Certificates in a real TLS handshake, as strict as OpenSSL can be, over memory buffers."""

import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest

from atoll.fleet.files import write_atomic
from atoll.fleet.identity import HUB_SERVICE, Authority, Identity

NOW = datetime.now(UTC)  # OpenSSL has no other clock


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> dict[str, object]:
    """Shake hands and return the client's certificate as the server sees it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=name),
    ]
    for _ in range(10):
        for end in tuple(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
            if end.server_side:
                return dict(end.getpeercert() or {})
    raise AssertionError("handshake did not end")


def _context(
    purpose: ssl.Purpose, directory: Path, ca: bytes, key: bytes, cert: bytes
) -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cadata=ca.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.verify_mode = ssl.CERT_REQUIRED
    write_atomic(directory / "pair.pem", key + cert)
    context.load_cert_chain(directory / "pair.pem")
    return context


@pytest.fixture
def authority() -> Authority:
    return Authority.create("Atoll test", NOW)


@pytest.fixture
def server(authority, tmp_path) -> ssl.SSLContext:
    pair = authority.issue_server(["localhost"], ["127.0.0.1"], NOW)
    return _context(ssl.Purpose.CLIENT_AUTH, tmp_path, authority.cert_pem, *pair)


def _device(authority: Authority, tmp_path: Path, issuer: Authority) -> ssl.SSLContext:
    identity = Identity.new()
    identity.save(tmp_path)
    cert = issuer.issue_device(identity.csr("dev-1"), "dev-1", NOW)
    key = (tmp_path / "key.pem").read_bytes()
    return _context(ssl.Purpose.SERVER_AUTH, tmp_path, authority.cert_pem, key, cert)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_device_and_a_server_shake_hands(authority, server, tmp_path, name) -> None:
    seen = _handshake(server, _device(authority, tmp_path, authority), name)
    assert seen["subject"] == ((("commonName", "dev-1"),),)


def test_a_service_of_the_hub_is_seen_under_its_name(authority, server, tmp_path) -> None:
    pair = authority.issue_service(HUB_SERVICE, NOW)
    client = _context(ssl.Purpose.SERVER_AUTH, tmp_path, authority.cert_pem, *pair)
    assert _handshake(server, client, "localhost")["subject"] == ((("commonName", "_hub"),),)


def test_a_server_under_another_name_is_refused(authority, server, tmp_path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        _handshake(server, _device(authority, tmp_path, authority), "example.org")


def test_a_foreign_device_is_refused(authority, server, tmp_path) -> None:
    stranger = _device(authority, tmp_path, Authority.create("Atoll test", NOW))
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server, stranger, "localhost")


def test_a_device_cannot_pose_as_a_server(authority, tmp_path) -> None:
    identity = Identity.new()
    identity.save(tmp_path)
    cert = authority.issue_device(identity.csr("localhost"), "localhost", NOW)
    key = (tmp_path / "key.pem").read_bytes()
    posing = _context(ssl.Purpose.CLIENT_AUTH, tmp_path, authority.cert_pem, key, cert)
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        _handshake(posing, _device(authority, tmp_path, authority), "localhost")
