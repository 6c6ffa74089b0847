"""One request, from its plan to what the gate is told: the edited head, the body, the key; or an answer.

What is permitted is named: a transform, a body to be collected, or nothing but the head.
"""

from dataclasses import replace
from typing import Any, cast

from mitmproxy.http import HTTPFlow, Response
from mitmproxy.http import Request as HttpRequest

from proxy import refusals
from proxy.bodies.bodies import NoBody, ReshapeBody, SealBody, sealing_key
from proxy.bodies.resealing import SealOrPassBody
from proxy.bodies.spooling import SpoolingBody
from proxy.exchange.conversation import ServiceConversation
from proxy.exchange.exchange import EXCHANGE, ClientBody, Exchange, Means
from proxy.exchange.heads import declare, depart, depart_with, sized, stream
from proxy.gate.permit import CLEAR, Collect, Grant, permit
from proxy.keys.data_key import DataKey
from proxy.plans.conversing import Reply
from proxy.plans.plan import (
    Answer,
    Converse,
    Decision,
    Forward,
    Going,
    HeadSize,
    LegacyRange,
    Open,
    OpenRange,
    PassBody,
    Refuse,
    RequestPlan,
    Reshape,
    Seal,
    Unopened,
)
from proxy.plans.profile_options import SealedUpload
from proxy.plans.request import Edits
from proxy.refusals import RefusedError


class Sending:
    """Carries the plans of requests out."""

    def __init__(self, means: Means) -> None:
        self._means = means

    async def permit(self, flow: HTTPFlow, exchange: Exchange, bodies: list[ClientBody]) -> Grant | None:
        """Prepare the request to leave by its plan. None: it does not; `flow.response` answers it."""
        flow.metadata[EXCHANGE] = exchange
        exchange.came = tuple(flow.request.headers.fields)
        permit(flow).shape = lambda refusal: exchange.profile.shape(refusal, exchange.request.head)
        plan, request = exchange.plan, flow.request
        match plan:
            case Refuse():
                raise RefusedError(plan.refusal)
            case Answer():
                self._answer(flow, exchange, plan.reply)
                return None
            case PassBody():
                return self._means.collect(exchange, plan.limit_bytes)
            case Converse() if plan.spool is not None:
                body = await self._sealing(flow, exchange, plan.spool)
                if isinstance(body, SealOrPassBody):
                    raise RefusedError(refusals.INTERNAL)
                bodies.append(body)
                return SpoolingBody(plan.limit_bytes, body, self._means.spools.open(exchange.owner.tenant))
            case Converse():
                return self._means.collect(exchange, plan.limit_bytes)
            case Seal() | Reshape():
                body = await self._sealing(flow, exchange, plan)
                bodies.append(body)
                depart(request, plan, plan.edits)
                stream(request, body)
                return body
            case OpenRange():
                return _bodiless(request, plan, await self._range(exchange, plan))
            case Forward() | Open() | LegacyRange() | HeadSize() | Unopened():
                return _bodiless(request, plan, plan.edits)

    async def decide(self, flow: HTTPFlow, exchange: Exchange, collected: Collect) -> None:
        """The body has been collected: what goes on in its place, or the answer."""
        plan = exchange.plan
        match plan:
            case PassBody():
                depart_with(flow.request, plan, plan.edits, collected, collected.body())
            case Converse():
                talk = self._means.conversation(exchange, collected)
                decision = await self._decision(plan, talk, collected)
                match decision:
                    case Refuse():
                        raise RefusedError(decision.refusal)
                    case Answer():
                        self._answer(flow, exchange, decision.reply)
                    case _:
                        exchange.plan = decision.plan
                        edits = decision.plan.edits
                        if isinstance(decision.plan, OpenRange):
                            edits = await self._range(exchange, decision.plan)
                        depart_with(flow.request, decision.plan, edits, collected, decision.body)
            case _:
                raise RefusedError(refusals.INTERNAL)

    @staticmethod
    async def _decision(plan: Converse, talk: ServiceConversation, collected: Collect) -> Decision:
        if not isinstance(collected, SpoolingBody):
            return await plan.handler(talk)
        talk.spooled = held = collected.finish()
        try:
            return await plan.handler(talk)
        finally:
            held.close()

    def _answer(self, flow: HTTPFlow, exchange: Exchange, reply: Reply) -> None:
        exchange.is_answered_here = True
        headers = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in reply.fields]
        flow.response = Response.make(reply.status, reply.body, headers)
        if reply.status in (204, 304):
            flow.response.headers.pop("content-length", None)
        declared = [value for name, value in reply.fields if name.lower() == "content-length"]
        if declared and exchange.request.head.method == "HEAD":
            flow.response.headers["content-length"] = declared[0]  # of what a GET would bring

    async def _sealing(
        self, flow: HTTPFlow, exchange: Exchange, plan: Seal | Reshape
    ) -> SealBody | SealOrPassBody | ReshapeBody:
        key = await sealing_key(self._means.keys, exchange.owner, wait_s=self._means.wait_s)
        meter = exchange.trail.meters.sealed
        body: SealBody | SealOrPassBody | ReshapeBody
        if isinstance(plan, Seal):
            body = self._seal_body(flow, exchange, plan, key)
            size_bytes = plan.plain_bytes
        else:
            headers = flow.request.headers
            size_bytes = exchange.request.frame.length_bytes
            body = ReshapeBody(
                plan,
                key,
                declared_bytes=size_bytes,
                on_length=lambda length_bytes: declare(headers, length_bytes),
                meter=meter,
            )
        exchange.trail.use("object-seal", key, size_bytes=size_bytes)
        exchange.key = key
        return body

    def _seal_body(
        self, flow: HTTPFlow, exchange: Exchange, plan: Seal, key: DataKey
    ) -> SealBody | SealOrPassBody:
        trail, meter = exchange.trail, exchange.trail.meters.sealed
        options = exchange.request.options
        passes = options.sealed_upload is SealedUpload.PASS
        if not passes or plan.part is not None or plan.after is not None or exchange.plan is not plan:
            return SealBody.by(
                plan,
                key,
                meter,
                anonymous=options.hide_key_ids,
                on_sealed=lambda: trail.note("sealed-upload-wrapped"),
            )
        request = flow.request

        def on_pass(length_bytes: int | None) -> None:
            trail.note("sealed-upload-passed", size_bytes=length_bytes)
            if length_bytes is not None:
                _depart_again(request, exchange, plan, length_bytes)

        return SealOrPassBody(
            plan,
            SealBody.by(replace(plan, decoder=None), key, meter, anonymous=options.hide_key_ids),
            find_key=self._means.reading.find_key(exchange.begin_read(), size_bytes=None),
            on_pass=on_pass,
            meter=meter,
        )

    async def _range(self, exchange: Exchange, plan: OpenRange) -> Edits:
        read = exchange.begin_read()
        ranged = await self._means.reading.range(read, plan, exchange.request.head.fields)
        exchange.plan = cast("RequestPlan", ranged.plan)
        return ranged.edits


def _bodiless(request: HttpRequest, plan: Any, edits: Edits) -> Grant:
    if not plan.body_may_come:
        depart(request, plan, edits)
        return CLEAR
    depart(request, plan, edits.also(put=(("content-length", "0"),)))
    nothing = NoBody()
    stream(request, nothing)
    return nothing


def _depart_again(request: HttpRequest, exchange: Exchange, plan: Going, length_bytes: int) -> None:
    """Edit a head that is held once more, from what came, for another length."""
    request.headers.fields = exchange.came
    request.path = exchange.request.head.target
    depart(request, plan, sized(plan.edits, length_bytes))
