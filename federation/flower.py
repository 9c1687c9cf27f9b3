"""Flower's hub side: what Atoll needs of its internals, in one place.

With the device side (:mod:`atoll.federation.warm_node` over
:mod:`atoll.federation.fleet_client`), the ServerApp's (:mod:`atoll.federation.bundled_grid`) and
:mod:`atoll.federation.superlink` this is all that touches flwr beyond its public API; a contract
test runs them against a real SuperLink. Written for flwr 1.41 (Message API, protobuf over HTTP).

    superlink_command(...) / superexec_command(...) -> Program(argv, env)
    SuperLinkAdmin(address, ca_pem): ready, register_node, unregister_node, start_run,
                                     run_status, stop_run, close
    claim_run, answer         shared by the in-process engine and the warm node
    laid_out_once             shared by the warm node and the ServerApp's grid

The SuperLink listens on loopback with TLS, admits registered node keys only, runs ServerApps
in processes of their own (``--isolation process``: a SuperExec that the hub starts polls for
them, so that an external SuperLink works alike), installs nothing at run time and sends
nothing home.
"""

import hashlib
import os
import ssl
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import httpx
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute
from flwr.supercore.task_identity import TaskIdentity

from atoll.federation import app_bundle
from atoll.federation.app_bundle import ConfigValue
from atoll.federation.errors import LinkError

_Result = TypeVar("_Result")

_QUIET: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


class Program(NamedTuple):
    """A program to start: ``env`` is laid over the parent's environment."""

    argv: list[str]
    env: dict[str, str]


