"""The table, the document and what is served are one."""

from typing import Any

from key_agent.api import routes, server
from key_agent.operations.operations import Operations
from tests.key_agent.conftest import Bench


async def test_openapi_names_every_route_and_nothing_else(bench: Bench) -> None:
    document: Any = routes.openapi()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    async with bench.agent(working=False) as (_, operations):
        served = {
            (route.method, route.resource.canonical)
            for route in server.commands(operations).router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
    assert described == served - {("GET", "/openapi.json")}
    for route in routes.ROUTES:
        assert callable(getattr(Operations, route.operation))
