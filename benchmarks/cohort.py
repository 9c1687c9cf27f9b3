"""A cohort whose private sums can be measured: real certificates, real terms, three processes.

The hub, one device and all other devices each run in a process of their own, so that what the
hub or the device occupies is theirs alone. Every device gives a real term and the sum is
checked, integer by integer. Works for any mode there is: the cohort knows phases only by what
the hub asks.

Rounds follow each other, as in a plan, and are numbered so that in the last one turns start with
the first device: where a mode has few devices open a sum, it is one of them then.
"""

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from atoll.fleet.authority import Authority
from atoll.fleet.certificates import private_pem
from atoll.fleet.identity import Identity, Peer, peer_of
from atoll.privacy.modes import PartyIdentity, hub_session, party_session
from atoll.privacy.sums import CONTRIBUTE, Ask, HubSum, Integers, RoundKey, SumSpec, Total
from benchmarks import process

NOW: Final = datetime(2026, 3, 1, tzinfo=UTC)
RUN: Final = "benchmark"


@dataclass(frozen=True, slots=True)
class Case:
    """A sum to measure: values in ``±bound``; ``rounds`` of it once keys are set up."""

    mode: str
    parameters: int
    devices: int
    bound: int
    survivors: int
    rounds: int

    @property
    def names(self) -> list[str]:
        """The devices."""
        return [f"device-{number:04}" for number in range(self.devices)]

    def spec(self, turn: int) -> SumSpec:
        """Return the sum of a round; that of turn 0 has one parameter and sets up the keys."""
        length = self.parameters if turn else 1
        key = RoundKey(RUN, (self.rounds // self.devices + 1) * self.devices - self.rounds + turn)
        return SumSpec(key, length, self.bound, self.devices, self.survivors)


@dataclass(frozen=True, slots=True)
class Certified:
    """A device's keys and certificate, as bytes that can go to another process."""

    key: bytes
    seal: bytes
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Register:
    """Who was certified, and by whom."""

    authority: bytes
    devices: Mapping[str, Certified]

    @property
    def roster(self) -> dict[str, bytes]:
        """Every device's certificate."""
        return {name: device.certificate for name, device in self.devices.items()}

    def identity(self, name: str) -> PartyIdentity:
        """Return what ``name`` knows of itself and can tell of others."""
        key = load_pem_private_key(self.devices[name].key, None)
        seal = load_pem_private_key(self.devices[name].seal, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(seal, X25519PrivateKey)

        def peer(certificate: bytes) -> Peer:
            return peer_of(certificate, self.authority, NOW)

        return PartyIdentity(name, key, seal, peer)


@cache
def enrol(names: tuple[str, ...]) -> Register:
    """Certify devices."""
    authority = Authority.create("hub", NOW)
    devices = {}
    for name in names:
        keys = Identity.new()
        certificate = authority.issue_device(keys.csr(name), name, NOW, timedelta(days=1))
        devices[name] = Certified(private_pem(keys.key), private_pem(keys.seal), certificate)
    return Register(authority.cert_pem, devices)


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase took of a device that was asked in it.

    ``seconds`` of CPU time, the least of all such devices and rounds; bytes ``up`` and
    ``down``, the most of any device, and ``mean_up`` and ``mean_down`` over all devices of the
    cohort, asked or not.
    """

    seconds: float
    up: int
    down: int
    mean_up: float
    mean_down: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a sum took.

    ``setup`` and ``phases`` by phase: of the round that set up the keys, and of those after it.
    ``receive`` is what folding one contribution into others took the hub and ``rest`` all else
    it did in a round: seconds of CPU time, the least of all rounds. ``hub_peak`` and
    ``device_peak`` are bytes of resident memory over what the process took when its imports
    were done; the device's include its payload and its term of 8 bytes a parameter.
    """

    setup: Mapping[str, Phase]
    phases: Mapping[str, Phase]
    receive: float
    rest: float
    hub_peak: int
    device_peak: int


def measure(case: Case) -> Measured:
    """Run the sums of ``case``, and check every one of them."""
    register = enrol(tuple(case.names))
    first, *others = case.names
    with (
        _process(_hub, case, register) as hub,
        _process(_devices, case, register, [first]) as device,
        _process(_devices, case, register, others) as rest,
    ):
        devices = {**dict.fromkeys(others, rest), first: device}
        setup, *rounds = [_round(case, turn, hub, devices) for turn in range(case.rounds + 1)]
    every = [setup, *rounds]
    return Measured(
        _phases([setup], case.devices),
        _phases(rounds, case.devices),
        min(seconds for round_ in rounds for seconds in round_.receive),
        min(round_.rest for round_ in rounds),
        max(round_.hub_peak for round_ in every),
        max(round_.device_peak for round_ in every),
    )


@dataclass(slots=True)
class _Answer:
    """What one device did in one phase."""

    seconds: float
    up: int
    down: int


@dataclass(slots=True)
class _Round:
    """What was measured in one round."""

    answers: dict[str, list[_Answer]] = field(default_factory=lambda: defaultdict(list))
    receive: list[float] = field(default_factory=list)
    rest: float = 0.0
    hub_peak: int = 0
    device_peak: int = 0


def _round(case: Case, turn: int, hub: "Remote", devices: Mapping[str, "Remote"]) -> _Round:
    spec, first, measured = case.spec(turn), case.names[0], _Round()

    def of_hub(*call: object) -> tuple[Any, float]:
        result, seconds, grown = hub(*call)
        measured.hub_peak = max(measured.hub_peak, grown)
        return result, seconds

    step: Ask | Total
    step, seconds = of_hub("open", spec)
    measured.rest += seconds
    while isinstance(step, Ask):
        for place, (party, payload) in enumerate(step.payloads.items()):
            reply, seconds, grown = devices[party](turn, spec, step.phase, party, payload)
            measured.answers[step.phase].append(_Answer(seconds, len(reply), len(payload)))
            if party == first:
                measured.device_peak = max(measured.device_peak, grown)
            _, seconds = of_hub("receive", party, reply)
            if step.phase != CONTRIBUTE:
                measured.rest += seconds
            elif place:  # the first contribution is added to nothing
                measured.receive.append(seconds)
        step, seconds = of_hub("advance")
        measured.rest += seconds
    check(case, turn, step)
    return measured


def check(case: Case, turn: int, total: Total) -> None:
    """Raise :class:`AssertionError` unless ``total`` is the sum of every device's term."""
    wanted = np.zeros(total.values.size, dtype=np.int64)
    for party in case.names:
        wanted += term(case, turn, party)
    assert list(total.survivors) == case.names, f"a sum without some of the devices in {case}"
    assert np.array_equal(total.values, wanted), f"a wrong sum in {case}"


def _phases(rounds: Sequence[_Round], devices: int) -> dict[str, Phase]:
    return {
        phase: Phase(
            min(answer.seconds for round_ in rounds for answer in round_.answers[phase]),
            max(answer.up for answer in answers),
            max(answer.down for answer in answers),
            sum(answer.up for answer in answers) / devices,
            sum(answer.down for answer in answers) / devices,
        )
        for phase, answers in rounds[-1].answers.items()
    }


def term(case: Case, turn: int, party: str) -> Integers:
    """Return the term of ``party``."""
    rng = np.random.default_rng([turn, case.names.index(party)])
    return rng.integers(-case.bound, case.bound, case.spec(turn).length, endpoint=True)


Remote = Callable[..., tuple[Any, float, int]]
"""Does something in another process; returns the result, the CPU time and the memory it took."""


@contextmanager
def _process(serve: Callable[..., None], *arguments: object) -> Iterator[Remote]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs, *arguments))
    child.start()
    theirs.close()

    def call(*arguments: object) -> tuple[Any, float, int]:
        ours.send(arguments)
        answer: tuple[Any, float, int] = ours.recv()
        return answer

    try:
        yield call
    finally:
        ours.close()
        child.join()


def _hub(connection: "Connection[Any, Any]", case: Case, register: Register) -> None:
    session = hub_session(case.mode, register.roster)
    base = process.resident()
    hub: HubSum

    def start(spec: SumSpec) -> Ask:
        nonlocal hub
        hub = session.open(spec, case.names)
        return hub.start()

    for name, *arguments in _received(connection):
        call = start if name == "open" else getattr(hub, name)
        connection.send(_measured(base, partial(call, *arguments)))


def _devices(
    connection: "Connection[Any, Any]", case: Case, register: Register, names: Sequence[str]
) -> None:
    parties = {name: party_session(case.mode, register.identity(name)) for name in names}
    base = process.resident()
    for turn, spec, phase, party, payload in _received(connection):
        values = term(case, turn, party) if phase == CONTRIBUTE else None
        answer = partial(parties[party].answer, spec, phase, payload, values)
        connection.send(_measured(base, answer))


def _received(connection: "Connection[Any, Any]") -> Iterator[Any]:
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def _measured(base: int, function: Callable[[], Any]) -> tuple[Any, float, int]:
    (result, seconds), peak = process.peak(lambda: process.cpu_time(function))
    return result, seconds, peak - base
