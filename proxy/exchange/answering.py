"""One answer, from its plan to what the gate is told: the edited head, and what becomes of the body.

1. What is permitted is named: a transform, a body to be collected, or nothing but the head.
2. A range whose object changed after it was looked at is read once more, if it is short, and answered with
   what is there now.
"""

from typing import Final

from mitmproxy.http import HTTPFlow, Response

from envelope.objects import has_magic
from proxy import refusals
from proxy.bodies.bodies import SealBody
from proxy.bodies.opening import MapAnswerBody, OpenBody, OpenRangeBody
from proxy.bodies.prefetch import PrefetchError
from proxy.bodies.reading import Read
from proxy.exchange.conversation import OF_ONE_CONNECTION, opened_by
from proxy.exchange.exchange import ClientBody, Exchange, Means
from proxy.exchange.heads import approve, declare, declared, edit, sized, stream
from proxy.gate.permit import CLEAR, Collect, Grant, Transform, permit
from proxy.messages.message import AnswerHead, Fields
from proxy.plans.answer_plan import MapBody, MapSize, MapWhole, OpenPart, OpenWhole, Pass
from proxy.plans.plan import Going, HeadSize, OpenRange, Refuse, RequestPlan, Reshape, Seal, Unopened
from proxy.plans.planner import plan_answer
from proxy.plans.request import Edits
from proxy.refusals import RefusedError

RESTART_BYTES: Final = 8 * 1024 * 1024
"""The longest range that is read again, in memory. A longer one is refused: its client asks again."""


