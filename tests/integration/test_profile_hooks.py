"""What profiles can plan, carried out by the real engine on real sockets: all signed, none in the clear."""

import hashlib
import json
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from envelope.derive import object_key
from envelope.multipart import part_sealer, upload_ref
from envelope.objects import Bind, Opener, sealed_length
from proxy.tenants.model import ServiceEntry
from tests import pki
from tests.fakes.object_store import ObjectStore
from tests.fakes.origin import End, Exchange, RecordingOrigin, Reply
from tests.fakes.probing_profile import ProbingProfile, framed, signature
from tests.integration.proxy_rig import Answer, Rig, proxy

CANARY = b"canary-5c1d-in-the-clear-" * 700  # more than a record


@dataclass(frozen=True, slots=True)
class World:
    rig: Rig
    origin: RecordingOrigin
    store: ObjectStore
    service: ServiceEntry
    mode: str

    async def ask(self, path: str, *arguments: str, body: bytes | None = None) -> Answer:
        return await self.rig.ask(self.service, path, *arguments, mode=self.mode, body=body)

    def opened(self, path: str) -> bytes:
        return self.rig.open_independently(self.service.owner, self.store.objects[path])


@pytest.fixture(params=["reverse", "forward"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server"))
    profile = ProbingProfile()
    async with (
        RecordingOrigin(context).listening() as origin,
        proxy(tmp_path, ca_file, profiles={profile.name: profile}) as rig,
    ):
        store = ObjectStore()
        store.serve(origin)
        rig.tenant("acme")
        service = rig.service("acme/files", f"https://localhost:{origin.port}", profile="probing")
        rig.push(service.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        yield World(rig, origin, store, service, request.param)
        for exchange in origin.exchanges:  # whatever left, and by whichever road
            assert exchange.header("x-signature") == signature(exchange.method, exchange.path)
            assert exchange.header("host") == f"localhost:{origin.port}"
        assert not origin.saw(CANARY[:32])
        for stored in store.objects.values():
            assert CANARY[:32] not in stored


# ---- uploads


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_decoded_body_is_sealed(world: World, chunked: bool) -> None:
    more = ["-H", "Transfer-Encoding: chunked"] if chunked else []
    got = await world.ask(
        "/framed/a",
        "-T",
        "-",
        *more,
        *([] if chunked else ["-H", f"Content-Length: {len(framed(CANARY))}"]),
        body=framed(CANARY),
    )
    assert got.status == 201
    assert world.opened("/framed/a") == CANARY


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_a_body_whose_decoder_objects_is_not_stored(world: World, version: str) -> None:
    wrong = framed(CANARY)[:-1] + b"!"
    got = await world.ask("/framed/a", "-T", "-", version, body=wrong)
    assert (got.status, got.code, got.body) == (400, "bad-digest", b"PUT bad-digest")
    assert got.headers["content-type"] == "text/probe"
    assert got.headers["x-probe-error"] == got.headers["sealgate-error"]
    assert world.store.objects == {}


async def test_what_a_part_became_is_told_before_the_client_is_answered(world: World) -> None:
    got = await world.ask(
        "/part/u1/7", "-H", "Content-Type: a/b", "-X", "PUT", "--data-binary", "@-", body=CANARY
    )
    assert got.status == 201
    size, commitment, digest = got.headers["x-sealed"].split()
    stored = world.store.objects["/part/u1/7"]
    assert (int(size), commitment) == (len(stored), stored[56:88].hex())
    assert digest == hashlib.md5(CANARY, usedforsecurity=False).hexdigest()
    materials = world.rig.materials[world.service.owner]
    opener = Opener(
        world.service.owner,
        lambda header: object_key(materials[header.key_id], world.service.owner, header.key_id),
        bind=Bind.PART,
        name=upload_ref("u1") + (7).to_bytes(4),
    )
    assert bytes(opener.update(stored)) + opener.finalize() == CANARY


async def test_an_upload_whose_record_fails_is_a_failure(world: World) -> None:
    def reply(exchange: Exchange) -> Reply:
        answer = world.store.reply(exchange)
        return Reply(answer.status, [*answer.headers, ("X-Fail", "1")], answer.pieces)

    world.origin.reply = reply
    got = await world.ask("/part/u1/7", "-X", "PUT", "--data-binary", "@-", body=CANARY)
    assert (got.status, got.code) == (502, "service-answer")


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_a_reshaped_body_has_the_length_that_was_found_in_it(world: World, version: str) -> None:
    body = b"a head\n" + CANARY
    got = await world.ask("/wrapped/a", version, "-X", "PUT", "--data-binary", "@-", body=body)
    assert got.status == 201
    line, _, sealed = world.store.objects["/wrapped/a"].partition(b"\n")
    assert (line, world.rig.open_independently(world.service.owner, sealed)) == (b"a head", CANARY)
    assert world.origin.exchanges[-1].header("content-length") == str(7 + sealed_length(len(CANARY)))


async def test_a_reshaped_body_of_unknown_length_is_chunked(world: World) -> None:
    body = b"a head\n" + CANARY
    got = await world.ask("/wrapped/a", "--http1.1", "-T", "-", body=body)
    assert got.status == 201
    assert world.origin.exchanges[-1].header("content-length") is None
    assert world.store.objects["/wrapped/a"].startswith(b"a head\n\x89SGT")


async def test_a_body_that_cannot_be_reshaped_stays_here(world: World) -> None:
    got = await world.ask("/wrapped/a", "-X", "PUT", "--data-binary", "@-", body=b"no line end")
    assert (got.status, got.code) == (400, "bad-message")
    assert world.store.objects == {}


async def test_a_small_body_passes_by_a_rule_and_a_large_one_does_not(world: World) -> None:
    put = ("-X", "PUT", "--data-binary", "@-")
    assert (await world.ask("/control", *put, body=b"<settings/>")).status == 201
    assert world.store.objects["/control"] == b"<settings/>"
    assert (await world.ask("/control", *put, body=bytes(101))).status == 413
    assert (await world.ask("/control", "-T", "-", body=bytes(101))).status == 413
    assert world.store.objects["/control"] == b"<settings/>"


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("size", [0, 10, 1_000_000])
async def test_a_spooled_body_goes_up_with_its_length(world: World, version: str, size: int) -> None:
    content = (CANARY * 60)[:size]
    got = await world.ask("/spooled/a", version, "-T", "-", body=content)
    assert (got.status, got.body, got.headers["etag"]) == (201, b"created", '"v1"')
    assert world.opened("/spooled/a") == content
    (exchange,) = world.origin.exchanges
    assert exchange.header("content-length") == str(sealed_length(size))
    assert exchange.header("transfer-encoding") is None


async def test_a_spooled_body_that_is_not_what_was_said_is_not_sent(world: World) -> None:
    wrong = ["-H", "Content-Length: 100", "-X", "PUT", "--http1.1", "--max-time", "2"]
    got = await world.ask("/spooled/a", *wrong, "--data-binary", "@-", body=CANARY[:50])
    assert got.status != 201
    assert world.origin.exchanges == []


# ---- conversations


async def composite(world: World, contents: list[bytes], path: str = "/whole") -> None:
    """*contents* uploaded as parts and joined, by the client's own requests."""
    lines = [f"u2 {path}"]
    for number, content in enumerate(contents, 1):
        name = f"/part/u2/{number}"
        got = await world.ask(name, "-X", "PUT", "--data-binary", "@-", body=content)
        assert got.status == 201
        size, commitment, _ = got.headers["x-sealed"].split()
        lines.append(f"{name} {number} {size} {commitment}")
    got = await world.ask("/complete", "--data-binary", "@-", body="\n".join(lines).encode())
    assert (got.status, got.body) == (200, b"joined")


PARTS = [os.urandom(40_000), os.urandom(16_384), b"", os.urandom(5)]
WHOLE = b"".join(PARTS)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_a_composite_is_read_like_any_object(world: World, version: str) -> None:
    await composite(world, PARTS)
    got = await world.ask("/whole", version)
    assert (got.status, got.body == WHOLE) == (200, True)
    assert got.headers["content-length"] == str(len(WHOLE))
    head = await world.ask("/whole", "-I", version)
    assert (head.status, head.headers["content-length"]) == (200, str(len(WHOLE)))
    assert head.headers["etag"] == '"v1"'


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("0-16383", 0, 16_384),
        ("20000-20009", 20_000, 20_010),
        ("39999-40000", 39_999, 40_001),
        ("40000-56383", 40_000, 56_384),
        ("45000-56386", 45_000, 56_387),
        ("56384-", 56_384, 56_389),
        ("-1", 56_388, 56_389),
        ("-30000", 26_389, 56_389),
        ("0-", 0, 56_389),
    ],
)
async def test_ranges_of_a_composite(world: World, asked: str, start: int, stop: int) -> None:
    await composite(world, PARTS)
    before = len(world.origin.exchanges)
    got = await world.ask("/whole", "-r", asked)
    assert (got.status, got.body == WHOLE[start:stop]) == (206, True)
    assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(WHOLE)}"
    again = await world.ask("/whole", "-r", asked)
    assert again.body == got.body
    asked_for = [exchange.header("range") for exchange in world.origin.exchanges[before:]]
    stored_bytes = len(world.store.objects["/whole"])
    tail = f"bytes={stored_bytes - 16}-{stored_bytes - 1}"
    assert asked_for.count(tail) == 1  # the manifest is remembered for its version
    outside = await world.ask("/whole", "-H", "Range: bytes=56389-")
    assert (outside.status, outside.headers["content-range"]) == (416, f"bytes */{len(WHOLE)}")


