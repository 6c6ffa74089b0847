"""The gate's own weak places, and what stands round the rows of test_rows.py."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, override

import pytest
import uvloop
from mitmproxy import http, tls
from mitmproxy.http import HTTPFlow

from proxy import gate, refusals
from proxy.gate import CLEAR, Piece, peers, permit
from proxy.gate.http1 import MAX_HEAD_BYTES
from proxy.refusals import RefusedError
from tests.fakes.origin import End, RecordingOrigin, Reply
from tests.pki import issue_server, make_server_ca, write_credential
from tests.proxy.gate import test_rows as rows
from tests.proxy.gate.harness import (
    CANARY,
    SOON_S,
    Http1Client,
    Http2Client,
    Inverting,
    Pki,
    Protocols,
    Script,
    clear,
    clear_response,
    invert,
    last,
    open_response,
    permit_upload,
    running,
    seal,
)
from tests.proxy.gate.test_rows import arrivals, assert_cut_upstream, assert_no_upstream, assert_refused

pytestmark = pytest.mark.usefixtures("guarded")
everywhere, to_http1, from_http2 = rows.everywhere, rows.to_http1, rows.from_http2

type Change = Callable[[HTTPFlow], None]


# ---- exchanged in mid-body


class Exchanging(Inverting):
    """Does *change* to its flow while it works on the first piece."""

    def __init__(self, flow: HTTPFlow, change: Change, plain_bytes: int | None) -> None:
        super().__init__(plain_bytes)
        self._flow = flow
        self._change = change

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        out = super().feed(piece)
        if self.fed == 1:
            self._change(self._flow)
        return out


def _stream_true(flow: HTTPFlow) -> None:
    flow.request.stream = True


def _stream_other(flow: HTTPFlow) -> None:
    flow.request.stream = lambda piece: piece


def _stream_and_permit(flow: HTTPFlow) -> None:
    flow.request.stream = True
    permit(flow).request = CLEAR


def _other_transform(flow: HTTPFlow) -> None:
    flow.request.stream = permit(flow).request = Inverting()


def _permit_withdrawn(flow: HTTPFlow) -> None:
    permit(flow).request = None


@pytest.mark.parametrize(
    "change", [_stream_true, _stream_other, _stream_and_permit, _other_transform, _permit_withdrawn]
)
@everywhere
async def test_the_request_stream_is_exchanged_in_mid_body(
    pki: Pki, protocols: Protocols, change: Change
) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        exchanging = Exchanging(flow, change, int(flow.request.headers["content-length"]))
        flow.request.headers["content-length"] = str(exchanging.expected_out_bytes)
        flow.request.stream = permit(flow).request = exchanging

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        before = arrivals(rig, len(CANARY))
        with contextlib.suppress(TimeoutError, ExceptionGroup):
            assert not (await rig.put([CANARY] * 3, before=before, within_s=2 * SOON_S)).is_success
        await rig.tidy()
        assert not rig.origin.saw(CANARY)
        assert End.COMPLETE not in [exchange.end for exchange in rig.origin.exchanges]


@everywhere
async def test_the_response_stream_is_exchanged_in_mid_body(pki: Pki, protocols: Protocols) -> None:
    def change(flow: HTTPFlow) -> None:
        assert flow.response is not None
        flow.response.stream = True

    def responseheaders(flow: HTTPFlow) -> None:
        assert flow.response is not None
        exchanging = Exchanging(flow, change, int(flow.response.headers["content-length"]))
        flow.response.headers["content-length"] = str(exchanging.expected_out_bytes)
        flow.response.stream = permit(flow).response = exchanging

    async with running(pki, Script(responseheaders=responseheaders), protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"ciphertext" * 10_000] * 20)
        answer = await rig.get(within_s=2 * SOON_S)
        assert not answer.complete
        assert b"ciphertext" not in answer.body
        await rig.tidy()


@everywhere
async def test_one_transform_serves_one_flow(pki: Pki, protocols: Protocols) -> None:
    shared = Inverting(len(CANARY))

    def requestheaders(flow: HTTPFlow) -> None:
        flow.request.headers["content-length"] = str(shared.expected_out_bytes)
        flow.request.stream = permit(flow).request = shared

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        assert (await rig.put()).is_success
        assert (await rig.put(within_s=SOON_S)).code == "internal"
        assert len(rig.origin.exchanges) == 1


# ---- a refused upload is not read


@to_http1
async def test_a_refused_upload_is_answered_before_its_body(pki: Pki, protocols: Protocols) -> None:
    async with running(pki, Script(requestheaders=None), protocols=protocols) as rig, rig.client() as client:
        if isinstance(client, Http2Client):
            stream_id = await client.start("PUT", "/", [("content-length", "1000000000")])
            await client.until(lambda: client.is_over(stream_id), within_s=SOON_S)
            answer = client.answers[stream_id]
            assert client.reset_codes == {stream_id: 0}  # NO_ERROR: the answer stands
            # The connection is as good as new.
            other = await client.exchange("GET", pieces=None, within_s=SOON_S)
            assert other.code == "no-permit"
        else:
            await client.send(b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000\r\n\r\n")
            async with asyncio.timeout(SOON_S):
                answer = await client.answer()
            assert answer.header("connection") == "close"
        assert answer.code == "no-permit"
        assert_no_upstream(rig)


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "deaf"])
@to_http1
async def test_a_client_that_goes_on_sending_is_cut(
    pki: Pki, protocols: Protocols, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LINGER_S", 0.3)
    async with running(pki, Script(requestheaders=None), protocols=protocols) as rig:
        if protocols[0] == "h2":
            async with rig.http2_client() as client:
                client.grants = reads
                answer = await client.exchange(pieces=[CANARY * 1000] * 500, within_s=5 * SOON_S)
                assert answer.code == "no-permit"
            await rig.tidy()
            return
        async with rig.http1_client() as client:
            await client.send(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n")
            if reads:
                assert (await client.answer()).code == "no-permit"
            async with asyncio.timeout(5 * SOON_S):
                while await client.send(CANARY * 1000) and not client.writer.transport.is_closing():  # noqa: ASYNC110
                    await asyncio.sleep(0)
        await rig.tidy()
        assert_no_upstream(rig)


async def test_a_client_that_neither_sends_nor_closes_is_cut(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LINGER_S", 0.3)
    async with running(pki, Script(requestheaders=None)) as rig, rig.http1_client() as client:
        await client.send(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert (await client.answer()).code == "no-permit"
        assert await client.closed(within_s=SOON_S)


async def test_a_body_that_is_whole_before_the_linger_ends_costs_no_wait(pki: Pki) -> None:
    async with running(pki, Script(requestheaders=None)) as rig, rig.http1_client() as client:
        assert (await client.exchange(pieces=[CANARY] * 3)).code == "no-permit"
        assert await client.closed(within_s=SOON_S)
        await rig.tidy()


# ---- trailers


@pytest.mark.parametrize("policy", ["seal", "clear"])
@everywhere
async def test_request_trailers_under_every_permit(pki: Pki, protocols: Protocols, policy: str) -> None:
    script = Script(requestheaders=seal() if policy == "seal" else clear)
    async with running(pki, script, protocols=protocols) as rig:
        trailers = [("x-sum", "deadbeef")]
        answer = await rig.put([b"body"], length=False, trailers=trailers, within_s=SOON_S)
        if policy == "clear" and protocols == ("h2", "h2"):
            assert answer.is_success
            assert last(rig.origin).trailers == trailers
        else:
            assert answer.code == "trailers-refused"
            await rig.tidy()
            assert [exchange.end for exchange in rig.origin.exchanges] in ([], [End.CUT])
            assert b"deadbeef" not in rig.origin.received


@pytest.mark.parametrize("policy", ["open", "clear"])
@everywhere
async def test_response_trailers_under_every_permit(pki: Pki, protocols: Protocols, policy: str) -> None:
    script = Script(responseheaders=open_response() if policy == "open" else clear_response)
    async with running(pki, script, protocols=protocols) as rig:
        trailers = [("x-sum", "deadbeef")]
        rig.origin.reply = Reply(pieces=[b"body"], framing="chunked", trailers=trailers)
        answer = await rig.get(within_s=SOON_S)
        if policy == "open":
            assert not answer.is_success
        else:
            assert answer.is_success
            assert answer.body == b"body"
            assert answer.trailers == (trailers if protocols == ("h2", "h2") else [])
        await rig.tidy()


# ---- responses without a body


@everywhere
async def test_head_204_and_304_pass_as_they_are(pki: Pki, protocols: Protocols) -> None:
    def responseheaders(flow: HTTPFlow) -> None:
        assert flow.response is not None
        permit(flow).response = CLEAR
        if flow.request.method == "HEAD":
            flow.response.headers["content-length"] = "17"  # the plain size, as a planner edits it

    script = Script(responseheaders=responseheaders)
    async with running(pki, script, protocols=protocols) as rig, rig.client() as client:
        rig.origin.reply = Reply(headers=[("Content-Length", "105")], pieces=[], framing="none")
        answer = await client.exchange("HEAD", pieces=None, within_s=SOON_S)
        assert answer.is_success
        assert answer.header("content-length") == "17"
        for status in (204, 304):
            rig.origin.reply = Reply(status, headers=[("ETag", '"1"')], pieces=[], framing="none")
            answer = await client.exchange("GET", pieces=None, within_s=SOON_S)
            assert (answer.status, answer.complete, answer.header("etag")) == (status, True, '"1"')
    assert script.refused == []


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
@everywhere
async def test_a_transform_where_no_body_comes_is_refused(
    pki: Pki, protocols: Protocols, method: str, status: int
) -> None:
    script = Script(responseheaders=open_response())
    async with running(pki, script, protocols=protocols) as rig, rig.client() as client:
        rig.origin.reply = Reply(status, pieces=[], framing="none")
        answer = await client.exchange(method, pieces=None, within_s=SOON_S)
        assert answer.code == "internal"


@everywhere
async def test_an_empty_response_is_transformed_too(pki: Pki, protocols: Protocols) -> None:
    """An object cut to nothing must not pass as an empty file."""
    script = Script(
        responseheaders=open_response(
            fails_at_end=True, error=RefusedError(refusals.OBJECT_INVALID), holds_head=True
        )
    )
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[])
        assert (await rig.get(within_s=SOON_S)).code == "object-invalid"


@everywhere
async def test_a_length_announced_and_no_body_is_refused(pki: Pki, protocols: Protocols) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit(flow).request = CLEAR
        flow.request.headers["content-length"] = "88"

    async with running(pki, Script(requestheaders=requestheaders), protocols=protocols) as rig:
        assert (await rig.get(within_s=SOON_S)).code == "internal"
        await rig.tidy()
        assert rig.origin.exchanges == []


# ---- what the client is told when the engine fails


@everywhere
async def test_the_origin_is_out_of_reach(pki: Pki, protocols: Protocols) -> None:
    async with RecordingOrigin().listening() as gone:
        pass
    script = Script()
    async with running(pki, script, protocols=protocols, origin=gone) as rig:
        await assert_refused(rig, await rig.put(within_s=SOON_S), "upstream-failed")
        await assert_refused(rig, await rig.get(within_s=SOON_S), "upstream-failed")
        assert script.codes == ["upstream-failed"] * 2


@pytest.mark.parametrize("fault", ["untrusted", "wrong-name"])
@to_http1
async def test_the_origins_certificate_does_not_verify(
    pki: Pki, protocols: Protocols, fault: str, tmp_path: Any
) -> None:
    ca = make_server_ca() if fault == "untrusted" else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if ca is not None:
        context.load_cert_chain(*write_credential(issue_server(ca), tmp_path, "other"))
    else:
        context = pki.origin_context()
    async with RecordingOrigin(context).listening() as origin:
        mode = f"reverse:https://localhost.localdomain:{origin.port}" if ca is None else None
        script = Script(
            server_connect=lambda data: (
                setattr(data.server, "address", ("127.0.0.1", origin.port)) if ca is None else None
            )
        )
        async with running(
            pki, script, protocols=protocols, origin=origin, mode=mode, keep_host_header=ca is not None
        ) as rig:
            await assert_refused(rig, await rig.put(within_s=SOON_S), "upstream-failed")
            assert origin.exchanges == []


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MAX_HEAD_BYTES + 100_000),
    ],
    ids=["garbage", "two-framings", "two-lengths", "endless-head"],
)
@to_http1
async def test_the_origin_answers_nonsense(pki: Pki, protocols: Protocols, raw: bytes) -> None:
    async with running(pki, Script(), protocols=protocols) as rig:
        rig.origin.reply = Reply(raw=raw)
        await assert_refused(rig, await rig.get(within_s=SOON_S), "upstream-failed")


@everywhere
async def test_the_origin_dies_in_mid_response(pki: Pki, protocols: Protocols) -> None:
    script = Script()
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"0123456789" * 1000] * 3, cut_after=2)
        answer = await rig.get(within_s=2 * SOON_S)
        assert answer.status == 200
        assert not answer.complete
        await rig.tidy()
        assert script.codes == ["upstream-failed"]


@pytest.mark.parametrize(
    "request_head",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
        b"PUT / HTTP/2.0\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (MAX_HEAD_BYTES + 100_000),
    ],
    ids=["garbage", "no-host", "te-and-cl", "two-cl", "bad-cl", "two-te", "http2", "h2c", "endless-head"],
)
async def test_a_malformed_request(pki: Pki, request_head: bytes) -> None:
    async with running(pki, Script(requestheaders=clear), mode="regular", origin_tls=False) as rig:
        async with rig.http1_client(tls_to_proxy=False) as client:
            await client.send(request_head)
            async with asyncio.timeout(SOON_S):
                answer = await client.answer()
            assert answer.status == 400
            assert answer.code == "bad-message"
            assert answer.header("server") is None
        assert_no_upstream(rig)
        await rig.tidy()


# ---- holding the head back


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize(
    "fails", [{"fails_at": 1}, {"fails_at_end": True, "overhead": 0}], ids=["first", "end"]
)
@everywhere
async def test_a_held_head_lets_the_object_refuse(
    pki: Pki, protocols: Protocols, fails: dict[str, Any], framing: str
) -> None:
    class Silent(Inverting):
        @override
        def feed(self, piece: bytes) -> list[Piece]:
            super().feed(piece)
            return []

    def responseheaders(flow: HTTPFlow) -> None:
        assert flow.response is not None
        silent = Silent(holds_head=True, error=RefusedError(refusals.KEY_DESTROYED), **fails)
        flow.response.headers.pop("content-length", None)
        if protocols[1] == "h1":
            flow.response.headers["transfer-encoding"] = "chunked"
        flow.response.stream = permit(flow).response = silent

    script = Script(responseheaders=responseheaders)
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"cipher" * 1000] * 5, framing=framing)
        await assert_refused(rig, await rig.get(within_s=SOON_S), "key-destroyed")
        assert [(r.code, sent) for _, r, sent in script.refused] == [("key-destroyed", False)]


@everywhere
async def test_a_held_head_goes_with_the_first_bytes(pki: Pki, protocols: Protocols) -> None:
    script = Script(responseheaders=open_response(holds_head=True))
    async with running(pki, script, protocols=protocols) as rig, rig.client() as client:
        rig.origin.reply = Reply(headers=[("X-Kept", "yes")], pieces=[b"abc" * 100_000] * 2)
        answer = await client.exchange("GET", pieces=None)
        assert answer.is_success
        assert answer.header("x-kept") == "yes"
        assert answer.body == invert(b"abc" * 200_000) + b"END!"


@everywhere
async def test_a_held_head_goes_with_an_empty_body(pki: Pki, protocols: Protocols) -> None:
    script = Script(responseheaders=open_response(holds_head=True, overhead=0))
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[])
        answer = await rig.get(within_s=SOON_S)
        assert answer.is_success
        assert answer.body == b""


@everywhere
async def test_a_held_head_stays_back_while_the_origin_stalls(pki: Pki, protocols: Protocols) -> None:
    script = Script(responseheaders=open_response(holds_head=True))
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"never"], stall_after=0)
        async with rig.client() as client:
            with contextlib.suppress(TimeoutError):
                await client.exchange("GET", pieces=None, within_s=0.3)
            seen = client.answers[1].status if isinstance(client, Http2Client) else client.statuses
            assert not seen
        await rig.tidy()
        assert script.refused == []


@everywhere
async def test_the_origin_dies_behind_a_held_head(pki: Pki, protocols: Protocols) -> None:
    script = Script(responseheaders=open_response(holds_head=True))
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[b"never"], cut_after=0)
        assert (await rig.get(within_s=SOON_S)).code == "upstream-failed"
        await rig.tidy()


# ---- who is told


@everywhere
async def test_a_refusal_that_cannot_be_recorded_stays_one(pki: Pki, protocols: Protocols) -> None:
    script = Script(requestheaders=None)
    async with running(pki, script, protocols=protocols) as rig:

        def full_disk(*_: object) -> None:
            raise OSError(28, "No space left on device")

        gate.on_refused(rig.master, full_disk)
        await assert_refused(rig, await rig.put(within_s=SOON_S), "audit-unavailable")
        assert_no_upstream(rig)


@everywhere
async def test_a_client_that_leaves_is_no_refusal(pki: Pki, protocols: Protocols) -> None:
    script = Script()
    async with running(pki, script, protocols=protocols) as rig:
        async with rig.client() as client:
            sending = asyncio.create_task(
                client.exchange(pieces=[CANARY] * 3, before=lambda i: asyncio.sleep(60 * (i > 1))),
                name="upload",
            )
            await rig.origin.until(lambda: rig.origin.exchanges and last(rig.origin).body)
            sending.cancel()
        await assert_cut_upstream(rig)
        assert script.refused == []


async def test_a_client_that_leaves_during_the_connect_is_no_refusal(pki: Pki) -> None:
    entered = asyncio.Event()

    async def server_connect(_: Any) -> None:
        entered.set()
        await asyncio.sleep(0.2)

    script = Script(server_connect=server_connect)
    async with running(pki, script) as rig:
        async with rig.http1_client() as client:
            await client.send(b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            await entered.wait()
        await rig.tidy()
        assert script.refused == []


# ---- CONNECT


async def _connect(pki: Pki, script: Script) -> tuple[int | None, str | None, RecordingOrigin]:
    async with (
        RecordingOrigin().listening() as origin,
        running(pki, script, mode="regular", origin=origin) as rig,
        rig.http1_client(tls_to_proxy=False) as client,
    ):
        await client.send(f"CONNECT 127.0.0.1:{origin.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        async with asyncio.timeout(SOON_S):
            answer = await client.answer("CONNECT" if not script.flows else "HEAD")
        await client.send(CANARY)
        assert not origin.saw(CANARY)
        assert origin.connections == 0
        return answer.status, answer.code, origin


async def test_a_connect_is_refused_by_the_permits_refusal(pki: Pki) -> None:
    script = Script(http_connect=lambda flow: setattr(permit(flow), "refusal", refusals.UNMANAGED_HOST))
    assert (await _connect(pki, script))[:2] == (403, "unmanaged-host")
    assert script.codes == ["unmanaged-host"]


async def test_a_connect_is_refused_by_a_response(pki: Pki) -> None:
    script = Script(http_connect=lambda flow: setattr(flow, "response", http.Response.make(407, b"who?")))
    assert (await _connect(pki, script))[0] == 407


@pytest.mark.parametrize("hook", ["http_connect", "http_connected"])
async def test_a_connect_whose_hook_raises_is_refused(pki: Pki, hook: str) -> None:
    script = Script(**{hook: rows.raising(RuntimeError("scripted"))})
    assert (await _connect(pki, script))[:2] == (502, "internal")


async def test_a_connect_answered_by_another_success_is_refused(pki: Pki) -> None:
    script = Script(http_connect=lambda flow: setattr(flow, "response", http.Response.make(204)))
    assert (await _connect(pki, script))[1] == "internal"


@pytest.mark.parametrize("passes", [True, False])
async def test_a_tunnel_exists_only_where_it_was_chosen(pki: Pki, passes: bool) -> None:
    def tls_clienthello(data: tls.ClientHelloData) -> None:
        data.ignore_connection = True
        if not passes:
            raise RuntimeError("scripted")

    script = Script(tls_clienthello=tls_clienthello)
    async with (
        RecordingOrigin(pki.origin_context()).listening() as origin,
        running(pki, script, mode="regular", origin=origin) as rig,
        rig.http1_client(tls_to_proxy=False) as client,
    ):
        await client.send(f"CONNECT 127.0.0.1:{origin.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await client.answer("HEAD")).status == 200
        context = ssl.create_default_context(cafile=pki.origin_ca)
        if passes:
            await client.writer.start_tls(context, server_hostname="127.0.0.1")
            inner = Http1Client(client.reader, client.writer)
            assert (await inner.exchange(pieces=[CANARY])).is_success
            assert origin.saw(CANARY)
        else:
            with pytest.raises((OSError, ssl.SSLError)):
                await client.writer.start_tls(context, server_hostname="127.0.0.1")
            assert origin.connections == 0


@pytest.mark.parametrize("mode", ["reverse:tcp://", "reverse:tls://", "socks5"])
async def test_modes_that_relay_serve_nobody(pki: Pki, mode: str) -> None:
    async with RecordingOrigin().listening() as origin:
        spec = f"{mode}127.0.0.1:{origin.port}" if mode.endswith("//") else mode
        script = Script()
        async with (
            running(pki, script, mode=spec, origin=origin, rawtcp=True) as rig,
            rig.http1_client(tls_to_proxy=False) as client,
        ):
            await client.send(b"\x05\x01\x00" + CANARY)
            assert await client.closed()
            assert not origin.saw(CANARY)
            assert script.codes == ["upgrade-refused"]


# ---- waiting


@pytest.mark.parametrize("waits_in", ["requestheaders", "server_connect"])
async def test_a_client_is_not_read_while_its_flow_waits(pki: Pki, waits_in: str) -> None:
    release = asyncio.Event()

    async def wait(data: Any) -> None:
        await release.wait()
        if isinstance(data, HTTPFlow):
            permit_upload(data)

    script = Script(**{waits_in: wait})
    async with running(pki, script) as rig, rig.http1_client() as client:
        piece, count = CANARY * 3000, 1000  # 63 MB, several times what sockets hold
        sending = asyncio.create_task(client.exchange(pieces=[piece] * count, within_s=60), name="upload")
        (handler,) = await _eventually(lambda: list(rig.proxyserver.connections.values()))
        await _eventually(lambda: handler._held)
        await asyncio.sleep(0.5)
        queued = sum(
            len(getattr(event, "data", b""))
            for layer in _layers(handler.layer)
            for event in layer._paused_event_queue
        )
        assert queued < 2_000_000
        assert not sending.done()
        release.set()
        assert (await sending).is_success
        assert len(last(rig.origin).body) == len(piece) * count + 4


async def _eventually(found: Callable[[], Any]) -> Any:
    async with asyncio.timeout(30):
        while not (result := found()):  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)
    return result


def _layers(top: Any) -> list[Any]:
    found, todo = [], [top]
    while todo:
        layer = todo.pop()
        if layer is None or layer in found:
            continue
        found.append(layer)
        todo += [getattr(layer, "child_layer", None), getattr(layer, "layer", None)]
        todo += list(getattr(layer, "streams", {}).values()) + list(
            getattr(layer, "connections", {}).values()
        )
        todo += list(getattr(getattr(layer, "context", None), "layers", []))
    return [layer for layer in found if hasattr(layer, "_paused_event_queue")]


async def test_hold_reading_nests_and_forgets_who_has_gone(pki: Pki) -> None:
    async with running(pki, Script()) as rig:
        clients: list[Any] = []

        async def requestheaders(flow: HTTPFlow) -> None:
            clients.append(flow.client_conn)
            async with (
                gate.hold_reading(rig.proxyserver, flow.client_conn),
                gate.hold_reading(rig.proxyserver, flow.client_conn),
            ):
                await asyncio.sleep(0.05)
            permit_upload(flow)

        rig.script.requestheaders = requestheaders  # type: ignore[attr-defined]
        assert (await rig.put([CANARY] * 3)).is_success
        await rig.tidy()
        async with gate.hold_reading(rig.proxyserver, clients[0]):
            pass


# ---- answers that come early, odd or in between


@to_http1
async def test_an_early_refusal_of_the_origin_arrives_at_once(pki: Pki, protocols: Protocols) -> None:
    async with running(pki, Script(), protocols=protocols) as rig:
        rig.origin.reply = Reply(413, pieces=[b"too much"], early=True, close=True)

        async def before(index: int) -> None:
            if index == 1:
                await rig.origin.until(lambda: rig.origin.exchanges)
                await asyncio.sleep(0.1)

        async with rig.client() as client:
            task = asyncio.create_task(client.exchange(pieces=[CANARY] * 2, before=before), name="upload")
            answer = await task
        assert answer.status == 413
        assert answer.body == b"too much"
        assert not rig.origin.saw(CANARY)
        await rig.tidy()


@to_http1
async def test_the_origin_leaves_after_an_early_answer(
    pki: Pki, protocols: Protocols, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has its answer; what it goes on sending is dropped, not sent, not counted as a failure."""
    monkeypatch.setattr(peers, "LINGER_S", 0.5)
    script = Script()
    raw = b"HTTP/1.1 413 No\r\nContent-Length: 8\r\nConnection: close\r\n\r\ntoo much"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=pki.origin_context())
    origin = RecordingOrigin()
    origin.port = server.sockets[0].getsockname()[1]
    async with server, running(pki, script, protocols=protocols, origin=origin) as rig:
        async with rig.client() as client:
            answer = await client.exchange(
                pieces=[CANARY * 1000] * 200, before=lambda _: asyncio.sleep(0.002)
            )
            assert answer.status == 413
            assert answer.body == b"too much"
        await rig.tidy()
        assert script.refused == []


