"""What goes wrong in mitmproxy 12.2.3 as it comes, row by row, and does not here (docs/adr/0003).

Each test shows that the canary did not reach the origin, that an aborted body had no proper end there, that
the client saw an error or a cut at once and never a success, and that nothing is left behind.
`test_stock.py` runs this file without the gate, where the rows must turn red.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, override

import pytest
from mitmproxy import http
from mitmproxy.exceptions import AddonHalt
from mitmproxy.http import HTTPFlow

from proxy import refusals
from proxy.gate import CLEAR, Piece, Transform, permit
from proxy.refusals import RefusedError
from tests.fakes.origin import End, RecordingOrigin, Reply
from tests.proxy.gate.harness import (
    ALL_PROTOCOLS,
    CANARY,
    SOON_S,
    Answer,
    Http1Client,
    Http2Client,
    Inverting,
    Pki,
    Protocols,
    Rig,
    Script,
    clear,
    clear_response,
    invert,
    is_upload,
    last,
    open_response,
    permit_upload,
    running,
    seal,
)

pytestmark = pytest.mark.usefixtures("guarded")

everywhere = pytest.mark.parametrize("protocols", ALL_PROTOCOLS, ids="-".join)
to_http1 = pytest.mark.parametrize("protocols", [("h1", "h1"), ("h2", "h1")], ids="-".join)
from_http2 = pytest.mark.parametrize("protocols", [("h2", "h1"), ("h2", "h2")], ids="-".join)
HTTP1: Protocols = ("h1", "h1")
HALT: Exception = AddonHalt()  # type: ignore[no-untyped-call]


class OddError(BaseException):
    """Not an Exception: mitmproxy's `except Exception` does not see it."""


def raising(error: BaseException, *, is_async: bool = False) -> Callable[[Any], Any]:
    def hook(_: Any) -> None:
        raise error

    async def async_hook(_: Any) -> None:
        await asyncio.sleep(0)
        raise error

    return async_hook if is_async else hook


def then_raising(first: Callable[[HTTPFlow], None], error: BaseException) -> Callable[[HTTPFlow], None]:
    def hook(flow: HTTPFlow) -> None:
        first(flow)
        raise error

    return hook


def arrivals(rig: Rig, size: int) -> Callable[[int], Awaitable[None]]:
    """Before piece n, wait until the origin has n pieces of *size*: each is then a piece to the transform.

    Or until the origin sees the body cut.
    """

    async def before(index: int) -> None:
        def has_arrived() -> bool:
            seen = rig.origin.exchanges
            return bool(seen) and (len(seen[-1].body) >= index * size or seen[-1].end is End.CUT)

        if index:
            await rig.origin.until(has_arrived, within_s=SOON_S)

    return before


async def assert_refused(rig: Rig, answer: Answer, code: str) -> None:
    """The client was told *code*; nothing of the body reached the origin; nothing is left."""
    assert answer.code == code
    assert answer.status == next(
        value.status for value in vars(refusals).values() if getattr(value, "code", "") == code
    )
    assert f'"code": "{code}"'.encode() in answer.body
    assert answer.header("server") is None
    assert not rig.origin.saw(CANARY)
    await rig.tidy()


def assert_no_upstream(rig: Rig) -> None:
    assert rig.origin.connections == 0


async def assert_cut_upstream(rig: Rig) -> None:
    """The origin saw a beginning, no canary, and no proper end."""
    await rig.tidy()
    assert not rig.origin.saw(CANARY)
    assert [exchange.end for exchange in rig.origin.exchanges] == [End.CUT]


# ---- row 1


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("error", [RuntimeError("scripted"), HALT], ids=["Exception", "AddonHalt"])
@to_http1
async def test_row_01_requestheaders_raises(
    pki: Pki, protocols: Protocols, error: Exception, is_async: bool
) -> None:
    script = Script(requestheaders=raising(error, is_async=is_async))
    async with running(pki, script, protocols=protocols) as rig:
        answer = await rig.put(within_s=SOON_S)
        await assert_refused(rig, answer, "internal")
        assert_no_upstream(rig)


