"""The socket does everything, the loopback port changes nothing, and errors reach the CLI whole."""

import stat
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from key_agent.api import client, routes, server
from key_agent.sources.source import Verdict
from runtime.cli import CommandError, ExitCode
from runtime.serve import serving
from tests.fakes.proxies import pem
from tests.key_agent.conftest import Bench


async def test_a_command_over_the_socket_is_the_operation(bench: Bench) -> None:
    socket = bench.directory / "control.sock"
    async with bench.agent() as (agent, operations), server.control_socket(operations, socket):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        made = await _call(socket, "kek_create")
        assert made["kek"]
        await _call(
            socket,
            "proxy_add",
            proxy="p1",
            url="https://p1.example:8443",
            ca_pem=pem(bench.tenant.root.certificate),
        )
        added = await _call(
            socket, "service_add", service="acme/s3", proxy="p1", certificate_pem=bench.host("s3")
        )
        assert added["proxies"][0]["outcome"] == "accepted"
        status = await _call(socket, "status")
        assert status["services"][0]["proxies"][0]["state"] == "valid"
        assert agent.deliveries["p1"].is_complete
        removed = await _call(socket, "service_remove", service="s3", proxy=None)
        assert removed["keys_erased"]
    assert not socket.exists()


async def test_refusals_keep_cause_next_step_and_exit_code(bench: Bench) -> None:
    socket = bench.directory / "control.sock"
    async with bench.agent() as (agent, operations), server.control_socket(operations, socket):
        with pytest.raises(CommandError) as caught:
            await _call(socket, "service_remove", service="s3", proxy=None)
        assert (caught.value.exit_code, caught.value.code) == (ExitCode.REFUSED, "refused")
        assert "service list" in caught.value.next_step
        bench.source.fail(Verdict.AUTH_PIN)
        with pytest.raises(CommandError) as caught:
            await _call(socket, "kek_create")
        assert (caught.value.exit_code, caught.value.code) == (ExitCode.UNAVAILABLE, "auth-pin")
        for bad in ("not a name", "../status", "a/b/c"):
            with pytest.raises(CommandError) as caught:
                await _call(socket, "service_remove", service=bad, proxy=None)
            assert caught.value.exit_code is ExitCode.REFUSED
        bench.source.recover()
        await operations.kek_create()
        await agent.registry.close()
        with pytest.raises(CommandError) as caught:
            await _call(socket, "service_list")
        assert (caught.value.exit_code, caught.value.code) == (ExitCode.UNAVAILABLE, "registry")


async def test_the_loopback_port_shows_and_changes_nothing(bench: Bench) -> None:
    async with (
        bench.agent() as (agent, operations),
        serving(server.read_only(agent, operations), host="127.0.0.1", port=0) as port,
        aiohttp.ClientSession(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        async with client.get("/livez") as response:
            assert response.status == 200
        async with client.get("/readyz") as response:
            assert response.status == 503
            assert "no-kek" in (await response.json())["reasons"][0]
        await bench.provision(operations)
        async with client.get("/readyz") as response:
            assert response.status == 200, await response.text()
        async with client.get("/v1/status") as response:
            assert (await response.json())["standing"] == "consented"
        async with client.get("/metrics") as response:
            text = await response.text()
            assert 'sealgate_agent_standing{standing="consented"} 1.0' in text
            assert 'sealgate_agent_pushes_total{outcome="accepted",proxy="p1"}' in text
        for route in routes.ROUTES:
            if route.changes:
                path = route.path.replace("{service}", "s3").replace("{proxy}", "p1")
                async with client.request(route.method, path, json={}) as response:
                    assert response.status in (404, 405), route
        assert bench.source.keks


async def test_unknown_members_and_broken_bodies_are_refused(bench: Bench) -> None:
    socket = bench.directory / "control.sock"
    async with (
        bench.agent(working=False) as (_, operations),
        server.control_socket(operations, socket),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as client,
    ):
        for body in (b"{", b'{"restore": true, "force": true}', b"[]", b'{"restore": "yes"}'):
            async with client.post("http://key-agent/v1/kek/reinstate", data=body) as response:
                assert response.status == 400
                assert (await response.json())["code"] == "bad-request"


async def _call(socket: Path, operation: str, **arguments: object) -> Any:
    answer = await client.call(socket, operation, arguments)
    assert answer is not None
    return answer
