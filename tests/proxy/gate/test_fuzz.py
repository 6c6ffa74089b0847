"""Any pieces, failure, peer: no canary upstream, no proper end after an abort, no ciphertext passed off.

One engine and one origin per pair of protocols serve all examples, so that what one leaves behind hurts the
next ones.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mitmproxy.http import HTTPFlow

from proxy.gate import CLEAR, permit
from tests.fakes.origin import End, Exchange, RecordingOrigin, Reply
from tests.proxy.gate.harness import (
    ALL_PROTOCOLS,
    CANARY,
    Answer,
    Inverting,
    Pki,
    Protocols,
    Rig,
    Script,
    invert,
    running,
)

pytestmark = pytest.mark.usefixtures("guarded")

CIPHER = b"origin-ciphertext-"
HOOKS = ("requestheaders", "request", "responseheaders", "response")


@dataclass(frozen=True, slots=True)
class Plan:
    """One example: what the client, the addon and the origin do."""

    sizes: list[int]
    length: bool
    leaves_before: int | None
    """The client leaves before that piece."""
    request_fails_at: int | None
    request_fails_at_end: bool
    promise_off_by: int
    hook_fails: str | None
    kills_in: str | None
    response_fails_at: int | None
    response_fails_at_end: bool
    holds_head: bool
    reply: Reply

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def pieces(self) -> list[bytes]:
        return [(CANARY * (size // len(CANARY) + 1))[:size] for size in self.sizes]

    @property
    def request_must_fail(self) -> bool:
        return bool(
            (self.request_fails_at == 1 and self.sizes)
            or self.request_fails_at_end
            or self.promise_off_by
            or self.hook_fails in ("requestheaders", "request")
            or self.kills_in in ("requestheaders", "request")
        )

    @property
    def is_smooth(self) -> bool:
        """Nobody does anything wrong: then all of it must succeed."""
        return not (
            self.request_must_fail
            or self.request_fails_at
            or self.leaves_before is not None
            or self.hook_fails
            or self.kills_in
            or self.response_fails_at
            or self.response_fails_at_end
            or self.reply.is_cut
            or self.reply.early
        )


FAULTS: dict[str, st.SearchStrategy[Any]] = {
    "leaves_before": st.integers(0, 5),
    "request_fails_at": st.integers(1, 7),
    "request_fails_at_end": st.just(True),
    "promise_off_by": st.sampled_from([-3, -1, 1, 1000]),
    "hook_fails": st.sampled_from(HOOKS),
    "kills_in": st.sampled_from(HOOKS),
    "response_fails_at": st.integers(1, 4),
    "response_fails_at_end": st.just(True),
    "cut_after": st.integers(0, 4),
    "early": st.just(True),
}
sizes = st.lists(st.integers(1, 70_000) | st.integers(1, 40), max_size=6)
cipher_pieces = st.lists(
    st.integers(1, 40_000).map(lambda n: (CIPHER * (n // len(CIPHER) + 1))[:n]), max_size=4
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """None, one or two faults; with more, one would hide the other."""
    chosen = draw(st.lists(st.sampled_from(sorted(FAULTS)), unique=True, max_size=2))
    fault: dict[str, Any] = {name: draw(FAULTS[name]) for name in chosen}
    return Plan(
        sizes=draw(sizes),
        length=draw(st.booleans()),
        leaves_before=fault.get("leaves_before"),
        request_fails_at=fault.get("request_fails_at"),
        request_fails_at_end=fault.get("request_fails_at_end", False),
        promise_off_by=fault.get("promise_off_by", 0),
        hook_fails=fault.get("hook_fails"),
        kills_in=fault.get("kills_in"),
        response_fails_at=fault.get("response_fails_at"),
        response_fails_at_end=fault.get("response_fails_at_end", False),
        holds_head=draw(st.booleans()),
        reply=Reply(
            status=draw(st.sampled_from([200, 201, 404, 500])),
            pieces=draw(cipher_pieces),
            framing=draw(st.sampled_from(["length", "chunked", "close"])),
            early=fault.get("early", False),
            cut_after=fault.get("cut_after"),
            cut_by_fin=draw(st.booleans()),
            close=draw(st.booleans()),
        ),
    )


class PlannedScript(Script):
    """Does what the present plan says."""

    plan: Plan

    def __init__(self) -> None:
        super().__init__(requestheaders=None, responseheaders=None)

    def _after(self, hook: str, flow: HTTPFlow) -> None:
        if self.plan.kills_in == hook and flow.killable:
            flow.kill()  # type: ignore[no-untyped-call]
        if self.plan.hook_fails == hook:
            raise RuntimeError("scripted")

    def requestheaders(self, flow: HTTPFlow) -> None:
        plan, given = self.plan, flow.request.headers.get("content-length")
        transform = Inverting(
            None if given is None else int(given),
            fails_at=plan.request_fails_at,
            fails_at_end=plan.request_fails_at_end,
        )
        if transform.expected_out_bytes is None:
            transform.expected_out_bytes = len(plan.body) + 4 + plan.promise_off_by
            if plan.promise_off_by == 0:
                transform.expected_out_bytes = None
        else:
            transform.expected_out_bytes += plan.promise_off_by
            flow.request.headers["content-length"] = str(transform.expected_out_bytes)
        flow.request.stream = permit(flow).request = transform
        self._after("requestheaders", flow)

    def request(self, flow: HTTPFlow) -> None:
        self._after("request", flow)

    def responseheaders(self, flow: HTTPFlow) -> None:
        plan, response = self.plan, flow.response
        assert response is not None
        given = response.headers.get("content-length")
        transform = Inverting(
            None if given is None else int(given),
            fails_at=plan.response_fails_at,
            fails_at_end=plan.response_fails_at_end,
            holds_head=plan.holds_head,
        )
        if transform.expected_out_bytes is not None:
            response.headers["content-length"] = str(transform.expected_out_bytes)
        response.stream = permit(flow).response = transform
        self._after("responseheaders", flow)

    def response(self, flow: HTTPFlow) -> None:
        self._after("response", flow)


@contextlib.contextmanager
def engine(pki: Pki, script: Script, protocols: Protocols) -> Iterator[tuple[asyncio.Runner, Rig]]:
    with asyncio.Runner() as runner:
        context = running(pki, script, protocols=protocols)
        rig = runner.run(context.__aenter__())
        try:
            yield runner, rig
        finally:
            runner.run(_leave(context))


async def _leave(context: Any) -> None:
    await context.__aexit__(None, None, None)


async def carry_out(rig: Rig, plan: Plan) -> tuple[Answer, list[Exchange]]:
    rig.origin.exchanges.clear()
    rig.origin.received.clear()
    rig.origin.reply = plan.reply
    answer = Answer()

    async def before(index: int) -> None:
        if index == plan.leaves_before:
            client.leave()
        await asyncio.sleep(0)

    with contextlib.suppress(OSError):
        async with rig.client() as client:
            answer = await client.exchange(pieces=plan.pieces, length=plan.length, before=before, within_s=10)
    await rig.tidy(within_s=4)
    return answer, rig.origin.exchanges


def judge(plan: Plan, answer: Answer, exchanges: list[Exchange], origin: RecordingOrigin) -> None:
    assert not origin.saw(CANARY)
    assert CIPHER not in answer.body
    assert len(exchanges) <= 1
    if plan.request_must_fail:
        assert End.COMPLETE not in [exchange.end for exchange in exchanges]
    for exchange in exchanges:
        assert exchange.framed
        wanted = invert(plan.body) + b"END!"
        if exchange.end is End.COMPLETE:
            assert exchange.body == wanted
        else:
            assert wanted.startswith(bytes(exchange.body))
    if answer.complete and answer.code is None and answer.status is not None:
        assert answer.body == invert(b"".join(plan.reply.pieces)) + b"END!"
        assert not plan.response_fails_at_end
        assert not plan.reply.is_cut
    if plan.is_smooth:
        assert (answer.status, answer.complete, answer.code) == (plan.reply.status, True, None)
        assert exchanges[0].end is End.COMPLETE


@pytest.mark.parametrize("protocols", ALL_PROTOCOLS, ids="-".join)
def test_whatever_happens_nothing_leaves_in_clear(pki: Pki, protocols: Protocols) -> None:
    script = PlannedScript()
    with engine(pki, script, protocols) as (runner, rig):

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(plan=plans())
        def examine(plan: Plan) -> None:
            script.plan = plan
            script.refused.clear()
            answer, exchanges = runner.run(carry_out(rig, plan))
            judge(plan, answer, exchanges, rig.origin)
            assert len(script.refused) <= 1

        examine()


# ---- bytes that are no HTTP any more

VALID = (
    b"PUT /object HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 40\r\n\r\n" + (CANARY * 2)[:40],
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n"
    + CANARY[:20]
    + b"\r\n0\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\nUpgrade: websocket\r\n\r\n",
)
edits = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 12), st.binary(max_size=12) | st.sampled_from(VALID)),
    max_size=5,
)


def edited(message: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, dropped, inserted in changes:
        message = message[:at] + inserted + message[at + dropped :]
    return message


@pytest.mark.parametrize("policy", ["silent", "clear-responses-only"])
def test_no_bytes_of_a_client_reach_an_origin_unpermitted(pki: Pki, policy: str) -> None:
    def responseheaders(flow: HTTPFlow) -> None:
        permit(flow).response = CLEAR

    script = Script(requestheaders=None, responseheaders=None if policy == "silent" else responseheaders)
    with engine(pki, script, ("h1", "h1")) as (runner, rig):

        async def send(pieces: list[bytes]) -> None:
            async with rig.http1_client() as client:
                for piece in pieces:
                    await client.send(piece)
                    await asyncio.sleep(0)
                await client.closed(within_s=0.02)
            await rig.tidy(within_s=4)

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(start=st.sampled_from(VALID), changes=edits, cuts=st.lists(st.integers(0, 300), max_size=4))
        def examine(start: bytes, changes: list[tuple[int, int, bytes]], cuts: list[int]) -> None:
            message = edited(start, changes)
            edges = [0, *sorted(min(cut, len(message)) for cut in cuts), len(message)]
            runner.run(send([message[a:b] for a, b in itertools.pairwise(edges) if a < b]))
            assert rig.origin.connections == 0

        examine()
