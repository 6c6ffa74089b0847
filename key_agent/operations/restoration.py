"""`reinstate --restore`: a KEK that was revoked is back in the HSM, and what its keys sealed opens again.

1. Proof first: a KEK counts as back when it opens its canary in the token that the registry pinned. Nothing
   is changed before that, and no key goes to a KEK that is not proven too.
2. If today's KEK was revoked and is back, it is used again. The keys of earlier KEKs that are back move to
   today's: opened under the old one, sealed under the new one, opened again and compared (the source does
   that), then one transaction puts the new wrap in the old one's place.
3. Batch by batch, each a commit: whoever is killed anywhere leaves every key under exactly one KEK, and the
   same command goes on with what is left.
4. Keys that moved are deactivated: they open old objects; new ones are sealed by the active key.
5. A KEK under which nothing is left is destroyed in the HSM, searched again, and `retired`: else `kek revoke`
   would leave a second KEK behind that opens the same keys from any older copy of the registry.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import batched
from typing import Final

import structlog

from envelope.keys import KeyState, NetworkService
from key_agent.agent import Agent
from key_agent.errors import KeyAgentError, error_of
from key_agent.registry.database import RegistryError
from key_agent.registry.model import DataKeyRow, KekRow
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import Diagnosis, Kek, Verdict

log = structlog.get_logger(__name__)

type Json = dict[str, object]

BATCH_SIZE: Final = 500
"""Keys per commit; the source cuts them further so that the KEK watch gets its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """A KEK that gave way to a newer one, as the HSM shows it now."""

    row: KekRow
    kek: Kek
    keys: tuple[DataKeyRow, ...]
    """Wrapped by it."""
    found: Diagnosis

    @property
    def is_back(self) -> bool:
        return bool(self.keys) and self.found.verdict is Verdict.OK

    @property
    def is_spent(self) -> bool:
        """Nothing is wrapped by it, and its name in the HSM is its own or nobody's."""
        return not self.keys and self.found.verdict in (Verdict.OK, Verdict.KEK_DESTROYED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `--restore` would do now. Made anew before it is done."""

    current: KekRow
    into: Kek
    proof: Diagnosis
    """Of the current KEK."""
    earlier: tuple[Earlier, ...]

    @property
    def restores_current(self) -> bool:
        return self.current.state.is_withdrawn

    def as_json(self) -> Json:
        return {
            "kek": self.current.reference.kek_id,
            "state": self.current.state,
            "restores_current": self.restores_current,
            "earlier": [
                {
                    "kek": one.row.reference.kek_id,
                    "label": one.row.reference.label,
                    "back": one.is_back,
                    "spent": one.is_spent,
                    "verdict": one.found.verdict,
                    "detail": one.found.detail,
                    "services": _count(key.owner for key in one.keys),
                }
                for one in self.earlier
                if one.keys or one.is_spent
            ],
        }


class Restoration:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def plan(self) -> Plan:
        """Look at every KEK that could come back. Changes nothing.

        RefusedChangeError if there is nothing to restore; KeySourceError if today's KEK is not proven.
        """
        agent = self._agent
        row = await agent.registry.current_kek()
        if row is None or row.kek is None:
            raise RefusedChangeError("there never was a KEK", "`key-agent kek create` makes the first")
        proof = await agent.source.diagnose(row.kek)
        if proof.verdict is not Verdict.OK:
            if not row.state.is_withdrawn:
                agent.consent.observe(row.kek, proof)
                raise error_of(proof)
            raise RefusedChangeError(
                f"the KEK {row.reference.kek_id} is not back: {proof.verdict}: {proof.detail}",
                "bring it back in the HSM first; or `key-agent reinstate` makes a new one, and keys of KEKs "
                "that are back can be restored to that",
            )
        plan = Plan(current=row, into=row.kek, proof=proof, earlier=await self._earlier(row))
        if not plan.restores_current and not any(one.is_back or one.is_spent for one in plan.earlier):
            raise _nothing_to_restore(plan)
        return plan

    async def _earlier(self, current: KekRow) -> tuple[Earlier, ...]:
        agent = self._agent
        keys = [key for key in await agent.registry.data_keys() if key.state is not KeyState.DESTROYED]
        found = []
        for row in await agent.registry.keks():
            if row.rotated_to == current.reference.kek_id:
                continue  # its keys are here already: `kek rotate` ends it
            if row.state is KekState.DEACTIVATED and row.kek is not None:
                mine = tuple(key for key in keys if row.reference.kek_id in (*key.wrapped_by, *key.waits_for))
                diagnosis = await agent.source.diagnose(row.kek)
                found.append(Earlier(row=row, kek=row.kek, keys=mine, found=diagnosis))
        return tuple(found)

    async def restore_earlier(self, plan: Plan) -> list[Json]:
        """Move the keys of every earlier KEK that is back; what became of each, those not back too."""
        return [await self._restore_one(plan, one) for one in plan.earlier if one.keys or one.is_spent]

    async def _restore_one(self, plan: Plan, one: Earlier) -> Json:
        moved: list[NetworkService] = []
        failed: dict[str, str] = {}
        problem: str | None = None
        retired = False
        if one.keys and not one.is_back:
            problem = f"not back: {one.found.verdict}: {one.found.detail}"
        elif one.is_back:
            moved, failed = await self._move(plan, one)
        if problem is None and not failed:
            problem = await self._retire(plan, one)
            retired = problem is None
        return {
            "kek": one.row.reference.kek_id,
            "back": one.is_back or one.is_spent,
            "moved": len(moved),
            "services": _count(moved),
            "failed": failed,
            "retired": retired,
            "problem": problem,
        }

    async def _move(self, plan: Plan, one: Earlier) -> tuple[list[NetworkService], dict[str, str]]:
        """Owners of the keys that moved, one for each; and key id -> why it did not."""
        agent = self._agent
        kek_id, into = one.row.reference.kek_id, plan.into.reference.kek_id
        await agent.journal.record(
            "kek-restore", outcome="begun", kek=kek_id, into=into, keys=len(one.keys), proof=one.found.detail
        )
        sound = await agent.registry.wrapped_keys(kek_id)
        intact = {key.key_id for key in sound}
        failed = {str(key.key_id): "damaged in the registry" for key in one.keys if key.key_id not in intact}
        moved: list[NetworkService] = []
        try:
            for batch in batched(sound, BATCH_SIZE):
                if agent.consent.standing.is_withdrawn:
                    raise RefusedChangeError(
                        f"the KEK {into} was taken back meanwhile", "see `key-agent kek status`"
                    )
                made = await agent.source.rewrap(one.kek, plan.into, batch)
                await agent.registry.move_wraps(kek_id, made.keys, now_ms=agent.now_ms())
                moved += [key.owner for key in made.keys]
                failed |= {str(key_id): reason for key_id, reason in made.failed_keys.items()}
        except KeyAgentError as error:
            await agent.journal.record(
                "kek-restore",
                outcome="failed",
                kek=kek_id,
                into=into,
                keys=len(moved),
                failed=len(failed),
                problem=str(error),
            )
            raise
        for key_id, reason in failed.items():
            log.error("a key of an earlier KEK does not open", kek=kek_id, kid=key_id, reason=reason)
        await agent.journal.record(
            "kek-restore",
            outcome="partial" if failed else "ok",
            kek=kek_id,
            into=into,
            keys=len(moved),
            failed=len(failed),
        )
        return moved, failed

    async def _retire(self, plan: Plan, one: Earlier) -> str | None:
        """Nothing is wrapped by it any more: out of the HSM. Why not, if that failed."""
        agent = self._agent
        kek_id, into = one.row.reference.kek_id, plan.into.reference.kek_id
        await agent.journal.record("kek-retire", outcome="begun", kek=kek_id)
        try:
            if left := await agent.registry.wraps_under(kek_id):
                raise RegistryError(f"{left} keys are still wrapped by it")
            await agent.source.destroy_kek(one.kek)
            await agent.registry.retire_kek(
                kek_id, f"its keys moved to {into}; destroyed in the HSM", now_ms=agent.now_ms()
            )
        except KeyAgentError as error:
            await agent.journal.record("kek-retire", outcome="failed", kek=kek_id, problem=str(error))
            return f"not destroyed in the HSM: {error}"
        await agent.journal.record("kek-retire", kek=kek_id)
        return None


def _nothing_to_restore(plan: Plan) -> RefusedChangeError:
    kek_id = plan.current.reference.kek_id
    missing = [
        f"{one.row.reference.kek_id} is not back: {one.found.verdict}: {one.found.detail}"
        for one in plan.earlier
        if one.keys
    ]
    if not missing:
        return RefusedChangeError(
            f"nothing to restore: the KEK {kek_id} is {plan.current.state}, and no key is wrapped by another",
            "`key-agent kek status` shows the KEKs",
        )
    return RefusedChangeError(
        f"nothing to restore: the earlier KEK {'; '.join(missing)}", "bring it back in the HSM first"
    )


def _count(owners: Iterable[NetworkService]) -> list[Json]:
    return [{"service": str(owner), "keys": count} for owner, count in sorted(Counter(owners).items())]
