from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.fleet.errors import BadMessage
from atoll.fleet.wire import (
    MAX_MESSAGE_BYTES,
    Birth,
    Body,
    Death,
    Desired,
    Envelope,
    Event,
    Health,
    Reported,
    Window,
    decode,
    encode,
)

numbers = st.integers(0, 2**63 - 1)
times = st.floats(0, 1e12)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
maybe_text = st.none() | texts
models = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
words = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)
releases = st.integers(1, 2**31 - 1)
rows = st.integers(0, 2**31 - 1)

bodies = st.one_of(
    st.builds(
        Birth,
        boot=numbers,
        agent_version=texts,
        serve_url=maybe_text,
        labels=st.dictionaries(texts, texts, max_size=3),
    ),
    st.builds(Death, boot=numbers),
    st.builds(
        Reported,
        desired_version=numbers,
        model=st.none() | models,
        release=st.none() | releases,
        state=st.sampled_from(["idle", "fetching", "checking", "serving", "failed"]),
        error=maybe_text,
    ),
    st.builds(
        Window,
        model=models,
        release=releases,
        start=times,
        end=times,
        rows=rows,
        counts=st.dictionaries(texts, st.binary(max_size=20), max_size=3),
        noise=st.floats(0, 2**29),
    ),
    st.builds(
        Health,
        rss=st.dictionaries(texts, numbers, max_size=3),
        disk_free=numbers,
        outbox_waiting=numbers,
        outbox_dropped=numbers,
        bytes_up=numbers,
        bytes_down=numbers,
        latency_p50=st.none() | times,
        latency_p95=st.none() | times,
        power=st.none() | words,
        network=st.none() | words,
        accelerator=st.none() | words,
        examples=st.none() | numbers,
    ),
    st.builds(
        Event, kind=texts, severity=st.sampled_from(["info", "warning", "error"]), detail=texts
    ),
)
envelopes = st.builds(Envelope, boot=numbers, seq=numbers, at=times, body=bodies)
wishes = st.builds(
    Desired,
    version=numbers,
    model=st.none() | models,
    release=st.none() | releases,
    train=st.booleans(),
)


@given(envelopes | wishes)
def test_a_message_survives_the_wire(message) -> None:
    assert decode(encode(message), type(message)) == message


@given(envelopes, st.dictionaries(st.text("xyz", min_size=1), st.none() | texts, min_size=1))
def test_fields_of_a_later_version_are_ignored(envelope, more) -> None:
    plain = msgspec.msgpack.decode(encode(envelope))
    plain["body"] |= more
    assert decode(msgspec.msgpack.encode({**plain, **more}), Envelope) == envelope


def window(**changes: object) -> bytes:
    body = {"t": "window", "model": "m", "release": 1, "start": 0.0, "end": 1.0, "rows": 2}
    body |= {"counts": {"x": b"\1"}, **changes}
    return msgspec.msgpack.encode({"boot": 1, "seq": 1, "at": 0.0, "body": body})


def test_a_window_from_before_there_was_noise_has_none() -> None:
    assert decode(window(), Envelope).body.noise == 0


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf"), 2.0**30, None, "1"])
def test_noise_that_cannot_be_is_refused(noise) -> None:
    assert decode(window(noise=1.5), Envelope).body.noise == 1.5
    with pytest.raises(BadMessage):
        decode(window(noise=noise), Envelope)


@given(envelopes, st.text().filter(lambda t: t not in TAGS))
def test_a_body_of_an_unknown_kind_is_refused(envelope, tag) -> None:
    plain = msgspec.msgpack.decode(encode(envelope))
    plain["body"]["t"] = tag
    with pytest.raises(BadMessage):
        decode(msgspec.msgpack.encode(plain), Envelope)


TAGS = {kind.__struct_config__.tag for kind in get_args(Body)}


def test_every_kind_of_body_has_its_own_tag() -> None:
    assert {"birth", "death", "reported", "window", "health", "event"} == TAGS


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([Envelope, Desired]))
def test_any_bytes_are_a_message_or_refused(data, kind) -> None:
    try:
        decode(data, kind)
    except BadMessage:
        return


@settings(max_examples=300)
@given(envelopes, st.data())
def test_damaged_bytes_are_a_message_or_refused(envelope, data) -> None:
    encoded = bytearray(encode(envelope))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    for damaged in (bytes(encoded), bytes(encoded[:cut])):
        try:
            decode(damaged, Envelope)
        except BadMessage:
            continue


def test_a_message_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(BadMessage, match="over the limit"):
        decode(b"\x00" * (MAX_MESSAGE_BYTES + 1), Envelope)


def test_deep_nesting_is_refused_and_does_not_overflow() -> None:
    with pytest.raises(BadMessage):
        decode(b"\x91" * 100_000 + b"\x00", Envelope)
    nested = b"\x84\xa4boot\x01\xa3seq\x01\xa1x" + b"\x91" * 100_000 + b"\x00"
    with pytest.raises(BadMessage):
        decode(nested, Envelope)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("at", float("nan")),
        ("at", float("inf")),
        ("seq", 2**63),
        ("boot", -1),
    ],
)
def test_what_no_table_can_hold_is_refused(field, value) -> None:
    good = {"boot": 1, "seq": 1, "at": 0.0, "body": {"t": "death", "boot": 1}}
    assert decode(msgspec.msgpack.encode(good), Envelope)
    with pytest.raises(BadMessage):
        decode(msgspec.msgpack.encode({**good, field: value}), Envelope)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "../etc"),
        ("model", "spar\n"),
        ("release", 0),
        ("release", 2**31),
        ("error", "a\0b"),
        ("state", "unheard-of"),
    ],
)
def test_a_report_that_no_table_can_hold_is_refused(field, value) -> None:
    good = {"t": "reported", "desired_version": 1, "model": "spar", "release": 1, "state": "idle"}
    message = {"boot": 1, "seq": 1, "at": 0.0, "body": good}
    assert decode(msgspec.msgpack.encode(message), Envelope)
    good[field] = value
    with pytest.raises(BadMessage):
        decode(msgspec.msgpack.encode(message), Envelope)
