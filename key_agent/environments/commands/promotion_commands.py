"""Becoming the manager by command: `key-agent env promotion`, `promote`.

1. It needs two administrators and no manager: their signatures come in a file, since the rows that approvals
   stand in may be out of reach.
2. Who is promoted first takes over what the others have.
"""

import asyncio

from key_agent.environments.commands.environment_commands import EnvironmentCommands
from key_agent.environments.peers.standing import lease_s_of
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import Head
from key_agent.environments.shared.recovery import none_counts
from key_agent.environments.shared.shared_view import newest_term
from key_agent.environments.shared.terms import check_appointment, promotion_payload
from key_agent.operations.commands import Json
from key_agent.registry.store import RefusedChangeError


class PromotionCommands(EnvironmentCommands):
    async def env_promotion(self, *, valid_s: int = approvals.VALIDITY_S) -> Json:
        """What two administrators have to sign so that this environment's agent becomes the manager."""
        peering = self._environments().peering
        self._promotable()
        view = peering.view
        payload = promotion_payload(
            agent=self._agent.agent_id,
            environment=peering.environment,
            registry_key=view.environments[peering.environment].registry_key,
            term=view.term,
            epoch=view.epoch,
            digest=view.digest,
        )
        return self._to_sign(Action.ENVIRONMENT_PROMOTE, payload, valid_s=valid_s)

    async def env_promote(self, *, approval: str, asked: dict[str, object]) -> Json:
        """This environment's agent becomes the manager: the next term is its own.

        It first takes over what the others have. Whoever cannot be reached follows when it answers again; a
        manager that was cut off can change nothing any more, and stops serving when its lease is over.
        """
        async with self._one_at_a_time:
            environments = self._environments()
            peering = environments.peering
            self._promotable()
            body = self._signed(asked)
            now_ms = self._agent.now_ms()
            await asyncio.gather(*map(environments.catch_up, peering.others()))
            view = peering.view
            self._check_unused(approval, ask_anew="env promotion FILE")
            granted = check_appointment(
                peering.tenant,
                approval,
                body,
                view.admins,
                action=Action.ENVIRONMENT_PROMOTE,
                agent=self._agent.agent_id,
                environment=peering.environment,
                registry_key=view.environments[peering.environment].registry_key,
                built_on=Head(term=view.term, epoch=view.epoch, digest=view.digest),
                now_ms=now_ms,
            )
            before = newest_term(view)
            term = view.term + 1
            await self._agent.journal.record(
                "env-promote", outcome="begun", term=term, approved_by=",".join(granted)
            )
            await peering.shared.begin_term(
                term,
                cause=f"promoted by {', '.join(granted)}",
                now_ms=now_ms,
                approval=(approval, approvals.unused(body)),
            )
            spread = await self._spread()
            await self._agent.journal.record("env-promote", term=term, epoch=peering.view.epoch)
            former = None if before is None else before[1].environment
            return {
                "environment": peering.environment,
                "term": term,
                "epoch": peering.view.epoch,
                "former": former,
                "former_knows": None if former is None else spread.get(former, former == peering.environment),
                "former_may_serve_for_s": lease_s_of(peering.view),
                "spread": spread,
            }

    def _promotable(self) -> None:
        environments = self._environments()
        peering = environments.peering
        own = peering.view.environments.get(peering.environment)
        if environments.is_elected:
            raise RefusedChangeError(
                "the manager is elected by etcd here", "`key-agent env drain` makes an environment hand over"
            )
        if own is None or not own.state.counts:
            raise RefusedChangeError(
                f"this environment is {'none of the set' if own is None else own.state}",
                "no environment counts: `key-agent env recovery`"
                if none_counts(peering.view)
                else "promote one that serves",
            )
        if own.registry_key_exposed:
            raise RefusedChangeError(
                "this environment's agent was breached: somebody else may have its registry key",
                "promote another one; retire this environment, and add it anew with another registry key",
            )
        if peering.leads:
            raise RefusedChangeError("this agent is the manager already", "`key-agent env list` shows it")