async def test_if_range_of_a_composite(world: World) -> None:
    await composite(world, PARTS)
    same = await world.ask("/whole", "-r", "1-2", "-H", 'If-Range: "v1"')
    assert (same.status, same.body) == (206, WHOLE[1:3])
    other = await world.ask("/whole", "-r", "1-2", "-H", 'If-Range: "v0"')
    assert (other.status, other.body == WHOLE) == (200, True)


def _cut(stored: bytes) -> bytes:
    return stored[:-1]


def _without_a_part(stored: bytes) -> bytes:
    return stored[sealed_length(len(PARTS[0])) :]


def _flipped(stored: bytes) -> bytes:
    return stored[:200] + bytes([stored[200] ^ 1]) + stored[201:]


def _flipped_manifest(stored: bytes) -> bytes:
    return stored[:-40] + bytes([stored[-40] ^ 1]) + stored[-39:]


def _only_parts(stored: bytes) -> bytes:
    return stored[: sum(sealed_length(len(part)) for part in PARTS)]


@pytest.mark.parametrize("damage", [_cut, _without_a_part, _flipped, _flipped_manifest, _only_parts])
async def test_a_damaged_composite_gives_nothing(world: World, damage: object) -> None:
    await composite(world, PARTS)
    world.store.put("/whole", damage(world.store.objects["/whole"]))  # type: ignore[operator]
    got = await world.ask("/whole")
    assert (got.status, got.code) == (502, "object-invalid")
    ranged = await world.ask("/whole", "-r", "0-9")
    assert ranged.code == "object-invalid"


