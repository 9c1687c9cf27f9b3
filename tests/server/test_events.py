"""Hints about changes: merged while nobody looks, from any thread."""

import asyncio
import threading

from atoll.server.events import Bus


def test_hints_for_a_busy_subscriber_are_merged() -> None:
    async def scene() -> None:
        bus = Bus()
        with bus.subscribe() as one, bus.subscribe() as other:
            for _ in range(100):
                bus.publish("runs", "audit")
            bus.publish("devices")
            await asyncio.sleep(0)
            assert await one.changed() == {"runs", "audit", "devices"}
            assert await other.changed() == {"runs", "audit", "devices"}
            waiting = asyncio.create_task(one.changed())
            thread = threading.Thread(target=bus.publish, args=("alerts",))
            thread.start()
            assert await asyncio.wait_for(waiting, 5) == {"alerts"}
            thread.join()

    asyncio.run(scene())


def test_a_subscriber_that_left_is_no_burden() -> None:
    bus = Bus()

    async def scene() -> None:
        with bus.subscribe():
            pass
        bus.publish("runs")

    asyncio.run(scene())
    bus.publish("runs")
