"""What every sum protocol must do; tests/privacy runs it for each of them.

A cohort here is real: certificates from a real authority, both sides as the hub and the
devices use them. Only the network between is a loop, which can lose and change replies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.fleet.authority import Authority
from atoll.fleet.identity import Identity, Peer, peer_of
from atoll.privacy.errors import Refused, SumFailed, TooFewSurvivors
from atoll.privacy.modes import HubSession, PartyIdentity, hub_session, party_session
from atoll.privacy.sums import (
    CONTRIBUTE,
    Ask,
    HubSum,
    Integers,
    PartySum,
    RoundKey,
    SumSpec,
    Total,
)

NOW = datetime(2026, 3, 1, tzinfo=UTC)
NAMES = tuple(f"device-{number}" for number in range(5))

OTHER_PHASES = ("deal", "advertise", "share", "agree", "decrypt", "unmask")

Lost = Callable[[str, str], bool]
"""Whether a party's reply to a phase is lost."""


def nothing_lost(phase: str, party: str) -> bool:
    return False


@dataclass(frozen=True)
class Fleet:
    """An authority and the devices it certified."""

    certificates: Mapping[str, bytes]
    identities: Mapping[str, PartyIdentity]


@cache
def fleet(hub: str = "hub", names: tuple[str, ...] = NAMES) -> Fleet:
    authority = Authority.create(hub, NOW)

    def peer(certificate: bytes) -> Peer:
        return peer_of(certificate, authority.cert_pem, NOW)

    certificates, identities = {}, {}
    for name in names:
        keys = Identity.new()
        certificates[name] = authority.issue_device(keys.csr(name), name, NOW, timedelta(days=1))
        identities[name] = PartyIdentity(name, keys.key, keys.seal, peer)
    return Fleet(certificates, identities)


class Cohort:
    """The hub's session and the parties of one plan."""

    def __init__(self, mode: str, size: int = 3) -> None:
        self.mode = mode
        self.names = (
            NAMES[:size] if size <= len(NAMES) else tuple(map("device-{}".format, range(size)))
        )
        self.fleet = fleet() if size <= len(NAMES) else fleet("hub", self.names)
        self.roster = {name: self.fleet.certificates[name] for name in self.names}
        self.session: HubSession = hub_session(mode, self.roster)
        self.parties: dict[str, PartySum] = {}
        for name in self.names:
            self.restart(name)

    def restart(self, name: str) -> None:
        self.parties[name] = party_session(self.mode, self.fleet.identities[name])

    def spec(self, length: int = 5, bound: int = 100, round_: int = 1, min_: int = 2) -> SumSpec:
        return SumSpec(RoundKey("run", round_), length, bound, len(self.names), min_)

    def open(self, spec: SumSpec) -> HubSum:
        return self.session.open(spec, self.names)

    def ask(
        self, hub: HubSum, spec: SumSpec, ask: Ask, terms: Mapping[str, Integers], lost: Lost
    ) -> dict[str, bytes]:
        """Carry one phase; return the replies that arrived."""
        replies = {}
        for party, payload in ask.payloads.items():
            if lost(ask.phase, party):
                continue
            term = terms[party] if ask.phase == CONTRIBUTE else None
            replies[party] = self.parties[party].answer(spec, ask.phase, payload, term)
            hub.receive(party, replies[party])
        return replies

    def until(
        self, phase: str, spec: SumSpec, terms: Mapping[str, Integers], lost: Lost = nothing_lost
    ) -> tuple[HubSum, Ask]:
        """Run a sum up to, and not into, ``phase``."""
        hub = self.open(spec)
        step: Ask | Total = hub.start()
        while isinstance(step, Ask) and step.phase != phase:
            self.ask(hub, spec, step, terms, lost)
            step = hub.advance()
        assert isinstance(step, Ask), f"the sum never came to {phase}"
        return hub, step

    def finish(
        self,
        hub: HubSum,
        spec: SumSpec,
        step: Ask | Total,
        terms: Mapping[str, Integers],
        lost: Lost = nothing_lost,
    ) -> Total:
        while isinstance(step, Ask):
            self.ask(hub, spec, step, terms, lost)
            step = hub.advance()
        return step

    def sum(self, spec: SumSpec, terms: Mapping[str, Integers], lost: Lost = nothing_lost) -> Total:
        hub = self.open(spec)
        return self.finish(hub, spec, hub.start(), terms, lost)


def terms_of(names: Sequence[str], spec: SumSpec, seed: int = 0) -> dict[str, Integers]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(-spec.bound, spec.bound, spec.length, endpoint=True) for name in names
    }


