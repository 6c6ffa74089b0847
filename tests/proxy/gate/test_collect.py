"""Bodies that are collected, heads that are held, transforms that wait: only what was approved leaves."""

import asyncio
from typing import override

import pytest
from mitmproxy.http import HTTPFlow, Response

from proxy import refusals
from proxy.gate import CLEAR, Collect, Piece, permit
from proxy.gate.permit import Transform
from proxy.refusals import RefusedError, Shaped
from tests.fakes.origin import End, Reply
from tests.proxy.gate import test_rows as rows
from tests.proxy.gate.harness import (
    CANARY,
    Inverting,
    Pki,
    Protocols,
    Script,
    clear,
    invert,
    last,
    running,
)
from tests.proxy.gate.test_rows import assert_no_upstream, assert_refused

pytestmark = pytest.mark.usefixtures("guarded")
everywhere = rows.everywhere
LIMIT = 1000


def collect(flow: HTTPFlow) -> None:
    permit(flow).request = Collect(LIMIT)


def approve(flow: HTTPFlow, body: bytes | None = None) -> Collect:
    """As a planner does in `request`: the collected body inverted, or *body*."""
    collected = permit(flow).request
    assert isinstance(collected, Collect)
    made = invert(collected.body()) if body is None else body
    collected.approve(made)
    flow.request.raw_content = made
    flow.request.headers.pop("transfer-encoding", None)
    flow.request.headers["content-length"] = str(len(made))
    return collected


# ---- requests


@everywhere
@pytest.mark.parametrize("length", [True, False])
async def test_what_was_approved_leaves_whole(pki: Pki, protocols: Protocols, length: bool) -> None:
    script = Script(requestheaders=collect, request=approve)
    async with running(pki, script, protocols=protocols) as rig:
        got = await rig.put([CANARY] * 3, length=length)
        assert got.is_success
        assert bytes(last(rig.origin).body) == invert(CANARY * 3)
        assert last(rig.origin).end is End.COMPLETE
        assert not rig.origin.saw(CANARY)
        await rig.tidy()


@everywhere
async def test_what_nobody_approved_stays_here(pki: Pki, protocols: Protocols) -> None:
    async with running(pki, Script(requestheaders=collect), protocols=protocols) as rig:
        await assert_refused(rig, await rig.put(), "no-permit")
        assert_no_upstream(rig)


def _other_content(flow: HTTPFlow) -> None:
    approve(flow)
    flow.request.raw_content = CANARY


def _equal_content(flow: HTTPFlow) -> None:
    collected = approve(flow, b"x" * len(CANARY))
    assert collected.approved is not None
    flow.request.raw_content = bytes(bytearray(collected.approved))


def _cleared(flow: HTTPFlow) -> None:
    flow.request.raw_content = CANARY
    permit(flow).request = CLEAR


def _another_collect(flow: HTTPFlow) -> None:
    flow.request.raw_content = CANARY
    permit(flow).request = other = Collect(LIMIT)
    other.approve(CANARY)


def _wrong_length(flow: HTTPFlow) -> None:
    approve(flow)
    flow.request.headers["content-length"] = "3"


def _chunked(flow: HTTPFlow) -> None:
    approve(flow)
    del flow.request.headers["content-length"]
    flow.request.headers["transfer-encoding"] = "chunked"


def _raises(flow: HTTPFlow) -> None:
    approve(flow)
    raise RuntimeError("scripted failure")


@pytest.mark.parametrize(
    "wrong",
    [_other_content, _equal_content, _cleared, _another_collect, _wrong_length, _chunked, _raises],
)
async def test_anything_but_the_approved_object_stays_here(pki: Pki, wrong: object) -> None:
    async with running(pki, Script(requestheaders=collect, request=wrong)) as rig:  # type: ignore[arg-type]
        got = await rig.put()
        assert not got.is_success
        assert got.status == 502
        await rig.tidy()
        assert_no_upstream(rig)
        assert not rig.origin.saw(CANARY)


@everywhere
@pytest.mark.parametrize("length", [True, False])
async def test_more_than_the_limit_is_refused(pki: Pki, protocols: Protocols, length: bool) -> None:
    script = Script(requestheaders=collect, request=approve)
    async with running(pki, script, protocols=protocols) as rig:
        got = await rig.put([bytes(LIMIT), b"1"], length=length)
        assert (got.status, got.code) == (413, "too-large")
        await rig.tidy()
        assert_no_upstream(rig)


async def test_a_collected_body_is_not_kept_by_the_engine(pki: Pki) -> None:
    seen: list[bytes | None] = []

    def request(flow: HTTPFlow) -> None:
        seen.append(flow.request.raw_content)
        approve(flow)

    async with running(pki, Script(requestheaders=collect, request=request)) as rig:
        assert (await rig.put()).is_success
    assert seen == [b""]