async def test_row_01_requestheaders_raises_after_it_has_permitted(pki: Pki) -> None:
    script = Script(requestheaders=then_raising(clear, RuntimeError("scripted")))
    async with running(pki, script) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "internal")
        assert_no_upstream(rig)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("error", [RuntimeError("scripted"), HALT], ids=["Exception", "AddonHalt"])
@to_http1
async def test_row_01_request_raises_on_a_message_without_a_body(
    pki: Pki, protocols: Protocols, error: Exception, is_async: bool
) -> None:
    script = Script(request=raising(error, is_async=is_async))
    async with running(pki, script, protocols=protocols) as rig:
        answer = await rig.get(path=f"/{CANARY.decode()}", within_s=SOON_S)
        await assert_refused(rig, answer, "internal")
        assert_no_upstream(rig)


@everywhere
async def test_row_01_request_raises_after_a_streamed_body(pki: Pki, protocols: Protocols) -> None:
    script = Script(request=raising(RuntimeError("scripted")))
    async with running(pki, script, protocols=protocols) as rig:
        assert (await rig.put(within_s=SOON_S)).code == "internal"
        await assert_cut_upstream(rig)


# ---- row 2


@everywhere
async def test_row_02_the_addon_is_silent(pki: Pki, protocols: Protocols) -> None:
    script = Script(requestheaders=None, responseheaders=None)
    async with running(pki, script, protocols=protocols) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "no-permit")
        await assert_refused(rig, await rig.get(within_s=SOON_S), "no-permit")
        assert_no_upstream(rig)


async def test_row_02_the_addon_says_why_it_does_not_permit(pki: Pki) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit(flow).refusal = refusals.NO_ACTIVE_KEY

    async with running(pki, Script(requestheaders=requestheaders)) as rig:
        answer = await rig.put(within_s=SOON_S)
        await assert_refused(rig, answer, "no-active-key")
        assert answer.header("retry-after") == "60"


async def test_row_02_a_response_permitted_in_advance_is_not_permitted(pki: Pki) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit(flow).request = permit(flow).response = CLEAR

    async with running(pki, Script(requestheaders=requestheaders, responseheaders=None)) as rig:
        await assert_refused(rig, await rig.get(within_s=SOON_S), "no-permit")


# ---- row 3


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("error", [OddError(), asyncio.CancelledError()], ids=["BaseException", "Cancelled"])
@pytest.mark.parametrize("hook", ["requestheaders", "request", "responseheaders", "response"])
async def test_row_03_a_hook_raises_what_is_no_exception(
    pki: Pki, hook: str, error: BaseException, is_async: bool
) -> None:
    script = Script(**{hook: raising(error, is_async=is_async)})
    async with running(pki, script) as rig:
        answer = await rig.put(within_s=SOON_S)
        assert not answer.is_success
        assert not rig.origin.saw(CANARY)
        await rig.tidy()
        if hook == "requestheaders":
            assert_no_upstream(rig)
        if hook in ("requestheaders", "request"):
            assert all(exchange.end is End.CUT for exchange in rig.origin.exchanges)
        assert script.codes == ["internal"]


@pytest.mark.parametrize(
    "hook", ["client_connected", "next_layer", "tls_clienthello", "tls_start_client", "server_connect"]
)
@pytest.mark.parametrize("error", [RuntimeError("x"), OddError(), HALT], ids=lambda e: type(e).__name__)
async def test_row_03_a_hook_of_the_connection_raises(pki: Pki, hook: str, error: BaseException) -> None:
    script = Script(**{hook: raising(error)})
    async with running(pki, script) as rig:
        try:
            answer = await rig.put(within_s=SOON_S)
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError):
            answer = Answer()  # not even a handshake
        assert answer.status is None
        assert not rig.origin.saw(CANARY)
        await rig.tidy()


# ---- row 4


@to_http1
async def test_row_04_stream_large_bodies_and_the_hook_raises(pki: Pki, protocols: Protocols) -> None:
    script = Script(requestheaders=raising(RuntimeError("scripted")))
    async with running(pki, script, protocols=protocols, stream_large_bodies="1") as rig:
        await assert_refused(rig, await rig.put([CANARY * 10], within_s=SOON_S), "internal")
        assert_no_upstream(rig)


# ---- rows 5 and 6