class RunStatus(NamedTuple):
    """``state`` is pending, starting, running or finished.

    ``outcome`` is completed, failed or stopped once it is finished; ``detail`` may say why.
    """

    state: str
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server: its CA, certificate and key."""

    ca: Path
    certificate: Path
    key: Path


def superlink_command(host: str, port: int, tls: TlsFiles, home: Path) -> Program:
    """Return the SuperLink; ``home`` is where Flower keeps files of its own.

    Its state is in memory: with a database file each request costs it several times the time,
    and nothing in there is worth keeping. Whoever starts it registers the nodes again, and a
    run goes on from its own checkpoint and ledger.
    """
    return Program(
        [
            *(sys.executable, "-m", "atoll.federation.superlink"),
            *("--host", host, "--port", str(port)),
            *("--ssl-ca-certfile", str(tls.ca)),
            *("--ssl-certfile", str(tls.certificate)),
            *("--ssl-keyfile", str(tls.key)),
            *("--isolation", "process"),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ],
        _environment(home),
    )


def superexec_command(address: str, ca: Path, home: Path, parent_pid: int | None = None) -> Program:
    """Return the executor that starts a ServerApp's process for each run.

    ``address`` is ``host:port``. With ``parent_pid`` it ends when that process does. What
    ServerApps read from the environment is what the executor was started with.
    """
    watch = [] if parent_pid is None else ["--parent-pid", str(parent_pid)]
    return Program(
        [
            _script("flower-superexec"),
            *("--runtime-api-address", address),
            *("--root-certificates", str(ca)),
            *watch,
        ],
        {**_environment(home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"},
    )


class SuperLinkAdmin:
    """The SuperLink's Control API, which asks for no credential: it stays on loopback.

    Every method raises :class:`LinkError` when the SuperLink is away or refuses.
    """

    def __init__(self, address: str, ca_pem: bytes) -> None:
        context = ssl.create_default_context(cadata=ca_pem.decode("ascii"))
        self._address = address
        self._client = _Control(f"https://{address}", verify=context)

    def ready(self) -> bool:
        """Say whether the SuperLink answers."""
        try:
            self._client.ListRuns(ListRunsRequest(limit=1))
        except httpx.HTTPError:
            return False
        return True

    def register_node(self, public_key_pem: bytes) -> str:
        """Admit a node key (PEM, NIST curve) and return its node id (decimal uint64)."""
        request = RegisterNodeRequest(public_key=public_key_pem)
        return str(self._call(lambda: self._client.RegisterNode(request)).node_id)

    def unregister_node(self, node_id: str) -> None:
        """Shut a node out at once; one that is unknown already is no error."""
        request = UnregisterNodeRequest(node_id=int(node_id))
        try:
            self._call(lambda: self._client.UnregisterNode(request))
        except _Refusal as refusal:
            if refusal.code != ApiErrorCode.NODE_NOT_FOUND:
                raise

    def start_run(self, app: str, config: Mapping[str, ConfigValue]) -> str:
        """Start the installed ServerApp ``module:attribute`` and return Flower's run id.

        ``config`` reaches the app as ``context.run_config``.
        """
        content = app_bundle.build(app, config)
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto(dict(config)),
        )
        response = self._call(lambda: self._client.StartRun(request))
        if not response.HasField("run_id"):
            raise LinkError(f"the SuperLink at {self._address} did not start the run")
        return str(response.run_id)

    def run_status(self, run_id: str) -> RunStatus:
        """Return how a run stands; one that the SuperLink forgot at a restart has failed."""
        number = int(run_id)
        request = ListRunsRequest(run_id=number)
        try:
            status = self._call(lambda: self._client.ListRuns(request)).run_dict[number].status
        except _Refusal as refusal:
            if refusal.code != ApiErrorCode.RUN_ID_NOT_FOUND:
                raise
            return RunStatus("finished", "failed", "the SuperLink was restarted and forgot it")
        return RunStatus(status.status, status.sub_status, status.details)

    def stop_run(self, run_id: str) -> None:
        """Stop a run; one that has ended already, or that nobody knows, is no error."""
        request = StopRunRequest(run_id=int(run_id))
        try:
            self._call(lambda: self._client.StopRun(request))
        except _Refusal as refusal:
            over = {ApiErrorCode.RUN_ALREADY_FINISHED, ApiErrorCode.RUN_ID_NOT_FOUND}
            if refusal.code not in over:
                raise

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, request: Callable[[], _Result]) -> _Result:
        try:
            return request()
        except httpx.HTTPStatusError as error:
            raise _Refusal(self._address, error.response) from error
        except httpx.HTTPError as error:
            raise LinkError(
                f"the SuperLink at {self._address} cannot be reached ({error}); "
                "check that it runs and that the address is right"
            ) from error


class _Refusal(LinkError):
    def __init__(self, address: str, response: httpx.Response) -> None:
        known = FlowerError.from_json(response.text)
        self.code = known.code if known else None
        said = known.message if known else f"HTTP {response.status_code}"
        super().__init__(f"the SuperLink at {address} refused: {said}")


class _Control(ControlHttpClient):
    """The Control client without proxies from the environment: it talks to loopback."""

    def __init__(self, base_url: str, *, verify: ssl.SSLContext) -> None:
        super().__init__(base_url, verify=verify)
        self._client.close()
        self._client = httpx.Client(verify=verify, timeout=30.0, trust_env=False)


def claim_run(run_id: int) -> None:
    """Let this process build messages outside a ServerApp's process."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1


def answer(
    app: ClientApp | None,
    message: Message,
    context: Context,
    *,
    passing: tuple[type[Exception], ...] = (),
) -> Message:
    """Call a ClientApp as a node does: what it raises becomes an error reply.

    ``passing`` are exceptions that go through instead. No app is an unavailable node.
    """
    if app is None:
        return Message(
            Error(ErrorCode.NODE_UNAVAILABLE, "the device is not connected"), reply_to=message
        )
    try:
        return app(message, context)
    except passing:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a task raises is the device's answer
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


@contextmanager
def laid_out_once(messages: Sequence[Message]) -> Iterator[None]:
    """Let the records of ``messages`` be laid out as bytes, and hashed, once within the block.

    A message's parts are named by their hashes, each parent's of its children's. flwr lays a
    record out for each that asks for its name, and again to be sent.
    """
    contents = [message.content for message in messages if message.has_content()]
    records = {id(record): record for content in contents for record in content.values()}
    with no_object_id_recompute():
        try:
            for record in records.values():
                record.__dict__["deflate"] = partial(bytes, record.deflate())
            yield
        finally:
            for record in records.values():
                record.__dict__.pop("deflate", None)


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def _environment(home: Path) -> dict[str, str]:
    """Return what every Flower process gets; the executor finds ``flwr-serverapp`` by PATH."""
    scripts = sysconfig.get_path("scripts")
    local = [os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost"]
    no_proxy = ",".join(part for part in local if part)
    return {
        **_QUIET,
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }
