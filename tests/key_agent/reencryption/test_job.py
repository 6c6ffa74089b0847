"""A re-encryption that is killed wherever it can be still writes every object once, and none twice."""

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import override

import pytest

from envelope.keys import ANONYMOUS, KeyId
from key_agent.reencryption.connector import Found, Rewrite, StoreError
from key_agent.reencryption.job import BATCH, JobState, Progress, ReencryptionJob
from tests.fakes.memory_store import MemoryStore

OLD, ALSO_OLD, TODAY = KeyId.random(), KeyId.random(), KeyId.random()


class KilledError(Exception):
    """The process ends here."""


class Paper:
    """Keeps progress; kills at the *fatal*-th save, before or after it is on disk."""

    def __init__(self, progress: Progress) -> None:
        self.kept = progress
        self.fatal: int | None = None
        self.keeps_last = False
        self.saves = 0

    async def save_progress(self, progress: Progress) -> None:
        self.saves += 1
        dies = self.saves == self.fatal
        if not dies or self.keeps_last:
            self.kept = progress
        if dies:
            raise KilledError


def progress() -> Progress:
    return Progress(job_id="j", incident_id="inc-1", connector="memory", sources=(OLD, ALSO_OLD))


def filled(count: int = 3 * BATCH + 5) -> MemoryStore:
    store = MemoryStore(TODAY)
    for number in range(count):
        store.put(f"f/{number:05}", (OLD, ALSO_OLD, TODAY, None)[number % 4])
    return store


def old_ones(store: MemoryStore) -> list[str]:
    return [name for name, (key_id, _) in store.objects.items() if key_id in (OLD, ALSO_OLD)]


async def test_all_that_old_keys_sealed_is_rewritten_once_and_nothing_else() -> None:
    store, paper = filled(), Paper(progress())
    wanted = old_ones(store)
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert done == paper.kept
    assert (done.state, done.is_whole, done.batch) == (JobState.DONE, True, ())
    assert store.rewrites == dict.fromkeys(wanted, 1)
    assert (done.scanned, done.rewritten, done.skipped) == (
        len(store.objects),
        len(wanted),
        len(store.objects) - len(wanted),
    )
    assert old_ones(store) == []


async def test_killed_at_every_save_it_goes_on_and_counts_each_once() -> None:
    saves = Paper(progress())
    await ReencryptionJob(saves.kept, filled(), saves).run()
    for fatal in range(1, saves.saves + 1):
        for keeps_last in (False, True):
            store, paper = filled(), Paper(progress())
            wanted = old_ones(store)
            paper.fatal, paper.keeps_last = fatal, keeps_last
            with pytest.raises(KilledError):
                await ReencryptionJob(paper.kept, store, paper).run()
            paper.fatal = None
            done = await ReencryptionJob(paper.kept, store, paper).run()
            assert store.rewrites == dict.fromkeys(wanted, 1), (fatal, keeps_last)
            assert (done.state, done.rewritten, done.scanned) == (
                JobState.DONE,
                len(wanted),
                len(store.objects),
            ), (fatal, keeps_last)


async def test_a_store_that_falls_silent_at_any_moment_ends_the_run_and_not_the_job() -> None:
    chance = random.Random(7)
    store, paper = filled(), Paper(progress())
    wanted = old_ones(store)
    runs = 0
    while paper.kept.state is not JobState.DONE:
        left = chance.randrange(1, 60)

        def tire(_name: str, left: list[int] = [left]) -> None:  # noqa: B006 - a counter of this run
            left[0] -= 1
            store.silent = left[0] <= 0

        store.silent, store.before_write = False, tire
        runs += 1
        try:
            await ReencryptionJob(paper.kept, store, paper).run()
        except StoreError:
            continue
    assert runs > 1, "or nothing was shown"
    assert set(store.rewrites) == set(wanted)
    # A write whose answer was lost is not written again either: look() says that no old key sealed it.
    assert set(store.rewrites.values()) == {1}
    assert paper.kept.rewritten == len(wanted)


async def test_a_first_pass_without_old_objects_proves_nothing_yet() -> None:
    """The only one is renamed to where the cursor has been."""

    class Renaming(MemoryStore):
        @override
        async def look(self, name: str) -> Found | None:
            if "z" in self.objects:
                self.objects["a"] = self.objects.pop("z")
            return await super().look(name)

    store, paper = Renaming(TODAY), Paper(replace(progress(), sealing=(TODAY,)))
    store.put("m", TODAY)
    store.put("z", OLD)
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert done.is_whole
    assert store.rewrites == {"a": 1}


