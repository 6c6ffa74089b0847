"""`kek rotate`: the keys move to a new KEK while the old one works, and nobody notices.

1. The steps, each a commit, in this order:
     named      a row says which KEK is being made, so that a crash leaves no unknown key in the HSM
     staged     the KEK is made, its attributes are checked, its canary is there
     wrapped    every key that lives is wrapped by it *as well*: opened by the old KEK, sealed by the new one,
                opened again, compared (the source does that)
     succeeded  one transaction: the new KEK is the current one, the old one deactivated
     erased     the old wraps are gone
     retired    the old KEK is destroyed in the HSM, searched again, and not found
2. Killed anywhere, the same command goes on from there. A half-made KEK is destroyed and made anew.
3. No key is ever wrapped by less than one KEK that works, and pushes always come from exactly one.
4. A key that does not open stops the rotation before anything is lost: it is named, the old KEK stays.
5. Consent that ends meanwhile ends the rotation too. `kek revoke` destroys both KEKs.
"""

from collections.abc import Sequence
from itertools import batched
from typing import Final

import structlog

from envelope.keys import KeyId
from key_agent.agent import Agent
from key_agent.errors import KeyAgentError, error_of
from key_agent.operations.commands import Json
from key_agent.operations.kek_making import KekWish, make_kek
from key_agent.registry.kek_succession import Succession
from key_agent.registry.model import KekRow
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import Kek, Verdict

log = structlog.get_logger(__name__)

BATCH_SIZE: Final = 500
"""Keys per commit; the source cuts them further so that the KEK watch gets its turn."""
_NAMED_AT_MOST: Final = 5


