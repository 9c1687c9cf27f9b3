"""What cannot work is refused before anything starts."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.privacy import frames, modes
from atoll.privacy.errors import BadParameters, Refused
from atoll.privacy.update import UpdateSpec

FINE = UpdateSpec(clip_norm=1.0, bits=16, noise_multiplier=1.0, survivors=6)


@pytest.mark.parametrize("mode", modes.MODES)
def test_an_ordinary_plan_passes(mode):
    modes.check(mode, FINE, length=50_000, parties=8)


@pytest.mark.parametrize("mode", modes.MODES)
def test_more_survivors_than_devices_are_refused(mode):
    with pytest.raises(BadParameters, match=r"cohort\.min_devices = 6 and the cohort has 5"):
        modes.check(mode, FINE, length=100, parties=5)


def test_an_unknown_mode_is_refused_by_name():
    with pytest.raises(BadParameters, match="'secret'; use one of plain, he"):
        modes.check("secret", FINE, 100, 8)
    with pytest.raises(BadParameters, match=r"no privacy\.mode = "):
        modes.hub_session("secret", {})


def test_a_cohort_too_large_for_encryption_is_refused():
    modes.check("plain", FINE, 100, 10**8)
    with pytest.raises(BadParameters, match="plan smaller cohorts"):
        modes.check("he", FINE, 100, 10**8)


def test_values_too_wide_for_a_slot_are_refused():
    wide = UpdateSpec(clip_norm=1.0, bits=24, noise_multiplier=40.0, survivors=2)
    modes.check("plain", wide, 100, 20_000)
    with pytest.raises(BadParameters, match="wider than"):
        modes.check("he", wide, 100, 20_000)


def test_an_encrypted_sum_of_one_is_refused():
    alone = UpdateSpec(clip_norm=1.0, bits=16, noise_multiplier=0.0, survivors=1)
    modes.check("plain", alone, 100, 8)
    with pytest.raises(BadParameters, match="min_devices to 2"):
        modes.check("he", alone, 100, 8)


def test_colluders_do_not_lower_the_survivors_that_are_needed():
    spec = UpdateSpec(clip_norm=1.0, bits=16, noise_multiplier=1.0, survivors=6, colluders=5)
    assert spec.adders == 1
    with pytest.raises(BadParameters, match=r"cohort\.min_devices = 6"):
        modes.check("plain", spec, 100, 5)
    modes.check("he", spec, 100, 6)


def test_the_hubs_noise_has_to_fit_on_top_of_the_sum():
    shape = {"clip_norm": 1.0, "bits": 24, "noise_multiplier": 30.0, "survivors": 1}
    central = UpdateSpec(**shape, placement="central")
    most = (2**63 - 1 - central.tail) // central.bound
    modes.check("plain", central, 100, most)
    with pytest.raises(BadParameters, match="64 bits"):
        modes.check("plain", central, 100, most + 1)


def test_too_few_bits_for_the_model_are_refused():
    coarse = UpdateSpec(clip_norm=1.0, bits=6, noise_multiplier=0.0, survivors=2)
    with pytest.raises(BadParameters, match=r"raise privacy\.bits"):
        modes.check("plain", coarse, 50_000, 8)


def test_the_plain_mode_loads_neither_tenseal_nor_an_accountant():
    program = (
        "import sys; from atoll.privacy import modes, update; modes.hub_session('plain', {});"
        "print([m for m in ('tenseal', 'dp_accounting', 'scipy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4),
    st.lists(st.binary(max_size=20), max_size=4),
)
def test_frames_survive(head, parts):
    head.pop("parts", None)
    frame = frames.unpack(frames.pack(head, parts))
    assert {**frame.head, "parts": None} == {**head, "parts": None}
    assert list(frame.parts) == parts


@given(st.binary(max_size=100))
def test_garbage_is_no_frame(data):
    with pytest.raises(Refused):
        frames.unpack(data)


@pytest.mark.parametrize(
    "head",
    [b"[]", b"{}", b'{"parts":[-1]}', b'{"parts":[true]}', b'{"parts":1}', b"[" * 5000, b"\xff"],
)
def test_heads_that_say_no_lengths_are_refused(head):
    with pytest.raises(Refused):
        frames.unpack(len(head).to_bytes(4) + head)


def test_fields_of_another_type_are_refused():
    frame = frames.unpack(frames.pack({"n": True, "t": 1, "l": [1]}))
    for read, name in (
        (frame.number, "n"),
        (frame.text, "t"),
        (frame.texts, "l"),
        (frame.text, "x"),
    ):
        with pytest.raises(Refused):
            read(name)
