"""The manager writes the signed rows: under its term alone, and everyone hears of it.

1. Who is not the manager writes nothing, and says who is.
2. Whatever was written, this agent's own parts look again at once: new rows mean new work.
"""

from collections.abc import Callable

from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.shared import AlsoWrite
from key_agent.environments.shared.shared_view import newest_term
from key_agent.registry.access import RefusedChangeError
from runtime.clock import Clock


class KeyWriting:
    def __init__(self, *, peering: Peering, clock: Clock, written: Callable[[], None]) -> None:
        """*written*: called after each write."""
        self._peering = peering
        self._clock = clock
        self._written = written

    def term(self) -> int:
        """RefusedChangeError unless this agent is the manager."""
        leadership = self._peering.leadership
        term = None if leadership is None else leadership.term
        if term is None:
            manager = newest_term(self._peering.view)
            where = "none is" if manager is None else f"it is {manager[1].agent} of {manager[1].environment}"
            raise RefusedChangeError(
                f"this agent is not the manager: {where}",
                "give the command there, or `key-agent env promote` this one",
            )
        return term

    async def write(self, change: Callable[[Draft], object], *, also: AlsoWrite | None = None) -> None:
        await self._peering.shared.write(change, term=self.term(), now_ms=self.now_ms(), also=also)
        await self._peering.changed()
        self._written()

    def now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)
