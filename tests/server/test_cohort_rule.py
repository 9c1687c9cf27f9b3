"""Cohorts by rule: what a rule lets, what is found wrong with one beforehand, and whole runs."""

import re
import sys
import textwrap
from pathlib import Path

import cel
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select, update

sys.path.insert(0, str(Path(__file__).parent))

from test_server_app import NOW, Hub, _plan

from atoll.edge_agent.facts import NODES
from atoll.server import (  # after the path
    cohort_rule,
    device_facts,
    eligibility,
    expressions,
    policy,
    runs,
    schema,
)
from atoll.server.cohort_rule import FACTS, check, left_out
from atoll.server.errors import BadInput

GOOD = {
    "power": "mains",
    "network": "wifi",
    "accelerator": "none",
    "rows": 512,
    "drift": "stable",
    "drifted": False,
    "state": "serving",
    "model": "spar",
    "release": 3,
    "took_part": 2,
    "labels": {"site": "north"},
}


def allowed(rule, **changes):
    return "d" not in left_out(rule, {"d": GOOD | changes})


@pytest.mark.parametrize(
    ("rule", "falls_short"),
    [
        ('device.power == "mains" && device.rows >= 256 && !device.drifted', {"rows": 128}),
        ('device.network in ["wired", "wifi"]', {"network": "cellular"}),
        ('device.accelerator != "none" || device.rows <= 1024', {"rows": 2048}),
        ('device.labels.site == "north"', {"labels": {"site": "south"}}),
        ('device.labels["site"].startsWith("n")', {"labels": {}}),
        ('device.model == "spar" && device.release >= 3', {"release": 2}),
        ("device.took_part < 10", {"took_part": 10}),
        ('["north", "east"].exists(site, site == device.labels.site)', {"labels": {"site": "w"}}),
        ('has(device.power) && device.power == "mains"', {"power": "battery"}),
        ('device.drift == "stable"', {"drift": "too-few-rows"}),
    ],
)
def test_a_rule_lets_who_meets_it_and_no_other(rule, falls_short) -> None:
    check(rule)
    assert allowed(rule)
    assert not allowed(rule, **falls_short)


@pytest.mark.parametrize(
    ("rule", "at_fault"),
    [
        ('device.powr == "mains"', r"'device\.powr' is no fact.*the facts are power, network"),
        ('device.power == "main"', r"'device\.power' is never \"main\".*mains, battery"),
        ('device.rows == "256"', r"'device\.rows' is compared with \"256\".*a whole number"),
        ("device.power == 1", r"'device\.power' is compared with 1.*text"),
        ("device.drifted == 0", "true or false"),
        ('device.network in ["wifi", "lan"]', r"'device\.network' is never \"lan\""),
        ("device.rows", "comes out as 0"),
        ('!device.drifted && device.rows > "a"', r"cannot be evaluated \(device\.drifted"),
        ("device.rows + 1.5 > 2.0", "cannot be evaluated"),
        ('power == "mains"', "'power' is nothing that a rule can name"),
        ('device["power"] == "mains"', "stands alone"),
        ('device.power = "mains"', "no CEL expression"),
        ("sooner(device.rows)", "cannot be evaluated"),
        ('"mians" == device.power', r"'device\.power' is never \"mians\""),
        ("'mians' != (device.power)", r"'device\.power' is never 'mians'"),
        ("-1 == device.power", r"'device\.power' is compared with -1.*text"),
        ('"""mains" """ == device.power', "is never"),
        (r'device.power == "mains\n"', "is never"),
        ('!device.drifted && (device.drifted || "x" == device.state)', "'device.state' is never"),
        (r'device.network in ["wifi", r"l\an"]', r"'device\.network' is never r\"l\\an\""),
        ('["a"].exists(device, device == "a") && device', "stands alone"),
        ("device.labels == 'north'", "a map"),
        (".device.drifted", r"'\.device' is nothing"),
    ],
)
def test_what_is_wrong_with_a_rule_is_named(rule, at_fault) -> None:
    with pytest.raises(BadInput, match=f"(?s)cohort.rule.*{at_fault}"):
        check(rule)


@pytest.mark.parametrize(
    "rule",
    [
        'device.power == "ma" + "ins"',
        '"ma" + "ins" == device.power',
        'device.power + "" == "mains"',
        'device.power == (device.drifted ? "battery" : "mains")',
        r'device.power == "m\u0061ins"',
        "device.rows == 512.0",
        'device.labels.device == "this one" || "mains" == device.power',
        'device.labels["note"] != "it\'s: device.power == \'mians\'" || device.power == "mains"',
        """r'\\' == device.labels.site || device.power == "mains" // or device.power == "x\n""",
        '["x"].exists(device, device == "x") && device.power == "mains"',
        'device.power in ["ma" + "ins"]',
        'device.drifted == false == (device.power == "mains")',
    ],
)
def test_only_what_a_fact_is_compared_with_is_held_against_it(rule) -> None:
    check(rule)
    labels = {"device": "that one", "note": "it's: device.power == 'mians'", "site": "north"}
    assert allowed(rule, labels=labels)


