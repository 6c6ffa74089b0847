"""Room that tenants share: one that begins bodies and does not end them leaves the others their part."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from envelope.objects import CHUNK_SIZE
from proxy.bodies.collecting import Collecting
from proxy.bodies.spool import Spools
from proxy.tenants.model import ServiceEntry
from tests.fakes.origin import RecordingOrigin, Reply
from tests.integration.attack_rig import Stream
from tests.integration.proxy_rig import Answer, Rig, curl, proxy, until

READ_BYTES, HELD_BYTES = 4000, 100_000
"""Half of it is a tenant's."""
SPACE = b" " * 1000
PROPFIND = b'<?xml version="1.0"?><propfind xmlns="DAV:"><prop><getetag/></prop><!--%b--></propfind>' % SPACE
LISTED = b'<?xml version="1.0"?><multistatus xmlns="DAV:"></multistatus>'
BOUNDARY = b"--room-for-others"
FORM = BOUNDARY + b'\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + bytes(45_000)
FORM += b"\r\n" + BOUNDARY + b"--\r\n"


@dataclass
class Room:
    rig: Rig
    origin: RecordingOrigin
    spools: Spools
    collecting: Collecting

    def services(self, profile: str) -> list[ServiceEntry]:
        """Of acme and globex."""
        return [
            self.rig.service(f"{tenant}/{profile}", f"http://localhost:{self.origin.port}", profile=profile)
            for tenant in ("acme", "globex")
        ]

    async def start(self) -> None:
        for owner in self.rig.services:
            self.rig.push(owner)
        await self.rig.engine.prepare()
        await self.rig.engine.start(self.rig.picture())
        assert self.rig.engine.problems == []

    @contextlib.asynccontextmanager
    async def begun(self, service: ServiceEntry, head: bytes, part: bytes) -> AsyncIterator[Stream]:
        """A request of which a part is here."""
        assert service.reverse_listen is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", service.reverse_listen.port)
        try:
            writer.write(head + part)
            yield reader, writer
        finally:
            writer.transport.abort()

    async def ask(self, service: ServiceEntry, *arguments: str, body: bytes) -> Answer:
        assert service.reverse_listen is not None
        url = f"http://127.0.0.1:{service.reverse_listen.port}/x"
        return await curl(*arguments, "-H", "Expect:", "--data-binary", "@-", url, body=body)


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    spools = Spools(limit_bytes=HELD_BYTES, directory=tmp_path)
    collecting = Collecting(limit_bytes=READ_BYTES)
    async with (
        RecordingOrigin().listening() as origin,
        proxy(tmp_path, None, spools=spools, collecting=collecting) as rig,
    ):
        rig.tenant("acme")
        rig.tenant("globex")
        yield Room(rig, origin, spools, collecting)


async def test_bodies_that_are_read_first(room: Room) -> None:
    acme, globex = room.services("webdav")
    room.origin.reply = Reply(207, [("Content-Type", "application/xml")], [LISTED])
    await room.start()
    asks = ("-X", "PROPFIND", "-H", "Content-Type: application/xml", "-H", "Depth: 0")
    head = (
        b"PROPFIND /x HTTP/1.1\r\nHost: 127.0.0.1\r\nDepth: 0\r\nContent-Type: application/xml\r\n"
        b"Content-Length: %d\r\n\r\n" % len(PROPFIND)
    )
    async with room.begun(acme, head, PROPFIND[:1000]) as stream:
        await until(lambda: room.collecting.held_bytes == 1000)
        refused = await room.ask(acme, *asks, body=PROPFIND)
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "memory-share", "2")
        assert (await room.ask(globex, *asks, body=PROPFIND)).status == 207
        stream[1].write(PROPFIND[1000:])
        async with asyncio.timeout(30):
            assert (await stream[0].readline()).startswith(b"HTTP/1.1 207")
        await until(lambda: room.collecting.held_bytes == 0)
        assert (await room.ask(acme, *asks, body=PROPFIND)).status == 207
    async with room.begun(acme, head, PROPFIND[:1000]):
        await until(lambda: room.collecting.held_bytes == 1000)
    await until(lambda: room.collecting.held_bytes == 0)  # who has gone holds nothing


async def test_uploads_that_are_held(room: Room) -> None:
    acme, globex = room.services("web")
    await room.start()
    asks = ("-X", "POST", "-H", "Content-Type: multipart/form-data; boundary=room-for-others")
    head = (
        b"POST /x HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: multipart/form-data; boundary=room-for-others\r\n"
        b"Content-Length: %d\r\n\r\n" % len(FORM)
    )
    async with room.begun(acme, head, FORM[:40_000]):
        await until(lambda: room.spools.held_bytes > 2 * CHUNK_SIZE)
        answer = await room.ask(acme, *asks, body=FORM)
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "spool-share", "10")
        assert (await room.ask(globex, *asks, body=FORM)).status == 200
    await until(lambda: room.spools.held_bytes == 0)
    assert (await room.ask(acme, *asks, body=FORM)).status == 200
