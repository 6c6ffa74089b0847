"""Dialects behind a real socket: `async with serving([dialect]) as base_url`."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from proxy.encryption_service.call import Answer, Call, Peer, StreamingAnswer
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from runtime.serve import problem_response
from runtime.serve import serving as serving_application


@asynccontextmanager
async def serving(dialects: Sequence[Dialect]) -> AsyncIterator[str]:
    """Serve *dialects* over plain HTTP on the loopback interface."""

    async def handle(request: web.Request) -> web.StreamResponse:
        path, _, query = request.raw_path.partition("?")
        dialect = next((found for found in dialects if found.claims(path)), None)
        if dialect is None:
            return problem_response(404, "not-found", "there is nothing at this path", "check the URL")
        streams = dialect.wants_stream(request.method, path)
        body = b"" if streams else await request.read()
        call = Call(
            method=request.method,
            path=path,
            query=query,
            headers=tuple(
                (name.decode("latin-1").lower(), value.decode("latin-1"))
                for name, value in request.raw_headers
            ),
            body=body,
            peer=Peer(address=request.remote or "127.0.0.1"),
            scheme="http",
            body_stream=request.content.iter_any() if streams else None,
        )
        if len(body) > dialect.max_body_bytes:
            return _response(dialect.refuse(Trouble.TOO_LARGE, call))
        result = dialect.handle(call)
        answer = await result if isinstance(result, Awaitable) else result
        if isinstance(answer, Answer):
            return _response(answer)
        return await _streamed(request, answer)

    application = web.Application(client_max_size=256 << 20)
    application.router.add_route("*", "/{path:.*}", handle)
    async with serving_application(application, host="127.0.0.1", port=0) as port:
        yield f"http://127.0.0.1:{port}"


def _response(answer: Answer) -> web.Response:
    headers = [*answer.headers, *([("Content-Type", answer.content_type)] if answer.content_type else [])]
    return web.Response(status=answer.status, body=answer.body, headers=headers)


async def _streamed(request: web.Request, answer: StreamingAnswer) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status, headers=[*answer.headers, ("Content-Type", answer.content_type)]
    )
    await response.prepare(request)
    async for chunk in answer.chunks:
        await response.write(chunk)
    await response.write_eof()
    return response
