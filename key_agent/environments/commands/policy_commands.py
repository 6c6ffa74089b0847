"""Which environment's key seals: `key-agent env policy ...` (presented.py).

1. It is changed at the manager alone, in one transaction. The answer says who has it, and what each
   environment seals with from then on; each agent presents it to its proxies at once.
2. What was sealed before opens as before: a policy chooses among active keys and takes none away.
"""

import asyncio
from collections.abc import Mapping

from envelope.keys import KeyState, NetworkService
from key_agent.environments.commands.environment_commands import EnvironmentCommands
from key_agent.environments.keys.presented import chosen
from key_agent.environments.shared.documents import EncryptPolicy
from key_agent.environments.shared.shared_view import Shared
from key_agent.operations.commands import Json
from key_agent.registry.access import RefusedChangeError


class PolicyCommands(EnvironmentCommands):
    async def env_policy(self, *, service: str) -> Json:
        """What is set, and which key each environment seals or signs with."""
        await asyncio.sleep(0)
        return policy_json(self._environments().peering.view, self._owner(service))

    async def env_policy_set(
        self, *, service: str, policy: str, key: str | None = None, home: str | None = None
    ) -> Json:
        """Change it. RefusedChangeError: not the manager; no such service, key or environment."""
        async with self._one_at_a_time:
            owner = self._owner(service)
            manager, peering = self._manager(), self._environments().peering
            if manager is None:
                raise RefusedChangeError(
                    "this environment is the only one: its own key seals", "`key-agent env init` comes first"
                )
            self._leading()
            try:
                wanted = EncryptPolicy(policy)
            except ValueError:
                raise RefusedChangeError(
                    f"no policy is called {policy!r}", "own, origin or pinned (docs/environments.md)"
                ) from None
            if home is not None and wanted is not EncryptPolicy.ORIGIN:
                raise RefusedChangeError("only the policy `origin` has a home environment", "--home NAME")
            journal = self._agent.journal
            await journal.record(
                "env-policy", outcome="begun", service=str(owner), policy=wanted, kid=key, environment=home
            )
            await manager.set_policy(owner, wanted, pinned_dek=key, home_environment=home)
            spread = await self._spread()
            await journal.record(
                "env-policy", service=str(owner), policy=wanted, kid=key, epoch=peering.view.epoch
            )
            return policy_json(peering.view, owner) | {"spread": spread}


def policy_json(view: Shared, owner: NetworkService) -> Json:
    """RefusedChangeError if there is no such service."""
    body = view.services.get(str(owner))
    if body is None or body.removed:
        raise RefusedChangeError(f"no network service {owner}", "`key-agent service list` shows them")
    counting = [name for name, one in sorted(view.environments.items()) if one.state.counts]
    rings = [
        {
            "ring": ring_id,
            "use": ring.use,
            "algorithm": ring.algorithm,
            "keys": [_sealing(view, environment, owner, ring_id) for environment in counting],
        }
        for ring_id, ring in sorted(view.rings.items())
        if ring.service == str(owner)
    ]
    return {
        "service": str(owner),
        "policy": body.encrypt_policy,
        "pinned_key": body.pinned_dek,
        "home_environment": body.home_environment,
        "rings": rings,
    }


def _sealing(view: Shared, environment: str, owner: NetworkService, ring_id: str) -> Json:
    by_owner: Mapping[str, str] = {
        dek.owner_environment: key_id
        for key_id, dek in view.deks.items()
        if dek.ring == ring_id and dek.state is KeyState.ACTIVE
    }
    key_id = chosen(view, environment, str(owner), by_owner) if by_owner else None
    return {
        "environment": environment,
        "key": key_id,
        "owner": None if key_id is None else view.deks[key_id].owner_environment,
    }
