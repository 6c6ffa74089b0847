"""The administrator's commands on incidents and healing: `key-agent incident`, `keys`, parts of `env`.

1. Opening an incident does not wait for its turn: no lock of other commands, no disk, no peer stands before
   it.
2. What gives something back names an approval (approval_commands.py), which is used up with it.
3. Each command can be repeated; its answer says how far things are, not what this call has done alone.
"""

import asyncio
import base64
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from envelope.errors import FormatError, MisuseError
from envelope.keys import KeyState, KeyUse
from key_agent.environments.breaches import Declaration, IncidentKind
from key_agent.environments.changes import healing_changes, incident_changes
from key_agent.environments.changes.healing_changes import kek_fingerprint
from key_agent.environments.changes.incident_changes import Opening
from key_agent.environments.commands.approval_commands import ApprovalCommands
from key_agent.environments.incidents.evidence import audit_extract, write_bundle
from key_agent.environments.incidents.healing import CONFIRMATION_PATIENCE_S
from key_agent.environments.incidents.incidents import EnvironmentAck, check_none_seals, parse_keys
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import IncidentBody
from key_agent.operations.commands import Json
from key_agent.operations.kek_making import wish_of
from key_agent.reencryption import losses
from key_agent.reencryption.job import Progress
from key_agent.reencryption.ledger import FileLedger
from key_agent.registry.access import RefusedChangeError
from key_agent.state_dir import AUDIT_NAME
from runtime.audit_files import lines_since

if TYPE_CHECKING:
    from key_agent.environments.shared.draft import Draft

MAX_KEYS: Final = 10_000
_BEFORE_MS: Final = 3_600_000
"""Evidence begins so long before the breach."""