async def test_a_stream_beside_a_collected_body_is_refused(pki: Pki) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        collect(flow)
        flow.request.stream = True

    async with running(pki, Script(requestheaders=requestheaders, request=approve)) as rig:
        await assert_refused(rig, await rig.put(), "internal")
        assert_no_upstream(rig)


@everywhere
async def test_an_answer_from_here_after_the_body(pki: Pki, protocols: Protocols) -> None:
    def request(flow: HTTPFlow) -> None:
        flow.response = Response.make(207, b"made here")

    script = Script(requestheaders=collect, request=request)
    async with running(pki, script, protocols=protocols) as rig:
        got = await rig.put()
        assert (got.status, bytes(got.body), got.complete) == (207, b"made here", True)
        await rig.tidy()
        assert_no_upstream(rig)


async def test_the_hook_may_wait_and_a_client_that_expects_is_told_to_go_on(pki: Pki) -> None:
    async def request(flow: HTTPFlow) -> None:
        await asyncio.sleep(0)
        approve(flow)

    script = Script(requestheaders=collect, request=request)
    async with running(pki, script) as rig:
        got = await rig.put(headers=[("Expect", "100-continue")])
        assert (got.interim, got.is_success) == ([100], True)
        assert bytes(last(rig.origin).body) == invert(CANARY)


# ---- responses


def collect_response(flow: HTTPFlow) -> None:
    permit(flow).response = Collect(LIMIT)


def map_response(flow: HTTPFlow) -> None:
    collected = permit(flow).response
    assert isinstance(collected, Collect)
    assert flow.response is not None
    made = invert(collected.body())
    collected.approve(made)
    flow.response.raw_content = made
    flow.response.status_code = 203
    flow.response.headers["content-length"] = str(len(made))
    flow.response.headers.pop("transfer-encoding", None)


@everywhere
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_collected_answer_is_what_was_made_of_it(
    pki: Pki, protocols: Protocols, framing: str
) -> None:
    script = Script(requestheaders=clear, responseheaders=collect_response, response=map_response)
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[CANARY, CANARY], framing=framing)
        got = await rig.get()
        assert (got.status, bytes(got.body), got.complete) == (203, invert(CANARY * 2), True)
        assert got.header("content-length") == str(2 * len(CANARY))
        await rig.tidy()


@everywhere
async def test_a_collected_answer_that_nobody_approved_is_refused(pki: Pki, protocols: Protocols) -> None:
    script = Script(requestheaders=clear, responseheaders=collect_response)
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[CANARY])
        got = await rig.get()
        await assert_refused(rig, got, "no-permit")
        assert CANARY not in got.body


async def test_an_answer_longer_than_the_limit_is_refused(pki: Pki) -> None:
    script = Script(requestheaders=clear, responseheaders=collect_response, response=map_response)
    async with running(pki, script) as rig:
        rig.origin.reply = Reply(pieces=[bytes(LIMIT), b"1"], framing="chunked")
        assert (await rig.get()).code == "too-large"
        await rig.tidy()


# ---- held heads and transforms that wait


class Late(Inverting):
    """Holds its head; finds out its length, which it then declares, from its first piece."""

    def __init__(self, flow: HTTPFlow, *, declares: int | None, makes_at_end: bytes = b"END!") -> None:
        super().__init__(None, holds_head=True)
        self.expected_out_bytes = 1  # a guess that stands in
        self._flow = flow
        self._declares = declares
        self._end = makes_at_end

    def settle_length(self) -> None:
        self.expected_out_bytes = self._declares
        self._flow.request.headers.pop("content-length", None)
        if self._declares is not None:
            self._flow.request.headers["content-length"] = str(self._declares)

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        if not self.fed:
            self.settle_length()
        return super().feed(piece)

    @override
    def finish(self) -> list[Piece]:
        return [self._end]


def late(declares: int | None) -> object:
    def requestheaders(flow: HTTPFlow) -> None:
        transform = Late(flow, declares=declares)
        flow.request.headers["content-length"] = "1"
        flow.request.headers.pop("transfer-encoding", None)
        flow.request.stream = permit(flow).request = transform

    return requestheaders


@everywhere
async def test_a_held_request_head_may_still_learn_its_length(pki: Pki, protocols: Protocols) -> None:
    size = 2 * len(CANARY) + 4
    script = Script(requestheaders=late(size))  # type: ignore[arg-type]
    async with running(pki, script, protocols=protocols) as rig:
        assert (await rig.put([CANARY] * 2)).is_success
        assert last(rig.origin).header("content-length") == str(size)
        assert bytes(last(rig.origin).body) == invert(CANARY * 2) + b"END!"
        assert last(rig.origin).end is End.COMPLETE
        await rig.tidy()


