"""What enrolment left on the disk, as the parts of the agent need it.

``identity/`` holds ``key.pem`` and ``seal.pem`` (made here, never sent), ``cert.pem``,
``ca.pem``, ``root.json`` (the first trusted TUF root) and ``hub.json``.
"""

import hashlib
import ssl
from pathlib import Path
from typing import Final

import msgspec

from atoll.edge_agent.errors import HubUntrusted, NotEnrolled
from atoll.edge_agent.paths import Paths

HUB_FILE: Final = "hub.json"
_CLIENT_ID_DIGITS: Final = 24


class Mqtt(msgspec.Struct, frozen=True):
    """Where the broker listens."""

    host: str
    port: int


class HubFacts(msgspec.Struct, frozen=True):
    """What the hub told at enrolment."""

    device: str
    url: str
    mqtt: Mqtt
    labels: dict[str, str] = {}
    boot: int = 0
    """The highest boot number that the hub knew of this name: ours are higher."""


class Credentials(msgspec.Struct, frozen=True):
    """Who we are to whom: names and file paths, no key material."""

    hub: HubFacts
    certificate: Path
    key: Path
    ca: Path

    def client_id(self) -> str:
        """Return our MQTT client id: always the same, and nobody else can guess it.

        Raises :class:`HubUntrusted` when the key cannot be read.
        """
        try:
            secret = hashlib.sha256(b"mqtt client id" + self.key.read_bytes()).hexdigest()
        except OSError as error:
            raise HubUntrusted(f"{self.key} cannot be read: {error.strerror}") from error
        return f"{self.hub.device}-{secret[:_CLIENT_ID_DIGITS]}"

    def context(self) -> ssl.SSLContext:
        """Return a client context that trusts our hub's CA alone and shows our certificate.

        Raises :class:`HubUntrusted` when the files cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise HubUntrusted(
                f"the identity in {self.certificate.parent} cannot be used ({error}): remove "
                "that directory and enrol again with a new token"
            ) from error
        return context


def load(paths: Paths) -> Credentials:
    """Read the identity; raise :class:`NotEnrolled` or :class:`HubUntrusted`."""
    file = paths.identity / HUB_FILE
    try:
        hub = msgspec.json.decode(file.read_bytes(), type=HubFacts)
    except FileNotFoundError:
        raise NotEnrolled(paths.data) from None
    except (OSError, msgspec.DecodeError) as error:
        raise HubUntrusted(
            f"{file} cannot be read ({error}): remove {paths.identity} and enrol again with a "
            "new token"
        ) from error
    return Credentials(
        hub=hub,
        certificate=paths.identity / "cert.pem",
        key=paths.identity / "key.pem",
        ca=paths.identity / "ca.pem",
    )
