"""What an environment's agent does because the signed rows say so: its KEK, its wraps, its word on both.

1. It reads what is to be done from the rows, at each change of them and again until it is done: whoever
   opened an incident did not have to reach it at that moment, and a restart forgets nothing.
2. A KEK that an incident has ended is revoked here, which takes every key back, and disabled in the HSM. Its
   wraps are erased as soon as every live key is proven under the KEK that follows it: not before, so that no
   key is lost whose only other copy is on its way.
3. Whom a rescue lets open objects loses that at the moment it ends: those keys are pushed anew.
4. A KEK that was made anew while the environment heals is announced to the manager until the rows name it.
   That makes it nobody's to trust: an administrator compares its fingerprint (`heal-complete --kek`). One
   that a sound environment rotated to is announced too, signed with its registry key, and followed.
5. A KEK from which keys are taken once more, by the word of two administrators (recovery.py), is left alone
   until an environment counts again; then it is disabled as it was before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec
import structlog

from envelope.errors import SealgateError
from key_agent.environments.changes.founding import kek_body
from key_agent.environments.changes.healing_changes import KekAnnouncement, announces_kek
from key_agent.environments.changes.incident_changes import KEK_COMPROMISED
from key_agent.environments.incidents.healing import Canary
from key_agent.environments.keys.proofs import Proofs
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.recovery import appointed
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.states import EnvironmentState
from key_agent.errors import KekRevokedError, UnsupportedError
from key_agent.operations.kek_making import KekWish, make_kek
from key_agent.refresh import next_delay, wait_until
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.model import KekRow
from key_agent.registry.states import KekState
from key_agent.sources.source import Kek, Verdict

if TYPE_CHECKING:
    from key_agent.agent import Agent

log = structlog.get_logger(__name__)

_MAX_DELAY_S: Final = 10.0
_GONE: Final = (Verdict.KEK_DESTROYED, Verdict.KEK_DISABLED, Verdict.KEK_REPLACED)
"""What would be disabled is not there, or is disabled."""


def next_rescue_end_ms(view: Shared, *, after_ms: int) -> int | None:
    """When the first of the rescues that still run ends; None: none does."""
    ends = [dek.rescue_until_ms for dek in view.deks.values() if dek.rescue_until_ms is not None]
    return min((end for end in ends if end > after_ms), default=None)


class Reaction:
    def __init__(
        self,
        agent: "Agent",
        peering: Peering,
        proofs: Proofs,
        tell: Callable[[KekAnnouncement], Awaitable[None]],
    ) -> None:
        """*tell*: has the manager write the KEK into the rows, wherever it is; SealgateError."""
        self._agent = agent
        self._peering = peering
        self._proofs = proofs
        self._tell = tell
        self._wake = asyncio.Event()
        self._disabled: set[str] = set()
        self.problem: str | None = None
        """What could not be done yet, for people."""
        peering.listen(self._changed)

    def _changed(self, _view: Shared) -> None:
        self.wake()

    def wake(self) -> None:
        """The own KEK is another one."""
        self._wake.set()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        failures = 0
        self._wake.set()
        looked_ms = self._agent.now_ms()
        while True:
            ends_s = self._rescue_ends_s()
            if failures:
                delay_s = next_delay(interval_s=_MAX_DELAY_S, failures=failures, jitter=0)
                ends_s = self._agent.clock.boot_s() + delay_s
            await wait_until(self._agent.clock, self._wake, ends_s)
            before_ms, looked_ms = looked_ms, self._agent.now_ms()
            ended_ms = next_rescue_end_ms(self._peering.view, after_ms=before_ms)
            if ended_ms is not None and ended_ms <= looked_ms:
                self._agent.refresh.at_once()  # its keys open nothing any more
            try:
                await self.react()
            except SealgateError as error:  # HSM, registry, peer: all of it is repeated
                failures += 1
                self.problem = str(error)
                log.error("an incident's steps are not done yet", cause=str(error))  # noqa: TRY400 - expected
                continue
            failures, self.problem = 0, None

    def _rescue_ends_s(self) -> float | None:
        """On the boot clock."""
        now_ms = self._agent.now_ms()
        end_ms = next_rescue_end_ms(self._peering.view, after_ms=now_ms)
        return None if end_ms is None else self._agent.clock.boot_s() + (end_ms - now_ms) / 1000

    async def react(self) -> None:
        """Do what the rows ask of this environment. SealgateError: something of it has to be repeated."""
        view = self._peering.view
        ended = self._ended(view)
        self._disabled &= set(ended)
        self._take_back(ended)
        rows = {row.reference.kek_id: row for row in await self._agent.registry.keks()}
        left: list[str] = []
        for kek_id in ended:
            row = rows.get(kek_id)
            if row is not None and row.kek is not None:
                try:
                    await self._end(row.kek)
                except SealgateError as error:  # an HSM that has lost one KEK must not keep the next a secret
                    left.append(f"KEK {kek_id}: {error}")
        try:
            await self._announce(view, await self._agent.registry.current_kek())
            await self._erase(view)
        except SealgateError as error:
            left.append(str(error))
        if left:
            raise SealgateError("; ".join(left))

    def _take_back(self, ended: Collection[str]) -> None:
        """Rule 2, first half. It waits for no registry, and for no other KEK that an HSM does not find."""
        current = self._agent.consent.kek
        if current is None or current.reference.kek_id not in ended:
            return
        if current.reference.kek_id not in self._disabled:
            self._agent.consent.revoke(
                "an incident has ended this KEK; `key-agent env new-kek` makes the next"
            )
            self._agent.withdrawals.at_once()

    async def _end(self, kek: Kek) -> None:
        kek_id = kek.reference.kek_id
        if kek_id in self._disabled:
            return
        agent = self._agent
        try:
            await agent.source.set_kek_enabled(kek, enabled=False)
        except UnsupportedError as error:
            # What it wraps is taken back and will be erased; the HSM's owner can destroy the key.
            log.warning("the HSM does not disable a KEK", kek=kek_id, cause=str(error))
            agent.journal.note("kek-disable", outcome="unsupported", kek=kek_id)
        except KekRevokedError as error:
            if error.verdict not in _GONE:
                raise
            agent.journal.note("kek-disable", outcome="gone", kek=kek_id, cause=error.verdict)
        else:
            agent.journal.note("kek-disable", kek=kek_id)
        self._disabled.add(kek_id)

    async def _announce(self, view: Shared, row: KekRow | None) -> None:
        own = view.environments.get(self._peering.environment)
        if own is None or not announces_kek(own):
            return
        if row is None or row.kek is None or row.state is not KekState.ACTIVE:
            return
        if row.reference.kek_id == own.kek_id:
            return
        told = KekAnnouncement(
            environment=self._peering.environment,
            kek_id=row.reference.kek_id,
            kek=kek_body(row, self._peering.environment),
        )
        if own.state is not EnvironmentState.HEALING:
            signature = self._peering.signed(told.signed_bytes(self._peering.tenant))
            told = msgspec.structs.replace(told, signature=signature)
        await self._tell(told)

    async def _erase(self, view: Shared) -> None:
        """Rule 2, second half."""
        own = view.environments.get(self._peering.environment)
        row = await self._agent.registry.current_kek()
        if own is None or own.state is not EnvironmentState.ACTIVE:
            return
        if row is None or row.state is not KekState.ACTIVE or row.reference.kek_id != own.kek_id:
            return
        for kek_id in self._ended(view):
            if kek_id == own.kek_id or not await self._agent.registry.wraps_under(kek_id):
                continue
            gone, left = await self._agent.registry.erase_wraps_of_ended(kek_id)
            if gone:
                self._agent.journal.note("wraps-erased", kek=kek_id, erased=gone, left=left)

    def _ended(self, view: Shared) -> list[str]:
        """Own KEKs that an incident has ended; one that unwraps once more (rule 5) is not among them yet."""
        recovery = appointed(view)
        last = None
        if recovery is not None and recovery.environment == self._peering.environment:
            last = recovery.succession.old_kek
        return sorted(
            kek_id
            for kek_id, body in view.keks.items()
            if body.environment == self._peering.environment
            and body.state == KEK_COMPROMISED
            and kek_id != last
        )

    async def new_kek(self, wish: KekWish) -> KekAnnouncement:
        """A KEK for an environment that heals; keys come under it when it rejoins, not before.

        The caller holds `one_at_a_time`. RefusedChangeError, KeySourceError, RegistryError: call it again.
        """
        agent, view = self._agent, self._peering.view
        own = view.environments.get(self._peering.environment)
        if own is None or own.state is not EnvironmentState.HEALING:
            raise RefusedChangeError(
                f"this environment is {'none of the set' if own is None else own.state}, it does not heal",
                "`key-agent kek rotate` moves the keys of a sound one to another KEK",
            )
        row = await agent.registry.current_kek()
        if row is not None and not row.state.is_withdrawn and row.reference.kek_id == own.kek_id:
            reason = "replaced while the environment heals"
            await agent.registry.set_kek_state(
                row.reference.kek_id, KekState.REVOKED, reason, now_ms=agent.now_ms()
            )
            await agent.reload(kek_changed=True)
            row = await agent.registry.current_kek()
        if row is None or row.state.is_withdrawn:
            await self._give_up_staged()
            made = await make_kek(agent, "env-new-kek", wish)
            await agent.registry.complete_kek(made, (), now_ms=agent.now_ms())
            await agent.reload(kek_changed=True)
            await agent.journal.record("env-new-kek", kek=made.reference.kek_id)
            row = await agent.registry.current_kek()
        if row is None or row.kek is None:
            raise RefusedChangeError("the new KEK is not there", "repeat the command")
        self._wake.set()
        return KekAnnouncement(
            environment=self._peering.environment,
            kek_id=row.reference.kek_id,
            kek=kek_body(row, self._peering.environment),
        )

    async def _give_up_staged(self) -> None:
        """Of a rotation that the incident met halfway: it would go on to a KEK from before the breach."""
        agent = self._agent
        coming = (await agent.registry.succession()).coming
        if coming is None or coming.kek is None:
            return
        kek_id = coming.reference.kek_id
        try:
            await agent.source.destroy_kek(coming.kek)
        except KekRevokedError as error:  # its token is another one: nothing is rotated to it
            agent.journal.note("kek-retire", outcome="gone", kek=kek_id, cause=error.verdict)
        else:
            agent.journal.note("kek-retire", kek=kek_id)
        reason = "its rotation was given up: the environment heals"
        await agent.registry.abandon_kek(kek_id, reason, now_ms=agent.now_ms())

    async def canary(self) -> Canary:
        """This environment proves itself: its KEK now, and every wrap under it, opened lately (proofs.py)."""
        agent, view = self._agent, self._peering.view
        row = await agent.registry.current_kek()
        if row is None or row.kek is None or row.state.is_withdrawn:
            return self._found(view, "", (), ("there is no KEK that works",))
        diagnosis = await agent.source.diagnose(row.kek)
        kek_id = row.reference.kek_id
        if diagnosis.verdict != "ok":
            return self._found(view, kek_id, (), (f"KEK: {diagnosis.verdict}: {diagnosis.detail}",))
        keys = await agent.registry.wrapped_keys(kek_id)
        wanted = [key for key in keys if str(key.key_id) in view.deks]
        wrong = [key for key in wanted if key.kcv.hex() != view.deks[str(key.key_id)].kcv]
        failed = await self._proofs.unopenable(agent.source, row.kek, wanted)
        bad = {str(key.key_id) for key in wrong} | {str(key_id) for key_id in failed}
        problems = [f"key {key_id}: {why}" for key_id, why in failed.items()]
        problems += [f"key {key.key_id}: another key has its place" for key in wrong]
        if agent.journal.failure is not None:
            problems.append(agent.journal.failure)
        opened = tuple(str(key.key_id) for key in wanted if str(key.key_id) not in bad)
        return self._found(view, kek_id, opened, tuple(problems[:1000]))

    def _found(self, view: Shared, kek_id: str, keys: tuple[str, ...], problems: tuple[str, ...]) -> Canary:
        return Canary(
            environment=self._peering.environment,
            term=view.term,
            epoch=view.epoch,
            kek_id=kek_id,
            keys=keys,
            problems=problems,
        )