@pytest.mark.parametrize("length", [True, False], ids=["length", "no-length"])
@everywhere
async def test_row_05_the_transform_raises_in_mid_body(pki: Pki, protocols: Protocols, length: bool) -> None:
    script = Script(requestheaders=seal(fails_at=2))
    async with running(pki, script, protocols=protocols) as rig:
        before = arrivals(rig, len(CANARY))
        answer = await rig.put([CANARY] * 4, length=length, before=before, within_s=2 * SOON_S)
        assert answer.code == "internal"
        await assert_cut_upstream(rig)
        assert last(rig.origin).body == invert(CANARY)
        assert script.codes == ["internal"]


@pytest.mark.parametrize("error", [OddError(), asyncio.CancelledError()], ids=["BaseException", "Cancelled"])
@everywhere
async def test_row_05_the_transform_raises_what_is_no_exception(
    pki: Pki, protocols: Protocols, error: BaseException
) -> None:
    script = Script(requestheaders=seal(fails_at=1, error=error))
    async with running(pki, script, protocols=protocols) as rig:
        answer = await rig.put([CANARY] * 4, within_s=SOON_S)
        assert not answer.is_success
        await rig.tidy()
        assert not rig.origin.saw(CANARY)
        assert End.COMPLETE not in [exchange.end for exchange in rig.origin.exchanges]


@from_http2
async def test_row_05_the_siblings_of_a_failing_stream_live(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit_upload(flow, fails_at=3 if flow.request.path == "/bad" else None)

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        async with rig.http2_client() as client:
            body = [bytes([index]) * 20_000 for index in range(20)]
            good = [client.exchange(path=f"/good/{index}", pieces=body) for index in range(3)]
            bad = client.exchange(path="/bad", pieces=[CANARY] * 6, before=lambda _: asyncio.sleep(0.01))
            *answers, failed = await asyncio.gather(*good, bad)
        assert all(answer.is_success for answer in answers)
        assert failed.code == "internal"
        wanted = invert(b"".join(body)) + b"END!"
        arrived = [bytes(x.body) for x in rig.origin.exchanges if x.path.startswith("/good")]
        assert arrived == [wanted] * 3
        assert not rig.origin.saw(CANARY)
        await rig.tidy()


@pytest.mark.parametrize("length", [True, False], ids=["length", "no-length"])
@everywhere
async def test_row_06_the_transform_raises_at_the_end(pki: Pki, protocols: Protocols, length: bool) -> None:
    script = Script(requestheaders=seal(fails_at_end=True))
    async with running(pki, script, protocols=protocols) as rig:
        assert (await rig.put([CANARY] * 4, length=length, within_s=SOON_S)).code == "internal"
        await assert_cut_upstream(rig)


@everywhere
async def test_row_06_a_refusal_raised_in_mid_body_is_what_the_client_is_told(
    pki: Pki, protocols: Protocols
) -> None:
    error = RefusedError(refusals.KEY_WITHDRAWN)
    script = Script(requestheaders=seal(fails_at=1, error=error))
    async with running(pki, script, protocols=protocols) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "key-withdrawn")
        assert script.codes == ["key-withdrawn"]
        assert script.refused[0][2] is False


# ---- row 7


class Killing(Inverting):
    """Kills its flow on the second piece and yet returns bytes."""

    flow: HTTPFlow

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        if self.fed == 1:
            self.flow.kill()  # type: ignore[no-untyped-call]
        return super().feed(piece)