def test_a_tree_has_the_names_that_cel_itself_finds() -> None:
    written = [
        "a.b.c(d, [e, 1u, -0x1F], {f: g.h, 'i': j}) ? k[l] : -m % .5e3 + 1.5",
        "!a && (b || c) == d in e || f <= g != h > (i - j) / k * l",
        "size(a.b) >= 2 && b'device' == c && 'x'.startsWith(d) && has(e.f)",
        'r"\\" + a + """b " c""" + \'"d"\' + e // + f',
        ".a.b == true && null != c",
        *(rule.expression for rule in policy.RULES),
    ]
    for expression in written:
        assert expressions.names(expression) == set(cel.compile(expression).variables())
    bound = "a.map(x, x + y).filter(y, y.exists_one(z, z == x)) + z"
    assert expressions.names(bound) == {"a", "y", "x", "z"}
    assert expressions.names("a.all(x, a.map(y, x + y) == x)") == {"a"}


def test_names_within_strings_are_no_facts() -> None:
    check('device.labels.note == "device.powr && x"')
    assert cohort_rule.named('device.labels.a == "device.rows" && device.power == "mains"') == [
        "labels",
        "power",
    ]


ALWAYS = [
    "device.{0} == device.{0}",
    "device.{0} == device.{0} || true",
    "true || device.{0} == device.{0}",
]


@given(st.sampled_from(sorted(FACTS)), st.sampled_from(ALWAYS))
def test_a_fact_that_is_not_known_leaves_its_device_out_whatever_else_the_rule_says(name, rule):
    rule = rule.format(name)
    known = {"with": GOOD, "without": {n: v for n, v in GOOD.items() if n != name}}
    assert left_out(rule, known) == {"without": f"device.{name} is not known"}


def test_a_rule_that_asks_whether_a_fact_is_known_decides_itself() -> None:
    rule = '!has(device.power) || device.power == "mains"'
    known = {"silent": {}, "mains": {"power": "mains"}, "battery": {"power": "battery"}}
    assert left_out(rule, known) == {"battery": "device.power = battery"}


def test_reasons_name_the_facts() -> None:
    rule = 'device.rows >= 1024 && !device.drifted && device.labels.site == "north"'
    assert left_out(rule, {"d": GOOD}) == {
        "d": "device.rows = 512, device.drifted = false, device.labels = site=north"
    }
    assert "cannot be evaluated" in left_out("device.labels.nope == 'x'", {"d": GOOD})["d"]


@given(st.fixed_dictionaries({}, optional={n: st.just(v) for n, v in GOOD.items()}))
def test_no_facts_whatever_break_the_evaluation(facts) -> None:
    rule = 'device.power == "mains" && device.rows >= 256 && !device.drifted'
    named = {"power", "rows", "drifted"}
    assert ("d" not in left_out(rule, {"d": facts})) == (named <= facts.keys())


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.store.close()


def tell(hub, at=NOW, **by_device):
    with hub.store.begin() as connection:
        for device, body in by_device.items():
            connection.execute(
                insert(schema.health).values(
                    device=device.replace("_", "-"), received_at=at, body=body
                )
            )


def ruled(rule, **changes):
    return _plan(**changes).replace("min_devices", f"rule = '{rule}', min_devices")


MAINS = {"power": "mains", "examples": 64}


def test_a_run_trains_on_the_devices_of_its_rule_and_says_whom_it_left_out_and_why(hub) -> None:
    tell(hub, device_1=MAINS, device_2=MAINS, device_3=MAINS | {"power": "battery"})
    row = hub.run(ruled('device.power == "mains" && device.rows >= 64'))
    assert row["state"] == "gated", row["reason"]
    assert row["metrics"]["cohort"] == {
        "rule": 'device.power == "mains" && device.rows >= 64',
        "trainers": 3,
        "eligible": 2,
        "left_out": {"device-3": "device.power = battery, device.rows = 64"},
    }
    with hub.store.read() as connection:
        took_part = connection.execute(select(schema.rounds.c.survivors)).scalars().all()
        known = device_facts.of_fleet(connection, "waves", ["took_part"], now=NOW, fresh=90)
    assert took_part == [["device-1", "device-2"]] * 3
    assert known["device-1"] == {"took_part": 3}
    assert known["device-3"] == {"took_part": 0}
    assert row["metrics"]["turns"] == {"devices": 3, "fewest": 0, "most": 3}
    assert row["metrics"]["devices"]["trainers"] == 2
    assert row["metrics"]["rows"]["known"] == 240  # device-3 trained nothing, so it is unseen
    assert row["metrics"]["rows"]["unseen"] == 240


