"""Bodies that stream: objects of SGT-1, constant memory, and no clean end of anything that failed."""

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
import pytest_asyncio

from envelope.derive import object_key
from envelope.errors import SealgateError, TruncatedError
from envelope.inspect import Kind, describe
from envelope.keys import KeyState
from envelope.objects import CHUNK_SIZE, Bind, Opener, sealed_length
from proxy.encryption_service.call import Answer, Call, StreamingAnswer
from proxy.encryption_service.limits import Limits, Quota
from proxy.encryption_service.model import DialectName, Op
from tests.children import output_of
from tests.proxy.encryption_service.dialects.test_native import NativeRig
from tests.proxy.encryption_service.service_rig import PEER
from tests.proxy.encryption_service.serving import serving

SEAL, OPEN = "/sealgate/v1/keys/orders/seal", "/sealgate/v1/keys/orders/open"
EDGES = [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 7]


class CutError(Exception):
    """The body ended before its end."""


async def pieces_of(
    data: bytes, step: int, *, then: Callable[[], None] | None = None
) -> AsyncIterator[bytes]:
    for at in range(0, len(data), step):
        if then is not None and at * 2 >= len(data):
            then()
        yield data[at : at + step]


@pytest_asyncio.fixture
async def native(tmp_path: Path) -> AsyncIterator[NativeRig]:
    rig = NativeRig(tmp_path)
    yield rig
    rig.rig.close()


async def stream(
    native: NativeRig, path: str, body: AsyncIterator[bytes], *, name: str | None = None, token: str = ""
) -> tuple[int, bytes]:
    """Status and body; what a cut answer raises is raised here."""
    headers = [("authorization", f"Bearer {token or native.token}")]
    if name is not None:
        headers.append(("sealgate-name", name))
    assert native.dialect.wants_stream("POST", path)
    result = native.dialect.handle(
        Call(method="POST", path=path, headers=tuple(headers), peer=PEER, body_stream=body)
    )
    assert not isinstance(result, Answer)
    answer = await result
    if isinstance(answer, Answer):
        return answer.status, answer.body
    assert isinstance(answer, StreamingAnswer)
    return answer.status, b"".join([piece async for piece in answer.chunks])


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("step", [1000, CHUNK_SIZE, 10 * CHUNK_SIZE])
async def test_an_object_opens_as_it_was_and_is_one_of_ours(native: NativeRig, size: int, step: int) -> None:
    plain = os.urandom(size)
    status, sealed = await stream(native, SEAL, pieces_of(plain, step))
    assert (status, len(sealed)) == (200, sealed_length(size))
    described = describe(sealed)
    assert (described.kind, described.problems) == (Kind.OBJECT, ())
    assert described.key_id == native.rig.key_id(native.key)
    key = object_key(native.rig.secret(native.key), native.key.owner, native.rig.key_id(native.key))
    opener = Opener(native.key.owner, lambda _header: key)
    assert bytes(opener.update(sealed)) + opener.finalize() == plain
    assert await stream(native, OPEN, pieces_of(sealed, step)) == (200, plain)


async def test_a_name_binds(native: NativeRig) -> None:
    _, sealed = await stream(native, SEAL, pieces_of(b"x" * 100, 7), name="invoice 7")
    assert describe(sealed).bind is Bind.CALLER
    assert await stream(native, OPEN, pieces_of(sealed, 50), name="invoice 7") == (200, b"x" * 100)
    for name in (None, "invoice 8"):
        assert (await stream(native, OPEN, pieces_of(sealed, 50), name=name))[0] == 422
    for name in ("", " x", "x\x7f", "é", "x" * 513):
        assert (await stream(native, SEAL, pieces_of(b"x", 1), name=name))[0] == 400


