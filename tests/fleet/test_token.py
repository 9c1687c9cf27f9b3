import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.fleet.errors import BadIdentity
from atoll.fleet.token import PREFIX, EnrolmentToken

TOKEN = EnrolmentToken("https://hub.example:8443", "ab" * 32, "s3cret-s3cret", "dev-1")


@given(
    host=st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z]{2,5})?", fullmatch=True),
    port=st.integers(1, 65535),
    ca=st.binary(min_size=32, max_size=32),
    secret=st.text(min_size=1, max_size=60),
    device=st.none() | st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
)
def test_a_token_survives_being_written_and_read(host, port, ca, secret, device) -> None:
    token = EnrolmentToken(f"https://{host}:{port}", ca.hex(), secret, device)
    assert EnrolmentToken.decode(f"  {token.encode()}\n") == token


@given(st.data())
def test_any_slip_in_copying_is_caught(data) -> None:
    text = TOKEN.encode()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=0x2FF))
    slipped = text[:at] + other + text[at + 1 :]
    if slipped.strip() != text:
        with pytest.raises(BadIdentity):
            EnrolmentToken.decode(slipped)
    with pytest.raises(BadIdentity):
        EnrolmentToken.decode(text[:at])
    with pytest.raises(BadIdentity):
        EnrolmentToken.decode(text[:at] + text[at + 1 :])


@given(st.text() | st.text().map(PREFIX.__add__))
def test_any_other_text_is_refused_in_words(text) -> None:
    with pytest.raises(BadIdentity, match="enrolment token"):
        EnrolmentToken.decode(text)


@pytest.mark.parametrize(
    "change",
    [
        {"url": "http://hub:8443"},
        {"url": "https://"},
        {"url": "https://hub:99999"},
        {"ca_sha256": "ab"},
        {"ca_sha256": "AB" * 32},
        {"ca_sha256": "zz" * 32},
        {"secret": ""},
        {"device": "Dev"},
    ],
)
def test_fields_that_cannot_be_used_make_no_token(change) -> None:
    fields = {"url": TOKEN.url, "ca_sha256": TOKEN.ca_sha256, "secret": "s", "device": None}
    with pytest.raises(BadIdentity):
        EnrolmentToken(**{**fields, **change}).encode()


def test_the_secret_is_not_shown_in_logs() -> None:
    assert TOKEN.secret not in repr(TOKEN)


def test_a_payload_of_the_right_sum_but_wrong_shape_is_refused() -> None:
    import hashlib
    from base64 import urlsafe_b64encode

    for payload in (b"", b"\xc1", msgspec.msgpack.encode(("https://h", b"", "s"))):
        body = hashlib.sha256(payload).digest()[:6] + payload
        with pytest.raises(BadIdentity):
            EnrolmentToken.decode(PREFIX + urlsafe_b64encode(body).decode().rstrip("="))
