"""Cohorts of in-process devices with real identities and the real sums."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from blobs import Blobs, write
from flwr.clientapp import ClientApp

from atoll.federation import client_app, layout, plan, rounds
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort, Member
from atoll.federation.engine import InProcessGrid
from atoll.federation.kept import Kept
from atoll.federation.progress import Outcome
from atoll.federation.run import RoundReport, Run
from atoll.federation.running_statistics import Running
from atoll.federation.selection import LeftOut
from atoll.fleet.identity import Authority, Identity, peer_of
from atoll.privacy.keystream import Keystream
from atoll.privacy.modes import PartyIdentity, hub_session, party_session
from atoll.privacy.sums import PartySum

PLAN = """
name = "test"
task = "blobs"
model = "blobs"
rounds = {rounds}
seed = 7
training = {{ learning_rate = 0.1, batch_size = 16, server_momentum = 0.5, averaged_rounds = 3 }}
cohort = {{ min_devices = {least}, round_timeout = 60 }}
privacy = {{ mode = "{mode}", clip_norm = 2.0, noise_multiplier = {noise} }}
"""


def plan_of(mode: str = "plain", count: int = 3, least: int = 2, noise: float = 0.0) -> plan.Plan:
    return plan.loads(PLAN.format(mode=mode, rounds=count, least=least, noise=noise))


def varied(the_plan: plan.Plan, **sections: Mapping[str, object]) -> plan.Plan:
    """Return the plan with fields of its sections replaced."""
    return msgspec.structs.replace(
        the_plan,
        **{
            name: msgspec.structs.replace(getattr(the_plan, name), **fields)
            for name, fields in sections.items()
        },
    )


@dataclass
class Fleet:
    """Devices in this process: their apps by node id, and the cohort that they make."""

    grid: InProcessGrid
    cohort: Cohort

    def of(
        self,
        the_plan: plan.Plan,
        *,
        run: str = "run",
        charge: Callable[[int], float | None] = lambda _: None,
        on_round: Callable[[RoundReport], None] = lambda _: None,
        checkpoints: Checkpoints | None = None,
        entropy: Keystream | None = None,
        left_out: LeftOut | None = None,
        frozen: str = "",
        running: Running | None = None,
    ) -> Run:
        """Return a run of the plan by these devices."""
        return Run(
            self.grid,
            the_plan,
            self.cohort,
            name=run,
            session=hub_session(the_plan.privacy.mode, self.cohort.roster),
            charge=lambda number, _: charge(number),
            on_round=on_round,
            checkpoints=checkpoints,
            clock=self.grid.clock,
            entropy=entropy or Keystream.fresh(),
            left_out=left_out,
            frozen=frozen,
            running=running,
        )

    def run(self, the_plan: plan.Plan, *, task: Blobs | None = None, **more: Any) -> Outcome:
        shape = layout.of(task or Blobs(), the_plan.seed, the_plan.layers)
        run = self.of(the_plan, frozen=shape.frozen, running=shape.running, **more)
        return rounds.run_rounds(run, shape.initial)


def fleet(
    folder: Path,
    devices: int,
    tasks: Mapping[str, Blobs] | None = None,
    sums: Callable[[str, PartySum], PartySum] = lambda _, party: party,
    floors: Mapping[str, client_app.Floor] = {},
    kept: Mapping[str, Kept] = {},
    grid: Callable[[Mapping[int, ClientApp]], InProcessGrid] = InProcessGrid,
) -> Fleet:
    """Return a fleet of ``devices``: all train, all evaluate."""
    now = datetime.now(UTC)
    authority = Authority.create("Atoll test", now)
    apps, members = {}, {}
    for number in range(1, devices + 1):
        name = f"device-{number}"
        mine = Identity.new()
        members[name] = Member(
            number, authority.issue_device(mine.csr(name), name, datetime.now(UTC))
        )
        me = PartyIdentity(
            name,
            mine.key,
            mine.seal,
            lambda pem: peer_of(pem, authority.cert_pem, datetime.now(UTC)),
        )
        apps[number] = client_app.build(
            (tasks or {}).get(name, Blobs()),
            write(folder / name, number),
            lambda mode, me=me, name=name: sums(name, party_session(mode, me)),
            {"echo": bytes.upper},
            floor=floors.get(name, client_app.NO_FLOOR),
            kept=kept.get(name),
        )
    cohort = Cohort(members, sorted(members), sorted(members))
    return Fleet(grid(apps), cohort)