@everywhere
async def test_row_07_the_flow_is_killed_while_it_streams(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        killing = Killing(int(flow.request.headers["content-length"]))
        killing.flow = flow
        flow.request.headers["content-length"] = str(killing.expected_out_bytes)
        flow.request.stream = permit(flow).request = killing

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        before = arrivals(rig, len(CANARY))
        answer = await rig.put([CANARY] * 4, before=before, within_s=2 * SOON_S)
        assert answer.code == "no-permit"
        await assert_cut_upstream(rig)
        assert last(rig.origin).body == invert(CANARY)  # not the piece during which it was killed


@pytest.mark.parametrize("hook", ["requestheaders", "request", "responseheaders", "response"])
@everywhere
async def test_row_07_the_flow_is_killed_in_a_hook(pki: Pki, protocols: Protocols, hook: str) -> None:
    def kill(flow: HTTPFlow) -> None:
        given = {"requestheaders": seal(), "responseheaders": clear_response}.get(hook)
        if given is not None:
            given(flow)
        flow.kill()  # type: ignore[no-untyped-call]

    script = Script(**{hook: kill})
    async with running(pki, script, protocols=protocols) as rig:
        answer = await rig.put(within_s=SOON_S)
        assert not answer.is_success
        await rig.tidy()
        assert not rig.origin.saw(CANARY)
        if hook == "requestheaders":
            assert_no_upstream(rig)


# ---- row 8


class Hesitating(Inverting):
    """Returns nothing, or empty pieces, for every other piece."""

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        self.fed += 1
        return [b"", invert(piece), bytearray(), memoryview(b"")]


@pytest.mark.parametrize("length", [True, False], ids=["length", "no-length"])
@everywhere
async def test_row_08_empty_pieces_do_not_end_a_body(pki: Pki, protocols: Protocols, length: bool) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        given = flow.request.headers.get("content-length")
        hesitating = Hesitating(None if given is None else int(given))
        if given is not None:
            flow.request.headers["content-length"] = str(hesitating.expected_out_bytes)
        flow.request.stream = permit(flow).request = hesitating

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        answer = await rig.put([CANARY] * 4, length=length, before=arrivals(rig, len(CANARY)))
        assert answer.is_success
        assert [bytes(x.body) for x in rig.origin.exchanges] == [invert(CANARY * 4) + b"END!"]
        await rig.tidy()


# ---- row 9


class Wrong(Transform):
    """Returns what no transform may."""

    def __init__(self, result: object) -> None:
        self._result = result

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        return self._result  # type: ignore[return-value]

    @override
    def finish(self) -> list[Piece]:
        return []


async def _coroutine() -> list[bytes]:
    return [CANARY]


@pytest.mark.parametrize(
    "result",
    [None, CANARY.decode(), CANARY, bytearray(CANARY), memoryview(CANARY), (CANARY,), [CANARY.decode()], [7]],
    ids=lambda value: type(value).__name__,
)
@everywhere
async def test_row_09_the_transform_returns_something_else(
    pki: Pki, protocols: Protocols, result: object
) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        flow.request.stream = permit(flow).request = Wrong(result)
        del flow.request.headers["content-length"]
        if protocols == HTTP1 or protocols[0] == "h1":
            flow.request.headers["transfer-encoding"] = "chunked"

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        assert (await rig.put(within_s=SOON_S)).code == "internal"
        await assert_cut_upstream(rig)


async def test_row_09_the_transform_is_async(pki: Pki) -> None:
    coroutine = _coroutine()

    def requestheaders(flow: HTTPFlow) -> None:
        flow.request.stream = permit(flow).request = Wrong(coroutine)
        flow.request.headers["content-length"] = flow.request.headers.pop("content-length")
        permit(flow).request.expected_out_bytes = len(CANARY)  # type: ignore[union-attr]

    async with running(pki, Script(requestheaders=requestheaders)) as rig:
        assert (await rig.put(within_s=SOON_S)).code == "internal"
        await assert_cut_upstream(rig)
    coroutine.close()


@to_http1
async def test_row_09_a_plain_callable_is_no_transform(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit(flow).request = CLEAR
        flow.request.stream = lambda piece: piece

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "internal")
        assert_no_upstream(rig)


# ---- row 10


@to_http1
async def test_row_10_a_response_and_a_streamed_request(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit_upload(flow)
        flow.response = http.Response.make(200, CANARY)

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "internal")
        assert_no_upstream(rig)


@to_http1
async def test_row_10_a_local_response_answers_an_upload_unread(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        flow.response = http.Response.make(407, b"who are you")

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:

        async def never(index: int) -> None:
            if index:
                await asyncio.sleep(60)

        async with rig.client() as client:
            sending = asyncio.create_task(client.exchange(pieces=[CANARY] * 2, before=never), name="upload")
            if isinstance(client, Http2Client):
                await client.until(
                    lambda: client.answers.get(1) and client.answers[1].complete, within_s=SOON_S
                )
                assert client.answers[1].status == 407
                sending.cancel()
            else:
                await asyncio.sleep(0.2)
                sending.cancel()
        assert_no_upstream(rig)


# ---- row 11


@pytest.mark.parametrize("policy", ["seal", "clear"])
async def test_row_11_content_length_removed_and_nothing_in_its_place(pki: Pki, policy: str) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit(flow).request = CLEAR
        if policy == "seal":
            flow.request.stream = permit(flow).request = Inverting()
        del flow.request.headers["content-length"]

    async with running(pki, Script(requestheaders=requestheaders)) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "internal")
        assert_no_upstream(rig)


# ---- row 12


@pytest.mark.parametrize("policy", ["seal", "clear"])
async def test_row_12_http2_without_a_length_to_an_http1_origin(pki: Pki, policy: str) -> None:
    script = Script(requestheaders=seal() if policy == "seal" else clear)
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    async with running(pki, script, protocols=("h2", "h1")) as rig:
        assert (await rig.put([smuggled] * 2, length=False, before=lambda _: asyncio.sleep(0.01))).is_success
        await rig.tidy()
        (exchange,) = rig.origin.exchanges
        assert exchange.framed
        assert exchange.header("transfer-encoding") == "chunked"
        assert exchange.body == (invert(smuggled * 2) + b"END!" if policy == "seal" else smuggled * 2)


# ---- rows 13 and 14


async def test_row_13_http1_request_trailers(pki: Pki) -> None:
    async with running(pki, Script()) as rig:
        answer = await rig.put(length=False, trailers=[("x-sum", CANARY.decode())], within_s=SOON_S)
        assert answer.code == "trailers-refused"
        await assert_cut_upstream(rig)


@from_http2
async def test_row_14_http2_request_trailers(pki: Pki, protocols: Protocols) -> None:
    async with running(pki, Script(), protocols=protocols) as rig:
        answer = await rig.put(length=False, trailers=[("x-sum", CANARY.decode())], within_s=SOON_S)
        assert answer.code == "trailers-refused"
        await assert_cut_upstream(rig)
        assert last(rig.origin).trailers == []


# ---- row 15


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-" + CANARY + b"\r\n",
        CANARY,
        b"\x00\x1d" + CANARY,
        b"\x05\x01\x00" + CANARY,
        b"\r\n" + CANARY,
    ],
    ids=["ssh", "raw", "dns", "socks", "newline"],
)
@pytest.mark.parametrize("rawtcp", [True, False], ids=["rawtcp", "default"])
async def test_row_15_connect_and_then_something_else(pki: Pki, sent: bytes, rawtcp: bool) -> None:
    async with (
        RecordingOrigin().listening() as origin,
        running(pki, Script(), mode="regular", origin=origin, rawtcp=rawtcp) as rig,
        rig.http1_client(tls_to_proxy=False) as client,
    ):
        target = f"127.0.0.1:{origin.port}"
        await client.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        answer = await client.answer("HEAD")
        assert answer.status == 200
        await client.send(sent)
        if not await client.closed():
            await client.send(b"\r\n\r\n")  # taken for the beginning of HTTP: let it be whole
            assert await client.closed()
        assert not origin.saw(CANARY)
        assert origin.connections == 0
        await rig.tidy()


