"""New keys: made by one environment's HSM for whoever is to own them, and written with their first wrap.

1. A key's row and its first wrap are written in one transaction. So there is no row of a key that nobody has.
2. An environment that heals makes no keys: the generator is one that counts.
3. For one place there is one new key at a time: what is on its way already is not made again.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from itertools import batched

from envelope.keys import NetworkService
from key_agent.environments.changes import key_changes as changes
from key_agent.environments.changes.key_changes import WantedKey
from key_agent.environments.keys.bringing import Standing
from key_agent.environments.keys.key_writing import KeyWriting
from key_agent.environments.keys.wrap_messages import BATCH
from key_agent.environments.keys.wrapping import Wraps
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.draft import Draft
from key_agent.journal import Journal
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.wrap_rows import store_wraps
from key_agent.sources.source import NewKey, WrappedKey


class KeyMaking:
    def __init__(
        self,
        *,
        wraps: Wraps,
        peering: Peering,
        journal: Journal,
        writing: KeyWriting,
        standings: Mapping[str, Standing],
    ) -> None:
        """*standings*: of Bringing; what is made here is proven here."""
        self._wraps = wraps
        self._peering = peering
        self._journal = journal
        self._writing = writing
        self._standings = standings
        self._making = asyncio.Lock()

    async def make(self, wanted: Collection[WantedKey], *, generator: str | None) -> list[str]:
        """Keys for those of *wanted* that have none on its way; the ids of the new ones."""
        made: list[str] = []
        async with self._making:
            by = self._generator(generator)
            for some in batched(changes.still_wanted(self._peering.view, wanted), BATCH):
                made += await self._make_some(some, by)
        return made

    def _generator(self, named: str | None) -> str:
        """Rule 2."""
        counted = changes.serving_environments(self._peering.view)
        if named is not None and named not in counted:
            raise RefusedChangeError(
                f"{named} makes no keys now", "leave the generator out, or name one that serves"
            )
        if named is not None:
            return named
        if not counted:
            raise RefusedChangeError(
                "no environment counts: none makes keys now", "`key-agent env recovery` where it is to begin"
            )
        own = self._peering.environment
        return own if own in counted else counted[0]

    async def _make_some(self, wanted: Sequence[WantedKey], generator: str) -> list[str]:
        view, own = self._peering.view, self._peering.environment
        rings = [view.rings[one.ring] for one in wanted]
        await self._journal.record("key-create", outcome="begun", keys=len(wanted), generator=generator)
        new = [
            NewKey(owner=NetworkService.parse(ring.service), use=ring.use, algorithm=ring.algorithm)
            for ring in rings
        ]
        keys = (
            await self._wraps.make(new)
            if generator == own
            else await self._wraps.made_elsewhere(generator, new)
        )
        made: list[tuple[WantedKey, WrappedKey]] = list(zip(wanted, keys, strict=True))
        placed: list[str] = []

        def change(draft: Draft) -> None:
            placed[:] = changes.put_new(draft, made, generator=generator)

        route, now_ms = "kms" if generator == own else "peer", self._writing.now_ms()
        await self._writing.write(
            change,
            also=lambda c: store_wraps(
                c, [key for key in keys if str(key.key_id) in placed], route=route, now_ms=now_ms
            ),
        )
        if (standing := self._standings.get(own)) is not None:
            standing.proven |= set(placed)
        for key_id in placed:
            body = self._peering.view.deks[key_id]
            await self._journal.record(
                "key-create",
                service=body.service,
                kid=key_id,
                use=body.use,
                environment=body.owner_environment,
                generator=generator,
            )
        return placed
