"""The sum protocols by name: which one a plan asks for, and whether it can work."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from atoll.privacy.errors import BadParameters
from atoll.privacy.mode import MODES, Mode
from atoll.privacy.plain import PlainHubSession, PlainParty
from atoll.privacy.ring import Ring
from atoll.privacy.secagg import SecaggParty
from atoll.privacy.secagg_hub import SecaggHubSession
from atoll.privacy.sums import HubSum, PartySum, RoundKey, SumSpec
from atoll.privacy.update import UpdateSpec
from atoll.privacy.wrapping import PartyIdentity, PeerLike

__all__ = [
    "MODES",
    "HubSession",
    "Mode",
    "PartyIdentity",
    "PeerLike",
    "check",
    "hub_session",
    "party_session",
]


class HubSession(Protocol):
    """The hub's side of all sums of a plan."""

    def open(self, spec: SumSpec, parties: Sequence[str]) -> HubSum:
        """Return the hub's side of one sum over ``parties``."""
        ...

    def dump(self) -> bytes:
        """Return what a restarted hub needs to go on; nothing secret."""
        ...

    def load(self, data: bytes) -> None:
        """Take back what :meth:`dump` returned; raise :class:`Refused` when it does not fit."""
        ...


def hub_session(mode: str, roster: Mapping[str, bytes]) -> HubSession:
    """Return the hub's side for ``mode``; ``roster`` maps every party to its certificate (PEM).

    Raises :class:`BadParameters` for an unknown mode or a cohort that the mode cannot add.
    """
    if _known(mode) == "plain":
        return PlainHubSession()
    if mode == "secagg":
        return SecaggHubSession(roster)
    from atoll.privacy.he_hub import HeHubSession

    return HeHubSession(roster)


def party_session(mode: str, me: PartyIdentity) -> PartySum:
    """Return one party's side for ``mode``; raise :class:`BadParameters` for an unknown one."""
    if _known(mode) == "plain":
        return PlainParty(me.party)
    if mode == "secagg":
        return SecaggParty(me)
    from atoll.privacy.he import HeParty

    return HeParty(me)


def check(mode: str, update: UpdateSpec, length: int, parties: int) -> None:
    """Raise :class:`BadParameters` for what could not work, before anything starts.

    ``length`` is the number of model parameters, ``parties`` the size of the cohort.
    """
    update.room(length)
    check_parties(mode, update, parties)


def check_parties(mode: str, update: UpdateSpec, parties: int) -> None:
    """Raise :class:`BadParameters` for sums that could not work whatever the model's size."""
    if not update.survivors <= parties:
        raise BadParameters(
            f"cohort.min_devices = {update.survivors} and the cohort has {parties} devices: "
            "lower it, or have more devices"
        )
    # The hub's noise goes on the sum, so it needs room once, whatever the cohort.
    if parties * update.bound + update.tail >= 2**63:
        raise BadParameters(
            "the sum does not fit 64 bits; lower privacy.bits or privacy.noise_multiplier"
        )
    if _known(mode) == "plain":
        return
    if update.survivors < 2:
        raise BadParameters("a sum of one term hides nothing; set cohort.min_devices to 2 or more")
    spec = SumSpec(RoundKey("check", 0), 1, update.bound, parties, update.survivors)
    if mode == "secagg":
        Ring.of(spec)
        return
    from atoll.privacy import bfv
    from atoll.privacy.packing import Layout

    Layout.of(spec, bfv.plain_bits_for(parties))


def _known(mode: str) -> Mode:
    for known in MODES:
        if mode == known:
            return known
    raise BadParameters(f"there is no privacy.mode = {mode!r}; use one of {', '.join(MODES)}")
