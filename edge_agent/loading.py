"""Making a release ready to serve, or refusing it: digests, load, warm-up, golden check."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import numpy as np

from atoll.edge_agent import runtime
from atoll.edge_agent.events import Release
from atoll.edge_agent.runtime import Port, Runtime
from atoll.edge_agent.watching import load_profile
from atoll.fleet import bundle
from atoll.fleet.bundle import Manifest
from atoll.fleet.errors import BadBundle
from atoll.fleet.profile import Profile

WARM_RUNS: Final = 3


@dataclass(frozen=True, slots=True)
class Ready:
    """A release that may serve."""

    release: Release
    manifest: Manifest
    profile: Profile
    runtime: Runtime

    @property
    def inputs(self) -> Sequence[Port]:
        """The model's inputs."""
        return self.runtime.inputs

    @property
    def outputs(self) -> Sequence[Port]:
        """The model's outputs."""
        return self.runtime.outputs


def prepare(release: Release, directory: Path, threads: int = 1) -> Ready:
    """Load a bundle and make sure that it computes on this device what it should.

    Raises :class:`atoll.fleet.errors.FleetError` or
    :class:`atoll.edge_agent.errors.BadModel`.
    """
    manifest = bundle.read(directory)
    if manifest.model != release.model:
        raise BadBundle(f"the bundle is of {manifest.model!r}, not {release.model!r}")
    profile = load_profile(directory)
    engine = runtime.load(directory / bundle.MODEL, threads)
    _check_ports(manifest, engine)
    if len(profile.classes) != len(manifest.classes):
        raise BadBundle("profile and manifest disagree about the number of classes")
    golden = bundle.read_golden(directory)
    if golden.inputs.shape[1:] != manifest.input.shape:
        raise BadBundle("golden inputs do not have the model's input shape")
    name, out = manifest.input.name, manifest.output.name
    for _ in range(WARM_RUNS):
        engine.run({name: golden.inputs[:1]})
    got = engine.run({name: golden.inputs})[out]
    bundle.golden_check(golden.expected, got, golden.tolerance)
    return Ready(release, manifest, profile, engine)


def _check_ports(manifest: Manifest, engine: Runtime) -> None:
    names = [port.name for port in engine.inputs]
    if names != [manifest.input.name] or manifest.output.name not in {
        port.name for port in engine.outputs
    }:
        raise BadBundle("the model's inputs and outputs are not those of the manifest")
    port = engine.inputs[0]
    fixed = tuple(size for size in port.shape[1:] if size is not None)
    if port.dtype != np.float32 or prod(fixed) > prod(manifest.input.shape):
        raise BadBundle(f"the model's input is {port.dtype} {port.shape}, not the manifest's")
