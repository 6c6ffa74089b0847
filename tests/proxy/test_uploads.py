"""What is remembered of uploads: on SQLite and PostgreSQL, by several proxies, within its bounds."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import MetaData

from envelope.keys import NetworkService
from envelope.multipart import Part, upload_ref
from proxy import uploads
from proxy.tenants.tables import upload_completion
from proxy.uploads import (
    KEEP_COMPLETED_S,
    KEEP_HELD_S,
    KEEP_S,
    MAX_HELD_PARTS,
    MAX_TAGS,
    SWEEP_S,
    Completion,
    KeptPart,
    Upload,
    UploadsFullError,
    UploadStore,
    UploadsUnavailableError,
)
from tests.proxy.tenants.places import BOTH, Place, make_place

DRIVE = NetworkService("tenant-a", "drive")
UPLOAD = Upload(DRIVE, upload_ref("one"))


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with make_place(request.param, tmp_path) as place:
        place.open().close()  # makes the schema
        yield place


@pytest.fixture
async def store(place: Place) -> AsyncIterator[UploadStore]:
    async with UploadStore.open(place.url, clock=place.clock) as store:
        yield store


def kept(number: int, tag: str, stored_bytes: int = 104, digests: bytes | None = None) -> KeptPart:
    return KeptPart(part=Part(number, stored_bytes, os.urandom(32)), tag=tag, digests=digests)


def completion(*, is_done: bool = False, asked: bytes = b"a" * 32) -> Completion:
    return Completion(asked=asked, request=b"<xml/>", final_number=3, is_joined=True, is_done=is_done)


async def test_parts_come_back_by_number_and_the_newest_first(place: Place, store: UploadStore) -> None:
    first, again, second = kept(2, "aa"), kept(2, "bb"), kept(1, "cc", digests=b"sealed")
    for part in (first, again, second):
        await store.add_part(UPLOAD, part)
        await place.clock.advance(1)
    assert await store.parts(UPLOAD) == [second, again, first]
    other = Upload(NetworkService("tenant-a", "drive-2"), UPLOAD.ref)
    assert await store.parts(other) == []
    assert await store.parts(Upload(DRIVE, upload_ref("two"))) == []


async def test_another_proxy_and_one_that_was_started_again_know_it(place: Place, store: UploadStore) -> None:
    part = kept(1, "aa", 120)
    sealed = os.urandom(120)
    await store.add_part(UPLOAD, part, held=sealed)
    await store.complete(UPLOAD, completion())
    async with UploadStore.open(place.url, clock=place.clock) as other:
        [found] = await other.parts(UPLOAD)
        assert (found.part, found.tag, found.is_held) == (part.part, "aa", True)
        assert await other.held(UPLOAD, found) == sealed
        assert await other.completion(UPLOAD) == completion()


async def test_parts_sent_at_once_are_all_remembered(store: UploadStore) -> None:
    parts = [kept(number, f"{number:04}") for number in range(1, 41)]
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(store.add_part(UPLOAD, part))
    assert await store.parts(UPLOAD) == parts


async def test_the_same_message_twice_is_one(store: UploadStore) -> None:
    part = kept(1, "aa")
    await store.add_part(UPLOAD, part, held=bytes(104))
    await store.add_part(UPLOAD, part)
    assert await store.parts(UPLOAD) == [part]
    assert await store.held(UPLOAD, part) is None


async def test_only_the_last_small_parts_are_held(store: UploadStore) -> None:
    numbers = [1, 5, 2, 9, 7]
    for number in numbers:
        await store.add_part(UPLOAD, kept(number, "aa"), held=bytes(104))
    held = [found.part.number for found in await store.parts(UPLOAD) if found.is_held]
    assert held == sorted(numbers)[-MAX_HELD_PARTS:]


async def test_only_the_last_tags_of_a_number_are_remembered(place: Place, store: UploadStore) -> None:
    for tag in "abcdef":
        await store.add_part(UPLOAD, kept(1, tag), held=bytes(104))
        await place.clock.advance(1)
    assert [found.tag for found in await store.parts(UPLOAD)] == list("fedcba")[:MAX_TAGS]


async def test_bytes_held_for_a_service_are_bounded(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_HELD_BYTES", 300)
    for name in ("one", "two"):
        await store.add_part(Upload(DRIVE, upload_ref(name)), kept(1, "a"), held=bytes(104))
    third = Upload(DRIVE, upload_ref("three"))
    with pytest.raises(UploadsFullError):
        await store.add_part(third, kept(1, "a"), held=bytes(104))
    assert await store.parts(third) == []
    other = Upload(NetworkService("tenant-b", "drive"), upload_ref("three"))
    await store.add_part(other, kept(1, "a"), held=bytes(104))


async def test_parts_of_an_upload_are_bounded(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_ROWS", 2)
    for number in (1, 2):
        await store.add_part(UPLOAD, kept(number, "a"))
    with pytest.raises(UploadsFullError):
        await store.add_part(UPLOAD, kept(3, "a"))
    assert len(await store.parts(UPLOAD)) == 2


async def test_who_ends_no_upload_keeps_others_from_theirs_for_a_day(
    place: Place, store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held is let go where it is wanted elsewhere and nothing has happened to its upload for long."""
    monkeypatch.setattr(uploads, "MAX_HELD_BYTES", 300)
    one, two, three = (Upload(DRIVE, upload_ref(name)) for name in ("one", "two", "three"))
    lies_about, busy = kept(1, "a"), kept(1, "a")
    await store.add_part(one, lies_about, held=bytes(104))
    await store.add_part(two, busy, held=bytes(104))
    await place.clock.advance(KEEP_HELD_S - 1)
    with pytest.raises(UploadsFullError, match="tenant-a/drive"):
        await store.add_part(three, kept(1, "a"), held=bytes(104))
    await store.add_part(two, kept(2, "b", 6_000_000))  # it goes on
    await place.clock.advance(2)
    await store.add_part(three, kept(1, "a"), held=bytes(104))
    assert await store.held(one, lies_about) is None
    assert [found.is_held for found in await store.parts(one)] == [False], "its part is known all the same"
    assert await store.held(two, busy) == bytes(104)


