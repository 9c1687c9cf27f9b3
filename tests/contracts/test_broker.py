"""What every broker must do, whichever program it is: one suite, run against each of them."""

import signal
from datetime import timedelta
from pathlib import Path

import pytest

from atoll.fleet.identity import Authority, Identity
from atoll.fleet.topics import DEVICE_PUBLISHES, topic
from atoll.fleet.wire import MAX_MESSAGE_BYTES

FENCE = b"after everything before"
TOO_MUCH = [
    "#",
    "+/#",
    "atoll/#",
    "atoll/v1/#",
    "atoll/v1/+/desired",
    "atoll/v1/+/reported",
    "atoll/v1/sandbar/#",
    "atoll/v1/sandbar/desired",
    "atoll/v1/sandbar/telemetry",
    "$SYS/#",
    "$MQTT/#",
    "$JS/#",
]


def listening_hub(world, **options):
    """Return the hub's client, subscribed to all that devices say."""
    hub = world.hub(**options)
    for leaf in DEVICE_PUBLISHES:
        hub.subscribe(topic("+", leaf), 1)
    return hub


def test_a_device_is_heard_on_each_of_its_own_topics(world):
    hub, reef = listening_hub(world), world.device("reef")
    for leaf in DEVICE_PUBLISHES:
        reef.publish(topic("reef", leaf), leaf.encode())
        heard = hub.next()
        assert (heard.topic, heard.payload) == (topic("reef", leaf), leaf.encode())


def test_the_largest_message_of_the_wire_language_passes(world):
    hub, reef = listening_hub(world), world.device("reef")
    reef.publish("atoll/v1/reef/telemetry", b"x" * MAX_MESSAGE_BYTES)
    assert len(hub.next().payload) == MAX_MESSAGE_BYTES


def test_a_device_hears_what_the_hub_desires_of_it(world):
    hub, reef = world.hub(), world.device("reef")
    reef.subscribe("atoll/v1/reef/desired", 0)
    hub.publish("atoll/v1/reef/desired", b"train", retain=True)
    assert reef.next().payload == b"train"


def test_the_desired_state_is_read_again_on_reconnect(world):
    hub, reef = world.hub(), world.device("reef")
    reef.subscribe("atoll/v1/reef/desired", 0)
    reef.drop()
    hub.publish("atoll/v1/reef/desired", b"old", retain=True)
    hub.publish("atoll/v1/reef/desired", b"new", retain=True)
    again = world.device("reef")
    again.subscribe("atoll/v1/reef/desired", 0)
    heard = again.next()
    assert heard.payload == b"new"
    assert heard.retain


def test_the_desired_state_outlives_the_broker(world):
    world.hub().publish("atoll/v1/reef/desired", b"train", retain=True)
    world.restart()
    reef = world.device("reef")
    reef.subscribe("atoll/v1/reef/desired", 0)
    assert reef.next().payload == b"train"


def test_a_device_cannot_speak_for_another(world):
    hub, reef = listening_hub(world), world.device("reef")
    for leaf in DEVICE_PUBLISHES:
        for qos in (0, 1):
            reef.publish(topic("sandbar", leaf), b"forged", qos=qos, retain=True)
        reef.publish(topic("reef", leaf), FENCE)
        assert hub.next().payload == FENCE


@pytest.mark.parametrize("victim", ["reef", "sandbar"])
def test_no_device_can_desire(world, victim):
    world.device("reef").publish(f"atoll/v1/{victim}/desired", b"forged", retain=True)
    listener = world.device(victim)
    listener.subscribe(f"atoll/v1/{victim}/desired", 0)
    world.hub().publish(f"atoll/v1/{victim}/desired", FENCE)
    assert listener.next().payload == FENCE


def test_no_subscription_of_a_device_hears_of_another(world):
    hub, sandbar = world.hub(), world.device("sandbar")
    hub.publish("atoll/v1/sandbar/desired", b"secret", retain=True)
    sandbar.publish("atoll/v1/sandbar/status", b"secret", retain=True)
    reef = world.device("reef")
    for wanted in TOO_MUCH:
        for qos in (0, 1):
            reef.subscribe(wanted, qos)
    reef.subscribe("atoll/v1/reef/desired", 0)
    hub.publish("atoll/v1/sandbar/desired", b"secret", retain=True)
    sandbar.publish("atoll/v1/sandbar/telemetry", b"secret")
    hub.publish("atoll/v1/reef/desired", FENCE)
    heard = reef.next()
    assert (heard.topic, heard.payload) == ("atoll/v1/reef/desired", FENCE)
    assert {name for name, _ in reef.heard()} <= {"atoll/v1/reef/desired"}


