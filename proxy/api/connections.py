"""How many connections key agents may have open at the push listener, each and together.

1. Who is connected is found out when the handshake is over, by the tenant's own root: nobody uses up the
   connections of somebody whose name another root certified. Those that no root vouches for share a count.
2. One agent has few, so that none of the same tenant (another environment's, breached) shuts out another; a
   tenant has few times as many, so that none shuts out another tenant, however many agents it certifies.
3. What is too much is left alone: nothing is read from it, and it is reset after a while. Reset at once it
   would be there again at once, and a handshake is the dearest thing that this listener can be asked for.
4. A connection costs a descriptor and some memory: no more than HELD_AT_MOST are left alone at a time.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from proxy.api.authentication import peer_of
from proxy.tenants.model import Directory
from runtime.clock import Clock
from runtime.serve import ProblemError

CONNECTIONS_PER_AGENT: Final = 16
"""An agent of ours opens three."""
CONNECTIONS_PER_TENANT: Final = 64
HELD_S: Final = 30.0
HELD_AT_MOST: Final = 2048
_HELD_BYTES: Final = 4096
_SAID_EVERY_S: Final = 60.0

_log: Final = structlog.get_logger("push")


class AgentConnections:
    def __init__(self, directory: Callable[[], Directory], clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._open: Counter[tuple[str, ...]] = Counter()
        """By tenant, and by tenant and agent; () is for strangers."""
        self._held = 0
        self._said_s: dict[str, float] = {}

    def admit(self, transport: asyncio.Transport) -> Callable[[], None]:
        """Let it in, or leave it alone (rule 3). What to call when it has ended."""
        try:
            peer = peer_of(transport, self._directory(), now_s=self._clock.wall_s())
            places = {(peer.tenant,): CONNECTIONS_PER_TENANT, (peer.tenant, peer.name): CONNECTIONS_PER_AGENT}
        except ProblemError:  # it is told at its request, why
            places = {(): CONNECTIONS_PER_TENANT}
        for place, most in places.items():
            if self._open[place] >= most:
                self._say(place)
                return self._leave_alone(transport)
        self._open.update(places.keys())
        return lambda: self._let_go(places)

    def _leave_alone(self, transport: asyncio.Transport) -> Callable[[], None]:
        if self._held >= HELD_AT_MOST:
            transport.abort()
            return lambda: None
        self._held += 1
        limit = getattr(transport, "set_read_buffer_limits", None)
        if limit is not None:  # of TLS: what it has received and nobody reads
            limit(high=_HELD_BYTES)
        transport.pause_reading()
        timer = asyncio.get_running_loop().call_later(HELD_S, transport.abort)

        def ended() -> None:
            self._held -= 1
            timer.cancel()

        return ended

    def _let_go(self, places: dict[tuple[str, ...], int]) -> None:
        self._open.subtract(places.keys())
        for place in places:
            if not self._open[place]:
                del self._open[place]

    def _say(self, place: tuple[str, ...]) -> None:
        tenant = "".join(place[:1])
        now_s = self._clock.boot_s()
        if (
            now_s - self._said_s.get(tenant, -_SAID_EVERY_S) >= _SAID_EVERY_S
        ):  # bounded: tenants of the directory
            self._said_s[tenant] = now_s
            _log.warning(
                "too many connections of an agent are left alone", tenant=tenant, agent="".join(place[1:])
            )
