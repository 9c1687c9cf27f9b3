"""One device of the contract test: ``node.py URL IDENTITY_DIR DATA_DIR DEVICE``."""

import logging
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from blobs import Blobs

from atoll.federation import client_app
from atoll.federation.errors import LinkError
from atoll.federation.warm_node import WarmNode
from atoll.fleet.identity import Identity, Peer, peer_of
from atoll.privacy.modes import PartyIdentity, party_session


def main(url: str, identity: Path, data: Path, device: str) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("atoll").setLevel(logging.DEBUG)
    mine = Identity.load(identity)

    def peer(certificate: bytes) -> Peer:
        return peer_of(certificate, (identity / "ca.pem").read_bytes(), datetime.now(UTC))

    me = PartyIdentity(device, mine.key, mine.seal, peer)
    app = client_app.build(
        Blobs(), data, lambda mode: party_session(mode, me), {"echo": bytes.upper}
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        WarmNode(
            url,
            ca=identity / "ca.pem",
            certificate=identity / "cert.pem",
            key=identity / "key.pem",
        ).serve(app, stop)
    except LinkError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
