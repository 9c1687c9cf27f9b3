"""An in-process grid that keeps every byte that passes between hub and devices."""

from collections.abc import Iterable, Iterator

from flwr.app import Message

from atoll.federation.engine import InProcessGrid


class Overheard(InProcessGrid):
    """``down`` and ``up`` hold the values of all records, as bytes, in the order of sending."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.down = [*getattr(self, "down", []), *_values(sent)]
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message in super().pull_messages(message_ids):
            self.up = [*getattr(self, "up", []), *_values([message])]
            yield message

    @property
    def everything(self) -> list[bytes]:
        return [*self.down, *self.up]


def _values(messages: Iterable[Message]) -> list[bytes]:
    return [
        value if isinstance(value, bytes) else repr(value).encode()
        for message in messages
        if message.has_content()
        for record in message.content.config_records.values()
        for value in record.values()
    ]
