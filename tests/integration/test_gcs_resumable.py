"""Google's resumable uploads through the proxy, where something goes wrong: nothing that was acknowledged is
lost, nothing half is an object, and the service never hears two contents at one place.

The service is the strict emulator: it notes whatever no client does that has read Google's documentation.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import sqlite3
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from envelope.keys import KeyId, KeyMaterial, KeyState
from runtime.clock import SystemClock
from tests.integration.gcs_site import THROUGH, WAYS, Site, Way, program, started, strict_site
from tests.integration.proxy_rig import Answer, proxy
from tests.referees.comparison import MAGIC, opened
from tests.referees.strict_gcs import Fault, FaultKind, StrictGcs

G = 256 * 1024
CANARY = os.urandom(8)


def random_body(size: int) -> bytes:
    """The canary is in every 16 bytes of it: nothing of it can lie about unseen."""
    return b"".join(CANARY + os.urandom(8) for _ in range(size // 16 + 1))[:size]


BODY = random_body(5 * G + 1234)
BOX = "referee-bucket"
UPLOAD = f"/upload/storage/v1/b/{BOX}/o"
JSON = {"content-type": "application/json"}


def crc32c(data: bytes) -> str:
    """RFC 3720 B.4, table by table; in base64, as the API writes it."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - the algorithm's register
        table.append(value)
    found = 0xFFFFFFFF
    for byte in data:
        found = table[(found ^ byte) & 0xFF] ^ found >> 8
    return base64.b64encode((found ^ 0xFFFFFFFF).to_bytes(4)).decode()


CRC32C = crc32c(BODY)


@dataclass(slots=True)
class Upload:
    """A client that has read the documentation. *url*: the session's."""

    way: Way
    url: str

    @classmethod
    async def begin(cls, way: Way, name: str, query: str = "", **fields: str) -> "Upload":
        given = {name.replace("_", "-"): value for name, value in fields.items()}
        target = f"{UPLOAD}?uploadType=resumable&name={quote(name, safe='')}{query}"
        answer = await way.ask("POST", target, {**JSON, **given}, b'{"metadata": {"x": "y"}}')
        assert answer.status == 200, answer
        return cls(way, answer.headers["location"])

    async def put(self, place: str | None, body: bytes | None = None, **fields: str) -> Answer:
        given = {name.replace("_", "-"): value for name, value in fields.items()}
        if place is not None:
            given["content-range"] = f"bytes {place}"
        return await self.way.ask("PUT", self.url, given, body)

    async def chunk(self, start: int, stop: int, total: int | str = "*", body: bytes = BODY) -> Answer:
        return await self.put(f"{start}-{stop - 1}/{total}", body[start:stop])

    async def held(self) -> int:
        """Where the upload is."""
        return held(await self.put("*/*"))

    async def carry_out(self, body: bytes = BODY, *, chunk_bytes: int = 2 * G, failures: int = 3) -> Answer:
        """From where it is to its end; after each failure it asks first, as clients do."""
        while True:
            answer = await self.put("*/*")
            while answer.status == 308:
                start = held(answer)
                stop = min(start + chunk_bytes, len(body))
                answer = await self.chunk(start, stop, len(body) if stop == len(body) else "*", body)
                assert answer.status != 308 or start < held(answer) <= stop
            if answer.status == 200:
                return answer
            failures -= 1
            assert failures > 0, answer


def held(answer: Answer) -> int:
    assert answer.status == 308, answer
    field = answer.headers.get("range")
    if field is None:
        return 0
    match = re.fullmatch(r"bytes=0-(\d+)", field)
    assert match is not None, field
    return int(match[1]) + 1


def crc32c_of(answer: Answer) -> str:
    found: str = json.loads(answer.body)["crc32c"]
    return found


def plain_of(place: Site[StrictGcs]) -> dict[str, bytes]:
    """Every object that was not put directly, by the formats alone; nothing of BODY is readable in it."""
    sealed = {name: body for name, body in place.server.contents(BOX).items() if "direct" not in name}
    assert not any(CANARY in stored for stored in sealed.values())
    owner = place.service.owner
    return opened(sealed.items(), owner=owner, materials=place.rig.materials[owner], plaintexts=[])


