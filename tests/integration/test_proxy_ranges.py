"""Ranges of sealed objects, by curl through the proxy, against WsgiDAV and against an origin that lies."""

import os
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from envelope.derive import object_key
from envelope.keys import KeyId
from envelope.objects import Sealer
from proxy.tenants.model import LegacyPolicy, ServiceEntry
from tests import pki
from tests.fakes.origin import Exchange, RecordingOrigin, Reply
from tests.integration.proxy_rig import Origin, Rig, proxy, webdav

SIZE = 3 * 16384 + 1000


@dataclass(frozen=True, slots=True)
class World:
    rig: Rig
    origin: Origin
    service: ServiceEntry
    plain: bytes


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    server = pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server")
    async with webdav(tmp_path, *server) as origin, proxy(tmp_path, ca_file) as rig:
        rig.tenant("acme")
        service = rig.service("acme/files", origin.url)
        rig.push(service.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        plain = os.urandom(SIZE)
        assert (await rig.ask(service, "/f", "-T", "-", body=plain)).status == 201
        yield World(rig, origin, service, plain)


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("0-16383", 0, 16384),
        ("16383-16384", 16383, 16385),
        ("16384-32767", 16384, 32768),
        ("20000-", 20000, SIZE),
        ("-1", SIZE - 1, SIZE),
        ("-1000", SIZE - 1000, SIZE),
        ("-1001", SIZE - 1001, SIZE),
        ("-999999999", 0, SIZE),
        (f"{SIZE - 1}-", SIZE - 1, SIZE),
        (f"5-{SIZE * 10}", 5, SIZE),
        ("0-99999999999999999999999999999999", 0, SIZE),
    ],
)
async def test_one_range_is_what_the_plaintext_has_there(
    world: World, asked: str, start: int, stop: int
) -> None:
    for version in ("--http1.1", "--http2"):
        got = await world.rig.ask(world.service, "/f", version, "-H", f"Range: bytes={asked}")
        assert (got.status, got.exit_code) == (206, 0), got.error
        assert got.body == world.plain[start:stop]
        assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
        assert got.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("asked", [f"{SIZE}-", f"{SIZE + 5}-{SIZE + 9}", "-0", "99999999999999999999999-"])
async def test_a_range_outside_is_416_with_the_plaintext_size(world: World, asked: str) -> None:
    got = await world.rig.ask(world.service, "/f", "-H", f"Range: bytes={asked}")
    assert (got.status, got.code) == (416, "range-not-satisfiable")
    assert got.headers["content-range"] == f"bytes */{SIZE}"


async def test_every_range_of_an_empty_object_is_416(world: World) -> None:
    await world.rig.ask(world.service, "/empty", "-X", "PUT", "-H", "Content-Length: 0")
    for asked in ("0-0", "0-", "-1"):
        got = await world.rig.ask(world.service, "/empty", "-H", f"Range: bytes={asked}")
        assert (got.status, got.headers["content-range"]) == (416, "bytes */0")


@pytest.mark.parametrize("size", [16384, 32768])
async def test_objects_that_end_on_a_chunk(world: World, size: int) -> None:
    plain = os.urandom(size)
    await world.rig.ask(world.service, "/even", "-T", "-", body=plain)
    got = await world.rig.ask(world.service, "/even", "-H", "Range: bytes=-5")
    assert (got.status, got.body) == (206, plain[-5:])
    assert got.headers["content-range"] == f"bytes {size - 5}-{size - 1}/{size}"


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "bytes=5-1", "lines=0-5", "bytes=a-b", "bytes=-", "bytes 0-5"]
)
async def test_what_may_be_ignored_is_the_whole_object(world: World, asked: str) -> None:
    got = await world.rig.ask(world.service, "/f", "-H", f"Range: {asked}")
    assert (got.status, got.body == world.plain) == (200, True)


async def test_if_range_decides_by_version(world: World) -> None:
    head = await world.rig.ask(world.service, "/f", "--head")
    etag = head.headers["etag"]
    for condition, status in ((etag, 206), ('"other"', 200), ("W/" + etag, 200)):
        got = await world.rig.ask(
            world.service, "/f", "-H", "Range: bytes=0-9", "-H", f"If-Range: {condition}"
        )
        assert got.status == status, condition
        assert got.body == (world.plain[:10] if status == 206 else world.plain)


