import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from runtime.serve import (
    ProblemError,
    health_routes,
    make_application,
    openapi_route,
    problem_response,
    serving,
)
from runtime.tls import client_context, server_context
from tests.pki import issue_server, make_server_ca, write_certificate, write_credential

DEADLINE_S = 60


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        yield session


def application() -> web.Application:
    app = make_application(client_max_size_bytes=1000)

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async def bug(_request: web.Request) -> web.Response:
        raise RuntimeError("s3cr3t")

    async def refuse(_request: web.Request) -> web.Response:
        raise ProblemError(
            409, "kek-revoked", "The KEK is revoked.", "Reinstate it.", headers={"Retry-After": "5"}
        )

    async def conflict(_request: web.Request) -> web.Response:
        raise web.HTTPConflict

    async def move(_request: web.Request) -> web.Response:
        raise web.HTTPFound("/echo")

    async def hide(_request: web.Request) -> web.Response:
        raise web.HTTPInternalServerError(text="s3cr3t", reason="Internal Server Error")

    async def kinds(request: web.Request) -> web.Response:
        await request.json()
        return web.Response()

    app.router.add_post("/echo", echo)
    app.router.add_get("/bug", bug)
    app.router.add_get("/refuse", refuse)
    app.router.add_get("/conflict", conflict)
    app.router.add_get("/move", move)
    app.router.add_get("/hide", hide)
    app.router.add_post("/json/{secret}", kinds)
    return app


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", None, 404, "not-found"),
        ("GET", "/echo", None, 405, "method-not-allowed"),
        ("POST", "/echo", b"x" * 1001, 413, "too-large"),
        ("GET", "/bug", None, 500, "internal"),
        ("GET", "/hide", None, 500, "http-500"),
        ("GET", "/refuse", None, 409, "kek-revoked"),
        ("GET", "/conflict", None, 409, "http-409"),
        ("POST", "/json/abc", b"{", 500, "internal"),
    ],
)
async def test_every_error_is_a_problem_document(  # noqa: PLR0917
    client: aiohttp.ClientSession, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    async with (
        serving(application(), host="127.0.0.1", port=0) as port,
        client.request(method, f"http://127.0.0.1:{port}{path}", data=body) as response,
    ):
        text = await response.text()
        assert response.status == status
        assert response.content_type == "application/problem+json"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["Server"] == "sealgate"
    problem = json.loads(text)
    assert set(problem) == {"type", "title", "status", "code", "detail", "next_step"}
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["detail"]
    assert problem["next_step"]
    assert "s3cr3t" not in text
    if status == 405:
        assert response.headers["Allow"] == "POST"
    if code == "kek-revoked":
        assert response.headers["Retry-After"] == "5"


async def test_a_body_without_a_length_is_limited_too(client: aiohttp.ClientSession) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    async with (
        serving(application(), host="127.0.0.1", port=0) as port,
        client.post(f"http://127.0.0.1:{port}/echo", data=pieces()) as response,
    ):
        assert response.status == 413


async def test_what_fits_passes(client: aiohttp.ClientSession) -> None:
    async with serving(application(), host="127.0.0.1", port=0) as port:
        async with client.post(f"http://127.0.0.1:{port}/echo", data=b"x" * 1000) as response:
            assert await response.read() == b"x" * 1000
        async with client.get(f"http://127.0.0.1:{port}/move", allow_redirects=False) as response:
            assert response.status == 302


async def test_bytes_that_are_not_http_get_no_page() -> None:
    async with serving(application(), host="127.0.0.1", port=0) as port, asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
        answer = await reader.read()
        writer.close()
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert b"Traceback" not in answer
    assert b"<html" not in answer


async def test_the_log_has_what_the_answer_hides(
    client: aiohttp.ClientSession, capsys: pytest.CaptureFixture[str]
) -> None:
    from runtime.observe import configure_logging

    configure_logging(json=True)
    async with (
        serving(application(), host="127.0.0.1", port=0) as port,
        client.post(f"http://127.0.0.1:{port}/json/abc", data=b"{") as response,
    ):
        assert response.status == 500
    line = json.loads(capsys.readouterr().err.splitlines()[0])
    assert line["route"] == "/json/{secret}"  # the pattern: a path can hold what must not be logged
    assert "JSONDecodeError" in line["exception"]


async def test_a_client_that_goes_away_within_its_body_is_no_failure_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from runtime.observe import configure_logging

    configure_logging(json=True)
    app, begun, ended = make_application(), asyncio.Event(), asyncio.Event()

    async def read(request: web.Request) -> web.Response:
        begun.set()
        try:
            return web.Response(body=await request.read())
        finally:
            ended.set()

    app.router.add_post("/body", read)
    async with serving(app, host="127.0.0.1", port=0) as port, asyncio.timeout(DEADLINE_S):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /body HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\nhalf of it")
        await begun.wait()
        writer.transport.abort()
        await ended.wait()
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(event["event"], event["route"]) for event in events] == [("a client went away", "/body")]