async def test_what_is_held_for_an_idle_upload_goes_with_the_sweep(place: Place, store: UploadStore) -> None:
    part = kept(1, "a")
    await store.add_part(UPLOAD, part, held=bytes(104))
    await place.clock.advance(KEEP_HELD_S - 1)
    await store.sweep()
    assert await store.held(UPLOAD, part) == bytes(104)
    await place.clock.advance(2)
    assert await store.sweep() == 0
    assert await store.held(UPLOAD, part) is None
    assert [found.tag for found in await store.parts(UPLOAD)] == ["a"]


async def test_other_bytes_than_the_parts_are_not_held(store: UploadStore) -> None:
    with pytest.raises(UploadsFullError):
        await store.add_part(UPLOAD, kept(1, "a", 104), held=bytes(103))
    assert await store.parts(UPLOAD) == []


async def test_a_completion_replaces_the_one_before_and_ends_the_parts_when_done(store: UploadStore) -> None:
    await store.add_part(UPLOAD, kept(1, "a"), held=bytes(104))
    assert await store.completion(UPLOAD) is None
    await store.complete(UPLOAD, completion())
    await store.complete(UPLOAD, completion(asked=b"b" * 32))
    assert len(await store.parts(UPLOAD)) == 1
    await store.complete(UPLOAD, completion(asked=b"b" * 32, is_done=True))
    assert await store.parts(UPLOAD) == []
    assert await store.completion(UPLOAD) == completion(asked=b"b" * 32, is_done=True)
    await store.forget_completion(UPLOAD)
    assert await store.completion(UPLOAD) is None


async def test_an_aborted_upload_leaves_nothing(store: UploadStore) -> None:
    await store.add_part(UPLOAD, kept(1, "a"), held=bytes(104))
    await store.complete(UPLOAD, completion())
    await store.forget(UPLOAD)
    assert await store.parts(UPLOAD) == []
    assert await store.completion(UPLOAD) is None


async def test_what_nothing_happened_to_is_swept_away(place: Place, store: UploadStore) -> None:
    alive, dead, done = (Upload(DRIVE, upload_ref(name)) for name in ("alive", "dead", "done"))
    for upload in (alive, dead):
        await store.add_part(upload, kept(1, "a"), held=bytes(104))
    await store.complete(done, completion(is_done=True))
    await place.clock.advance(KEEP_COMPLETED_S + 1)
    assert await store.sweep() == 0
    assert await store.completion(done) is None
    await place.clock.advance(KEEP_S - KEEP_COMPLETED_S)
    await store.add_part(alive, kept(2, "a"))
    assert await store.sweep() == 1
    assert await store.parts(dead) == []
    assert [found.part.number for found in await store.parts(alive)] == [1, 2]
    [first, _second] = await store.parts(alive)
    assert await store.held(alive, first) is None, "nothing had happened to it for a day"


