"""Resumable uploads: what the service gets, what its client is told, and what happens when either fails."""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from envelope.objects import HEADER_SIZE, MAGIC, PREFIX_SIZE, Header, plain_length
from proxy import refusals
from proxy.messages.checksums import Crc32C
from proxy.messages.message import Fields
from proxy.plans.conversing import Reply
from proxy.plans.request import Mode
from proxy.profiles.gcs import sessions
from proxy.profiles.gcs.chunks import Chunk
from proxy.profiles.gcs.content_ranges import AskedRange
from proxy.profiles.gcs.resumable import Uploading
from proxy.profiles.gcs.sessions import GRANULE_BYTES, State
from proxy.profiles.gcs.starting import session_ref
from proxy.profiles.gcs.told import MARK, UNKNOWN_SIZE
from proxy.refusals import Refusal, RefusedError
from proxy.tenants.directory import DirectoryStore
from proxy.uploads import Session, Upload, UploadStore
from tests.fakes.clock import ManualClock
from tests.proxy.profiles.gcs.upload_world import (
    HOST,
    OWNER,
    START,
    Answered,
    Talk,
    World,
    head,
    request,
)

CONTENT = os.urandom(5 * GRANULE_BYTES + 1234)
OTHER = os.urandom(len(CONTENT))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all: making its schema takes longer than most tests here."""
    directory = tmp_path_factory.mktemp("directory")
    url = f"sqlite:///{directory / 'directory.db'}"
    DirectoryStore.open(url, directory, clock=ManualClock()).close()
    return url


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with UploadStore.open(database, clock=ManualClock()) as store:
        yield World.make(store)


async def refused(world: World, content: bytes | None, content_range: str | None, **fields: str) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        await world.put(content, content_range, **fields)
    return caught.value.refusal


def crc32c(content: bytes) -> str:
    crc = Crc32C()
    crc.update(content)
    return base64.b64encode(crc.digest()).decode()


class UpstreamFailed(Exception):  # noqa: N818 - what happened, not whose fault it is
    """The client learns that the service broke off."""


class UploadLost(Exception):  # noqa: N818
    """The client is to begin anew."""


async def send(world: World, start: int, stop: int, total: int | None, content: bytes = CONTENT) -> Reply:
    said = "*" if total is None else total
    try:
        return await world.put(content[start:stop], f"bytes {start}-{stop - 1}/{said}")
    except RefusedError as error:
        if error.refusal is refusals.UPSTREAM:
            raise UpstreamFailed from error
        if error.refusal is refusals.UPLOAD_LOST:
            raise UploadLost from error
        raise


def range_of(reply: Reply) -> str | None:
    assert reply.status == 308
    return dict(reply.fields).get("Range")


async def state(world: World) -> State:
    name = world.session.rpartition("upload_id=")[2]
    row = await world.store.session(Upload(OWNER, session_ref("box", name)))
    assert row is not None
    return State.decode(row.state)


def headers_in(data: bytes) -> list[bytes]:
    """The first bytes of each sealed message in *data*: header, salt, commitment."""
    found, at = [], data.find(MAGIC)
    while at >= 0:
        found.append(data[at : at + PREFIX_SIZE])
        at = data.find(MAGIC, at + 1)
    return found


# ---- what works


@pytest.mark.parametrize("size", [0, 1, GRANULE_BYTES - 1, GRANULE_BYTES, 2 * GRANULE_BYTES + 77])
@pytest.mark.parametrize("chunk", [GRANULE_BYTES, 2 * GRANULE_BYTES])
async def test_chunks_become_one_object(world: World, size: int, chunk: int) -> None:
    plain = CONTENT[:size]
    await world.begin()
    *before, last = range(0, max(size, 1), chunk)
    for start in before:
        reply = await send(world, start, start + chunk, None)
        assert range_of(reply) == f"bytes=0-{start + chunk - 1}"
    reply = await (send(world, last, size, size) if size else world.put(None, "bytes */0"))
    assert reply.status == 200
    told = json.loads(reply.body)
    assert (told["size"], told["crc32c"]) == (str(size), crc32c(plain))
    assert "metadata" not in told
    assert not any(name.lower() == "x-goog-hash" for name, _ in reply.fields)
    assert world.opened(world.stored) == plain
    chunks = [came for came in world.service.came if came.body and came.method == "PUT"]
    assert all(len(came.body) % GRANULE_BYTES == 0 for came in chunks[:-1])


async def test_all_of_it_in_one_request(world: World) -> None:
    md5 = base64.b64encode(hashlib.md5(CONTENT, usedforsecurity=False).digest()).decode()
    for said in (
        None,
        "bytes 0-*/*",
        f"bytes 0-*/{len(CONTENT)}",
        f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}",
    ):
        await world.begin()
        told = json.loads((await world.put(CONTENT, said)).body)
        assert (told["crc32c"], told["md5Hash"]) == (crc32c(CONTENT), md5)
        assert world.opened(list(world.service.objects.values())[-1]) == CONTENT


async def test_the_length_may_be_said_behind_the_last_chunk(world: World) -> None:
    await world.begin()
    await send(world, 0, 2 * GRANULE_BYTES, None)
    reply = await world.put(None, f"bytes */{2 * GRANULE_BYTES}")
    assert reply.status == 200
    assert world.opened(world.stored) == CONTENT[: 2 * GRANULE_BYTES]


async def test_what_comes_again_is_skipped_and_what_lies_beyond_is_not_taken(world: World) -> None:
    await world.begin()
    assert range_of(await send(world, 0, GRANULE_BYTES + 5, None)) == f"bytes=0-{GRANULE_BYTES - 1}"
    before = len(world.service.came)
    assert range_of(await send(world, 0, GRANULE_BYTES, None)) == f"bytes=0-{GRANULE_BYTES - 1}"
    assert (await send(world, GRANULE_BYTES + 1, 2 * GRANULE_BYTES, None)).status == 503
    assert len(world.service.came) == before, "nothing of it went on"
    # Overlapping, from before the place to behind it.
    assert range_of(await send(world, 1000, 3 * GRANULE_BYTES, None)) == f"bytes=0-{3 * GRANULE_BYTES - 1}"
    await send(world, 3 * GRANULE_BYTES, len(CONTENT), len(CONTENT))
    assert world.opened(world.stored) == CONTENT


async def test_another_key_may_become_active_between_chunks(world: World) -> None:
    first = world.push()
    await world.begin()
    await send(world, 0, GRANULE_BYTES, None)
    second = world.push()
    await send(world, GRANULE_BYTES, len(CONTENT), len(CONTENT))
    assert world.opened(world.stored) == CONTENT
    parts = [Header.parse(one) for one in headers_in(world.stored)]
    assert [part.key_id for part in parts] == [first, second, second]


async def test_go_is_answered_as_it_wants_to_be(world: World) -> None:
    await world.begin()
    reply = await world.put(CONTENT[:GRANULE_BYTES], "bytes 0-262143/*", x_guploader_no_308="yes")
    fields = {name.lower(): value for name, value in reply.fields}
    assert (reply.status, fields["x-http-status-code-override"]) == (200, "308")
    assert fields["range"] == "bytes=0-262143"
    assert all("x-guploader-no-308" not in came.fields for came in world.service.came)


async def test_the_service_is_told_neither_length_nor_digests(world: World) -> None:
    document = {"name": "o", "metadata": {"mine": "1", MARK: "7"}, "crc32c": crc32c(CONTENT), "size": "5"}
    await world.begin(json.dumps(document).encode(), x_upload_content_length=str(len(CONTENT)))
    (began,) = world.service.came
    assert json.loads(began.body) == {
        "name": "o",
        "metadata": {"mine": "1", MARK: str(len(CONTENT))},
    }
    assert "x-upload-content-length" not in began.fields
    reply = await send(world, 0, len(CONTENT), len(CONTENT))
    assert json.loads(reply.body)["metadata"] == {"mine": "1"}


async def test_a_length_that_is_not_known_is_to_be_looked_up(world: World) -> None:
    await world.begin()
    (began,) = world.service.came
    assert json.loads(began.body)["metadata"] == {MARK: UNKNOWN_SIZE}


async def test_digests_that_contradict_each_other_begin_nothing(world: World) -> None:
    document = json.dumps({"name": "o", "crc32c": crc32c(CONTENT)}).encode()
    with pytest.raises(RefusedError) as caught:
        await world.begin(document, x_goog_hash=f"crc32c={crc32c(OTHER)}")
    assert caught.value.refusal is refusals.BAD_DIGEST
    assert not world.service.came


async def test_the_right_digest_of_a_chunk_is_accepted(world: World) -> None:
    md5 = base64.b64encode(hashlib.md5(CONTENT, usedforsecurity=False).digest()).decode()
    await world.begin()
    reply = await world.put(CONTENT, None, content_md5=md5)
    assert reply.status == 200
    assert world.opened(world.stored) == CONTENT


async def test_digests_are_compared_before_the_end_goes_up(world: World) -> None:
    wrong = json.dumps({"name": "o", "crc32c": "AAAAAA=="}).encode()
    await world.begin(wrong)
    await send(world, 0, GRANULE_BYTES, None)
    before = len(world.service.came)
    with pytest.raises(RefusedError) as caught:
        await send(world, GRANULE_BYTES, len(CONTENT), len(CONTENT))
    assert caught.value.refusal is refusals.BAD_DIGEST
    assert len(world.service.came) == before
    await world.begin()
    refusal = await refused(
        world, CONTENT, f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}", x_goog_hash="crc32c=AAAAAA=="
    )
    assert refusal is refusals.BAD_DIGEST
    refusal = await refused(world, CONTENT, None, content_md5=base64.b64encode(bytes(16)).decode())
    assert refusal is refusals.BAD_DIGEST
    assert not world.service.objects


async def test_a_session_is_cancelled(world: World) -> None:
    await world.begin()
    upload = Upload(OWNER, session_ref("box", world.session.rpartition("upload_id=")[2]))
    assert await world.store.session(upload) is not None
    reply = await world.put(None, None, method="DELETE")
    assert reply.status == 499
    assert world.service.came[-1].method == "DELETE"
    assert await world.store.session(upload) is None
    assert (await world.put(None, "bytes */*")).status == 404


async def test_the_address_of_the_session_is_ours_in_reverse_mode(world: World) -> None:
    reply = await world.begin(mode=Mode.REVERSE)
    assert dict(reply.fields)["Location"].startswith(f"https://{HOST}/upload/")


# ---- what fails, and goes on


@pytest.mark.parametrize("fault", ["refuse", "cut 0", "cut 262144", "cut 400000", "deaf"])
@pytest.mark.parametrize("is_last", [False, True])
async def test_a_chunk_is_sent_again_after_a_failure(world: World, fault: str, *, is_last: bool) -> None:
    stop = 3 * GRANULE_BYTES
    await world.begin()
    await send(world, 0, GRANULE_BYTES, None)
    world.service.faults = [fault]
    with contextlib.suppress(UpstreamFailed):
        assert (await send(world, GRANULE_BYTES, stop, stop if is_last else None)).status == 503
    place = await world.place()
    if place is None:
        assert is_last
        reply = await world.put(None, "bytes */*")
    else:
        assert place == GRANULE_BYTES, "what is not acknowledged is not said to be there"
        reply = await send(world, GRANULE_BYTES, stop, stop if is_last else None)
    if not is_last:
        reply = await send(world, stop, len(CONTENT), len(CONTENT))
    told = json.loads(reply.body)
    plain = CONTENT[:stop] if is_last else CONTENT
    assert (told["size"], told["crc32c"]) == (str(len(plain)), crc32c(plain))
    assert world.opened(world.stored) == plain


@pytest.mark.parametrize("fault", ["refuse", "cut 262144", "deaf"])
async def test_other_content_at_a_place_that_is_claimed_ends_the_upload(world: World, fault: str) -> None:
    await world.begin()
    world.service.faults = [fault]
    with contextlib.suppress(UpstreamFailed):
        await send(world, 0, 2 * GRANULE_BYTES, None)
    before = len(world.service.came)
    changed = CONTENT[: 2 * GRANULE_BYTES - 1] + b"?"
    assert await refused(world, changed, f"bytes 0-{len(changed) - 1}/*") is refusals.UPLOAD_LOST
    assert len(world.service.came) == before, "nothing of it went on"
    assert await refused(world, CONTENT, None) is refusals.UPLOAD_LOST, "and it does not come back"


async def test_the_place_of_a_piece_of_one_part_is_never_anothers(world: World) -> None:
    """A last part was claimed, its end may be there: it cannot become one that is not the last."""
    await world.begin()
    world.service.faults = ["cut 999999999"]  # all of it, but for the service's making an object
    with pytest.raises(UpstreamFailed):
        await send(world, 0, len(CONTENT), len(CONTENT))
    assert await world.place() == 0
    reply = await send(world, 0, len(CONTENT), len(CONTENT))
    assert reply.status == 200
    assert world.opened(world.stored) == CONTENT


async def test_an_end_that_the_service_has_a_piece_of_is_sent_again_as_it_was(world: World) -> None:
    """The last granule that it keeps lies within the manifest."""
    plain = CONTENT[: plain_length(2 * GRANULE_BYTES - 90)]
    await world.begin()
    world.service.faults = ["cut 999999999"]
    with pytest.raises(UpstreamFailed):
        await send(world, 0, len(plain), len(plain))
    name = world.session.rpartition("upload_id=")[2]
    assert len(world.service.sessions[name]) == 2 * GRANULE_BYTES
    reply = await send(world, 0, len(plain), len(plain))
    assert reply.status == 200
    assert world.opened(world.stored) == plain


async def test_what_the_database_has_forgotten_shares_no_nonce(world: World) -> None:
    """Rolled back to before the claim, and other content comes: another salt, so another key."""
    await world.begin()
    upload_name = world.session.rpartition("upload_id=")[2]
    upload = Upload(OWNER, session_ref("box", upload_name))
    old = await world.store.session(upload)
    assert old is not None
    world.service.faults = ["cut 300000"]
    with pytest.raises(UpstreamFailed):
        await send(world, 0, 2 * GRANULE_BYTES, None)
    await world.store.begin_session(upload, old.state)
    with pytest.raises(UploadLost):  # the service has something that nobody remembers
        await send(world, 0, 2 * GRANULE_BYTES, None, OTHER)
    world.service.sessions[upload_name].clear()  # and one that lies
    await world.store.begin_session(upload, old.state)
    world.service.faults = ["cut 300000"]
    with pytest.raises(UpstreamFailed):
        await send(world, 0, 2 * GRANULE_BYTES, None, OTHER)
    one, two = (came.body for came in world.service.came if len(came.body) == 300_000)
    assert one[:HEADER_SIZE] == two[:HEADER_SIZE]
    assert one[HEADER_SIZE:PREFIX_SIZE] != two[HEADER_SIZE:PREFIX_SIZE]


async def test_an_end_that_the_database_has_forgotten_is_not_taken_for_another(world: World) -> None:
    """The upload has ended; rolled back to before, its last chunk comes with other content of this length."""
    await world.begin()
    await send(world, 0, GRANULE_BYTES, None)
    upload = Upload(OWNER, session_ref("box", world.session.rpartition("upload_id=")[2]))
    old = await world.store.session(upload)
    assert old is not None
    assert (await send(world, GRANULE_BYTES, len(CONTENT), len(CONTENT))).status == 200
    await world.store.begin_session(upload, old.state)
    with pytest.raises(UploadLost):
        await send(world, GRANULE_BYTES, len(CONTENT), len(CONTENT), OTHER)
    assert world.opened(world.stored) == CONTENT
    assert (await world.put(None, "bytes */*")).status == 200, "who asks is told of the object that there is"


async def test_two_uploads_of_the_same_content_have_nothing_in_common(world: World) -> None:
    for _ in range(2):
        await world.begin()
        await send(world, 0, len(CONTENT), len(CONTENT))
    one, two = world.service.objects.values()
    salts = [prefix[HEADER_SIZE:] for stored in (one, two) for prefix in headers_in(stored)]
    assert len(set(salts)) == len(salts) == 4


async def test_a_row_of_before_changes_nothing_that_came_since(world: World) -> None:
    """A slow request of a session whose name the service has given away again."""
    await world.begin()
    upload = Upload(OWNER, session_ref("box", world.session.rpartition("upload_id=")[2]))
    slow = await world.store.session(upload)
    assert slow is not None
    await world.store.begin_session(upload, b"new")
    assert await world.store.change_session(upload, slow, b"old") is None
    row = await world.store.session(upload)
    assert row is not None
    assert row.state == b"new"


async def test_of_two_requests_at_once_one_is_told_to_ask(world: World) -> None:
    await world.begin()
    name = world.session.rpartition("upload_id=")[2]
    original = world.service.answer

    async def meanwhile(*arguments: object) -> object:
        world.service.answer = original  # type: ignore[method-assign]
        await send(world, 0, GRANULE_BYTES, None)
        return await original(*arguments)  # type: ignore[arg-type]

    world.service.answer = meanwhile  # type: ignore[method-assign,assignment]
    refusal = await refused(world, CONTENT[:GRANULE_BYTES], "bytes 0-262143/*")
    assert refusal is refusals.UPLOAD_BUSY
    assert await world.place() == GRANULE_BYTES
    await send(world, GRANULE_BYTES, len(CONTENT), len(CONTENT))
    assert world.opened(world.stored) == CONTENT
    assert name in world.service.objects


# ---- what is refused


async def test_what_does_not_fit_is_refused(world: World) -> None:
    await world.begin(x_upload_content_length=str(len(CONTENT)))
    for content, said, refusal in (
        (b"abc", "bytes 0-1/*", refusals.BAD_LENGTH),
        (b"abc", "bytes 0-2/2", refusals.BAD_MESSAGE),
        (b"abc", "bytes 0-2/3", refusals.BAD_MESSAGE),  # not the length that was declared
        (b"abc", "bytes 2-0/*", refusals.BAD_MESSAGE),
        (b"abc", "bytes=0-2/*", refusals.BAD_MESSAGE),
        (b"abc", "bytes */*", refusals.BAD_MESSAGE),
        (b"abc", "bytes 0-*/*", refusals.BAD_LENGTH),
        (b"abc", None, refusals.BAD_LENGTH),
        (None, "bytes */3", refusals.BAD_MESSAGE),
    ):
        assert await refused(world, content, said) is refusal, said
    assert all(came.method == "POST" for came in world.service.came)
    with pytest.raises(RefusedError):
        await world.begin(x_upload_content_length="1e3")


@pytest.mark.parametrize(
    "location",
    [
        "https://elsewhere.example/upload/storage/v1/b/box/o?upload_id={name}",
        f"http://{HOST}/upload/storage/v1/b/box/o?upload_id={{name}}",
        f"https://{HOST}/upload/storage/v1/b/other/o?upload_id={{name}}",
        f"https://{HOST}/elsewhere?upload_id={{name}}",
        f"https://{HOST}/upload/storage/v1/b/box/o?uploadType=resumable",
        "//elsewhere.example/upload/storage/v1/b/box/o?upload_id={name}",
    ],
)
async def test_a_session_elsewhere_is_nobodys(world: World, location: str) -> None:
    world.service.location = location
    with pytest.raises(RefusedError) as caught:
        await world.begin()
    assert caught.value.refusal is refusals.ANSWER_REFUSED


async def test_a_body_that_said_no_length_is_as_long_as_its_place(world: World) -> None:
    await world.begin()
    upload = Upload(OWNER, session_ref("box", world.session.rpartition("upload_id=")[2]))
    chunk = Chunk(())
    chunk.pass_through(b"abc")
    its = request(replace(head("PUT", world.session), http2=True))
    for stop in (2, 4):
        with pytest.raises(RefusedError) as caught:
            await Uploading(Talk(world, its, b"", None), upload).take(AskedRange(stop=stop), chunk)
        assert caught.value.refusal is refusals.BAD_LENGTH


async def test_content_beyond_the_length_that_was_said_before_is_refused(world: World) -> None:
    await world.begin(x_upload_content_length="5")
    assert await refused(world, CONTENT[:10], "bytes 0-9/*") is refusals.BAD_MESSAGE
    await world.begin()
    await send(world, 0, GRANULE_BYTES, None)
    assert await refused(world, CONTENT[:10], "bytes 0-9/10") is refusals.BAD_MESSAGE, "more is stored"
    assert not any(came.body for came in world.service.came if came.method == "PUT" and len(came.body) < 99)


async def test_an_upload_without_a_name_is_none(world: World) -> None:
    world.session = f"{START}&upload_id="
    assert await refused(world, b"abc", "bytes 0-2/3") is refusals.BAD_MESSAGE
    assert not world.service.came


async def test_an_end_that_comes_again_is_answered_with_the_object(world: World) -> None:
    await world.begin()
    first = await send(world, 0, len(CONTENT), len(CONTENT))
    again = await send(world, 0, len(CONTENT), len(CONTENT))
    assert again.status == 200
    told, first_told = json.loads(again.body), json.loads(first.body)
    assert [told[name] for name in ("size", "crc32c")] == [first_told[name] for name in ("size", "crc32c")]


async def test_of_an_end_that_is_not_remembered_no_digest_is_told(world: World) -> None:
    await world.begin()
    upload = Upload(OWNER, session_ref("box", world.session.rpartition("upload_id=")[2]))
    old = await world.store.session(upload)
    assert old is not None
    await send(world, 0, len(CONTENT), len(CONTENT))
    await world.store.begin_session(upload, old.state)
    for _ in range(2):  # rolled back, and unknown
        reply = await world.put(None, "bytes */*")
        assert reply.status == 200
        assert not {"crc32c", "md5Hash"} & set(json.loads(reply.body))
        await world.store.forget_session(upload)


async def test_of_two_requests_that_read_the_same_state_one_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other content: had both left, the service would have a mixture."""
    await world.begin()
    original = world.store.session

    async def meanwhile(upload: Upload) -> Session | None:
        found = await original(upload)
        monkeypatch.setattr(world.store, "session", original)
        world.service.faults = ["cut 0"]
        with contextlib.suppress(UpstreamFailed):
            await send(world, 0, GRANULE_BYTES, None)
        return found

    monkeypatch.setattr(world.store, "session", meanwhile)
    assert await refused(world, OTHER[:GRANULE_BYTES], "bytes 0-262143/*") is refusals.UPLOAD_BUSY
    await send(world, 0, GRANULE_BYTES, None)
    await send(world, GRANULE_BYTES, len(CONTENT), len(CONTENT))
    assert world.opened(world.stored) == CONTENT


