"""How many requests of one tenant's agents are under way at the push listener, and whose turn is next.

1. Each agent has one place of its own: however many other agents hold, and for however long, it waits for
   nobody. Further ones of an agent, up to its most, are out of those that all of its tenant share.
2. A place may hold a whole body, so all of them are counted: at most OWN_PLACES agents have one of their own
   at a time. A tenant that certifies more crowds itself.
3. Who came first is first, among those that wait for the same.
4. One event loop, no threads; whoever is cancelled, waiting or not, leaves no place taken.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

PLACES_PER_AGENT: Final = 4
SHARED_PLACES: Final = 4
OWN_PLACES: Final = 8
"""More than a tenant has environments."""


class _Kind(Enum):
    OWN = auto()
    SHARED = auto()


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    agent: str
    turn: asyncio.Future[_Kind]


class Places:
    """Those of one tenant, for one purpose."""

    def __init__(self) -> None:
        self._own: set[str] = set()
        """The agents that are in their own."""
        self._shared = 0
        self._held: Counter[str] = Counter()
        self._waiting: list[_Waiter] = []

    @contextlib.asynccontextmanager
    async def of(self, agent: str) -> AsyncIterator[None]:
        """Wait for a place for *agent*, and have it."""
        waiter = _Waiter(agent, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._admit()
        try:
            kind = await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled():  # it was given one, and is cancelled before it knows
                self._leave(agent, waiter.turn.result())
            raise
        try:
            yield
        finally:
            self._leave(agent, kind)

    def _admit(self) -> None:
        """Give what is free to those that wait, in their order."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if waiter.turn.cancelled():
                continue
            kind = self._free_for(waiter.agent)
            if kind is None:
                self._waiting.append(waiter)
            else:
                self._take(waiter.agent, kind)
                waiter.turn.set_result(kind)

    def _free_for(self, agent: str) -> _Kind | None:
        if self._held[agent] >= PLACES_PER_AGENT:
            return None
        if agent not in self._own and len(self._own) < OWN_PLACES:
            return _Kind.OWN
        return _Kind.SHARED if self._shared < SHARED_PLACES else None

    def _take(self, agent: str, kind: _Kind) -> None:
        self._held[agent] += 1
        if kind is _Kind.OWN:
            self._own.add(agent)
        else:
            self._shared += 1

    def _leave(self, agent: str, kind: _Kind) -> None:
        self._held[agent] -= 1
        if not self._held[agent]:
            del self._held[agent]
        if kind is _Kind.OWN:
            self._own.discard(agent)
        else:
            self._shared -= 1
        self._admit()