class KekRotation:
    """One `kek rotate`. The caller holds `agent.one_at_a_time`."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def run(self, wish: KekWish) -> Json:
        """From wherever the last one stopped to the end; *wish*: of the new KEK, if there is none yet.

        RefusedChangeError: no KEK to rotate, or keys that do not open. KeySourceError, RegistryError,
        AuditUnavailableError: it stopped, and the same command goes on.
        """
        state = await self._agent.registry.succession()
        old, before = self._working(state)
        if state.leaving is not None and state.coming is None:
            # The last rotation was only left to clean up: one command makes one new KEK.
            problem = await self._leave(state.leaving, before)
            return _result(state.leaving.reference.kek_id, before, 0, problem)
        new = await self._staged(state, wish)
        moved = await self._wrap(before, new)
        await self._succeed(old, new)
        problem = await self._leave(old, new)
        return _result(before.reference.kek_id, new, moved, problem)

    def _working(self, state: Succession) -> tuple[KekRow, Kek]:
        row = state.current
        if row is None or row.kek is None:
            raise RefusedChangeError("there is no KEK yet", "`key-agent kek create` makes it in the HSM")
        if row.state is not KekState.ACTIVE or self._agent.consent.standing.is_withdrawn:
            raise RefusedChangeError(
                f"the KEK {row.reference.kek_id} is {row.state}: only one that works is rotated",
                "`key-agent reinstate` makes a new one",
            )
        return row, row.kek

    async def _staged(self, state: Succession, wish: KekWish) -> Kek:
        agent = self._agent
        coming = state.coming
        if coming is not None and coming.state is KekState.STAGED and coming.kek is not None:
            found = await agent.source.diagnose(coming.kek)
            if found.verdict is Verdict.OK:
                return coming.kek
            raise error_of(found)
        made = await make_kek(agent, "kek-rotate", wish)
        await agent.registry.stage_kek(made, now_ms=agent.now_ms())
        return made

    async def _wrap(self, old: Kek, new: Kek) -> int:
        agent = self._agent
        old_id, new_id = old.reference.kek_id, new.reference.kek_id
        keys, damaged = await agent.registry.keys_to_wrap(old_id, new_id)
        if damaged:
            raise _unmovable(dict.fromkeys(damaged, "damaged in the registry"))
        await agent.journal.record(
            "kek-rotate", outcome="wrapping", kek=new_id, before=old_id, keys=len(keys)
        )
        moved = 0
        for batch in batched(keys, BATCH_SIZE):
            self._check_consent()
            made = await agent.source.rewrap(old, new, batch)
            moved += await agent.registry.add_wraps(made.keys, now_ms=agent.now_ms())
            if made.failed_keys:
                raise _unmovable(dict(made.failed_keys))
        return moved

    def _check_consent(self) -> None:
        if self._agent.consent.standing.is_withdrawn:
            raise RefusedChangeError(
                "the KEK was taken back meanwhile: nothing moves", "see `key-agent kek status`"
            )

    async def _succeed(self, old: KekRow, new: Kek) -> None:
        agent = self._agent
        new_id = new.reference.kek_id
        proof = await agent.source.diagnose(new)
        if proof.verdict is not Verdict.OK:
            raise error_of(proof)
        self._check_consent()
        await agent.journal.record(
            "kek-rotate", outcome="succeeding", kek=new_id, before=old.reference.kek_id, proof=proof.detail
        )
        if left := await agent.registry.succeed_kek(new_id, now_ms=agent.now_ms()):
            raise RefusedChangeError(
                f"{left} keys are not wrapped by KEK {new_id} yet", "repeat `key-agent kek rotate`"
            )
        row = await agent.registry.current_kek()
        if row is not None:
            agent.consent.succeed(row, proof)
        await agent.reload()
        if agent.environments is not None:
            agent.environments.kek_changed()
        # Said between the look and the commit: it holds for the new KEK too, and nothing more is done.
        self._check_consent()

    async def _leave(self, old: KekRow, new: Kek) -> str | None:
        """The old KEK leaves registry and HSM; why it did not."""
        agent = self._agent
        kek_id, new_id = old.reference.kek_id, new.reference.kek_id
        if old.kek is None:
            return f"KEK {kek_id} was never made"
        proof = await agent.source.diagnose(new)
        if proof.verdict is not Verdict.OK:
            raise error_of(proof)
        await agent.journal.record("kek-retire", outcome="begun", kek=kek_id, proof=proof.detail)
        try:
            if left := await agent.registry.erase_old_wraps(kek_id):
                return f"{left} keys are wrapped by KEK {kek_id} alone"
            await agent.source.destroy_kek(old.kek)
            await agent.registry.retire_kek(
                kek_id, f"rotated to {new_id}; destroyed in the HSM", now_ms=agent.now_ms()
            )
        except KeyAgentError as error:
            await agent.journal.record("kek-retire", outcome="failed", kek=kek_id, problem=str(error))
            return f"not destroyed in the HSM: {error}"
        await agent.journal.record("kek-retire", kek=kek_id)
        await agent.journal.record("kek-rotate", kek=new_id, before=kek_id)
        return None


async def give_up(agent: Agent, reason: str) -> list[str]:
    """Destroy what a rotation has in the HSM beside the current KEK, and forget it; what went wrong.

    For the end of consent: one KEK of two that can open the keys would be no end.
    """
    state = await agent.registry.succession()
    problems: list[str] = []
    for row in (state.coming, state.leaving):
        if row is None or row.kek is None:
            continue
        kek_id = row.reference.kek_id
        try:
            await agent.source.destroy_kek(row.kek)
            if row is state.coming:
                await agent.registry.abandon_kek(kek_id, reason, now_ms=agent.now_ms())
            agent.journal.note("kek-retire", kek=kek_id)
        except KeyAgentError as error:
            problems.append(f"KEK {kek_id}: {error}")
            agent.journal.note("kek-retire", outcome="failed", kek=kek_id, problem=str(error))
    return problems


def _unmovable(failed: dict[KeyId, str]) -> RefusedChangeError:
    some = [f"{key_id} ({reason})" for key_id, reason in list(failed.items())[:_NAMED_AT_MOST]]
    more = len(failed) - len(some)
    return RefusedChangeError(
        f"{len(failed)} keys do not open, so the old KEK stays: {_list(some)}"
        + (f" and {more} more" if more else ""),
        "restore them (`key-agent backup import`) or give them up (`key-agent rotate SERVICE`, then "
        "`key-agent key destroy SERVICE KID`), then repeat `key-agent kek rotate`",
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _result(old_id: str, new: Kek, moved: int, problem: str | None) -> Json:
    return {
        "kek": new.reference.kek_id,
        "label": new.reference.label,
        "method": new.method,
        "token_serial": new.token_serial,
        "replaced": old_id,
        "moved": moved,
        "retired": problem is None,
        "problem": problem,
    }