@pytest.mark.parametrize("claimed", ["_hub", "CN=_hub", "sandbar", "CN=sandbar"])
def test_the_certificate_names_the_device_whatever_it_claims(world, claimed):
    hub = listening_hub(world)
    reef = world.device("reef", username=claimed)
    reef.publish("atoll/v1/sandbar/reported", b"forged")
    reef.publish("atoll/v1/reef/reported", FENCE)
    assert hub.next().payload == FENCE


def test_a_device_cannot_take_the_hubs_session_by_its_name(world):
    hub = listening_hub(world, clean=False)
    reef = world.connect(credentials(world, "reef"), "_hub", clean=True)
    reef.leave()
    world.device("sandbar").publish("atoll/v1/sandbar/event", FENCE)
    assert hub.next().payload == FENCE
    assert not hub.lost


def test_nobody_gets_in_without_a_certificate(world):
    world.refuses(None, "reef")
    world.refuses(None, "reef", username="CN=_hub")


def test_nobody_gets_in_without_tls(world):
    world.refuses(None, "reef", tls=False)


@pytest.mark.parametrize("name", ["reef", "_hub"])
def test_a_certificate_of_another_authority_is_refused(world, tmp_path: Path, name):
    foreign = Authority.create("Test hub", world.pki.now)  # of the very same name
    if name == "_hub":
        key, certificate = foreign.issue_service(name, world.pki.now)
        (tmp_path / "key.pem").write_bytes(key)
    else:
        identity = Identity.new()
        identity.save(tmp_path)
        certificate = foreign.issue_device(identity.csr(name), name, world.pki.now)
    (tmp_path / "cert.pem").write_bytes(certificate)
    world.refuses(type(world.pki.hub)(tmp_path / "cert.pem", tmp_path / "key.pem"), name)


def test_an_expired_certificate_is_refused(world):
    expired = world.pki.device("lagoon", issued=world.pki.now - timedelta(days=31))
    world.tell("reef", "sandbar", "lagoon")
    world.refuses(expired, "lagoon")


def test_a_certificate_that_is_not_listed_says_and_hears_nothing(world):
    stranger = world.pki.device("stranger")
    hub = listening_hub(world)
    made = world.mqtt(stranger, "stranger")
    world.wait(lambda: made.lost or made.connected is not None, "an answer")
    if made.connected == 0:  # let in, without any rights
        made.subscribe("atoll/v1/stranger/desired", 0)
        hub.publish("atoll/v1/stranger/desired", b"secret", retain=True)
        made.publish("atoll/v1/stranger/reported", b"forged")
        made.subscribe("atoll/v1/stranger/desired", 0)
    world.device("reef").publish("atoll/v1/reef/event", FENCE)
    assert hub.next().payload == FENCE
    assert made.messages.empty()


def test_a_device_that_enrols_is_let_in_and_nobody_else_notices(world):
    hub, reef = listening_hub(world), world.device("reef")
    atoll = world.pki.device("atoll-3")
    world.tell("reef", "sandbar", "atoll-3")

    def comes_in() -> bool:
        made = world.mqtt(atoll, "atoll-3")
        world.wait(lambda: made.lost or made.connected is not None, "an answer")
        if made.connected == 0:
            made.publish("atoll/v1/atoll-3/event", b"hello")
        made.leave()
        return not hub.messages.empty()

    world.wait(comes_in, "letting the new device in")
    assert not reef.lost
    assert not hub.lost


def test_a_revoked_device_is_cut_off_and_kept_out_within_seconds(world):
    hub, reef, sandbar = listening_hub(world), world.device("reef"), world.device("sandbar")
    mine = credentials(world, "reef")
    world.tell("sandbar", revoked=(world.pki.serial(mine),))
    world.wait(lambda: reef.lost, "cutting off the revoked device", deadline=3)
    world.refuses(mine, "reef")
    world.refuses(mine, "another-client-id")
    sandbar.publish("atoll/v1/sandbar/event", FENCE)
    assert hub.next().payload == FENCE
    assert not sandbar.lost
    assert not hub.lost
    world.restart()
    world.refuses(mine, "reef")


