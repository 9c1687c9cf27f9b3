"""A ServerApp holds a few replies at a time, however many the SuperLink has for it."""

import asyncio
from types import SimpleNamespace

import pytest
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)

from atoll.federation import messages, superlink
from atoll.federation.bundled_grid import BundledGrid
from atoll.federation.engine import InProcessGrid
from atoll.federation.exchange import Clock, converse
from atoll.federation.superlink import ANSWER_BYTES, FETCH_ALL, FETCH_PARTS
from atoll.privacy import frames

RUN = 1


class Parts:
    """What the SuperLink has of messages: their parts by name, until they are confirmed."""

    def __init__(self):
        self.object_store = self
        self.held = {}

    def get_object(self, run, name):
        assert run == RUN
        return self.held.get(name)

    def delete(self, name):
        self.held = {key: part for key, part in self.held.items() if key != name}


class Answered(BundledGrid):
    """A grid whose SuperLink has replies already; ``called`` is what was asked of it."""

    def __init__(self, replies, missing=()):
        super().__init__(InProcessGrid({}))
        self._bundled = True
        self.called, self.largest, self.parts = [], 0, Parts()
        self._found = PullAppMessagesResponse()
        for reply in replies:
            reply.metadata.__dict__["_message_id"] = reply.object_id
            bare = message_to_proto(remove_content_from_message(reply))
            self._found.messages_list.append(bare)
            self._found.message_object_trees.append(get_object_tree(reply))
            for name, part in get_all_nested_objects(reply).items():
                self.parts.held[name] = part.deflate()
        self.whole = dict(self.parts.held)
        for place in missing:
            del self.parts.held[self._found.message_object_trees[place].object_id]

    def _call(self, name, body, message):
        self.called.append(name)
        if name == FETCH_ALL:
            head, trees = [self._found.SerializeToString()], self._found.message_object_trees
        else:
            assert name == FETCH_PARTS
            head, trees = [], [ObjectTree.FromString(one) for one in frames.unpack(body).parts]
        parts = superlink._first_parts(self.parts, RUN, trees)
        self.largest = max(self.largest, sum(map(len, parts)))
        return frames.pack({}, [*head, *parts])

    def _pull(self, tree, names):
        self.called.append("one by one")
        return {name: self.whole[name] for name in names}


def replies(sizes):
    InProcessGrid({})  # lets this process make messages
    made = []
    for number, size in enumerate(sizes):
        ask = Message(messages.pack(messages.QueryAsk(name="", payload=b"")), 7, messages.QUERY)
        ask.metadata.__dict__["_message_id"] = f"ask-{number}"
        content = messages.pack(messages.QueryReply(payload=bytes([number]) * size))
        made.append(Message(content, reply_to=ask))
    return made


def payloads(found):
    return [
        (reply.metadata.reply_to_message_id, messages.unpack(reply.content, messages.QueryReply))
        for reply in found
    ]


def test_no_answer_is_larger_than_it_may_be_and_every_reply_comes_once():
    third = ANSWER_BYTES // 3
    sent = replies([third, third, third, 10, ANSWER_BYTES + 1, 10, 10])
    grid = Answered(sent)
    found = payloads(grid.pull_messages(["any"]))
    assert found == payloads(sent)
    # Two; the third and a small one; the one that is too large, alone; the rest.
    assert grid.called == [FETCH_ALL, FETCH_PARTS, FETCH_PARTS, FETCH_PARTS]
    assert ANSWER_BYTES < grid.largest < ANSWER_BYTES + 1000
    heads = {tree.object_id for tree in grid._found.message_object_trees}
    assert not heads & set(grid.parts.held)


def test_parts_are_fetched_when_their_reply_is_asked_for():
    grid = Answered(replies([ANSWER_BYTES, ANSWER_BYTES, ANSWER_BYTES]))
    coming = iter(grid.pull_messages(["any"]))
    assert grid.called == [FETCH_ALL]
    next(coming)
    assert grid.called == [FETCH_ALL]
    next(coming)
    assert grid.called == [FETCH_ALL, FETCH_PARTS]


