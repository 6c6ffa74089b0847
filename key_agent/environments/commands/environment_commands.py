"""What every command on environments is made of, and those that only look: `key-agent env list`, `status`.

1. What all environments share is changed at the manager alone, in one transaction, and brought to the others
   before the command returns: its answer says who has it (`spread`). Who has not gets it when it answers.
2. Each command leaves an audit event before it changes anything, and can be repeated.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from key_agent.environments.peers.standing import lease_s_of
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.shared.documents import ApprovalBody, EnvironmentBody
from key_agent.environments.shared.recovery import none_counts
from key_agent.environments.shared.registry_key import fingerprint_of
from key_agent.environments.shared.registry_lease import NEVER_S
from key_agent.environments.shared.shared_view import newest_term
from key_agent.environments.states import HAVE_KEYS
from key_agent.operations.commands import Commands, Json
from key_agent.registry.store import RefusedChangeError

if TYPE_CHECKING:
    from key_agent.environments.assembly import Environments

SPREAD_PATIENCE_S: Final = 5.0


class EnvironmentCommands(Commands):
    # What two administrators sign in a file: rows that an approval could stand in may be out of reach.

    def _to_sign(self, action: Action, payload: Mapping[str, object], *, valid_s: int) -> dict[str, object]:
        """An approval of *payload* for this environment, and the statement to sign; asked again, another."""
        peering, now_ms = self._environments().peering, self._agent.now_ms()
        text = approvals.payload_text(payload)
        asked = ApprovalBody(
            action=action,
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

    def _signed(self, asked: Mapping[str, object]) -> ApprovalBody:
        """What `_to_sign` gave, signed or not. RefusedChangeError."""
        try:
            return msgspec.convert(asked, ApprovalBody)
        except msgspec.ValidationError as error:
            raise RefusedChangeError(
                f"not an approval: {error}", "give the file that the administrators have signed"
            ) from None

    def _check_unused(self, approval: str, *, ask_anew: str) -> None:
        """ApprovalError: it stands in the rows as used up."""
        known = self._environments().peering.view.approvals.get(approval)
        if known is not None and known.used_at_ms is not None:
            raise ApprovalError("used", f"approval {approval} is used up", f"`key-agent {ask_anew}`")

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
            "told": None
            if environments.telling is None or (word := environments.telling.word) is None
            else {"state": word.state, "reason": word.reason},
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
        standing = parts.manager.bringing.standings.get(name)
        if standing is None or (standing.error is None and not standing.failed):
            return None
        if standing.error is not None:
            return standing.error
        key_id, why = min(standing.failed.items())
        return f"{len(standing.failed)} missing: {key_id}: {why}"

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
                "no environment counts: `key-agent env recovery` at the one that is to come back first"
                if none_counts(peering.view)
                else "give the command there, or `key-agent env promote` this one",
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
