"""What the agent does next, decided without doing anything: ``step(state, event)``.

:mod:`atoll.edge_agent.control` turns the outside into events and carries the actions out.
Time and chance live there too: an :class:`After` asks for a :class:`Due` later, and the
control process spreads the delay.

One release is pursued at a time: fetch, then check in the serving process, then install.
What serves is replaced only by a release that the serving process accepted; any failure
leaves it as it is.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from atoll.edge_agent.actions import (
    Action,
    After,
    Announce,
    Connect,
    Fetch,
    Finish,
    Install,
    Load,
    Quit,
    Remember,
    Renew,
    Report,
    Start,
    Tell,
)
from atoll.edge_agent.events import (
    Accepted,
    Begin,
    ChildDown,
    ChildPart,
    ChildUp,
    Due,
    Fetched,
    FetchFailed,
    Input,
    LinkDown,
    LinkUp,
    Part,
    Rejected,
    Release,
    Renewed,
    RenewFailed,
    Stop,
    Wanted,
)
from atoll.fleet.wire import Desired, Event, Reported

Condition = Literal["down", "waiting", "starting", "up", "ending"]


@dataclass(frozen=True, slots=True)
class Child:
    """A child process as the core sees it; ``failures`` in a row set the back-off."""

    condition: Condition = "down"
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """The release being pursued; ``waiting`` for the next try after a failed download."""

    release: Release
    phase: Literal["fetching", "waiting", "checking"] = "fetching"
    failures: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """All the core knows."""

    desired: Desired | None = None
    installed: Release | None = None
    live: bool = False
    """Whether the serving process has confirmed ``installed`` since it started."""
    attempt: Attempt | None = None
    refused: tuple[int, str] | None = None
    """The desired version that failed for good, and why."""
    serving: Child = Child()
    trainer: Child = Child()
    link: Literal["waiting", "connecting", "up"] = "waiting"
    link_failures: int = 0
    renew_failures: int = 0
    reported: Reported | None = None
    stopping: bool = False

    @property
    def wanted(self) -> Release | None:
        """The release that the hub wants."""
        if self.desired is None or self.desired.model is None or self.desired.release is None:
            return None
        return Release(self.desired.model, self.desired.release)


Step = tuple[State, list[Action]]

LINK_LIMIT: Final = 60.0
FETCH_LIMIT: Final = 300.0
CHILD_LIMIT: Final = 120.0
STEADY_SECONDS: Final = 60.0
"""A child that ran this long does not count as failing again and again."""
RENEW_AGAIN: Final = 30.0
RENEW_LIMIT: Final = 3600.0


def backoff(failures: int, limit: float) -> float:
    """Seconds to wait after this many failures in a row: 1, 2, 4, … up to ``limit``."""
    return min(limit, 2.0 ** min(max(failures - 1, 0), 16))


def step(state: State, event: Input) -> Step:
    """Return the next state and what to do, in order."""
    if state.stopping:
        return state, []
    if isinstance(event, Stop):
        return replace(state, stopping=True), [Quit()]
    state, actions = _react(state, event)
    state, more = _pursue(state)
    actions += more
    state, more = _staff(state)
    actions += more
    report = _report(state)
    if report != state.reported and report is not None:
        state = replace(state, reported=report)
        actions.append(Report(report))
    return state, actions


def _react(state: State, event: Input) -> Step:  # noqa: C901  # one arm per kind of event
    match event:
        case Begin(desired, installed):
            state = replace(state, desired=desired, installed=installed, link="connecting")
            return state, [Connect(), After("renew", 0.0)]
        case LinkUp():
            actions: list[Action] = [Announce()]
            if state.reported is not None:
                actions.append(Report(state.reported))
            return replace(state, link="up", link_failures=0), actions
        case LinkDown():
            failures = state.link_failures + 1
            state = replace(state, link="waiting", link_failures=failures)
            return state, [After("link", backoff(failures, LINK_LIMIT))]
        case Wanted(desired):
            if state.desired is not None and desired.version <= state.desired.version:
                return state, []
            return replace(state, desired=desired, refused=None), [Remember(desired)]
        case Fetched() | FetchFailed():
            return _after_fetch(state, event)
        case Accepted(release):
            return _accepted(state, release)
        case Rejected(release, error):
            return _rejected(state, release, error)
        case ChildUp() | ChildDown():
            return _child(state, event)
        case Due(part):
            return _due(state, part)
        case Renewed(due_in, new):
            actions = [After("renew", max(due_in, RENEW_AGAIN))]
            if new:
                state = replace(state, link="connecting")
                actions.append(Connect())
            return replace(state, renew_failures=0), actions
        case RenewFailed(error):
            failures = state.renew_failures + 1
            actions = [After("renew", backoff(failures + 5, RENEW_LIMIT))]
            if failures == 1:
                actions.append(_warning("renewal", error))
            return replace(state, renew_failures=failures), actions
        case Stop():
            return state, []


def _after_fetch(state: State, event: Fetched | FetchFailed) -> Step:
    attempt = state.attempt
    if attempt is None or attempt.release != event.release:
        return state, []
    if event.release != state.wanted:
        return replace(state, attempt=None), []
    if isinstance(event, Fetched):
        state = replace(state, attempt=Attempt(event.release, "checking"))
        if state.serving.condition == "up":
            return state, [Load(event.release)]
        return state, []
    if event.final:
        return _refuse(replace(state, attempt=None), event.error), [
            _error("update", f"{event.release.model} {event.release.number}: {event.error}")
        ]
    failures = attempt.failures + 1
    state = replace(state, attempt=Attempt(attempt.release, "waiting", failures))
    actions: list[Action] = [After("fetch", backoff(failures, FETCH_LIMIT))]
    if failures == 1:
        actions.append(_warning("update", event.error))
    return state, actions


def _accepted(state: State, release: Release) -> Step:
    attempt = state.attempt
    if attempt is not None and attempt.release == release and attempt.phase == "checking":
        state = replace(state, installed=release, live=True, attempt=None)
        return state, [Install(release)]
    if release == state.installed:
        return replace(state, live=True), []
    return state, []


def _rejected(state: State, release: Release, error: str) -> Step:
    attempt = state.attempt
    told = _error("update", f"{release.model} {release.number}: {error}")
    if attempt is not None and attempt.release == release and attempt.phase == "checking":
        state = replace(state, attempt=None)
        if release == state.wanted:
            state = _refuse(state, error)
        return state, [told]
    if release == state.installed:
        # The slot was damaged since it was installed: forget it, and fetch it anew.
        return replace(state, installed=None, live=False), [told, Install(None)]
    return state, []


def _refuse(state: State, error: str) -> State:
    version = 0 if state.desired is None else state.desired.version
    return replace(state, refused=(version, error))


def _child(state: State, event: ChildUp | ChildDown) -> Step:
    if isinstance(event, ChildUp):
        return _child_up(state, event.part)
    before = state.trainer if event.part == "trainer" else state.serving
    if before.condition == "ending":  # as we asked; _staff starts it again if need be
        if event.part == "trainer":
            return replace(state, trainer=Child()), []
        return replace(state, serving=Child()), []
    if before.condition not in {"starting", "up"}:
        return state, []
    failures = 1 if event.lasted >= STEADY_SECONDS else before.failures + 1
    actions: list[Action] = [After(event.part, backoff(failures, CHILD_LIMIT))]
    if failures == 1:
        actions.append(_warning(event.part, f"the {event.part} process {event.how}"))
    after = Child("waiting", failures)
    if event.part == "trainer":
        return replace(state, trainer=after), actions
    state = replace(state, serving=after, live=False)
    attempt = state.attempt
    if before.condition == "up" and attempt is not None and attempt.phase == "checking":
        error = f"the serving process {event.how} while it checked the release"
        state, more = _rejected(state, attempt.release, error)
        actions += more
    return state, actions


def _child_up(state: State, part: ChildPart) -> Step:
    if part == "trainer":
        if state.trainer.condition != "starting":
            return state, []
        return replace(state, trainer=replace(state.trainer, condition="up")), []
    if state.serving.condition != "starting":
        return state, []
    state = replace(state, serving=replace(state.serving, condition="up"))
    actions: list[Action] = []
    if state.installed is not None:
        actions.append(Load(state.installed))
    if state.attempt is not None and state.attempt.phase == "checking":
        actions.append(Load(state.attempt.release))
    return state, actions


def _due(state: State, part: Part) -> Step:
    match part:
        case "link":
            if state.link != "waiting":  # a renewal has brought a new connection meanwhile
                return state, []
            return replace(state, link="connecting"), [Connect()]
        case "renew":
            return state, [Renew()]
        case "fetch":
            attempt = state.attempt
            if attempt is None or attempt.phase != "waiting":
                return state, []
            if attempt.release != state.wanted:
                return replace(state, attempt=None), []
            state = replace(state, attempt=Attempt(attempt.release, "fetching", attempt.failures))
            return state, [Fetch(attempt.release)]
        case "serving":
            if state.serving.condition == "waiting":
                state = replace(state, serving=Child("down", state.serving.failures))
            return state, []
        case "trainer":
            if state.trainer.condition == "waiting":
                state = replace(state, trainer=Child("down", state.trainer.failures))
            return state, []


def _pursue(state: State) -> Step:
    """Begin to fetch what is wanted and not there; stop what is wanted no more."""
    wanted = state.wanted
    if state.desired is not None and wanted is None and state.installed is not None:
        state = replace(state, installed=None, live=False)
        return state, [Install(None)]
    if wanted is None or wanted == state.installed:
        if state.attempt is not None and state.attempt.phase == "waiting":
            state = replace(state, attempt=None)
        return state, []
    attempt = state.attempt
    busy = attempt is not None and (attempt.phase != "waiting" or attempt.release == wanted)
    if busy or state.refused is not None:
        return state, []
    return replace(state, attempt=Attempt(wanted)), [Fetch(wanted)]


def _staff(state: State) -> Step:
    """Have the children run that should."""
    actions: list[Action] = []
    needed = state.installed is not None or (
        state.attempt is not None and state.attempt.phase == "checking"
    )
    if needed and state.serving.condition == "down":
        state = replace(state, serving=Child("starting", state.serving.failures))
        actions.append(Start("serving"))
    elif not needed and state.serving.condition in {"starting", "up"}:
        state = replace(state, serving=Child("ending"), live=False)
        actions.append(Finish("serving"))
    if _training(state):
        if state.trainer.condition == "down":
            state = replace(state, trainer=Child("starting", state.trainer.failures))
            actions.append(Start("trainer"))
    elif state.trainer.condition in {"starting", "up"}:
        state = replace(state, trainer=Child("ending"))
        actions.append(Finish("trainer"))
    return state, actions


def _training(state: State) -> bool:
    return state.desired is not None and state.desired.train


def _report(state: State) -> Reported | None:
    """Say what runs here in answer to the desired state; none before there was any."""
    if state.desired is None:
        return None
    wanted, installed = state.wanted, state.installed if state.live else None
    error: str | None = None
    phase: Literal["idle", "fetching", "checking", "serving", "failed"]
    if wanted is None:
        phase = "idle"
    elif wanted == installed:
        phase = "serving"
    elif state.refused is not None:
        phase, error = "failed", state.refused[1]
    elif state.attempt is not None and state.attempt.phase != "checking":
        phase = "fetching"
    else:
        phase = "checking"
    return Reported(
        desired_version=state.desired.version,
        model=installed.model if installed else None,
        release=installed.number if installed else None,
        state=phase,
        error=error,
    )


def _warning(kind: str, detail: str) -> Tell:
    return Tell(Event(kind=kind, severity="warning", detail=detail))


def _error(kind: str, detail: str) -> Tell:
    return Tell(Event(kind=kind, severity="error", detail=detail))
