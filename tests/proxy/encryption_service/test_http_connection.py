"""One connection: order, framing, refusals in the dialect's words, waits that end, streams that stop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from proxy.encryption_service.body_stream import READ_AHEAD_BYTES, BodyCutError
from proxy.encryption_service.http_connection import IN_A_ROW, LINGER_BYTES, PAUSE_S, HttpConnection
from proxy.encryption_service.http_server import TICK_S, ServiceServer
from proxy.encryption_service.kept_bodies import KeptBodies
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.model import DialectName
from proxy.encryption_service.settings import EncryptionServiceSettings, HttpLimits, ListenSettings
from runtime.clock import Clock, SystemClock
from tests.fakes.clock import ManualClock
from tests.proxy.encryption_service.echo import MAX_BODY_BYTES, Client, Echo, request

LIMITS = HttpLimits(body_bytes_per_s=1000, answer_s=60)


def connections_of(server: ServiceServer) -> list[HttpConnection]:
    return [one for one in server.listeners[0].site.connections if isinstance(one, HttpConnection)]


@asynccontextmanager
async def serve(
    *dialects: Echo, clock: Clock | None = None, limits: HttpLimits = LIMITS
) -> AsyncIterator[tuple[int, ServiceServer]]:
    names = tuple(dialect.name for dialect in dialects)
    server = ServiceServer(
        EncryptionServiceSettings(
            listen=(ListenSettings(host="127.0.0.1", port=0, plain=True, dialects=names),), limits=limits
        ),
        {dialect.name: dialect for dialect in dialects},
        metrics=ServiceMetrics(),
        clock=clock or SystemClock(),
    )
    async with server.serving(grace_s=0) as (port,):
        try:
            yield port, server
        finally:
            Client.close_all()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - whatever is waited for, it has no event
            await asyncio.sleep(0.001)


# ---- requests


async def test_a_connection_is_kept_and_calls_arrive_as_they_were_sent() -> None:
    echo = Echo()
    async with serve(echo) as (port, _):
        client = await Client.connect(port)
        first = await client.ask("/e/%41//b?x=1&y", b"hello", headers="X-Two: a\r\nX-Two: b\r\n")
        second = await client.ask("/e/echo", method="LIST")
        assert (first.status, first.body, first.headers["x-path"]) == (200, b"hello", "/e/%41//b")
        assert first.headers["date"].endswith("GMT")
        assert (second.status, second.body) == (200, b"")
        call = echo.calls[0]
        assert (call.method, call.path, call.query, call.scheme) == ("POST", "/e/%41//b", "x=1&y", "http")
        assert call.values("x-two") == ["a", "b"]
        assert (call.peer.address, call.peer.certificate_der) == ("127.0.0.1", None)


async def test_pipelined_calls_are_answered_in_order_whoever_has_to_wait() -> None:
    echo = Echo()
    async with serve(echo) as (port, _):
        client = await Client.connect(port)
        await client.send(
            request("/e/echo", b"1")
            + request("/e/wait", b"2")
            + request("/e/echo", b"3")
            + request("/e/echo")
        )
        assert (await client.reply()).body == b"1"
        await until(lambda: len(echo.calls) == 2)  # the third waits for the second
        echo.go_on.set()
        assert [(await client.reply()).body for _ in range(3)] == [b"2", b"3", b""]


async def test_a_long_pipeline_neither_starves_others_nor_fills_the_memory() -> None:
    echo = Echo()
    one = request("/e/echo", b"x" * 200)
    async with serve(echo) as (port, server):
        greedy, other = await Client.connect(port), await Client.connect(port)
        sending = asyncio.create_task(greedy.send(one * 20_000))
        await until(lambda: echo.calls)
        before = len(echo.calls)
        assert (await other.ask("/e/other", b"y")).status == 200
        at = next(index for index, call in enumerate(echo.calls) if call.path == "/e/other")
        assert at - before < 50 * IN_A_ROW
        # Its answers are not read: the server stops reading too.
        await until(lambda: any(c._writable is not None for c in connections_of(server)))
        for connection in connections_of(server):
            assert connection._reader.buffered_bytes < READ_AHEAD_BYTES + 300_000
        served = len(echo.calls)
        assert served < 20_000
        reading = [await greedy.reply() for _ in range(20_000)]
        assert {reply.status for reply in reading} == {200}
        await sending
        greedy.close()
        other.close()


async def test_an_answer_of_nothing_has_neither_length_nor_body() -> None:
    async with serve(Echo()) as (port, _):
        client = await Client.connect(port)
        for _ in range(2):  # the head is made, then kept
            reply = await client.ask("/e/nothing", method="OPTIONS")
            assert (reply.status, reply.headers["access-control-allow-origin"]) == (204, "x")
            assert not {"content-length", "transfer-encoding", "content-type"} & reply.headers.keys()
        assert (await client.ask("/e/echo", b"next")).body == b"next"


async def test_expect_continue_is_answered_only_where_the_body_is_wanted() -> None:
    async with serve(Echo()) as (port, _):
        client = await Client.connect(port)
        await client.send(
            b"POST /e/echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert (await client.reply()).status == 100
        await client.send(b"hi")
        assert (await client.reply()).body == b"hi"
        await client.send(
            b"POST /e/echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 999999\r\n\r\n"
        )
        assert (await client.reply()).status == 413
        assert await client.ended() == b""


@pytest.mark.parametrize(
    ("method", "version", "headers", "kept"),
    [
        ("POST", "1.0", "Connection: keep-alive\r\n", False),
        ("POST", "1.1", "Connection: close\r\n", False),
        ("HEAD", "1.1", "", True),
    ],
)
async def test_who_closes_when(method: str, version: str, headers: str, kept: bool) -> None:
    async with serve(Echo()) as (port, _):
        client = await Client.connect(port)
        reply = await client.ask("/e/echo", b"body", method=method, headers=headers, version=version)
        assert (reply.status, reply.headers["content-length"]) == (200, "4")
        assert ("connection" in reply.headers) is not kept
        if kept:
            assert (await client.ask("/e/echo", b"next")).body == b"next"
        else:
            assert await client.ended() == b""
        client.close()


# ---- refusals


async def test_every_trouble_is_said_in_the_words_of_the_path() -> None:
    transit, xks = Echo(DialectName.TRANSIT, "/e/"), Echo(DialectName.XKS, "/x/")
    async with serve(transit, xks) as (port, server):
        client = await Client.connect(port)
        for path in ("/x/crash", "/x/crash-later", "/e/crash"):
            reply = await client.ask(path, b"body")
            assert (reply.status, reply.json["trouble"], reply.json["path"]) == (500, "crash", path)
        unclaimed = await client.ask("/elsewhere")
        assert (unclaimed.status, unclaimed.json["code"]) == (404, "not-found")
        assert unclaimed.headers["content-type"] == "application/problem+json"
        malformed = await client.ask("/x/echo", headers="A : b\r\n")
        assert (malformed.status, malformed.json["trouble"]) == (400, "malformed-http")
        assert await client.ended() == b""
        nothing_understood = await Client.connect(port)
        await nothing_understood.send(b"\x16\x03\x01\x02\r\n\r\n")
        reply = await nothing_understood.reply()
        assert (reply.status, reply.headers["content-type"]) == (400, "application/problem+json")
        assert await nothing_understood.ended() == b""
        text = "".join(str(sample) for metric in server._metrics.collect() for sample in metric.samples)
        assert "'dialect': 'xks', 'status': '500'" in text


async def test_a_listener_of_one_dialect_speaks_no_other_language() -> None:
    async with serve(Echo(DialectName.XKS, "/x/")) as (port, _):
        client = await Client.connect(port)
        await client.send(b"nonsense\r\n\r\n")
        assert (await client.reply()).json["trouble"] == "malformed-http"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_too_large_is_refused_unread_and_the_refusal_arrives(chunked: bool) -> None:
    echo = Echo()
    async with serve(echo) as (port, _):
        client = await Client.connect(port)
        size = MAX_BODY_BYTES + 1
        framing = (
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size
            if chunked
            else b"Content-Length: %d\r\n\r\n" % size
        )
        await client.send(b"POST /e/echo HTTP/1.1\r\nHost: x\r\n" + framing + bytes(size))
        reply = await client.reply()
        assert (reply.status, reply.json["trouble"]) == (413, "too-large")
        assert reply.headers["connection"] == "close"
        assert await client.ended() == b""
        assert echo.calls == []
        exact = await Client.connect(port)
        assert (await exact.ask("/e/echo", bytes(MAX_BODY_BYTES))).status == 200
        exact.close()


async def test_what_follows_a_refused_request_is_no_request() -> None:
    echo = Echo()
    async with serve(echo) as (port, _):
        client = await Client.connect(port)
        await client.send(
            b"POST /e/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n\r\n" + request("/e/smuggled")
        )
        assert (await client.reply()).status == 400
        assert await client.ended() == b""
        assert echo.calls == []


async def test_a_header_that_would_break_out_is_not_sent() -> None:
    async with serve(Echo()) as (port, _):
        client = await Client.connect(port)
        await client.send(request("/e/breakout"))
        assert await client.ended() in {b"", b"<reset>"}


# ---- waits


async def test_slow_heads_slow_bodies_and_idle_connections_end() -> None:
    clock = ManualClock()
    async with serve(Echo(), clock=clock) as (port, server):
        connections = server.listeners[0].site.connections

        async def connected(data: bytes, seen: Callable[[], object]) -> Client:
            client = await Client.connect(port)
            before = len(connections)
            await client.send(data)
            await until(lambda: len(connections) > before or seen())
            return client

        silent = await Client.connect(port)
        await until(lambda: len(connections) == 1)
        await clock.advance(LIMITS.head_s + 2 * TICK_S)
        assert await silent.ended() == b""

        dripping = await Client.connect(port)
        await until(lambda: len(connections) == 1)
        for letter in b"POST /e/ec":  # a letter a second: progress does not help
            await dripping.send(bytes([letter]))
            await until(lambda: connections_of(server)[0]._reader.buffered_bytes)
            await clock.advance(1)
        await clock.advance(2 * TICK_S)
        late = await dripping.reply()
        assert (late.status, late.json["trouble"]) == (408, "timeout")
        dripping.close()
        await until(lambda: not connections)

        stuck = await Client.connect(port)
        await stuck.send(b"POST /e/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        await until(lambda: connections and connections_of(server)[0]._reader.body_bytes == 3)
        await clock.advance(LIMITS.body_idle_s + 2 * TICK_S)
        late = await stuck.reply()
        assert (late.status, late.json["trouble"]) == (408, "timeout")
        stuck.close()
        await until(lambda: not connections)

        crawling = await Client.connect(port)
        await crawling.send(b"POST /e/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n")
        await until(lambda: connections and connections_of(server)[0]._head is not None)
        for sent in range(1, 20):  # never idle, but slower than any honest client
            await crawling.send(b"x")
            await until(lambda: not connections or connections_of(server)[0]._reader.body_bytes == sent)  # noqa: B023 - awaited here
            await clock.advance(2)
            if crawling.reader._buffer:  # type: ignore[attr-defined]
                break
        assert (await crawling.reply()).status == 408
        crawling.close()
        await until(lambda: not connections)

        idle = await Client.connect(port)
        assert (await idle.ask("/e/echo")).status == 200
        await clock.advance(LIMITS.keep_alive_s - 2 * TICK_S)
        assert (await idle.ask("/e/echo")).status == 200
        await clock.advance(LIMITS.keep_alive_s + 2 * TICK_S)
        assert await idle.ended() == b""


async def test_a_client_that_does_not_read_is_cut() -> None:
    clock = ManualClock()
    async with serve(Echo(), clock=clock) as (port, server):
        client = await Client.connect(port)
        await client.send(request("/e/big"))
        connections = server.listeners[0].site.connections
        await until(lambda: connections and connections_of(server)[0]._writable is not None)
        await clock.advance(LIMITS.write_s + 2 * TICK_S)
        await until(lambda: not connections)


async def test_a_call_that_waits_too_long_is_overload_and_one_whose_client_left_is_cancelled() -> None:
    echo = Echo()
    async with serve(echo, limits=HttpLimits(answer_s=0.1)) as (port, server):
        client = await Client.connect(port)
        reply = await client.ask("/e/wait", b"x")
        assert (reply.status, reply.json["trouble"]) == (503, "overload")
        client.close()
    async with serve(echo) as (port, server):
        client = await Client.connect(port)
        await client.send(request("/e/wait", b"x"))
        await until(lambda: len(echo.calls) == 2)
        client.reset()
        await until(lambda: not connections_of(server))
        await until(
            lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "service:transit"]
        )


async def test_who_asks_too_much_waits_and_nobody_else() -> None:
    echo = Echo()
    async with serve(echo) as (port, _):
        greedy, other = await Client.connect(port), await Client.connect(port)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await greedy.send(request("/e/too-much", b"1") + request("/e/echo", b"2") + request("/e/echo", b"3"))
        assert (await greedy.reply()).status == 429
        assert (await other.ask("/e/echo", b"other")).body == b"other"
        assert [(await greedy.reply()).body for _ in range(2)] == [b"2", b"3"]
        assert loop.time() - began_s >= PAUSE_S


async def test_a_last_request_before_a_half_close_is_answered() -> None:
    echo = Echo()
    async with serve(echo) as (port, _):
        client = await Client.connect(port)
        await client.send(request("/e/wait", b"bye"))
        client.writer.write_eof()
        await until(lambda: echo.calls)
        await asyncio.sleep(0)
        echo.go_on.set()
        assert (await client.reply()).body == b"bye"
        assert await client.ended() == b""


# ---- streams


async def test_a_stream_is_echoed_piece_by_piece() -> None:
    echo = Echo()
    pieces = [bytes([number]) * 50_000 for number in range(100)]
    async with serve(echo) as (port, _):
        client = await Client.connect(port)

        async def upload() -> None:
            await client.send(b"POST /e/stream HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for piece in pieces:
                await client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            await client.send(b"0\r\n\r\n")

        async with asyncio.TaskGroup() as group:
            group.create_task(upload())
            reply = await client.reply()
        assert reply.body == b"".join(pieces)
        assert (await client.ask("/e/echo", b"kept")).body == b"kept"


async def test_neither_side_of_a_stream_runs_ahead() -> None:
    echo = Echo()
    async with serve(echo) as (port, server):
        client = await Client.connect(port)
        await client.send(b"POST /e/consume HTTP/1.1\r\nHost: x\r\nContent-Length: 67108864\r\n\r\n")
        sending = asyncio.create_task(client.send(bytes(64 << 20)))
        await until(lambda: echo.calls)
        (connection,) = connections_of(server)
        await until(lambda: connection._stream is not None and connection._stream.is_full)
        stream = connection._stream
        assert stream is not None
        assert not sending.done()
        assert stream._held + connection._reader.buffered_bytes < 2 << 20
        echo.go_on.set()
        assert (await client.reply()).body == str(64 << 20).encode()
        await sending
        await client.send(request("/e/long", method="GET"))  # 64 MiB that nobody reads
        await until(lambda: connection._writable is not None)
        assert echo.sent < 32 << 20


async def test_a_failed_stream_has_no_end() -> None:
    async with serve(Echo()) as (port, _):
        client = await Client.connect(port)
        await client.send(request("/e/cut", method="GET"))
        rest = await client.ended()
        assert not rest.endswith(b"0\r\n\r\n")
        old = await Client.connect(port)
        assert (await old.ask("/e/long", version="1.0")).status == 400
        assert await old.ended() == b""


@pytest.mark.parametrize("damage", [b"", b"zz\r\n"])
async def test_a_streamed_body_that_breaks_off_is_an_error_not_an_end(damage: bytes) -> None:
    echo = Echo()
    echo.go_on.set()
    async with serve(echo) as (port, _):
        client = await Client.connect(port)
        await client.send(
            b"POST /e/consume HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
        )
        await until(lambda: echo.received == 3)
        if damage:
            await client.send(damage)
            reply = await client.reply()
            assert (reply.status, reply.json["trouble"]) == (400, "malformed-http")
            assert await client.ended() == b""
        else:
            client.close()
        await until(lambda: echo.failure is not None)
        assert isinstance(echo.failure, BodyCutError | asyncio.CancelledError)


async def test_a_streamed_body_that_stands_still_is_too_slow() -> None:
    clock, echo = ManualClock(), Echo()
    echo.go_on.set()
    async with serve(echo, clock=clock) as (port, _):
        client = await Client.connect(port)
        await client.send(b"POST /e/consume HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        await until(lambda: echo.received == 3)
        await clock.advance(LIMITS.body_idle_s + 2 * TICK_S)
        reply = await client.reply()
        assert (reply.status, reply.json["trouble"]) == (408, "timeout")
        assert await client.ended() == b""


async def test_connections_leave_nothing_behind() -> None:
    async with serve(Echo()) as (port, server):
        for path in ("/e/echo", "/e/crash", "/e/crash-later", "/elsewhere"):
            client = await Client.connect(port)
            await client.ask(path, b"x")
            client.close()
        listener = server.listeners[0]
        await until(lambda: not listener.site.connections and not listener._places)
        assert not listener._per_peer


# ---- bodies of strangers


def begun(path: str, length: int, *, headers: str = "", sent: int = 100) -> bytes:
    """A request of which *sent* bytes of its body are here."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n".encode() + bytes(
        sent
    )


