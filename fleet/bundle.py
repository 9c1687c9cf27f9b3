"""A model bundle: the directory that is signed, shipped, checked and served as one release.

``manifest.json`` names the model and, by SHA-256 and length, every other file. Release numbers
are not in it: a bundle is written by a run, a release number is given when someone signs it,
and rides in the signed TUF target (:mod:`atoll.fleet.trust`).
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from atoll.fleet.errors import BadBundle
from atoll.fleet.files import PUBLIC, write_atomic

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
PROFILE: Final = "profile.msgpack"
GOLDEN: Final = "golden.npz"
CARD: Final = "card.md"
FILES: Final = (MANIFEST, MODEL, PROFILE, GOLDEN, CARD)
"""Every file of a bundle; the manifest describes the others."""

Floats = npt.NDArray[np.float32]


class Input(msgspec.Struct, frozen=True):
    """The model's input tensor; ``shape`` is that of one example, without the batch axis."""

    name: str
    shape: tuple[Annotated[int, Meta(ge=1)], ...]
    dtype: str = "float32"


class Output(msgspec.Struct, frozen=True):
    """The model's output tensor: logits ``(n, classes)``."""

    name: str


class FileDigest(msgspec.Struct, frozen=True):
    """What a file must be: SHA-256 in lower-case hexadecimal and length in bytes."""

    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    length: Annotated[int, Meta(ge=0)]

    @classmethod
    def of(cls, data: bytes) -> "FileDigest":
        """Return the digest of ``data``."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is. ``created`` is in Unix seconds; ``metrics`` are the run's, by name.

    ``telemetry_noise`` is σ of the noise that a device adds to the counts of what it serves,
    over what one served row can change them by (L2); 0 ships them as they are. It stands here,
    signed, so that no hub can have a device ship exact counts of a release that hides them.
    """

    model: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
    task: str
    run: str
    created: float
    input: Input
    output: Output
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    metrics: dict[str, float] = {}
    files: dict[str, FileDigest] = {}
    telemetry_noise: Annotated[float, Meta(ge=0)] = 0.0

    def encode(self) -> bytes:
        """Return the manifest as indented JSON, as in ``manifest.json``."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted")) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Read :meth:`encode`'s bytes; raise :class:`BadBundle` for any others."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadBundle(f"{MANIFEST} cannot be read: {error}") from error


class Golden(NamedTuple):
    """Inputs ``(n, *shape)`` and the outputs ``(n, classes)`` that a sound runtime gives.

    ``tolerance`` is the largest difference of any output that is still sound.
    """

    inputs: Floats
    expected: Floats
    tolerance: float


def write(directory: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
    """Write a bundle and return ``manifest`` with the digests of ``contents`` filled in.

    ``contents`` holds every file but the manifest, which is written last. Raises
    :class:`BadBundle` when a file is missing or is not part of a bundle.
    """
    if contents.keys() != set(FILES) - {MANIFEST}:
        odd = ", ".join(sorted(contents.keys() ^ (set(FILES) - {MANIFEST})))
        raise BadBundle(f"a bundle is made of {', '.join(FILES)}; missing or unknown: {odd}")
    digests = {name: FileDigest.of(data) for name, data in contents.items()}
    whole = msgspec.structs.replace(manifest, files=digests)
    for name, data in contents.items():
        write_atomic(directory / name, data, PUBLIC)
    write_atomic(directory / MANIFEST, whole.encode(), PUBLIC)
    return whole


def read(directory: Path) -> Manifest:
    """Return the manifest of a bundle whose files are all there and are what it says.

    Raises :class:`BadBundle` otherwise.
    """
    manifest = Manifest.decode(_bytes(directory / MANIFEST))
    if manifest.files.keys() != set(FILES) - {MANIFEST}:
        raise BadBundle(f"{MANIFEST} does not describe {', '.join(FILES[1:])}")
    for name, digest in manifest.files.items():
        if FileDigest.of(_bytes(directory / name)) != digest:
            raise BadBundle(f"{name} is not the file that {MANIFEST} describes; fetch it again")
    return manifest


def encode_golden(golden: Golden) -> bytes:
    """Return the bytes of ``golden.npz``."""
    out = io.BytesIO()
    np.savez_compressed(
        out,
        inputs=golden.inputs.astype(np.float32),
        expected=golden.expected.astype(np.float32),
        tolerance=np.float64(golden.tolerance),
    )
    return out.getvalue()


def read_golden(directory: Path) -> Golden:
    """Read ``golden.npz`` of a bundle; raise :class:`BadBundle` when it is not usable."""
    try:
        with np.load(io.BytesIO(_bytes(directory / GOLDEN)), allow_pickle=False) as arrays:
            golden = Golden(arrays["inputs"], arrays["expected"], float(arrays["tolerance"]))
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise BadBundle(f"{GOLDEN} cannot be read: {error}") from error
    if (
        not len(golden.inputs)
        or len(golden.inputs) != len(golden.expected)
        or golden.inputs.dtype != np.float32
        or golden.expected.dtype != np.float32
        or not golden.tolerance > 0
    ):
        raise BadBundle(f"{GOLDEN} holds no golden examples")
    return golden


def golden_check(expected: Floats, got: Floats, tolerance: float) -> None:
    """Raise :class:`BadBundle` unless a runtime's outputs agree with those expected.

    Every element must be finite and within ``tolerance`` (absolute, on logits).
    """
    if got.shape != expected.shape:
        raise BadBundle(f"golden check: outputs have shape {got.shape}, not {expected.shape}")
    worst = float(np.abs(got.astype(np.float64) - expected).max(initial=0.0))
    if not worst <= tolerance:  # NaN must fail too
        raise BadBundle(
            f"golden check: an output differs by {worst:.4g}, more than {tolerance:.4g}; "
            "this device's runtime computes the model wrongly"
        )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadBundle(f"cannot read {path}: {error.strerror}") from error
