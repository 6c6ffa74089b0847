"""Serving an aiohttp application: a server is a `with` block, an error is a problem document.

1. Every error answers `application/problem+json` (RFC 9457) with `code`, `detail` and `next_step`: routing
   errors, bodies too large, and exceptions nobody expected, whose text stays in the log.
2. `/livez` answers while the loop runs. `/readyz` lists the reasons why the process should get no traffic.
   `/metrics` is Prometheus text. `/openapi.json` is the document of the API.
3. Leaving the `with` block stops accepting, lets running requests end for `grace_s`, then cuts them.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final, cast

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

MAX_REQUEST_BYTES: Final = 1 << 20
GRACE_S: Final = 5.0
_CALLBACK_ROUNDS: Final = 100

log = structlog.get_logger()

type Admit = Callable[[asyncio.Transport], Callable[[], None]]
"""Is told of each connection after its handshake, and may close it; what to call at its end."""
type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ProblemError(Exception):
    """Ends a request with a problem document."""

    def __init__(
        self, status: int, code: str, detail: str, next_step: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.detail = detail
        self.next_step = next_step
        self.headers = headers


def problem_response(
    status: int, code: str, cause: str, next_step: str, *, headers: Mapping[str, str] | None = None
) -> web.Response:
    """An error answer: *code* is stable, *cause* (member `detail`) and *next_step* are for people."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": cause,
        "next_step": next_step,
    }
    return web.Response(
        status=status,
        body=json.dumps(document, ensure_ascii=False).encode() + b"\n",
        headers={"Cache-Control": "no-store", **(headers or {})},
        content_type="application/problem+json",
    )


def make_application(*, client_max_size_bytes: int = MAX_REQUEST_BYTES) -> web.Application:
    """An application whose errors are problem documents; bodies over *client_max_size_bytes* get 413."""
    application = web.Application(client_max_size=client_max_size_bytes, middlewares=[problem_middleware])
    application.on_response_prepare.append(_hide_server_version)
    return application


@web.middleware
async def problem_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever a handler raises into a problem document (rule 1)."""
    try:
        return await handler(request)
    except ProblemError as error:
        return problem_response(
            error.status, error.code, error.detail, error.next_step, headers=error.headers
        )
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:  # a redirect is an answer
            raise
        return _http_problem(request, error)
    except Exception as error:
        if isinstance(error, ConnectionError) and request.transport is None:  # nobody is there to be answered
            log.info("a client went away", method=request.method, route=_route(request), cause=str(error))
        else:
            log.exception("request failed", method=request.method, route=_route(request))
        return problem_response(
            500,
            "internal",
            "The server failed while handling this request.",
            "See the server's log; then try again.",
        )


_READY: Final = (
    b"# HELP sealgate_ready 1 if /readyz says yes, 0 if it has reasons not to\n"
    b"# TYPE sealgate_ready gauge\n"
    b"sealgate_ready %d.0\n"
)


def health_routes(
    application: web.Application,
    *,
    readyz: Callable[[], Sequence[str]],
    registry: CollectorRegistry,
    livez: Callable[[], Sequence[str]] = tuple,
    scrape: Callable[[], Awaitable[bytes]] | None = None,
) -> None:
    """Add `/livez`, `/readyz`, `/metrics`. *livez* and *readyz* return the reasons against; none is well.

    *scrape*: where the metrics are not those of *registry* alone, their text.
    """

    def health(reasons_against: Callable[[], Sequence[str]]) -> Handler:
        async def answer(_request: web.Request) -> web.Response:
            reasons = list(reasons_against())
            body = {"status": "failing" if reasons else "ok", "reasons": reasons}
            return web.json_response(
                body, status=503 if reasons else 200, headers={"Cache-Control": "no-store"}
            )

        return answer

    async def metrics(_request: web.Request) -> web.Response:
        text = generate_latest(registry) if scrape is None else await scrape()
        text += _READY % (not readyz())
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    application.router.add_get("/livez", health(livez))
    application.router.add_get("/readyz", health(readyz))
    application.router.add_get("/metrics", metrics)


def openapi_route(application: web.Application, document: Mapping[str, object]) -> None:
    """Serve *document* at `/openapi.json`."""
    body = json.dumps(document, ensure_ascii=False).encode()

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    application.router.add_get("/openapi.json", answer)


@asynccontextmanager
async def serving(
    application: web.Application,
    *,
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None = None,
    grace_s: float = GRACE_S,
    admit: Admit | None = None,
) -> AsyncIterator[int]:
    """Serve *application* while the block runs; yields the bound port (of use when *port* is 0).

    OSError if the address cannot be bound.
    """
    async with running(application, grace_s=grace_s, admit=admit) as runner:
        site = web.TCPSite(runner, host, port, ssl_context=ssl_context, backlog=1024)
        await site.start()
        yield runner.addresses[0][1]


@asynccontextmanager
async def running(
    application: web.Application, *, grace_s: float = GRACE_S, admit: Admit | None = None
) -> AsyncIterator[web.AppRunner]:
    """*application*, ready for listeners of the caller's; after the block nobody is served any more.

    *admit* is told of each connection before anything is read from it.

    aiohttp closes the connections it knows. One that was accepted before and whose handshake ends later would
    be served for as long as its client likes, by an application that is gone: it is closed at once.
    """
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=grace_s, handle_signals=False)
    await runner.setup()
    server = cast("web.Server", runner.server)  # there is one after `setup`
    know, forget = server.connection_made, server.connection_lost
    has_ended = False
    admitted: dict[web.RequestHandler, tuple[asyncio.Transport, Callable[[], None]]] = {}

    def connection_made(handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        know(handler, transport)
        if has_ended:
            handler.force_close()
        elif admit is not None:
            admitted[handler] = transport, admit(transport)

    def connection_lost(handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        forget(handler, exc)
        if (known := admitted.pop(handler, None)) is not None:
            known[1]()

    # AppRunner makes its server itself.
    server.connection_made = connection_made  # type: ignore[method-assign]
    server.connection_lost = connection_lost  # type: ignore[method-assign]
    try:
        yield runner
    finally:
        has_ended = True
        await runner.cleanup()
        for transport, _ in admitted.values():
            transport.abort()  # nobody reads from some: their ends would not be noticed
        for _ in range(_CALLBACK_ROUNDS):
            if not admitted:
                break
            await asyncio.sleep(0)


_CODES: Final = {
    400: ("bad-request", "Mend the request; retrying will not help."),
    401: ("unauthenticated", "Authenticate, then try again."),
    403: ("forbidden", "Ask the administrator for this right."),
    404: ("not-found", "Check the path against /openapi.json."),
    405: ("method-not-allowed", "Use a method of the Allow header."),
    413: ("too-large", "Send less in one request."),
    415: ("unsupported-media-type", "Send application/json."),
    417: ("expectation-failed", "Send no Expect header but 100-continue."),
}


def _http_problem(request: web.Request, error: web.HTTPException) -> web.Response:
    code, next_step = _CODES.get(error.status, (f"http-{error.status}", "See the server's log."))
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    match error.status:
        case 404:
            cause = "There is nothing at this path."
        case 405:
            cause = f"{request.method} is not possible at this path."
        case 413:
            cause = "The body is larger than this server takes."
        case _:
            cause = f"{error.reason}."
    return problem_response(error.status, code, cause, next_step, headers=headers)


def _route(request: web.Request) -> str:
    """The route's pattern rather than the path: a path can hold what must not be logged."""
    resource = request.match_info.route.resource
    return resource.canonical if resource else "none"


async def _hide_server_version(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "sealgate"
