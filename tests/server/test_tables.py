"""What the commands print."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.server.tables import ago, clean, labels, put_facts, put_json, put_table, read_span, span


@given(st.text(max_size=50))
def test_nothing_that_is_printed_steers_the_terminal(text):
    assert clean(text).isprintable()
    assert len(clean(text)) == len(text)


def test_cells_are_not_markup(capsys):
    put_table(["Name"], [["[bold red]x[/bold red]"], ["\x1b[31mred\x1b[0m"]], "none")
    shown = capsys.readouterr().out
    assert "[bold red]x[/bold red]" in shown
    assert "\x1b" not in shown


def test_a_table_in_a_pipe_is_not_cut(capsys):
    put_table(["Why"], [["x" * 500]], "none")
    assert "x" * 500 in capsys.readouterr().out


def test_an_empty_table_says_what_to_do(capsys):
    put_table(["Name"], [], "Nothing yet.")
    assert capsys.readouterr().out == "Nothing yet.\n"


def test_facts_without_value_are_left_out(capsys):
    put_facts({"a": 1, "longer": "x", "none": None, "empty": ""})
    assert capsys.readouterr().out == "a       1\nlonger  x\n"


def test_json_is_json(capsys):
    put_json({"ε": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"ε": [1, None]}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("24h", 86_400), ("7d", 604_800), ("12", 12), ("0.5h", 1800)],
)
def test_durations_are_read(text, seconds):
    assert read_span(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1s", "0", "1w", "nan", "inf", "1h30m"])
def test_other_durations_are_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        read_span(text)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 d")],
)
def test_durations_are_shown_in_one_unit(seconds, shown):
    assert span(seconds) == shown


def test_times_are_shown_as_how_long_ago():
    assert ago(None, 100.0) == "never"
    assert ago(98.0, 100.0) == "just now"
    assert ago(101.0, 100.0) == "just now"  # a clock that was set back
    assert ago(0.0, 300.0) == "5 min ago"


def test_labels_are_shown_as_they_are_given():
    assert labels({"role": "train", "a": "b"}) == "a=b role=train"
    assert labels(None) == ""
