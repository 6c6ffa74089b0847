"""How late this machine is: for promises in seconds, which a machine with other work keeps a little later.

async with lateness() as late:
    ...
    assert took_s < 6 + late.allowance_s
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

_TICK_S: Final = 0.02
_TURNS: Final = 20
"""So many times some process waits for its turn, between a cause and what is seen of it."""


@dataclass(slots=True)
class Lateness:
    worst_s: float = 0.0
    """By how much a timer of this process came too late."""

    @property
    def allowance_s(self) -> float:
        """A tenth of a second on a quiet machine."""
        return _TURNS * self.worst_s

    async def watch(self) -> None:
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(_TICK_S)
            self.worst_s = max(self.worst_s, time.monotonic() - began_s - _TICK_S)


@contextlib.asynccontextmanager
async def lateness() -> AsyncIterator[Lateness]:
    late = Lateness()
    watching = asyncio.create_task(late.watch(), name="lateness")
    try:
        yield late
    finally:
        watching.cancel()
        await asyncio.wait([watching])