async def test_a_service_that_takes_nothing_is_not_asked_for_ever(world: World) -> None:
    await world.begin()
    sent = 0

    async def takes_nothing(
        _method: str, _target: str, _fields: object, body: bytes | AsyncIterator[bytes] | None
    ) -> Answered:
        nonlocal sent
        sent += not isinstance(body, bytes | None)
        return Answered(308, Fields([]), b"")

    world.service.answer = takes_nothing  # type: ignore[method-assign,assignment]
    assert await refused(world, CONTENT, None) is refusals.UPSTREAM
    assert sent == 1


async def test_an_upload_that_the_service_does_not_begin_is_not_begun(world: World) -> None:
    async def refuses(*_arguments: object) -> Answered:
        return Answered(412, Fields([]), b"no")

    world.service.answer = refuses  # type: ignore[method-assign,assignment]
    reply = await world.begin()
    assert (reply.status, reply.body) == (412, b"no")


async def test_a_service_that_says_it_has_less_has_lost_it(world: World) -> None:
    await world.begin()
    await send(world, 0, 2 * GRANULE_BYTES, None)
    world.service.sessions[world.session.rpartition("upload_id=")[2]].clear()
    assert await refused(world, None, "bytes */*") is refusals.UPLOAD_LOST


async def test_a_service_that_says_it_has_more_has_something_else(world: World) -> None:
    await world.begin()
    world.service.faults = ["cut 0"]
    with pytest.raises(UpstreamFailed):
        await send(world, 0, GRANULE_BYTES, None)
    world.service.sessions[world.session.rpartition("upload_id=")[2]] += bytes(4 * GRANULE_BYTES)
    assert await refused(world, CONTENT[:GRANULE_BYTES], "bytes 0-262143/*") is refusals.UPLOAD_LOST