class Answering:
    """Carries the plans of answers out."""

    def __init__(self, means: Means) -> None:
        self._means = means

    async def permit(
        self, flow: HTTPFlow, response: Response, exchange: Exchange, bodies: list[ClientBody]
    ) -> Grant:
        """Prepare the answer to go on by its plan."""
        going, profile, request = exchange.plan, exchange.profile, exchange.request
        answer = AnswerHead(status=response.status_code, fields=Fields(response.headers.fields))
        exchange.answer = answer
        if isinstance(going, Seal | Reshape) and 200 <= answer.status < 300 and not _has_left(flow):
            raise RefusedError(refusals.ANSWER_REFUSED)
        read = exchange.begin_read()
        if answer.status == 412 and _may_restart(going, read):
            exchange.restarts = True
            return self._means.collect(exchange, RESTART_BYTES, too_large=refusals.UPSTREAM_CHANGED)
        plan = plan_answer(
            going,
            answer,
            request.route,
            asked=read.asked,
            composites=isinstance(going, HeadSize) and profile.may_be_composite(request, answer),
        )
        if isinstance(going, Going):
            plan = profile.plan_answer(request, going, answer, plan)
        granted: Grant
        match plan:
            case Refuse():
                raise RefusedError(plan.refusal)
            case Pass():
                granted = await self._pass(flow, response, exchange, plan, answer)
            case MapSize():
                edits = plan.edits
                if plan.probe:
                    size = await self._means.reading.size(read, plan, answer)
                    edits = edits.also(drop=("content-length",)) if size is None else sized(edits, size)
                edit(response.headers, edits)
                granted = CLEAR
            case OpenPart():
                granted = self._means.reading.open_part(read)
                edit(response.headers, plan.edits)
            case OpenWhole():
                granted = opening = await self._means.reading.open_whole(
                    read, plan, answer, on_length=lambda n: declare(response.headers, n)
                )
                edit(response.headers, declared(plan.edits, answer, opening.expected_out_bytes))
        if isinstance(granted, Transform):
            stream(response, granted)
            if isinstance(granted, OpenBody | OpenRangeBody):
                bodies.append(granted)
        elif isinstance(granted, Collect):
            response.stream = False
        else:
            response.stream = True
        return granted

    async def _pass(
        self, flow: HTTPFlow, response: Response, exchange: Exchange, plan: Pass, answer: AnswerHead
    ) -> Grant:
        edits, going = plan.edits, exchange.plan
        if isinstance(going, Seal) and going.after is not None and 200 <= answer.status < 300:
            body = permit(flow).request
            if not isinstance(body, SealBody):
                raise RefusedError(refusals.INTERNAL)
            more = await going.after(self._means.conversation(exchange, None), answer, body.sealed)
            edits = edits.also(drop=more.drop, put=more.put)
        if isinstance(going, Unopened) and 200 <= answer.status < 300:
            exchange.trail.passed_as_stored()
        has_body = exchange.request.head.method != "HEAD" and answer.status not in (204, 304)
        if plan.body is not None and not has_body:
            edits = edits.also(drop=("content-length",))  # of what a GET would be mapped from
        match plan.body if has_body else None:
            case MapBody() as mapping:
                mapper = mapping.make(self._means.conversation(exchange, None))
                edit(response.headers, edits.also(drop=("content-length", "content-md5", "trailer")))
                return MapAnswerBody(mapper)
            case MapWhole() as mapping:
                exchange.whole = mapping
                edit(response.headers, edits)
                return self._means.collect(exchange, mapping.limit_bytes, too_large=refusals.SERVICE_ANSWER)
            case None:
                passes = plan.may_be_sealed or not has_body
                granted = CLEAR if passes else self._means.reading.not_sealed(exchange.begin_read(), answer)
                edit(response.headers, edits)
                return granted

    async def replace(self, response: Response, exchange: Exchange, collected: Collect) -> None:
        """The answer has been collected: put another in its place."""
        if exchange.restarts:
            await self._restart(response, exchange, collected)
        else:
            await self._map_whole(response, exchange, collected)

    async def _restart(self, response: Response, exchange: Exchange, collected: Collect) -> None:
        """The object changed after it was looked at: look once more, and answer with what is there now."""
        going, read, request = exchange.plan, exchange.begin_read(), exchange.request
        if not isinstance(going, OpenRange):
            raise RefusedError(refusals.INTERNAL)
        try:
            begin = await self._means.prefetch.beginning(read.source)
            if begin is None or not has_magic(begin.data):
                raise RefusedError(refusals.UPSTREAM_CHANGED)
            read.asked = asked = await self._means.reading.asked(read, going, begin)
            if asked.plain[1] - asked.plain[0] > RESTART_BYTES:
                raise RefusedError(refusals.UPSTREAM_CHANGED)
            fields = [("Range", f"bytes={asked.stored[0]}-{asked.stored[1] - 1}")]
            if begin.etag is not None:
                fields.append(("If-Match", begin.etag))
            async with self._means.prefetch.asking.ask(read.source, "GET", fields=fields) as got:
                answer = AnswerHead(status=got.status, fields=got.fields)
                plan = plan_answer(going, answer, request.route, asked=asked)
                plan = exchange.profile.plan_answer(request, going, answer, plan)
                if not isinstance(plan, OpenPart):
                    got.leave()
                    raise RefusedError(refusals.UPSTREAM_CHANGED)
                body = self._means.reading.open_part(read)
                content = b"".join([piece async for piece in opened_by(body, got.pieces())])
        except PrefetchError as error:
            raise RefusedError(refusals.UPSTREAM_CHANGED) from error
        response.status_code, response.reason = 206, ""
        response.headers.fields = tuple(
            (name.encode(), value.encode("utf-8", "surrogateescape"))
            for name in got.fields
            if name not in OF_ONE_CONNECTION
            for value in got.fields.all(name)
        )
        edit(response.headers, sized(plan.edits, len(content)))
        approve(response, collected, content)

    async def _map_whole(self, response: Response, exchange: Exchange, collected: Collect) -> None:
        """The answer has been collected: put in its place what the profile makes of it."""
        if exchange.whole is None or exchange.answer is None:
            raise RefusedError(refusals.INTERNAL)
        talk = self._means.conversation(exchange, None)
        reply = await exchange.whole.function(talk, exchange.answer, collected.body())
        response.status_code = reply.status
        response.reason = ""
        edit(
            response.headers,
            sized(Edits(drop=frozenset({"transfer-encoding"}), put=reply.fields), len(reply.body)),
        )
        approve(response, collected, reply.body)


def _may_restart(going: RequestPlan, read: Read) -> bool:
    return (
        isinstance(going, OpenRange)
        and going.if_range is None  # else the whole of another version would be due
        and read.asked is not None
        and read.asked.pinned
    )


def _has_left(flow: HTTPFlow) -> bool:
    """Whether the last of the upload is on its way: before that no service can have it."""
    upload = permit(flow).request
    return isinstance(upload, Transform) and upload.finished
