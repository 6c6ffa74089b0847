"""A proxy of an environment that must not serve: refused at once, whatever is asked, with real clients."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.environments import Word
from proxy.tenants.model import ServiceEntry
from tests import pki
from tests.children import end
from tests.integration.proxy_rig import Origin, Rig, begin_curl, proxy, webdav


class World:
    def __init__(self, rig: Rig, origin: Origin, service: ServiceEntry) -> None:
        self.rig, self.origin, self.service = rig, origin, service
        self._epoch = 0

    def say(self, state: str) -> None:
        self._epoch += 1
        self.rig.environments.take(
            self.service.owner.tenant,
            Word(environment="a", state=state, term=1, epoch=self._epoch),
            agent="agent-a",
            now_boot_s=0.0,
        )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    server_ca = pki.make_server_ca()
    certificate_file, key_file = pki.write_credential(pki.issue_server(server_ca), tmp_path, "origin")
    ca_file = pki.write_certificate(server_ca.certificate, tmp_path / "server-ca.pem")
    async with (
        webdav(tmp_path, certificate_file, key_file) as origin,
        proxy(tmp_path, ca_file, environment="a") as rig,
    ):
        rig.tenant("acme")
        service = rig.service("acme/drive", origin.url)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        yield World(rig, origin, service)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
async def test_nothing_is_served_unless_the_environment_serves(world: World, mode: str) -> None:
    rig, service = world.rig, world.service

    async def put() -> tuple[int, str | None, str | None]:
        answer = await rig.ask(service, "/file", "-T", "-", mode=mode, body=b"plain" * 100)
        if mode == "forward" and answer.exit_code == 56:  # CONNECT itself is refused
            return 503 if b"503" in answer.error.encode() else 0, "env-healing", "2"
        return answer.status, answer.code, answer.headers.get("retry-after")

    rig.push(service.owner)
    assert await put() == (503, "env-healing", "2"), "not told yet"
    world.say("active")
    assert (await put())[0] == 201
    world.say("healing")
    assert await put() == (503, "env-healing", "2")
    for method in ("DELETE", "OPTIONS", "GET", "HEAD"):
        answer = await rig.ask(service, "/file", "-X", method, "-m", "5", mode=mode)
        assert answer.status in {0, 503}, "requests without keys are refused as well"
    assert world.origin.names() == ["file"]
    world.say("active")
    assert (await put())[1] in {"key-withdrawn", "no-active-key"}, "the keys were forgotten"
    rig.push(service.owner)
    assert (await put())[0] in {201, 204}
    world.say("draining")
    assert (await put())[0] in {201, 204}


async def test_what_is_under_way_is_cut(world: World) -> None:
    """A download that its client has stopped to read: what sockets hold has left, the rest never comes."""
    rig, service = world.rig, world.service
    rig.push(service.owner)
    world.say("active")
    body = os.urandom(48 << 20)  # more than sockets hold
    assert (await rig.ask(service, "/big", "-T", "-", body=body)).status == 201
    running = await begin_curl(*rig.curl_arguments(service, "reverse", "/big"))
    assert running.process.stdout is not None
    try:
        async with asyncio.TaskGroup() as group:
            cutting = group.create_task(rig.engine.cut_ended(), name="cut")
            begun = await running.process.stdout.readexactly(1000)
            world.say("healing")
            answer = await running.answer(begun=begun)  # as fast as it comes
            cutting.cancel()
    finally:
        await end(running.process)
    assert answer.exit_code in {18, 56, 92}
    assert begun == body[:1000]
    assert len(answer.body) < len(body)
    assert body.startswith(answer.body)
