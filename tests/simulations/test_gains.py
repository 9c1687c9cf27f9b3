"""The tables of gains measure what they say, on runs small enough for a test."""

import json
from pathlib import Path

import pytest
import torch

from atoll.simulations import gains

DOCS = Path(__file__).parents[2] / "docs" / "federation.md"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(gains, "SEEDS", (0,))
    yield
    torch.set_num_threads(before)


def printed(capsys, name):
    assert gains.main(["--json", "--only", name]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["table"] for row in rows} == {name}
    return {row["case"]: row["values"] for row in rows}


def number(value):
    return value[0] if isinstance(value, list) else value


def test_a_table_has_means_and_ranges_over_seeds_and_whole_numbers():
    lines = [gains.Line("one", {"bytes": 1234.4, "accuracy": [0.5, 0.75, 1.0]})]
    assert gains.table(lines).splitlines() == [
        "| | bytes | accuracy |",
        "|---|---|---|",
        "| one | 1,234 | 0.750 (0.500 to 1.000) |",
    ]


def test_codecs_are_told_with_the_bytes_that_devices_send(monkeypatch, capsys):
    monkeypatch.setattr(gains, "CODEC_ROUNDS", 1)
    found = printed(capsys, "codec")
    assert list(found) == list(gains.CODECS)
    whole, masked, half = (
        found[case] for case in ("everything", "`random-mask`, share 0.1", '`downlink = "float16"`')
    )
    assert number(masked["bytes up"]) < 0.2 * number(whole["bytes up"])
    assert number(half["bytes up"]) == pytest.approx(number(whole["bytes up"]), rel=0.02)
    assert number(half["bytes down"]) == pytest.approx(
        number(whole["bytes down"]) - 2 * 4810, abs=1
    )
    assert all(0 < number(values["accuracy"]) < 1 for values in found.values())


def test_a_slow_device_holds_up_rounds_and_not_steps(monkeypatch, capsys):
    monkeypatch.setattr(gains, "PACES", (1.0,) * 9 + (3.0,))
    monkeypatch.setattr(
        gains,
        "BUFFERED",
        {case: (count // 10, more) for case, (count, more) in gains.BUFFERED.items()},
    )
    rounds, enough, steps = printed(capsys, "buffered").values()
    assert [number(one["updates of the slow device"]) for one in (rounds, enough)] == [2, 0]
    assert number(rounds["seconds"]) >= 2 * 3
    assert number(enough["seconds"]) < 2 * 3
    assert number(steps["seconds"]) < 2 * 3


def test_accuracies_are_those_after_the_rounds_that_the_columns_name(monkeypatch, capsys):
    monkeypatch.setattr(gains, "LOOKED_AT", (5, 10))
    monkeypatch.setattr(gains, "SCAFFOLD", {"FedAvg": "", "SCAFFOLD": "control_steps = 50"})
    found = printed(capsys, "scaffold")
    for values in found.values():
        assert list(values) == ["after 5 rounds", "after 10 rounds"]
        assert 0.3 < number(values["after 5 rounds"]) < number(values["after 10 rounds"])
    assert number(found["SCAFFOLD"]["after 10 rounds"]) > number(found["FedAvg"]["after 10 rounds"])


def test_the_text_has_the_lines_of_every_table():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    for cases in (gains.SCAFFOLD, gains.CODECS, gains.BUFFERED):
        for case in cases:
            assert any(line.startswith(f"| {case} |") for line in lines), case
