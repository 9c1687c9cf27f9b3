import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.fleet.errors import BadDeviceId, BadTopic
from atoll.fleet.topics import (
    DEVICE_ID,
    DEVICE_PUBLISHES,
    DEVICE_READS,
    check_device_id,
    parse,
    topic,
)

LEAVES = (*DEVICE_PUBLISHES, DEVICE_READS)
devices = st.from_regex(DEVICE_ID, fullmatch=True)


@given(devices, st.sampled_from(LEAVES))
def test_a_topic_is_taken_apart_as_it_was_made(device, leaf) -> None:
    assert parse(topic(device, leaf)) == (device, leaf)


@given(st.text(alphabet="atol/v1+#-.*> devicrpsN\n0", max_size=40) | st.text())
def test_only_our_topics_are_taken(name) -> None:
    try:
        device, leaf = parse(name)
    except BadTopic:
        return
    assert topic(device, leaf) == name


@given(st.text())
def test_an_id_is_safe_as_a_topic_level_a_subject_token_and_a_name(text) -> None:
    try:
        check_device_id(text)
    except BadDeviceId:
        return
    assert 0 < len(text) < 64
    assert text.isascii()
    assert not set(text) & set("/+#.*> \t\n\x00$=,_")


@pytest.mark.parametrize("device", ["", "-a", "A", "a" * 64, "a\n", "a/b", "+", "ä", "_hub"])
def test_an_unusable_id_is_refused(device) -> None:
    with pytest.raises(BadDeviceId):
        check_device_id(device)


@pytest.mark.parametrize(
    "name",
    [
        "atoll/v1/a",
        "atoll/v1/a/desired/x",
        "atoll/v2/a/desired",
        "x/atoll/v1/a/desired",
        "atoll/v1/+/status",
        "atoll/v1/a/desired\n",
        "/atoll/v1/a/desired",
    ],
)
def test_a_foreign_topic_is_refused(name) -> None:
    with pytest.raises(BadTopic):
        parse(name)


def test_every_device_can_be_asked_for_at_once() -> None:
    assert topic("+", "status") == "atoll/v1/+/status"
