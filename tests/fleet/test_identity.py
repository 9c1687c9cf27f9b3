import ssl
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.fleet.errors import BadDeviceId, BadIdentity
from atoll.fleet.identity import (
    BACKDATE,
    HUB_SERVICE,
    Authority,
    Identity,
    fingerprint,
    load_key,
    peer_of,
    read_certificate,
    renew_due,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
AUTHORITY = Authority.create("Atoll test", NOW)
IDENTITY = Identity.new()
CSR = IDENTITY.csr("dev-1")
CERT = AUTHORITY.issue_device(IDENTITY.csr("dev-1"), "dev-1", NOW)


def _csr(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    *names: x509.GeneralName,
    subject: str = "dev-1",
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _names(cert: x509.Certificate) -> list[str]:
    san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in san]


def test_a_certificate_proves_the_device_and_both_its_keys() -> None:
    peer = peer_of(CERT, AUTHORITY.cert_pem, NOW)
    assert peer.device == "dev-1"
    assert peer.key == IDENTITY.key.public_key()
    assert peer.seal == IDENTITY.seal.public_key()
    assert peer.not_after == NOW + timedelta(days=30)
    assert int(peer.serial, 16) == read_certificate(CERT).serial_number


def test_the_subject_is_exactly_the_device() -> None:
    assert read_certificate(CERT).subject.rfc4514_string() == "CN=dev-1"


def test_nothing_of_a_request_is_believed_but_its_keys() -> None:
    seal = next(
        name
        for name in x509.load_pem_x509_csr(IDENTITY.csr("x"))
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    csr = _csr(
        IDENTITY.key, seal, x509.DNSName("CN=dev-2"), x509.RFC822Name("dev-2@x"), subject="dev-2"
    )
    cert = read_certificate(AUTHORITY.issue_device(csr, "dev-1", NOW))
    assert cert.subject.rfc4514_string() == "CN=dev-1"
    assert _names(cert) == [seal.value]


@pytest.mark.parametrize(
    "csr",
    [
        b"",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        CERT,
        _csr(IDENTITY.key),
        _csr(IDENTITY.key, x509.DNSName("dev-1")),
        _csr(IDENTITY.key, x509.UniformResourceIdentifier("urn:atoll:x25519:AAAA")),
        _csr(
            IDENTITY.key,
            *[x509.UniformResourceIdentifier("urn:atoll:x25519:" + c * 43) for c in "AB"],
        ),
        _csr(
            ec.generate_private_key(ec.SECP256R1()),
            x509.UniformResourceIdentifier("urn:atoll:x25519:" + "A" * 43),
        ),
        _csr(
            rsa.generate_private_key(65537, 2048),
            x509.UniformResourceIdentifier("urn:atoll:x25519:" + "A" * 43),
        ),
    ],
    ids=[
        "empty",
        "no-der",
        "certificate",
        "no-seal",
        "other-name",
        "short-seal",
        "two-seals",
        "p256",
        "rsa",
    ],
)
def test_an_unusable_request_is_refused(csr: bytes) -> None:
    with pytest.raises(BadIdentity):
        AUTHORITY.issue_device(csr, "dev-1", NOW)


@settings(max_examples=150)
@given(st.data())
def test_a_request_with_any_bit_flipped_is_refused(data: st.DataObject) -> None:
    der = bytearray(x509.load_pem_x509_csr(CSR).public_bytes(serialization.Encoding.DER))
    bit = data.draw(st.integers(0, len(der) * 8 - 1))
    der[bit // 8] ^= 1 << bit % 8
    pem = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    with pytest.raises(BadIdentity):
        AUTHORITY.issue_device(pem.encode(), "dev-1", NOW)


def test_a_certificate_is_issued_to_no_unusable_device_id() -> None:
    with pytest.raises(BadDeviceId):
        AUTHORITY.issue_device(IDENTITY.csr("dev-1"), "_hub", NOW)


def test_a_foreign_certificate_is_refused_even_under_the_same_name() -> None:
    other = Authority.create("Atoll test", NOW)
    with pytest.raises(BadIdentity, match="not a device certificate of this hub"):
        peer_of(other.issue_device(IDENTITY.csr("dev-1"), "dev-1", NOW), AUTHORITY.cert_pem, NOW)


@pytest.mark.parametrize("offset", [timedelta(days=31), -timedelta(days=2)])
def test_a_certificate_is_refused_outside_its_life(offset: timedelta) -> None:
    with pytest.raises(BadIdentity, match="check the clock"):
        peer_of(CERT, AUTHORITY.cert_pem, NOW + offset)


def test_a_clock_a_day_behind_accepts_a_new_certificate() -> None:
    assert peer_of(CERT, AUTHORITY.cert_pem, NOW - BACKDATE + timedelta(minutes=1))


def test_neither_server_nor_service_nor_authority_passes_for_a_device() -> None:
    _, server = AUTHORITY.issue_server(["dev-1"], ["127.0.0.1"], NOW)
    _, service = AUTHORITY.issue_service(HUB_SERVICE, NOW)
    for cert in (server, service, AUTHORITY.cert_pem):
        with pytest.raises(BadIdentity):
            peer_of(cert, AUTHORITY.cert_pem, NOW)


def test_a_service_cannot_take_a_name_that_a_device_may_have() -> None:
    with pytest.raises(BadIdentity, match="must be '_'"):
        AUTHORITY.issue_service("dev-1", NOW)


def test_a_server_name_that_fits_no_certificate_is_refused() -> None:
    with pytest.raises(BadIdentity, match="cannot name a server"):
        AUTHORITY.issue_server(["hub"], ["not-an-address"], NOW)


def test_renewal_is_due_at_two_thirds_of_the_life() -> None:
    life = timedelta(days=30)
    assert not renew_due(CERT, NOW)
    assert not renew_due(CERT, NOW + life * 0.66)
    assert renew_due(CERT, NOW + life * 0.67)
    assert renew_due(CERT, NOW + 2 * life)


def test_no_certificate_outlives_the_authority() -> None:
    late = AUTHORITY.cert.not_valid_after_utc - timedelta(days=1)
    cert = read_certificate(AUTHORITY.issue_device(IDENTITY.csr("dev-1"), "dev-1", late))
    assert cert.not_valid_after_utc == AUTHORITY.cert.not_valid_after_utc


def test_serial_numbers_do_not_repeat() -> None:
    certs = [AUTHORITY.issue_device(IDENTITY.csr("dev-1"), "dev-1", NOW) for _ in range(20)]
    assert len({read_certificate(cert).serial_number for cert in certs}) == len(certs)


def test_private_keys_are_stored_for_the_owner_alone(tmp_path) -> None:
    IDENTITY.save(tmp_path / "identity")
    AUTHORITY.save(tmp_path / "ca")
    for path in ("identity/key.pem", "identity/seal.pem", "ca/key.pem"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o600
    assert Identity.load(tmp_path / "identity").csr("dev-1")
    loaded = Identity.load(tmp_path / "identity")
    assert loaded.public_pem() == IDENTITY.public_pem()
    assert loaded.seal.private_bytes_raw() == IDENTITY.seal.private_bytes_raw()
    again = Authority.load(tmp_path / "ca")
    assert again.fingerprint == AUTHORITY.fingerprint == fingerprint(AUTHORITY.cert_pem)
    assert peer_of(again.issue_device(IDENTITY.csr("a"), "a", NOW), AUTHORITY.cert_pem, NOW)


def test_keys_that_are_missing_or_swapped_are_refused(tmp_path) -> None:
    with pytest.raises(BadIdentity, match="cannot read"):
        Identity.load(tmp_path)
    IDENTITY.save(tmp_path)
    (tmp_path / "key.pem").rename(tmp_path / "spare.pem")
    (tmp_path / "seal.pem").rename(tmp_path / "key.pem")
    (tmp_path / "spare.pem").rename(tmp_path / "seal.pem")
    with pytest.raises(BadIdentity, match="no P-384 key"):
        load_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").write_bytes((tmp_path / "seal.pem").read_bytes())
    with pytest.raises(BadIdentity, match="no X25519 key"):
        Identity.load(tmp_path)
    (tmp_path / "cert.pem").write_bytes(AUTHORITY.cert_pem)
    with pytest.raises(BadIdentity, match="do not belong together"):
        Authority.load(tmp_path)
    (tmp_path / "key.pem").write_text("nothing")
    with pytest.raises(BadIdentity, match="no private key"):
        load_key(tmp_path / "key.pem")


# The library warns of a serial number that is not positive before it refuses the signature.
@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=150)
@given(st.data())
def test_a_certificate_with_any_bit_flipped_is_refused(data: st.DataObject) -> None:
    der = bytearray(read_certificate(CERT).public_bytes(serialization.Encoding.DER))
    bit = data.draw(st.integers(0, len(der) * 8 - 1))
    der[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadIdentity):
        peer_of(ssl.DER_cert_to_PEM_cert(bytes(der)).encode(), AUTHORITY.cert_pem, NOW)
