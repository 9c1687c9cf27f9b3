"""The masked sum keeps the contract, and what a dishonest hub or device tries fails."""

from dataclasses import replace

import numpy as np
import pytest
from sum_protocol import NAMES, Cohort, SumContract, expected, fleet, nothing_lost, terms_of

from atoll.privacy import frames, shamir, wrapping
from atoll.privacy.errors import Refused, SumFailed, TooFewSurvivors
from atoll.privacy.ring import Ring
from atoll.privacy.secagg import AGREE, SHARE, UNMASK
from atoll.privacy.secagg_keys import ADVERTISE, Gathering, advert_statement, sum_context
from atoll.privacy.sums import CONTRIBUTE, Ask, RoundKey, SumSpec

PHASES = (ADVERTISE, SHARE, CONTRIBUTE, AGREE, UNMASK)


class TestMasked(SumContract):
    mode = "secagg"


@pytest.fixture
def cohort():
    return Cohort("secagg", 5)


def forge(payload, parts=None, **head):
    """Return ``payload`` with some fields and parts replaced."""
    frame = frames.unpack(payload)
    return frames.pack({**frame.head, **head}, frame.parts if parts is None else parts)


def parts_of(payload):
    return list(frames.unpack(payload).parts)


# Drop-outs


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("ahead", [False, True], ids=["first round", "after another"])
def test_two_of_five_may_vanish_in_any_phase(cohort, phase, ahead):
    if ahead:
        before = cohort.spec(round_=1, min_=3)
        cohort.sum(before, terms_of(cohort.names, before))
    spec = cohort.spec(round_=2, min_=3)
    terms = terms_of(cohort.names, spec, seed=7)
    gone = {NAMES[1], NAMES[4]}
    total = cohort.sum(spec, terms, lambda at, party: party in gone and _since(at, phase))
    late = PHASES.index(phase) > PHASES.index(CONTRIBUTE)
    survivors = list(NAMES) if late else [name for name in NAMES if name not in gone]
    assert list(total.survivors) == survivors
    assert total.values.tolist() == expected(terms, survivors)


def _since(at, phase):
    return PHASES.index(at) >= PHASES.index(phase)


@pytest.mark.parametrize("phase", PHASES)
def test_with_three_gone_of_five_nothing_is_decoded(cohort, phase):
    spec = cohort.spec(min_=3)
    with pytest.raises(SumFailed):
        cohort.sum(
            spec,
            terms_of(cohort.names, spec),
            lambda at, party: party in NAMES[:3] and _since(at, phase),
        )


def test_different_devices_may_vanish_in_different_phases():
    cohort = Cohort("secagg", 5)
    spec = cohort.spec(min_=3)
    terms = terms_of(cohort.names, spec)

    def lost(phase, party):
        return (phase, party) in {(CONTRIBUTE, NAMES[0]), (UNMASK, NAMES[1]), (AGREE, NAMES[2])}

    total = cohort.sum(spec, terms, lost)
    assert list(total.survivors) == list(NAMES[1:])
    assert total.values.tolist() == expected(terms, NAMES[1:])


# Messages


def phases_of(cohort, spec, terms):
    seen = []

    def watch(phase, _):
        seen.append(phase)
        return False

    cohort.sum(spec, terms, watch)
    return list(dict.fromkeys(seen))


def test_a_round_after_another_takes_three_messages(cohort):
    for number in (1, 2, 3):
        spec = cohort.spec(round_=number)
        phases = phases_of(cohort, spec, terms_of(cohort.names, spec))
        assert phases == list(PHASES if number == 1 else PHASES[2:])


