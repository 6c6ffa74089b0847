"""The main job on real parts: curl, the proxy in both modes, HTTP/1 and HTTP/2, WsgiDAV over TLS."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from envelope.objects import MAGIC, sealed_length
from proxy.tenants.model import ServiceEntry
from tests import pki
from tests.integration.proxy_rig import Origin, Rig, proxy, webdav

SIZES = [0, 1, 16383, 16384, 16385, (1 << 20) + 1]
MODES = ["forward", "reverse"]
VERSIONS = ["--http1.1", "--http2"]


@dataclass(frozen=True, slots=True)
class World:
    rig: Rig
    origin: Origin
    service: ServiceEntry


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
        assert rig.engine.problems == []
        async with asyncio.TaskGroup() as group:
            cutter = group.create_task(rig.engine.cut_ended(), name="cut")
            yield World(rig, origin, service)
            cutter.cancel()


def leaks(plain: bytes, stored: bytes) -> bool:
    """Whether a 16-byte window of *plain* stands anywhere in *stored*."""
    return any(plain[at : at + 16] in stored for at in range(0, max(0, len(plain) - 15), 1024))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
async def test_every_size_round_trips_and_the_store_holds_only_ciphertext(
    world: World, mode: str, version: str
) -> None:
    for size in SIZES:
        plain = os.urandom(size)
        name = f"file-{size}"
        put = await world.rig.ask(
            world.service, f"/{name}", version, "-T", "-", "-H", f"Content-Length: {size}",
            "-H", "Transfer-Encoding:", mode=mode, body=plain,
        )  # fmt: skip
        assert (put.status, put.exit_code) == (201, 0), put
        stored = world.origin.stored(name)
        assert len(stored) == sealed_length(size)
        assert stored.startswith(MAGIC)
        assert not leaks(plain, stored)
        assert world.rig.open_independently(world.service.owner, stored) == plain

        get = await world.rig.ask(world.service, f"/{name}", version, mode=mode)
        assert (get.status, get.exit_code, get.body) == (200, 0, plain)
        assert get.headers["content-length"] == str(size)
        assert "private" in get.headers["cache-control"]
        assert get.version == ("2" if version == "--http2" else "1.1")

        head = await world.rig.ask(world.service, f"/{name}", version, "--head", mode=mode)
        assert (head.status, head.headers["content-length"]) == (200, str(size))


async def test_chunked_upload_without_a_length(world: World) -> None:
    plain = os.urandom(200_000)
    for version in VERSIONS:
        put = await world.rig.ask(world.service, "/chunked", version, "-T", "-", body=plain)
        assert put.status in (201, 204)
        assert world.rig.open_independently(world.service.owner, world.origin.stored("chunked")) == plain
