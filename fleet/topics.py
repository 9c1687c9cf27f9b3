"""MQTT topic names: who speaks about what, under ``atoll/v1/{device}/{leaf}``.

A device may publish the leaves in :data:`DEVICE_PUBLISHES` and read the one in
:data:`DEVICE_READS`, of its own subtree only; brokers enforce it from these same names.
"""

import re
from typing import Final, Literal, NamedTuple

from atoll.fleet.errors import BadDeviceId, BadTopic

Leaf = Literal["desired", "reported", "telemetry", "event", "status"]

ROOT: Final = "atoll/v1"
DEVICE_PUBLISHES: Final[tuple[Leaf, ...]] = ("reported", "telemetry", "event", "status")
DEVICE_READS: Final[Leaf] = "desired"

DEVICE_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Topic(NamedTuple):
    """A parsed topic."""

    device: str
    leaf: Leaf


def check_device_id(device: str) -> str:
    """Return ``device``, or raise :class:`BadDeviceId`.

    Ids become certificate names, topic levels and NATS subject tokens, so they keep to the
    characters that all three allow.
    """
    if not DEVICE_ID.fullmatch(device):
        raise BadDeviceId(device)
    return device


def topic(device: str, leaf: Leaf) -> str:
    """Return the topic of ``leaf`` for ``device``; ``device`` may be ``+`` to match all."""
    if device != "+":
        check_device_id(device)
    return f"{ROOT}/{device}/{leaf}"


def parse(name: str) -> Topic:
    """Take a topic apart; raise :class:`BadTopic` for any that is not ours."""
    prefix, _, rest = name.partition(f"{ROOT}/")
    device, _, leaf = rest.partition("/")
    if prefix or not DEVICE_ID.fullmatch(device) or leaf not in (*DEVICE_PUBLISHES, DEVICE_READS):
        raise BadTopic(name)
    return Topic(device, leaf)