def test_a_device_that_starts_anew_drops_out_once_and_then_is_back(cohort):
    for number in (1, 2, 3):
        spec = cohort.spec(round_=number)
        terms = terms_of(cohort.names, spec, seed=number)
        if number == 2:
            cohort.restart(NAMES[3])
            hub = cohort.open(spec)
            ask = hub.start()
            with pytest.raises(Refused, match="shared nothing"):
                cohort.parties[NAMES[3]].answer(
                    spec, ask.phase, ask.payloads[NAMES[3]], terms[NAMES[3]]
                )
            lost = lambda phase, party: phase == CONTRIBUTE and party == NAMES[3]  # noqa: E731
            total = cohort.finish(hub, spec, ask, terms, lost)
            assert NAMES[3] not in total.survivors
        else:
            total = cohort.sum(spec, terms)
            assert list(total.survivors) == list(NAMES)
        assert total.values.tolist() == expected(terms, total.survivors)


def test_16_bits_of_ten_devices_take_20_bits_each():
    ring = Ring(1_000_000, 2 * 10 * 32_767 + 1, 2, 5)
    assert ring == Ring.of(_spec(1_000_000, 32_767, 10))
    assert ring.size == 2_500_000


def _spec(length, bound, parties):
    return SumSpec(RoundKey("run", 1), length, bound, parties, 2)


def test_a_large_cohort_masks_with_some_and_the_sum_is_exact():
    cohort = Cohort("secagg", 85)
    spec = cohort.spec(length=50, min_=50)
    terms = terms_of(cohort.names, spec)
    gone = set(cohort.names[::8])
    total = cohort.sum(spec, terms, lambda at, party: at == CONTRIBUTE and party in gone)
    assert set(total.survivors) == set(cohort.names) - gone
    assert total.values.tolist() == expected(terms, total.survivors)


def test_survivors_between_whom_no_mask_is_left_are_not_signed():
    cohort = Cohort("secagg", 85)
    spec = cohort.spec(min_=2)
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(CONTRIBUTE, spec, terms)
    alone = cohort.names[0]
    gone = set(hub._ready.gather().near[alone])
    cohort.ask(hub, spec, ask, terms, lambda _, party: party in gone)
    step = hub.advance()
    assert step.phase == AGREE
    for name in (alone, next(name for name in step.payloads if name != alone)):
        with pytest.raises(Refused, match="fall into parts"):
            cohort.parties[name].answer(spec, AGREE, step.payloads[name], None)


# What the hub sees


def test_a_masked_term_is_uniform(cohort):
    spec = cohort.spec(length=40_000, bound=60)  # one byte or more per word
    terms = {name: np.zeros(spec.length, dtype=np.int64) for name in cohort.names}
    _, ask = cohort.until(CONTRIBUTE, spec, terms)
    reply = cohort.parties[NAMES[0]].answer(
        spec, CONTRIBUTE, ask.payloads[NAMES[0]], terms[NAMES[0]]
    )
    masked = np.frombuffer(parts_of(reply)[0], dtype=np.uint8)
    counts = np.bincount(masked, minlength=256)
    expected_count = masked.size / 256
    chi_square = float(((counts - expected_count) ** 2 / expected_count).sum())
    assert 255 - 6 * np.sqrt(510) < chi_square < 255 + 6 * np.sqrt(510)


def test_only_a_seeds_piece_is_told_of_a_survivor_and_only_a_keys_of_the_others(cohort):
    spec = cohort.spec(min_=3)
    terms = terms_of(cohort.names, spec)
    gone = NAMES[2]
    _, ask = cohort.until(
        UNMASK, spec, terms, lambda phase, party: phase == CONTRIBUTE and party == gone
    )
    party = cohort.parties[NAMES[0]]
    held = dict(next(own for key, own in party._own.items() if key == spec.key).pieces)
    reply = party.answer(spec, UNMASK, ask.payloads[NAMES[0]], None)
    told = dict(zip(sorted(held), parts_of(reply), strict=True))
    size = shamir.PIECE_BYTES
    for name, pieces in held.items():
        assert told[name] == (pieces[size:] if name == gone else pieces[:size])