class IncidentCommands(ApprovalCommands):
    # Incidents.

    async def incident_open(
        self,
        *,
        environment: str,
        kind: str,
        reason: str,
        since_ms: int | None = None,
        keys: Sequence[str] = (),
        service: str | None = None,
        keep_keys: bool = False,
        idempotency_key: str | None = None,
        by: str = "",
    ) -> Json:
        """An environment is breached, or may be: what has to stop, stops everywhere."""
        now_ms = self._agent.now_ms()
        try:
            declared = Declaration(
                kind=IncidentKind(kind),
                environment=environment,
                keys=parse_keys(keys),
                service=None if service is None else str(self._owner(service)),
                keep_keys=keep_keys,
            )
        except (MisuseError, FormatError) as error:
            raise RefusedChangeError(str(error), "`key-agent incident open --help`") from None
        except ValueError:
            raise RefusedChangeError(
                f"no breach is of kind {kind!r}", "one of " + ", ".join(IncidentKind)
            ) from None
        if since_ms is not None and since_ms > now_ms:
            raise RefusedChangeError("a breach that is still to come", "--since names a time that has passed")
        opening = Opening(
            declared=declared,
            reason=reason,
            since_ms=now_ms if since_ms is None else since_ms,
            opened_by=by or "whoever controls the agent",
            idempotency_key=idempotency_key or secrets.token_hex(16),
        )
        incident_id, is_new, told = await self._parts().incidents.open(opening)
        view = self._view
        return {
            "incident": incident_id,
            "new": is_new,
            "epoch": view.incidents[incident_id].opened_epoch,
            "durable": any(told.values()),
            "told": told,
            **self._scope_json(incident_id),
        }

    async def incident_list(self) -> Json:
        """All incidents, the newest first."""
        found = sorted(self._view.incidents.items(), key=lambda one: -one[1].number)
        return {"incidents": [self._incident_json(name, body) for name, body in found]}

    async def incident_status(self, *, incident: str) -> Json:
        """Where it stands; who has acknowledged it, asked now."""
        incident_id, _ = incident_changes.find(self._view, incident)
        incidents = self._parts().incidents
        acks = await incidents.acknowledgements(incident_id)
        is_contained = await incidents.note_contained(incident_id, acks)
        await self._note_succeeded(incident_id)
        view = self._view
        body = view.incidents[incident_id]
        balancers = self._parts().load_balancers.all(now_boot_s=self._agent.clock.boot_s())
        return {
            **self._incident_json(incident_id, body),
            "contained": is_contained,
            "without_successor": incident_changes.without_successor(view, incident_id),
            "undecided": incident_changes.undecided(view, incident_id),
            "environments": [_ack_json(ack) for ack in acks],
            "load_balancers": [
                {
                    "load_balancer": one.name,
                    "live": one.is_live,
                    "epoch": one.position.epoch,
                    "has_it": (one.position.term, one.position.epoch) >= (0, body.opened_epoch),
                    "answers": dict(one.answers),
                }
                for one in balancers
            ],
        }

    async def _note_succeeded(self, incident_id: str) -> None:
        """Where new keys have become active since `rekey`, that is written; by the manager."""
        was_asked = "rekey" in self._view.incidents[incident_id].steps
        if was_asked and self._environments().peering.leads:
            await self._parts().incidents.note_succeeded(incident_id)

    async def incident_scope(self, *, incident: str) -> Json:
        """Every key that it concerns, and how."""
        incident_id, body = incident_changes.find(self._view, incident)
        return {**self._incident_json(incident_id, body), **self._scope_json(incident_id)}

    async def incident_compromise(self, *, incident: str, keys: Sequence[str], approval: str) -> Json:
        """Further keys of it are compromised; two administrators have approved of exactly these."""
        incident_id, _ = incident_changes.find(self._view, incident)
        wanted = parse_keys(keys[:MAX_KEYS])
        self._agent.journal.note(
            "incident-compromise", outcome="begun", incident=incident_id, keys=len(wanted), approval=approval
        )

        def change(draft: "Draft") -> None:
            incident_changes.compromise_more(
                draft,
                incident_id,
                wanted,
                tenant=self._environments().peering.tenant,
                approval_id=approval,
                now_ms=self._agent.now_ms(),
            )

        incidents = self._parts().incidents
        await incidents.write(change)
        told = await incidents.tell()
        self._agent.journal.note("incident-compromise", incident=incident_id, approval=approval)
        return {"incident": incident_id, "told": told, **self._scope_json(incident_id)}

    async def incident_rekey(self, *, incident: str, generator: str | None = None) -> Json:
        """New keys in the place of those that were taken away."""
        async with self._one_at_a_time:
            incidents = self._parts().incidents
            made, is_done = await incidents.rekey(incident, generator=generator)
            told = await incidents.tell()
        incident_id, body = incident_changes.find(self._view, incident)
        return {
            **self._incident_json(incident_id, body),
            "made": made,
            "done": is_done,
            "without_successor": incident_changes.without_successor(self._view, incident_id),
            "told": told,
        }

    async def incident_cancel(self, *, incident: str, approval: str) -> Json:
        """A false alarm: suspended keys come back; two administrators have approved."""
        incident_id, _ = incident_changes.find(self._view, incident)
        await self._agent.journal.record(
            "incident-cancel", outcome="begun", incident=incident_id, approval=approval
        )

        def change(draft: "Draft") -> None:
            incident_changes.cancel(
                draft,
                incident_id,
                tenant=self._environments().peering.tenant,
                approval_id=approval,
                now_ms=self._agent.now_ms(),
            )

        answer = await self._step(incident_id, "incident-cancel", change)
        environment = self._view.environments.get(self._view.incidents[incident_id].environment)
        return {**answer, "environment_state": None if environment is None else environment.state}

    async def incident_close(self, *, incident: str) -> Json:
        """Nothing is left to do."""
        incident_id, _ = incident_changes.find(self._view, incident)
        await self._agent.journal.record("incident-close", outcome="begun", incident=incident_id)

        def change(draft: "Draft") -> None:
            incident_changes.close(draft, incident_id, now_ms=self._agent.now_ms())

        return await self._step(incident_id, "incident-close", change)

    async def _step(self, incident_id: str, action: str, change: "Callable[[Draft], None]") -> Json:
        incidents = self._parts().incidents
        await incidents.write(change)
        told = await incidents.tell()
        await self._agent.journal.record(action, incident=incident_id)
        body = self._view.incidents[incident_id]
        return {**self._incident_json(incident_id, body), "told": told}

    async def incident_evidence(self, *, incident: str) -> Json:
        """All that is known of it, in a file that proves itself."""
        incident_id, body = incident_changes.find(self._view, incident)
        agent, peering = self._agent, self._environments().peering
        acks = await self._parts().incidents.acknowledgements(incident_id)
        await agent.journal.record("incident-evidence", outcome="begun", incident=incident_id)
        path = self._environments().state_dir / AUDIT_NAME
        since_ms = min(body.since_ms, body.opened_at_ms) - _BEFORE_MS
        lines = await asyncio.to_thread(lines_since, path, since_ms)
        everything = await peering.shared.since(0)
        content = await asyncio.to_thread(
            lambda: write_bundle(
                tenant=peering.tenant,
                incident_id=incident_id,
                rows=everything.rows,
                term=everything.term,
                epoch=everything.epoch_to,
                digest=everything.digest,
                head_signature=everything.signature,
                audit_lines=audit_extract(lines, since_ms=since_ms),
                acknowledgements=[_ack_json(ack) for ack in acks],
                made_at_ms=agent.now_ms(),
                key=agent.signing.key,
                chain=[agent.signing.certificate],
            )
        )
        return {
            "incident": incident_id,
            "bytes": len(content),
            "epoch": everything.epoch_to,
            "digest": everything.digest,
            "content_base64": base64.b64encode(content).decode("ascii"),
        }

    # Healing.

    async def env_declare(self, *, reason: str) -> Json:
        """This environment is not to be trusted from now on: its own agent says so, and needs no manager."""
        peering = self._environments().peering
        await peering.declare(reason)
        return {
            "environment": peering.environment,
            "state": peering.verdict.state,
            "reason": peering.verdict.reason,
        }

    async def env_new_kek(
        self,
        *,
        kek_type: str | None = None,
        valid_days: int | None = None,
        hsm_label: str | None = None,
        hsm_id: str | None = None,
    ) -> Json:
        """A new KEK for this environment, which heals. Keys come under it when it rejoins."""
        wish = wish_of(kek_type=kek_type, valid_days=valid_days, hsm_label=hsm_label, hsm_id=hsm_id)
        async with self._one_at_a_time:
            told = await self._parts().reaction.new_kek(wish)
        return {
            "environment": told.environment,
            "kek": told.kek_id,
            "type": told.kek.kek_type,
            "fingerprint": kek_fingerprint(told.kek_id, told.kek),
        }

    async def env_heal_complete(
        self, *, environment: str, attestation: str, new_certificates: bool = False, kek: str | None = None
    ) -> Json:
        """Its operator says that it is sound again. *kek*: the fingerprint of its new KEK."""
        async with self._one_at_a_time:
            await self._parts().healing.heal_complete(
                environment, attestation=attestation, new_certificates=new_certificates, fingerprint=kek
            )
        return self._environment_json(environment, self._body(environment))

    async def env_rejoin(self, *, environment: str, patience_s: float = CONFIRMATION_PATIENCE_S) -> Json:
        """The one road back: confirmed by the load balancers, stored, proven, active."""
        async with self._one_at_a_time:
            problems = await self._parts().healing.rejoin(environment, patience_s=patience_s)
        return {
            **self._environment_json(environment, self._body(environment)),
            "problems": dict(list(problems.items())[:100]),
        }

    # Old keys.

    async def keys_rescue(self, *, incident: str, keys: Sequence[str], until_ms: int, approval: str) -> Json:
        """Compromised keys open objects again, for a time, for every caller."""
        incident_id, _ = incident_changes.find(self._view, incident)
        wanted = parse_keys(keys[:MAX_KEYS])
        await self._agent.journal.record(
            "keys-rescue", outcome="begun", incident=incident_id, keys=len(wanted), approval=approval
        )

        def change(draft: "Draft") -> None:
            healing_changes.rescue(
                draft,
                incident_id,
                wanted,
                tenant=self._environments().peering.tenant,
                approval_id=approval,
                until_ms=until_ms,
                now_ms=self._agent.now_ms(),
            )

        return await self._step(incident_id, "keys-rescue", change)

    async def keys_retire(self, *, keys: Sequence[str], approval: str, accept_loss: bool = False) -> Json:
        """Keys are destroyed everywhere; what they sealed is unreadable for ever."""
        wanted = parse_keys(keys[:MAX_KEYS])
        await self._agent.journal.record(
            "keys-retire",
            outcome="begun",
            keys=len(wanted),
            approval=approval,
            accept_loss=str(accept_loss).lower(),
        )
        jobs = await FileLedger(self._environments().state_dir).all()
        rewritten = set(map(str, losses.rewritten(jobs)))
        unfinished = losses.unfinished(jobs)

        def change(draft: "Draft") -> None:
            healing_changes.retire_keys(
                draft,
                wanted,
                tenant=self._environments().peering.tenant,
                approval_id=approval,
                accept_loss=accept_loss,
                rewritten=rewritten,
                unfinished=unfinished,
                now_ms=self._agent.now_ms(),
            )

        incidents = self._parts().incidents
        await incidents.write(change)
        told = await incidents.tell()
        await self._agent.journal.record("keys-retire", keys=len(wanted), approval=approval)
        view = self._view
        return {
            "keys": {key: view.deks[key].state for key in sorted(wanted)},
            "told": told,
            "loss": losses.known_loss(jobs, wanted) if accept_loss else None,
        }

    async def keys_loss(self, *, keys: Sequence[str]) -> Json:
        """What their end would lose, as far as re-encryptions know. Changes nothing."""
        return await self._known_loss(parse_keys(keys[:MAX_KEYS]))

    async def keys_resume(self, *, keys: Sequence[str], approval: str) -> Json:
        """Suspended keys are what they were; two administrators have approved."""
        wanted = parse_keys(keys[:MAX_KEYS])
        tenant = self._environments().peering.tenant
        await self._agent.journal.record("keys-resume", outcome="begun", keys=len(wanted), approval=approval)

        def change(draft: "Draft") -> None:
            now_ms = self._agent.now_ms()
            suspended = incident_changes.suspended(draft.shared, wanted)
            if not suspended:
                return
            incident_changes.use_approval(
                draft,
                approval,
                tenant=tenant,
                action=Action.KEY_RESUME,
                subject=tenant,
                payload={"keys": sorted(wanted)},
                now_ms=now_ms,
            )
            for key_id in suspended:
                incident_changes.resume(draft, key_id, now_ms=now_ms)

        incidents = self._parts().incidents
        await incidents.write(change)
        told = await incidents.tell()
        await self._agent.journal.record("keys-resume", keys=len(wanted), approval=approval)
        view = self._view
        return {"keys": {key: view.deks[key].state for key in sorted(wanted)}, "told": told}

    # Re-encryption. It runs in a process of its own (old_keys_cli.py), beside the agent.

    async def reencryption_begin(self, *, incident: str, connector: str, service: str | None = None) -> Json:
        """A new re-encryption of what an incident's keys sealed: its id, and which keys that are.

        Those of *service*: what one store was found to have left says nothing of another service's objects.
        """
        incident_id, _ = incident_changes.find(self._view, incident)
        view = self._view
        keys = [
            key_id
            for key_id in sorted(incident_changes.keys_of(view, incident_id))
            if view.deks[key_id].state is KeyState.COMPROMISED
            and (service is None or view.deks[key_id].service == str(self._owner(service)))
        ]
        if not keys:
            of_it = "" if service is None else f" of {service}"
            raise RefusedChangeError(
                f"{incident_id} has compromised no keys{of_it}", f"`key-agent incident scope {incident_id}`"
            )
        services = sorted({view.deks[key_id].service for key_id in keys})
        if len(services) > 1:
            raise RefusedChangeError(
                f"its keys are of several services, a store's objects of one: {', '.join(services)}",
                "repeat it with --service NAME, once for each",
            )
        acks = await self._parts().incidents.acknowledgements(incident_id)
        check_none_seals(view, keys, acks, now_ms=self._agent.now_ms())
        job = secrets.token_hex(8)
        await self._agent.journal.record(
            "reencryption",
            outcome="begun",
            job=job,
            incident=incident_id,
            keys=len(keys),
            service=services[0],
            store=connector,
        )
        return {
            "job": job,
            "incident": incident_id,
            "service": services[0],
            "keys": keys,
            "sealing": sorted(
                key_id
                for key_id, dek in view.deks.items()
                if dek.service == services[0] and dek.state is KeyState.ACTIVE and dek.use is KeyUse.DATA
            ),
        }

    async def reencryption_end(self, *, job: str, state: str, rewritten: int, failed: int) -> Json:
        """Its process has ended, for now or for good."""
        outcome = state if state in ("done", "incomplete", "interrupted") else "interrupted"
        await self._agent.journal.record(
            "reencryption", outcome=outcome, job=job, rewritten=rewritten, failed=failed
        )
        return {"job": job, "state": outcome}

    async def reencryption_drop(self, *, job: str) -> Json:
        """Its store is gone for good: nobody waits for it any more, and what it knows stays known."""
        await self._agent.journal.record("reencryption-drop", outcome="begun", job=job)
        ledger = FileLedger(self._environments().state_dir)
        dropped = await ledger.drop(job, now_ms=self._agent.now_ms())
        await self._agent.journal.record("reencryption-drop", job=job, left=dropped.known_left)
        return _job_json(dropped)

    async def reencryption_list(self) -> Json:
        """Every re-encryption that was begun on this machine."""
        found = await FileLedger(self._environments().state_dir).all()
        return {"reencryptions": [_job_json(one) for one in found]}

    # What people and programs get.

    def _incident_json(self, incident_id: str, body: IncidentBody) -> Json:
        return {"incident": incident_id, **msgspec.to_builtins(body)}

    def _scope_json(self, incident_id: str) -> Json:
        view = self._view
        environment = view.environments.get(view.incidents[incident_id].environment)
        return {
            "environment_state": None if environment is None else environment.state,
            "keys": [
                {
                    "kid": key_id,
                    "service": view.deks[key_id].service,
                    "use": view.deks[key_id].use,
                    "owner": view.deks[key_id].owner_environment,
                    "previous": key.previous_state,
                    "disposition": key.disposition,
                    "state": view.deks[key_id].state,
                    "decided_by": key.decided_by,
                    "replaced_by": key.replaced_by,
                }
                for key_id, key in sorted(incident_changes.keys_of(view, incident_id).items())
            ],
        }


def _ack_json(ack: EnvironmentAck) -> Json:
    return {
        "environment": ack.environment,
        "has_it": ack.has_it,
        "clear": ack.is_clear,
        "error": ack.error,
        "places": [msgspec.to_builtins(place) for place in ack.places],
    }


def _job_json(job: Progress) -> Json:
    return {
        "job": job.job_id,
        "incident": job.incident_id,
        "connector": job.connector,
        "keys": [str(key_id) for key_id in job.sources],
        "state": job.state,
        "dropped_at_ms": job.dropped_at_ms,
        "may_have_left": job.may_have_left,
        "known_left": job.known_left,
        "scanned": job.scanned,
        "rewritten": job.rewritten,
        "skipped": job.skipped,
        "failed": job.failed,
        "failures": dict(list(job.failures.items())[:20]),
    }