@pytest.mark.parametrize("others", [(), (None,), (KeyId.random(),)], ids=["empty", "foreign", "another's"])
async def test_a_folder_that_shows_nothing_of_the_service_proves_nothing(
    others: tuple[KeyId | None, ...],
) -> None:
    """A slip in its address, another service's store, a disk that is not mounted: all look like success."""
    store, paper = MemoryStore(TODAY), Paper(progress())
    for number, key_id in enumerate(others):
        store.put(f"f/{number}", key_id)
    for _ in range(3):
        with pytest.raises(StoreError, match="another folder, or nothing is mounted"):
            await ReencryptionJob(paper.kept, store, paper).run()
        assert not paper.kept.is_whole
        assert not paper.kept.may_have_left, "it holds up nobody who begins one with the right address"
    store.put("z", OLD)
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert (done.is_whole, done.rewritten, done.passes) == (True, 1, 1)
    assert done.scanned == len(store.objects)


async def test_a_store_without_old_objects_is_known_by_one_of_today() -> None:
    store, paper = MemoryStore(TODAY), Paper(replace(progress(), sealing=(TODAY,)))
    store.put("a", TODAY)
    assert (await ReencryptionJob(paper.kept, store, paper).run()).is_whole


async def test_what_a_pass_has_left_is_not_gone_because_its_disk_is_away() -> None:
    store, paper = MemoryStore(TODAY), Paper(progress())
    store.put("a", OLD)
    store.put("b", OLD)
    store.refused["b"] = "HTTP 423"
    assert not (await ReencryptionJob(paper.kept, store, paper).run()).is_whole
    mounted, store.objects = store.objects, {}
    for _ in range(2):
        with pytest.raises(StoreError, match="mounted"):
            await ReencryptionJob(paper.kept, store, paper).run()
        assert paper.kept.may_have_left
    store.objects = mounted
    store.refused.clear()
    assert (await ReencryptionJob(paper.kept, store, paper).run()).is_whole
    assert old_ones(store) == []


async def test_a_pass_over_a_disk_that_is_away_is_none_though_the_one_before_it_left_something() -> None:
    """Back for the next, it would be one clean pass alone, in which objects may be renamed."""

    class Mounting(MemoryStore):
        is_away = False

        @override
        async def names(self, *, after: str) -> AsyncIterator[str]:
            if self.is_away:
                self.is_away = False
                return
            async for name in super().names(after=after):
                yield name

    store, paper = Mounting(TODAY), Paper(progress())
    store.put("a", OLD)
    store.refused["a"] = "HTTP 423"
    assert not (await ReencryptionJob(paper.kept, store, paper).run()).is_whole
    store.refused.clear()
    store.is_away = True
    with pytest.raises(StoreError, match="mounted"):
        await ReencryptionJob(paper.kept, store, paper).run()
    assert paper.kept.passes == 0
    assert (await ReencryptionJob(paper.kept, store, paper).run()).is_whole
    assert old_ones(store) == []


async def test_what_a_pass_has_left_may_be_renamed_during_the_next() -> None:
    """To where the cursor has been: of an object that is known to be old one clean pass says nothing."""

    class Renaming(MemoryStore):
        renames = False

        @override
        async def look(self, name: str) -> Found | None:
            if self.renames and "z" in self.objects:
                self.objects["a"] = self.objects.pop("z")
            return await super().look(name)

    store, paper = Renaming(TODAY), Paper(progress())
    for number in range(BATCH):
        store.put(f"m/{number:05}", OLD)
    await ReencryptionJob(paper.kept, store, paper).run()
    paper.kept = replace(paper.kept, state=JobState.RUNNING, cursor="")
    store.put("z", OLD)  # as if it came during the second pass
    store.refused["z"] = "HTTP 403"
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert (done.state, list(done.failures)) == (JobState.INCOMPLETE, ["z"])
    store.renames = True
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert done.is_whole
    assert old_ones(store) == []


