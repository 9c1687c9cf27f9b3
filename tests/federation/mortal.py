"""An app that can be asked to take its process down; a module, so that Ray's processes find it."""

import os
from pathlib import Path

from blobs import Blobs
from flwr.clientapp import ClientApp

from atoll.federation import client_app
from atoll.privacy.plain import PlainParty


def app() -> ClientApp:
    return client_app.build(
        Blobs(),
        Path(),
        lambda _: PlainParty("mortal"),
        {"echo": bytes.upper, "die": lambda _: os._exit(1)},
    )