async def test_rotation_keeps_old_objects_open(native: NativeRig) -> None:
    _, sealed = await stream(native, SEAL, pieces_of(b"old", 3))
    native.rig.push(native.key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    assert await stream(native, OPEN, pieces_of(sealed, 50)) == (200, b"old")
    _, newer = await stream(native, SEAL, pieces_of(b"new", 3))
    assert describe(newer).key_id == native.rig.key_id(native.key, 2)
    native.rig.push(native.key, KeyState.COMPROMISED, KeyState.ACTIVE)
    status, body = await stream(native, OPEN, pieces_of(sealed, 50))
    assert (status, b"key-compromised" in body) == (423, True)


async def test_every_cut_and_change_of_an_object_is_refused_or_cuts_the_answer(native: NativeRig) -> None:
    plain = os.urandom(2 * CHUNK_SIZE + 100)
    _, sealed = await stream(native, SEAL, pieces_of(plain, CHUNK_SIZE))
    for size in [*range(0, 120, 7), 88, 104, 16_400 + 88, 2 * 16_400 + 88, len(sealed) - 1]:
        with contextlib.suppress(SealgateError):
            assert (await stream(native, OPEN, pieces_of(sealed[:size], 5000)))[0] == 422
    for at in [0, 9, 12, 28, 29, 40, 60, 100, 16_400 + 90, len(sealed) - 1]:
        changed = bytearray(sealed)
        changed[at] ^= 1
        try:
            status, body = await stream(native, OPEN, pieces_of(bytes(changed), 5000))
        except SealgateError:  # the server aborts: what came before has verified
            assert at > 88 + 16_400, at
            continue
        assert status in {404, 422}, at
        assert plain[:16] not in body
    with pytest.raises(SealgateError):
        await stream(native, OPEN, pieces_of(sealed + b"x", 5000))


async def test_a_body_that_is_cut_leaves_no_object(native: NativeRig) -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise CutError

    sealed = bytearray()
    result = native.dialect.handle(
        Call(
            method="POST",
            path=SEAL,
            headers=(("authorization", f"Bearer {native.token}"),),
            peer=PEER,
            body_stream=cut(),
        )
    )
    assert not isinstance(result, Answer)
    answer = await result
    assert isinstance(answer, StreamingAnswer)
    with contextlib.suppress(CutError):
        async for piece in answer.chunks:
            sealed += piece
        pytest.fail("it came to an end")
    assert native.rig.records()[-1]["error"] == "body-cut"
    with pytest.raises(TruncatedError):
        await stream(native, OPEN, pieces_of(bytes(sealed), 9999))


@pytest.mark.parametrize("path", [SEAL, OPEN])
@pytest.mark.parametrize("what", ["withdrawn", "credential", "log"])
async def test_what_ends_meanwhile_cuts_the_answer(native: NativeRig, path: str, what: str) -> None:
    plain = os.urandom(10 * CHUNK_SIZE)
    _, sealed = await stream(native, SEAL, pieces_of(plain, CHUNK_SIZE))

    def end() -> None:
        match what:
            case "withdrawn":
                native.rig.withdraw(native.key)
            case "credential":
                native.rig.revoke(native.token.split(".")[1])
            case _:
                native.rig.audit_file.rename(native.rig.audit_file.with_suffix(".moved"))

    body = plain if path == SEAL else sealed
    if what == "log":  # the record is there before the first byte: without one nothing begins
        end()
        status, document = await stream(native, path, pieces_of(body, CHUNK_SIZE))
        assert (status, b"not-recorded" in document) == (500, True)
        return
    with pytest.raises(Exception, match=r".*") as caught:
        await stream(native, path, pieces_of(body, CHUNK_SIZE, then=end))
    assert (
        getattr(caught.value, "code", "") == {"withdrawn": "revoked", "credential": "not-authenticated"}[what]
    )
    assert str(native.rig.records()[-1]["operation"]).endswith("-cut")


async def test_nothing_begins_without_leave(native: NativeRig) -> None:
    reads: list[int] = []

    async def never() -> AsyncIterator[bytes]:
        reads.append(1)
        yield b"x"

    assert (await stream(native, SEAL, never(), token="wrong"))[0] == 401
    only_open = native.rig.add_bearer(DialectName.NATIVE, operations=frozenset({Op.DECRYPT}))
    assert (await stream(native, SEAL, never(), token=only_open))[0] == 403
    assert (await stream(native, "/sealgate/v1/keys/none/seal", never()))[0] == 404
    native.rig.withdraw(native.key)
    assert (await stream(native, SEAL, never()))[0] == 403
    assert reads == []


async def test_places_are_counted_and_given_back(tmp_path: Path) -> None:
    native = NativeRig(tmp_path, limits=Limits(places=1))
    gate = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await gate.wait()

    first = asyncio.create_task(stream(native, SEAL, slow()), name="first")
    await asyncio.sleep(0)
    assert (await stream(native, SEAL, pieces_of(b"x", 1)))[0] == 429
    gate.set()
    assert (await first)[0] == 200
    assert (await stream(native, SEAL, pieces_of(b"x", 1)))[0] == 200
    assert (await stream(native, OPEN, pieces_of(b"no object", 1)))[0] == 422
    assert (await stream(native, SEAL, pieces_of(b"x", 1)))[0] == 200
    native.rig.close()


async def test_more_pays_more_and_waits(tmp_path: Path) -> None:
    quota = Quota(requests_per_s=16, burst=20)
    native = NativeRig(tmp_path, limits=Limits(tenant=quota, credential=quota))
    plain = bytes(3 << 20)  # 48 units
    task = asyncio.create_task(stream(native, SEAL, pieces_of(plain, 1 << 18)), name="seal")
    await native.rig.clock.wait_for_sleepers(1)
    assert not task.done()
    for _ in range(10):
        await native.rig.clock.advance(1)
    status, sealed = await task
    assert (status, len(sealed)) == (200, sealed_length(len(plain)))
    native.rig.close()


# Over real sockets.


class Served(NamedTuple):
    url: str
    headers: dict[str, str]
    native: NativeRig


@pytest_asyncio.fixture
async def served(native: NativeRig) -> AsyncIterator[Served]:
    async with serving([native.dialect]) as url:
        yield Served(url, {"Authorization": f"Bearer {native.token}"}, native)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_96_mib_pass_in_constant_memory(served: Served) -> None:
    piece, count = os.urandom(1 << 20), 96

    async def body() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    async with aiohttp.ClientSession(headers=served.headers) as session:
        async with session.post(served.url + SEAL, data=pieces_of(b"warm" * 100_000, 1 << 16)) as answer:
            await answer.read()
        before, most = resident_bytes(), 0
        plain = hashlib.sha256()
        # Sealed by one call and opened by the other, while both are under way.
        async with session.post(served.url + SEAL, data=body()) as sealing:
            assert sealing.status == 200
            async with session.post(served.url + OPEN, data=sealing.content.iter_any()) as opening:
                assert opening.status == 200
                async for chunk in opening.content.iter_any():
                    plain.update(chunk)
                    most = max(most, resident_bytes())
    expected = hashlib.sha256()
    for _ in range(count):
        expected.update(piece)
    assert plain.digest() == expected.digest()
    assert most - before < 24 << 20


@pytest.mark.parametrize("ending", [b"", b"5\r\nhel", b"zz\r\n"])
async def test_a_chunked_body_without_its_end_is_answered_by_no_end(served: Served, ending: bytes) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {SEAL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.native.token}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()
    chunk = b"%x\r\n%b\r\n" % (40_000, bytes(40_000))
    writer.write(head + chunk)
    await writer.drain()
    first = await reader.readuntil(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200")
    writer.write(ending)
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        rest = await reader.read(-1)
        assert not rest.endswith(b"0\r\n\r\n")
    writer.close()
    async with asyncio.timeout(30):
        while served.native.rig.records()[-1]["operation"] != "seal-cut":  # noqa: ASYNC110 - in a file
            await asyncio.sleep(0.01)


async def test_curl_seals_and_opens_files(served: Served, tmp_path: Path) -> None:
    """It reads while it writes, as a client of these two calls must."""
    curl = shutil.which("curl")
    assert curl is not None, "apt-get install curl"
    plain, sealed, back = tmp_path / "plain", tmp_path / "sealed", tmp_path / "back"
    plain.write_bytes(os.urandom(24 << 20))

    async def run_curl(source: Path, target: Path, path: str) -> None:
        words: Iterable[str] = (
            "--fail-with-body", "--silent", "--show-error", "--max-time", "60",
            "--header", f"Authorization: Bearer {served.native.token}",
            "--header", "Expect:",
            "--header", "Sealgate-Name: backup",
            "--request", "POST", "--upload-file", str(source),
            "--output", str(target), served.url + path,
        )  # fmt: skip
        process = await asyncio.create_subprocess_exec(curl, *words, stdout=asyncio.subprocess.PIPE)
        output, _ = await output_of(process)
        assert process.returncode == 0, output

    await run_curl(plain, sealed, SEAL)
    await run_curl(sealed, back, OPEN)
    assert back.read_bytes() == plain.read_bytes()
    described = describe(sealed.read_bytes())
    assert (described.kind, described.plain_bytes) == (Kind.OBJECT, 24 << 20)