def test_a_run_whose_rule_too_few_meet_fails_and_names_the_rule(hub) -> None:
    tell(hub, device_1=MAINS, device_2=MAINS | {"power": "battery"})
    row = hub.run(ruled('device.power == "mains"'))
    assert row["state"] == "failed"
    assert "cohort.rule leaves 1 of 3" in row["reason"]
    assert row["metrics"]["cohort"]["left_out"] == {
        "device-2": "device.power = battery",
        "device-3": "device.power is not known",
    }


def test_what_was_told_long_ago_is_not_known(hub) -> None:
    tell(hub, at=NOW - 100, device_1=MAINS)
    tell(hub, at=NOW - 10, device_2=MAINS)
    with hub.store.read() as connection:
        known = device_facts.of_fleet(connection, "waves", list(FACTS), now=NOW, fresh=90)
    assert "power" not in known["device-1"]
    assert known["device-2"]["power"] == "mains"
    assert known["device-2"]["rows"] == 64
    assert known["device-1"]["labels"] == {"role": "train"}


def test_drift_is_that_of_the_release_which_a_device_serves(hub) -> None:
    with hub.store.begin() as connection:
        for number, state in ((1, "drifted"), (2, "stable")):
            device = f"device-{number}"
            connection.execute(
                insert(schema.twins).values(
                    device=device,
                    desired={},
                    reported={"model": "waves", "release": 2, "state": "serving"},
                )
            )
            for release, found in ((1, "drifted"), (2, state)):
                connection.execute(
                    insert(schema.drift).values(
                        device=device, model="waves", release=release, at=NOW, state=found,
                        rows=100, score=1.0, detail={},
                    )
                )  # fmt: skip
    with hub.store.read() as connection:
        known = device_facts.of_fleet(
            connection, "waves", ["drift", "drifted", "release"], now=NOW, fresh=90
        )
    assert known["device-1"] == {"drift": "drifted", "drifted": True, "release": 2}
    assert known["device-2"] == {"drift": "stable", "drifted": False, "release": 2}
    assert known["device-3"] == {"drift": "unwatched", "drifted": False}


def test_revoked_devices_are_not_asked_about(hub) -> None:
    with hub.store.begin() as connection:
        table = schema.devices
        connection.execute(update(table).where(table.c.id == "device-1").values(revoked_at=1.0))
        known = device_facts.of_fleet(connection, "waves", ["labels"], now=NOW, fresh=90)
    assert "device-1" not in known
    assert eligibility.left_out(hub.store, runs.loads(_plan()), NOW, 90) == {}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("rule = 'device.colour == \"red\"', ", r"device\.colour"),
        ("size = 1, ", "every round would be thrown away"),
    ],
)
def test_a_plan_with_such_a_cohort_is_not_even_proposed(more, why) -> None:
    text = _plan().replace("min_devices", f"{more}min_devices")
    with pytest.raises(BadInput, match=why):
        runs.read_plan(text)


DOCS = Path(__file__).parents[2] / "docs" / "federation.md"


def blocks(first):
    """Return the indented blocks of the text that begin with a line."""
    found = re.findall(
        r"(?:^    .*\n|^\n(?=    ))+", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    texts = [textwrap.dedent(block).strip() for block in found]
    return [text for text in texts if text.startswith(first)]


def test_the_cohorts_and_gates_of_the_text_can_be_run() -> None:
    head = 'name = "x"\ntask = "spar"\nmodel = "m"\n'
    [cohort], [gates] = blocks("[cohort]\nlabels"), blocks("[gates]")
    assert runs.read_plan(head + cohort).cohort.size == 50
    assert len(runs.read_plan(head + gates).gates) == 3


def test_the_text_tells_of_every_fact_and_of_every_word_for_one() -> None:
    table = DOCS.read_text(encoding="utf-8").split("| fact | type |")[1].split("\n\n")[0]
    first = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert {name for names in first for name in names} == set(FACTS)
    words = {word for fact in FACTS.values() for word in fact.words}
    assert words | {word for _, word in NODES} <= set(re.findall(r"`([\w-]+)`", table))


def test_a_plan_whose_gate_is_about_nothing_is_not_proposed() -> None:
    def read(gate):
        return runs.read_plan(f'{_plan()}\n[gates]\n"fair" = "{gate}"\n')

    with pytest.raises(BadInput, match=r"the gate 'fair' is about 'fairnes'"):
        read("fairnes.equalised_odds <= 0.1")
    with pytest.raises(BadInput, match="no CEL"):
        read("fairness.equalised_odds <=")
    with pytest.raises(BadInput, match="no task named"):  # so the gate is well
        read("fairness.equalised_odds <= 0.1")


@pytest.mark.parametrize(
    "rule", [" || ".join(["device.rows > 3"] * 3000), "1 + " * 3000 + "device.rows > 3"]
)
def test_a_rule_may_be_long(rule: str) -> None:
    check(rule)
