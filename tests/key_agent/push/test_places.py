"""Who is under way at once: the slow are bounded too, and the quick never wait for them."""

import asyncio
from contextlib import AsyncExitStack
from typing import Self

from key_agent.push.places import Places
from tests.key_agent.conftest import until


class Deliveries:
    """Deliveries that go on until they are told to end."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.running: set[str] = set()

    def begin(self, name: str, *, is_slow: bool = False) -> None:
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._deliver(name, is_slow=is_slow))

    async def _deliver(self, name: str, *, is_slow: bool) -> None:
        async with self._places.taken(is_slow=is_slow):
            self.running.add(name)
            try:
                await self._ends[name].wait()
            finally:
                self.running.discard(name)

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
        await asyncio.gather(*(self.tasks[name] for name in names))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_the_next_begins_when_one_has_ended_first_come_first_served() -> None:
    async with Deliveries(Places(quick=2, slow=0, patience_s=60)) as deliveries:
        for name in "abcd":
            deliveries.begin(name)
        await until(lambda: deliveries.running == {"a", "b"})
        await deliveries.end("b")
        await until(lambda: deliveries.running == {"a", "c"})
        await deliveries.end("a", "c")
        await until(lambda: deliveries.running == {"d"})


async def test_who_is_slow_moves_aside_as_long_as_there_is_room_for_the_slow() -> None:
    async with Deliveries(Places(quick=1, slow=2, patience_s=0.01)) as deliveries:
        for name in "abcd":
            deliveries.begin(name)
        await until(lambda: deliveries.running == {"a", "b", "c"})
        await asyncio.sleep(0.05)
        assert deliveries.running == {"a", "b", "c"}, "bounded: the fourth waits for one of them"
        await deliveries.end("a")
        await until(lambda: deliveries.running == {"b", "c", "d"})


async def test_who_is_known_to_be_slow_takes_no_quick_place() -> None:
    async with Deliveries(Places(quick=1, slow=1, patience_s=60)) as deliveries:
        for name in ("s1", "s2", "s3"):
            deliveries.begin(name, is_slow=True)
        await until(lambda: deliveries.running == {"s1"})
        deliveries.begin("q")
        await until(lambda: deliveries.running == {"s1", "q"})
        await deliveries.end("s1")
        await until(lambda: deliveries.running == {"s2", "q"})


async def test_who_gives_up_leaves_no_place_behind() -> None:
    places = Places(quick=1, slow=1, patience_s=60)
    async with Deliveries(places) as deliveries:
        for name in "abc":
            deliveries.begin(name)
        await until(lambda: deliveries.running == {"a"})
        deliveries.tasks["b"].cancel()
        # In the same moment: it is given the place and gives up.
        await deliveries.end("a")
        deliveries.tasks["c"].cancel()
        await asyncio.gather(*deliveries.tasks.values(), return_exceptions=True)
        async with AsyncExitStack() as stack, asyncio.timeout(30):
            await stack.enter_async_context(places.taken(is_slow=False))
            await stack.enter_async_context(places.taken(is_slow=True))