async def test_an_object_of_another_size_is_not_what_was_sent(world: World) -> None:
    world.service.object_more = {"size": "1"}
    await world.begin()
    assert await refused(world, CONTENT, None) is refusals.SERVICE_ANSWER


@pytest.mark.parametrize("content", [None, CONTENT[:GRANULE_BYTES]])
async def test_a_session_that_is_gone_is_forgotten(world: World, content: bytes | None) -> None:
    await world.begin()
    world.service.gone = True
    reply = await world.put(content, "bytes */*" if content is None else "bytes 0-262143/*")
    assert reply.status == 410
    name = world.session.rpartition("upload_id=")[2]
    assert await world.store.session(Upload(OWNER, session_ref("box", name))) is None
    world.service.gone = False
    assert await refused(world, CONTENT, None) is refusals.UPLOAD_LOST


async def test_a_key_that_has_ended_seals_nothing_more(world: World) -> None:
    await world.begin()
    await send(world, 0, GRANULE_BYTES, None)
    before = len(world.service.came)
    world.keys.withdraw(OWNER)
    with pytest.raises(Exception, match="withdrawn"):
        await send(world, GRANULE_BYTES, len(CONTENT), len(CONTENT))
    assert len(world.service.came) == before


async def test_there_is_an_end_of_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_PARTS", 2)
    await world.begin()
    for start in (0, GRANULE_BYTES):
        await send(world, start, start + GRANULE_BYTES, None)
    with pytest.raises(RefusedError) as caught:
        await send(world, 2 * GRANULE_BYTES, len(CONTENT), len(CONTENT))
    assert caught.value.refusal is refusals.TOO_MANY_CHUNKS