def test_each_revocation_counts_however_soon_after_the_last(world):
    devices = {name: world.pki.device(name) for name in ("isle-a", "isle-b", "isle-c")}
    serials = {name: world.pki.serial(mine) for name, mine in devices.items()}
    world.tell(*devices)
    clients = {}
    for name, mine in devices.items():
        clients[name] = world.connect(mine, name)
    for name in sorted(devices):
        gone = [other for other in devices if other <= name]
        world.tell(
            *(other for other in devices if other > name),
            revoked=tuple(serials[other] for other in gone),
        )
    for name, mine in devices.items():
        world.wait(lambda name=name: clients[name].lost, f"cutting off {name}", deadline=3)
        world.refuses(mine, name)


def test_the_last_will_tells_of_a_device_that_went_without_a_word(world):
    hub = listening_hub(world)
    reef = world.device("reef", will=("atoll/v1/reef/status", b"dead"))
    reef.publish("atoll/v1/reef/status", b"alive", retain=True)
    assert hub.next().payload == b"alive"
    reef.drop()
    assert hub.next().payload == b"dead"
    hub.leave()
    later = world.hub()
    later.subscribe("atoll/v1/+/status", 1)
    assert later.next().payload == b"dead"  # retained


def test_a_last_will_cannot_speak_for_another(world):
    hub = listening_hub(world)
    reef = world.mqtt(
        credentials(world, "reef"), "reef", will=("atoll/v1/sandbar/status", b"forged")
    )
    world.wait(lambda: reef.lost or reef.connected is not None, "an answer")
    if reef.connected == 0:
        reef.drop()
    world.device("sandbar").publish("atoll/v1/sandbar/status", FENCE)
    assert hub.next().payload == FENCE


def test_nothing_acknowledged_is_lost_while_hub_and_broker_are_away(world):
    listening_hub(world, clean=False).leave()
    reef = world.device("reef")
    sent = [f"{number}".encode() for number in range(200)]
    for payload in sent:
        reef.client.publish("atoll/v1/reef/telemetry", payload, 1)
    world.wait(lambda: not reef.client.want_write() and acknowledged(reef), "acknowledging")
    reef.leave()
    world.restart()
    hub = world.hub(clean=False)
    assert [hub.next().payload for _ in sent] == sent


def test_what_the_hub_has_not_acknowledged_comes_again(world):
    hub = listening_hub(world, clean=False, manual_ack=True)
    reef = world.device("reef")
    reef.publish("atoll/v1/reef/event", b"committed")
    reef.publish("atoll/v1/reef/event", b"not committed")
    first, second = hub.next(), hub.next()
    assert (first.payload, second.payload) == (b"committed", b"not committed")
    hub.client.ack(first.mid, first.qos)
    hub.subscribe("atoll/v1/+/status", 1)  # when this is answered, what came before it is read
    hub.drop()
    again = world.hub(clean=False, manual_ack=True)
    assert again.next().payload == b"not committed"
    assert again.messages.empty()


def test_a_broker_set_up_from_the_files_we_write_for_it_grants_the_same(external):
    hub, reef, sandbar = (
        listening_hub(external),
        external.device("reef"),
        external.device("sandbar"),
    )
    reef.subscribe("#", 1)
    hub.publish("atoll/v1/sandbar/desired", b"secret", retain=True)
    hub.publish("atoll/v1/reef/desired", FENCE, retain=True)
    assert reef.next().payload == FENCE
    reef.publish("atoll/v1/sandbar/event", b"forged")
    reef.publish("atoll/v1/reef/event", FENCE)
    assert hub.next().payload == FENCE
    external.refuses(None, "reef")
    mine = credentials(external, "reef")
    reef.leave()
    external.broker.write_config(["sandbar"], [external.pki.serial(mine)])
    external.supervisor.signal("broker", signal.SIGHUP)  # its operator's part
    sandbar.publish("atoll/v1/sandbar/event", FENCE)
    assert hub.next().payload == FENCE
    external.refuses(mine, "reef")


def acknowledged(mqtt) -> bool:
    return not mqtt.client._out_messages  # paho tells it nowhere else


def credentials(world, name):
    home = world.pki.directory / "devices" / name
    return type(world.pki.hub)(home / "cert.pem", home / "key.pem")
