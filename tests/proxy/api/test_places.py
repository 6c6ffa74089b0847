"""Whose turn it is at the push listener: deterministic, on one loop, without a socket."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from proxy.api.places import OWN_PLACES, PLACES_PER_AGENT, SHARED_PLACES, Places


class Visitors:
    """Requests that have a place, or wait for one."""

    def __init__(self) -> None:
        self.places = Places()
        self._leave: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.inside: list[str] = []

    async def come(self, *names: str) -> None:
        """*names*: an agent's, and after a dash which request of it."""
        for name in names:
            self._leave[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._visit(name), name=name)
            await settled()

    async def _visit(self, name: str) -> None:
        async with self.places.of(name.partition("-")[0]):
            self.inside.append(name)
            try:
                await self._leave[name].wait()
            finally:
                self.inside.remove(name)

    async def go(self, *names: str) -> None:
        for name in names:
            self._leave[name].set()
            await self._tasks.pop(name)
            await settled()

    async def cancel(self, name: str) -> None:
        task = self._tasks.pop(name)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled()

    async def all_go(self) -> None:
        while self.inside:
            await self.go(self.inside[0])
        assert not self._tasks, "nobody waits where nobody is"


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def requests(agent: str, count: int) -> list[str]:
    return [f"{agent}-{number}" for number in range(count)]


async def test_an_agent_has_its_number_and_the_next_waits_its_turn() -> None:
    visitors = Visitors()
    await visitors.come(*requests("a", PLACES_PER_AGENT + 2))
    assert visitors.inside == requests("a", PLACES_PER_AGENT)
    await visitors.go("a-1")
    assert visitors.inside[-1] == f"a-{PLACES_PER_AGENT}"
    assert len(visitors.inside) == PLACES_PER_AGENT
    await visitors.all_go()


async def test_whatever_others_hold_an_agent_gets_in_at_once_and_once_more_after_it_left() -> None:
    visitors = Visitors()
    crowd = [*requests("a", PLACES_PER_AGENT + 1), *requests("b", PLACES_PER_AGENT + 1)]
    await visitors.come(*crowd)
    assert len(visitors.inside) == 2 + SHARED_PLACES, "all that is shared is taken"
    for _ in range(2):
        await visitors.come("c-0", "c-1")
        assert visitors.inside[-1] == "c-0", "its own; a second one waits with the others"
        await visitors.go("c-0")
        assert visitors.inside[-1] == "c-1", "the own one is free again"
        await visitors.go("c-1")
    await visitors.all_go()


async def test_what_all_hold_together_is_bounded() -> None:
    visitors = Visitors()
    agents = [f"agent{number}" for number in range(OWN_PLACES + SHARED_PLACES + 1)]
    for agent in agents:
        await visitors.come(f"{agent}-0")
    assert visitors.inside == [f"{agent}-0" for agent in agents[:-1]]
    # Who was in a shared one leaves: the last gets that. Then an own one is free, for whoever has none.
    await visitors.go(visitors.inside[-1])
    assert visitors.inside[-1] == f"{agents[-1]}-0"
    await visitors.come("late-0", "agent1-1")
    assert "late-0" not in visitors.inside
    await visitors.go("agent0-0")
    assert visitors.inside[-1] == "late-0"
    assert "agent1-1" not in visitors.inside, "it has one, and all that is shared is taken"
    await visitors.all_go()


async def test_in_places_of_its_own_and_shared_an_agent_has_no_more_than_its_number() -> None:
    visitors = Visitors()
    others = [f"agent{number}-0" for number in range(OWN_PLACES)]
    await visitors.come(*others, *requests("a", PLACES_PER_AGENT + 1))
    assert visitors.inside == [*others, *requests("a", SHARED_PLACES)]
    await visitors.go(others[0])
    assert visitors.inside == [*others[1:], *requests("a", SHARED_PLACES)], "an own one is free, it has four"
    await visitors.all_go()


async def test_shared_places_go_to_who_waits_longest() -> None:
    visitors = Visitors()
    await visitors.come(*requests("a", PLACES_PER_AGENT), *requests("b", 4), "c-0", "c-1")
    assert visitors.inside == ["a-0", "a-1", "a-2", "a-3", "b-0", "b-1", "c-0"]
    await visitors.go("a-1")
    assert visitors.inside[-1] == "b-2"
    await visitors.go("a-2")
    assert visitors.inside[-1] == "b-3"
    await visitors.go("a-3")
    assert visitors.inside[-1] == "c-1"
    await visitors.all_go()


async def test_who_is_cancelled_leaves_nothing_taken() -> None:
    visitors = Visitors()
    await visitors.come(*requests("a", PLACES_PER_AGENT + 2))
    await visitors.cancel(f"a-{PLACES_PER_AGENT}")  # waits
    await visitors.cancel("a-1")  # is in: the next that waits comes
    assert visitors.inside[-1] == f"a-{PLACES_PER_AGENT + 1}"
    await visitors.all_go()
    await visitors.come(*requests("a", PLACES_PER_AGENT))
    assert len(visitors.inside) == PLACES_PER_AGENT
    await visitors.all_go()


async def test_who_is_cancelled_before_it_knows_that_it_is_in_gives_the_place_back() -> None:
    places = Places()
    async with AsyncExitStack() as stack:
        for _ in range(PLACES_PER_AGENT - 1):
            await stack.enter_async_context(places.of("a"))
        last = AsyncExitStack()
        await last.enter_async_context(places.of("a"))
        ran: list[str] = []

        async def visit(name: str) -> None:
            async with places.of("a"):
                ran.append(name)

        first, second = (asyncio.create_task(visit(name), name=name) for name in ("first", "second"))
        await settled()
        await last.aclose()  # gives its place to the first, which has not run yet
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second
        assert ran == ["second"]


async def test_who_is_cancelled_while_it_waits_is_given_nothing_in_the_same_moment() -> None:
    places = Places()
    async with AsyncExitStack() as stack:
        for _ in range(PLACES_PER_AGENT - 1):
            await stack.enter_async_context(places.of("a"))
        last = AsyncExitStack()
        await last.enter_async_context(places.of("a"))

        async def visit() -> bool:
            async with places.of("a"):
                return True

        first, second = (asyncio.create_task(visit(), name=name) for name in ("first", "second"))
        await settled()
        first.cancel()  # it has not run since
        await last.aclose()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second
