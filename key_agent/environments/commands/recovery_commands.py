"""The road back when no environment counts: `key-agent env recovery`, `recover`, `new-registry-key`.

1. Refused while any other environment counts: then keys and rows come from that one.
2. What is to be signed names what this agent has found here: its KEK of now, the KEK of before that its keys
   open under, or that there is none. Which keys are lost is said before anybody signs.
3. To be appointed changes rows alone: the environment heals as before, and returns by its one road.
"""

import asyncio
from itertools import batched
from typing import TYPE_CHECKING, Final

from envelope.keys import KeyState
from key_agent.environments.changes.founding import kek_body
from key_agent.environments.changes.healing_changes import kek_fingerprint, open_incidents, recover
from key_agent.environments.commands.environment_commands import EnvironmentCommands
from key_agent.environments.keys.wrap_messages import BATCH
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.shared.documents import EnvironmentBody, Head
from key_agent.environments.shared.recovery import Succession, read_succession, recovery_payload
from key_agent.environments.shared.registry_key import fingerprint_of
from key_agent.environments.shared.registry_key_exchange import make_next_key
from key_agent.environments.shared.shared_view import Shared, newest_term
from key_agent.environments.shared.terms import check_appointment
from key_agent.environments.states import EnvironmentState
from key_agent.operations.commands import Json
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.model import KekRow
from key_agent.registry.states import KekState
from key_agent.registry.wrap_rows import sound_wraps
from key_agent.rotation import unopenable
from key_agent.sources.source import Kek, Verdict, WrappedKey

if TYPE_CHECKING:
    from key_agent.environments.shared.draft import Draft

_WITHOUT_KEYS: Final = (EnvironmentState.PROVISIONING, EnvironmentState.JOINING, EnvironmentState.RETIRED)


