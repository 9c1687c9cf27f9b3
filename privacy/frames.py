"""How a sum's payloads are laid out: a JSON head and binary parts.

    4 bytes, big-endian: length of the head · head (JSON object) · the parts, end to end

The head's ``"parts"`` holds their lengths. Other fields of the head are the message's own; a
reader ignores those it does not know. Blanks behind the head let the first part begin at a
multiple of 8 bytes, so that its integers can be used where they lie.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

from atoll.privacy.errors import Refused
from atoll.privacy.sums import RoundKey

_T = TypeVar("_T")

MAX_HEAD: Final = 1 << 24
MAX_PARTS: Final = 1 << 16
"""Of a payload. Each takes memory here, and one of no length takes none of its sender."""

_LENGTH: Final = struct.Struct(">I")
_ALIGNED: Final = 8


class Frame(NamedTuple):
    """A payload taken apart."""

    head: Mapping[str, object]
    parts: Sequence[bytes]

    def text(self, name: str) -> str:
        """Return a field that must be text."""
        return self._field(name, str)

    def number(self, name: str) -> int:
        """Return a field that must be an integer."""
        value = self._field(name, int)
        if isinstance(value, bool):
            raise Refused(f"{name!r} is no integer")
        return value

    def texts(self, name: str) -> list[str]:
        """Return a field that must be a list of texts."""
        values = self._field(name, list)
        if not all(isinstance(value, str) for value in values):
            raise Refused(f"{name!r} is no list of texts")
        return values

    def _field(self, name: str, kind: type[_T]) -> _T:
        value = self.head.get(name)
        if not isinstance(value, kind):
            raise Refused(f"{name!r} is missing or no {kind.__name__}")
        return value


def pack(head: Mapping[str, object], parts: Sequence[bytes | bytearray | memoryview] = ()) -> bytes:
    """Lay out a payload; equal heads give equal bytes. A memoryview is one of single bytes."""
    whole = {**head, "parts": [len(part) for part in parts]}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNED)
    return b"".join([_LENGTH.pack(len(text)), text, *parts])


def unpack(data: bytes) -> Frame:
    """Take a payload apart; raise :class:`Refused` for anything malformed."""
    frame = view(data)
    return Frame(frame.head, [bytes(part) for part in frame.parts])


class View(NamedTuple):
    """A payload taken apart where it lies: its parts are stretches of it."""

    head: Mapping[str, object]
    parts: Sequence[memoryview]


def view(data: bytes) -> View:
    """Take a payload apart without copying it; raise :class:`Refused` as :func:`unpack` does."""
    if len(data) < _LENGTH.size:
        raise Refused("a payload too short to be one")
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size + length
    if length > MAX_HEAD or start > len(data):
        raise Refused("a payload cut short")
    try:
        head = json.loads(data[_LENGTH.size : start])
    except (ValueError, RecursionError) as error:
        raise Refused("a payload whose head is not JSON") from error
    lengths = head.get("parts") if isinstance(head, dict) else None
    if not isinstance(lengths, list) or not all(
        type(value) is int and value >= 0 for value in lengths
    ):
        raise Refused("a payload without the lengths of its parts")
    if len(lengths) > MAX_PARTS:
        raise Refused(f"a payload of {len(lengths)} parts; {MAX_PARTS} are the most")
    if start + sum(lengths) != len(data):
        raise Refused("a payload whose parts do not fill it")
    whole, parts = memoryview(data), []
    for size in lengths:
        parts.append(whole[start : start + size])
        start += size
    return View(head, parts)


def address(key: RoundKey, phase: str, party: str) -> dict[str, object]:
    """Return the fields that say what a payload belongs to."""
    return {"run": key.run, "round": key.round, "phase": phase, "party": party}


def check_address(frame: "Frame | View", key: RoundKey, phase: str, party: str) -> None:
    """Raise :class:`Refused` unless ``frame`` belongs to this round, phase and party."""
    for name, wanted in address(key, phase, party).items():
        if frame.head.get(name) != wanted:
            raise Refused(f"a payload for {name} {frame.head.get(name)!r}, not {wanted!r}")
