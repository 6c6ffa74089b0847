"""A body that ends with its connection has ended only if the origin said so, whoever asks and however."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from enum import StrEnum
from typing import Any, override

import pytest
import uvloop
from mitmproxy.http import HTTPFlow

from proxy import gate
from proxy.gate import Lever
from tests.fakes.origin import RecordingOrigin
from tests.proxy.gate.harness import (
    IS_STOCK,
    Answer,
    Http2Client,
    Pki,
    Rig,
    Script,
    clear,
    clear_response,
    invert,
    open_response,
    running,
)

pytestmark = pytest.mark.skipif(IS_STOCK, reason="it is about the gate alone")

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
BODY = b"as far as it goes"


class Ending(StrEnum):
    """What an origin does after the last byte of its body."""

    NOTIFY = "close_notify, then FIN"
    NOTIFY_RESET = "close_notify, read by the proxy, then RST"
    FIN = "FIN"
    RESET = "RST"
    ALERT = "fatal alert, then FIN"
    GARBAGE = "a record that does not decrypt, close_notify, FIN"


class CuttingOrigin(RecordingOrigin):
    """Answers by *head*, BODY and *tail*, and ends as told. Does its TLS by hand, to leave parts out."""

    def __init__(
        self, ending: Ending, context: ssl.SSLContext | None, *, head: bytes = HEAD, tail: bytes = b""
    ) -> None:
        super().__init__()
        self.ending = ending
        self.context = context
        self.may_end = asyncio.Event()
        self._answered = head + BODY + tail

    @property
    def is_proper(self) -> bool:
        return self.ending in PROPER if self.context is not None else self.ending is Ending.FIN

    @override
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        try:
            with contextlib.suppress(OSError, EOFError):
                await self._answer(reader, writer)
        finally:
            writer.transport.abort()
            self.open_connections -= 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls: ssl.SSLObject | None = None
        if self.context is not None:
            tls = self.context.wrap_bio(incoming, outgoing, server_side=True)

        async def until_done[T](step: Callable[[], T]) -> T:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    await flush()
                    if not (data := await reader.read(1 << 16)):
                        raise EOFError from None
                    incoming.write(data)

        async def flush() -> None:
            writer.write(outgoing.read())
            await writer.drain()

        request = b""
        if tls is not None:
            await until_done(tls.do_handshake)
        while not request.endswith(b"\r\n\r\n"):
            if tls is not None:
                request += await until_done(lambda: tls.read(1 << 16))
            elif data := await reader.read(1 << 16):
                request += data
            else:
                raise EOFError

        if tls is None:
            writer.write(self._answered)
        else:
            tls.write(self._answered)
        await flush()
        await self.may_end.wait()
        if tls is not None:
            match self.ending:
                case Ending.ALERT:
                    incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))
                    with contextlib.suppress(ssl.SSLError):
                        tls.read(1)
                    await flush()
                case Ending.GARBAGE:
                    writer.write(b"\x17\x03\x03\x00\x20" + bytes(32))
                    with contextlib.suppress(ssl.SSLError):
                        tls.unwrap()
                    await flush()
                case Ending.NOTIFY | Ending.NOTIFY_RESET:
                    with contextlib.suppress(ssl.SSLError):
                        tls.unwrap()
                    await flush()
                case _:
                    pass
        raw = writer.get_extra_info("socket")
        if self.ending is Ending.NOTIFY_RESET:
            await reader.read()  # until the proxy has closed its side
        if self.ending in (Ending.RESET, Ending.NOTIFY_RESET):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            raw.shutdown(socket.SHUT_WR)
            await reader.read()


PROPER = (Ending.NOTIFY, Ending.NOTIFY_RESET)
OVER_TLS = tuple(Ending)
OVER_TCP = (Ending.FIN, Ending.RESET)
PERMITS = ("clear", "transform", "transform that holds its head")
CLIENTS = ("h1", "h2")

type Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(
    params=[(frozenset(Lever), uvloop.new_event_loop), (frozenset(), asyncio.new_event_loop)],
    ids=["levers and uvloop", "neither"],
)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The gate, and what runs a test behind it."""
    enabled, new_event_loop = request.param
    gate.install(levers=enabled)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            yield runner.run
    finally:
        gate.uninstall()