class RecoveryCommands(EnvironmentCommands):
    async def env_recovery(
        self, *, old_kek: str | None = None, lost: bool = False, valid_s: int = approvals.VALIDITY_S
    ) -> Json:
        """What two administrators have to sign so that this environment is the first that comes back.

        *old_kek*: the KEK of before that its keys come from; left out: the newest that works. *lost*: there
        is none, anywhere; the keys are given up.
        """
        peering = self._environments().peering
        own = self._recoverable()
        row, now = await self._kek_of_now(own)
        view = peering.view
        held = set(await self._agent.registry.transact(lambda c: sound_wraps(c, row.reference.kek_id)))
        keys = {key_id for key_id, dek in view.deks.items() if dek.state is not KeyState.DESTROYED}
        wanted = keys - held  # compromised ones as well: a rescue may need them
        old = await self._old_kek(row.reference.kek_id, wanted, named=old_kek, lost=lost)
        gone = wanted if old is None else wanted - await self._openable(old, wanted)
        by = Succession(
            old_kek=None if old is None else old.reference.kek_id,
            lost=lost and bool(gone),
            new_kek=row.reference.kek_id,
            kek_fingerprint=kek_fingerprint(row.reference.kek_id, kek_body(row, own.name)),
        )
        mine = self._environments().membership.introduction.registry_key
        payload = recovery_payload(
            agent=self._agent.agent_id,
            environment=own.name,
            registry_key=mine,
            term=view.term,
            epoch=view.epoch,
            digest=view.digest,
            by=by,
        )
        return self._to_sign(Action.ENVIRONMENT_RECOVER, payload, valid_s=valid_s) | {
            "environment": own.name,
            "old_kek": by.old_kek,
            "new_kek": by.new_kek,
            "kek_fingerprint": by.kek_fingerprint,
            "method": now.method,
            "registry_fingerprint": fingerprint_of(mine),
            "epoch": view.epoch,
            "digest": view.digest,
            "newer": self._newer(),
            "kept": len(keys - gone),
            "lost": [
                {"kid": key_id, "service": view.deks[key_id].service, "state": view.deks[key_id].state}
                for key_id in sorted(gone)
            ],
        }

    async def env_recover(self, *, approval: str, asked: dict[str, object]) -> Json:
        """This environment is the first that comes back: the next term is its agent's, though it heals.

        Whoever cannot be reached follows when it answers again.
        """
        async with self._one_at_a_time:
            environments = self._environments()
            peering = environments.peering
            body = self._signed(asked)
            await asyncio.gather(*map(environments.catch_up, peering.others()))
            self._check_unused(approval, ask_anew="env recovery FILE")
            own = self._recoverable()
            row, _ = await self._kek_of_now(own)
            view, now_ms = peering.view, self._agent.now_ms()
            granted = check_appointment(
                peering.tenant,
                approval,
                body,
                view.admins,
                action=Action.ENVIRONMENT_RECOVER,
                agent=self._agent.agent_id,
                environment=own.name,
                registry_key=environments.membership.introduction.registry_key,
                built_on=Head(term=view.term, epoch=view.epoch, digest=view.digest),
                now_ms=now_ms,
            )
            fingerprint = kek_fingerprint(row.reference.kek_id, kek_body(row, own.name))
            by = read_succession(body.payload)
            if (by.new_kek, by.kek_fingerprint) != (row.reference.kek_id, fingerprint):
                raise ApprovalError(
                    "other-payload",
                    f"approval {approval} allows KEK {by.new_kek}, the one of now is {row.reference.kek_id}",
                    "`key-agent env recovery`, and have that signed",
                )
            before, term = newest_term(view), view.term + 1
            await self._agent.journal.record(
                "env-recover",
                outcome="begun",
                term=term,
                approved_by=",".join(granted),
                old_kek=by.old_kek,
                kek=by.new_kek,
            )
            kek = kek_body(row, own.name)

            def change(draft: "Draft") -> None:
                recover(
                    draft,
                    own.name,
                    registry_key=environments.membership.introduction.registry_key,
                    kek_id=by.new_kek,
                    kek=kek,
                    now_ms=now_ms,
                )

            await peering.shared.begin_term(
                term,
                cause=f"appointed by {', '.join(granted)} while no environment counted",
                now_ms=now_ms,
                approval=(approval, approvals.unused(body)),
                also=change,
            )
            spread = await self._spread()
            await self._agent.journal.record("env-recover", term=term, epoch=peering.view.epoch)
            return {
                "environment": own.name,
                "term": term,
                "epoch": peering.view.epoch,
                "former": None if before is None else before[1].environment,
                "old_kek": by.old_kek,
                "new_kek": by.new_kek,
                "kek_fingerprint": fingerprint,
                "spread": spread,
            }

    async def env_new_registry_key(self) -> Json:
        """Another registry key for this environment, used from its agent's next start on.

        Only where two administrators can name it: everybody else goes on to know the old one.
        """
        own = self._first_to_be()
        if not own.registry_key_exposed:
            raise RefusedChangeError(
                "nobody else is known to have this environment's registry key", "`key-agent env recovery`"
            )
        environments = self._environments()
        if environments.membership.introduction.registry_key != own.registry_key:
            raise RefusedChangeError(
                "this environment has another registry key already, which its row does not name yet",
                "`key-agent env recovery`",
            )
        await self._agent.journal.record("env-new-registry-key", outcome="begun")
        public = await asyncio.to_thread(make_next_key, environments.state_dir)
        fingerprint = fingerprint_of(public)
        await self._agent.journal.record("env-new-registry-key", fingerprint=fingerprint)
        return {"environment": own.name, "registry_key": public, "fingerprint": fingerprint}

    def _recoverable(self) -> EnvironmentBody:
        """The own row. RefusedChangeError: the road is closed, or not for this one."""
        own = self._first_to_be()
        mine = self._environments().membership.introduction.registry_key
        if own.registry_key_exposed and mine == own.registry_key:
            raise RefusedChangeError(
                "this environment's agent was breached: somebody else may have its registry key",
                "`key-agent env new-registry-key` here, restart the agent, repeat; or recover another one",
            )
        if own.state.counts and self._are_in_step():
            raise RefusedChangeError(
                "this environment counts, and the others follow",
                "`key-agent env heal-complete` and `env rejoin` bring each of them back",
            )
        return own

    def _first_to_be(self) -> EnvironmentBody:
        """The own row, if no other environment counts. RefusedChangeError names the normal road."""
        peering = self._environments().peering
        view: Shared = peering.view
        own = view.environments.get(peering.environment)
        if own is None or own.state in _WITHOUT_KEYS:
            state = "none of the set" if own is None else own.state
            raise RefusedChangeError(
                f"this environment is {state}: it has no keys to begin with", "recover another one"
            )
        sound = sorted(
            name for name, body in view.environments.items() if body.state.counts and body is not own
        )
        if sound:
            raise RefusedChangeError(
                f"{', '.join(sound)} counts: keys and rows come from there",
                f"`key-agent env promote` at {sound[0]} if it is not the manager; then "
                f"`key-agent env heal-complete {own.name}` and `env rejoin` there",
            )
        return own

    def _are_in_step(self) -> bool:
        """Whether every other environment had the rows of this one when it was heard last."""
        peering = self._environments().peering
        sights = [peering.sights[name] for name in peering.others() if name in peering.sights]
        return all(sight.position == peering.position for sight in sights)

    def _newer(self) -> dict[str, int]:
        """Environments that claim newer rows, and which epoch: they are not believed, but may be right."""
        peering = self._environments().peering
        return {
            name: sight.position.epoch
            for name, sight in sorted(peering.sights.items())
            if sight.position is not None and sight.position > peering.position
        }

    async def _kek_of_now(self, own: EnvironmentBody) -> tuple[KekRow, Kek]:
        """RefusedChangeError: there is none, or its incidents demand a newer one."""
        row = await self._agent.registry.current_kek()
        next_step = f"`key-agent env new-kek` at {own.name}"
        if row is None or row.kek is None or row.state is not KekState.ACTIVE:
            state = "missing" if row is None else row.state
            raise RefusedChangeError(f"the KEK of {own.name} is {state}", next_step)
        for incident_id, incident in open_incidents(self._environments().peering.view, own.name).items():
            if incident.kind.needs_new_kek and row.kek.created_at_ms <= incident.opened_at_ms:
                raise RefusedChangeError(
                    f"the KEK of {own.name} is not newer than {incident_id} ({incident.kind})", next_step
                )
        return row, row.kek

    async def _old_kek(self, new_kek: str, wanted: set[str], *, named: str | None, lost: bool) -> Kek | None:
        """The KEK of before that works and wraps what is wanted. RefusedChangeError."""
        if not wanted and named is None:
            return None
        registry = self._agent.registry
        rows = sorted(await registry.keks(), key=lambda row: -row.version)
        candidates = [
            row.kek
            for row in rows
            if row.kek is not None
            and row.reference.kek_id != new_kek
            and named in (None, row.reference.kek_id)
            and await registry.wraps_under(row.reference.kek_id)
        ]
        if named is not None and not candidates:
            raise RefusedChangeError(
                f"no key is wrapped by a KEK {named} here", "`key-agent kek status` names the KEK of now"
            )
        found = []
        for kek in candidates:
            diagnosis = await self._agent.source.diagnose(kek)
            if diagnosis.verdict is Verdict.OK:
                if lost:
                    raise RefusedChangeError(
                        f"KEK {kek.reference.kek_id} opens: nothing has to be given up",
                        "repeat it without --lost",
                    )
                return kek
            found.append(f"KEK {kek.reference.kek_id} ({kek.reference.label}): {diagnosis.verdict}")
        if lost:
            return None
        raise RefusedChangeError(
            f"{len(wanted)} keys of this environment do not open: " + ("; ".join(found) or "no wrap is here"),
            "have the HSM's administrator enable that KEK for this, or recover an environment whose HSM has "
            "its KEK still; only if every KEK of every environment is gone for good: --lost, which gives the "
            "keys up",
        )

    async def _openable(self, old: Kek, wanted: set[str]) -> set[str]:
        """Those of *wanted* that open under *old*, as the key that the signed rows mean."""
        deks = self._environments().peering.view.deks
        held: list[WrappedKey] = [
            key
            for key in await self._agent.registry.wrapped_keys(old.reference.kek_id)
            if str(key.key_id) in wanted and key.kcv.hex() == deks[str(key.key_id)].kcv
        ]
        found = {str(key.key_id) for key in held}
        for some in batched(held, BATCH):
            found -= {str(key_id) for key_id in await unopenable(self._agent.source, old, some)}
        return found