async def test_an_early_401_does_not_stop_the_upload(pki: Pki) -> None:
    async with running(pki, Script()) as rig:
        rig.origin.reply = Reply(401, pieces=[b"who"], early=True)
        async with rig.http1_client() as client:
            answer = await client.exchange(pieces=[CANARY] * 5, before=lambda _: asyncio.sleep(0.02))
            assert answer.status == 401
            await rig.origin.until(lambda: last(rig.origin).end is End.COMPLETE)
        assert last(rig.origin).body == invert(CANARY * 5) + b"END!"


async def test_interim_responses_of_the_origin_are_no_responses(pki: Pki) -> None:
    async with running(pki, Script()) as rig:
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        for raw in (interim + final, interim * 3 + final):
            rig.origin.reply = Reply(raw=raw)
            async with rig.http1_client() as client:
                answer = await client.exchange("GET", pieces=None, within_s=SOON_S)
                assert (answer.status, bytes(answer.body)) == (200, b"ok")
                assert answer.interim == []
                answer = await client.exchange("GET", pieces=None, within_s=SOON_S)
                assert answer.is_success


async def test_pipelined_requests_are_separate_flows(pki: Pki) -> None:
    async with running(pki, Script()) as rig, rig.http1_client() as client:
        one = b"PUT /1 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(CANARY) + CANARY
        await client.send(one + one.replace(b"/1 ", b"/2 ") + one.replace(b"/1 ", b"/3 "))
        for _ in range(3):
            assert (await client.answer()).is_success
        assert [exchange.path for exchange in rig.origin.exchanges] == ["/1", "/2", "/3"]
        assert not rig.origin.saw(CANARY)