@contextlib.asynccontextmanager
async def in_front_of(origin: CuttingOrigin, pki: Pki, permit: str, client: str) -> AsyncIterator[Rig]:
    decide = clear_response if permit == "clear" else open_response(holds_head=permit != "transform")

    def responseheaders(flow: HTTPFlow) -> None:
        decide(flow)
        origin.may_end.set()  # what it sent is here

    script = Script(requestheaders=clear, responseheaders=responseheaders)
    is_tls = origin.context is not None
    async with (
        origin.listening(),
        running(pki, script, protocols=(client, "h1"), origin=origin, origin_tls=is_tls) as rig,
    ):
        yield rig


def judge(answer: Answer, permit: str, *, proper: bool, codes: list[str]) -> None:
    if proper:
        assert answer.is_success
        assert answer.code is None
        assert answer.body == (BODY if permit == "clear" else invert(BODY) + b"END!")
        assert codes == []
        return
    assert codes == ["upstream-failed"]
    assert not answer.complete
    assert answer.status == 200
    assert (BODY if permit == "clear" else invert(BODY)).startswith(answer.body)


def tls_context(pki: Pki, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = pki.origin_context()
    context.minimum_version = context.maximum_version = version
    return context


async def download(origin: CuttingOrigin, pki: Pki, permit: str, client: str) -> None:
    async with in_front_of(origin, pki, permit, client) as rig:
        async with rig.client() as speaker:
            answer = await speaker.exchange("GET", pieces=None)
            judge(answer, permit, proper=origin.is_proper, codes=rig.script.codes)
            if isinstance(speaker, Http2Client) and not origin.is_proper:
                assert list(speaker.reset_codes) == [1]
                assert not speaker.is_closed  # its other streams live
        await rig.tidy()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("permit", PERMITS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("ending", OVER_TLS, ids=lambda ending: ending.name)
def test_over_tls_only_close_notify_ends_a_body(  # noqa: PLR0917 - pytest passes them by name
    pki: Pki, run: Run, ending: Ending, version: ssl.TLSVersion, permit: str, client: str
) -> None:
    run(download(CuttingOrigin(ending, tls_context(pki, version)), pki, permit, client))


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("permit", PERMITS)
@pytest.mark.parametrize("ending", OVER_TCP, ids=lambda ending: ending.name)
def test_over_tcp_a_fin_ends_a_body_and_a_reset_does_not(
    pki: Pki, run: Run, ending: Ending, permit: str, client: str
) -> None:
    run(download(CuttingOrigin(ending, None), pki, permit, client))


@pytest.mark.parametrize("ending", OVER_TLS, ids=lambda ending: ending.name)
def test_a_client_of_http10_sees_the_cut_as_well(pki: Pki, run: Run, ending: Ending) -> None:
    async def ask() -> None:
        origin = CuttingOrigin(ending, pki.origin_context())
        async with in_front_of(origin, pki, "clear", "h1") as rig:
            async with asyncio.timeout(30), rig.http1_client() as client:
                await client.send(b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                judge(await client.answer("GET"), "clear", proper=origin.is_proper, codes=rig.script.codes)
            await rig.tidy()

    run(ask())


@pytest.mark.parametrize("ending", [Ending.FIN, Ending.ALERT, Ending.RESET], ids=lambda ending: ending.name)
def test_a_length_or_chunks_need_no_close_notify(pki: Pki, run: Run, ending: Ending) -> None:
    async def ask() -> None:
        for framing, end in ((b"Content-Length: 17", b""), (b"Transfer-Encoding: chunked", b"\r\n0\r\n\r\n")):
            head = HEAD.replace(b"Connection: close", framing) + (b"11\r\n" if end else b"")
            origin = CuttingOrigin(ending, pki.origin_context(), head=head, tail=end)
            async with in_front_of(origin, pki, "clear", "h1") as rig:
                async with rig.client() as client:
                    judge(await client.exchange("GET", pieces=None), "clear", proper=True, codes=[])
                await rig.tidy()

    run(ask())