# ---- row 16


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "tls"])
async def test_row_16_an_upgrade_is_not_relayed(pki: Pki, upgrade: str) -> None:
    script = Script(requestheaders=clear)
    headers = [("Connection", "Upgrade"), ("Upgrade", upgrade), ("Sec-WebSocket-Version", "13")]
    switched = f"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n\r\n".encode()
    async with running(pki, script, websocket=True, rawtcp=True) as rig:
        rig.origin.reply = Reply(raw=switched)
        async with rig.http1_client() as client:
            answer = await client.exchange("GET", pieces=None, headers=headers, within_s=SOON_S)
            assert answer.code == "upgrade-refused"
            await client.send(b"\x81" + bytes([len(CANARY)]) + CANARY)
            await client.closed(within_s=0.2)
        await assert_cut_or_closed(rig)


async def assert_cut_or_closed(rig: Rig) -> None:
    await rig.tidy()
    assert not rig.origin.saw(CANARY)


# ---- row 17


@pytest.mark.parametrize("declared", [-1, 1, 1000])
@everywhere
async def test_row_17_the_declared_length_is_not_the_promised_one(
    pki: Pki, protocols: Protocols, declared: int
) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        transform = permit_upload(flow)
        assert transform.expected_out_bytes is not None
        flow.request.headers["content-length"] = str(transform.expected_out_bytes + declared)

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "internal")
        assert_no_upstream(rig)