async def test_an_absent_object_is_the_services_own_404(world: World) -> None:
    got = await world.rig.ask(world.service, "/absent", "-H", "Range: bytes=0-9")
    assert (got.status, got.code) == (404, None)


async def test_curl_resumes_a_download(world: World, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(world.plain[:20000])
    got = await world.rig.ask(world.service, "/f", "-C", "-", output=str(part))
    assert got.exit_code == 0
    assert part.read_bytes() == world.plain


async def test_a_damaged_tail_is_found_before_the_size_is_stated(world: World) -> None:
    path = world.origin.root / "f"
    stored = bytearray(path.read_bytes())
    stored[-1] ^= 1
    path.write_bytes(stored)
    got = await world.rig.ask(world.service, "/f", "-H", "Range: bytes=0-9")
    assert (got.status, got.code) == (502, "object-invalid")
    assert "content-range" not in got.headers


async def test_a_cut_object_is_refused_whatever_its_length(world: World) -> None:
    path = world.origin.root / "f"
    stored = path.read_bytes()
    for length in (0, 7, 50, 88, 103, 104, 88 + 16400, 88 + 16400 + 16, 88 + 2 * 16400, len(stored) - 1):
        path.write_bytes(stored[:length])
        got = await world.rig.ask(world.service, "/f", "-H", "Range: bytes=0-9")
        assert got.status in (409, 502), length
        assert world.plain[:10] not in got.body


async def test_a_range_uses_the_key_and_says_so(world: World) -> None:
    await world.rig.ask(world.service, "/f", "-H", "Range: bytes=100-199")
    assert any('"object-open"' in line and '"start":100' in line for line in world.rig.audit_lines())
    world.rig.keys.withdraw(world.service.owner)
    got = await world.rig.ask(world.service, "/f", "-H", "Range: bytes=100-199")
    assert (got.status, got.code) == (503, "key-withdrawn")


# An origin that answers ranges otherwise than it should.


@dataclass(slots=True)
class Liar:
    """Serves one sealed object by range; `answer` may change what it says to the main request."""

    rig: Rig
    service: ServiceEntry
    server: RecordingOrigin
    plain: bytes
    stored: bytes
    main: Callable[[int, int], Reply | None] = lambda _start, _stop: None
    etag: str | None = '"v1"'

    def reply(self, exchange: Exchange) -> Reply:
        headers = [("ETag", self.etag)] if self.etag else []
        asked = exchange.header("range")
        if asked is None:
            return Reply(200, headers, [self.stored])
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1
        is_probe = (start, stop) == (0, 88) or stop == len(self.stored)
        changed = None if is_probe else self.main(start, stop)
        if changed is not None:
            return changed
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(self.stored)}"))
        return Reply(206, headers, [self.stored[start:stop]])


@pytest.fixture
async def liar(tmp_path: Path) -> AsyncIterator[Liar]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    files = pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    async with RecordingOrigin(context).listening() as server, proxy(tmp_path, ca_file) as rig:
        rig.tenant("acme")
        service = rig.service("acme/files", f"https://localhost:{server.port}")
        key_id = rig.push(service.owner)
        plain = os.urandom(SIZE)
        stored = _sealed(rig, service, key_id, plain)
        lying = Liar(rig, service, server, plain, stored)
        server.reply = lying.reply
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        yield lying


def _sealed(rig: Rig, service: ServiceEntry, key_id: KeyId, plain: bytes) -> bytes:
    key = object_key(rig.materials[service.owner][key_id], service.owner, key_id)
    sealer = Sealer(key, service.owner, key_id)
    return bytes(sealer.update(plain)) + sealer.finalize()


async def ask(liar: Liar, asked: str = "16384-16483") -> tuple[int, str | None, bytes]:
    got = await liar.rig.ask(liar.service, "/f", "-H", f"Range: bytes={asked}")
    return got.status, got.code, got.body


async def test_the_main_request_is_pinned_to_what_was_probed(liar: Liar) -> None:
    assert await ask(liar) == (206, None, liar.plain[16384:16484])
    main = liar.server.exchanges[-1]
    assert main.header("if-match") == '"v1"'
    assert main.header("range") == f"bytes={88 + 16400}-{88 + 2 * 16400 - 1}"
    assert main.header("accept-encoding") == "identity"


