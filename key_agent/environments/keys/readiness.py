"""Whether the proxies here have a key that is on its way to become active.

1. A key whose wrap is not here is not ready, and its patience begins once it is.
2. Proxies have a key once they acknowledge a sequence that is higher than the one of its wrap.
3. Proxies that do not are waited for as in a rotation (rotation.py, rule 3): until what they had is not valid
   any more, or 15 s where nothing seals meanwhile.
"""

from collections.abc import Callable, Collection

from envelope.keys import KeyState, NetworkService
from key_agent.environments.peers.peering import Peering
from key_agent.registry.model import UNSERVED_MS, Link
from key_agent.registry.store import Registry
from key_agent.registry.wrap_rows import after_sequences, sound_wraps
from runtime.clock import Clock


class Readiness:
    def __init__(
        self,
        *,
        peering: Peering,
        registry: Registry,
        links: Callable[[Collection[NetworkService]], Collection[Link]],
        clock: Clock,
        interval_s: float,
    ) -> None:
        """*links*: where the keys of services go. *interval_s*: between two refreshes."""
        self._peering = peering
        self._registry = registry
        self._links = links
        self._clock = clock
        self._patience_s = 2 * interval_s
        self._asked_boot_s: dict[str, float] = {}
        """When it was first asked whether a key's proxies have it."""

    async def waiting(self, key_ids: Collection[str]) -> dict[str, str]:
        """What is waited for here before these keys may become active; one that is not named is ready.

        RefusedChangeError unless the KEK of today is active.
        """
        kek = await self._registry.active_kek()
        sound = await self._registry.transact(lambda c: sound_wraps(c, kek.reference.kek_id))
        found = await self._registry.transact(lambda c: after_sequences(c, key_ids))
        links = self._links({NetworkService.parse(service) for service, _ in found.values()})
        now_s = self._clock.boot_s()
        asked = {key_id: self._asked_boot_s.get(key_id, now_s) for key_id in key_ids}
        self._asked_boot_s = {
            key_id: since_s
            for key_id, since_s in (self._asked_boot_s | asked).items()
            if now_s - since_s < 10 * self._patience_s
        }
        waiting: dict[str, str] = {}
        for key_id in key_ids:
            if key_id not in found or key_id not in sound:
                waiting[key_id] = "its wrap"
                self._asked_boot_s[key_id] = now_s
                continue
            service, after = found[key_id]
            late = sorted(
                link.proxy_id
                for link in links
                if str(link.owner) == service and link.accepted_sequence <= after
            )
            if late and now_s - asked[key_id] < self._patience_for(key_id):
                waiting[key_id] = f"proxies {', '.join(late)}"
        return waiting

    def _patience_for(self, key_id: str) -> float:
        shared = self._peering.view
        body = shared.deks.get(key_id)
        seals = body is not None and any(
            other.ring == body.ring and other.state is KeyState.ACTIVE for other in shared.deks.values()
        )
        return self._patience_s if seals else min(self._patience_s, UNSERVED_MS / 1000)
