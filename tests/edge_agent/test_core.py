"""The agent's decisions: examples, and what must hold whatever happens."""

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.edge_agent import actions as do
from atoll.edge_agent import core
from atoll.edge_agent import events as on
from atoll.edge_agent.core import State, step
from atoll.edge_agent.events import Release
from atoll.fleet import twin
from atoll.fleet.wire import Desired

ONE, TWO = Release("gait", 1), Release("gait", 2)


def want(version: int, release: int | None = 1, *, train: bool = False) -> on.Wanted:
    model = None if release is None else "gait"
    return on.Wanted(Desired(version=version, model=model, release=release, train=train))


def play(events: Iterable[on.Input], state: State | None = None) -> tuple[State, list[do.Action]]:
    state = state or State()
    done: list[do.Action] = []
    for event in events:
        state, more = step(state, event)
        done += more
    return state, done


START = [on.Begin(None, None), on.LinkUp()]
INSTALLED = [
    *START,
    want(1),
    on.Fetched(ONE),
    on.ChildUp("serving"),
    on.Accepted(ONE),
]


def reports(done: list[do.Action]) -> list[tuple[str, int | None]]:
    found = [
        (one.reported.state, one.reported.release) for one in done if isinstance(one, do.Report)
    ]
    return [one for index, one in enumerate(found) if not index or one != found[index - 1]]


def test_a_wanted_release_is_fetched_checked_installed_and_reported():
    state, done = play(INSTALLED)
    assert state.installed == ONE
    assert [one for one in done if isinstance(one, do.Fetch | do.Start | do.Load | do.Install)] == [
        do.Fetch(ONE),
        do.Start("serving"),
        do.Load(ONE),
        do.Install(ONE),
    ]
    assert reports(done) == [("fetching", None), ("checking", None), ("serving", 1)]


def test_a_rejected_release_leaves_the_old_one_and_says_why():
    state, done = play([*INSTALLED, want(2, 2), on.Fetched(TWO), on.Rejected(TWO, "golden check")])
    assert state.installed == ONE
    last = [one.reported for one in done if isinstance(one, do.Report)][-1]
    assert (last.state, last.release, last.error) == ("failed", 1, "golden check")


def test_a_failed_release_is_tried_again_only_under_a_new_version():
    state, _ = play([*INSTALLED, want(2, 2), on.FetchFailed(TWO, "bad signature", final=True)])
    state, done = play([want(2, 2), on.LinkUp(), on.Due("fetch")], state)
    assert not any(isinstance(one, do.Fetch) for one in done)
    _, done = play([want(3, 2)], state)
    assert do.Fetch(TWO) in done


def test_a_download_that_breaks_is_tried_again_with_growing_patience():
    state, _ = play([*START, want(1)])
    delays = []
    for _ in range(12):
        state, done = play([on.FetchFailed(ONE, "no route", final=False)], state)
        delays += [one.delay for one in done if isinstance(one, do.After)]
        state, done = play([on.Due("fetch")], state)
        assert done[0] == do.Fetch(ONE)
    assert delays == sorted(delays)
    assert delays[-1] == core.FETCH_LIMIT


def test_an_older_desired_state_is_ignored():
    state, _ = play([*INSTALLED, want(5, 2)])
    assert step(state, want(4, 1)) == (state, [])


def test_after_a_restart_what_was_installed_is_checked_again_and_served():
    known = Desired(version=1, model="gait", release=1)
    state, done = play([on.Begin(known, ONE), on.ChildUp("serving")])
    assert do.Start("serving") in done
    assert do.Load(ONE) in done
    assert not any(isinstance(one, do.Fetch) for one in done)
    _, done = play([on.Accepted(ONE)], state)
    assert reports(done) == [("serving", 1)]


def test_a_damaged_slot_is_fetched_anew():
    known = Desired(version=1, model="gait", release=1)
    _, done = play([on.Begin(known, ONE), on.ChildUp("serving"), on.Rejected(ONE, "damaged")])
    assert do.Install(None) in done
    assert do.Fetch(ONE) in done


def test_a_release_that_kills_the_serving_process_is_refused_and_the_old_one_comes_back():
    killed = on.ChildDown("serving", "was ended by SIGSEGV", 5.0)
    state, done = play([*INSTALLED, want(2, 2), on.Fetched(TWO), killed])
    assert state.refused is not None
    assert "SIGSEGV" in state.refused[1]
    state, done = play([on.Due("serving"), on.ChildUp("serving")], state)
    assert do.Load(ONE) in done
    assert do.Load(TWO) not in done


def test_training_runs_while_the_window_is_open():
    state, done = play([*START, want(1, None, train=True)])
    assert do.Start("trainer") in done
    state, done = play([on.ChildUp("trainer"), want(2, None)], state)
    assert do.Finish("trainer") in done
    # Opened again before the old process has ended: started only after it.
    state, done = play([want(3, None, train=True)], state)
    assert do.Start("trainer") not in done
    state, done = play([on.ChildDown("trainer", "ended", 3.0)], state)
    assert do.Start("trainer") in done


def test_a_trainer_that_fails_at_once_is_started_ever_more_slowly_and_told_once():
    state, _ = play([*START, want(1, None, train=True)])
    delays, told = [], 0
    for _ in range(10):
        state, done = play([on.ChildUp("trainer"), on.ChildDown("trainer", "failed", 0.1)], state)
        delays += [one.delay for one in done if isinstance(one, do.After)]
        told += sum(isinstance(one, do.Tell) for one in done)
        state, _ = play([on.Due("trainer")], state)
    assert delays == sorted(delays)
    assert delays[-1] == core.CHILD_LIMIT
    assert told == 1