async def is_there(way: Way, name: str, body: bytes = BODY) -> None:
    """As a client sees it."""
    assert (await way.get(BOX, name)).body == body
    part = await way.get(BOX, name, {"range": f"bytes={G - 3}-{G + 2}"})
    assert (part.status, part.body) == (206, body[G - 3 : G + 3])
    resource = json.loads((await way.ask("GET", f"/storage/v1/b/{BOX}/o/{quote(name, safe='')}")).body)
    assert resource["size"] == str(len(body))
    assert resource["metadata"] == {"x": "y"}


# ---- step by step


def told(answer: Answer) -> Any:
    """What a client can tell answers by."""
    fields = [answer.headers.get(name) for name in ("range", "x-http-status-code-override")]
    said: Any = None
    if answer.headers.get("content-type", "").startswith("text/plain"):
        said = answer.body
    elif answer.status == 200 and answer.body:
        resource = json.loads(answer.body)
        said = [resource[name] for name in ("name", "size", "contentType", "metadata")]
    return [answer.status, *fields, said]


async def steps(way: Way) -> list[Any]:
    total, found = len(BODY), []

    async def note(name: str, answer: Answer) -> None:
        found.append([name, told(answer)])

    upload = await Upload.begin(way, f"{way.name}/a \u00e4", x_upload_content_type="text/x")
    await note("nothing yet", await upload.put("*/*"))
    await note("first", await upload.chunk(0, G))
    await note("asked", await upload.put("*/*"))
    await note("first again", await upload.chunk(0, G))
    await note("with more", await upload.chunk(0, 2 * G))
    await note("no multiple", await upload.chunk(2 * G, 2 * G + 7))
    await note("rounded down", await upload.chunk(2 * G, 3 * G + 7))
    await note("gap", await upload.chunk(4 * G, 5 * G))
    await note("malformed", await upload.put("nonsense"))
    await note("backwards", await upload.put("9-5/*", b"12345"))
    await note("more than its length", await upload.put(f"{3 * G}-{4 * G - 1}/{G}", BODY[3 * G : 4 * G]))
    await note("posted", await way.ask(
        "POST", upload.url, {"content-range": f"bytes {3 * G}-{4 * G - 1}/*"}, BODY[3 * G : 4 * G]
    ))  # fmt: skip
    await note("without 308", await upload.put("*/*", x_guploader_no_308="yes"))
    await note("length said", await upload.chunk(4 * G, 5 * G, total))
    await note("another length", await upload.put(f"*/{total + 1}"))
    await note("last", await upload.chunk(5 * G, total, total))
    for place in ("*/*", f"*/{total}"):
        await note("asked at the end", await upload.put(place))
    await note("last again", await upload.chunk(5 * G, total, total))
    for size, body in ((0, b""), (G, BODY[:G])):
        upload = await Upload.begin(way, f"{way.name}/{size}")
        if size:
            await note("all of it", await upload.chunk(0, size))
        await note("its length", await upload.put(f"*/{len(body)}"))
    upload = await Upload.begin(way, f"{way.name}/at once", x_upload_content_length=str(total))
    await note("at once", await upload.put(None, BODY))
    upload = await Upload.begin(way, f"{way.name}/node")
    await note("open end", await upload.put(f"0-*/{total}", BODY))
    upload = await Upload.begin(way, f"{way.name}/promised", x_upload_content_length=str(total))
    await note("not its promise", await upload.chunk(0, G, G))
    await note("its promise", await upload.chunk(0, total, total))
    upload = await Upload.begin(way, f"{way.name}/cancelled")
    await upload.chunk(0, G)
    await note("cancelled", await way.ask("DELETE", upload.url))
    await note("asked when cancelled", await upload.put("*/*"))
    await note("chunk when cancelled", await upload.chunk(G, 2 * G))
    upload = Upload(way, upload.url.replace("upload_id=", "upload_id=x"))
    await note("unknown", await upload.put("*/*"))
    return found


