"""A round that was answered is never answered anew, whatever a device has forgotten since."""

import numpy as np
import pytest

from atoll.federation.client_app import AnsweredHere, _Sums
from atoll.federation.kept import RUNS
from atoll.federation.messages import SumAsk
from atoll.privacy.errors import Refused
from atoll.privacy.modes import hub_session
from atoll.privacy.plain import PlainParty
from atoll.privacy.sums import CONTRIBUTE, RoundKey, SumSpec

TERM = np.array([1, -2, 3], dtype=np.int64)


def ask(run: str, number: int) -> SumAsk:
    spec = SumSpec(RoundKey(run, number), length=3, bound=5, parties=2, min_survivors=2)
    opening = hub_session("plain", {}).open(spec, ["me", "you"]).start()
    assert opening.phase == CONTRIBUTE
    return SumAsk(
        mode="plain",
        phase=CONTRIBUTE,
        payload=opening.payloads["me"],
        party="me",
        run=run,
        round=number,
        length=spec.length,
        bound=spec.bound,
        parties=spec.parties,
        min_survivors=spec.min_survivors,
    )


def test_forgetting_a_run_does_not_open_its_rounds_again() -> None:
    sums = _Sums(lambda _: PlainParty("me"), AnsweredHere())
    sums.answer(ask("mine", 1), TERM)
    for other in range(RUNS):
        sums.answer(ask(f"other-{other}", 1), TERM)
    with pytest.raises(Refused, match="round 1"):
        sums.answer(ask("mine", 1), TERM)
    assert sums.answer(ask("mine", 2), TERM)


def test_a_new_process_refuses_what_the_old_one_answered() -> None:
    answered = AnsweredHere()
    _Sums(lambda _: PlainParty("me"), answered).answer(ask("mine", 3), TERM)
    with pytest.raises(Refused, match="round 3"):
        _Sums(lambda _: PlainParty("me"), answered).answer(ask("mine", 3), TERM)