async def test_what_is_listed_and_not_shown_is_not_gone() -> None:
    """A store may say so of what it does not let us read."""

    class Hiding(MemoryStore):
        hides = True

        @override
        async def look(self, name: str) -> Found | None:
            return None if self.hides and name == "f/00001" else await super().look(name)

    store, paper = Hiding(TODAY), Paper(progress())
    for number in range(3):
        store.put(f"f/{number:05}", OLD)
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert (done.state, list(done.failures)) == (JobState.INCOMPLETE, ["f/00001"])
    assert not done.is_whole
    store.hides = False
    assert (await ReencryptionJob(paper.kept, store, paper).run()).is_whole
    assert old_ones(store) == []


async def test_nobodys_change_is_lost() -> None:
    store, paper = MemoryStore(TODAY), Paper(progress())
    for name in ("changed", "deleted", "quiet"):
        store.put(name, OLD)
    pending = {"changed", "deleted"}

    def interfere(name: str) -> None:
        if name in pending:
            pending.discard(name)
            if name == "changed":
                store.put(name, OLD)  # by a proxy that still held the old key when it began
            else:
                del store.objects[name]

    store.before_write = interfere
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert done.is_whole
    assert store.rewrites == {"changed": 1, "quiet": 1}


async def test_an_object_that_cannot_be_rewritten_is_named_and_holds_up_nothing() -> None:
    store, paper = filled(), Paper(progress())
    wanted = old_ones(store)
    store.refused[wanted[0]] = "HTTP 423"
    first = await ReencryptionJob(paper.kept, store, paper).run()
    assert (first.state, first.is_whole, first.failed) == (JobState.INCOMPLETE, False, 1)
    assert first.failures == {wanted[0]: "HTTP 423"}
    assert len(store.rewrites) == len(wanted) - 1
    store.refused.clear()
    second = await ReencryptionJob(paper.kept, store, paper).run()
    assert (second.state, second.failed, second.failures) == (JobState.DONE, 0, {})
    assert store.rewrites == dict.fromkeys(wanted, 1)


async def test_what_a_pass_has_left_stays_known_until_another_one_has_met_it_or_is_through() -> None:
    """A store that is gone for good answers the next pass with nothing; what it held is lost with its key."""
    store, paper = filled(), Paper(progress())
    lost, late, quiet = old_ones(store)[0], old_ones(store)[1], old_ones(store)[-1]
    store.refused |= dict.fromkeys((lost, late, quiet), "HTTP 423")
    left = await ReencryptionJob(paper.kept, store, paper).run()
    assert (left.known_left, left.names_left) == (3, (lost, late, quiet))
    store.silent = True
    with pytest.raises(StoreError):
        await ReencryptionJob(paper.kept, store, paper).run()
    assert (paper.kept.state, paper.kept.failed) == (JobState.RUNNING, 0)
    assert (paper.kept.known_left, paper.kept.names_left) == (3, (lost, late, quiet))
    kept, store.objects, store.silent = store.objects, {}, False
    with pytest.raises(StoreError):  # another folder, or nothing is mounted there
        await ReencryptionJob(paper.kept, store, paper).run()
    assert paper.kept.known_left == 3
    store.objects = kept
    del store.refused[late]
    paper.fatal, paper.saves, paper.keeps_last = 1, 0, True
    with pytest.raises(KilledError):
        await ReencryptionJob(paper.kept, store, paper).run()
    assert (paper.kept.batch, paper.kept.known_left) == ((lost, late), 3), "none counts twice"
    paper.fatal, paper.saves, paper.keeps_last = 2, 0, False
    with pytest.raises(KilledError):
        await ReencryptionJob(paper.kept, store, paper).run()
    assert (paper.kept.failed, paper.kept.left_before) == (1, 1)
    assert (paper.kept.known_left, paper.kept.names_left) == (2, (lost, quiet))
    paper.fatal = None
    del store.objects[quiet]
    left = await ReencryptionJob(paper.kept, store, paper).run()
    assert (left.state, left.known_left, left.names_left) == (JobState.INCOMPLETE, 1, (lost,))
    store.refused.clear()
    done = await ReencryptionJob(left, store, paper).run()
    assert (done.state, done.known_left, done.names_left) == (JobState.DONE, 0, ())


