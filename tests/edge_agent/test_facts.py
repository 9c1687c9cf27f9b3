"""What a device tells of itself, read from files as Linux writes them."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.edge_agent import facts

ROUTES = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
LINE = "{}\t{}\t0101A8C0\t{}\t0\t0\t{}\t{}\t0\t0\t0\n"


def route(name, to="00000000", flags="0003", metric=100, mask="00000000"):
    return LINE.format(name, to, flags, metric, mask)


def ipv6(name, to="0" * 32, prefix="00", metric="00000400", flags="00000003"):
    nothing = "0" * 32
    return f"{to} {prefix} {nothing} 00 {nothing} {metric} 00000001 00000000 {flags} {name}\n"


class Machine:
    """Files of a made-up machine."""

    def __init__(self, root):
        self.root = root

    def routes(self, *lines, six=()):
        self.write("proc/net/route", ROUTES + "".join(lines))
        self.write("proc/net/ipv6_route", "".join(six))
        return self

    def interface(self, name, *, kind="", physical=True, type_="1", holds=()):
        place = f"sys/class/net/{name}"
        self.write(f"{place}/uevent", (f"DEVTYPE={kind}\n" if kind else "") + f"INTERFACE={name}\n")
        self.write(f"{place}/type", f"{type_}\n")
        for folder in (*holds, *(["device"] if physical else [])):
            (self.root / place / folder).mkdir()
        return self

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("name", "how", "word"),
    [
        ("enp3s0", {}, "wired"),
        ("wlan0", {"kind": "wlan"}, "wifi"),
        ("wlp2s0", {"holds": ["phy80211"]}, "wifi"),
        ("ath0", {"holds": ["wireless"]}, "wifi"),
        ("wwan0", {"kind": "wwan", "type_": "65534"}, "cellular"),
        ("br0", {"kind": "bridge", "physical": False}, None),
        ("tun0", {"physical": False, "type_": "65534"}, None),
        ("eth0", {"physical": False}, None),  # a container's end of a pair
        ("can0", {"type_": "280"}, None),
    ],
)
def test_the_network_is_that_of_the_default_routes_interface(machine, name, how, word) -> None:
    machine.routes(route("other0", metric=600), route(name)).interface(name, **how)
    machine.interface("other0", kind="wlan" if word != "wifi" else "")
    assert facts.network(machine.root) == word


def test_only_a_default_route_that_is_up_and_leads_somewhere_counts(machine) -> None:
    machine.routes(
        route("down0", flags="0002", metric=1),
        route("reject0", flags="0203", metric=2),
        route("lan0", to="0001A8C0", mask="00FFFFFF", metric=3),
        route("up0", metric=900),
        route("up1", metric=901),
    )
    assert facts.default_interface(machine.root) == "up0"


def test_without_ipv4_the_route_by_ipv6_counts(machine) -> None:
    six = [
        ipv6("lo", flags="00200200", metric="ffffffff"),
        ipv6("lan0", to="fe80" + "0" * 28, prefix="40"),
        ipv6("wlan0", metric="00000400"),
        ipv6("eth0", metric="00000064"),
    ]
    machine.routes(six=six)
    assert facts.default_interface(machine.root) == "eth0"
    machine.routes(route("wwan0"), six=six)
    assert facts.default_interface(machine.root) == "wwan0"


def test_a_machine_that_tells_nothing_has_no_network_and_no_accelerator(tmp_path) -> None:
    assert facts.network(tmp_path) is None
    assert facts.accelerator(tmp_path) == "none"


@pytest.mark.parametrize(("node", "word"), facts.NODES)
def test_an_accelerator_is_known_by_its_device_node(machine, node, word) -> None:
    machine.write(node, "")
    assert facts.accelerator(machine.root) == word


@pytest.mark.parametrize(
    ("battery", "word"),
    [
        (None, "mains"),
        (SimpleNamespace(power_plugged=True), "mains"),
        (SimpleNamespace(power_plugged=False), "battery"),
        (SimpleNamespace(power_plugged=None), None),
    ],
)
def test_a_device_without_a_battery_is_on_the_mains(battery, word) -> None:
    assert facts.power_of(battery) == word


@given(st.integers(0, 2**40))
def test_a_bucket_is_the_power_of_two_below(rows) -> None:
    found = facts.bucket(rows)
    assert found <= rows < max(2 * found, 1)
    assert found & (found - 1) == 0


def test_looking_loads_nothing_heavy() -> None:
    code = (
        "import json, sys; from pathlib import Path\n"
        "from atoll.edge_agent import control, facts\n"
        "told = facts.look(Path('/'))\n"
        "print(json.dumps([sorted({n.partition('.')[0] for n in sys.modules}), *told]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    tops, power, network, accelerator = json.loads(done.stdout)
    assert not {"torch", "flwr", "onnxruntime", "numpy"} & set(tops)
    assert power in {"mains", "battery", None}
    assert network in {"wired", "wifi", "cellular", None}
    assert accelerator in {word for _, word in facts.NODES} | {"none"}
