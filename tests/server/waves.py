"""A task of three kinds of wave, small enough to train in a second, and a fleet that holds it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from atoll.edge_agent.queries import handlers
from atoll.edge_agent.trainer import examples
from atoll.federation import client_app
from atoll.federation import plan as plans
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort, Member
from atoll.federation.engine import InProcessGrid
from atoll.federation.errors import DataMissing
from atoll.federation.plan import Plan
from atoll.federation.task import Examples, Split
from atoll.fleet.authority import Authority
from atoll.fleet.identity import Identity, peer_of
from atoll.privacy.ledger import Ledger, MemoryStore
from atoll.privacy.modes import PartyIdentity, hub_session, party_session
from atoll.server import pipeline
from atoll.server.recording import MemoryRecorder

LENGTH = 32
PLAN = """
name = "waves"
task = "waves"
model = "waves"
rounds = {rounds}
seed = 3
training = {{ learning_rate = 0.1, batch_size = 16, local_epochs = 2 }}
cohort = {{ min_devices = {least}, round_timeout = 30 }}
privacy = {{ mode = "{mode}", clip_norm = 4.0, noise_multiplier = {noise}{more} }}
"""


class Waves:
    """Which of three frequencies two noisy channels carry."""

    name = "waves"
    input_shape = (2, LENGTH)
    channels = ("a", "b")
    classes = ("slow", "middle", "fast")

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv1d(2, 12, 7, padding=3),
                nn.ReLU(),
                nn.Conv1d(12, 12, 5, stride=2, padding=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool1d(4),
                nn.Flatten(),
                nn.Linear(48, 3),
            )

    def load(self, data: Path, split: Split) -> Examples:
        try:
            with np.load(data / "waves.npz") as held:
                return Examples(held[f"{split}_x"], held[f"{split}_y"])
        except FileNotFoundError:
            raise DataMissing(f"no waves in {data}") from None


def write(data: Path, seed: int, rows: int = 120) -> None:
    rng = np.random.default_rng(seed)
    arrays = {}
    for split in ("train", "test"):
        y = rng.integers(0, 3, rows)
        phase = rng.uniform(0, 2 * np.pi, (rows, 2, 1))
        t = np.arange(LENGTH) / LENGTH
        x = np.sin(2 * np.pi * (2 + 3 * y[:, None, None]) * t + phase)
        x += rng.normal(0, 0.3, x.shape) + seed / 10
        arrays[f"{split}_x"], arrays[f"{split}_y"] = x.astype(np.float32), y.astype(np.int64)
    data.mkdir(parents=True)
    np.savez(data / "waves.npz", **arrays)


def plan_of(
    *, mode: str = "plain", rounds: int = 4, least: int = 2, noise: float = 0.0, more: str = ""
) -> Plan:
    text = PLAN.format(mode=mode, rounds=rounds, least=least, noise=noise, more=more)
    return plans.loads(text)


@dataclass
class Fleet:
    """Devices in this process; the last ``unseen`` of them only evaluate."""

    root: Path
    count: int = 4
    unseen: int = 1
    altered: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    """Query handlers that ``device-1`` and ``device-2`` have instead of the sound ones."""
    task: Waves = field(default_factory=Waves)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        authority = Authority.create("Atoll test", now)
        apps, members = {}, {}
        for number in range(1, self.count + 1):
            name, mine = f"device-{number}", Identity.new()
            certificate = authority.issue_device(mine.csr(name), name, now)
            members[name] = Member(number, certificate)
            data = self.root / name
            write(data, number)
            me = PartyIdentity(
                name,
                mine.key,
                mine.seal,
                lambda pem: peer_of(pem, authority.cert_pem, datetime.now(UTC)),
            )
            sound = handlers(examples(self.task, data))
            answers = dict(sound) | (self.altered if number <= 2 else {})
            apps[number] = client_app.build(
                self.task, data, lambda mode, me=me: party_session(mode, me), answers
            )
        names = list(members)
        self.grid = InProcessGrid(apps)
        self.cohort = Cohort(members, names[: self.count - self.unseen], names, self.labels)

    def run(
        self,
        plan: Plan,
        recorder: MemoryRecorder | None = None,
        store: MemoryStore | None = None,
        examples: Ledger | None = None,
        run: str = "run1",
        checkpoints: Checkpoints | None = None,
    ) -> pipeline.Result:
        job = pipeline.Job(
            self.grid, plan, self.cohort, self.task, run, 1000.0, clock=self.grid.clock
        )
        return pipeline.run(
            job,
            session=hub_session(plan.privacy.mode, self.cohort.roster),
            ledger=Ledger(
                store or MemoryStore(),
                plan.model,
                plan.privacy.budget_epsilon,
                plan.privacy.delta,
            ),
            recorder=recorder or MemoryRecorder(),
            out=self.root / "candidate",
            checkpoints=checkpoints,
            examples=examples,
        )
