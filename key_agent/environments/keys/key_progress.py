"""Keys that are missing, old, lost or ready: the next step of each, taken again and again.

1. Where there is no key yet one is made, and one that is old enough gets a successor. While a command makes
   keys nothing is made here.
2. Should the one wrap of a new key be lost before the key went anywhere else, the key is given up and made
   again. Not before every environment that counts has said what it has.
3. A key is active once every environment that counts has proven it and waits for nothing (`changes.ready`).
   What the rows say when that is written decides, not what they said when it was asked.
"""

import asyncio
from collections.abc import Mapping
from typing import Final

import structlog

from envelope.keys import KeyState
from key_agent.environments.changes import key_changes as changes
from key_agent.environments.changes.key_changes import WantedKey
from key_agent.environments.keys.bringing import LOOK_S, SOON_S, Standing
from key_agent.environments.keys.key_making import KeyMaking
from key_agent.environments.keys.key_writing import KeyWriting
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.draft import Draft
from key_agent.journal import Journal
from runtime.clock import Clock

log = structlog.get_logger(__name__)

DUE_S: Final = 60.0
"""Between two looks for keys that are old enough."""
MAX_SCHEDULED: Final = 100


class KeyProgress:
    def __init__(
        self,
        *,
        peering: Peering,
        making: KeyMaking,
        writing: KeyWriting,
        standings: Mapping[str, Standing],
        journal: Journal,
        clock: Clock,
        one_at_a_time: asyncio.Lock,
        rotate_after_days: int,
    ) -> None:
        """*standings*: of Bringing. *one_at_a_time*: held by whoever makes keys or KEKs at this agent."""
        self._peering = peering
        self._making = making
        self._writing = writing
        self._standings = standings
        self._journal = journal
        self._clock = clock
        self._one_at_a_time = one_at_a_time
        self._rotate_after_days = rotate_after_days
        self._due_boot_s: float | None = None
        self.held: Mapping[str, Mapping[str, str]] = {}
        """What pre-active keys wait for, by key and environment."""

    def ages_changed(self) -> None:
        """Another age may make keys due: they are looked for at the next step."""
        self._due_boot_s = None

    async def advance(self) -> float:
        """Do what can be done now; seconds until it is worth while to look again. SealgateError."""
        await self._make_first()
        await self._make_due()
        await self._replace_lost()
        await self._activate()
        view = self._peering.view
        is_open = any(body.state is KeyState.PRE_ACTIVE for body in view.deks.values()) or any(
            changes.may_enter(body) for body in view.environments.values()
        )
        return SOON_S if is_open or self._a_command_runs else LOOK_S

    @property
    def _a_command_runs(self) -> bool:
        """It makes the keys that it needs and may wait until they seal: it is not waited for in turn."""
        return self._one_at_a_time.locked()

    async def _make_first(self) -> None:
        wanted = changes.first_keys(self._peering.view)
        if wanted and not self._a_command_runs:
            async with self._one_at_a_time:
                await self._making.make(wanted, generator=None)

    async def _make_due(self) -> None:
        now_s = self._clock.boot_s()
        if self._due_boot_s is not None and now_s - self._due_boot_s < DUE_S:
            return
        wanted = changes.due_keys(
            self._peering.view,
            default_days=self._rotate_after_days,
            now_ms=self._writing.now_ms(),
            limit=MAX_SCHEDULED,
        )
        if wanted and self._a_command_runs:
            return
        if wanted:
            async with self._one_at_a_time:
                await self._making.make(wanted, generator=None)
        self._due_boot_s = now_s

    async def _replace_lost(self) -> None:
        """Rule 2: who is new and nowhere any more is given up; its place then has none, and gets one."""
        view = self._peering.view
        counted = changes.serving_environments(view)
        if any(
            (standing := self._standings.get(name)) is None or standing.looked_boot_s is None
            for name in counted
        ):
            return  # somebody has not said yet what it has
        known = set[str]().union(*(standing.proven for standing in self._standings.values()))
        own = self._standings[self._peering.environment]
        lost = [
            key_id
            for key_id, body in view.deks.items()
            if body.state is KeyState.PRE_ACTIVE and key_id not in known and key_id in own.failed
        ]
        if not lost:
            return
        wanted = [
            WantedKey(
                ring=view.deks[key_id].ring,
                owner_environment=view.deks[key_id].owner_environment,
                predecessor=view.deks[key_id].predecessor,
            )
            for key_id in lost
        ]
        log.error("new keys are lost and made again", keys=len(lost))
        await self._journal.record("key-create", outcome="lost", keys=len(lost))
        await self._writing.write(lambda draft: changes.give_up(draft, lost, "its only wrap was lost"))
        await self._making.make(wanted, generator=None)

    async def _activate(self) -> None:
        view = self._peering.view
        waiting = {
            name: standing.waiting
            for name, standing in self._standings.items()
            if standing.waiting is not None
        }
        proven = {name: standing.proven for name, standing in self._standings.items()}
        may, self.held = changes.ready(view, waiting, proven)
        if not may:
            return
        for key_id in may:
            body = view.deks[key_id]
            await self._journal.record(
                "key-rotate",
                outcome="activated",
                service=body.service,
                kid=key_id,
                use=body.use,
                environment=body.owner_environment,
                deferred=",".join(self._without(key_id)) or None,
            )

        def change(draft: Draft) -> None:
            # What the environments have said counts for the rows of then: those of now decide.
            still, _ = changes.ready(draft.shared, waiting, proven)
            changes.activate(draft, [key_id for key_id in may if key_id in still])

        await self._writing.write(change)

    def _without(self, key_id: str) -> list[str]:
        """Environments that have no proven wrap of it: it is deferred there."""
        return [
            name
            for name in sorted(self._peering.view.environments)
            if (standing := self._standings.get(name)) is None or key_id not in standing.proven
        ]
