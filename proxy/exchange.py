"""One request and its answer, from the plan to what the gate is told: the head's edits, the bodies, the keys.

1. The head of a message is edited after everything that may refuse it; a profile's signer sees it last.
2. What is permitted is named: a transform, a body to be collected, or nothing but the head.
3. The plan of an answer follows from the plan by which its request went on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from mitmproxy.http import Headers, HTTPFlow, Message, Response
from mitmproxy.http import Request as HttpRequest

from envelope.errors import KeyUnavailableError
from envelope.keys import NetworkService
from envelope.objects import has_magic
from proxy import refusals
from proxy.asking import Outgoing, Source
from proxy.bodies import NoBody, ReshapeBody, SealBody, refusal_for, sealing_key
from proxy.collecting import Collecting, CountedBody
from proxy.conversation import OF_ONE_CONNECTION, ServiceConversation, opened_by
from proxy.gate.permit import CLEAR, Collect, Grant, Transform, permit
from proxy.keys.cache import DataKey, KeyCache
from proxy.message import AnswerHead, Fields
from proxy.opening import MapAnswerBody, OpenBody, OpenRangeBody
from proxy.plan import (
    Answer,
    Converse,
    Decision,
    Edits,
    Forward,
    Going,
    HeadSize,
    LegacyRange,
    MapBody,
    MapSize,
    MapWhole,
    Open,
    OpenPart,
    OpenRange,
    OpenWhole,
    Pass,
    PassBody,
    Refuse,
    Reply,
    Request,
    RequestPlan,
    Reshape,
    Seal,
    Unopened,
)
from proxy.planner import is_target, plan_answer
from proxy.prefetch import Prefetch, PrefetchError
from proxy.profile_options import SealedUpload
from proxy.profiles.profile import Profile
from proxy.reading import Read, Reading
from proxy.recording import Trail
from proxy.refusals import Refusal, RefusedError
from proxy.resealing import SealOrPassBody
from proxy.spool import Spools
from proxy.spooling import SpoolingBody
from proxy.uploads import UploadStore

type ClientBody = SealBody | SealOrPassBody | ReshapeBody | OpenBody | OpenRangeBody
"""What holds a key while it runs."""

_EXCHANGE: Final = "sealgate.exchange"
_RESTART_BYTES: Final = 8 * 1024 * 1024
"""The longest range that is read again, in memory. A longer one is refused: its client asks again."""


@dataclass(slots=True, eq=False)
class Exchange:
    """What is known of one flow between its hooks."""

    request: Request
    profile: Profile
    plan: RequestPlan
    trail: Trail
    source: Source
    read: Read | None = None
    key: DataKey | None = None
    is_answered_here: bool = False
    restarts: bool = False
    """A range is read again: the object changed after it was looked at."""
    whole: MapWhole | None = None
    """What is to become of the answer, once it has been collected."""
    answer: AnswerHead | None = None
    came: tuple[tuple[bytes, bytes], ...] = ()
    """The header fields as they came (Host is ours by then)."""
    conversation: ServiceConversation | None = None
    collected: list[CountedBody] = field(default_factory=list)

    def let_go(self) -> None:
        """The flow is over: what was collected does not count any more."""
        for body in self.collected:
            body.let_go()

    @property
    def owner(self) -> NetworkService:
        return self.request.service.owner

    @property
    def key_in_use(self) -> DataKey | None:
        return self.key or (self.read.key if self.read is not None else None)


def exchange_of(flow: HTTPFlow) -> Exchange | None:
    exchange = flow.metadata.get(_EXCHANGE)
    return exchange if isinstance(exchange, Exchange) else None


class Exchanges:
    """Carries plans out. *wait_s*: how long an upload waits for a key that is late."""

    def __init__(
        self,
        keys: KeyCache,
        prefetch: Prefetch,
        *,
        uploads: UploadStore | None,
        wait_s: float,
        spools: Spools | None = None,
        collecting: Collecting | None = None,
    ) -> None:
        self._keys = keys
        self._prefetch = prefetch
        self._reading = Reading(keys, prefetch)
        self._uploads = uploads
        self._wait_s = wait_s
        self._spools = spools or Spools()
        self._collecting = collecting or Collecting()

    # ---- requests

    async def permit_request(
        self, flow: HTTPFlow, exchange: Exchange, bodies: list[ClientBody]
    ) -> Grant | None:
        """Prepare the request to leave by its plan. None: it does not; `flow.response` answers it."""
        flow.metadata[_EXCHANGE] = exchange
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
                return self._collect(exchange, plan.limit_bytes)
            case Converse() if plan.spool is not None:
                body = await self._sealing(flow, exchange, plan.spool)
                if isinstance(body, SealOrPassBody):
                    raise RefusedError(refusals.INTERNAL)
                bodies.append(body)
                return SpoolingBody(plan.limit_bytes, body, self._spools.open(exchange.owner.tenant))
            case Converse():
                return self._collect(exchange, plan.limit_bytes)
            case Seal() | Reshape():
                body = await self._sealing(flow, exchange, plan)
                bodies.append(body)
                _depart(request, plan, plan.edits)
                _stream(request, body)
                return body
            case OpenRange():
                return _bodiless(request, plan, await self._range(exchange, plan))
            case Forward() | Open() | LegacyRange() | HeadSize() | Unopened():
                return _bodiless(request, plan, plan.edits)

    def _collect(
        self, exchange: Exchange, limit_bytes: int, *, too_large: Refusal = refusals.TOO_LARGE
    ) -> Collect:
        body = self._collecting.collect(exchange.owner.tenant, limit_bytes, too_large=too_large)
        exchange.collected.append(body)
        return body

    async def decide(self, flow: HTTPFlow, exchange: Exchange, collected: Collect) -> None:
        """The body has been collected: what goes on in its place, or the answer."""
        plan = exchange.plan
        match plan:
            case PassBody():
                _depart_with(flow.request, plan, plan.edits, collected, collected.body())
            case Converse():
                talk = self._conversation(exchange, collected)
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
                        _depart_with(flow.request, decision.plan, edits, collected, decision.body)
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

    def _conversation(self, exchange: Exchange, collected: Collect | None) -> ServiceConversation:
        if exchange.conversation is not None:
            return exchange.conversation
        exchange.conversation = talk = ServiceConversation(
            exchange.request,
            exchange.trail,
            exchange.source,
            keys=self._keys,
            prefetch=self._prefetch,
            reading=self._reading,
            composites=exchange.profile.makes_composites,
            wait_s=self._wait_s,
            uploads=self._uploads,
            body=collected.body() if collected is not None else b"",
        )
        return talk

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
        key = await sealing_key(self._keys, exchange.owner, wait_s=self._wait_s)
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
                on_length=lambda length_bytes: _declare(headers, length_bytes),
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
            find_key=self._reading.find_key(self._read(exchange), size_bytes=None),
            on_pass=on_pass,
            meter=meter,
        )

    async def _range(self, exchange: Exchange, plan: OpenRange) -> Edits:
        read = self._read(exchange)
        ranged = await self._reading.range(read, plan, exchange.request.head.fields)
        exchange.plan = cast("RequestPlan", ranged.plan)
        return ranged.edits

    def _read(self, exchange: Exchange) -> Read:
        if exchange.read is None:
            exchange.read = Read(
                route=exchange.request.route,
                trail=exchange.trail,
                source=exchange.source,
                composites=exchange.profile.makes_composites,
            )
        return exchange.read

    # ---- answers

    async def permit_answer(
        self, flow: HTTPFlow, response: Response, exchange: Exchange, bodies: list[ClientBody]
    ) -> Grant:
        """Prepare the answer to go on by its plan."""
        going, profile, request = exchange.plan, exchange.profile, exchange.request
        answer = AnswerHead(status=response.status_code, fields=Fields(response.headers.fields))
        exchange.answer = answer
        if isinstance(going, Seal | Reshape) and 200 <= answer.status < 300 and not _has_left(flow):
            raise RefusedError(refusals.ANSWER_REFUSED)
        read = self._read(exchange)
        if answer.status == 412 and _may_restart(going, read):
            exchange.restarts = True
            return self._collect(exchange, _RESTART_BYTES, too_large=refusals.UPSTREAM_CHANGED)
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
                    size = await self._reading.size(read, plan, answer)
                    edits = edits.also(drop=("content-length",)) if size is None else _sized(edits, size)
                _edit(response.headers, edits)
                granted = CLEAR
            case OpenPart():
                granted = self._reading.open_part(read)
                _edit(response.headers, plan.edits)
            case OpenWhole():
                granted = opening = await self._reading.open_whole(
                    read, plan, answer, on_length=lambda n: _declare(response.headers, n)
                )
                _edit(response.headers, _declared(plan.edits, answer, opening.expected_out_bytes))
        if isinstance(granted, Transform):
            _stream(response, granted)
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
            more = await going.after(self._conversation(exchange, None), answer, body.sealed)
            edits = edits.also(drop=more.drop, put=more.put)
        if isinstance(going, Unopened) and 200 <= answer.status < 300:
            exchange.trail.passed_as_stored()
        has_body = exchange.request.head.method != "HEAD" and answer.status not in (204, 304)
        if plan.body is not None and not has_body:
            edits = edits.also(drop=("content-length",))  # of what a GET would be mapped from
        match plan.body if has_body else None:
            case MapBody() as mapping:
                mapper = mapping.make(self._conversation(exchange, None))
                _edit(response.headers, edits.also(drop=("content-length", "content-md5", "trailer")))
                return MapAnswerBody(mapper)
            case MapWhole() as mapping:
                exchange.whole = mapping
                _edit(response.headers, edits)
                return self._collect(exchange, mapping.limit_bytes, too_large=refusals.SERVICE_ANSWER)
            case None:
                passes = plan.may_be_sealed or not has_body
                granted = CLEAR if passes else self._reading.not_sealed(self._read(exchange), answer)
                _edit(response.headers, edits)
                return granted

    async def replace(self, response: Response, exchange: Exchange, collected: Collect) -> None:
        """The answer has been collected: put another in its place."""
        if exchange.restarts:
            await self._restart(response, exchange, collected)
        else:
            await self._map_whole(response, exchange, collected)

    async def _restart(self, response: Response, exchange: Exchange, collected: Collect) -> None:
        """The object changed after it was looked at: look once more, and answer with what is there now."""
        going, read, request = exchange.plan, self._read(exchange), exchange.request
        if not isinstance(going, OpenRange):
            raise RefusedError(refusals.INTERNAL)
        try:
            begin = await self._prefetch.beginning(read.source)
            if begin is None or not has_magic(begin.data):
                raise RefusedError(refusals.UPSTREAM_CHANGED)
            read.asked = asked = await self._reading.asked(read, going, begin)
            if asked.plain[1] - asked.plain[0] > _RESTART_BYTES:
                raise RefusedError(refusals.UPSTREAM_CHANGED)
            fields = [("Range", f"bytes={asked.stored[0]}-{asked.stored[1] - 1}")]
            if begin.etag is not None:
                fields.append(("If-Match", begin.etag))
            async with self._prefetch.asking.ask(read.source, "GET", fields=fields) as got:
                answer = AnswerHead(status=got.status, fields=got.fields)
                plan = plan_answer(going, answer, request.route, asked=asked)
                plan = exchange.profile.plan_answer(request, going, answer, plan)
                if not isinstance(plan, OpenPart):
                    got.leave()
                    raise RefusedError(refusals.UPSTREAM_CHANGED)
                body = self._reading.open_part(read)
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
        _edit(response.headers, _sized(plan.edits, len(content)))
        _approve(response, collected, content)

    async def _map_whole(self, response: Response, exchange: Exchange, collected: Collect) -> None:
        """The answer has been collected: put in its place what the profile makes of it."""
        if exchange.whole is None or exchange.answer is None:
            raise RefusedError(refusals.INTERNAL)
        talk = self._conversation(exchange, None)
        reply = await exchange.whole.function(talk, exchange.answer, collected.body())
        response.status_code = reply.status
        response.reason = ""
        _edit(
            response.headers,
            _sized(Edits(drop=frozenset({"transfer-encoding"}), put=reply.fields), len(reply.body)),
        )
        _approve(response, collected, reply.body)


def source_of(request: Request, plan: RequestPlan, fields: Iterable[tuple[bytes, bytes]]) -> Source:
    """As whom to ask about the object of this request: the client's *fields*, but for those dropped."""
    if not isinstance(plan, Going):
        return Source(service=request.service, target=request.head.target, fields=tuple(fields))
    return Source(
        service=request.service,
        target=plan.target or request.head.target,
        fields=tuple(fields),
        dropped=plan.edits.drop,
        sign=plan.sign,
    )


