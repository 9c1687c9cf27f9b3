"""The encrypted sum keeps the contract, and what a dishonest hub tries fails."""

import numpy as np
import pytest
from sum_protocol import NAMES, Cohort, SumContract, expected, fleet, nothing_lost, terms_of

from atoll.privacy import agreement, bfv, frames
from atoll.privacy.errors import BadParameters, Refused, SumFailed
from atoll.privacy.he import AGREE, DEAL, DECRYPT
from atoll.privacy.he_hub import HeHubSession
from atoll.privacy.modes import hub_session, party_session
from atoll.privacy.packing import Layout
from atoll.privacy.sums import CONTRIBUTE, Ask, RoundKey, SumSpec


class TestEncrypted(SumContract):
    mode = "he"


@pytest.fixture
def cohort():
    return Cohort("he", 5)


def forge(payload, parts=None, **head):
    """Return ``payload`` with some fields and parts replaced."""
    frame = frames.unpack(payload)
    return frames.pack({**frame.head, **head}, frame.parts if parts is None else parts)


# Drop-outs


def test_a_dealer_that_does_not_answer_is_replaced(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub = cohort.open(spec)
    first = hub.start()
    second = hub.advance()
    assert first.phase == second.phase == DEAL
    assert set(first.payloads) != set(second.payloads)
    total = cohort.finish(hub, spec, second, terms)
    assert total.values.tolist() == expected(terms, cohort.names)


def test_without_any_dealer_the_sum_fails(cohort):
    spec = cohort.spec()
    with pytest.raises(SumFailed, match="could make the run's key"):
        cohort.sum(spec, terms_of(cohort.names, spec), lambda phase, _: phase == DEAL)


def test_a_decryptor_that_does_not_answer_is_replaced(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(DECRYPT, spec, terms)
    lost = next(iter(ask.payloads))
    asked = []

    def losing(phase, party):
        asked.append(party)
        return party == lost

    total = cohort.finish(hub, spec, ask, terms, losing)
    assert len(set(asked)) == 3
    assert total.values.tolist() == expected(terms, cohort.names)


def test_with_one_decryptor_the_sum_fails(cohort):
    spec = cohort.spec()
    hub, ask = cohort.until(DECRYPT, spec, terms_of(cohort.names, spec))
    one = next(iter(ask.payloads))
    with pytest.raises(SumFailed, match="must open the sum"):
        cohort.finish(hub, spec, ask, {}, lambda _, party: party != one)


def test_too_few_signatures_fail_the_sum(cohort):
    spec = cohort.spec()
    with pytest.raises(SumFailed, match="2 of 5 devices agreed"):
        cohort.sum(
            spec,
            terms_of(cohort.names, spec),
            lambda phase, party: phase == AGREE and party not in NAMES[:2],
        )


def test_two_thirds_of_the_signatures_are_enough(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    total = cohort.sum(spec, terms, lambda phase, party: (phase, party) == (AGREE, NAMES[4]))
    assert total.values.tolist() == expected(terms, cohort.names)


def test_a_party_that_restarts_misses_one_round_and_gets_the_key_again(cohort):
    for round_, survivors in ((1, NAMES), (2, NAMES[1:]), (3, NAMES)):
        spec = cohort.spec(round_=round_)
        terms = terms_of(cohort.names, spec)
        hub, ask = cohort.until(CONTRIBUTE, spec, terms)
        if round_ == 2:
            cohort.restart(NAMES[0])
            with pytest.raises(Refused, match="no longer has the run's key"):
                cohort.parties[NAMES[0]].answer(
                    spec, CONTRIBUTE, ask.payloads[NAMES[0]], terms[NAMES[0]]
                )
        total = cohort.finish(
            hub, spec, ask, terms, lambda _, party, kept=survivors: party not in kept
        )
        assert tuple(total.survivors) == survivors
        assert total.values.tolist() == expected(terms, survivors)


def test_a_hub_that_lost_everything_has_a_new_key_dealt(cohort):
    spec = cohort.spec()
    cohort.sum(spec, terms_of(cohort.names, spec))
    cohort.session = hub_session("he", cohort.roster)
    later = cohort.spec(round_=2)
    terms = terms_of(cohort.names, later)
    assert cohort.sum(later, terms).values.tolist() == expected(terms, cohort.names)


def test_a_dealer_of_keys_that_nobody_can_open_is_passed_over_next_round(cohort):
    spec = cohort.spec()
    hub = cohort.open(spec)
    ask = hub.start()
    (dealer,) = ask.payloads
    reply = cohort.parties[dealer].answer(spec, DEAL, ask.payloads[dealer], None)
    body, *wraps = frames.unpack(reply).parts
    hub.receive(dealer, forge(reply, [body[::-1], *wraps]))
    ask = hub.advance()
    for party, payload in ask.payloads.items():
        with pytest.raises(Refused):
            cohort.parties[party].answer(spec, CONTRIBUTE, payload, np.zeros(5, dtype=np.int64))
    with pytest.raises(SumFailed):
        hub.advance()
    # The round in which it would be this dealer's turn again.
    later = cohort.spec(round_=1 + len(cohort.names))
    hub = cohort.open(later)
    ask = hub.start()
    assert ask.phase == DEAL
    assert dealer not in ask.payloads
    terms = terms_of(cohort.names, later)
    assert cohort.finish(hub, later, ask, terms).values.tolist() == expected(terms, cohort.names)


# Dishonest decryptors


def test_decryptors_that_do_not_agree_fail_the_sum(cohort):
    spec = cohort.spec()
    hub, ask = cohort.until(DECRYPT, spec, terms_of(cohort.names, spec))
    for number, (party, payload) in enumerate(ask.payloads.items()):
        reply = cohort.parties[party].answer(spec, DECRYPT, payload, None)
        if number:
            (values,) = frames.unpack(reply).parts
            reply = forge(reply, [bytes([values[0] ^ 1]) + values[1:]])
        hub.receive(party, reply)
    with pytest.raises(SumFailed, match="do not agree"):
        hub.advance()


# A dishonest hub


def test_a_single_term_is_not_opened(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(CONTRIBUTE, spec, terms)
    replies = cohort.ask(hub, spec, ask, terms, nothing_lost)
    agree = hub.advance()
    cohort.ask(hub, spec, agree, terms, nothing_lost)
    decrypt = hub.advance()
    victim = frames.unpack(replies[NAMES[0]]).parts
    party, payload = next(iter(decrypt.payloads.items()))
    signatures = frames.unpack(payload).parts[: -len(victim)]
    with pytest.raises(Refused, match="not the sum of the survivors"):
        cohort.parties[party].answer(spec, DECRYPT, forge(payload, [*signatures, *victim]), None)


def test_a_sum_that_counts_one_term_twice_is_not_opened(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(CONTRIBUTE, spec, terms)
    replies = cohort.ask(hub, spec, ask, terms, nothing_lost)
    cohort.ask(hub, spec, hub.advance(), terms, nothing_lost)
    decrypt = hub.advance()
    party, payload = next(iter(decrypt.payloads.items()))
    *signatures, block = frames.unpack(payload).parts
    adder = bfv.Adder(cohort.session.plain_bits)
    total = adder.read(block)
    adder.add(total, adder.read(frames.unpack(replies[NAMES[0]]).parts[0]))
    with pytest.raises(Refused, match="not the sum of the survivors"):
        cohort.parties[party].answer(
            spec, DECRYPT, forge(payload, [*signatures, adder.write(total)]), None
        )


@pytest.mark.parametrize("places", [[1, 0], [0, 0]], ids=["swapped", "repeated"])
def test_a_block_in_anothers_place_is_not_opened(cohort, places):
    spec = cohort.spec(length=4 * bfv.SLOTS)
    _, ask = cohort.until(DECRYPT, spec, terms_of(cohort.names, spec))
    party, payload = next(iter(ask.payloads.items()))
    *signatures, first, second = frames.unpack(payload).parts
    blocks = [(first, second)[place] for place in places]
    with pytest.raises(Refused, match="not the sum of the survivors"):
        cohort.parties[party].answer(spec, DECRYPT, forge(payload, [*signatures, *blocks]), None)


def test_no_device_signs_two_lists_of_survivors_for_a_round(cohort):
    spec = cohort.spec()
    _, ask = cohort.until(AGREE, spec, terms_of(cohort.names, spec))
    payload = ask.payloads[NAMES[0]]
    party = cohort.parties[NAMES[0]]
    party.answer(spec, AGREE, payload, None)
    with pytest.raises(Refused, match="another list"):
        party.answer(spec, AGREE, forge(payload, survivors=list(NAMES[:4])), None)


@pytest.mark.parametrize(
    "survivors",
    [[NAMES[0]], [NAMES[0], NAMES[0]], [NAMES[1], NAMES[0]], [NAMES[0], "x"], list(NAMES[1:])],
    ids=["alone", "twice", "unsorted", "a stranger", "without the signer"],
)
def test_a_list_that_hides_nobody_is_not_signed(cohort, survivors):
    spec = cohort.spec()
    _, ask = cohort.until(AGREE, spec, terms_of(cohort.names, spec))
    payload = forge(ask.payloads[NAMES[0]], survivors=survivors)
    with pytest.raises(Refused):
        cohort.parties[NAMES[0]].answer(spec, AGREE, payload, None)


def test_a_list_that_too_few_signed_is_not_opened(cohort):
    spec = cohort.spec()
    _, ask = cohort.until(DECRYPT, spec, terms_of(cohort.names, spec))
    party, payload = next(iter(ask.payloads.items()))
    frame = frames.unpack(payload)
    kept = agreement.quorum(5, spec.min_survivors) - 1
    payload = forge(
        payload, [*frame.parts[:kept], *frame.parts[5:]], signers=frame.texts("signers")[:kept]
    )
    with pytest.raises(Refused, match="too few of the survivors"):
        cohort.parties[party].answer(spec, DECRYPT, payload, None)


def test_a_forged_signature_opens_nothing(cohort):
    spec = cohort.spec()
    _, ask = cohort.until(DECRYPT, spec, terms_of(cohort.names, spec))
    party, payload = next(iter(ask.payloads.items()))
    one, two, *rest = frames.unpack(payload).parts
    with pytest.raises(Refused, match="did not make"):
        cohort.parties[party].answer(spec, DECRYPT, forge(payload, [two, one, *rest]), None)


def test_one_sum_is_opened_a_round(cohort):
    spec = cohort.spec()
    _, ask = cohort.until(DECRYPT, spec, terms_of(cohort.names, spec))
    party, payload = next(iter(ask.payloads.items()))
    reply = cohort.parties[party].answer(spec, DECRYPT, payload, None)
    assert cohort.parties[party].answer(spec, DECRYPT, payload, None) == reply
    with pytest.raises(Refused, match="one sum a round"):
        cohort.parties[party].answer(spec, DECRYPT, forge(payload, note="again"), None)


def test_two_lists_cannot_both_reach_a_quorum():
    for n in range(2, 60):
        for least in range(2, n + 1):
            assert 2 * agreement.quorum(n, least) > n


def test_what_the_key_opens_of_a_single_term_is_noise_in_every_slot(cohort):
    spec = cohort.spec(length=4095 * 3, bound=100)
    terms = {name: np.zeros(spec.length, dtype=np.int64) for name in cohort.names}
    hub, ask = cohort.until(CONTRIBUTE, spec, terms)
    replies = cohort.ask(hub, spec, ask, terms, nothing_lost)
    held = cohort.parties[NAMES[0]]._held
    opened = {
        name: np.stack([held.bfv.decrypt(part) for part in frames.unpack(reply).parts])
        for name, reply in replies.items()
    }
    for name, slots in opened.items():
        pads = held.pads_of(spec, name, len(slots))
        assert not ((slots - pads) % held.bfv.modulus).any()
    every = np.concatenate([slots.ravel() % held.bfv.modulus for slots in opened.values()])
    assert len(np.unique(every)) == every.size  # of 2**46: none twice
    counts = np.histogram(every, bins=64, range=(0, held.bfv.modulus))[0]
    chi_square = float(((counts - every.size / 64) ** 2 / (every.size / 64)).sum())
    assert chi_square < 63 + 6 * np.sqrt(126)


def test_a_plain_modulus_that_is_not_the_rosters_is_refused(cohort):
    spec = cohort.spec()
    ask = cohort.open(spec).start()
    (dealer,) = ask.payloads
    with pytest.raises(Refused, match="not that of this roster"):
        cohort.parties[dealer].answer(spec, DEAL, forge(ask.payloads[dealer], plain_bits=30), None)


def test_a_signature_that_does_not_hold_is_refused_by_the_hub(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(AGREE, spec, terms)
    liar = NAMES[3]
    reply = cohort.parties[liar].answer(spec, AGREE, ask.payloads[liar], None)
    with pytest.raises(Refused, match="did not make"):
        hub.receive(liar, forge(reply, [b"nonsense"]))
    total = cohort.finish(hub, spec, ask, terms, lambda _, party: party == liar)
    assert total.values.tolist() == expected(terms, NAMES)


# The key ceremony


def contribute_payload(cohort, spec):
    _, ask = cohort.until(CONTRIBUTE, spec, {})
    return ask.payloads[NAMES[0]]


def refused(cohort, spec, payload):
    with pytest.raises(Refused) as caught:
        cohort.parties[NAMES[0]].answer(spec, CONTRIBUTE, payload, np.zeros(5, dtype=np.int64))
    return str(caught.value)


def test_a_dealer_shown_a_foreign_certificate_deals_nothing(cohort):
    foreign = fleet("another hub").certificates[NAMES[2]]
    session = hub_session("he", {**cohort.roster, NAMES[2]: foreign})
    spec = cohort.spec()
    ask = session.open(spec, cohort.names).start()
    ((dealer, payload),) = ask.payloads.items()
    with pytest.raises(Refused, match="certificate shown for 'device-2' is not valid"):
        cohort.parties[dealer].answer(spec, DEAL, payload, None)


def test_a_dealer_shown_one_devices_certificate_under_anothers_name_deals_nothing(cohort):
    roster = {**cohort.roster, NAMES[2]: cohort.roster[NAMES[3]]}
    spec = cohort.spec()
    ask = hub_session("he", roster).open(spec, cohort.names).start()
    ((dealer, payload),) = ask.payloads.items()
    with pytest.raises(Refused, match="is that of 'device-3'"):
        cohort.parties[dealer].answer(spec, DEAL, payload, None)


def test_a_device_that_is_not_in_the_roster_deals_nothing(cohort):
    outsider = party_session("he", fleet().identities[NAMES[4]])
    spec = cohort.spec()
    roster = {name: cohort.roster[name] for name in NAMES[:4]}
    ask = hub_session("he", roster).open(spec, NAMES[:4]).start()
    payload = forge(next(iter(ask.payloads.values())), party=NAMES[4])
    with pytest.raises(Refused, match="own certificate is not in the roster"):
        outsider.answer(spec, DEAL, payload, None)


def test_a_recipient_shown_a_foreign_certificate_takes_no_key(cohort):
    spec = cohort.spec()
    payload = contribute_payload(cohort, spec)
    parts = list(frames.unpack(payload).parts)
    parts[3] = fleet("another hub").certificates[NAMES[3]]
    assert "not valid" in refused(cohort, spec, forge(payload, parts))


def test_a_key_for_another_recipient_run_or_roster_is_not_taken(cohort):
    spec = cohort.spec()
    _, ask = cohort.until(CONTRIBUTE, spec, {})
    mine = ask.payloads[NAMES[0]]
    parts = list(frames.unpack(mine).parts)
    others = frames.unpack(ask.payloads[NAMES[1]]).parts
    assert "did not make" in refused(cohort, spec, forge(mine, [*parts[:-1], others[-1]]))

    replayed = SumSpec(RoundKey("another-run", 1), 5, 100, 5, 2)
    assert "not the one" in refused(cohort, replayed, forge(mine, run="another-run"))

    smaller = forge(mine, [*parts[:3], *parts[-2:]], roster=list(NAMES[:3]))
    assert "not the one" in refused(cohort, spec, smaller)


def test_a_key_said_to_be_from_another_dealer_is_not_taken(cohort):
    spec = cohort.spec()
    payload = contribute_payload(cohort, spec)
    dealer = frames.unpack(payload).text("dealer")
    other = next(name for name in NAMES if name != dealer)
    assert "not the one" in refused(cohort, spec, forge(payload, dealer=other))
    assert "not in the roster" in refused(cohort, spec, forge(payload, dealer="stranger"))


@pytest.mark.parametrize("place", [-1, -2], ids=["wrap", "body"])
def test_a_changed_key_is_not_taken(cohort, place):
    spec = cohort.spec()
    payload = contribute_payload(cohort, spec)
    parts = list(frames.unpack(payload).parts)
    parts[place] = parts[place][:40] + bytes([parts[place][40] ^ 1]) + parts[place][41:]
    refused(cohort, spec, forge(payload, parts))


def test_the_secret_key_never_reaches_the_hub_readably(cohort):
    spec = cohort.spec()
    cohort.sum(spec, terms_of(cohort.names, spec))
    secret = cohort.parties[NAMES[0]]._held.bfv.secret()
    seen = cohort.session.dump()
    # Any 16 bytes of SEAL's file after its header would do to give it away.
    assert all(secret[i : i + 16] not in seen for i in range(200, len(secret) - 16, 1000))


def test_what_was_kept_for_another_roster_is_not_loaded(cohort):
    spec = cohort.spec()
    cohort.sum(spec, terms_of(cohort.names, spec))
    session = hub_session("he", {name: cohort.roster[name] for name in NAMES[:3]})
    with pytest.raises(Refused, match="another roster"):
        session.load(cohort.session.dump())


# Limits


def test_a_key_that_cannot_add_so_many_terms_is_not_used(cohort):
    spec = cohort.spec()
    many = SumSpec(spec.key, spec.length, spec.bound, bfv.max_terms(bfv.MAX_PLAIN_BITS) + 1, 2)
    assert "more than this key can add" in refused(cohort, many, contribute_payload(cohort, spec))


def test_a_value_wider_than_a_slot_is_refused_before_anything_is_sent(cohort):
    with pytest.raises(BadParameters, match="wider than"):
        cohort.open(cohort.spec(bound=2**44))


def test_a_sum_of_one_is_refused_by_the_party(cohort):
    spec = cohort.spec(min_=1)
    assert "hides nothing" in refused(cohort, spec, contribute_payload(cohort, spec))


def test_a_party_without_a_certificate_is_refused(cohort):
    with pytest.raises(SumFailed, match="stranger"):
        HeHubSession(cohort.roster).open(cohort.spec(), [*NAMES, "stranger"])


@pytest.mark.parametrize("bits", [30, 38, 46])
def test_packing_keeps_the_extremes_apart(bits):
    spec = SumSpec(RoundKey("run", 1), 9000, 100, 8, 2)
    layout = Layout.of(spec, bits)
    signs = np.where(np.arange(9000) % 3 == 0, -100, 100).astype(np.int64)
    slots = sum(layout.pack(signs) for _ in range(8))
    assert np.abs(slots).max() <= layout.modulus // 2
    values, _ = layout.unpack(slots)
    assert (values == 8 * signs).all()


def test_a_round_costs_little_more_than_four_bytes_a_parameter():
    cohort = Cohort("he", 5)
    spec = cohort.spec(length=81_900, bound=32_767)
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(CONTRIBUTE, spec, terms)
    assert isinstance(ask, Ask)
    replies = cohort.ask(hub, spec, ask, terms, nothing_lost)
    assert max(map(len, replies.values())) < 4.2 * spec.length