def test_a_reply_whose_parts_are_still_on_their_way_is_pulled_and_holds_no_other_back(monkeypatch):
    monkeypatch.setattr(superlink, "_PARTS_SECONDS", 0.0)
    sent = replies([10, 20, ANSWER_BYTES, 30])
    grid = Answered(sent, missing=[1])
    assert payloads(grid.pull_messages(["any"])) == payloads(sent)
    assert grid.called == [FETCH_ALL, "one by one", FETCH_PARTS, FETCH_PARTS]


def test_what_a_device_writes_inside_its_reply_does_not_say_whose_it_is():
    (honest, liar) = replies([10, 20])
    grid = Answered([honest, liar])
    lie = get_all_nested_objects(liar)
    liar.metadata.__dict__["_reply_to_message_id"] = "junk"
    for name, part in get_all_nested_objects(liar).items():
        grid.parts.held[name] = part.deflate()
    root = liar.object_id
    tree = grid._found.message_object_trees[1]
    assert tree.object_id in lie
    grid.parts.held[tree.object_id] = grid.parts.held[root]
    found = list(grid.pull_messages(["ask-0", "ask-1"]))
    assert [reply.metadata.reply_to_message_id for reply in found] == ["ask-0", "ask-1"]


@pytest.mark.parametrize("what", ["nothing", "another kind"])
def test_a_reply_that_is_no_message_is_one_devices_failure(what):
    grid = Answered(replies([10, 20]))
    root = grid._found.message_object_trees[0].object_id
    other = messages.pack(messages.QueryReply(payload=b"x"))
    grid.parts.held[root] = b"\0" * 40 if what == "nothing" else other.deflate()
    bad, good = grid.pull_messages(["ask-0", "ask-1"])
    assert bad.has_error()
    assert bad.metadata.reply_to_message_id == "ask-0"
    assert payloads([good]) == [("ask-1", messages.QueryReply(payload=b"\1" * 20))]


class Waiting:
    """Handlers of a SuperLink that has no reply at the first look, and one from the second on.

    ``comes`` makes the SuperLink think that it came right after the first.
    """

    def __init__(self, comes):
        self.looks, self.comes = 0, comes
        self.object_store = self

    def pull_messages(self, asked, state, task):
        self.looks += 1
        found = PullAppMessagesResponse()
        if self.looks > 1:
            found.messages_list.add().metadata.reply_to_message_id = "ask-0"
        elif self.comes:
            superlink._replies[RUN].set()
        return found


def look(monkeypatch, seconds, comes):
    """Return how often a ServerApp's look looked; a reply ``comes`` after the first or not."""
    handlers = Waiting(comes)
    task = SimpleNamespace(run_id=RUN)
    monkeypatch.setattr(superlink, "_app", lambda request: (handlers, handlers, task))
    monkeypatch.setattr(superlink, "REST_SECONDS", seconds)
    monkeypatch.setattr(superlink, "_replies", {})

    async def body():
        return PullAppMessagesRequest(message_ids=["ask-0"]).SerializeToString()

    async def looked():
        return await asyncio.wait_for(superlink.fetch_all(SimpleNamespace(body=body)), 20)

    head, *_ = frames.unpack(asyncio.run(looked()).body).parts
    return handlers.looks, len(PullAppMessagesResponse.FromString(head).messages_list)


def test_a_look_rests_until_a_reply_comes(monkeypatch):
    assert look(monkeypatch, seconds=60, comes=True) == (2, 1)


def test_a_look_ends_without_a_reply_when_its_rest_is_over(monkeypatch):
    assert look(monkeypatch, seconds=0, comes=False) == (1, 0)


def test_nobody_pauses_between_looks_that_rest():
    class Resting(InProcessGrid):
        waits = True
        looks = 0

        def push_messages(self, messages):
            return ["ask-0"]

        def pull_messages(self, message_ids):
            self.looks += 1
            return iter([])

    grid = Resting({})
    now = iter(range(100))
    clock = Clock(lambda: float(next(now)), lambda seconds: pytest.fail("paused"))
    content = messages.pack(messages.QueryAsk(name="", payload=b""))
    (reply,) = converse(grid, {"a": 1}, messages.QUERY, {"a": content}, 5.0, clock=clock)
    assert reply.failure == "no answer within 5 s"
    assert grid.looks > 1
