"""What a change of the shared rows means for this agent: who holds which keys now, and how often they come.

1. The tables that pushes are made from have changed in the same transaction as the rows; memory follows, then
   whatever has to be taken back is, then whoever should hold other keys gets them. In that order.
2. A push comes so often that one that fails can be repeated within the registry lease.
"""

import asyncio
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from key_agent.environments.peers.standing import lease_s_of
from key_agent.environments.shared.shared_view import Shared
from key_agent.refresh import wait_until
from key_agent.registry.database import RegistryError

if TYPE_CHECKING:
    from key_agent.agent import Agent
    from key_agent.environments.peers.peering import Peering

log = structlog.get_logger(__name__)

LEASE_SHARE: Final = 0.6
"""A refresh comes after so much of the registry lease at the latest."""
_RETRY_S: Final = 1.0


class Following:
    def __init__(self, agent: "Agent", peering: "Peering") -> None:
        self._agent = agent
        self._environment = peering.environment
        self._seen = peering.view
        self._newest = peering.view
        self._wake = asyncio.Event()
        peering.listen(self._changed)
        self._set_pace(peering.view)

    def _changed(self, view: Shared) -> None:
        self._newest = view
        self._wake.set()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        while True:
            await wait_until(self._agent.clock, self._wake, None)
            while self._newest is not self._seen:
                view = self._newest
                try:
                    await self._follow(self._seen, view)
                except RegistryError as error:
                    log.warning("the changed rows are not followed yet", cause=str(error))
                    await self._agent.clock.sleep(_RETRY_S)
                    continue
                self._seen = view

    async def _follow(self, before: Shared, view: Shared) -> None:
        agent = self._agent
        kek_changed = self._own_keks(before) != self._own_keks(view)
        await agent.reload(kek_changed=kek_changed)
        if kek_changed:
            agent.watch.wake()
        self._set_pace(view)
        agent.withdrawals.at_once()
        if (
            before.deks != view.deks
            or before.services != view.services
            or before.tenant != view.tenant
            or {name: one.state for name, one in before.environments.items()}
            != {name: one.state for name, one in view.environments.items()}
        ):
            agent.refresh.at_once()

    def _own_keks(self, view: Shared) -> dict[str, str]:
        return {
            kek_id: body.state for kek_id, body in view.keks.items() if body.environment == self._environment
        }

    def _set_pace(self, view: Shared) -> None:
        usual_s = float(self._agent.rhythm.interval_s)
        is_shared = view.epoch > 0
        self._agent.refresh.interval_s = (
            min(usual_s, LEASE_SHARE * lease_s_of(view)) if is_shared else usual_s
        )
