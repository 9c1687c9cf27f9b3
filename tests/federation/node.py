"""One device of the contract test: ``node.py URL IDENTITY_DIR DATA_DIR DEVICE``."""

import logging
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import httpx
from blobs import Blobs
from google.protobuf.message import Message as ProtobufMessage

from atoll.federation import client_app, warm_node
from atoll.federation.errors import LinkError
from atoll.federation.fleet_client import FleetClient
from atoll.federation.superlink import FETCH
from atoll.federation.warm_node import WarmNode
from atoll.fleet.identity import Identity, Peer, peer_of
from atoll.privacy import frames
from atoll.privacy.modes import PartyIdentity, party_session


class Forgetful(FleetClient):
    """Loses every third answer that holds a message, after the hub has sent it."""

    answers = 0

    def _bundle(self, name: str, body: bytes, message: ProtobufMessage) -> bytes | None:
        answer = super()._bundle(name, body, message)
        if name == FETCH and answer is not None and len(frames.unpack(answer).parts) > 1:
            Forgetful.answers += 1
            if Forgetful.answers % 3 == 1:
                raise httpx.ReadError("the connection was cut")
        return answer


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
    if (data / "forgetful").exists():
        warm_node.FleetClient = Forgetful  # type: ignore[misc]
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
