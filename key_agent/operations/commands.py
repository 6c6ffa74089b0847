"""What every administrator's command needs: whose service, which KEK, and what became of the push."""

import asyncio
from collections.abc import Collection
from typing import Final

from envelope.keys import NetworkService
from key_agent.agent import Agent
from key_agent.environments.assembly import Environments
from key_agent.environments.keys.manager import Manager
from key_agent.push.pusher import Delivery
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import Kek

type Json = dict[str, object]

DELIVERY_PATIENCE_S: Final = 15.0


class Commands:
    """Base of the groups of commands that `Operations` is made of."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @property
    def _one_at_a_time(self) -> asyncio.Lock:
        return self._agent.one_at_a_time

    def _manager(self) -> Manager | None:
        """Who changes keys that several environments have; None while this environment is the only one."""
        environments = self._surroundings()
        if environments is None or not environments.is_united:
            return None
        if environments.key_parts is None:
            raise RefusedChangeError("this agent has no part in keys of several environments", "restart it")
        return environments.key_parts.manager

    def _surroundings(self) -> Environments | None:
        """The other environments; None where the configuration knows of none."""
        found = self._agent.environments
        return found if isinstance(found, Environments) else None

    def _owner(self, text: str) -> NetworkService:
        """`service` or `tenant/service`; the tenant must be ours."""
        owner = NetworkService.parse(text) if "/" in text else NetworkService(self._agent.tenant, text)
        if owner.tenant != self._agent.tenant:
            raise RefusedChangeError(
                f"{owner} is not of this agent's tenant, {self._agent.tenant}", "use that tenant's agent"
            )
        return owner

    async def _usable_kek(self) -> Kek:
        row = await self._agent.registry.current_kek()
        if row is None or row.kek is None:
            raise RefusedChangeError("there is no KEK yet", "`key-agent kek create` makes it in the HSM")
        if row.state is not KekState.ACTIVE or self._agent.consent.standing.is_withdrawn:
            raise RefusedChangeError(
                f"the KEK {row.reference.kek_id} is {row.state}", "`key-agent reinstate` comes first"
            )
        return row.kek

    async def _pushed(self, proxies: Collection[str] | None = None) -> list[Json]:
        """Push now and tell what became of it; nothing to tell if the agent is not running."""
        agent = self._agent
        if not agent.is_running:
            return []
        names = [name for name in agent.targets.fed() if proxies is None or name in proxies]
        # What is on its way already carries what was true before: it does not count.
        rounds = {name: 1 + agent.refresh.schedule.is_in_flight(name) for name in names}
        before = {name: agent.deliveries.get(name) for name in names}
        agent.refresh.at_once(names)
        found = await asyncio.gather(*(self._delivered(name, before[name], rounds[name]) for name in names))
        return [
            {"proxy": name, "outcome": "pending", "error": None}
            if delivery is None
            else {"proxy": name, "outcome": delivery.outcome, "error": delivery.error}
            for name, delivery in zip(names, found, strict=True)
        ]

    async def _delivered(self, proxy: str, last: Delivery | None, rounds: int) -> Delivery | None:
        for _ in range(rounds):
            found = await self._agent.wait_for_delivery(proxy, after=last, timeout_s=DELIVERY_PATIENCE_S)
            if found is None:
                return None
            last = found
        return last