async def test_health(client: aiohttp.ClientSession) -> None:
    registry = CollectorRegistry()
    Counter("pushes", "Pushes.", namespace="sealgate", registry=registry).inc(3)
    reasons = ["no key yet"]
    app = make_application()
    health_routes(app, readyz=lambda: reasons, registry=registry)
    async with serving(app, host="127.0.0.1", port=0) as port:
        base = f"http://127.0.0.1:{port}"
        async with client.get(f"{base}/livez") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok", "reasons": []})
        async with client.get(f"{base}/readyz") as response:
            assert response.status == 503
            assert await response.json() == {"status": "failing", "reasons": ["no key yet"]}
            assert response.headers["Cache-Control"] == "no-store"
        async with client.get(f"{base}/metrics") as response:
            assert (await response.text()).endswith("\nsealgate_ready 0.0\n")
        reasons.clear()
        async with client.get(f"{base}/readyz") as response:
            assert response.status == 200
        async with client.get(f"{base}/metrics") as response:
            assert "sealgate_pushes_total 3.0" in await response.text()
            assert (await response.text()).endswith("\nsealgate_ready 1.0\n")
            assert response.content_type == "text/plain"


async def test_a_failing_check_is_not_well(client: aiohttp.ClientSession) -> None:
    def broken() -> list[str]:
        raise RuntimeError

    app = make_application()
    health_routes(app, readyz=broken, registry=CollectorRegistry(), livez=lambda: ["stuck"])
    async with serving(app, host="127.0.0.1", port=0) as port:
        async with client.get(f"http://127.0.0.1:{port}/readyz") as response:
            assert response.status == 500
        async with client.get(f"http://127.0.0.1:{port}/livez") as response:
            assert response.status == 503


async def test_openapi(client: aiohttp.ClientSession) -> None:
    app = make_application()
    openapi_route(app, {"openapi": "3.1.0", "info": {"title": "Prüfung"}})
    async with (
        serving(app, host="127.0.0.1", port=0) as port,
        client.get(f"http://127.0.0.1:{port}/openapi.json") as response,
    ):
        assert response.content_type == "application/json"
        assert (await response.json())["info"]["title"] == "Prüfung"


async def test_tls(client: aiohttp.ClientSession, tmp_path: Path) -> None:
    ca = make_server_ca()
    files = write_credential(issue_server(ca), tmp_path, "server")
    trusting = client_context(write_certificate(ca.certificate, tmp_path / "ca.pem"))
    async with serving(application(), host="127.0.0.1", port=0, ssl_context=server_context(*files)) as port:
        async with client.post(f"https://localhost:{port}/echo", data=b"x", ssl=trusting) as response:
            assert await response.read() == b"x"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await client.post(f"https://localhost:{port}/echo", ssl=ssl.create_default_context())


async def test_a_handshake_that_ends_after_the_block_is_not_served(tmp_path: Path) -> None:
    """aiohttp learns of a connection when its handshake ends, and closes what it knows at the end."""
    ca = make_server_ca()
    files = write_credential(issue_server(ca), tmp_path, "server")
    trusting = client_context(write_certificate(ca.certificate, tmp_path / "ca.pem"))
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting.wrap_bio(received, sent, server_hostname="localhost")
    async with asyncio.timeout(DEADLINE_S):
        async with serving(
            application(), host="127.0.0.1", port=0, ssl_context=server_context(*files)
        ) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            writer.write(sent.read())
            hello = await reader.read(1 << 16)
        received.write(hello)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                received.write(await reader.read(1 << 16))
        tls.write(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx")
        writer.write(sent.read())
        answer: bytes | None = None
        while answer is None:
            received.write(await reader.read(1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                answer = tls.read(1 << 16)  # nothing: close_notify
        writer.close()
        assert answer == b""


async def test_leaving_the_block_lets_running_requests_end(client: aiohttp.ClientSession) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()
    app = make_application()

    async def slow(_request: web.Request) -> web.Response:
        entered.set()
        await go_on.wait()
        return web.Response(text="done")

    app.router.add_get("/", slow)
    async with asyncio.timeout(DEADLINE_S):
        async with serving(app, host="127.0.0.1", port=0, grace_s=DEADLINE_S) as port:
            request = asyncio.ensure_future(client.get(f"http://127.0.0.1:{port}/"))
            await entered.wait()
            asyncio.get_running_loop().call_later(0.05, go_on.set)
        response = await request
        assert await response.text() == "done"
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get(f"http://127.0.0.1:{port}/")


async def test_what_does_not_end_is_cut(client: aiohttp.ClientSession) -> None:
    entered = asyncio.Event()
    app = make_application()

    async def stuck(_request: web.Request) -> web.Response:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    app.router.add_get("/", stuck)
    async with asyncio.timeout(DEADLINE_S):
        async with serving(app, host="127.0.0.1", port=0, grace_s=0.1) as port:
            request = asyncio.ensure_future(client.get(f"http://127.0.0.1:{port}/"))
            await entered.wait()
        with pytest.raises(aiohttp.ClientError):
            await request


async def test_an_address_in_use() -> None:
    async with serving(make_application(), host="127.0.0.1", port=0) as port:
        with pytest.raises(OSError, match="in use"):
            async with serving(make_application(), host="127.0.0.1", port=port):
                pass


async def test_the_block_ends_well_when_its_body_raises(client: aiohttp.ClientSession) -> None:
    with pytest.raises(KeyError):
        async with serving(make_application(), host="127.0.0.1", port=0) as port:
            raise KeyError
    async with serving(make_application(), host="127.0.0.1", port=port):
        pass  # the port is free again


def test_a_problem_can_be_made_by_hand() -> None:
    response = problem_response(404, "no-service", "There is no such service.", "See list.")
    assert response.content_type == "application/problem+json"
    assert isinstance(response.body, bytes)
    assert json.loads(response.body)["title"] == "Not Found"
