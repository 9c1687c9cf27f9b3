import io

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.fleet.bundle import (
    CARD,
    FILES,
    GOLDEN,
    MANIFEST,
    MODEL,
    PROFILE,
    FileDigest,
    Golden,
    Input,
    Manifest,
    Output,
    encode_golden,
    golden_check,
    read,
    read_golden,
    write,
)
from atoll.fleet.errors import BadBundle

MANIFEST_DRAFT = Manifest(
    model="spar",
    task="spar",
    run="r1",
    created=1.5,
    input=Input("x", (6, 200)),
    output=Output("logits"),
    classes=("a", "b"),
    channels=("ax",),
    metrics={"accuracy": 0.9},
)
EXAMPLES = Golden(np.ones((3, 2), np.float32), np.zeros((3, 4), np.float32), 0.5)
CONTENTS = {
    MODEL: b"\x00onnx",
    PROFILE: b"profile",
    GOLDEN: encode_golden(EXAMPLES),
    CARD: b"# card\n",
}


def test_a_bundle_reads_as_it_was_written(tmp_path) -> None:
    manifest = write(tmp_path, MANIFEST_DRAFT, CONTENTS)
    assert read(tmp_path) == manifest
    assert manifest.files[MODEL] == FileDigest.of(b"\x00onnx")
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    golden = read_golden(tmp_path)
    np.testing.assert_array_equal(golden.inputs, EXAMPLES.inputs)
    np.testing.assert_array_equal(golden.expected, EXAMPLES.expected)
    assert golden.tolerance == 0.5


@pytest.mark.parametrize("name", sorted(CONTENTS))
@pytest.mark.parametrize("how", ["changed", "longer", "missing"])
def test_a_file_that_is_not_as_described_is_refused(tmp_path, name, how) -> None:
    write(tmp_path, MANIFEST_DRAFT, CONTENTS)
    path = tmp_path / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data + b"x" if how == "longer" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BadBundle, match=name):
        read(tmp_path)


def test_a_bundle_is_whole_or_is_not_written(tmp_path) -> None:
    for contents in ({MODEL: b""}, {**CONTENTS, "../evil": b""}, {**CONTENTS, MANIFEST: b""}):
        with pytest.raises(BadBundle, match="missing or unknown"):
            write(tmp_path / "b", MANIFEST_DRAFT, contents)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "../x"},
        {"model": "spar\n"},
        {"input": {"name": "x", "shape": [0], "dtype": "float32"}},
        {"files": {}},
        {"files": {"../../etc/passwd": {"sha256": "0" * 64, "length": 1}}},
        {"files": {MODEL: {"sha256": "0" * 63, "length": 1}}},
        {"files": {MODEL: {"sha256": "0" * 64, "length": -1}}},
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(tmp_path, change) -> None:
    manifest = write(tmp_path, MANIFEST_DRAFT, CONTENTS)
    plain = {**msgspec.to_builtins(manifest), **change}
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(plain))
    with pytest.raises(BadBundle):
        read(tmp_path)


def test_a_manifest_of_a_later_version_is_read(tmp_path) -> None:
    manifest = write(tmp_path, MANIFEST_DRAFT, CONTENTS)
    plain = {**msgspec.to_builtins(manifest), "later": [1]}
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(plain))
    assert read(tmp_path) == manifest


@given(st.binary(max_size=80))
def test_any_bytes_are_a_manifest_or_refused(data) -> None:
    with pytest.raises(BadBundle):
        Manifest.decode(data)


def _npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


X = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        CONTENTS[GOLDEN][:-30],
        _npz(inputs=X, expected=X),
        _npz(inputs=X, expected=X, tolerance=np.float64(np.nan)),
        _npz(inputs=X, expected=X, tolerance=np.float64(0)),
        _npz(inputs=X, expected=X, tolerance=X),
        _npz(inputs=X[:0], expected=X[:0], tolerance=np.float64(1)),
        _npz(inputs=X, expected=X.repeat(2, 0), tolerance=np.float64(1)),
        _npz(inputs=X.astype(np.float64), expected=X, tolerance=np.float64(1)),
        _npz(inputs=np.array([object()]), expected=X, tolerance=np.float64(1)),
    ],
)
def test_golden_examples_that_check_nothing_are_refused(tmp_path, data) -> None:
    (tmp_path / GOLDEN).write_bytes(data)
    with pytest.raises(BadBundle, match=r"golden\.npz"):
        read_golden(tmp_path)


def test_the_golden_check_passes_within_the_tolerance_alone() -> None:
    expected = np.array([[1.0, 2.0]], np.float32)
    golden_check(expected, expected + np.float32(0.25), 0.25)
    for wrong in (expected + 0.26, expected * np.nan, expected + np.inf, expected[:, :1]):
        with pytest.raises(BadBundle, match="golden check"):
            golden_check(expected, wrong.astype(np.float32), 0.25)