def test_nothing_wanted_means_nothing_served():
    _, done = play([*INSTALLED, want(2, None)])
    assert do.Install(None) in done
    assert do.Finish("serving") in done
    assert reports(done)[-1] == ("idle", None)


def test_a_new_certificate_is_shown_to_the_broker_at_once():
    state, done = play([on.LinkDown("away"), on.Renewed(10.0, new=True)])
    assert do.Connect() in done
    # The timer of the connection that failed must not disturb the new one.
    assert step(state, on.Due("link"))[1] == []
    _, done = play([on.Renewed(10.0, new=False)])
    assert do.Connect() not in done


def test_the_link_is_tried_again_with_growing_patience():
    state, delays = State(), []
    for _ in range(9):
        state, done = play([on.LinkDown("refused")], state)
        delays += [one.delay for one in done if isinstance(one, do.After)]
        state, done = step(state, on.Due("link"))
        assert done == [do.Connect()]
    assert delays[:4] == [1, 2, 4, 8]
    assert delays[-1] == core.LINK_LIMIT


releases = st.builds(Release, st.sampled_from(["gait", "heart"]), st.integers(1, 3))
parts = st.sampled_from(["serving", "trainer"])
inputs = st.one_of(
    st.just(on.LinkUp()),
    st.builds(on.LinkDown, st.just("away")),
    st.builds(
        lambda version, release, train: on.Wanted(
            Desired(
                version=version,
                model=release.model if release else None,
                release=release.number if release else None,
                train=train,
            )
        ),
        st.integers(1, 30),
        st.none() | releases,
        st.booleans(),
    ),
    st.builds(on.Fetched, releases),
    st.builds(on.FetchFailed, releases, st.just("broke"), final=st.booleans()),
    st.builds(on.Accepted, releases),
    st.builds(on.Rejected, releases, st.just("no")),
    st.builds(on.ChildUp, parts),
    st.builds(on.ChildDown, parts, st.just("ended"), st.sampled_from([0.1, 100.0])),
    st.builds(on.Due, st.sampled_from(["link", "fetch", "serving", "trainer", "renew"])),
    st.builds(on.Renewed, st.just(60.0), st.booleans()),
    st.builds(on.RenewFailed, st.just("hub away")),
)


class World:
    """What the control process and its children would do: checks each action against it."""

    def __init__(self) -> None:
        self.children: set[str] = set()
        self.ending: set[str] = set()
        self.fetching: Release | None = None
        self.accepted: set[Release] = set()
        self.loading: set[Release] = set()

    def about(self, event: on.Input) -> on.Input:
        """Make an answer be about what was asked."""
        if isinstance(event, on.Fetched | on.FetchFailed) and self.fetching is not None:
            return replace(event, release=self.fetching)
        if isinstance(event, on.Accepted | on.Rejected) and self.loading:
            return replace(event, release=min(self.loading))
        return event

    def possible(self, event: on.Input) -> bool:
        """Whether the outside could say this now."""
        match event:
            case on.Fetched(release) | on.FetchFailed(release):
                return release == self.fetching
            case on.Accepted(release) | on.Rejected(release):
                return release in self.loading and "serving" in self.children
            case on.ChildUp(part):
                return part in self.children and part not in self.ending
            case on.ChildDown(part):
                return part in self.children
            case _:
                return True

    def happened(self, event: on.Input) -> None:
        match event:
            case on.Fetched() | on.FetchFailed():
                self.fetching = None
            case on.Accepted(release):
                self.loading.discard(release)
                self.accepted.add(release)
            case on.Rejected(release):
                self.loading.discard(release)
            case on.ChildDown(part):
                self.children.discard(part)
                self.ending.discard(part)
                if part == "serving":
                    self.loading.clear()

    def carry_out(self, action: do.Action) -> None:
        match action:
            case do.Fetch(release):
                assert self.fetching is None, "two downloads at once"
                self.fetching = release
            case do.Start(part):
                assert part not in self.children, f"two {part} processes at once"
                self.children.add(part)
            case do.Finish(part):
                assert part in self.children
                self.ending.add(part)
            case do.Load(release):
                self.loading.add(release)
            case do.Install(release) if release is not None:
                assert release in self.accepted, "installed what was never accepted"


@given(st.lists(inputs, max_size=60))
@settings(max_examples=300)
def test_whatever_happens(events):
    world, state = World(), State()
    state, done = step(state, on.Begin(None, None))
    for action in done:
        world.carry_out(action)
    version = 0
    for drawn in events:
        event = world.about(drawn)
        if not world.possible(event):
            continue
        world.happened(event)
        state, done = step(state, event)
        for action in done:
            world.carry_out(action)
        if state.desired is None:
            continue
        assert state.desired.version >= version
        version = state.desired.version
        reported = state.reported
        assert reported is not None
        serves = (reported.model, reported.release)
        assert serves == (state.installed if state.live and state.installed else (None, None))
        assert reported.desired_version == version
        if state.attempt is None and (state.live or state.installed is None):
            # At rest: the hub and the twin agree that nothing is left to do.
            assert twin.settled(state.desired, reported)
            assert twin.reconcile(state.desired, reported) is None


@given(st.lists(inputs, max_size=20), st.lists(inputs, min_size=1, max_size=10))
@settings(max_examples=60)
def test_after_stop_nothing_more_is_done(before, after):
    state, _ = play([on.Begin(None, None), *before])
    state, done = step(state, on.Stop())
    assert done == [do.Quit()]
    assert play(after, state) == (state, [])


@given(st.lists(inputs, max_size=40))
@settings(max_examples=60)
def test_the_same_events_give_the_same_actions(events):
    assert play(events) == play(events)