async def test_a_proven_size_is_asked_for_once_per_version(liar: Liar) -> None:
    await ask(liar)
    first = len(liar.server.exchanges)
    await ask(liar)
    assert (first, len(liar.server.exchanges) - first) == (3, 2)


async def test_without_a_strong_etag_nothing_is_remembered_or_pinned(liar: Liar) -> None:
    liar.etag = 'W/"v1"'
    for _ in range(2):
        assert await ask(liar) == (206, None, liar.plain[16384:16484])
    assert len(liar.server.exchanges) == 6
    assert liar.server.exchanges[-1].header("if-match") is None


async def test_another_range_than_asked_is_refused(liar: Liar) -> None:
    def shifted(start: int, stop: int) -> Reply:
        where = f"bytes {start + 1}-{stop}/{len(liar.stored)}"
        return Reply(206, [("ETag", '"v1"'), ("Content-Range", where)], [liar.stored[start + 1 : stop + 1]])

    liar.main = shifted
    assert (await ask(liar))[:2] == (502, "upstream-changed")


async def test_the_right_range_with_the_wrong_bytes_is_refused(liar: Liar) -> None:
    def moved(start: int, stop: int) -> Reply:
        where = f"bytes {start}-{stop - 1}/{len(liar.stored)}"
        return Reply(206, [("ETag", '"v1"'), ("Content-Range", where)], [liar.stored[88 : 88 + stop - start]])

    liar.main = moved
    assert (await ask(liar))[:2] == (502, "object-invalid")


async def test_another_total_is_refused(liar: Liar) -> None:
    def grown(start: int, stop: int) -> Reply:
        where = f"bytes {start}-{stop - 1}/{len(liar.stored) + 16400}"
        return Reply(206, [("ETag", '"v1"'), ("Content-Range", where)], [liar.stored[start:stop]])

    liar.main = grown
    assert (await ask(liar))[:2] == (502, "upstream-changed")


async def test_another_version_is_refused(liar: Liar) -> None:
    def replaced(start: int, stop: int) -> Reply:
        where = f"bytes {start}-{stop - 1}/{len(liar.stored)}"
        return Reply(206, [("ETag", '"v2"'), ("Content-Range", where)], [liar.stored[start:stop]])

    liar.main = replaced
    assert (await ask(liar))[:2] == (502, "upstream-changed")
    liar.main = lambda _start, _stop: Reply(412, [], [b"changed"])
    assert (await ask(liar))[:2] == (502, "upstream-changed")


async def test_a_service_that_ignores_the_range_gives_the_whole(liar: Liar) -> None:
    liar.main = lambda _start, _stop: Reply(200, [("ETag", '"v1"')], [liar.stored])
    assert await ask(liar) == (200, None, liar.plain)


async def test_a_206_nobody_asked_for_is_refused(liar: Liar) -> None:
    def partial(_exchange: Exchange) -> Reply:
        where = f"bytes 0-99/{len(liar.stored)}"
        return Reply(206, [("Content-Range", where)], [liar.stored[:100]])

    liar.server.reply = partial
    got = await liar.rig.ask(liar.service, "/f")
    assert (got.status, got.code) == (502, "upstream-changed")


async def test_legacy_ranges_pass_only_where_the_policy_says_so(liar: Liar) -> None:
    liar.stored = legacy = os.urandom(60_000)
    assert (await ask(liar, "100-199"))[:2] == (409, "not-sealed")
    migrating = ServiceEntry(
        owner=liar.service.owner,
        upstream=liar.service.upstream,
        profile="generic",
        legacy=LegacyPolicy.MIGRATE,
        reverse_listen=liar.service.reverse_listen,
        certificate=None,
        key_file=liar.service.key_file,
    )
    liar.rig.services[migrating.owner] = migrating
    await liar.rig.engine.apply(liar.rig.picture())
    assert await ask(liar, "100-199") == (206, None, legacy[100:200])
    assert liar.rig.metric("sealgate_legacy_passed_total", tenant="acme", service="files") == 1
