"""Every state a stored object can be in, read by GET, HEAD and range from a real server: each has its answer.

And uploads of what is sealed already: wrapped, or passed, and never silently.
"""

import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from envelope.derive import object_key
from envelope.keys import KeyId, KeyState, NetworkService
from envelope.objects import Sealer, has_magic
from proxy.tenants.model import ServiceEntry
from tests import pki
from tests.integration.proxy_rig import Answer, Origin, Rig, proxy, webdav

PLAIN = os.urandom(40_000)
LABELS = {"tenant": "acme", "service": "files"}
ROUTES = {"legacy": {"/raw": "passthrough", "/old": "migrate", "/old/strict": "strict"}}


@dataclass(slots=True)
class World:
    rig: Rig
    origin: Origin
    service: ServiceEntry
    key_id: KeyId

    def seal(self, key_id: KeyId | None = None, owner: NetworkService | None = None) -> bytes:
        """PLAIN, sealed by the owner of the key."""
        owner, key_id = owner or self.service.owner, key_id or self.key_id
        sealer = Sealer(object_key(self.rig.materials[owner][key_id], owner, key_id), owner, key_id)
        return bytes(sealer.update(PLAIN)) + sealer.finalize()

    def store(self, path: str, content: bytes) -> None:
        file = self.origin.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    async def ask(self, path: str, *arguments: str, body: bytes | None = None) -> Answer:
        return await self.rig.ask(self.service, path, *arguments, body=body)

    async def options(self, **options: object) -> None:
        self.service = dataclasses.replace(self.service, profile_options=options)
        self.rig.services[self.service.owner] = self.service
        await self.rig.engine.apply(self.rig.picture())

    def actions(self) -> list[str]:
        return [json.loads(line).get("action", "") for line in self.rig.audit_lines()]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    server = pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server")
    async with webdav(tmp_path, *server) as origin, proxy(tmp_path, ca_file) as rig:
        rig.tenant("acme")
        rig.tenant("other")
        service = dataclasses.replace(rig.service("acme/files", origin.url), profile_options=ROUTES)
        rig.services[service.owner] = service
        key_id = rig.push(service.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        yield World(rig, origin, service, key_id)


# ---- what makes a state


def sealed(world: World) -> bytes:
    return world.seal()


def legacy(_world: World) -> bytes:
    return PLAIN


def of_another_tenant(world: World) -> bytes:
    other = NetworkService("other", "files")
    return world.seal(world.rig.push(other), other)


def of_an_unknown_key(world: World) -> bytes:
    unknown = KeyId.random()
    world.rig.materials[world.service.owner][unknown] = os.urandom(32)
    content = world.seal(unknown)
    del world.rig.materials[world.service.owner][unknown]
    return content


def of_a_key_that_is(state: KeyState) -> Callable[[World], bytes]:
    def make(world: World) -> bytes:
        content = world.seal()
        old, owner = world.key_id, world.service.owner
        world.key_id = world.rig.push(owner)
        world.rig.push(owner, key_id=old, state=state)
        return content

    make.__name__ = state.value
    return make


def of_a_withdrawn_key(world: World) -> bytes:
    content = world.seal()
    world.rig.keys.withdraw(world.service.owner)
    return content


def truncated(world: World) -> bytes:
    return world.seal()[:-1]


def cut_at_a_record(world: World) -> bytes:
    return world.seal()[: 88 + 2 * 16_400]


def cut_in_its_head(world: World) -> bytes:
    return world.seal()[:50]


def appended(world: World) -> bytes:
    return world.seal() + b"x"


def tampered(world: World) -> bytes:
    content = bytearray(world.seal())
    content[100] ^= 1
    return bytes(content)


def tampered_commitment(world: World) -> bytes:
    content = bytearray(world.seal())
    content[60] ^= 1
    return bytes(content)


def records_swapped(world: World) -> bytes:
    content = world.seal()
    one, two = content[88 : 88 + 16_400], content[88 + 16_400 : 88 + 2 * 16_400]
    return content[:88] + two + one + content[88 + 2 * 16_400 :]


def mixed_versions(world: World) -> bytes:
    return world.seal()[:88] + world.seal()[88:]


def of_a_newer_version(world: World) -> bytes:
    content = bytearray(world.seal())
    content[8] = 2
    return bytes(content)


def a_part_alone(world: World) -> bytes:
    content = bytearray(world.seal())
    content[28] = 3
    return bytes(content)


def sealed_twice(world: World) -> bytes:
    inner = world.seal()
    key = object_key(
        world.rig.materials[world.service.owner][world.key_id], world.service.owner, world.key_id
    )
    sealer = Sealer(key, world.service.owner, world.key_id)
    return bytes(sealer.update(inner)) + sealer.finalize()


def empty(_world: World) -> bytes:
    return b""


type Told = tuple[int, str | None]
OPENS: Told = (200, None)
INVALID: Told = (502, "object-invalid")

# state -> (GET, range, HEAD): status and code. HEAD looks at no byte: it tells what arithmetic does.
STRICT = [
    (sealed, OPENS, OPENS, OPENS),
    (legacy, (409, "not-sealed"), (409, "not-sealed"), OPENS),
    (empty, INVALID, INVALID, INVALID),
    (of_another_tenant, (503, "key-unknown"), (503, "key-unknown"), OPENS),
    (of_an_unknown_key, (503, "key-unknown"), (503, "key-unknown"), OPENS),
    (of_a_key_that_is(KeyState.DEACTIVATED), OPENS, OPENS, OPENS),
    (of_a_key_that_is(KeyState.SUSPENDED), (423, "key-suspended"), (423, "key-suspended"), OPENS),
    (of_a_key_that_is(KeyState.COMPROMISED), (423, "key-suspended"), (423, "key-suspended"), OPENS),
    (of_a_key_that_is(KeyState.DESTROYED), (410, "key-destroyed"), (410, "key-destroyed"), OPENS),
    (of_a_withdrawn_key, (503, "key-withdrawn"), (503, "key-withdrawn"), OPENS),
    (truncated, None, INVALID, OPENS),
    (cut_at_a_record, INVALID, INVALID, INVALID),
    (cut_in_its_head, INVALID, INVALID, INVALID),
    (appended, None, INVALID, OPENS),
    (tampered, INVALID, INVALID, OPENS),
    (tampered_commitment, INVALID, INVALID, OPENS),
    (records_swapped, INVALID, INVALID, OPENS),
    (mixed_versions, INVALID, INVALID, OPENS),
    (of_a_newer_version, INVALID, INVALID, OPENS),
    (a_part_alone, INVALID, INVALID, OPENS),
    (sealed_twice, OPENS, OPENS, OPENS),
]


@pytest.mark.parametrize(
    ("make", "whole", "ranged", "head"), STRICT, ids=[make.__name__ for make, *_ in STRICT]
)
async def test_a_state_has_its_answer(
    world: World, make: Callable[[World], bytes], whole: Told | None, ranged: Told, head: Told
) -> None:
    content = make(world)
    world.store("/o", content)
    got = await world.ask("/o")
    if whole is None:  # found out at the end: all that verified came, and no proper end
        assert got.exit_code != 0
        assert PLAIN.startswith(got.body)
    elif whole == OPENS:
        assert (got.status, got.code) == OPENS
        assert got.body == PLAIN or (make is sealed_twice and has_magic(got.body))
    else:
        assert (got.status, got.code) == whole
        assert PLAIN[:16] not in got.body
    part = await world.ask("/o", "-r", "10-19")
    if ranged == OPENS:
        assert part.status == 206
        assert part.body == PLAIN[10:20] or make is sealed_twice
    else:
        assert (part.status, part.code) == ranged
        assert PLAIN[10:20] not in part.body
    size = await world.ask("/o", "-I")
    assert (size.status, size.code) == head
    if head == OPENS and make is sealed:
        assert size.headers["content-length"] == str(len(PLAIN))


MIGRATE = [
    (sealed, OPENS, 0),
    (legacy, OPENS, 3),
    (empty, OPENS, 0),
    (of_another_tenant, (503, "key-unknown"), 0),
    (of_a_key_that_is(KeyState.DESTROYED), (410, "key-destroyed"), 0),
    (tampered_commitment, INVALID, 0),
    (cut_in_its_head, INVALID, 0),
]


@pytest.mark.parametrize(("make", "told", "passed"), MIGRATE, ids=[make.__name__ for make, *_ in MIGRATE])
async def test_a_migrating_route_passes_what_was_never_sealed_and_nothing_else(
    world: World, make: Callable[[World], bytes], told: Told, passed: int
) -> None:
    content = make(world)
    world.store("/old/o", content)
    got = await world.ask("/old/o")
    assert (got.status, got.code) == told
    if told == OPENS:
        assert got.body == (b"" if make is empty else PLAIN)
        assert got.headers["content-length"] == str(len(got.body))
        if make is not empty:
            part = await world.ask("/old/o", "-r", "10-19")
            assert (part.status, part.body) == (206, PLAIN[10:20])
            tail = await world.ask("/old/o", "-r", "-10")
            assert (tail.status, tail.body) == (206, PLAIN[-10:])
        size = await world.ask("/old/o", "-I")
        assert size.headers["content-length"] == str(len(got.body))
    assert world.rig.metric("sealgate_legacy_passed_total", **LABELS) == passed
    assert world.actions().count("object-passed-unsealed") == passed


@pytest.mark.parametrize("path", ["/old/strict/o", "/older/o", "/old%2Fstrict/../o", "/%6Fld/o", "/o"])
async def test_a_route_is_no_other_than_its_own(world: World, path: str) -> None:
    for place in ("/old/strict/o", "/older/o", "/old/o", "/o"):
        world.store(place, PLAIN)
    got = await world.ask(path, "--path-as-is")
    assert got.code == "not-sealed" or got.status == 404
    assert PLAIN[:16] not in got.body


async def test_a_route_may_serve_what_is_stored_as_it_is(world: World) -> None:
    content = world.seal()
    world.store("/raw/o", content)
    got = await world.ask("/raw/o")
    assert (got.status, got.body == content) == (200, True)
    part = await world.ask("/raw/o", "-r", "10-19")
    assert (part.status, part.body) == (206, content[10:20])
    size = await world.ask("/raw/o", "-I")
    assert size.headers["content-length"] == str(len(content))
    assert world.actions().count("object-passed-as-stored") == 3
    assert world.rig.metric("sealgate_legacy_passed_total", **LABELS) == 3
    # What goes up there is sealed like everywhere.
    assert (await world.ask("/raw/new", "-T", "-", body=PLAIN)).status == 201
    assert world.rig.open_independently(world.service.owner, world.origin.stored("raw/new")) == PLAIN


# ---- uploads of sealed objects


async def test_a_sealed_upload_is_wrapped_and_comes_down_as_it_went_up(world: World) -> None:
    content = world.seal()
    assert (await world.ask("/o", "-T", "-", body=content)).status == 201
    assert world.rig.open_independently(world.service.owner, world.origin.stored("o")) == content
    assert (await world.ask("/o")).body == content
    assert world.actions().count("sealed-upload-wrapped") == 1
    assert (await world.ask("/p", "-T", "-", body=PLAIN)).status == 201
    assert world.actions().count("sealed-upload-wrapped") == 1


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("declared", [True, False])
async def test_a_sealed_upload_passes_where_the_option_says_so(
    world: World, version: str, declared: bool
) -> None:
    await world.options(sealed_upload="pass")
    content = world.seal()
    how = ["-X", "PUT", "--data-binary", "@-"] if declared else ["-T", "-"]
    got = await world.ask("/o", version, *how, body=content)
    assert got.status == 201
    assert world.origin.stored("o") == content
    assert world.actions().count("sealed-upload-passed") == 1
    assert (await world.ask("/o")).body == PLAIN
    for name, plain in (("plain", PLAIN), ("few", b"\x89SGT"), ("none", b"")):
        assert (await world.ask(f"/{name}", version, *how, body=plain)).status == 201
        assert world.rig.open_independently(world.service.owner, world.origin.stored(name)) == plain
    assert world.actions().count("sealed-upload-passed") == 1


@pytest.mark.parametrize(
    "make",
    [
        of_another_tenant,
        of_an_unknown_key,
        tampered_commitment,
        records_swapped,
        cut_in_its_head,
        a_part_alone,
    ],
)
@pytest.mark.parametrize("declared", [True, False])
async def test_what_does_not_open_here_is_not_passed(
    world: World, make: Callable[[World], bytes], declared: bool
) -> None:
    await world.options(sealed_upload="pass")
    how = ["-X", "PUT", "--data-binary", "@-"] if declared else ["-T", "-"]
    got = await world.ask("/o", *how, body=make(world))
    assert (got.status, got.code) == (409, "sealed-upload-invalid")
    assert (await world.ask("/o")).status != 200  # a store that writes in place may keep the beginning


async def test_the_digest_of_a_passed_upload_is_of_what_was_sent(world: World) -> None:
    await world.options(sealed_upload="pass")
    put = ("-X", "PUT", "--data-binary", "@-")
    got = await world.ask("/o", *put, "-H", "Content-MD5: AAAAAAAAAAAAAAAAAAAAAA==", body=world.seal())
    assert (got.status, got.code) == (400, "bad-digest")
