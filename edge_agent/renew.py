"""Certificate renewal, a short-lived child: ``python -m atoll.edge_agent.renew --data D``.

Tells its parent ``{"kind": "renewed", "due_in": seconds, "new": bool}``: asks the hub only
when two thirds of the life are over. The key stays the same.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from atoll.edge_agent import credentials
from atoll.edge_agent.errors import AgentError, HubUntrusted
from atoll.edge_agent.hub import Hub
from atoll.edge_agent.parent import Parent
from atoll.edge_agent.paths import Paths, translate
from atoll.fleet.errors import FleetError
from atoll.fleet.files import PUBLIC, write_atomic
from atoll.fleet.identity import Identity, peer_of, public_pem, renew_due

CHECK_SECONDS: Final = 3600.0


class _Renewal(msgspec.Struct):
    """The hub's answer."""

    certificate: str


def renew(paths: Paths, now: datetime) -> bool:
    """Replace the certificate if it is due; return whether it was.

    Raises :class:`AgentError` or :class:`FleetError`; the old certificate stays then.
    """
    who = credentials.load(paths)
    if not renew_due(who.certificate.read_bytes(), now):
        return False
    identity = Identity.load(paths.identity)
    hub = Hub(who.hub.url, who.context())
    request = {"csr": identity.csr(who.hub.device).decode()}
    certificate = hub.ask("/v1/renew", request, _Renewal).certificate.encode()
    peer = peer_of(certificate, who.ca.read_bytes(), now)
    if public_pem(peer.key) != identity.public_pem() or peer.device != who.hub.device:
        raise HubUntrusted("the hub renewed with a certificate for another key or device")
    try:
        write_atomic(who.certificate, certificate, PUBLIC)
    except OSError as error:
        raise translate(error, who.certificate) from error
    return True


def main(arguments: list[str] | None = None) -> int:
    """Check, renew when due, tell the parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    paths = Paths(parser.parse_args(arguments).data)
    parent = Parent()
    try:
        new = renew(paths, datetime.now(UTC))
    except (AgentError, FleetError, OSError) as error:
        parent.tell({"kind": "renew-failed", "error": str(error)})
        return 0
    parent.tell({"kind": "renewed", "due_in": CHECK_SECONDS, "new": new})
    return 0


if __name__ == "__main__":
    sys.exit(main())