async def test_every_request_is_answered_as_directly(tmp_path: Path) -> None:
    async with strict_site(tmp_path) as place:
        results = {way: json.loads(json.dumps(await steps(place.ways[way]), default=repr)) for way in WAYS}
        for way in THROUGH:
            found = [
                f"{one}\n  {two}"
                for one, two in zip(results["direct"], results[way], strict=True)
                if json.dumps(one).replace("direct/", f"{way}/") != json.dumps(two)
            ]
            assert not found, f"{way}:\n" + "\n".join(found)
        direct = [body for name, body in place.server.stored() if "direct" in name]
        assert sum(body.count(CANARY) for body in direct) > 100_000, "the search finds it where it is"
        expected = {
            "a \u00e4": BODY,
            "0": b"",
            str(G): BODY[:G],
            "at once": BODY,
            "node": BODY,
            "promised": BODY,
        }
        assert plain_of(place) == {
            f"{way}/{name}": body for way in THROUGH for name, body in expected.items()
        }


# ---- failures on the way to the service


@pytest.mark.parametrize("kind", list(FaultKind), ids=lambda kind: kind.value)
async def test_an_upload_goes_on_after_a_failure(tmp_path: Path, kind: FaultKind) -> None:
    """Of one chunk of three the service takes a part, all without saying so, or nothing that counts."""
    async with strict_site(tmp_path) as place:
        for name, number in (("first", 0), ("middle", 1), ("last", 2)):
            way = place.ways["forward" if name == "middle" else "reverse"]
            upload = await Upload.begin(way, name)
            for before in range(number):
                stop = (before + 1) * 2 * G
                assert held(await upload.chunk(stop - 2 * G, stop)) == stop
            place.server.faults.append(Fault(kind, after_bytes=G + 5))
            assert CANARY not in place.server.held()
            done = await upload.carry_out()
            assert not place.server.faults, "it has happened"
            assert json.loads(done.body)["size"] == str(len(BODY))
            assert crc32c_of(done) == CRC32C
            await is_there(way, name)
        assert place.server.trouble == []
        assert plain_of(place) == dict.fromkeys(("first", "middle", "last"), BODY)


