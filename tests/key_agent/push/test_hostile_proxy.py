"""A proxy that wants to harm the agent: whatever it answers is a failed push, small, and its alone.

The agent trusts a proxy less than itself: another company runs it. What it answers ends up in memory, in the
registry, in the audit log and in integers, and a proxy that could stop the agent's loops would stop the kill
switch at every other proxy.
"""

import asyncio
import gzip
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, override

import pytest
from aiohttp import web

from key_agent.push.transport import PushError
from tests.fakes.proxies import FakeProxy
from tests.key_agent.conftest import Bench, until
from tests.key_agent.push.serving import S3, presence_answer, served, session_answer


def _raw(body: bytes, **headers: str) -> Callable[[], web.Response]:
    return lambda: web.Response(body=body, headers=headers, content_type="application/json")


def _receipt(**changes: object) -> Callable[[], web.Response]:
    good = {"status": "accepted", "service": "acme/s3", "sequence": 1, "keys": 1, "valid_for_s": 1.0}
    return lambda: web.json_response({"receipts": [good | changes]})


DEEP = b'{"x":' + b"[" * 100_000
HUGE_INTEGER = b'{"receipts":[{"status":"accepted","service":"acme/s3","sequence":1' + b"0" * 4000 + b"}]}"


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(_raw(b'{"receipts":[{"status":"refused","code":"\xff"}]}'), id="not-utf8"),
        pytest.param(_raw(DEEP), id="deep"),
        pytest.param(_raw(HUGE_INTEGER), id="huge-integer"),
        pytest.param(_receipt(valid_for_s=1e308), id="for-ever"),
        pytest.param(_receipt(valid_for_s=-1.0), id="negative-time"),
        pytest.param(_receipt(status="refused", code="x" * 100_000), id="long-code"),
        pytest.param(_receipt(status="refused", code="\n{forged}"), id="code-with-a-line-break"),
        pytest.param(_receipt(service="acme/" + "x" * 100_000), id="long-service"),
    ],
)
async def test_receipts_made_to_harm(tmp_path: Path, acme: Any, response: Callable[[], web.Response]) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.fault = response()
        with pytest.raises(PushError) as caught:
            await transport.send(proxy, ["a.b.c.d.e"])
        assert caught.value.code == "bad-answer"
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(_raw(b'{"proxy":"\xff"}'), id="not-utf8"),
        pytest.param(_raw(DEEP), id="deep"),
        pytest.param(lambda: web.json_response(session_answer(proxy="x" * 100_000)), id="long-name"),
        pytest.param(lambda: web.json_response(session_answer(time_ms=2**62)), id="time"),
        pytest.param(lambda: web.json_response(session_answer(instance="AAAA")), id="instance"),
    ],
)
async def test_sessions_made_to_harm(tmp_path: Path, acme: Any, response: Callable[[], web.Response]) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.fault = response()
        with pytest.raises(PushError) as caught:
            await transport.open_session(proxy)
        assert caught.value.code in {"bad-answer", "wrong-proxy"}
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("response", "code"),
    [
        pytest.param(_raw(b'{"proxy":"\xff"}'), "bad-answer", id="not-utf8"),
        pytest.param(_raw(DEEP), "bad-answer", id="deep"),
        pytest.param(
            lambda: web.json_response(presence_answer(proxy="x" * 100_000)), "bad-answer", id="long-name"
        ),
        pytest.param(lambda: web.json_response(presence_answer(proxy="p2")), "wrong-proxy", id="other"),
        pytest.param(lambda: web.json_response(presence_answer(time_ms=2**62)), "bad-answer", id="time"),
        pytest.param(lambda: web.json_response(presence_answer(instance="AAAA")), "bad-answer", id="short"),
        pytest.param(lambda: web.json_response(presence_answer(instance="!" * 22)), "bad-answer", id="b64u"),
        pytest.param(lambda: web.json_response(presence_answer(instance=None)), "bad-answer", id="null"),
        pytest.param(lambda: web.json_response({"proxy": "p1", "time_ms": 1}), "bad-answer", id="missing"),
        pytest.param(
            lambda: web.json_response(presence_answer(more="x" * 5000)), "bad-answer", id="4 KiB and more"
        ),
        pytest.param(
            lambda: web.Response(status=302, headers={"Location": "https://evil.example/"}),
            "http-302",
            id="redirect",
        ),
    ],
)
async def test_presences_made_to_harm(
    tmp_path: Path, acme: Any, response: Callable[[], web.Response], code: str
) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.fault = response()
        with pytest.raises(PushError) as caught:
            await transport.presence(proxy)
        assert caught.value.code == code
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "body",
    [DEEP, b'{"code":"\xff"}', json.dumps({"code": "y" * 100_000, "detail": "z" * 100_000}).encode()],
)
async def test_problems_made_to_harm(tmp_path: Path, acme: Any, body: bytes) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.fault = web.Response(status=403, body=body, content_type="application/problem+json")
        with pytest.raises(PushError) as caught:
            await transport.open_session(proxy)
        assert caught.value.code == "http-403"
        assert len(str(caught.value)) < 1000


async def test_a_compressed_bomb_is_not_unpacked(tmp_path: Path, acme: Any) -> None:
    bomb = gzip.compress(bytes(512 << 20), compresslevel=9)
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.fault = web.Response(body=bomb, headers={"Content-Encoding": "gzip"})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(PushError):
            await transport.open_session(proxy)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kib < 16 << 10, f"{grown_kib} KiB for an answer of {len(bomb) >> 10} KiB"


class _Surprising(FakeProxy):
    """Makes the transport itself fail in a way nobody thought of."""

    @override
    async def _reach(self) -> None:
        await super()._reach()
        if self.hostile:
            raise RuntimeError("Session is closed")

    hostile = False


async def test_what_nobody_thought_of_at_one_proxy_stops_no_loop(bench: Bench) -> None:
    rogue = _Surprising(id="rogue", clock=bench.clock, signers=bench.proxy("p1").signers)
    bench.proxies["rogue"] = rogue
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="rogue")
        rogue.hostile = True
        accepted = len(bench.proxy("p1").accepted)
        await bench.clock.advance(300)
        await until(lambda: len(bench.proxy("p1").accepted) > accepted)
        await until(lambda: agent.deliveries["rogue"].code == "internal")
        [kek] = [row.kek for row in await agent.registry.keks()]
        assert kek is not None
        bench.source.destroy(kek)
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy("p1").valid_keys(S3))
        await until(lambda: agent.withdrawals_seen["rogue"].code == "internal")
        rogue.hostile = False
        await bench.clock.advance(5)
        await until(lambda: not rogue.valid_keys(S3))


async def test_a_proxy_cannot_make_the_countdown_longer_than_what_was_issued(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy = bench.proxy()
        judge = proxy._judge

        def lies(token: str) -> Any:
            answer = judge(token)
            object.__setattr__(answer, "valid_for_s", 9e8)
            return answer

        proxy._judge = lies  # type: ignore[method-assign]
        agent.refresh.at_once()
        await until(lambda: proxy.posts > 1)
        await asyncio.sleep(0)
        await agent.pusher.settle()
        status: Any = await operations.status()
        assert status["services"][0]["proxies"][0]["valid_for_s"] <= 370
