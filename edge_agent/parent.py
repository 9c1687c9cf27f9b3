"""The child's end of :mod:`atoll.edge_agent.children`: commands in, messages out."""

import json
import os
import signal
import threading
from collections.abc import Callable
from typing import Any


class Parent:
    """The process that started us.

    Takes over file descriptor 1 for messages; what libraries print goes to the log instead.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message; silently lost when the parent is gone, as we end then."""
        with self._lock:
            try:
                self._out.write(json.dumps(message).encode() + b"\n")
            except BrokenPipeError:
                return

    def listen(
        self, on_command: Callable[[dict[str, Any]], object], on_end: Callable[[], object]
    ) -> None:
        """Call ``on_command`` for each command and ``on_end`` at the end, in a thread."""

        def read() -> None:
            rest = b""
            # Not sys.stdin: its lock would be held by this thread when the process ends.
            while data := os.read(0, 65536):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    on_command(json.loads(line))
            on_end()

        threading.Thread(target=read, name="parent", daemon=True).start()
