import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.metadata import TargetFile, Targets

from atoll.fleet.bundle import FILES
from atoll.fleet.errors import BadBundle
from atoll.fleet.trust import (
    TargetInfo,
    info_of,
    may_install,
    newest,
    parse_target_path,
    target_path,
)

releases = st.integers(1, 12)


def _target(path: str, custom: object) -> TargetFile:
    return TargetFile(1, {"sha256": "0" * 64}, path, {"custom": custom})


def _signed(*infos: TargetInfo, model: str = "spar") -> dict[str, TargetFile]:
    """Return targets as they come out of a serialised ``targets.json``."""
    targets = Targets()
    for info in infos:
        for file in FILES:
            path = target_path(model, info.release, file)
            targets.targets[path] = _target(path, info.custom())
    return Targets.from_dict(targets.to_dict()).targets


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True), releases, st.sampled_from(FILES))
def test_a_target_path_is_taken_apart_as_it_was_made(model, release, file) -> None:
    assert parse_target_path(target_path(model, release, file)) == (model, release, file)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "spar/1",
        "spar/0/card.md",
        "spar/01/card.md",
        "../1/card.md",
        "spar/1/../card.md",
        "spar/1/other",
        "Spar/1/card.md",
        "spar/1/card.md\n",
        "spar/-1/card.md",
        "x/spar/1/card.md",
    ],
)
def test_a_foreign_path_is_refused(path) -> None:
    with pytest.raises(BadBundle, match="not a target"):
        parse_target_path(path)


def test_a_target_says_what_was_signed_into_it() -> None:
    targets = _signed(TargetInfo(3, 2), TargetInfo(2, None))
    assert info_of("spar/3/card.md", targets["spar/3/card.md"]) == TargetInfo(3, 2)
    assert newest(targets, "spar") == TargetInfo(3, 2)
    assert newest(targets, "other") is None
    assert newest(_signed(TargetInfo(10, 9), TargetInfo(9, 2)), "spar") == TargetInfo(10, 9)


def test_models_whose_names_begin_alike_are_told_apart() -> None:
    targets = {**_signed(TargetInfo(1, None)), **_signed(TargetInfo(7, 6), model="spar-two")}
    assert newest(targets, "spar") == TargetInfo(1, None)


@pytest.mark.parametrize(
    "custom",
    [
        None,
        {},
        [],
        "x",
        {"atoll": 1},
        {"atoll": {}},
        {"atoll": {"release": 2}},
        {"atoll": {"release": "3"}},
        {"atoll": {"release": True}},
        {"atoll": {"release": 3, "fallback": 3}},
        {"atoll": {"release": 3, "fallback": 0}},
        {"atoll": {"release": 3, "fallback": "2"}},
        {"atoll": {"release": 3, "fallback": True}},
    ],
)
def test_a_target_that_says_something_else_is_refused(custom) -> None:
    with pytest.raises(BadBundle):
        info_of("spar/3/card.md", _target("spar/3/card.md", custom))


def test_files_of_one_release_must_agree() -> None:
    targets = _signed(TargetInfo(3, 2))
    targets["spar/3/card.md"] = _target("spar/3/card.md", TargetInfo(3, 1).custom())
    with pytest.raises(BadBundle, match="different fallbacks"):
        newest(targets, "spar")


@given(st.none() | releases, releases, releases, st.none() | releases)
def test_no_device_goes_back_further_than_the_newest_signature_says(
    current, wanted, top, fallback
) -> None:
    try:
        may_install(current, wanted, TargetInfo(top, fallback))
    except BadBundle:
        assert wanted > top or (current is not None and wanted < current)
        return
    assert wanted <= top
    assert current is None or wanted >= current or (wanted == fallback and top >= current)


@given(st.lists(releases, max_size=30))
def test_whatever_the_hub_asks_for_a_device_stays_at_or_above_the_fallback(wishes) -> None:
    signed, current = TargetInfo(9, 7), 8
    for wanted in wishes:
        try:
            may_install(current, wanted, signed)
        except BadBundle:
            continue
        current = wanted
        assert current in {7, 8, 9}
