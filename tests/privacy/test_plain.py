"""The plain sum keeps the contract."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sum_protocol import NAMES, Cohort, SumContract, terms_of

from atoll.privacy import frames
from atoll.privacy.errors import Refused, TooFewSurvivors
from atoll.privacy.plain import PlainHubSession
from atoll.privacy.sums import CONTRIBUTE


class TestPlain(SumContract):
    mode = "plain"


def test_terms_travel_in_the_narrowest_integers_that_hold_the_bound():
    sizes = []
    for bound in (127, 32_767, 32_768, 2**40):
        cohort = Cohort("plain")
        spec = cohort.spec(length=1000, bound=bound)
        terms = terms_of(cohort.names, spec)
        _, ask = cohort.until(CONTRIBUTE, spec, terms)
        reply = cohort.parties[NAMES[0]].answer(
            spec, CONTRIBUTE, ask.payloads[NAMES[0]], terms[NAMES[0]]
        )
        sizes.append(len(reply) // 1000)
    assert sizes == [1, 2, 4, 8]


class Collecting(Cohort):
    """Opens sums that keep their terms."""

    def open(self, spec):
        return PlainHubSession().collect(spec, self.names)


@given(st.integers(0, 2**32), st.sets(st.sampled_from(NAMES[:3]), max_size=1), st.data())
def test_a_collected_sum_is_the_same_sum_with_the_survivors_terms_beside_it(seed, lost, data):
    cohort = Collecting("plain")
    spec = cohort.spec(length=7, bound=data.draw(st.sampled_from([100, 127, 128, 40_000])))
    terms = terms_of(cohort.names, spec, seed)
    total = cohort.sum(spec, terms, lambda _, party: party in lost)
    summed = Cohort("plain").sum(spec, terms, lambda _, party: party in lost)
    assert total.survivors == summed.survivors
    assert total.values.tolist() == summed.values.tolist()
    assert total.terms.tolist() == [terms[name].tolist() for name in total.survivors]
    assert total.terms.dtype == {100: "i1", 127: "i1", 128: "i2", 40_000: "i4"}[spec.bound]


def test_a_term_that_is_refused_is_not_kept_either():
    cohort = Collecting("plain")
    spec = cohort.spec(bound=100)
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(CONTRIBUTE, spec, terms)
    wide = replace(spec, bound=127)
    for name in cohort.names:
        loud = name == NAMES[1]
        term = np.full(spec.length, 127) if loud else terms[name]
        reply = cohort.parties[name].answer(
            wide if loud else spec, CONTRIBUTE, ask.payloads[name], term
        )
        if loud:
            with pytest.raises(Refused, match="outside"):
                hub.receive(name, reply)
        else:
            hub.receive(name, reply)
    total = hub.advance()
    assert total.survivors == (NAMES[0], NAMES[2])
    assert total.terms.tolist() == [terms[NAMES[0]].tolist(), terms[NAMES[2]].tolist()]


def test_below_the_minimum_no_terms_are_given():
    cohort = Collecting("plain")
    spec = cohort.spec(min_=3)
    with pytest.raises(TooFewSurvivors):
        cohort.sum(spec, terms_of(cohort.names, spec), lambda _, party: party == NAMES[2])


def test_a_payload_of_too_many_parts_is_refused() -> None:
    """A part of no length costs its sender two bytes, and whoever takes it apart some 200."""
    most = frames.pack({}, [b""] * frames.MAX_PARTS)
    assert len(frames.view(most).parts) == frames.MAX_PARTS
    with pytest.raises(Refused, match="parts"):
        frames.view(frames.pack({}, [b""] * (frames.MAX_PARTS + 1)))
