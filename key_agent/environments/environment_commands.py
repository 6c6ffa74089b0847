"""The administrator's commands on environments: `key-agent env ...`.

1. What all environments share is changed at the manager alone, in one transaction, and brought to the others
   before the command returns: its answer says who has it (`spread`). Who has not gets it when it answers.
2. To become the manager (`env promote`) needs two administrators and no manager: their signatures come in a
   file, since the rows that approvals stand in may be out of reach.
3. Each command leaves an audit event before it changes anything, and can be repeated.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from envelope.errors import IntegrityError, MisuseError
from key_agent.commands import Commands, Json
from key_agent.environments import approvals
from key_agent.environments.approvals import Action, ApprovalError
from key_agent.environments.documents import ApprovalBody, EnvironmentBody, Head, Kind
from key_agent.environments.peer_transport import PeerAddress
from key_agent.environments.peering import newest_term
from key_agent.environments.peers import JoinRequest
from key_agent.environments.registry_key import fingerprint_of, same_fingerprint
from key_agent.environments.registry_lease import NEVER_S
from key_agent.environments.standing import lease_s_of
from key_agent.environments.states import EnvironmentEvent, EnvironmentState, follow_environment
from key_agent.environments.terms import check_promotion, promotion_payload
from key_agent.environments.wrapping import HAVE_KEYS
from key_agent.registry.store import RefusedChangeError

if TYPE_CHECKING:
    from key_agent.environments.assembly import Environments
    from key_agent.environments.shared import Draft, Shared

SPREAD_PATIENCE_S: Final = 5.0


class EnvironmentCommands(Commands):
    # Looking.

    async def env_identity(self) -> Json:
        """Who this agent is to the others, and the fingerprint that administrators compare."""
        mine = self._environments().membership.introduction
        return {
            "tenant": mine.tenant,
            "environment": mine.environment,
            "agent": mine.agent,
            "registry_key": mine.registry_key,
            "fingerprint": fingerprint_of(mine.registry_key),
        }

    async def env_list(self) -> Json:
        """Every environment: what the signed rows say, and what was heard of it."""
        environments = self._environments()
        peering, view = environments.peering, environments.peering.view
        manager = newest_term(view)
        proven_s = peering.proven_boot_s()
        return {
            "environment": peering.environment,
            "united": peering.is_united,
            "term": view.term,
            "epoch": view.epoch,
            "digest": view.digest,
            "manager": None if manager is None else manager[1].environment,
            "leads": peering.leads,
            "lease_s": lease_s_of(view),
            "proven_ago_s": None
            if proven_s == NEVER_S
            else round(max(0.0, self._agent.clock.boot_s() - proven_s), 1),
            "serves": peering.verdict.standing,
            "reason": peering.verdict.reason,
            "tampered": peering.tampered,
            "environments": [
                self._environment_json(name, body) for name, body in sorted(view.environments.items())
            ],
            "waiting": [
                {
                    "environment": name,
                    "agent": one.request.introduction.agent,
                    "url": one.request.url,
                    "fingerprint": fingerprint_of(one.request.introduction.registry_key),
                }
                for name, one in sorted(environments.membership.waiting().items())
            ],
            "proxies": []
            if environments.telling is None
            else [
                {"proxy": name, "state": told.word.state, "epoch": told.word.epoch, "error": told.error}
                for name, told in sorted(environments.telling.told.items())
            ],
            "joining": None
            if (joining := environments.membership.joining) is None
            else {
                "manager_agent": joining.manager_agent,
                "manager_url": joining.manager_url,
                "problem": environments.membership.problem,
            },
        }

    async def env_status(self, *, environment: str) -> Json:
        """One of them."""
        return self._environment_json(environment, self._body(environment))

    def _environment_json(self, name: str, body: EnvironmentBody) -> Json:
        peering = self._environments().peering
        manager = newest_term(peering.view)
        sight = peering.sights.get(name)
        notice = peering.notices.get(name)
        is_own = name == peering.environment
        epoch = (
            peering.view.epoch
            if is_own
            else None
            if sight is None or not sight.position
            else sight.position.epoch
        )
        return {
            "environment": name,
            "agent": body.agent_id,
            "url": body.api_url,
            "region": body.region,
            "geo": body.geo,
            "state": body.state,
            "since_ms": body.since_ms,
            "reason": body.reason,
            "incident": body.incident_id,
            "registry_key_exposed": body.registry_key_exposed,
            "manager": manager is not None and manager[1].environment == name,
            "kek": body.kek_id,
            "own": is_own,
            "acts": peering.verdict.state if is_own else None if sight is None else sight.state,
            "epoch": epoch,
            "answers": True if is_own else None if sight is None else sight.answers,
            "answers_since_ms": None if is_own or sight is None else sight.since_ms,
            "answers_error": None if is_own or sight is None else sight.error,
            "latency_ms": None
            if is_own or sight is None or sight.latency_s is None
            else round(sight.latency_s * 1000, 1),
            "lacks": self._lacks(name, body),
            "declared": None if notice is None else notice.reason,
            "load_balancer_name": body.load_balancer_name,
            "address": body.address,
        }

    def _lacks(self, name: str, body: EnvironmentBody) -> str | None:
        """What keeps it from having every key, as far as this agent is the manager and has looked."""
        environments = self._environments()
        parts = environments.key_parts
        if parts is None or not environments.peering.leads or body.state not in HAVE_KEYS:
            return None
        standing = parts.manager.standings.get(name)
        if standing is None or (standing.error is None and not standing.failed):
            return None
        if standing.error is not None:
            return standing.error
        key_id, why = min(standing.failed.items())
        return f"{len(standing.failed)} missing: {key_id}: {why}"

    # Membership.

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
                draft.put(Kind.ENVIRONMENT, environment, joining_body(request, now_ms))
                draft.put(Kind.KEK, request.kek_id, request.kek)

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

    # The manager.

    async def env_promotion(self, *, valid_s: int = approvals.VALIDITY_S) -> Json:
        """What two administrators have to sign so that this environment's agent becomes the manager."""
        peering = self._environments().peering
        self._promotable()
        now_ms, view = self._agent.now_ms(), peering.view
        text = approvals.payload_text(
            promotion_payload(
                agent=self._agent.agent_id,
                environment=peering.environment,
                registry_key=view.environments[peering.environment].registry_key,
                term=view.term,
                epoch=view.epoch,
                digest=view.digest,
            )
        )
        asked = ApprovalBody(
            action=Action.ENVIRONMENT_PROMOTE,
            subject=peering.environment,
            payload=text,
            payload_sha256=approvals.payload_sha256(text),
            requested_by=self._agent.agent_id,
            requested_at_ms=now_ms,
            expires_at_ms=now_ms + min(valid_s, approvals.MAX_VALIDITY_S) * 1000,
            signatures={},
        )
        approval_id = f"a-{approvals.payload_sha256(f'{text}{now_ms}')[:16]}"
        return {
            "tenant": peering.tenant,
            "approval": approval_id,
            "asked": msgspec.to_builtins(asked),
            "statement": approvals.statement(peering.tenant, approval_id, asked).decode("ascii"),
        }

    async def env_promote(self, *, approval: str, asked: dict[str, object]) -> Json:
        """This environment's agent becomes the manager: the next term is its own.

        It first takes over what the others have. Whoever cannot be reached follows when it answers again; a
        manager that was cut off can change nothing any more, and stops serving when its lease is over.
        """
        async with self._one_at_a_time:
            environments = self._environments()
            peering = environments.peering
            self._promotable()
            try:
                body = msgspec.convert(asked, ApprovalBody)
            except msgspec.ValidationError as error:
                raise RefusedChangeError(
                    f"not an approval: {error}", "give the file that the administrators have signed"
                ) from None
            now_ms = self._agent.now_ms()
            await asyncio.gather(*map(environments.catch_up, peering.others()))
            view = peering.view
            if (known := view.approvals.get(approval)) is not None and known.used_at_ms is not None:
                raise ApprovalError("used", f"approval {approval} is used up", "`key-agent env promotion`")
            granted = check_promotion(
                peering.tenant,
                approval,
                body,
                view.admins,
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
                "promote one that serves",
            )
        if own.registry_key_exposed:
            raise RefusedChangeError(
                "this environment's agent was breached: somebody else may have its registry key",
                "promote another one; retire this environment, and add it anew with another registry key",
            )
        if peering.leads:
            raise RefusedChangeError("this agent is the manager already", "`key-agent env list` shows it")

    # Shared by the above.

    def _environments(self) -> "Environments":
        found = self._surroundings()
        if found is None:
            raise RefusedChangeError(
                "this agent's configuration knows of no other environments",
                "add a section [environments] and restart the agent (docs/environments.md)",
            )
        return found

    def _leading(self) -> int:
        """The term to write with. RefusedChangeError unless this agent is the manager."""
        peering = self._environments().peering
        term = None if peering.leadership is None else peering.leadership.term
        if term is None:
            manager = newest_term(peering.view)
            where = "none is" if manager is None else f"it is {manager[1].agent} of {manager[1].environment}"
            raise RefusedChangeError(
                f"this agent is not the manager: {where}",
                "give the command there, or `key-agent env promote` this one",
            )
        return term

    def _body(self, environment: str) -> EnvironmentBody:
        found = self._environments().peering.view.environments.get(environment)
        if found is None:
            raise RefusedChangeError(f"there is no environment {environment}", "`key-agent env list`")
        return found

    async def _spread(self) -> dict[str, bool]:
        peering = self._environments().peering
        await peering.changed()
        return await peering.spread(peering.others(), timeout_s=SPREAD_PATIENCE_S)


def _registry_keys(view: "Shared") -> set[str]:
    """All that environments have, or have had."""
    bodies = view.environments.values()
    return {body.registry_key for body in bodies} | {
        former.registry_key for body in bodies for former in body.former_keys
    }


def joining_body(request: JoinRequest, now_ms: int) -> EnvironmentBody:
    """The row of an environment that has just been added."""
    told = request.introduction
    return EnvironmentBody(
        name=told.environment,
        agent_id=told.agent,
        api_url=request.url,
        region=request.region,
        geo=request.geo,
        kms_type=request.kms_type,
        registry_key=told.registry_key,
        transport_certificate_pem=request.transport_certificate_pem,
        kek_id=request.kek_id,
        state=EnvironmentState.JOINING,
        since_ms=now_ms,
        load_balancer_name=request.load_balancer_name,
        address=request.address,
    )
