"""What a device tells of itself that a cohort rule may ask for: power, network, accelerator, data.

Each is one word, or nothing where it cannot be told: a hub takes what is not told for not known,
and a rule that asks for it leaves the device out. Nothing here imports more than psutil, because
the control process is what always runs; so the accelerator is what device nodes show, not what
a runtime would make of it.

    look(root) -> Told                    now, from the files under root ("/" but for tests)
    bucket(rows) -> int                   how many examples there are, coarsely
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import psutil

_UP: Final = 0x1
_REJECT: Final = 0x200
"""Flags of a route (Linux, ``route.h``)."""

NODES: Final = (
    ("dev/nvidia0", "cuda"),
    ("dev/nvhost-gpu", "cuda"),
    ("dev/kfd", "rocm"),
    ("dev/apex_0", "edge-tpu"),
    ("dev/hailo0", "hailo"),
    ("dev/accel/accel0", "npu"),
)
"""Device nodes of accelerators and what each is called; the first that is there counts."""

_KINDS: Final = {"wlan": "wifi", "wwan": "cellular"}
"""Linux's ``DEVTYPE`` of an interface to the words for networks."""
_ETHERNET: Final = "1"
"""``ARPHRD_ETHER``."""


class Told(NamedTuple):
    """``power``: mains, battery. ``network``: wired, wifi, cellular. None: it cannot be told."""

    power: str | None
    network: str | None
    accelerator: str


class Battery(Protocol):
    """What psutil tells of a battery."""

    power_plugged: bool | None


def look(root: Path) -> Told:
    """Return what can be told now."""
    try:
        power = power_of(psutil.sensors_battery())
    except (
        AttributeError,
        OSError,
        ValueError,
        RuntimeError,
    ):  # a system or a sensor it cannot read
        power = None
    return Told(power, network(root), accelerator(root))


def power_of(battery: Battery | None) -> str | None:
    """Return where power comes from; a device without a battery is on the mains."""
    if battery is None:
        return "mains"
    if battery.power_plugged is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def accelerator(root: Path) -> str:
    """Return what kind of accelerator has a device node, or ``none``."""
    return next((word for node, word in NODES if (root / node).exists()), "none")


def network(root: Path) -> str | None:
    """Return over what the default route goes.

    Nothing for an interface that has no hardware of its own (a tunnel, a bridge, a container's):
    what is behind it does not show.
    """
    interface = default_interface(root)
    if interface is None:
        return None
    place = root / "sys/class/net" / interface
    for line in _read(place / "uevent").splitlines():
        name, _, value = line.partition("=")
        if name == "DEVTYPE":
            return _KINDS.get(value)
    if (place / "wireless").exists() or (place / "phy80211").exists():
        return "wifi"
    physical = (place / "device").exists()
    return "wired" if physical and _read(place / "type").strip() == _ETHERNET else None


def default_interface(root: Path) -> str | None:
    """Return the interface of the default route of least metric, by IPv4 or else by IPv6."""
    for routes in (_ipv4(root), _ipv6(root)):
        usable = [(metric, name) for metric, name, flags in routes if _usable(flags)]
        if usable:
            return min(usable)[1]
    return None


def bucket(rows: int) -> int:
    """Return the largest power of two that is at most ``rows``; 0 for none.

    How many examples a device holds tells something of its owner, so no more is told than that.
    """
    return 1 << (rows.bit_length() - 1) if rows > 0 else 0


def _ipv4(root: Path) -> Iterator[tuple[int, str, int]]:
    for line in _read(root / "proc/net/route").splitlines()[1:]:
        match line.split():
            case [name, "00000000", _, flags, _, _, metric, "00000000", *_]:
                yield _number(metric), name, _number(flags, 16)


def _ipv6(root: Path) -> Iterator[tuple[int, str, int]]:
    anywhere = "0" * 32
    for line in _read(root / "proc/net/ipv6_route").splitlines():
        match line.split():
            case [to, "00", _, _, _, metric, _, _, flags, name] if to == anywhere:
                yield _number(metric, 16), name, _number(flags, 16)


def _usable(flags: int) -> bool:
    return bool(flags & _UP) and not flags & _REJECT


def _number(text: str, base: int = 10) -> int:
    """Return a number of the kernel's; 0, which is no usable flag, for what is none."""
    try:
        return int(text, base)
    except ValueError:
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
