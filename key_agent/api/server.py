"""The agent's HTTP: commands on a socket only its user can open, status and health on loopback.

1. Whoever can open the socket (0600, in the 0700 `state_dir`) is the administrator. The loopback port has no
   login, so it changes nothing.
2. Errors are problem documents; `Sealgate-Exit-Code` tells the CLI what to end with.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from envelope.errors import SealgateError
from key_agent.agent import Agent
from key_agent.api.routes import BY_NAME, ROUTES, Route, openapi
from key_agent.explaining import explain_agent
from key_agent.operations.backup import MAX_FILE_BYTES
from key_agent.operations.operations import Operations
from runtime.cli import CommandError, ExitCode
from runtime.observe import REGISTRY
from runtime.serve import (
    ProblemError,
    health_routes,
    make_application,
    openapi_route,
    problem_response,
    running,
)

_GRACE_S: Final = 60.0
"""For commands that run when the agent is asked to stop."""
# A backup's content, in base64.
_MAX_COMMAND_BYTES: Final = 2 * MAX_FILE_BYTES
_STATUS: Final = {
    ExitCode.USAGE: 400,
    ExitCode.REFUSED: 409,
    ExitCode.UNAVAILABLE: 503,
    ExitCode.FAILED: 500,
}


def commands(operations: Operations) -> web.Application:
    """Everything, for the socket."""
    application = make_application(client_max_size_bytes=_MAX_COMMAND_BYTES)
    for route in ROUTES:
        application.router.add_route(route.method, route.path, _handler(operations, route))
    openapi_route(application, openapi())
    return application


def read_only(agent: Agent, operations: Operations) -> web.Application:
    """Health, metrics and status, for the loopback port."""
    application = make_application()
    health_routes(
        application, readyz=agent.reasons_not_ready, livez=agent.reasons_not_alive, registry=REGISTRY
    )
    # `kek_status` and `diagnosis` reach the HSM and the proxies: not for whoever can reach this port.
    application.router.add_get("/v1/status", _handler(operations, BY_NAME["status"]))
    openapi_route(application, openapi())
    return application


def _handler(operations: Operations, route: Route) -> Callable[[web.Request], Any]:
    operation = getattr(operations, route.operation)

    async def handle(request: web.Request) -> web.Response:
        content = await request.read()
        try:
            body = msgspec.json.decode(content or b"{}", type=route.body)
        except msgspec.DecodeError as error:
            raise ProblemError(400, "bad-request", str(error), "See /openapi.json.") from None
        arguments = {**request.match_info, **msgspec.structs.asdict(body)}
        try:
            result = await operation(**arguments)
        except (SealgateError, CommandError) as error:
            return _problem(error)
        return web.json_response(result, headers={"Cache-Control": "no-store"})

    return handle


def _problem(error: Exception) -> web.Response:
    told = explain_agent(error)
    return problem_response(
        _STATUS[told.exit_code],
        told.code,
        told.cause,
        told.next_step,
        headers={"Sealgate-Exit-Code": str(int(told.exit_code))},
    )


@asynccontextmanager
async def control_socket(operations: Operations, path: Path) -> AsyncIterator[None]:
    """Commands on a Unix socket at *path* while the block runs. The caller holds the state lock."""
    try:
        async with running(commands(operations), grace_s=_GRACE_S) as runner:
            _remove(path)  # of an agent that was killed: we hold the lock
            await web.UnixSite(runner, str(path)).start()
            os.chmod(path, 0o600)  # noqa: PTH101 - in a 0700 directory, so nobody came before
            yield
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