@pytest.mark.parametrize("promised", [-1, 1, 1000])
@everywhere
async def test_row_17_the_transform_makes_less_or_more_than_it_promised(
    pki: Pki, protocols: Protocols, promised: int
) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        transform = permit_upload(flow)
        assert transform.expected_out_bytes is not None
        transform.expected_out_bytes += promised
        flow.request.headers["content-length"] = str(transform.expected_out_bytes)

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        assert (await rig.put(within_s=SOON_S)).code == "internal"
        await assert_cut_upstream(rig)


# ---- row 18


@to_http1
async def test_row_18_expect_is_granted(pki: Pki, protocols: Protocols) -> None:
    async with running(pki, Script(), protocols=protocols) as rig:
        answer = await rig.put(headers=[("Expect", "100-continue")], within_s=SOON_S)
        assert answer.is_success
        assert answer.interim == [100]
        assert last(rig.origin).body == invert(CANARY) + b"END!"
        await rig.tidy()


@to_http1
async def test_row_18_no_100_for_what_will_be_refused(pki: Pki, protocols: Protocols) -> None:
    script = Script(requestheaders=None)
    async with running(pki, script, protocols=protocols) as rig:
        answer = await rig.put(headers=[("Expect", "100-continue")], within_s=SOON_S)
        await assert_refused(rig, answer, "no-permit")
        assert answer.interim == []


@to_http1
async def test_row_18_no_100_for_a_body_that_would_be_unframed(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit_upload(flow)
        flow.request.headers["content-length"] = "7"

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        answer = await rig.put(headers=[("Expect", "100-continue")], within_s=SOON_S)
        await assert_refused(rig, answer, "internal")
        assert answer.interim == []


@to_http1
async def test_row_18_the_origin_is_out_of_reach_after_the_100(pki: Pki, protocols: Protocols) -> None:
    script = Script()
    async with RecordingOrigin().listening() as gone:
        pass
    async with running(pki, script, protocols=protocols, origin=gone) as rig:
        answer = await rig.put(headers=[("Expect", "100-continue")], within_s=SOON_S)
        assert answer.interim == [100]
        await assert_refused(rig, answer, "upstream-failed")
        assert script.codes == ["upstream-failed"]


@to_http1
async def test_row_18_the_transform_fails_after_the_100(pki: Pki, protocols: Protocols) -> None:
    async with running(pki, Script(requestheaders=seal(fails_at=1)), protocols=protocols) as rig:
        answer = await rig.put(headers=[("Expect", "100-continue")], within_s=SOON_S)
        assert answer.interim == [100]
        assert answer.code == "internal"
        await assert_cut_upstream(rig)


# ---- row 19


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("error", [RuntimeError("x"), HALT], ids=["Exception", "AddonHalt"])
@everywhere
async def test_row_19_responseheaders_raises(
    pki: Pki, protocols: Protocols, error: Exception, is_async: bool
) -> None:
    script = Script(responseheaders=raising(error, is_async=is_async))
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"ciphertext"])
        answer = await rig.get(within_s=SOON_S)
        await assert_refused(rig, answer, "internal")
        assert b"ciphertext" not in answer.body


@everywhere
async def test_row_19_the_response_is_not_permitted(pki: Pki, protocols: Protocols) -> None:
    def responseheaders(flow: HTTPFlow) -> None:
        permit(flow).refusal = refusals.OBJECT_INVALID

    async with running(pki, Script(responseheaders=responseheaders), protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"ciphertext"] * 1000)
        answer = await rig.get(within_s=SOON_S)
        await assert_refused(rig, answer, "object-invalid")
        assert b"ciphertext" not in answer.body