async def test_one_pass_that_finds_nothing_more_does_not_make_a_job_one_that_has_met_nothing() -> None:
    """What it has left may be renamed, and the pass that would find it is not through: another job that is
    done must not end the key."""
    store, paper = MemoryStore(TODAY), Paper(replace(progress(), sealing=(TODAY,)))
    store.put("a", OLD)
    store.put("b", TODAY)
    store.refused["a"] = "HTTP 423"
    assert (await ReencryptionJob(paper.kept, store, paper).run()).rewritten == 0
    del store.objects["a"]
    paper.fatal, paper.saves, paper.keeps_last = 3, 0, True
    with pytest.raises(KilledError):
        await ReencryptionJob(paper.kept, store, paper).run()
    assert (paper.kept.met, paper.kept.failed, paper.kept.batch) == (0, 0, ())
    assert paper.kept.may_have_left
    paper.fatal = None
    assert not (await ReencryptionJob(paper.kept, store, paper).run()).may_have_left


async def test_what_is_under_way_is_known_to_be_left() -> None:
    store, paper = filled(BATCH), Paper(progress())
    paper.fatal, paper.keeps_last = 1, True
    with pytest.raises(KilledError):
        await ReencryptionJob(paper.kept, store, paper).run()
    assert (paper.kept.known_left, list(paper.kept.names_left)) == (BATCH // 2, old_ones(store))


async def test_an_object_that_names_no_key_may_be_an_old_ones() -> None:
    """Written anew it names one; where it does not, the job is not whole, and no key ends because of it."""
    store, paper = MemoryStore(TODAY), Paper(progress())
    store.put("a", ANONYMOUS)
    store.put("b", TODAY)
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert (done.state, done.rewritten, store.rewrites) == (JobState.DONE, 1, {"a": 1})
    nameless, paper = MemoryStore(ANONYMOUS), Paper(progress())
    nameless.put("a", ANONYMOUS)
    nameless.put("b", OLD)
    done = await ReencryptionJob(paper.kept, nameless, paper).run()
    assert (done.state, done.is_whole, done.failed) == (JobState.INCOMPLETE, False, 2)
    assert "hide_key_ids" in done.failures["a"]
    assert "hide_key_ids" in done.failures["b"], "it names no key any more"


async def test_one_that_changes_all_the_time_is_told_in_the_end() -> None:
    store, paper = MemoryStore(TODAY), Paper(progress())
    store.put("busy", OLD)
    store.before_write = lambda name: store.put(name, OLD)
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert done.failures == {"busy": "it was changed meanwhile"}


async def test_a_job_that_is_done_stays_done() -> None:
    store, paper = filled(), Paper(progress())
    done = await ReencryptionJob(paper.kept, store, paper).run()
    again = await ReencryptionJob(done, store, paper).run()
    assert again == replace(done)


async def test_an_old_object_that_is_renamed_to_behind_the_cursor_is_found() -> None:
    """Or the key would end with which it can be read, and the job would have said that nothing is left."""
    store, paper = filled(), Paper(progress())
    moved = old_ones(store)[-1]

    def rename(_name: str) -> None:
        if moved in store.objects:
            store.objects["a/renamed"] = store.objects.pop(moved)

    store.before_write = rename
    wanted = len(old_ones(store))
    done = await ReencryptionJob(paper.kept, store, paper).run()
    assert old_ones(store) == []
    assert store.rewrites["a/renamed"] == 1
    assert (done.state, done.rewritten, done.failed, done.passes) == (JobState.DONE, wanted, 0, 2)


async def test_what_the_store_still_shows_was_not_written() -> None:
    """A 2xx, a lost answer, a 404 on the proxy's road: what counts is whose key the store shows then."""
    for became in (Rewrite.DONE, Rewrite.UNANSWERED, Rewrite.GONE):
        store, paper = MemoryStore(TODAY), Paper(progress())
        for name in ("idle", "late", "quiet"):
            store.put(name, OLD)
        store.says["idle"] = (became, False)
        store.says["late"] = (became, True)
        done = await ReencryptionJob(paper.kept, store, paper).run()
        assert (done.state, done.rewritten, list(done.failures)) == (JobState.INCOMPLETE, 2, ["idle"]), became
        assert store.rewrites == {"late": 1, "quiet": 1}
        assert done.failures["idle"], "and why"
        del store.says["idle"]
        assert (await ReencryptionJob(done, store, paper).run()).is_whole
