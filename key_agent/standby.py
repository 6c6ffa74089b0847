"""The agent that does not lead: it waits for the lease, says so, and does nothing else.

1. It is alive and not ready; its status names who leads, or what is wrong with the registry. Every command is
   refused with where to give it: two hands on one registry are what the lease is there to prevent.
2. It has opened neither the HSM nor a way to the proxies: a wrong PIN is not tried twice, no key is here.
3. From the moment it leads it starts like any agent: everything is read from the registry.
"""

import asyncio
import contextlib
import os
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog
from aiohttp import web

from key_agent import metrics
from key_agent.errors import KeyAgentError
from key_agent.operations.commands import Json
from key_agent.registry.database import RegistryError
from key_agent.registry.lease import Holding
from runtime.observe import REGISTRY
from runtime.serve import health_routes, make_application, problem_response, running, serving

log = structlog.get_logger(__name__)

_UNAVAILABLE: Final = 4
"""As runtime.cli.ExitCode: the command would work, elsewhere."""


class StoppedOnStandbyError(KeyAgentError):
    """Asked to stop before it ever led."""


class Standby:
    """Use as a context; *stand_by* is `Database.open`'s `on_standby`; `end` when the lease is ours."""

    def __init__(
        self, *, agent_id: str, socket_file: Path, host: str, port: int, stop: asyncio.Event
    ) -> None:
        self._agent_id = agent_id
        self._socket_file = socket_file
        self._address = (host, port)
        self._stop = stop
        self._serves = False
        self._leader: Holding | None = None
        self._failure: RegistryError | None = None
        self._servers = AsyncExitStack()
        self.port: int | None = None
        """Of the loopback listener while it stands by."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.end()

    async def stand_by(self, found: Holding | RegistryError) -> None:
        """Who holds the lease, or why that cannot be known. StoppedOnStandbyError when it is time to go."""
        if self._stop.is_set():
            raise StoppedOnStandbyError("asked to stop while standing by")
        if not self._serves:
            await self._begin()
        if isinstance(found, RegistryError):
            self._leader, self._failure = None, found
            return
        if self._leader is None or self._leader.instance != found.instance:
            log.info("stands by", agent=self._agent_id, leader=found.describe())
        self._leader, self._failure = found, None

    async def end(self) -> None:
        """Close what was served: the agent that leads serves at the same places."""
        await self._servers.aclose()
        self._serves = False
        self.port = None
        self._leader = self._failure = None

    async def _begin(self) -> None:
        self._serves = True
        metrics.LEADS.set(0)
        runner = await self._servers.enter_async_context(running(self._refusing()))
        self._socket_file.unlink(missing_ok=True)  # of an agent that was killed: we hold the state lock
        await web.UnixSite(runner, str(self._socket_file)).start()
        os.chmod(self._socket_file, 0o600)  # noqa: PTH101 - in a 0700 directory, so nobody came before
        self._servers.callback(self._remove_socket)
        host, port = self._address
        self.port = await self._servers.enter_async_context(serving(self._telling(), host=host, port=port))

    def _remove_socket(self) -> None:
        with contextlib.suppress(OSError):
            self._socket_file.unlink()

    def status(self) -> Json:
        leader = self._leader
        return {
            "agent": self._agent_id,
            "role": "standby",
            "problem": None if self._failure is None else str(self._failure),
            "leader": None
            if leader is None
            else {
                "agent": leader.agent_id,
                "host": leader.process.host,
                "pid": leader.process.pid,
                "term": leader.term,
                "since_ms": leader.since_ms,
            },
        }

    def _reasons_not_ready(self) -> list[str]:
        if self._failure is not None:
            return [f"the registry cannot be used yet: {self._failure}"]
        leader = "nobody yet" if self._leader is None else self._leader.describe()
        return [f"stands by: {leader} leads"]

    def _telling(self) -> web.Application:
        application = make_application()
        health_routes(application, readyz=self._reasons_not_ready, registry=REGISTRY)

        async def status(_request: web.Request) -> web.Response:
            return web.json_response(self.status(), headers={"Cache-Control": "no-store"})

        application.router.add_get("/v1/status", status)
        return application

    def _refusing(self) -> web.Application:
        application = make_application()

        async def refuse(_request: web.Request) -> web.Response:
            if self._failure is not None:
                return problem_response(
                    503,
                    "registry",
                    f"agent {self._agent_id} waits for its registry: {self._failure}",
                    "mend the database: the agent goes on by itself",
                    headers={"Sealgate-Exit-Code": str(_UNAVAILABLE)},
                )
            leader = "another agent" if self._leader is None else self._leader.describe()
            return problem_response(
                503,
                "standby",
                f"agent {self._agent_id} stands by: {leader} leads",
                "give the command on that machine; or stop the agent there, then this one leads within 15 s",
                headers={"Sealgate-Exit-Code": str(_UNAVAILABLE)},
            )

        application.router.add_route("*", "/{path:.*}", refuse)
        return application
