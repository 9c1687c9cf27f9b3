"""The training process: ``python -m atoll.edge_agent.trainer``, a child of the control process.

The one file of the agent that knows federation and privacy. It runs a warm Flower node with
the ClientApp of an *installed* task over this device's own data; the hub sends weights and
numbers, never code. It runs while a training window is open and ends when its parent says so
or is gone. Torch is imported when a first round is there to be trained, unless the task's own
module does so: a process that waits, or answers queries, does without.
"""

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from atoll.edge_agent import credentials
from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import AgentError
from atoll.edge_agent.facts import bucket
from atoll.edge_agent.parent import Parent
from atoll.edge_agent.paths import Paths
from atoll.edge_agent.queries import Rows, handlers
from atoll.federation import client_app, task
from atoll.federation.errors import DataMissing, FederationError
from atoll.federation.kept import KeptFiles
from atoll.federation.warm_node import WarmNode
from atoll.fleet.errors import FleetError
from atoll.fleet.identity import Identity, Peer, peer_of
from atoll.fleet.queries import Split
from atoll.privacy.errors import Refused
from atoll.privacy.modes import PartyIdentity, party_session
from atoll.privacy.sums import PartySum

END_SECONDS: Final = 6.0
"""How long a round under way may take to end once we are told to."""


def choose(name: str | None, data: Path) -> task.Task:
    """Return the task to train: ``name``, or else the first installed one that finds its data.

    Raises :class:`FederationError` or :class:`AgentError` when there is none.
    """
    if name is not None:
        return task.find(name)
    names = sorted(entry_points(group="atoll.tasks").names)
    for one in names:
        found = task.find(one)
        try:
            found.load(data, "train")
        except DataMissing:
            continue
        return found
    raise AgentError(
        f"no installed task ({', '.join(names) or 'none'}) finds examples in {data}: put this "
        "device's data there, or install the package of its task"
    )


def examples(of: task.Task, data: Path) -> Callable[[Split], Rows]:
    """Return a function that reads a split once and keeps it."""
    kept: dict[str, Rows] = {}

    def read(split: Split) -> Rows:
        if split not in kept:
            loaded = of.load(data, split)
            groups = of.groups if isinstance(of, task.Grouped) else ()
            found = task.groups_of(of, data, split, len(loaded.y))
            kept[split] = Rows(loaded.x, loaded.y, found, len(groups))
        return kept[split]

    return read


def party_of(
    paths: Paths, who: credentials.Credentials, *, allow_plain: bool
) -> Callable[[str], PartySum]:
    """Return what makes this device's side of a private sum from a mode's name.

    A hub may ask for any mode; whether it may see this device's own update is for the device
    to say, so ``plain`` is refused with :class:`Refused` unless ``allow_plain``.
    """
    identity = Identity.load(paths.identity)
    ca = who.ca.read_bytes()

    def peer(certificate: bytes) -> Peer:
        return peer_of(certificate, ca, datetime.now(UTC))

    me = PartyIdentity(who.hub.device, identity.key, identity.seal, peer)

    def party(mode: str) -> PartySum:
        if mode == "plain" and not allow_plain:
            raise Refused(
                "this device does not send updates in the clear; start its agent with "
                "--allow-plain, or run the plan with privacy.mode = 'secagg'"
            )
        return party_session(mode, me)

    return party


class AnsweredDurably:
    """The last round answered of each run, in the device's database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def last(self, run: str) -> int:
        """Return the number of that round; 0 for none."""
        return self._database.get(f"answered:{run}", int) or 0

    def note(self, run: str, number: int) -> None:
        """Remember a round, durably."""
        self._database.put(f"answered:{run}", number)


def run(
    paths: Paths,
    name: str | None,
    parent: Parent,
    stop: threading.Event,
    *,
    allow_plain: bool,
    floor: client_app.Floor,
) -> None:
    """Serve Flower messages until ``stop``; raises :class:`AgentError` and its neighbours."""
    who = credentials.load(paths)
    chosen = choose(name, paths.examples)
    source = examples(chosen, paths.examples)
    party = party_of(paths, who, allow_plain=allow_plain)
    answered = AnsweredDurably(Database(paths.database))
    kept = KeptFiles(paths.kept)
    app = client_app.build(chosen, paths.examples, party, handlers(source), answered, floor, kept)
    node = WarmNode(who.hub.url, ca=who.ca, certificate=who.certificate, key=who.key)
    parent.tell({"kind": "up"})
    with suppress(FederationError):  # without examples there is nothing to count
        parent.tell({"kind": "counted", "examples": bucket(len(source("train").y))})
    node.serve(app, stop)


def main(arguments: list[str] | None = None) -> int:
    """Run the training process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task")
    parser.add_argument("--allow-plain", action="store_true")
    parser.add_argument("--least-noise", type=float, default=0.0)
    parser.add_argument("--least-devices", type=int, default=1)
    given = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    # Heeded by torch when a first round loads it; until then the process is half as large.
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = Parent()
    stop = threading.Event()

    def end() -> None:
        stop.set()
        # A local epoch cannot be interrupted; the hub counts us as dropped out.
        watchdog = threading.Timer(END_SECONDS, os._exit, [0])
        watchdog.daemon = True
        watchdog.start()

    parent.listen(lambda _: None, end)
    try:
        run(
            Paths(given.data),
            given.task,
            parent,
            stop,
            allow_plain=given.allow_plain,
            floor=client_app.Floor(given.least_noise, given.least_devices),
        )
    except (AgentError, FleetError, FederationError) as error:
        parent.tell({"kind": "failed", "error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