# ---- anything, in any order


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_fails_what_was_acknowledged_is_there(world: World, seed: int) -> None:
    """A client that only obeys what it is told, a service and a database that fail at random: in the end the
    object is the content, or the client was told to begin anew."""
    dice = random.Random(seed)
    for _ in range(3):
        try:
            await _upload(world, dice)
        except UploadLost:
            continue
        assert world.opened(list(world.service.objects.values())[-1]) == CONTENT
    _no_salt_has_two_contents(world)


async def _upload(world: World, dice: random.Random) -> None:
    await world.begin()
    upload = Upload(OWNER, session_ref("box", world.session.rpartition("upload_id=")[2]))
    place: int | None = 0
    kept = await world.store.session(upload)
    for step in itertools.count():
        size = dice.choice((1, 1, 2, 3)) * GRANULE_BYTES
        world.service.faults = [dice.choice(("", "", "refuse", f"cut {dice.randrange(800_000)}", "deaf"))]
        if step > 40:
            world.service.faults = []
        stop = min((place or 0) + size, len(CONTENT))
        try:
            reply = await send(world, place or 0, stop, len(CONTENT) if stop == len(CONTENT) else None)
            if reply.status == 200:
                return
        except UpstreamFailed:
            pass
        if dice.random() < 0.15:
            kept = await world.store.session(upload)
        elif kept is not None and dice.random() < 0.1:  # a standby that knew less has taken over
            await world.store.begin_session(upload, kept.state)
        place = await world.place()
        if place is None:
            return


def _no_salt_has_two_contents(world: World) -> None:
    """Of all that has left: behind one prefix always the same bytes."""
    seen: dict[bytes, bytes] = {}
    for came in world.service.came:
        starts = [came.body.find(prefix) for prefix in headers_in(came.body)]
        for start, stop in itertools.pairwise([*starts, len(came.body)]):
            message = came.body[start:stop]
            prefix, other = message[:PREFIX_SIZE], seen.get(message[:PREFIX_SIZE], b"")
            common = min(len(message), len(other))
            assert message[:common] == other[:common]
            seen[prefix] = max(message, other, key=len)
