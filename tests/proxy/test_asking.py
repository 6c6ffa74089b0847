"""Our own requests to a service: as the client, signed, bounded, and cut where their body fails."""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from envelope.keys import NetworkService
from proxy.asking import AnswerTooLongError, Asking, AskingError, Outgoing, Source
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream
from tests.fakes.origin import End, RecordingOrigin, Reply
from tests.proxy.gate.harness import Pki

FIELDS = (
    (b"Authorization", b"Bearer x"),
    (b"If-Match", b"*"),
    (b"Content-Type", b"text/x"),
    (b"Range", b"bytes=0-1"),
    (b"Expect", b"100-continue"),
    (b":authority", b"elsewhere.example"),
    (b"Host", b"client.example"),
    (b"X-Own", "\u00e9".encode()),
)


def source(port: int, scheme: str = "http") -> Source:
    service = ServiceEntry(
        owner=NetworkService("acme", "files"),
        upstream=Upstream.parse(f"{scheme}://localhost:{port}"),
        profile="generic",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    return Source(service=service, target="/a?b=%2F..//c", fields=FIELDS)


async def test_it_is_asked_as_the_client_without_its_conditions() -> None:
    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        origin.reply = Reply(207, [("ETag", '"v"')], [b"an answer"])
        async with asking.ask(
            source(origin.port), "REPORT", fields=[("X-Own", "ours")], keep=["content-type"], body=b"body"
        ) as answer:
            assert (answer.status, answer.fields.sole("etag")) == (207, '"v"')
            assert await answer.read(100) == b"an answer"
        (exchange,) = origin.exchanges
        assert (exchange.method, exchange.path, bytes(exchange.body)) == ("REPORT", "/a?b=%2F..//c", b"body")
        assert exchange.header("authorization") == "Bearer x"
        assert exchange.header("content-type") == "text/x"
        assert exchange.header("host") == f"localhost:{origin.port}"
        assert [value for name, value in exchange.headers if name.lower() == "x-own"] == ["ours"]
        for absent in ("if-match", "range", "expect", ":authority", "user-agent", "cookie"):
            assert exchange.header(absent) is None


async def test_a_cookie_that_http2_has_cut_is_whole_again() -> None:
    crumbs = ((b"Cookie", b"a=1"), (b"X-Own", b"x"), (b"cookie", b"b=2; c=3"))
    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        origin.reply = Reply(200)
        async with asking.ask(replace(source(origin.port), fields=crumbs), "GET") as answer:
            await answer.read(100)
        (exchange,) = origin.exchanges
        cookies = [value for name, value in exchange.headers if name.lower() == "cookie"]
        assert cookies == ["a=1; b=2; c=3"]


async def test_a_signer_sees_it_last() -> None:
    seen: list[Outgoing] = []

    def sign(leaving: Outgoing) -> Outgoing:
        seen.append(leaving)
        return replace(leaving, target="/a?signed", fields=(*leaving.fields, (b"X-Signature", b"s")))

    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        signed = replace(source(origin.port), sign=sign)
        async with asking.ask(signed, "PUT", target="/other", body=b"body"):
            pass
        (exchange,) = origin.exchanges
        assert (exchange.path, exchange.header("x-signature")) == ("/a?signed", "s")
        names = {name.lower() for name, _ in seen[0].fields}
        assert {b"host", b"content-length", b"accept-encoding", b"x-own"} <= names
        assert (seen[0].method, seen[0].target) == ("PUT", "/other")


async def test_what_is_no_path_is_not_asked_for() -> None:
    async with Asking(ssl.create_default_context()) as asking:
        for target in ("@elsewhere.example/", "http://elsewhere.example/", ""):
            with pytest.raises(AskingError):
                async with asking.ask(replace(source(9), target=target), "GET"):
                    pass


@pytest.mark.parametrize("at", [0, 1, 3])
async def test_a_body_that_fails_has_no_end(at: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for index in range(4):
            if index == at:
                raise RuntimeError("scripted")
            yield bytes(100_000)

    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        with pytest.raises((AskingError, RuntimeError)):
            async with asking.ask(source(origin.port), "PUT", body=pieces(), body_bytes=400_000) as answer:
                await answer.read(100)
        await origin.until(lambda: not origin.open_connections)
        assert [exchange.end for exchange in origin.exchanges if exchange.end is End.COMPLETE] == []


@pytest.mark.parametrize("yields", [399_999, 400_001])
async def test_a_body_is_as_long_as_was_said(yields: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(yields)

    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        with pytest.raises(AskingError):
            async with asking.ask(source(origin.port), "PUT", body=pieces(), body_bytes=400_000) as answer:
                await answer.read(100)


@pytest.mark.parametrize("breaks", ["ends", "resets"])
@pytest.mark.parametrize(
    ("method", "body", "times"),
    [
        ("GET", None, 2),
        ("HEAD", None, 2),
        ("PUT", b"content", 1),
        ("PUT", b"", 1),
        ("PUT", bytes(600_000), 1),
        ("DELETE", None, 1),
        ("POST", b"content", 1),
        ("MOVE", None, 1),
    ],
    ids=["get", "head", "put", "put-empty", "put-in-pieces", "delete", "post", "move"],
)
async def test_what_may_change_something_is_sent_once(
    method: str, body: bytes | None, times: int, breaks: str
) -> None:
    """The service does what it is asked on a kept connection, and breaks it in place of answering."""
    served: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                await reader.readexactly(int(length[1]) if length else 0)
                served.append(head.partition(b" ")[0])
                if len(served) == 2:
                    if breaks == "resets":  # without this, closing is an orderly end
                        connection = writer.get_extra_info("socket")
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        writer.transport.abort()
                    break
                writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Asking(ssl.create_default_context()) as asking:
        asked = source(server.sockets[0].getsockname()[1])
        async with asking.ask(asked, "GET") as answer:
            assert await answer.read(10) == b""
        if times > 1:
            async with asking.ask(asked, method, body=body) as answer:
                assert answer.status == 200
        else:
            with pytest.raises(AskingError):
                async with asking.ask(asked, method, body=body):
                    pytest.fail("an answer")
        assert served == [b"GET", *[method.encode()] * times]


@pytest.mark.parametrize(("status", "is_taken"), [(200, False), (201, False), (403, True), (503, True)])
async def test_no_success_is_believed_before_the_body_has_gone_up(status: int, is_taken: bool) -> None:
    """The service answers to the head, and reads no more."""

    async def answer_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\nok".encode())
        await gone.wait()
        writer.close()

    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(1000)
        await gone.wait()
        yield bytes(1000)

    gone = asyncio.Event()
    server = await asyncio.start_server(answer_at_once, "127.0.0.1", 0)
    async with server, Asking(ssl.create_default_context()) as asking:
        asked = source(server.sockets[0].getsockname()[1])
        try:
            if is_taken:
                async with asking.ask(asked, "PUT", body=pieces(), body_bytes=2000) as answer:
                    assert (answer.status, await answer.read(10)) == (status, b"ok")
            else:
                with pytest.raises(AskingError, match="before the body had gone up"):
                    async with asking.ask(asked, "PUT", body=pieces(), body_bytes=2000):
                        pytest.fail("a success")
        finally:
            gone.set()


async def test_a_body_of_unknown_length_is_not_sent() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"

    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        with pytest.raises(AskingError):
            async with asking.ask(source(origin.port), "PUT", body=pieces()):
                pass
        assert origin.connections == 0


async def test_an_answer_is_read_within_a_limit() -> None:
    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        origin.reply = Reply(pieces=[bytes(1000)] * 3, framing="chunked")
        with pytest.raises(AnswerTooLongError):
            async with asking.ask(source(origin.port), "GET") as answer:
                await answer.read(2999)
        origin.reply = Reply(pieces=[bytes(1000)] * 3, framing="chunked", cut_after=2)
        with pytest.raises(AskingError):
            async with asking.ask(source(origin.port), "GET") as answer:
                await answer.read(10_000)


async def test_redirects_are_not_followed() -> None:
    async with RecordingOrigin().listening() as origin, Asking(ssl.create_default_context()) as asking:
        origin.reply = Reply(307, [("Location", "/elsewhere"), ("Set-Cookie", "a=b")])
        for _ in range(2):
            async with asking.ask(source(origin.port), "GET") as answer:
                assert answer.status == 307
        assert [exchange.path for exchange in origin.exchanges] == ["/a?b=%2F..//c"] * 2
        assert origin.exchanges[-1].header("cookie") is None


async def test_a_service_that_cannot_be_verified_gets_nothing(tmp_path: Path) -> None:
    pki = Pki.make(tmp_path)
    async with (
        RecordingOrigin(pki.origin_context()).listening() as origin,
        Asking(ssl.create_default_context()) as asking,
    ):
        with pytest.raises(AskingError):
            async with asking.ask(source(origin.port, "https"), "PUT", body=b"secret"):
                pass
        assert origin.exchanges == []
