"""A re-encryption: every object of a store that an old key sealed is written anew, each exactly once.

1. The cursor and what is under way are committed before a batch is touched; what became of it, after. Whoever
   is killed in between finds the batch there and looks at each of its objects again: one that no old key
   seals any more was written, and counts once.
2. Objects are taken in the order of their names, so the cursor is one name. What is written behind it was
   sealed by an active key, but somebody may rename or copy an old object to there. So the job is done only
   when a whole pass that followed another one, which has left nothing, has met nothing that an old key seals.
3. One object that cannot be rewritten does not hold up the others. It is counted and named, and the job is
   not done before a further pass finds none of them.
4. An object that names no key may be any key's: it is written anew as well, and counts only if it names one
   from then on. Otherwise nobody could say that an old key is needed no more.
5. Written is what the store shows: each object is looked at again after its write, for an old key's end rests
   on it. An answer that was lost is settled in the same way, and one that was hasty as well.
6. A store that does not answer ends the run, not the job: it goes on from its cursor.
7. Gone is what the store lists no more. What it lists and does not show may be an old key's: it cannot be
   rewritten (rule 3).
8. A folder that is empty proves nothing: it is another one's, or what is mounted there is away. So a pass
   that has shown no object that a key of this service sealed counts for nothing, and stops the job.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Protocol

from envelope.keys import KeyId
from key_agent.reencryption.connector import Connector, Found, Rewrite, StoreError

BATCH: Final = 32
CONCURRENCY: Final = 4
MAX_FAILURES_NAMED: Final = 1000
_TRIES: Final = 3
_STILL_OLD: Final = "it was written, and the store still shows what an old key sealed"
_HIDDEN: Final = "the store lists it, and says that it is not there"
_BARE: Final = (
    "it shows no object that a key of this service sealed: it may be another folder, or nothing is "
    "mounted there; if it is the right one, upload an object to it by way of the proxy"
)
_NAMELESS: Final = "it names no key: unset hide_key_ids of its service, then resume"


class JobState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    """A whole pass found nothing that the old keys seal."""
    INCOMPLETE = "incomplete"
    """A whole pass is over, and some objects could not be rewritten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a job stands; what the registry keeps of it."""

    job_id: str
    incident_id: str | None
    connector: str
    """What the connector was made from, for people and for going on: no secret in it."""
    sources: tuple[KeyId, ...]
    sealing: tuple[KeyId, ...] = ()
    """Which sealed that service's objects when it began (rule 8)."""
    state: JobState = JobState.RUNNING
    cursor: str = ""
    """Every name up to here is dealt with."""
    batch: tuple[str, ...] = ()
    """Under way: names after the cursor that an old key sealed."""
    batch_upto: str = ""
    batch_beside: int = 0
    """Where the cursor goes once they are written, and how many others it passes."""
    met: int = 0
    """Sealed by an old key, in this pass, or left so by the one before it."""
    has_met: bool = False
    """Whether any pass has met what an old key sealed: what a pass counts begins anew with the next one."""
    has_shown: bool = False
    """Whether this pass itself has met what a key of the service sealed, or may have (rule 8)."""
    passes: int = 0
    """Whole ones before this one; it counts what they did not."""
    scanned: int = 0
    rewritten: int = 0
    skipped: int = 0
    """Sealed by another key, or not by us."""
    failures: dict[str, str] = field(default_factory=dict)
    """Name -> why, MAX_FAILURES_NAMED at most."""
    failed: int = 0
    left_before: int = 0
    """By the pass before, and not met again by this one: a store that went away still has them."""
    named_before: tuple[str, ...] = ()
    dropped_at_ms: int | None = None
    """Somebody has said that its store is gone for good. What it knows of stays known."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left that the old keys seal."""
        return self.state is JobState.DONE

    @property
    def may_have_left(self) -> bool:
        """Whether it knows that old keys sealed something here, and not that nothing of it is left."""
        return not self.is_whole and bool(
            self.batch or self.has_met or self.met or self.failed or self.rewritten
        )

    @property
    def known_left(self) -> int:
        """How many objects it knows to be sealed by an old key still; never too few of those."""
        return self.failed + self.left_before + len(set(self.batch).difference(self.named_before))

    @property
    def names_left(self) -> tuple[str, ...]:
        """Of these, those that it can name."""
        return tuple(dict.fromkeys([*self.failures, *self.batch, *self.named_before]))


class Ledger(Protocol):
    """Where a job's progress is kept."""

    async def save_progress(self, progress: Progress) -> None:
        """Durable when it returns."""