def ended(body: ClientBody) -> Refusal | None:
    """Why a body under way has to end though nothing moves it; None: it has not to."""
    if body.finished or body.failure is not None or body.key is None:
        return None
    try:
        body.key.check()
    except KeyUnavailableError as error:
        return refusal_for(error)
    return None


def _bodiless(request: HttpRequest, plan: Any, edits: Edits) -> Grant:
    if not plan.body_may_come:
        _depart(request, plan, edits)
        return CLEAR
    _depart(request, plan, edits.also(put=(("content-length", "0"),)))
    nothing = NoBody()
    _stream(request, nothing)
    return nothing


def _depart_with(request: HttpRequest, plan: Going, edits: Edits, collected: Collect, body: bytes) -> None:
    """A request whose body was collected goes on with *body*."""
    if body or request.method in ("POST", "PUT"):
        edits = _sized(edits.also(drop=("transfer-encoding",)), len(body))
    else:
        edits = edits.also(drop=("content-length", "transfer-encoding"))
    _depart(request, plan, edits)
    _approve(request, collected, body)


def _approve(message: Message, collected: Collect, body: bytes) -> None:
    collected.approve(body)
    message.raw_content = body


def _depart(request: HttpRequest, plan: Going, edits: Edits) -> None:
    """Edit the head for good, and have it signed."""
    _edit(request.headers, edits)
    if plan.target is not None:
        request.path = _checked(plan.target)
    if plan.sign is None:
        return
    if "host" not in request.headers:  # HTTP/2: towards HTTP/1 it would be added later
        request.headers["Host"] = request.authority
    leaving = Outgoing(method=request.method, target=request.path, fields=tuple(request.headers.fields))
    signed = plan.sign(leaving)
    if signed.method != leaving.method:
        raise RefusedError(refusals.INTERNAL)
    request.headers.fields = signed.fields
    request.path = _checked(signed.target)