async def test_a_part_replaced_by_a_superseded_one_is_noticed(world: World) -> None:
    await composite(world, PARTS)
    key_id = next(iter(world.rig.materials[world.service.owner]))
    key = object_key(world.rig.materials[world.service.owner][key_id], world.service.owner, key_id)
    sealer = part_sealer(key, world.service.owner, key_id, upload=upload_ref("u2"), number=1)
    other = bytes(sealer.update(PARTS[0])) + sealer.finalize()
    world.store.put("/whole", other + world.store.objects["/whole"][len(other) :])
    assert (await world.ask("/whole")).code == "object-invalid"
    assert (await world.ask("/whole", "-r", "0-9")).code == "object-invalid"


async def test_a_copy_is_opened_and_sealed_again(world: World) -> None:
    await composite(world, [CANARY, CANARY])
    got = await world.ask("/copy/to", "-X", "POST", "-H", "X-Source: /whole")
    assert got.status == 201
    assert got.body.startswith(f"{2 * len(CANARY)}/{2 * len(CANARY)} ".encode())
    assert world.opened("/to") == CANARY * 2
    got = await world.ask(
        "/copy/some", "-X", "POST", "-H", "X-Source: /to", "-H", "X-Source-Range: bytes=5-20000"
    )
    assert got.status == 201
    assert world.opened("/some") == (CANARY * 2)[5:20_001]
    events = [json.loads(line) for line in world.rig.audit_lines()]
    sealed = [event for event in events if event.get("action") == "object-seal"]
    assert {event["path"] for event in sealed} >= {"/to", "/some"}