class ReencryptionJob:
    def __init__(self, progress: Progress, connector: Connector, ledger: Ledger) -> None:
        self.progress = progress
        self._connector = connector
        self._ledger = ledger
        self._sources: AbstractSet[KeyId] = frozenset(progress.sources)
        self._of_service: AbstractSet[KeyId] = self._sources | frozenset(progress.sealing)
        self._at_once = asyncio.Semaphore(CONCURRENCY)

    async def run(self) -> Progress:
        """Go on until the end of the pass. StoreError: it can be run again, from where it stands."""
        if self.progress.state is JobState.INCOMPLETE:
            # What it has left is met, whether it is met again or not: it may be renamed (rule 2).
            left = self.progress.failed
            await self._begin_pass(
                state=JobState.RUNNING,
                met=left,
                failures={},
                failed=0,
                left_before=left,
                named_before=tuple(self.progress.failures),
            )
        while self.progress.state is JobState.RUNNING:
            await self._pass()
        return self.progress

    async def _pass(self) -> None:
        if self.progress.batch_upto:
            await self._finish_batch()
        batch: list[str] = []
        async for name in self._connector.names(after=self.progress.cursor):
            batch.append(name)
            if len(batch) == BATCH:
                await self._take(batch)
                batch = []
        if batch:
            await self._take(batch)
        if self.progress.failed:
            await self._save(state=JobState.INCOMPLETE, left_before=0, named_before=())
        elif not self.progress.has_shown:
            await self._begin_pass(passes=0, scanned=0, skipped=0)
            raise StoreError(_BARE)
        elif self.progress.met or not self.progress.passes:
            await self._begin_pass(met=0, passes=self.progress.passes + 1, left_before=0, named_before=())
        else:
            await self._save(state=JobState.DONE)

    async def _take(self, names: Sequence[str]) -> None:
        # Only what an old key seals is under way: most batches cost no commit but the second one.
        found = await self._each(names)
        old = tuple(name for name, (is_old, _) in zip(names, found, strict=True) if is_old)
        under_way = {
            "batch": old,
            "batch_upto": names[-1],
            "batch_beside": len(names) - len(old),
            "has_shown": self.progress.has_shown or any(is_old or is_shown for is_old, is_shown in found),
        }
        if old:
            await self._save(**under_way)
        else:
            self.progress = replace(self.progress, **under_way)  # type: ignore[arg-type]
        await self._finish_batch()

    async def _each(self, names: Sequence[str]) -> list[tuple[bool, bool]]:
        """Whether an old key may have sealed it, and whether it shows that this is the service's store."""

        async def look(name: str) -> tuple[bool, bool]:
            async with self._at_once:
                found = await self._connector.look(name)
                if found is None:
                    return await self._is_hidden(name), False
                return self._is_old(found), self._is_of_service(found)

        return await _all({f"look:{name}": look(name) for name in names})

    async def _finish_batch(self) -> None:
        async def rewrite(name: str) -> str | None:
            async with self._at_once:
                return await self._rewrite(name)

        names = self.progress.batch
        became = await _all({f"rewrite:{name}": rewrite(name) for name in names})
        problems = {name: why for name, why in zip(names, became, strict=True) if why is not None}
        now = self.progress
        beside = 0 if now.passes else now.batch_beside
        named = dict([*now.failures.items(), *problems.items()][:MAX_FAILURES_NAMED])
        named_before = tuple(name for name in now.named_before if name not in names)
        await self._save(
            batch=(),
            batch_upto="",
            batch_beside=0,
            cursor=now.batch_upto,
            met=now.met + len(names),
            has_met=now.has_met or bool(names),
            scanned=now.scanned + len(names) + beside,
            rewritten=now.rewritten + len(names) - len(problems),
            skipped=now.skipped + beside,
            failures=named,
            failed=now.failed + len(problems),
            left_before=now.left_before - len(now.named_before) + len(named_before),
            named_before=named_before,
        )

    async def _rewrite(self, name: str) -> str | None:
        """Why *name* is still sealed by an old key; None: it is not."""
        became, why = None, ""
        for tries_left in reversed(range(_TRIES + 1)):
            found = await self._connector.look(name)
            if found is None:
                return _HIDDEN if await self._is_hidden(name) else None
            if not self._is_old(found):
                return None
            if became is Rewrite.DONE:
                why = _NAMELESS if _is_nameless(found) else _STILL_OLD
            if became is Rewrite.REFUSED or why == _NAMELESS or not tries_left:
                break
            became, why = await self._connector.rewrite(found)
        return why

    async def _is_hidden(self, name: str) -> bool:
        """Whether the store lists it still (rule 7)."""
        async for listed in self._connector.names(after=name[:-1]):
            if listed >= name:
                return listed == name
        return False

    def _is_old(self, found: Found) -> bool:
        return found.key_id in self._sources or _is_nameless(found)

    def _is_of_service(self, found: Found) -> bool:
        """Once it has rewritten any, its keys may have changed since it began: anything that is sealed."""
        if self.progress.rewritten:
            return found.key_id is not None and not _is_nameless(found)
        return found.key_id in self._of_service

    async def _begin_pass(self, **changes: object) -> None:
        await self._save(cursor="", has_shown=False, **changes)

    async def _save(self, **changes: object) -> None:
        changed = replace(self.progress, **changes)  # type: ignore[arg-type]
        await self._ledger.save_progress(changed)
        self.progress = changed


def _is_nameless(found: Found | None) -> bool:
    return found is not None and found.key_id is not None and found.key_id.is_anonymous


async def _all[T](work: Mapping[str, Coroutine[None, None, T]]) -> list[T]:
    """What each returns, in order. StoreError: one of them met it, and the others were ended."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one, name=name) for name, one in work.items()]
    except* StoreError as found:
        first = found
    else:
        return [task.result() for task in tasks]
    raise StoreError(str(_first(first)))


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
