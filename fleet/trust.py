"""Which signed release a device may install: what the offline key said, and no further back.

Bundles are TUF targets (The Update Framework 1.0.34) under ``{model}/{release}/{file}``. TUF
itself refuses older *metadata*, but a targets file legitimately lists older *releases*, and an
online hub chooses among them. So each signed target says in its ``custom`` field which release
it belongs to and the one release that a device may go back to from it. Going back any further
takes the offline key.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from atoll.fleet.bundle import FILES
from atoll.fleet.errors import BadBundle

CUSTOM: Final = "atoll"
"""The key under which our facts stand in a target's ``custom`` field."""

_PATH: Final = re.compile(r"([a-z0-9][a-z0-9-]{0,62})/([1-9][0-9]{0,8})/([a-z0-9.]+)")


class TargetInfo(NamedTuple):
    """What a signed target says: its release, and the release that may replace it again."""

    release: int
    fallback: int | None

    def custom(self) -> dict[str, Any]:
        """Return the ``custom`` field of a TUF target."""
        return {CUSTOM: {"release": self.release, "fallback": self.fallback}}


class SignedTarget(Protocol):
    """What is read of a :class:`tuf.api.metadata.TargetFile`."""

    @property
    def custom(self) -> Any:  # noqa: ANN401 -- any JSON, judged by :func:`info_of`
        """Whatever the signer put beside length and hashes."""
        ...


class TargetPath(NamedTuple):
    """A target path taken apart."""

    model: str
    release: int
    file: str


def target_path(model: str, release: int, file: str) -> str:
    """Return the TUF target path of a bundle's file; raise :class:`BadBundle` for odd parts."""
    path = f"{model}/{release}/{file}"
    parse_target_path(path)
    return path


def parse_target_path(path: str) -> TargetPath:
    """Take a target path apart; raise :class:`BadBundle` for any that is not ours."""
    found = _PATH.fullmatch(path)
    if not found or found[3] not in FILES:
        raise BadBundle(f"not a target of ours: {path!r}")
    return TargetPath(found[1], int(found[2]), found[3])


def info_of(path: str, target: SignedTarget) -> TargetInfo:
    """Read what the signed target at ``path`` says; raise :class:`BadBundle`.

    The release in ``custom`` must be the one in the path, and the fallback an older one.
    """
    custom = target.custom if isinstance(target.custom, dict) else {}
    facts = custom.get(CUSTOM)
    release = facts.get("release") if isinstance(facts, dict) else None
    fallback = facts.get("fallback") if isinstance(facts, dict) else None
    if type(release) is not int or release != parse_target_path(path).release:
        raise BadBundle(f"target {path} does not say which release it is")
    if fallback is not None and (type(fallback) is not int or not 0 < fallback < release):
        raise BadBundle(f"target {path} names no earlier release as its fallback: {fallback!r}")
    return TargetInfo(release, fallback)


def newest(targets: Mapping[str, SignedTarget], model: str) -> TargetInfo | None:
    """Return what the newest signed release of ``model`` says, or none if there is none.

    ``targets`` is that of a verified ``targets.json``. Raises :class:`BadBundle` when the
    files of that release contradict each other.
    """
    ours = {path: target for path, target in targets.items() if path.startswith(f"{model}/")}
    releases = {path: parse_target_path(path).release for path in ours}
    if not releases:
        return None
    top = max(releases.values())
    said = {info_of(path, ours[path]) for path, release in releases.items() if release == top}
    if len(said) != 1:
        raise BadBundle(f"the files of {model} release {top} name different fallbacks")
    return said.pop()


def may_install(current: int | None, wanted: int, newest: TargetInfo) -> None:
    """Raise :class:`BadBundle` unless a device on ``current`` may install ``wanted``.

    Forward is always allowed, up to the newest signed release. Backward is allowed only to
    the fallback that the newest signed release names. A device that has nothing (``current``
    none) may install any signed release: it has no newer one to lose.
    """
    if wanted > newest.release:
        raise BadBundle(f"release {wanted} is not signed; the newest is {newest.release}")
    if current is None or wanted >= current:
        return
    if newest.release < current or wanted != newest.fallback:
        raise BadBundle(
            f"release {wanted} is older than {current}, which serves, and the newest signed "
            f"release {newest.release} does not name it as its fallback; sign one that does"
        )
