"""What a simulation is of, so that another of something else is not taken for it.

The plan's fields beyond their defaults (which grow with the program), how many devices there are,
how many of them are in a round, and what the devices hold.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import numpy as np

from atoll.federation.plan import Plan
from atoll.simulations.evaluation import EVALUATORS
from atoll.simulations.populations import Population, evaluated_on

TOLD: Final = 5
"""So many differences are told; of others, how many there are."""
_LEFT_OUT: Final = object()


class Identity(msgspec.Struct, frozen=True):
    """What a simulation is of.

    ``plan`` has the fields by their full names, ``cohort`` a fixed size of it (none: the plan's
    own), ``data`` is the SHA-256 of examples (:func:`digest`).
    """

    plan: dict[str, Any]
    devices: int
    cohort: int | None
    data: str

    @property
    def run(self) -> str:
        """A name that two simulations have in common that are the same, on whatever data."""
        said = json.dumps([_nested(self.plan), self.devices, self.cohort], sort_keys=True)
        return f"{self.plan['name']}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def of(plan: Plan, population: Population, cohort: int | None) -> Identity:
    """Return what a simulation is of, in the types in which it is read again from JSON."""
    made = Identity(dict(_said(plan)), population.size, cohort, digest(population))
    return msgspec.json.decode(msgspec.json.encode(made), type=Identity)


def differences(there: Identity, here: Identity) -> str:
    """Say in what two simulations differ; nothing when they are the same."""
    found = [
        f"{name}: {_shown(there.plan, name)} there, {_shown(here.plan, name)} here"
        for name in sorted(there.plan.keys() | here.plan.keys())
        if there.plan.get(name, _LEFT_OUT) != here.plan.get(name, _LEFT_OUT)
    ]
    if there.devices != here.devices:
        found.append(f"devices: {there.devices} there, {here.devices} here")
    if there.cohort != here.cohort:
        fixed = (size or "the plan's" for size in (there.cohort, here.cohort))
        found.append("fixed size of the cohort: {} there, {} here".format(*fixed))
    if not found and there.data != here.data:
        found.append("data: devices held other examples there than here")
    more = len(found) - TOLD
    return "; ".join(found[:TOLD]) + (f"; and {more} more" if more > 0 else "")


def digest(population: Population) -> str:
    """Return the SHA-256 of what some devices, spread over all, hold, and of the test set."""
    hashed = hashlib.sha256()
    asked = min(EVALUATORS, population.size)
    for place in range(asked):
        held = population.examples(place * population.size // asked, "train")
        hashed.update(_bytes(held.x) + _bytes(held.y))
    for held in evaluated_on(population, EVALUATORS):
        hashed.update(_bytes(held.x) + _bytes(held.y))
    return hashed.hexdigest()


def _bytes(values: np.ndarray[Any, Any]) -> bytes:
    return f"{values.dtype.str}{values.shape}".encode() + values.tobytes()


def _said(part: msgspec.Struct, section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a plan says beyond the defaults, by the fields' full names."""
    for field in msgspec.structs.fields(part):
        name, value = section + field.name, getattr(part, field.name)
        if name == "evaluate_every":
            continue  # looking changes nothing
        if isinstance(value, msgspec.Struct):
            yield from _said(value, f"{name}.")
        elif value not in (field.default, {}):
            yield name, value


def _nested(said: dict[str, Any]) -> dict[str, Any]:
    """Return the fields in their sections."""
    nested: dict[str, Any] = {}
    for name, value in said.items():
        *sections, field = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    return nested


def _shown(said: dict[str, Any], name: str) -> str:
    value = said.get(name, _LEFT_OUT)
    return "left out" if value is _LEFT_OUT else json.dumps(value, ensure_ascii=False)
