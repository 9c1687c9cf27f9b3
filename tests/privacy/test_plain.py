"""The plain sum keeps the contract."""

from sum_protocol import NAMES, Cohort, SumContract, terms_of

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