async def test_a_service_that_fails_again_and_again(tmp_path: Path) -> None:
    async with strict_site(tmp_path) as place:
        upload = await Upload.begin(place.ways["reverse"], "a")
        for kind in (FaultKind.ERROR, FaultKind.CUT, FaultKind.PARTIAL, FaultKind.ERROR, FaultKind.CUT) * 2:
            place.server.faults.append(Fault(kind, after_bytes=G // 2))
        await upload.carry_out(failures=20)
        assert not place.server.faults
        assert place.server.trouble == []
        assert plain_of(place) == {"a": BODY}


async def test_googles_client_gets_over_failures_as_directly(tmp_path: Path) -> None:
    """By its own retries: it asks where the upload is, or sends the chunk again as it was."""
    file = made(tmp_path / "source") / "file"
    file.write_bytes(BODY)
    async with strict_site(tmp_path) as place:
        for way in WAYS:
            faults = [Fault(kind, after_bytes=G + 5) for kind in FaultKind]
            place.server.faults.extend([*faults, Fault(FaultKind.ERROR, after_bytes=7, status=502)])
            spec = place.ways[way].spec(bucket=BOX, name=way, file=str(file), chunk_bytes=2 * G)
            assert await program("gcs_retrying.py", spec) == [len(BODY), CRC32C], way
            assert not place.server.faults
            await is_there(place.ways[way], way)
        assert place.server.trouble == []
        assert plain_of(place) == dict.fromkeys(THROUGH, BODY)


async def test_other_bytes_never_follow_on_what_may_have_left(tmp_path: Path) -> None:
    """Half of a chunk is with the service. The same goes on there; of another nothing leaves."""
    other = random_body(len(BODY))
    async with strict_site(tmp_path) as place:
        way = place.ways["forward"]
        for name, body in (("same", BODY), ("other", BODY[: 2 * G] + other[2 * G :])):
            upload = await Upload.begin(way, name)
            assert held(await upload.chunk(0, 2 * G)) == 2 * G
            place.server.faults.append(Fault(FaultKind.ERROR, after_bytes=G + 5))
            assert (await upload.chunk(2 * G, 4 * G)).status >= 500
            assert await upload.held() == 2 * G, "no more than what is sealed for good"
            asked = len(place.server.asked)
            answer = await upload.chunk(2 * G, 4 * G, body=body)
            if name == "same":
                assert held(answer) == 4 * G
                assert (await upload.carry_out()).status == 200
            else:
                assert (answer.status, answer.code) == (410, "upload-lost")
                sent = [one for one in place.server.asked[asked:] if one.body_bytes]
                assert sent == []
                assert (await upload.put("*/*")).status in (404, 410)
        assert place.server.trouble == []
        assert plain_of(place) == {"same": BODY}
        for session in place.server.sessions.values():
            assert CANARY not in session.held


async def test_bytes_that_are_stored_are_not_taken_again(tmp_path: Path) -> None:
    """As the service: what comes again is ignored, whatever it is now."""
    other = random_body(2 * G)
    async with strict_site(tmp_path) as place:
        for way in WAYS:
            upload = await Upload.begin(place.ways[way], way)
            assert held(await upload.chunk(0, 2 * G)) == 2 * G
            assert held(await upload.chunk(0, 2 * G, body=other)) == 2 * G
            assert held(await upload.chunk(0, 4 * G, body=other + BODY[2 * G :])) == 4 * G
            done = await upload.carry_out()
            assert crc32c_of(done) == CRC32C
            await is_there(place.ways[way], way)
        # Directly two requests brought other bytes; the proxy never does.
        assert [one.partition(" at ")[0] for one in place.server.trouble] == ["other bytes"] * len(
            place.server.trouble
        )


async def test_a_client_that_is_cut_off_in_a_chunk(tmp_path: Path) -> None:
    """Nothing of the chunk has left: it may come again, as another one."""
    async with strict_site(tmp_path) as place:
        way = place.ways["reverse"]
        upload = await Upload.begin(way, "a")
        assert held(await upload.chunk(0, G)) == G
        asked = len(place.server.asked)
        url = urlsplit(upload.url)
        context = ssl.create_default_context(cafile=way.ca_file)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", url.port, ssl=context, server_hostname="localhost"
        )
        head = (
            f"PUT {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {2 * G}\r\n"
            f"Content-Range: bytes {G}-{3 * G - 1}/*\r\n\r\n"
        )
        writer.write(head.encode() + BODY[G : 2 * G])
        await writer.drain()
        writer.transport.abort()
        with_end = await reader.read()
        assert b"308" not in with_end
        assert await upload.held() == G
        assert [one for one in place.server.asked[asked:] if one.body_bytes] == []
        body = BODY[:G] + random_body(len(BODY) - G)
        await upload.carry_out(body, chunk_bytes=3 * G)
        assert place.server.trouble == []
        await is_there(way, "a", body)


# ---- ends that are none


async def test_an_upload_that_the_service_has_lost(tmp_path: Path) -> None:
    """Its answers are the service's; and the client's new upload has nothing of the old one."""
    async with strict_site(tmp_path) as place:
        for way in THROUGH:
            for status in (404, 410):
                upload = await Upload.begin(place.ways[way], "a")
                assert held(await upload.chunk(0, G)) == G
                place.server.end_sessions(status)
                assert (await upload.chunk(G, 2 * G)).status == status
                for answer in (await upload.put("*/*"), await upload.chunk(G, 2 * G)):
                    assert answer.status in (404, 410)
        assert place.server.stored() == []
        assert (await (await Upload.begin(place.ways["forward"], "a")).carry_out()).status == 200
        assert place.server.trouble == []
        assert plain_of(place) == {"a": BODY}


async def test_digests_and_conditions_at_the_end(tmp_path: Path) -> None:
    """Of the plaintext, whichever way the client says them; and nothing that does not hold is an object."""
    md5 = base64.b64encode(hashlib.md5(BODY, usedforsecurity=False).digest()).decode()
    async with strict_site(tmp_path) as place:
        direct = await (await Upload.begin(place.ways["direct"], "direct")).carry_out()
        assert crc32c_of(direct) == CRC32C
        await place.ways["direct"].ask("DELETE", f"/storage/v1/b/{BOX}/o/direct")
        way, total = place.ways["reverse"], len(BODY)
        for right, wrong in (
            (f"crc32c={CRC32C}", "crc32c=AAAAAA=="),
            (f"crc32c={CRC32C},md5={md5}", f"md5={md5[::-1]}"),
        ):
            upload = await Upload.begin(way, "a")
            answer = await upload.put(f"0-{total - 1}/{total}", BODY, x_goog_hash=wrong)
            assert answer.status == 400, answer
            assert place.server.contents(BOX).keys() <= {"b"}
            upload = await Upload.begin(way, "b")
            answer = await upload.put(f"0-{total - 1}/{total}", BODY, x_goog_hash=right)
            assert (answer.status, crc32c_of(answer)) == (200, CRC32C)
        upload = await Upload.begin(way, "in chunks")
        assert held(await upload.chunk(0, 4 * G)) == 4 * G
        place_of_last = f"{4 * G}-{total - 1}/{total}"
        assert (await upload.put(place_of_last, BODY[4 * G :], x_goog_hash="crc32c=AAAAAA==")).status == 400
        assert "in chunks" not in place.server.contents(BOX)
        late = await Upload.begin(way, "c", "&ifGenerationMatch=0")
        assert (await way.put(BOX, "c", b"somebody else's")).status == 200
        assert (await late.put(None, BODY)).status == 412
        assert (await way.get(BOX, "c")).body == b"somebody else's"


# ---- proxies that come and go


@contextlib.asynccontextmanager
async def replaced(
    place: Site[StrictGcs], directory: Path, *, shared: bool = True
) -> AsyncIterator[Site[StrictGcs]]:
    """Another proxy of the service instead of this one, which is gone. *shared*: with its database."""
    await place.rig.engine.stop(grace_s=0)  # a process has one engine
    database_dir = place.rig.directory / "uploads" if shared else None
    async with (
        proxy(directory, place.ca_file, database_dir=database_dir) as rig,
        started(rig, place.server, place.ca_file, like=place) as other,
    ):
        yield other


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def at(place: Site[StrictGcs], way: str, upload: Upload) -> Upload:
    """The same upload by another proxy: in reverse mode it has another port here, and one name in life."""
    url = urlsplit(upload.url)
    base = place.ways[way].url
    return Upload(place.ways[way], f"{base}{url.path}?{url.query}")


@pytest.mark.parametrize(
    "kind", [None, FaultKind.ERROR, FaultKind.SILENT], ids=["between", "error", "silent"]
)
async def test_an_upload_goes_on_at_another_proxy(tmp_path: Path, kind: FaultKind | None) -> None:
    """Between two chunks, or with a chunk half sent, or sent with nobody left to hear of it."""
    async with strict_site(tmp_path) as one:
        upload = await Upload.begin(one.ways["reverse"], "a")
        assert held(await upload.chunk(0, 2 * G)) == 2 * G
        if kind is not None:
            one.server.faults.append(Fault(kind, after_bytes=G + 5))
            assert (await upload.chunk(2 * G, 4 * G)).status >= 500
        async with replaced(one, made(tmp_path / "two")) as two:
            upload = at(two, "forward", upload)
            assert await upload.held() == 2 * G
            await upload.carry_out()
            assert one.server.trouble == []
            assert plain_of(two) == {"a": BODY}
            await is_there(two.ways["reverse"], "a")


async def test_a_proxy_without_the_database_goes_on_with_nothing(tmp_path: Path) -> None:
    async with strict_site(tmp_path) as one:
        upload = await Upload.begin(one.ways["forward"], "a")
        assert held(await upload.chunk(0, 2 * G)) == 2 * G
        async with replaced(one, made(tmp_path / "two"), shared=False) as two:
            asked = len(one.server.asked)
            for answer in (
                await at(two, "forward", upload).put("*/*"),
                await at(two, "forward", upload).chunk(2 * G, 4 * G),
            ):
                assert (answer.status, answer.code) == (410, "upload-lost")
            assert [sent for sent in one.server.asked[asked:] if sent.body_bytes] == []
            await (await Upload.begin(two.ways["forward"], "a")).carry_out()
            assert plain_of(two) == {"a": BODY}
        assert one.server.trouble == []


async def test_a_database_that_is_away(tmp_path: Path) -> None:
    """Nothing is taken that could not be gone on with."""
    async with strict_site(tmp_path) as place:
        way = place.ways["reverse"]
        upload = await Upload.begin(way, "a")
        with contextlib.closing(sqlite3.connect(tmp_path / "uploads" / "directory.db")) as database:
            database.execute("DROP TABLE upload_session")
        asked = len(place.server.asked)
        for answer in (
            await upload.chunk(0, 2 * G), await upload.put("*/*"), await upload.put(None, BODY),
            await way.ask("POST", f"{UPLOAD}?uploadType=resumable&name=b", JSON, b"{}"),
        ):  # fmt: skip
            assert (answer.status, answer.code) == (503, "uploads-unavailable")
        assert [one for one in place.server.asked[asked:] if one.body_bytes] == []
        assert (await way.put(BOX, "whole", BODY)).status == 200, "needs none"


@pytest.mark.parametrize("is_same", [True, False], ids=["same", "other"])
async def test_a_database_that_was_brought_back(tmp_path: Path, is_same: bool) -> None:
    """What it does not remember is at the service: nothing is put behind that, and it is no object."""
    async with strict_site(tmp_path) as place:
        way = place.ways["forward"]
        upload = await Upload.begin(way, "a")
        assert held(await upload.chunk(0, G)) == G
        with contextlib.closing(sqlite3.connect(tmp_path / "uploads" / "directory.db")) as database:
            rows = database.execute("SELECT * FROM upload_session").fetchall()
            assert held(await upload.chunk(G, 3 * G)) == 3 * G
            with database:
                database.execute("DELETE FROM upload_session")
                marks = ", ".join("?" * len(rows[0]))
                database.executemany(f"INSERT INTO upload_session VALUES ({marks})", rows)
        asked = len(place.server.asked)
        answer = await upload.chunk(G, 3 * G, body=BODY if is_same else random_body(len(BODY)))
        assert (answer.status, answer.code) == (410, "upload-lost")
        assert [one for one in place.server.asked[asked:] if one.body_bytes] == []
        assert place.server.trouble == []
        assert place.server.stored() == []


async def test_one_chunk_sent_by_several_at_once(tmp_path: Path) -> None:
    """The same content: it counts once. Different contents: one of them counts, whole, or none."""
    async with strict_site(tmp_path) as place:
        way = place.ways["forward"]
        for round_ in range(3):
            upload = await Upload.begin(way, f"same {round_}")
            answers = await asyncio.gather(*(upload.chunk(0, 2 * G) for _ in range(3)))
            assert {answer.status for answer in answers} <= {308, 503}
            await upload.carry_out()
            contents = [BODY, *(random_body(len(BODY)) for _ in range(2))]
            upload = await Upload.begin(way, f"different {round_}")
            answers = await asyncio.gather(*(upload.chunk(0, 2 * G, body=body) for body in contents))
            assert {answer.status for answer in answers} <= {308, 410, 503}
        plain = plain_of(place)
        assert plain == {f"same {round_}": BODY for round_ in range(3)}
        assert not [one for one in place.server.trouble if "other bytes" in one]


async def test_keys_that_change_while_an_upload_runs(tmp_path: Path) -> None:
    async with strict_site(tmp_path) as place:
        way, owner = place.ways["reverse"], place.service.owner
        upload = await Upload.begin(way, "a")
        assert held(await upload.chunk(0, 2 * G)) == 2 * G
        (old,) = place.rig.materials[owner]
        place.rig.push(owner, key_id=old, state=KeyState.SUSPENDED)
        answer = await upload.chunk(2 * G, 4 * G)
        assert (answer.status, answer.code) == (423, "key-suspended")
        # A rotation, as one envelope says it.
        new = KeyId.random()
        place.rig.materials[owner][new] = os.urandom(32)
        states = {old: KeyState.DEACTIVATED, new: KeyState.ACTIVE}
        keys = [
            KeyMaterial(
                owner=owner, key_id=key_id, state=state, version=version,
                secret=bytearray(place.rig.materials[owner][key_id]),
            )
            for version, (key_id, state) in enumerate(states.items(), 1)
        ]  # fmt: skip
        place.rig.keys.install(owner, keys, deadline_boot_s=SystemClock().boot_s() + 300)
        await upload.carry_out()
        assert place.server.trouble == []
        await is_there(way, "a")
        stored = place.server.contents(BOX)["a"]
        assert stored[12:28] == old.raw
        assert stored.count(MAGIC + b"\x01\x01\x00\x20" + new.raw) >= 2, "its parts, and the manifest"
        assert CANARY not in stored