async def test_a_copy_whose_source_breaks_has_no_end(world: World) -> None:
    await composite(world, [CANARY, CANARY])
    stored = world.store.objects["/whole"]
    at = sealed_length(len(CANARY)) + 5_000  # in the second part
    world.store.put("/whole", stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :])
    got = await world.ask("/copy/to", "-X", "POST", "-H", "X-Source: /whole")
    assert got.status == 502
    assert "/to" not in world.store.objects
    assert [exchange.end for exchange in world.origin.exchanges if exchange.path == "/to"] in ([], [End.CUT])


async def test_a_handler_that_fails_refuses(world: World) -> None:
    got = await world.ask("/raise", "--data-binary", "@-", body=b"text")
    assert (got.status, got.code, got.body) == (502, "internal", b"POST internal")
    assert world.origin.exchanges == []


async def test_a_body_to_be_collected_is_limited(world: World) -> None:
    got = await world.ask("/complete", "--data-binary", "@-", body=bytes(1001))
    assert (got.status, got.code) == (413, "too-large")
    assert world.origin.exchanges == []


# ---- answers


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
async def test_a_list_is_mapped_as_it_streams(world: World, version: str) -> None:
    await composite(world, PARTS)
    await world.ask("/framed/a", "-T", "-", body=framed(CANARY))
    names = ("/whole", "/framed/a")
    lines = [(name, world.store.etag(name), len(world.store.objects[name])) for name in names]
    world.store.put(
        "/list", "".join(f"{name} {etag} {size}\n" for name, etag, size in lines).encode() + b"end"
    )
    got = await world.ask("/list", version)
    assert (got.status, got.exit_code) == (200, 0)
    assert got.body == f"/whole {len(WHOLE)}\n/framed/a {len(CANARY)}\nend".encode()
    head = await world.ask("/list", "-I", version)
    assert (head.status, "content-length" in head.headers) == (200, False)


async def test_a_small_answer_is_mapped_as_a_whole(world: World) -> None:
    world.store.put("/small", b"text")
    got = await world.ask("/small")
    assert (got.status, got.body, got.headers["content-length"]) == (201, b"TEXT", "4")
    assert got.headers["x-mapped"] == "yes"
    world.store.put("/small", bytes(101))
    got = await world.ask("/small")
    assert (got.status, got.code) == (502, "service-answer")


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_an_answer_from_here_needs_no_service(world: World, version: str) -> None:
    got = await world.ask("/local", "-X", "OPTIONS", version)
    assert (got.status, got.body, got.headers["x-local"]) == (200, b"from here", "yes")
    got = await world.ask("/local", "-X", "OPTIONS", version, "--data-binary", "@-", body=CANARY)
    assert (got.status, got.body) == (200, b"from here")
    assert world.origin.exchanges == []
    assert world.rig.metric("sealgate_active_requests") == 0


@pytest.mark.parametrize("asked", ["0-9", "17000-17009", "-5", "17400-"])
async def test_a_range_of_what_changed_meanwhile_is_read_again_once(world: World, asked: str) -> None:
    contents = [CANARY, CANARY[::-1] + b"longer" * 500]
    for path, content in zip(("/framed/a", "/framed/b"), contents, strict=True):
        await world.ask(path, "-T", "-", body=framed(content))
    replaced: list[str] = []

    def between(exchange: Exchange) -> None:
        reads = [each for each in world.origin.exchanges if each.method == "GET"]
        if len(reads) == 3 and not replaced:  # after the beginning and the last record
            replaced.append(exchange.path)
            world.store.put("/framed/a", world.store.objects["/framed/b"])

    world.store.between = between
    got = await world.ask("/framed/a", "-r", asked)
    first, _, last = asked.partition("-")
    new = contents[1]
    start = int(first) if first else len(new) - int(last)
    stop = min(int(last) + 1, len(new)) if first and last else len(new)
    assert replaced
    assert (got.status, got.body == new[start:stop]) == (206, True)
    assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(new)}"
    assert (got.headers["etag"], got.headers["content-length"]) == ('"v2"', str(stop - start))
    assert not any(name.startswith("transfer") for name in got.headers)


async def test_what_was_looked_at_and_changed_is_refused(world: World) -> None:
    await world.ask("/framed/a", "-T", "-", body=framed(CANARY))
    stored = world.store.objects["/framed/a"]

    def between(exchange: Exchange) -> None:
        if exchange.header("range") == "bytes=0-87":
            return
        world.store.put("/framed/a", stored)

    world.store.between = between
    got = await world.ask("/framed/a", "-r", "0-9")
    assert (got.status, got.code) == (502, "upstream-changed")