# ---- row 20


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("fails", ["first", "middle", "end"])
@everywhere
async def test_row_20_a_response_fails_late(pki: Pki, protocols: Protocols, framing: str, fails: str) -> None:
    how: dict[str, Any] = {"first": {"fails_at": 1}, "middle": {"fails_at": 3}, "end": {"fails_at_end": True}}
    script = Script(responseheaders=open_response(**how[fails]))
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"0123456789abcdef" * 4096] * 8, framing=framing)
        async with rig.client() as client:
            answer = await client.exchange("GET", pieces=None, within_s=5 * SOON_S)
            assert answer.status == 200
            assert not answer.complete
            if isinstance(client, Http1Client):
                assert client.is_closed
            else:
                assert client.reset_codes == {1: 2}
                assert not client.is_closed
        await rig.tidy()
        assert script.codes == ["internal"]
        assert script.refused[0][2] is True


async def test_row_20_a_cut_is_visible_to_an_http10_client(pki: Pki) -> None:
    """Its body ends with the connection: only a reset tells it from a proper end."""
    script = Script(responseheaders=open_response(fails_at=3))
    async with running(pki, script) as rig:
        rig.origin.reply = Reply(pieces=[b"0123456789abcdef" * 4096] * 8, framing="close")
        async with rig.http1_client() as client:
            await client.send(b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
            answer = await client.answer("GET")
            assert not answer.complete
        await rig.tidy()


# ---- row 21


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("request_client_cert", True),
        ("ssl_insecure", True),
        ("store_streamed_bodies", True),
        ("connection_strategy", "eager"),
    ],
)
async def test_row_21_nobody_is_served_under_unsafe_options(pki: Pki, option: str, value: Any) -> None:
    script = Script()
    async with running(pki, script, **{option: value}) as rig:
        with contextlib.suppress(OSError):
            assert (await rig.put(within_s=SOON_S)).status is None
        assert_no_upstream(rig)
        await rig.tidy()
        assert script.codes == ["upgrade-refused"]


# ---- row 22


class Limited(Inverting):
    """How a limit is enforced: by counting."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._room_bytes = limit_bytes

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        self._room_bytes -= len(piece)
        if self._room_bytes < 0:
            raise RefusedError(refusals.BAD_LENGTH)
        return super().feed(piece)


@everywhere
async def test_row_22_a_limit_holds_for_bodies_without_a_length(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        flow.request.stream = permit(flow).request = Limited(100_000)

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        answer = await rig.put([CANARY * 1000] * 50, length=False, within_s=5 * SOON_S)
        assert answer.code == "bad-length"
        await assert_cut_upstream(rig)
        assert len(last(rig.origin).body) <= 100_000


# ---- the other way round: what is permitted passes


@pytest.mark.parametrize("length", [True, False], ids=["length", "no-length"])
@pytest.mark.parametrize("size", [0, 1, 100, 16_384, 1_000_003])
@everywhere
async def test_what_is_permitted_passes_whole(
    pki: Pki, protocols: Protocols, size: int, length: bool
) -> None:
    script = Script(responseheaders=open_response(overhead=0))
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[invert(body)], framing="length" if length else "chunked")
        put = await rig.put([body] if body else [], length=length)
        assert put.is_success
        got = await rig.get()
        assert got.is_success
        assert got.body == body
        stored = next(x for x in rig.origin.exchanges if x.method == "PUT")
        assert stored.body == invert(body) + b"END!"
        assert script.refused == []
        await rig.tidy()


async def test_a_keep_alive_connection_serves_many(pki: Pki) -> None:
    script = Script()
    async with running(pki, script) as rig:
        async with rig.http1_client() as client:
            for index in range(20):
                answer = await client.exchange(path=f"/{index}", pieces=[CANARY] if index % 2 else [])
                assert answer.is_success
            answer = await client.exchange("GET", "/refused", pieces=None, headers=[("X-Refuse", "1")])
            assert answer.is_success
        await rig.tidy()
        assert rig.origin.connections == 1
        assert not rig.origin.saw(CANARY)


async def test_a_refusal_without_a_body_keeps_the_connection(pki: Pki) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        if is_upload(flow):
            permit_upload(flow)
        elif flow.request.path == "/yes":
            permit(flow).request = CLEAR

    script = Script(requestheaders=requestheaders)
    async with running(pki, script) as rig:
        async with rig.http1_client() as client:
            for _ in range(3):
                assert (await client.exchange("GET", "/no", pieces=None)).code == "no-permit"
                assert (await client.exchange("GET", "/yes", pieces=None)).is_success
                assert (await client.exchange()).is_success
        await rig.tidy()
        assert script.codes == ["no-permit"] * 3
