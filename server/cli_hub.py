"""``atoll hub``: start a hub."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from atoll.server.cli_options import Data, MlflowUrl, tracking
from atoll.server.client import Misuse, default_data
from atoll.server.tables import put


def hub(
    *,
    data: Data = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Name or address by which devices reach this machine; it goes into "
            "certificates and tokens. (default: the address of this machine)",
        ),
    ] = None,
    device_port: Annotated[
        int, typer.Option(min=0, max=65535, help="HTTPS port for devices; 0: any free one.")
    ] = 8443,
    mqtt_port: Annotated[
        int, typer.Option(min=0, max=65535, help="MQTT port for devices; 0: any free one.")
    ] = 8883,
    operator_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the API and the dashboard.")
    ] = 8080,
    device_bind: Annotated[
        str, typer.Option(help="Address that the device port listens on.")
    ] = "0.0.0.0",  # noqa: S104 -- devices come from other machines; mTLS guards it
    mqtt_bind: Annotated[
        str, typer.Option(help="Address that the MQTT port listens on.")
    ] = "0.0.0.0",  # noqa: S104 -- as for the device port
    operator_bind: Annotated[
        str, typer.Option(help="Address that the operator port listens on.")
    ] = "127.0.0.1",
    operator_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Further host name under which the operator port answers, behind a proxy "
            "say; may be repeated."
        ),
    ] = None,
    broker: Annotated[
        str,
        typer.Option(help="nats or mosquitto to have one started, or mqtts://host:port of yours."),
    ] = "nats",
    superlink: Annotated[
        str | None,
        typer.Option(help="host:port of your Flower SuperLink. (default: one is started)"),
    ] = None,
    superlink_ca: Annotated[
        Path | None, typer.Option(help="PEM of the CA of that SuperLink. (default: the hub's)")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="ATOLL_DATABASE",
            help="SQLAlchemy URL, postgresql+psycopg://… say. (default: SQLite in --data)",
        ),
    ] = None,
    mlflow: MlflowUrl = None,
    certificate_days: Annotated[
        float, typer.Option(min=0.01, max=3650, help="Life of a device certificate.")
    ] = 30.0,
) -> None:
    """Start a hub and keep it running: API, dashboard, broker, SuperLink, coordinator.

    It writes where it is, and an admin's token, to operator.json in its data directory, where
    the other commands find them. Ctrl-C ends it and all it has started.
    """
    if superlink is not None and not _is_address(superlink):
        raise Misuse(f"--superlink {superlink!r} is not of the form host:port")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("atoll").setLevel(logging.INFO)
    from atoll.server.hub import run_hub
    from atoll.server.settings import Settings, own_address

    run_hub(
        Settings(
            data=(data or default_data()).absolute(),
            database=database,
            host=host or own_address(),
            device_bind=device_bind,
            device_port=device_port,
            operator_bind=operator_bind,
            operator_port=operator_port,
            operator_hosts=tuple(operator_host or ()),
            broker=broker,
            mqtt_bind=mqtt_bind,
            mqtt_port=mqtt_port,
            superlink=superlink,
            superlink_ca=superlink_ca,
            mlflow=None if mlflow is None else tracking(mlflow),
            certificate_days=certificate_days,
        ),
        say,
    )


def say(line: str) -> None:
    """Tell the user at once, in a pipe too."""
    put(line)
    sys.stdout.flush()


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon) and port.isdecimal() and 0 < int(port) < 65536