async def test_hundreds_of_pipelined_requests_are_refused_one_after_the_other(pki: Pki) -> None:
    """Answered where they are read, each inside of the one before, they would be too many calls deep."""
    script = Script(requestheaders=lambda _flow: None)
    async with running(pki, script) as rig, rig.http1_client() as client:
        await client.send(b"GET /1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500)
        for _ in range(500):
            answer = await client.answer()
            assert (answer.status, answer.code) == (502, "no-permit")
        assert_no_upstream(rig)
    assert script.codes == ["no-permit"] * 500


# ---- the end of an engine


@everywhere
async def test_stopping_in_mid_upload_ends_nothing_properly(pki: Pki, protocols: Protocols) -> None:
    script = Script()
    async with running(pki, script, protocols=protocols) as rig, rig.client() as client:
        sending = asyncio.create_task(
            client.exchange(pieces=[CANARY] * 3, before=lambda i: asyncio.sleep(60 * (i > 1))), name="upload"
        )
        await rig.origin.until(lambda: rig.origin.exchanges and last(rig.origin).body)
        gate.abort_all_connections(rig.proxyserver)
        await assert_cut_upstream(rig)
        sending.cancel()
    assert script.codes == ["internal"]


async def test_two_engines_after_each_other(pki: Pki) -> None:
    for _ in range(2):
        script = Script(requestheaders=None)
        async with running(pki, script) as rig:
            assert (await rig.put()).code == "no-permit"
            assert script.codes == ["no-permit"]
            await rig.tidy()


# ---- the same under uvloop, and without levers

_SAMPLE: list[Callable[[Pki, Protocols], Any]] = [
    lambda pki, protocols: rows.test_row_01_requestheaders_raises(pki, protocols, RuntimeError("x"), True),
    rows.test_row_02_the_addon_is_silent,
    lambda pki, protocols: rows.test_row_05_the_transform_raises_in_mid_body(pki, protocols, True),
    lambda pki, protocols: rows.test_row_06_the_transform_raises_at_the_end(pki, protocols, False),
    rows.test_row_07_the_flow_is_killed_while_it_streams,
    rows.test_row_19_the_response_is_not_permitted,
    lambda pki, protocols: rows.test_row_20_a_response_fails_late(pki, protocols, "length", "middle"),
    lambda pki, protocols: rows.test_what_is_permitted_passes_whole(pki, protocols, 1_000_003, True),
]


@everywhere
def test_a_sample_of_the_rows_under_uvloop(pki: Pki, protocols: Protocols) -> None:
    for case in _SAMPLE:
        uvloop.run(case(pki, protocols))


@pytest.mark.parametrize("backpressure", [True, False])
@everywhere
async def test_a_sample_of_the_rows_without_levers(
    pki: Pki, protocols: Protocols, backpressure: bool
) -> None:
    gate.uninstall()
    gate.install(levers=frozenset(), http2_backpressure=backpressure)
    for case in _SAMPLE:
        await case(pki, protocols)
