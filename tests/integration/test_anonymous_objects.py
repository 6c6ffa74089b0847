"""Objects that name no key, by curl through the real engine: written, read whole, by range and size, found by
their commitment among the service's keys, and by no other key."""

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from envelope.derive import object_key
from envelope.keys import ANONYMOUS, KeyId, KeyMaterial, KeyState, NetworkService
from envelope.objects import Bind, Header, Sealer
from proxy.tenants.model import ServiceEntry
from runtime.clock import SystemClock
from tests import pki
from tests.integration.proxy_rig import Origin, Rig, proxy, webdav

SIZE = 3 * 16384 + 1000


@dataclass(frozen=True, slots=True)
class World:
    rig: Rig
    origin: Origin
    service: ServiceEntry

    @property
    def owner(self) -> NetworkService:
        return self.service.owner

    def push(self, count: int, *, without: int = 0, state: KeyState = KeyState.DEACTIVATED) -> list[KeyId]:
        """Keys 1 to *count*, the last one active, the others in *state*; *without*: that one is not here."""
        known = self.rig.materials.setdefault(self.owner, {})
        while len(known) < count:
            known[KeyId.random()] = os.urandom(32)
        ids = list(known)[:count]
        keys = [
            KeyMaterial(
                owner=self.owner,
                key_id=key_id,
                state=KeyState.ACTIVE if version == count else state,
                version=version,
                secret=bytearray(known[key_id]),
            )
            for version, key_id in enumerate(ids, start=1)
            if version != without
        ]
        self.rig.keys.install(self.owner, keys, deadline_boot_s=SystemClock().boot_s() + 300)
        return ids

    def seal(self, material: bytes, content: bytes, *, bind: Bind = Bind.NOTHING) -> bytes:
        name = b"/f" if bind is not Bind.NOTHING else b""
        key = object_key(material, self.owner, ANONYMOUS)
        sealer = Sealer(key, self.owner, ANONYMOUS, bind=bind, name=name)
        return bytes(sealer.update(content)) + sealer.finalize()

    def events(self, action: str) -> list[dict[str, object]]:
        found = [json.loads(line) for line in self.rig.audit_lines()]
        return [event for event in found if event["action"] == action]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    server = pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server")
    async with webdav(tmp_path, *server) as origin, proxy(tmp_path, ca_file) as rig:
        rig.tenant("acme")
        service = rig.service("acme/files", origin.url)
        rig.services[service.owner] = service = replace(service, profile_options={"hide_key_ids": True})
        made = World(rig, origin, service)
        made.push(1)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        yield made


async def test_an_object_is_found_by_its_commitment_after_fifty_rotations(world: World) -> None:
    rig, service, plain = world.rig, world.service, os.urandom(SIZE)
    assert (await rig.ask(service, "/f", "-T", "-", body=plain)).status == 201
    stored = world.origin.stored("f")
    assert Header.parse(stored) == Header(ANONYMOUS)
    [first] = list(rig.materials[world.owner])
    assert first.raw not in stored
    assert world.events("object-seal")[-1]["key_id"] == str(first), "the record says it all the same"
    world.push(50)
    for mode in ("reverse", "forward"):
        got = await rig.ask(service, "/f", mode=mode)
        assert (got.status, got.body == plain) == (200, True), got.code
        assert got.headers["content-length"] == str(SIZE)
        ranged = await rig.ask(service, "/f", "-H", "Range: bytes=16383-33000", mode=mode)
        assert (ranged.status, ranged.body == plain[16383:33001]) == (206, True), ranged.code
        assert ranged.headers["content-range"] == f"bytes 16383-33000/{SIZE}"
        head = await rig.ask(service, "/f", "--head", mode=mode)
        assert head.headers["content-length"] == str(SIZE)
    assert {event["keys"] for event in world.events("object-search")} == {50}
    assert len(world.events("object-search")) == 4, "once per exchange"
    assert {event["key_id"] for event in world.events("object-open")} == {str(first)}


async def test_no_other_key_opens_it_and_none_that_is_forbidden(world: World) -> None:
    rig, service = world.rig, world.service
    rig.tenant("globex")
    assert (await rig.ask(service, "/f", "-T", "-", body=b"hello")).status == 201
    world.push(2, state=KeyState.SUSPENDED)
    assert await _codes(world) == {(502, "object-invalid")}
    world.push(2, without=1)
    assert await _codes(world) == {(502, "object-invalid")}
    world.push(2)
    assert await _codes(world) == {(200, None), (206, None)}
    rig.keys.withdraw(world.owner)
    assert await _codes(world) == {(503, "key-withdrawn")}


async def _codes(world: World) -> set[tuple[int, str | None]]:
    """Whole, and by range."""
    whole = await world.rig.ask(world.service, "/f")
    ranged = await world.rig.ask(world.service, "/f", "-H", "Range: bytes=1-2")
    return {(answer.status, answer.code) for answer in (whole, ranged)}


async def test_what_is_changed_or_bound_or_of_a_stranger_does_not_open(world: World) -> None:
    [material] = world.rig.materials[world.owner].values()
    good = world.seal(material, b"hello")
    path = world.origin.root / "f"
    path.write_bytes(good)
    assert await _codes(world) == {(200, None), (206, None)}
    for wrong in (
        good[:60] + bytes([good[60] ^ 1]) + good[61:],  # the commitment
        good[:33] + bytes([good[33] ^ 1]) + good[34:],  # the salt
        good[:-1] + bytes([good[-1] ^ 1]),
        good[:87],
        world.seal(os.urandom(32), b"hello"),
        world.seal(material, b"hello", bind=Bind.NAME),
        world.seal(material, b"hello", bind=Bind.PART),
    ):
        path.write_bytes(wrong)
        assert await _codes(world) <= {(502, "object-invalid")}, wrong[:88].hex()


async def test_no_more_than_64_keys_are_tried_the_newest_of_them(world: World) -> None:
    rig, service = world.rig, world.service
    assert (await rig.ask(service, "/old", "-T", "-", body=b"old")).status == 201
    world.push(65)
    assert (await rig.ask(service, "/new", "-T", "-", body=b"new")).status == 201
    assert (await rig.ask(service, "/new")).body == b"new"
    got = await rig.ask(service, "/old")
    assert (got.status, got.code) == (502, "object-invalid")
    assert {event["keys"] for event in world.events("object-search")} == {64}


async def test_a_search_that_cannot_be_recorded_is_not_made(world: World) -> None:
    rig, service = world.rig, world.service
    assert (await rig.ask(service, "/f", "-T", "-", body=b"hello")).status == 201
    rig.audit.close()
    got = await rig.ask(service, "/f")
    assert (got.status, b"hello" in got.body) == (503, False), got.code
