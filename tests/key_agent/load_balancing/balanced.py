"""HAProxy itself before small servers that say what they are, and the lb-agent's settings for them."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import aiohttp
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from key_agent.environments.shared.registry_key import public_text
from key_agent.load_balancing.settings import (
    AgentAddress,
    FrontendSettings,
    LbAgentSettings,
    Rule,
    Server,
    Settings,
)
from runtime.serve import serving
from tests.ports import free_port

HAPROXY = "/usr/sbin/haproxy"


@dataclass
class DataPlane:
    """One server: answers callers with its name, unless it refuses by itself."""

    name: str
    geo: str | None = None
    serves: bool = True
    state: str = "active"
    reason: str | None = None
    says: bytes | None = None
    """Instead of its status."""
    delay_s: float = 0.0
    served: int = 0
    refused: int = 0
    port: int = field(default_factory=free_port)

    def application(self) -> web.Application:
        application = web.Application(client_max_size=32 << 20)
        application.router.add_get("/readyz", self._ready)
        application.router.add_get("/v1/env/status", self._status)
        application.router.add_route("*", "/{tail:.*}", self._serve)
        return application

    async def _ready(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _status(self, _request: web.Request) -> web.Response:
        await asyncio.sleep(self.delay_s)
        if self.says is not None:
            return web.Response(body=self.says)
        told = {"acme": {"serves": self.serves, "state": self.state, "reason": self.reason}}
        return web.json_response({"serves": self.serves, "tenants": told})

    async def _serve(self, request: web.Request) -> web.Response:
        await request.read()
        if not self.serves:
            self.refused += 1
            return web.Response(status=503, headers={"Retry-After": "2"})
        self.served += 1
        return web.Response(text=self.name)


def settings_for(
    planes: list[DataPlane], directory: Path, *, rule: Rule = Rule.RANDOM, strict_geo: bool = False
) -> Settings:
    key = public_text(Ed25519PrivateKey.generate())
    unused = directory / "unused"
    return Settings(
        lb_agent=LbAgentSettings(
            id="lb-1",
            tenant="acme",
            root_certificate_file=unused,
            certificate_file=unused,
            key_file=unused,
            state_file=directory / "lb.rows",
            port=free_port(),
            poll_s=0.1,
        ),
        agents=tuple(
            AgentAddress(id=f"agent-{name}", url=f"https://127.0.0.1:{free_port()}", registry_key=key)
            for name in "ab"
        ),
        servers=tuple(
            Server(
                name=plane.name,
                environment=plane.name,
                address=f"127.0.0.1:{plane.port}",
                status_url=f"http://127.0.0.1:{plane.port}",
                geo=plane.geo,
            )
            for plane in planes
        ),
        frontend=FrontendSettings(
            bind=f"127.0.0.1:{free_port()}",
            rule=rule,
            strict_geo=strict_geo,
            trusted_networks=("127.0.0.0/8",),
            agent_inter_ms=100,
            stats_socket=directory / "haproxy.sock",
        ),
    )


@contextlib.asynccontextmanager
async def planes_running(planes: list[DataPlane]) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for plane in planes:
            await stack.enter_async_context(
                serving(plane.application(), host="127.0.0.1", port=plane.port, grace_s=0.1)
            )
        yield


@contextlib.asynccontextmanager
async def haproxy_running(text: str, directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    file = directory / "haproxy.cfg"
    file.write_text(text)
    process = await asyncio.create_subprocess_exec(
        HAPROXY, "-db", "-f", str(file), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


class Caller:
    """Counts who answers."""

    def __init__(self, bind: str) -> None:
        self.bind = bind
        self._url = f"http://{bind}"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self, *, path: str = "/v1/encrypt", body: bytes = b"x", region: str | None = None
    ) -> tuple[int, str, str]:
        """Status, who, Retry-After."""
        headers = {} if region is None else {"Sealgate-Region": region}
        try:
            async with self._session.post(self._url + path, data=body, headers=headers) as answer:
                text = await answer.text()
                return answer.status, text, answer.headers.get("Retry-After", "")
        except aiohttp.ClientError as error:
            return 0, type(error).__name__, ""

    async def count(self, number: int, region: str | None = None) -> Counter[str]:
        found: Counter[str] = Counter()
        for _ in range(number):
            status, who, _ = await self.ask(region=region)
            found[who if status == 200 else str(status)] += 1
        return found


async def until_answers(caller: Caller, wanted: set[str], *, timeout_s: float = 60) -> None:
    """Wait until exactly *wanted* answer."""
    async with asyncio.timeout(timeout_s):
        while set(await caller.count(12 * max(1, len(wanted)))) != wanted:  # noqa: ASYNC110 - HAProxy has no event
            await asyncio.sleep(0.05)


def problem_code(text: str) -> str:
    code: str = json.loads(text)["code"]
    return code
