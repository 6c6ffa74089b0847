"""Which environments there are: `key-agent env init`, `join`, `add`, `drain`, `undrain`, `retire`.

1. An environment is added by two administrators at two consoles, each with the other's fingerprint
   (membership.py), and ended by two who have approved of it.
2. A name that has ended can begin again, with another registry key: one that an environment has had signs for
   no other.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from envelope.errors import IntegrityError, MisuseError
from key_agent.environments.commands.environment_commands import EnvironmentCommands
from key_agent.environments.peers.peer_transport import PeerAddress
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.registry_key import same_fingerprint
from key_agent.environments.shared.shared_view import newest_term
from key_agent.environments.states import EnvironmentEvent, EnvironmentState, follow_environment
from key_agent.operations.commands import Json
from key_agent.registry.store import RefusedChangeError

if TYPE_CHECKING:
    from key_agent.environments.shared.draft import Draft
    from key_agent.environments.shared.shared_view import Shared


class MembershipCommands(EnvironmentCommands):
    async def env_init(
        self,
        *,
        url: str,
        region: str = "",
        geo: str = "",
        address: str = "",
        load_balancer_name: str = "",
        lease_s: int = 300,
    ) -> Json:
        """This environment becomes the first of several, its agent the manager; its keys stay as they are."""
        async with self._one_at_a_time:
            environments = self._environments()
            peering = environments.peering
            if peering.is_united:
                raise RefusedChangeError(
                    "there is a set of environments already", "`key-agent env list` shows it"
                )
            if environments.membership.joining is not None:
                raise RefusedChangeError(
                    "this environment asks another one to be added",
                    "`key-agent env list` shows how it stands",
                )
            await self._usable_kek()
            await self._agent.journal.record("env-init", outcome="begun", url=url)
            request = await environments.request(
                url=url, region=region, geo=geo, address=address, load_balancer_name=load_balancer_name
            )
            await environments.found(request, lease_s=lease_s, now_ms=self._agent.now_ms())
            await peering.changed()
            await self._agent.journal.record("env-init", epoch=peering.view.epoch)
            return {
                "environment": peering.environment,
                "term": peering.view.term,
                "epoch": peering.view.epoch,
                "services": len(peering.view.services),
                "keys": len(peering.view.deks),
                **{
                    name: value
                    for name, value in (await self.env_identity()).items()
                    if name == "fingerprint"
                },
            }

    async def env_join(
        self,
        *,
        url: str,
        manager_url: str,
        manager_agent: str,
        fingerprint: str,
        region: str = "",
        geo: str = "",
        address: str = "",
        load_balancer_name: str = "",
    ) -> Json:
        """Ask the manager to add this environment; its administrator has to say yes (`env add`)."""
        async with self._one_at_a_time:
            environments = self._environments()
            if environments.peering.is_united:
                raise RefusedChangeError(
                    "this environment is one of several already", "`key-agent env list` shows them"
                )
            book = await self._agent.registry.book()
            if book.services:
                raise RefusedChangeError(
                    f"this environment has services of its own: {', '.join(map(str, book.services))}",
                    "start with the environment that has them: `key-agent env init` there; "
                    "or remove them here first",
                )
            await self._usable_kek()
            await self._agent.journal.record(
                "env-join", outcome="begun", manager=manager_agent, url=manager_url
            )
            request = await environments.request(
                url=url, region=region, geo=geo, address=address, load_balancer_name=load_balancer_name
            )
            try:
                found = await environments.membership.begin(
                    PeerAddress(manager_url, manager_agent), fingerprint, request
                )
            except IntegrityError as error:
                raise RefusedChangeError(
                    str(error), "somebody may stand between both agents: compare both fingerprints"
                ) from None
            await self._agent.journal.record("env-join", outcome="asked", manager=manager_agent)
            mine = await self.env_identity()
            return {
                "environment": mine["environment"],
                "fingerprint": mine["fingerprint"],
                "manager": found.environment,
                "next_step": f"at {found.environment}: key-agent env add {mine['environment']} "
                f"--fingerprint {mine['fingerprint']}",
            }

    async def env_add(self, *, environment: str, fingerprint: str) -> Json:
        """Say yes to an environment that asks: it joins, and gets every key."""
        async with self._one_at_a_time:
            environments = self._environments()
            peering = environments.peering
            term = self._leading()
            waiting = environments.membership.waiting().get(environment)
            known = peering.view.environments.get(environment)
            if waiting is None:
                if (
                    known is not None
                    and known.registry_key
                    and same_fingerprint(fingerprint, known.registry_key)
                ):
                    return {"environment": environment, "state": known.state, "spread": {}}
                raise RefusedChangeError(
                    f"no environment {environment} asks to be added", "first `key-agent env join` there"
                )
            told = waiting.request.introduction
            if not same_fingerprint(fingerprint, told.registry_key):
                raise RefusedChangeError(
                    f"{environment} asks with another registry key than that fingerprint's",
                    "compare `key-agent env identity` there: somebody else may be asking",
                )
            if told.registry_key in _registry_keys(peering.view):
                raise RefusedChangeError(
                    f"{environment} asks with a registry key that an environment has had already",
                    "remove registry.key in its agent's state_dir, restart it, and repeat `env join`",
                )
            if known is not None and known.state is not EnvironmentState.RETIRED:
                raise RefusedChangeError(
                    f"there is an environment {environment} already ({known.state})",
                    "`key-agent env retire` ends it",
                )
            await self._agent.journal.record(
                "env-add", outcome="begun", environment=environment, agent=told.agent
            )
            request, now_ms = waiting.request, self._agent.now_ms()

            def change(draft: "Draft") -> None:
                body = request.environment_body(EnvironmentState.JOINING, now_ms=now_ms)
                draft.put(Kind.ENVIRONMENT, environment, body)
                kek = msgspec.structs.replace(request.kek, since_ms=now_ms)
                draft.put(Kind.KEK, request.kek_id, kek)

            await peering.shared.write(change, term=term, now_ms=now_ms)
            environments.membership.added(environment)
            spread = await self._spread()
            await self._agent.journal.record("env-add", environment=environment, epoch=peering.view.epoch)
            return {"environment": environment, "state": EnvironmentState.JOINING, "spread": spread}

    async def env_drain(self, *, environment: str, reason: str | None = None) -> Json:
        """It finishes what it has begun and opens objects, and gets no new work."""
        return await self._event(environment, EnvironmentEvent.DRAINED, "env-drain", reason)

    async def env_undrain(self, *, environment: str) -> Json:
        """It rejoins: every key is proven there once more, then it is active again."""
        return await self._event(environment, EnvironmentEvent.UNDRAINED, "env-undrain", None)

    async def env_retire(self, *, environment: str, approval: str, reason: str | None = None) -> Json:
        """It is none of the environments any more, for good; two administrators have approved of it."""
        peering = self._environments().peering
        payload: Json = {"environment": environment}

        def approved(draft: "Draft") -> None:
            now_ms = self._agent.now_ms()
            approvals.check_granted(
                peering.tenant,
                approval,
                draft.shared.approvals.get(approval),
                draft.shared.admins,
                action=Action.ENVIRONMENT_RETIRE,
                subject=environment,
                payload=payload,
                now_ms=now_ms,
            )
            asked = draft.shared.approvals[approval]
            used = msgspec.structs.replace(asked, used_at_ms=now_ms, used_for=f"env-retire {environment}")
            draft.put(Kind.APPROVAL, approval, used)

        manager = newest_term(peering.view)
        if manager is not None and manager[1].environment == environment:
            raise RefusedChangeError(
                f"{environment} is the manager's environment", "`key-agent env promote` at another one first"
            )
        return await self._event(environment, EnvironmentEvent.RETIRED, "env-retire", reason, also=approved)

    async def _event(
        self,
        environment: str,
        event: EnvironmentEvent,
        action: str,
        reason: str | None,
        *,
        also: "Callable[[Draft], None] | None" = None,
    ) -> Json:
        async with self._one_at_a_time:
            peering, term = self._environments().peering, self._leading()
            body = self._body(environment)
            try:
                after = follow_environment(body.state, event)
            except MisuseError as error:
                raise RefusedChangeError(str(error), "`key-agent env status` shows how it stands") from None
            await self._agent.journal.record(action, outcome="begun", environment=environment, reason=reason)
            now_ms = self._agent.now_ms()

            def change(draft: "Draft") -> None:
                current = draft.shared.environments[environment]
                draft.put(
                    Kind.ENVIRONMENT,
                    environment,
                    msgspec.structs.replace(
                        current,
                        state=follow_environment(current.state, event),
                        reason=reason,
                        since_ms=now_ms,
                    ),
                )
                if also is not None:
                    also(draft)

            await peering.shared.write(change, term=term, now_ms=now_ms)
            spread = await self._spread()
            await self._agent.journal.record(action, environment=environment, state=after)
            return {"environment": environment, "state": after, "spread": spread}


def _registry_keys(view: "Shared") -> set[str]:
    """All that environments have, or have had."""
    bodies = view.environments.values()
    return {body.registry_key for body in bodies} | {
        former.registry_key for body in bodies for former in body.former_keys
    }
