"""Rollouts as the hub's tables hold them; what happens when is decided by ``fleet.rollout``.

A rollout is started and undone by a person, and moved on by the scheduler's :func:`tick`. All
of them write what is wanted into the twins (:func:`atoll.server.desired.want`); nothing here
talks to a device.

A device that serves a release ships counts of what it serves, so before the first device is
told of one, the model's ledger is charged for them. A served row lies in one window of one
device, so each pays for one release of the noise that the signed manifest names, whatever the
number of windows and devices: one charge for each release, in the unit of a row.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, RowMapping, insert, select, update

from atoll.fleet import rollout as rules
from atoll.fleet.rollout import Decision, Rollout, Twin
from atoll.fleet.wire import Desired, Reported
from atoll.privacy.ledger import Gaussian, Ledger, Unnoised
from atoll.server import audit, desired
from atoll.server.errors import BadInput, Conflict, NotFound
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.schema import alerts, devices, releases, rollouts, twins
from atoll.server.store import Store

log = logging.getLogger(__name__)

SCHEDULER: Final = "scheduler"
"""Who the audit log names when the rules moved a rollout on."""

_DELTA: Final = 1e-5
"""At which the ledger answers a charge with what is spent; nobody asks here."""


def start(
    connection: Connection,
    model: str,
    *,
    release: int | None = None,
    canaries: Sequence[str] | None = None,
    actor: str,
    now: float,
) -> int:
    """Roll a release (the newest when none is named) out to the fleet; return the rollout's id.

    ``canaries`` go first; without any named, one device does: of those online, the one heard
    from last. A rollout of the same model that still runs is superseded. Raises
    :class:`NotFound` for a release that is not there and :class:`BadInput` for canaries that
    are not in the fleet or a fleet that is empty.
    """
    row = _release(connection, model, release)
    fleet = _fleet(connection)
    if canaries is None:
        canaries = fleet[:1]
    try:
        begun = rules.start(model, row["release"], row["fallback"], sorted(fleet), canaries)
    except ValueError as error:
        raise BadInput(str(error), "see `atoll device list`") from error
    running = select(rollouts).where(
        rollouts.c.model == model, rollouts.c.state.in_(sorted(rules.RUNNING))
    )
    for older in connection.execute(running).mappings().all():
        reason = f"release {begun.release} is rolled out instead"
        _write(connection, older, rules.supersede(_read(connection, older), reason), now)
    rollout: int = connection.execute(
        insert(rollouts)
        .values(
            model=model,
            release=begun.release,
            state=begun.state,
            reason="",
            canaries=list(begun.canaries),
            targets=list(begun.targets),
            created_at=now,
            created_by=actor,
            updated_at=now,
        )
        .returning(rollouts.c.id)
    ).scalar_one()
    audit.record(
        connection,
        actor,
        "rollout.start",
        str(rollout),
        now,
        model=model,
        release=begun.release,
        canaries=list(begun.canaries),
        devices=len(begun.targets),
    )
    return rollout


def roll_back(connection: Connection, model: str, *, actor: str, now: float, reason: str) -> int:
    """Return the devices of the model's newest rollout to the signed fallback; return its id.

    No key is needed: the release itself names, signed, what it may fall back to. Devices ask
    that of the newest signed release alone (:func:`atoll.fleet.trust.may_install`). Raises
    :class:`NotFound` without a rollout and :class:`Conflict` when it was undone already, has
    nothing to fall back to, or a newer release is signed.
    """
    row = (
        connection.execute(
            select(rollouts).where(rollouts.c.model == model).order_by(rollouts.c.id.desc())
        )
        .mappings()
        .first()
    )
    if row is None:
        raise NotFound(f"{model} has not been rolled out", "see `atoll model list`")
    held = _read(connection, row)
    if held.state in {"rolled-back", "halted"}:
        raise Conflict(f"{model} release {held.release} was {held.state} already: {held.reason}")
    newest = _release(connection, model, None)["release"]
    if held.release != newest:
        raise Conflict(
            f"{model} release {newest} is signed since, and devices go back from the newest alone",
            f"roll release {newest} out instead",
        )
    if held.fallback is None:
        raise Conflict(
            f"{model} release {held.release} names no release to fall back to",
            "publish another release and roll it out",
        )
    decision = rules.roll_back(held, _twins(connection, held), reason)
    _apply(connection, row, decision, actor, now)
    return int(row["id"])


def tick(store: Store, now: float) -> list[int]:
    """Move every running rollout on by what the devices reported; return those that changed.

    The telemetry of a release is charged before it is told to anybody, and so is that of the
    release to which its devices may have to go back.
    """
    running = select(rollouts).where(rollouts.c.state.in_(sorted(rules.RUNNING)))
    with store.read() as connection:
        rows = connection.execute(running).mappings().all()
        moving = {
            int(row["id"]): _noises(connection, held)
            for row, held in ((row, _read(connection, row)) for row in rows)
            if _moves(held, rules.step(held, _twins(connection, held)))
        }
    if not moving:
        return []
    for row in rows:
        for release, noise in moving.get(int(row["id"]), {}).items():
            charge_telemetry(store, row["model"], release, noise, now)
    changed = []
    with store.begin() as connection:
        for row in connection.execute(running.where(rollouts.c.id.in_(moving))).mappings().all():
            held = _read(connection, row)
            decision = rules.step(held, _twins(connection, held))
            if _moves(held, decision):
                _apply(connection, row, decision, SCHEDULER, now)
                changed.append(int(row["id"]))
    return changed


def charge_telemetry(store: Store, model: str, release: int, noise: float, now: float) -> None:
    """Charge the model's ledger for the counts of a release's devices, once for all of them.

    ``noise`` is the manifest's ``telemetry_noise``. Nothing is refused: the ledger says
    what a release promises to the rows it is served.
    """
    ledger = Ledger(SqlLedgerStore(store, lambda: now), model, None, _DELTA, unit="row")
    ledger.charge(f"telemetry/{model}/{release}", Gaussian(noise) if noise else Unnoised())


def _noises(connection: Connection, held: Rollout) -> dict[int, float]:
    """Return the ``telemetry_noise`` of the releases that a rollout may tell devices of."""
    told = [release for release in (held.release, held.fallback) if release is not None]
    query = select(releases.c.release, releases.c.manifest).where(
        releases.c.model == held.model, releases.c.release.in_(told)
    )
    return {
        row.release: float(row.manifest.get("telemetry_noise", 0.0))
        for row in connection.execute(query)
    }


def _moves(held: Rollout, decision: Decision) -> bool:
    return bool(decision.tell) or decision.rollout != held


def _apply(
    connection: Connection, row: RowMapping, decision: Decision, actor: str, now: float
) -> None:
    model, after = decision.rollout.model, decision.rollout
    for device, release in decision.tell.items():
        desired.want(
            connection, device, model=model if release is not None else None, release=release
        )
    _write(connection, row, after, now)
    if after.state == row["state"]:
        return
    audit.record(
        connection,
        actor,
        f"rollout.{after.state}",
        str(row["id"]),
        now,
        model=model,
        release=after.release,
        reason=after.reason,
    )
    if after.state == "halted":
        connection.execute(
            insert(alerts).values(
                at=now,
                kind="rollout",
                severity="error",
                model=model,
                text=f"The rollout of {model} release {after.release} was halted: {after.reason}",
            )
        )
        log.warning("rollout %s of %s was halted: %s", row["id"], model, after.reason)


def _write(connection: Connection, row: RowMapping, after: Rollout, now: float) -> None:
    connection.execute(
        update(rollouts)
        .where(rollouts.c.id == row["id"])
        .values(state=after.state, reason=after.reason, updated_at=now)
    )


def _read(connection: Connection, row: RowMapping) -> Rollout:
    return Rollout(
        model=row["model"],
        release=row["release"],
        fallback=_release(connection, row["model"], row["release"])["fallback"],
        targets=tuple(row["targets"]),
        canaries=tuple(row["canaries"]),
        state=row["state"],
        reason=row["reason"],
    )


def _release(connection: Connection, model: str, release: int | None) -> Mapping[str, Any]:
    query = select(releases.c.release, releases.c.fallback).where(releases.c.model == model)
    if release is not None:
        query = query.where(releases.c.release == release)
    row = connection.execute(query.order_by(releases.c.release.desc())).mappings().first()
    if row is None:
        named = model if release is None else f"{model} release {release}"
        raise NotFound(f"{named} has not been published", "see `atoll model list`")
    return dict(row)


def _fleet(connection: Connection) -> list[str]:
    """Return the devices of the fleet, those online first, the latest heard from first."""
    query = (
        select(devices.c.id)
        .where(devices.c.revoked_at.is_(None))
        .order_by(devices.c.online.desc(), devices.c.last_seen.desc(), devices.c.id)
    )
    return list(connection.execute(query).scalars())


def _twins(connection: Connection, held: Rollout) -> dict[str, Twin]:
    query = (
        select(twins.c.device, twins.c.desired, twins.c.desired_version, twins.c.reported)
        .join(devices, devices.c.id == twins.c.device)
        .where(devices.c.revoked_at.is_(None))
    )
    targets = set(held.targets)
    return {
        row.device: Twin(
            msgspec.convert({"version": row.desired_version} | row.desired, Desired),
            msgspec.convert(row.reported, Reported) if row.reported else None,
        )
        for row in connection.execute(query)
        if row.device in targets
    }