def test_nothing_of_a_round_is_kept_when_it_is_over(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub, ask = cohort.until(UNMASK, spec, terms)
    owned = {name: cohort.parties[name]._own[spec.key] for name in NAMES}
    cohort.finish(hub, spec, ask, terms)
    for name, own in owned.items():
        assert spec.key not in cohort.parties[name]._own
        assert not any(own.seed)
        assert not any(own.masking_secret)
        assert not own.pieces
    assert repr(owned[NAMES[0]]).startswith("<")


# What a dishonest hub tries


def ask_of(cohort, spec, phase, lost=nothing_lost):
    hub, ask = cohort.until(phase, spec, terms_of(cohort.names, spec), lost)
    assert isinstance(ask, Ask)
    return hub, ask


def test_a_device_signs_one_list_of_survivors_a_round(cohort):
    spec = cohort.spec()
    _, ask = ask_of(cohort, spec, AGREE)
    party, payload = cohort.parties[NAMES[0]], ask.payloads[NAMES[0]]
    party.answer(spec, AGREE, payload, None)
    with pytest.raises(Refused, match="another list"):
        party.answer(spec, AGREE, forge(payload, survivors=list(NAMES[:4])), None)


def test_a_device_opens_one_sum_a_round(cohort):
    spec = cohort.spec()
    _, ask = ask_of(cohort, spec, UNMASK)
    party, payload = cohort.parties[NAMES[0]], ask.payloads[NAMES[0]]
    first = party.answer(spec, UNMASK, payload, None)
    assert party.answer(spec, UNMASK, payload, None) == first
    with pytest.raises(Refused, match="opens one sum"):
        party.answer(spec, UNMASK, forge(payload, survivors=list(NAMES[:4])), None)


@pytest.mark.parametrize(
    "survivors",
    [
        [],
        [NAMES[0]],
        list(NAMES[1:]),
        [*NAMES, "stranger"],
        [NAMES[1], NAMES[0], NAMES[2]],
        [NAMES[0], NAMES[0], NAMES[1]],
    ],
    ids=["none", "alone", "without this one", "a stranger", "out of order", "repeated"],
)
def test_a_list_of_survivors_that_must_not_be_signed_is_not(cohort, survivors):
    spec = cohort.spec()
    _, ask = ask_of(cohort, spec, AGREE)
    with pytest.raises(Refused):
        cohort.parties[NAMES[0]].answer(
            spec, AGREE, forge(ask.payloads[NAMES[0]], survivors=survivors), None
        )


def test_a_list_that_too_few_signed_opens_nothing(cohort):
    spec = cohort.spec(min_=4)
    _, ask = ask_of(cohort, spec, UNMASK)
    party, payload = cohort.parties[NAMES[0]], ask.payloads[NAMES[0]]
    frame = frames.unpack(payload)
    signers = frame.texts("signers")
    for names in ([], signers[:1], [*signers[:3]]):
        kept = [signers.index(name) for name in names]
        parts = [frame.parts[at] for at in kept] + [b""] * len(names)
        with pytest.raises(Refused, match="too few"):
            party.answer(spec, UNMASK, forge(payload, parts, signers=names), None)


def test_signatures_of_another_list_or_another_device_open_nothing(cohort):
    spec = cohort.spec(min_=3)
    _, ask = ask_of(cohort, spec, UNMASK)
    party, payload = cohort.parties[NAMES[4]], ask.payloads[NAMES[4]]
    with pytest.raises(Refused, match="did not make"):
        party.answer(spec, UNMASK, forge(payload, survivors=[*NAMES[:3], NAMES[4]]), None)
    swapped = parts_of(payload)
    swapped[0], swapped[1] = swapped[1], swapped[0]
    with pytest.raises(Refused, match="did not make"):
        party.answer(spec, UNMASK, forge(payload, swapped), None)


def test_adverts_are_shared_into_once_and_only_where_ones_own_is_among_them(cohort):
    spec = cohort.spec()
    _, ask = ask_of(cohort, spec, SHARE)
    party, payload = cohort.parties[NAMES[0]], ask.payloads[NAMES[0]]
    changed = parts_of(payload)
    changed[0] = bytes(32) + changed[0][32:]  # this device's own, the first
    with pytest.raises(Refused, match="own advert"):
        party.answer(spec, SHARE, forge(payload, changed), None)
    digests = parts_of(payload)
    digests[0] = digests[0][:-32] + bytes(32)
    with pytest.raises(Refused, match="not the one everybody sees"):
        party.answer(spec, SHARE, forge(payload, digests), None)
    party.answer(spec, SHARE, payload, None)
    with pytest.raises(Refused, match="shared already"):
        party.answer(spec, SHARE, payload, None)


def test_an_advert_of_the_hubs_own_making_is_refused(cohort):
    import hashlib

    spec = cohort.spec()
    _, ask = ask_of(cohort, spec, SHARE)
    payload = ask.payloads[NAMES[0]]
    parts = parts_of(payload)
    forged = bytes(96) + parts[1][96:]
    parts[0] = parts[0][:32] + hashlib.sha256(forged).digest() + parts[0][64:]
    parts[1] = forged
    with pytest.raises(Refused, match="did not make"):
        cohort.parties[NAMES[0]].answer(spec, SHARE, forge(payload, parts), None)


def test_a_certificate_of_another_authority_or_device_is_refused(cohort):
    spec = cohort.spec()
    _, ask = ask_of(cohort, spec, SHARE)
    payload = ask.payloads[NAMES[0]]
    for certificate in (fleet("other hub").certificates[NAMES[1]], fleet().certificates[NAMES[2]]):
        parts = parts_of(payload)
        parts[5] = certificate
        with pytest.raises(Refused, match="certificate shown"):
            cohort.parties[NAMES[0]].answer(spec, SHARE, forge(payload, parts), None)


def test_a_term_is_given_only_into_the_gathering_that_was_shared_in(cohort):
    spec = cohort.spec(min_=3)
    terms = terms_of(cohort.names, spec)
    _, ask = ask_of(cohort, spec, CONTRIBUTE)
    party, payload = cohort.parties[NAMES[0]], ask.payloads[NAMES[0]]
    for changed in (
        {"gathering": "00" * 32},
        {"sharers": [*NAMES[:2]]},
        {"sharers": [*NAMES[1:]]},
        {"sharers": [*NAMES, "stranger"]},
    ):
        with pytest.raises(Refused):
            party.answer(spec, CONTRIBUTE, forge(payload, **changed), terms[NAMES[0]])


def test_a_hub_that_tells_two_stories_of_who_shared_gets_noise(cohort):
    spec = cohort.spec(min_=3)
    terms = terms_of(cohort.names, spec)
    hub, ask = ask_of(cohort, spec, CONTRIBUTE)
    odd, left_out = NAMES[0], NAMES[4]
    told = forge(ask.payloads[odd], parts_of(ask.payloads[odd])[:-1], sharers=[*NAMES[:4]])
    cohort.ask(hub, spec, Ask(CONTRIBUTE, {**ask.payloads, odd: told}), terms, nothing_lost)
    step = hub.advance()
    # To that device one of the survivors is a stranger ...
    with pytest.raises(Refused, match="names strangers"):
        cohort.parties[odd].answer(spec, AGREE, step.payloads[odd], None)
    # ... what it would sign, the others do not count ...
    own = forge(step.payloads[odd], survivors=[*NAMES[:4]])
    signature = parts_of(cohort.parties[odd].answer(spec, AGREE, own, None))[0]
    with pytest.raises(Refused, match="did not make"):
        hub.receive(odd, forge(own, [signature, b""]))
    # ... and without it the masks that it shares with the others stay.
    total = cohort.finish(hub, spec, step, terms, lambda _, party: party == odd)
    assert total.values.tolist() != expected(terms, NAMES)
    assert left_out in total.survivors


@pytest.mark.parametrize("changed", [{"min_": 4}, {"bound": 101}, {"length": 6}])
def test_nothing_of_a_round_is_answered_under_another_spec(cohort, changed):
    spec, other = cohort.spec(min_=3), cohort.spec(**{"min_": 3, **changed})
    terms = terms_of(cohort.names, spec)
    hub, ask = ask_of(cohort, spec, CONTRIBUTE)
    party, name = cohort.parties[NAMES[0]], NAMES[0]
    if "min_" in changed:  # the pieces were dealt for another one
        with pytest.raises(Refused, match="another minimum"):
            party.answer(other, CONTRIBUTE, ask.payloads[name], terms[name])
    cohort.ask(hub, spec, ask, terms, nothing_lost)
    step = hub.advance()
    with pytest.raises(Refused, match="no part in that round"):
        party.answer(other, AGREE, step.payloads[name], None)
    cohort.ask(hub, spec, step, terms, nothing_lost)
    step = hub.advance()
    with pytest.raises(Refused, match="no part in that round"):
        party.answer(other, UNMASK, step.payloads[name], None)


def test_masks_are_bound_to_the_spec_and_to_who_shared():
    gathering = Gathering(RoundKey("run", 1), {name: bytes(32) for name in NAMES})
    spec = SumSpec(RoundKey("run", 1), 5, 100, 5, 3)
    contexts = {
        sum_context(gathering, NAMES, spec),
        sum_context(gathering, NAMES[:4], spec),
        *(
            sum_context(gathering, NAMES, replace(spec, **{field: value}))
            for field, value in (("length", 6), ("bound", 9), ("parties", 6), ("min_survivors", 4))
        ),
        sum_context(Gathering(RoundKey("run", 2), gathering.digests), NAMES, spec),
        sum_context(Gathering(RoundKey("other", 1), gathering.digests), NAMES, spec),
    }
    assert len(contexts) == 8


def test_keys_are_not_made_anew_for_a_round_that_was_answered(cohort):
    spec = cohort.spec()
    cohort.sum(spec, terms_of(cohort.names, spec))
    ask = frames.pack(frames.address(spec.key, ADVERTISE, NAMES[0]))
    with pytest.raises(Refused, match="answered already"):
        cohort.parties[NAMES[0]].answer(spec, ADVERTISE, ask, None)


def test_too_few_neighbours_to_open_a_mask_get_no_term(cohort):
    spec = cohort.spec(min_=2)
    terms = terms_of(cohort.names, spec)
    _, ask = ask_of(cohort, spec, CONTRIBUTE)
    payload = ask.payloads[NAMES[0]]
    few = forge(payload, parts_of(payload)[:1], sharers=[*NAMES[:2]])
    with pytest.raises(Refused, match="too few neighbours"):
        cohort.parties[NAMES[0]].answer(spec, CONTRIBUTE, few, terms[NAMES[0]])


def test_one_who_signs_must_be_a_survivor(cohort):
    spec = cohort.spec(min_=3)
    gone = NAMES[4]
    _, ask = ask_of(cohort, spec, UNMASK, lambda phase, party: (phase, party) == (CONTRIBUTE, gone))
    payload = ask.payloads[NAMES[0]]
    frame = frames.unpack(payload)
    signers = [*frame.texts("signers")[:-1], gone]
    with pytest.raises(Refused, match="too few of the survivors"):
        cohort.parties[NAMES[0]].answer(spec, UNMASK, forge(payload, signers=signers), None)


# What a dishonest device tries


def test_pieces_that_cannot_be_read_fail_the_sum_and_name_their_dealer(cohort):
    spec = cohort.spec(min_=3)
    terms = terms_of(cohort.names, spec)
    hub, ask = ask_of(cohort, spec, SHARE)
    for name in NAMES:
        reply = cohort.parties[name].answer(spec, SHARE, ask.payloads[name], None)
        if name == NAMES[2]:
            reply = forge(reply, [b"nonsense"] * 4)
        hub.receive(name, reply)
    with pytest.raises(SumFailed, match=f"mask of '{NAMES[2]}'"):
        cohort.finish(hub, spec, hub.advance(), terms)


def test_false_pieces_are_found_out_and_done_without(cohort):
    spec = cohort.spec(min_=3)
    terms = terms_of(cohort.names, spec)
    hub, ask = ask_of(cohort, spec, UNMASK)
    for name in NAMES:
        reply = cohort.parties[name].answer(spec, UNMASK, ask.payloads[name], None)
        if name in (NAMES[1], NAMES[3]):
            reply = forge(reply, [bytes([9]) * shamir.PIECE_BYTES] * 5)
        hub.receive(name, reply)
    total = hub.advance()
    assert total.values.tolist() == expected(terms, NAMES)


def test_a_bad_advert_for_the_next_round_costs_its_sender_that_round_alone(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub, ask = ask_of(cohort, spec, CONTRIBUTE)
    for name in NAMES:
        reply = cohort.parties[name].answer(spec, CONTRIBUTE, ask.payloads[name], terms[name])
        if name == NAMES[3]:
            reply = forge(reply, [parts_of(reply)[0], b"x" * 200])
        hub.receive(name, reply)
    total = cohort.finish(hub, spec, hub.advance(), terms)
    assert total.values.tolist() == expected(terms, NAMES)
    later = cohort.spec(round_=2)
    assert phases_of(cohort, later, terms_of(cohort.names, later)) == list(PHASES)


def test_keys_that_share_no_secret_are_refused_before_others_stumble_on_them(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub = cohort.open(spec)
    ask = hub.start()
    liar = NAMES[2]
    me = fleet().identities[liar]
    body = bytes(32) + bytes(32) + bytes(32)  # the point of order one
    signature = wrapping.sign(me.key, advert_statement(spec.key, liar, body))
    with pytest.raises(Refused, match="public key"):
        hub.receive(
            liar, frames.pack(frames.address(spec.key, ADVERTISE, liar), [body + signature])
        )
    total = cohort.finish(hub, spec, ask, terms, lambda _, party: party == liar)
    assert total.values.tolist() == expected(terms, total.survivors)


def test_pieces_of_a_device_whose_advert_was_bad_are_not_kept(cohort):
    spec = cohort.spec()
    terms = terms_of(cohort.names, spec)
    hub, ask = ask_of(cohort, spec, CONTRIBUTE)
    liar = NAMES[3]
    for name in NAMES:
        reply = cohort.parties[name].answer(spec, CONTRIBUTE, ask.payloads[name], terms[name])
        hub.receive(name, forge(reply, [parts_of(reply)[0], b"x"]) if name == liar else reply)
    step = hub.advance()
    for name in NAMES:
        reply = cohort.parties[name].answer(spec, AGREE, step.payloads[name], None)
        if name == liar:
            ahead = frames.address(RoundKey("run", 2), SHARE, liar)
            reply = forge(reply, [parts_of(reply)[0], frames.pack(ahead, [b"a", b"b", b"c", b"d"])])
        hub.receive(name, reply)
    total = cohort.finish(hub, spec, hub.advance(), terms)
    assert total.values.tolist() == expected(terms, NAMES)
    later = cohort.spec(round_=2)
    terms = terms_of(cohort.names, later)
    assert cohort.sum(later, terms).values.tolist() == expected(terms, NAMES)


def test_a_signature_that_does_not_hold_is_refused_by_the_hub(cohort):
    spec = cohort.spec()
    hub, ask = ask_of(cohort, spec, AGREE)
    reply = cohort.parties[NAMES[0]].answer(spec, AGREE, ask.payloads[NAMES[0]], None)
    signature, shares = parts_of(reply)
    with pytest.raises(Refused):
        hub.receive(NAMES[0], forge(reply, [signature[:-1] + b"\x00", shares]))


def test_too_few_survivors_is_said_in_numbers(cohort):
    spec = cohort.spec(min_=4)
    with pytest.raises(TooFewSurvivors, match="3 of the devices"):
        cohort.sum(
            spec,
            terms_of(cohort.names, spec),
            lambda phase, party: phase == CONTRIBUTE and party in NAMES[:2],
        )
