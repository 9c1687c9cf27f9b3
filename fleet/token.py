"""The one-time enrolment token: all a new device needs, in one line to copy.

``atoll1_`` and base64url of a checksum and a MessagePack array. It carries the hub's URL and
the SHA-256 of the hub's CA certificate, so the device trusts nothing else from the first byte
on; and a secret that the hub accepts once. The checksum catches a slip in copying before any
network is touched.
"""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import msgspec

from atoll.fleet.errors import BadDeviceId, BadIdentity
from atoll.fleet.topics import check_device_id

PREFIX: Final = "atoll1_"

_CHECKSUM_BYTES: Final = 6
_FINGERPRINT_BYTES: Final = 32
_MAX_CHARACTERS: Final = 4096
_REMEDY: Final = "copy it again from `atoll device token`, whole and unchanged"


@dataclass(frozen=True, slots=True)
class EnrolmentToken:
    """What a device is told: where the hub is, how to know it, and the secret to show it."""

    url: str
    """``https://host:port`` of the device API."""
    ca_sha256: str
    """Lower-case hexadecimal, 64 digits."""
    secret: str = field(repr=False)
    device: str | None = None
    """The id the device will have; none lets it choose its own."""

    def encode(self) -> str:
        """Return the token; raise :class:`BadIdentity` for fields that cannot stand in one."""
        self._check()
        payload = msgspec.msgpack.encode(
            (self.url, bytes.fromhex(self.ca_sha256), self.secret, self.device)
        )
        return PREFIX + urlsafe_b64encode(_checksum(payload) + payload).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "EnrolmentToken":
        """Read a token; raise :class:`BadIdentity` for any slip in it."""
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > _MAX_CHARACTERS:
            raise BadIdentity(f"not an enrolment token: it begins with {PREFIX!r}; {_REMEDY}")
        body = text.removeprefix(PREFIX)
        try:
            data = urlsafe_b64decode(body + "=" * (-len(body) % 4))
        except ValueError as error:
            raise BadIdentity(f"enrolment token is damaged; {_REMEDY}") from error
        payload = data[_CHECKSUM_BYTES:]
        # A decoder skips foreign characters and stray bits, so compare the spelling as well.
        spelled = urlsafe_b64encode(data).decode().rstrip("=")
        if data[:_CHECKSUM_BYTES] != _checksum(payload) or spelled != body:
            raise BadIdentity(f"enrolment token is damaged; {_REMEDY}")
        try:
            url, ca, secret, device = msgspec.msgpack.decode(
                payload, type=tuple[str, bytes, str, str | None]
            )
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadIdentity(f"enrolment token cannot be read: {error}; {_REMEDY}") from error
        token = cls(url, ca.hex(), secret, device)
        token._check()
        return token

    def _check(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
            ca = bytes.fromhex(self.ca_sha256)
            if self.device is not None:
                check_device_id(self.device)
        except (ValueError, BadDeviceId) as error:
            raise BadIdentity(f"enrolment token cannot be used: {error}") from error
        if not usable:
            raise BadIdentity(f"enrolment token names no https URL: {self.url!r}")
        if len(ca) != _FINGERPRINT_BYTES or ca.hex() != self.ca_sha256:
            raise BadIdentity("enrolment token holds no SHA-256 fingerprint of the hub's CA")
        if not self.secret:
            raise BadIdentity("enrolment token holds no secret")


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()[:_CHECKSUM_BYTES]
