"""Watching: from the windows that devices ship to drift, alerts and proposed runs.

When a device begins to drift (:mod:`atoll.server.watch_rules`) an alert opens, once, and
closes when the device is stable again; and if no run of the model is under way or proposed
already, one is proposed with the plan of the latest run. A proposal does nothing until a
person approves it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, update

from atoll.fleet.counts import unpack_all, unpack_all_signed
from atoll.fleet.drift import DeviceVerdict
from atoll.fleet.errors import BadProfile
from atoll.fleet.profile import Profile
from atoll.fleet.samples import Tally
from atoll.server import audit, runs, schema
from atoll.server.errors import BadInput
from atoll.server.store import Store
from atoll.server.watch_rules import (
    Counted,
    Rules,
    Serving,
    Split,
    alert_text,
    decide,
    judge,
    split,
)

log = logging.getLogger(__name__)

HUB: Final = "hub"
"""Who opens alerts and proposes runs."""
UNDER_WAY: Final = ("proposed", "approved", "running", "gated")
"""States of a run that make another proposal pointless."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """What a tick did."""

    assessed: Sequence[Serving] = ()
    opened: Sequence[Serving] = ()
    closed: Sequence[Serving] = ()
    proposed: Sequence[str] = ()
    """Ids of the runs."""


def tick(store: Store, now: float, rules: Rules | None = None) -> Ticked:
    """Assess every device that sent windows since the last tick, and act on what changed.

    ``now`` is Unix seconds. Assessing holds no lock: the verdicts are written in one short
    transaction.
    """
    rules = rules or Rules()
    with store.read() as connection:
        verdicts = _assess(connection, rules)
    if not verdicts:
        return Ticked()
    opened: list[Serving] = []
    closed: list[Serving] = []
    proposed: list[str] = []
    with store.begin() as connection:
        for serving, (verdict, compared, upto) in verdicts.items():
            _write_drift(connection, serving, verdict, compared, upto, now)
            action = decide(verdict.state, alerted=_alerted(connection, serving))
            if action == "open":
                _open(connection, serving, verdict, now)
                opened.append(serving)
            elif action == "close":
                _close(connection, serving, now)
                closed.append(serving)
        for model in dict.fromkeys(serving.model for serving in opened):
            reasons = [alert_text(s, verdicts[s][0]) for s in opened if s.model == model]
            run = _propose(connection, model, "; ".join(reasons), now)
            proposed += [run] if run else []
    return Ticked(tuple(verdicts), tuple(opened), tuple(closed), tuple(proposed))


def compared_windows(
    connection: Connection, serving: Serving, profile: Profile, rules: Rules
) -> Split:
    """Return what is compared for a device now; windows that do not fit are left out."""
    return split(
        _windows(connection, serving, profile, newest_first=False),
        _windows(connection, serving, profile, newest_first=True),
        rules,
    )


def profile_of(connection: Connection, model: str, release: int) -> Profile | None:
    """Return the reference profile of a release; none if the hub has no such release."""
    table = schema.releases.c
    query = select(table.profile).where(table.model == model, table.release == release)
    data = connection.execute(query).scalar_one_or_none()
    return None if data is None else Profile.decode(data)


def _assess(
    connection: Connection, rules: Rules
) -> dict[Serving, tuple[DeviceVerdict, Split, int]]:
    verdicts = {}
    profiles: dict[tuple[str, int], Profile | None] = {}
    for serving, upto in _new_windows(connection):
        release = (serving.model, serving.release)
        if release not in profiles:
            profiles[release] = profile_of(connection, *release)
        profile = profiles[release]
        if profile is not None:
            compared = compared_windows(connection, serving, profile, rules)
            verdicts[serving] = (judge(profile, compared, rules), compared, upto)
    return verdicts


def _new_windows(connection: Connection) -> list[tuple[Serving, int]]:
    """Return the devices with windows since the last tick, under the release they serve."""
    d, w = schema.drift.c, schema.windows.c
    details = connection.execute(select(d.detail)).scalars()
    seen = max((int(detail.get("upto", 0)) for detail in details), default=0)
    fresh = connection.execute(
        select(w.device, w.model, w.release, func.max(w.message))
        .where(w.message > seen)
        .group_by(w.device, w.model, w.release)
    )
    serves = {
        device: (reported.get("model"), reported.get("release"))
        for device, reported in connection.execute(
            select(schema.twins.c.device, schema.twins.c.reported).where(
                schema.twins.c.reported.is_not(None)
            )
        )
        if reported
    }
    return [
        (Serving(device, model, release), upto)
        for device, model, release, upto in fresh
        if serves.get(device) == (model, release)
    ]


def _windows(
    connection: Connection, serving: Serving, profile: Profile, *, newest_first: bool
) -> Iterator[Counted]:
    w = schema.windows.c
    query = select(w.message, w.rows, w.noise, w.counts).where(
        w.model == serving.model, w.release == serving.release, w.device == serving.device
    )
    if newest_first:
        query = query.order_by(w.received_at.desc(), w.message.desc())
    else:
        query = query.order_by(w.received_at, w.message)
    rows = connection.execute(query, execution_options={"yield_per": 32})
    with rows:
        for message, count, noise, packed in rows:
            unpack = unpack_all_signed if noise else unpack_all
            try:
                counts = unpack(msgspec.msgpack.decode(packed, type=dict[str, bytes]), profile.bins)
            except (BadProfile, msgspec.DecodeError):
                continue  # a device's mistake must not stop the watch over it
            yield Counted(message, Tally(counts, count, noise))


def _write_drift(
    connection: Connection,
    serving: Serving,
    verdict: DeviceVerdict,
    compared: Split,
    upto: int,
    now: float,
) -> None:
    d = schema.drift.c
    connection.execute(
        delete(schema.drift).where(
            d.device == serving.device, d.model == serving.model, d.release == serving.release
        )
    )
    connection.execute(
        insert(schema.drift).values(
            **serving._asdict(),
            at=now,
            state=verdict.state,
            rows=verdict.rows,
            score=verdict.score,
            detail={
                "upto": upto,
                "baseline_rows": compared.baseline.rows,
                "current_rows": compared.current.rows,
                "noise": verdict.noise,
                "variables": msgspec.to_builtins(verdict.variables),
                "population": msgspec.to_builtins(verdict.population),
            },
        )
    )


def _alerted(connection: Connection, serving: Serving) -> bool:
    a = schema.alerts.c
    query = select(a.id).where(
        a.kind == "drift",
        a.device == serving.device,
        a.model == serving.model,
        a.closed_at.is_(None),
    )
    return connection.execute(query).first() is not None


def _open(connection: Connection, serving: Serving, verdict: DeviceVerdict, now: float) -> None:
    connection.execute(
        insert(schema.alerts).values(
            at=now,
            kind="drift",
            severity="warning",
            device=serving.device,
            model=serving.model,
            text=alert_text(serving, verdict),
        )
    )
    audit.record(
        connection,
        HUB,
        "alert.open",
        serving.device,
        now,
        kind="drift",
        model=serving.model,
        release=serving.release,
        score=round(verdict.score, 3),
        variables=list(verdict.drifted),
    )


def _close(connection: Connection, serving: Serving, now: float) -> None:
    a = schema.alerts.c
    connection.execute(
        update(schema.alerts)
        .where(
            a.kind == "drift",
            a.device == serving.device,
            a.model == serving.model,
            a.closed_at.is_(None),
        )
        .values(closed_at=now)
    )
    audit.record(
        connection, HUB, "alert.close", serving.device, now, kind="drift", model=serving.model
    )


def _propose(connection: Connection, model: str, reason: str, now: float) -> str | None:
    """Propose a run with the latest plan of ``model``; none if there is no need or no plan.

    A plan whose task is not installed any more cannot be run, so none is proposed then.
    """
    r = schema.runs.c
    waiting = select(r.id).where(r.model == model, r.state.in_(UNDER_WAY))
    if connection.execute(waiting).first():
        return None
    latest = select(r.plan).where(r.model == model).order_by(r.created_at.desc()).limit(1)
    plan = connection.execute(latest).scalar_one_or_none()
    if plan is None:
        return None
    try:
        return runs.propose(connection, plan, actor=HUB, now=now, reason=reason)
    except BadInput as error:
        log.warning("no run of %s is proposed: %s", model, error)
        return None