def _depart_again(request: HttpRequest, exchange: Exchange, plan: Going, length_bytes: int) -> None:
    """Edit a head that is held once more, from what came, for another length."""
    request.headers.fields = exchange.came
    request.path = exchange.request.head.target
    _depart(request, plan, _sized(plan.edits, length_bytes))


def _checked(target: str) -> str:
    if not is_target(target):
        raise RefusedError(refusals.INTERNAL)
    return target


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


def _stream(message: Message, transform: Transform) -> None:
    # Its pieces are any buffers; mitmproxy's annotation says bytes, its code only passes them on.
    message.stream = cast("Any", transform)


def _edit(headers: Headers, edits: Edits) -> None:
    """In one pass: mitmproxy's mapping looks through all fields for each name."""
    last = dict(edits.put)
    gone = edits.drop.union(last, dict(edits.lists))
    kept = [field for field in headers.fields if field[0].decode("latin-1").lower() not in gone]
    kept += [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in last.items()]
    for name, values in edits.lists:
        kept += [(name.encode(), value.encode("utf-8", "surrogateescape")) for value in values]
    headers.fields = tuple(kept)


def _declare(headers: Headers, length_bytes: int | None) -> None:
    """How a body ends, in a head that is held: by its length, else by chunks."""
    if length_bytes is None:
        headers.pop("content-length", None)
        headers["transfer-encoding"] = "chunked"
    else:
        headers.pop("transfer-encoding", None)
        headers["content-length"] = str(length_bytes)


def _sized(edits: Edits, length_bytes: int) -> Edits:
    return edits.also(put=(("content-length", str(length_bytes)),))


def _declared(edits: Edits, answer: AnswerHead, out_bytes: int | None) -> Edits:
    """*edits*, and the length of what will leave in place of what came."""
    if "content-length" not in answer.fields:
        return edits
    if out_bytes is None:
        return edits.also(drop=("content-length",))
    return _sized(edits, out_bytes)