@pytest.mark.parametrize("wrong", [2 * len(CANARY) + 3, 2 * len(CANARY) + 5])
async def test_the_length_that_a_held_head_learns_has_to_be_true(pki: Pki, wrong: int) -> None:
    async with running(pki, Script(requestheaders=late(wrong))) as rig:  # type: ignore[arg-type]
        assert not (await rig.put([CANARY] * 2)).is_success
        await rig.tidy()
        assert not rig.origin.saw(CANARY)
        assert End.COMPLETE not in [exchange.end for exchange in rig.origin.exchanges]


class Waiting(Transform):
    """Makes nothing of its first piece before it was settled."""

    may_wait = True

    def __init__(self, *, error: Exception | None = None, stays_pending: bool = False) -> None:
        self._held = b""
        self._error = error
        self._stays_pending = stays_pending
        self.settled = 0

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        if not self.settled:
            assert not self.pending
            self._held, self.pending = piece, True
            return []
        return [invert(piece)]

    @override
    async def settle(self) -> None:
        await asyncio.sleep(0)
        if self._error is not None:
            raise self._error
        self.settled += 1
        self.pending = self._stays_pending

    @override
    def finish(self) -> list[Piece]:
        assert not self.pending
        return [invert(self._held)]


@everywhere
@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_pending_transform_is_settled_before_it_is_fed_again(
    pki: Pki, protocols: Protocols, pieces: int
) -> None:
    transforms: list[Waiting] = []

    def responseheaders(flow: HTTPFlow) -> None:
        assert flow.response is not None
        transforms.append(Waiting())
        flow.response.headers.pop("content-length", None)
        flow.response.stream = permit(flow).response = transforms[-1]

    script = Script(requestheaders=clear, responseheaders=responseheaders)
    async with running(pki, script, protocols=protocols) as rig:
        rig.origin.reply = Reply(pieces=[CANARY] * pieces, framing="chunked")
        got = await rig.get()
        assert got.is_success
        assert invert(bytes(got.body)) == CANARY * pieces
        assert transforms[-1].settled == 1
        await rig.tidy()


@everywhere
@pytest.mark.parametrize(
    ("transform", "code"),
    [
        (lambda: Waiting(error=RuntimeError("scripted")), "internal"),
        (lambda: Waiting(error=RefusedError(refusals.UPSTREAM_CHANGED)), "upstream-changed"),
        (lambda: Waiting(stays_pending=True), "internal"),
    ],
)
async def test_what_cannot_be_settled_ends_the_message(
    pki: Pki, protocols: Protocols, transform: object, code: str
) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        flow.request.headers.pop("content-length", None)
        if protocols[0] == "h1":
            flow.request.headers["transfer-encoding"] = "chunked"
        flow.request.stream = permit(flow).request = transform()  # type: ignore[operator]

    script = Script(requestheaders=requestheaders)
    async with running(pki, script, protocols=protocols) as rig:
        got = await rig.put([CANARY] * 2)
        assert got.code == code
        await rig.tidy()
        assert not rig.origin.saw(CANARY)
        assert End.COMPLETE not in [exchange.end for exchange in rig.origin.exchanges]


# ---- shapes


async def test_a_refusal_speaks_the_dialect_of_its_flow(pki: Pki) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit(flow).shape = lambda refusal: Shaped(
            content_type="application/xml", body=f"<Error>{refusal.code}</Error>".encode()
        )
        permit(flow).refusal = refusals.UNKNOWN_ROUTE

    async with running(pki, Script(requestheaders=requestheaders)) as rig:
        got = await rig.put()
        assert (got.status, got.code) == (501, "unknown-route")
        assert (got.header("content-type"), bytes(got.body)) == (
            "application/xml",
            b"<Error>unknown-route</Error>",
        )


@pytest.mark.parametrize(
    "shape",
    [
        lambda _: 1 / 0,
        lambda _: None,
        lambda _: Shaped(content_type="text/plain\r\nX: y", body=b""),
        lambda _: Shaped(content_type="a/b", body="text"),  # type: ignore[arg-type]
        lambda _: Shaped(content_type="a/b", body=b"", fields=(("x", "y\r\nz: w"),)),
        lambda _: ("a/b", b""),
    ],
    ids=["raises", "none", "two-fields", "text", "field-of-two-lines", "tuple"],
)
async def test_a_refusal_that_has_no_shape_is_told_all_the_same(pki: Pki, shape: object) -> None:
    def requestheaders(flow: HTTPFlow) -> None:
        permit(flow).shape = shape  # type: ignore[assignment]

    async with running(pki, Script(requestheaders=requestheaders)) as rig:
        got = await rig.put()
        assert (got.status, got.code, got.header("x")) == (502, "no-permit", None)
        assert got.header("content-type") == "application/json"