async def test_sweeping_goes_on_by_itself_and_survives_a_database_that_is_away(
    place: Place, store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.add_part(UPLOAD, kept(1, "a"))
    sweeping = asyncio.create_task(store.keep_swept())
    try:
        await place.clock.wait_for_sleepers()
        monkeypatch.setattr(
            uploads, "upload_completion", upload_completion.to_metadata(MetaData(), name="gone")
        )
        await place.clock.advance(KEEP_S + 1)
        await place.clock.wait_for_sleepers()
        monkeypatch.undo()
        assert len(await store.parts(UPLOAD)) == 1
        await place.clock.advance(SWEEP_S)
        await place.clock.wait_for_sleepers()
        assert await store.parts(UPLOAD) == []
    finally:
        sweeping.cancel()


async def test_a_database_that_cannot_be_used_is_told(tmp_path: Path, place: Place) -> None:
    async with UploadStore.open(f"sqlite:///{tmp_path / 'none' / 'none.db'}", clock=place.clock) as store:
        with pytest.raises(UploadsUnavailableError):
            await store.add_part(UPLOAD, kept(1, "a"))
        with pytest.raises(UploadsUnavailableError):
            await store.parts(UPLOAD)


# ---- uploads by offset


async def test_a_session_changes_only_from_what_was_read(place: Place, store: UploadStore) -> None:
    assert await store.session(UPLOAD) is None
    await store.begin_session(UPLOAD, b"one")
    first = await store.session(UPLOAD)
    assert first is not None
    second = await store.change_session(UPLOAD, first, b"two")
    assert second is not None
    assert await store.change_session(UPLOAD, first, b"three") is None
    assert not await store.forget_session(UPLOAD, first)
    found = await store.session(UPLOAD)
    assert found == second
    assert found.state == b"two"
    assert b"two" not in repr(found).encode()
    # Begun again by the same name: what was read of the former one is worth nothing.
    await store.begin_session(UPLOAD, b"new")
    assert await store.change_session(UPLOAD, second, b"four") is None
    async with UploadStore.open(place.url, clock=place.clock) as other:
        seen = await other.session(UPLOAD)
        assert seen is not None
        assert seen.state == b"new"
        assert await other.forget_session(UPLOAD, seen)
    assert await store.session(UPLOAD) is None
    assert not await store.forget_session(UPLOAD)


async def test_of_many_changes_at_once_one_is_made(store: UploadStore) -> None:
    await store.begin_session(UPLOAD, b"one")
    read = await store.session(UPLOAD)
    assert read is not None
    made = await asyncio.gather(*(store.change_session(UPLOAD, read, bytes([n])) for n in range(8)))
    (winner,) = [session for session in made if session is not None]
    assert await store.session(UPLOAD) == winner


async def test_sessions_are_bounded_and_forgotten(
    place: Place, store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_SESSION_BYTES", 100)
    old, new = (Upload(DRIVE, upload_ref(name)) for name in ("old", "new"))
    await store.begin_session(old, b"x" * 60)
    with pytest.raises(UploadsFullError):
        await store.begin_session(new, b"x" * 60)
    await store.begin_session(Upload(NetworkService("tenant-b", "drive"), upload_ref("old")), b"x" * 60)
    await place.clock.advance(uploads.IDLE_S + 1)
    await store.begin_session(new, b"x" * 60)
    assert await store.session(old) is None, "nothing had happened to it for an hour"
    read = await store.session(new)
    assert read is not None
    with pytest.raises(UploadsFullError):
        await store.change_session(new, read, b"x" * 101)
    assert await store.change_session(new, read, b"") is not None
    await place.clock.advance(KEEP_S + 1)
    assert await store.sweep() == 2
    assert await store.session(new) is None


async def test_room_is_made_of_as_many_as_it_takes(
    place: Place, store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are looked at together; the newest of those that are idle stays."""
    monkeypatch.setattr(uploads, "MAX_SESSION_BYTES", 100)
    monkeypatch.setattr(uploads, "_AT_ONCE", 2)
    old = [Upload(DRIVE, upload_ref(f"old {number}")) for number in range(6)]
    for upload in old:
        await store.begin_session(upload, b"x" * 15)
        await place.clock.advance(1)
    await place.clock.advance(uploads.IDLE_S + 1)
    await store.begin_session(Upload(DRIVE, upload_ref("new")), b"x" * 80)
    assert [await store.session(upload) is not None for upload in old] == [False] * 5 + [True]
    with pytest.raises(UploadsFullError):
        await store.begin_session(Upload(DRIVE, upload_ref("newer")), b"x" * 40)
    assert await store.session(old[-1]) is not None, "who gets no room takes none"


async def test_room_may_be_filled_and_is_given_back_where_there_is_too_little(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_SESSION_BYTES", 100)
    await store.begin_session(UPLOAD, b"x" * 100)
    monkeypatch.setattr(uploads, "MAX_SESSION_BYTES", 50)  # another version's, or another proxy's
    for size in (90, 90):
        read = await store.session(UPLOAD)
        assert read is not None
        assert await store.change_session(UPLOAD, read, b"y" * size) is not None
    with pytest.raises(UploadsFullError):
        await store.begin_session(Upload(DRIVE, upload_ref("other")), b"x")


async def test_a_session_makes_no_room_by_its_own_end(
    place: Place, store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was idle for longest, and goes on just now."""
    monkeypatch.setattr(uploads, "MAX_SESSION_BYTES", 100)
    await store.begin_session(UPLOAD, b"x" * 60)
    read = await store.session(UPLOAD)
    assert read is not None
    await place.clock.advance(1)
    other = Upload(UPLOAD.owner, upload_ref("other"))
    await store.begin_session(other, b"x" * 40)
    await place.clock.advance(uploads.IDLE_S + 1)
    read = await store.change_session(UPLOAD, read, b"x" * 80)
    assert read is not None
    assert await store.session(other) is None
    await place.clock.advance(uploads.IDLE_S + 1)
    with pytest.raises(UploadsFullError):
        await store.change_session(UPLOAD, read, b"x" * 101)
    assert await store.session(UPLOAD) == read