async def test_a_stranger_is_answered_by_the_head_alone() -> None:
    echo = Echo()
    echo.tenants = {"a": "acme"}
    async with serve(echo) as (port, server):
        stranger = await Client.connect(port)
        await stranger.send(begun("/e/echo", 90_000))
        reply = await stranger.reply()
        assert (reply.status, reply.body, reply.headers["connection"]) == (200, b"", "close")
        assert await stranger.ended() == b""
        assert server.listeners[0].site.kept.total_bytes == 0
        assert [call.body for call in echo.calls] == [b""]
        # It is the same with chunks, and nobody is asked to go on.
        for headers in ("Transfer-Encoding: chunked\r\n", "Expect: 100-continue\r\nContent-Length: 9\r\n"):
            other = await Client.connect(port)
            await other.send(f"POST /e/echo HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
            assert (await other.reply()).status == 200
            assert await other.ended() == b""


async def test_whose_a_body_is_is_asked_once_and_only_if_it_is_waited_for() -> None:
    echo = Echo()
    echo.tenants = {"a": "acme"}
    async with serve(echo) as (port, server):
        client = await Client.connect(port)
        assert (await client.ask("/e/echo", b"whole")).body == b"whole"
        assert echo.asked == 0
        for _ in range(2):  # each request is asked about for itself
            await client.send(begun("/e/echo", 90_000, headers="token: a\r\n"))
            await until(lambda: server.listeners[0].site.kept.total_bytes == 100)
            for _ in range(10):
                await client.send(bytes(8_990))
            reply = await client.reply()
            assert (reply.status, len(reply.body)) == (200, 90_000)
            assert server.listeners[0].site.kept.total_bytes == 0
        assert echo.asked == 2
        await client.send(begun("/e/echo", 90_000))
        assert (await client.reply()).body == b"", "what was known of the request before does not count"


async def test_a_known_caller_is_told_to_go_on() -> None:
    echo = Echo()
    echo.tenants = {"a": "acme"}
    async with serve(echo) as (port, _):
        client = await Client.connect(port)
        await client.send(begun("/e/echo", 5, headers="token: a\r\nExpect: 100-continue\r\n", sent=0))
        assert (await client.reply()).status == 100
        await client.send(b"hello")
        assert (await client.reply()).body == b"hello"


async def test_a_tenant_does_not_take_the_place_of_others_nor_do_strangers() -> None:
    echo, other = Echo(), Echo(DialectName.XKS, "/x/")
    echo.tenants = {"a": "acme", "b": "globex"}
    async with serve(echo, other) as (port, server):
        site = server.listeners[0].site
        site.kept = KeptBodies(max_tenant_bytes=50_000, max_strangers_bytes=10_000)
        acme, more, globex, stranger = [await Client.connect(port) for _ in range(4)]
        await acme.send(begun("/e/echo", 90_000, headers="token: a\r\n", sent=50_000))
        await until(lambda: site.kept.total_bytes == 50_000)
        await more.send(begun("/e/echo", 90_000, headers="token: a\r\n"))
        assert (await more.reply()).status == 503
        await stranger.send(begun("/x/echo", 90_000, sent=10_001))
        assert (await stranger.reply()).status == 503
        await globex.send(begun("/e/echo", 200, headers="token: b\r\n"))
        await until(lambda: site.kept.total_bytes == 50_100)
        await globex.send(bytes(100))
        assert (await globex.reply()).status == 200
        acme.close()
        await until(lambda: site.kept.total_bytes == 0)


async def test_what_is_still_sent_after_a_refusal_is_dropped_up_to_a_bound() -> None:
    """And then left unread until the wait ends: HAProxy, cut while it sends, loses the answer (502)."""
    echo = Echo()
    echo.tenants = {}

    async def sent_on(client: Client) -> None:
        while True:
            await client.send(bytes(LINGER_BYTES))

    async with serve(echo, limits=HttpLimits(linger_s=3600)) as (port, server):
        stranger = await Client.connect(port)
        await stranger.send(begun("/e/echo", 90_000))
        assert (await stranger.reply()).status == 200
        [connection] = connections_of(server)
        sending = asyncio.create_task(sent_on(stranger))
        await until(lambda: connection._dropped > LINGER_BYTES)
        await until(lambda: not connection._reading)
        dropped = connection._dropped
        for _ in range(20):
            await asyncio.sleep(TICK_S / 10)
            assert not sending.done(), "it is not cut"
        assert connection._dropped == dropped, "and costs nothing"
        connection.expired()
        with pytest.raises(ConnectionError):
            await sending
        assert [call.body for call in echo.calls] == [b""]