def expected(terms: Mapping[str, Integers], names: Sequence[str]) -> list[int]:
    return np.sum([terms[name] for name in names], axis=0).tolist()


def _modestly(max_examples: int) -> settings:
    # Each protocol is a subclass, so one property runs from several classes, as it should.
    return settings(
        max_examples=max_examples,
        suppress_health_check=[HealthCheck.differing_executors],
    )


class SumContract:
    """Subclass with ``mode`` set."""

    mode: str

    @pytest.fixture
    def cohort(self) -> Cohort:
        return Cohort(self.mode)

    @given(st.data())
    @_modestly(max_examples=25)
    def test_equals_the_plain_sum_for_any_values_lengths_and_parties(self, data):
        size = data.draw(st.integers(2, len(NAMES)))
        bound = data.draw(st.sampled_from([1, 7, 127, 128, 40_000, 2**31, 2**42]))
        length = data.draw(st.sampled_from([1, 2, 17, 4095, 8190, 8191]))
        cohort = Cohort(self.mode, size)
        spec = cohort.spec(length, bound)
        kind = data.draw(st.sampled_from(["random", "lowest", "highest"]))
        terms = terms_of(cohort.names, spec, data.draw(st.integers(0, 2**32)))
        if kind != "random":
            edge = -bound if kind == "lowest" else bound
            terms = {name: np.full(length, edge) for name in cohort.names}
        total = cohort.sum(spec, terms)
        assert total.values.dtype == np.int64
        assert total.values.tolist() == expected(terms, cohort.names)
        assert list(total.survivors) == list(cohort.names)

    def test_a_party_lost_while_contributing_is_left_out(self, cohort):
        spec = cohort.spec()
        terms = terms_of(cohort.names, spec)
        total = cohort.sum(
            spec, terms, lambda phase, party: (phase, party) == (CONTRIBUTE, NAMES[1])
        )
        assert list(total.survivors) == [NAMES[0], NAMES[2]]
        assert total.values.tolist() == expected(terms, total.survivors)

    def test_below_the_minimum_nothing_is_decoded(self, cohort):
        spec = cohort.spec(min_=3)
        with pytest.raises(TooFewSurvivors, match="2 of the devices answered"):
            cohort.sum(
                spec,
                terms_of(cohort.names, spec),
                lambda phase, party: (phase, party) == (CONTRIBUTE, NAMES[1]),
            )

    def test_nobody_answering_is_a_failed_sum_and_the_next_round_works(self, cohort):
        spec = cohort.spec()
        with pytest.raises(SumFailed):
            cohort.sum(spec, terms_of(cohort.names, spec), lambda _, __: True)
        later = cohort.spec(round_=2)
        terms = terms_of(cohort.names, later)
        assert cohort.sum(later, terms).values.tolist() == expected(terms, cohort.names)

    def test_a_repeated_reply_is_refused_and_counted_once(self, cohort):
        spec = cohort.spec()
        terms = terms_of(cohort.names, spec)
        hub, ask = cohort.until(CONTRIBUTE, spec, terms)
        replies = cohort.ask(hub, spec, ask, terms, nothing_lost)
        with pytest.raises(Refused):
            hub.receive(NAMES[0], replies[NAMES[0]])
        total = cohort.finish(hub, spec, hub.advance(), terms)
        assert total.values.tolist() == expected(terms, cohort.names)

    def test_another_rounds_reply_is_refused(self, cohort):
        first, second = cohort.spec(), cohort.spec(round_=2)
        terms = terms_of(cohort.names, first)
        hub, ask = cohort.until(CONTRIBUTE, first, terms)
        old = cohort.ask(hub, first, ask, terms, nothing_lost)
        cohort.finish(hub, first, hub.advance(), terms)
        hub, _ = cohort.until(CONTRIBUTE, second, terms)
        with pytest.raises(Refused):
            hub.receive(NAMES[0], old[NAMES[0]])

    def test_another_partys_reply_is_refused(self, cohort):
        spec = cohort.spec()
        terms = terms_of(cohort.names, spec)
        hub, ask = cohort.until(CONTRIBUTE, spec, terms)
        mine = cohort.parties[NAMES[0]].answer(
            spec, CONTRIBUTE, ask.payloads[NAMES[0]], terms[NAMES[0]]
        )
        with pytest.raises(Refused):
            hub.receive(NAMES[1], mine)
        with pytest.raises(Refused):
            hub.receive("stranger", mine)

    @given(st.data())
    @_modestly(max_examples=40)
    def test_garbage_is_refused_and_the_sum_goes_on_without_it(self, data):
        cohort = Cohort(self.mode)
        spec = cohort.spec()
        terms = terms_of(cohort.names, spec)
        hub, ask = cohort.until(CONTRIBUTE, spec, terms)
        good = cohort.parties[NAMES[2]].answer(
            spec, CONTRIBUTE, ask.payloads[NAMES[2]], terms[NAMES[2]]
        )
        garbage = data.draw(
            st.one_of(
                st.binary(max_size=200),
                # A signature in it, and so its length, is another each time.
                st.integers(0, 9999).map(lambda end: good[: end % len(good)]),
                st.binary(min_size=1, max_size=20).map(lambda tail: good + tail),
                st.just(good[:4] + b"\xff" * (len(good) - 4)),
            )
        )
        with pytest.raises(Refused):
            hub.receive(NAMES[2], garbage)
        two = {name: terms[name] for name in NAMES[:2]}
        cohort.ask(hub, spec, ask, two, lambda _, party: party == NAMES[2])
        total = cohort.finish(hub, spec, hub.advance(), terms)
        assert total.values.tolist() == expected(terms, NAMES[:2])

    @given(garbage=st.binary(max_size=200))
    @_modestly(max_examples=40)
    def test_a_party_refuses_garbage(self, garbage):
        cohort = Cohort(self.mode)
        spec = cohort.spec()
        for phase in (CONTRIBUTE, *OTHER_PHASES, "no-such-phase"):
            with pytest.raises(Refused):
                cohort.parties[NAMES[0]].answer(
                    spec, phase, garbage, terms_of(NAMES, spec)[NAMES[0]]
                )

    def test_a_party_answers_the_same_question_with_the_same_bytes(self, cohort):
        spec = cohort.spec()
        terms = terms_of(cohort.names, spec)
        _, ask = cohort.until(CONTRIBUTE, spec, terms)
        party, payload = cohort.parties[NAMES[0]], ask.payloads[NAMES[0]]
        first = party.answer(spec, CONTRIBUTE, payload, terms[NAMES[0]])
        assert party.answer(spec, CONTRIBUTE, payload, -terms[NAMES[0]]) == first

    def test_a_party_gives_no_second_term_for_a_round_that_looks_different(self, cohort):
        spec = cohort.spec()
        terms = terms_of(cohort.names, spec)
        _, ask = cohort.until(CONTRIBUTE, spec, terms)
        party, payload = cohort.parties[NAMES[0]], ask.payloads[NAMES[0]]
        party.answer(spec, CONTRIBUTE, payload, terms[NAMES[0]])
        with pytest.raises(Refused, match="answered already"):
            party.answer(cohort.spec(min_=3), CONTRIBUTE, payload, terms[NAMES[0]])

    @pytest.mark.parametrize(
        "term",
        [
            None,
            np.zeros(4, dtype=np.int64),
            np.zeros((5, 1), dtype=np.int64),
            np.zeros(5, dtype=np.int32),
            np.array([0, 0, 0, 0, 101]),
            np.array([0, 0, 0, 0, -101]),
        ],
        ids=["none", "short", "two axes", "int32", "above the bound", "below the bound"],
    )
    def test_a_term_outside_what_was_agreed_never_leaves(self, cohort, term):
        spec = cohort.spec()
        _, ask = cohort.until(CONTRIBUTE, spec, terms_of(cohort.names, spec))
        with pytest.raises(Refused):
            cohort.parties[NAMES[0]].answer(spec, CONTRIBUTE, ask.payloads[NAMES[0]], term)

    def test_a_hub_that_restarts_goes_on(self, cohort):
        spec = cohort.spec()
        cohort.sum(spec, terms_of(cohort.names, spec))
        kept = cohort.session.dump()
        cohort.session = hub_session(self.mode, cohort.roster)
        cohort.session.load(kept)
        later = cohort.spec(round_=2)
        terms = terms_of(cohort.names, later)
        assert cohort.sum(later, terms).values.tolist() == expected(terms, cohort.names)

    def test_nothing_can_be_asked_of_a_sum_that_is_over(self, cohort):
        spec = cohort.spec()
        terms = terms_of(cohort.names, spec)
        hub = cohort.open(spec)
        cohort.finish(hub, spec, hub.start(), terms)
        with pytest.raises(SumFailed):
            hub.advance()
        with pytest.raises(Refused):
            hub.receive(NAMES[0], b"")
