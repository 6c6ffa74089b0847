"""The web profile: a web application as people use it in a browser (docs/profiles-web.md).

1. What is read is opened if it begins as a sealed object, and is a page of the application's if not. Where
   only objects lie, the option `legacy:/PATH=strict` says so.
2. The files of a form are sealed wherever it is sent to (forms.py). Any other body is content or a command by
   a rule of the options, or is refused.
3. A form is never a command: a `clear` rule lets no multipart body through.
4. An archive that is not sealed itself may be one of sealed files, which nobody would open: refused.
"""

from dataclasses import replace
from functools import partial
from typing import ClassVar, Final, override

from proxy import refusals
from proxy.messages.message import AnswerHead, Framing, RequestHead, request_digests
from proxy.messages.multipart_form import boundary_of
from proxy.plans.answer_plan import AnswerPlan, MapSize, OpenWhole, Pass
from proxy.plans.conversing import Conversation
from proxy.plans.plan import (
    Answer,
    Converse,
    Decision,
    Forward,
    Going,
    NewSealer,
    Proceed,
    Refuse,
    RequestPlan,
    Reshape,
)
from proxy.plans.profile_options import ProfileOptions
from proxy.plans.request import Edits, Request
from proxy.profiles.generic import GenericProfile
from proxy.profiles.profile import Limitation
from proxy.profiles.web.addresses import at_client, at_service
from proxy.profiles.web.chunks import is_in_chunks
from proxy.profiles.web.forms import SealedForm
from proxy.profiles.web.options import Archives, FormLength, RouteRule, WebOptions
from proxy.profiles.web.pages import PAGE_TYPE, refusal_page, wants_page
from proxy.refusals import Refusal, RefusedError, Shaped

HELD_LIMIT_BYTES: Final = 1024 * 1024 * 1024
"""Of a form that is held; all that is held by a process is limited besides (proxy/bodies/spool.py)."""
ANSWER_LIMIT_BYTES: Final = 8 * 1024 * 1024
"""Of the page that answers a form that was held."""

_FORM: Final = "multipart/form-data"
_METHODS: Final = frozenset({"DELETE", "OPTIONS", "PATCH", "POST", "PUT"})
"""Besides GET and HEAD."""
_RANGES: Final = ("if-range", "range")
# They go with a form as they would without us; asking.py leaves them to whoever names them.
_KEPT: Final = ("content-type", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since")
_ARCHIVES: Final = frozenset(
    f"application/{name}"
    for name in (
        "gzip", "vnd.rar", "x-7z-compressed", "x-bzip2", "x-gtar", "x-gzip", "x-rar-compressed", "x-tar",
        "x-xz", "x-zip-compressed", "zip", "zstd",
    )
)  # fmt: skip


class WebProfile(GenericProfile):
    name: ClassVar[str] = "web"
    summary: ClassVar[str] = "web applications: pages pass, files in forms and uploads are sealed"
    encrypts: ClassVar[str] = (
        "files in multipart/form-data, and whole bodies on routes that the options call `seal`; names and"
        " short texts of forms are not content"
    )
    sizes: ClassVar[str] = "Content-Length by arithmetic, in GET, HEAD and ranges; pages are not rewritten"
    validators: ClassVar[str] = "ETag, Last-Modified and conditions pass unchanged: they name stored versions"
    digests: ClassVar[str] = "those of a request are checked against the plaintext, none is passed on"
    operations: ClassVar[tuple[tuple[str, str], ...]] = (
        ("GET", "what begins as a sealed object is opened, ranges too; all else is a page, and passes"),
        ("HEAD", "Content-Length is the plaintext's, by a look at the first bytes"),
        ("POST, PUT of a form", "its files are sealed; short texts and all the rest stay byte for byte"),
        ("A file in several forms, one for each chunk of it", "refused: partial-write"),
        ("PUT, POST of another body", "by `routes`: seal, clear; else refused: unknown-route"),
        ("PATCH, DELETE with a body", "by `routes`: clear; else refused: unknown-route"),
        ("POST, PUT, PATCH, DELETE, OPTIONS without a body", "pass: a command"),
        ("Whatever `routes` calls refuse", "refused: unknown-route"),
        ("An archive (zip, tar ...) that is not sealed", "refused: not-sealed, unless `archives` is pass"),
        ("All others", "refused: unknown-route"),
    )
    limitations: ClassVar[tuple[Limitation, ...]] = (
        Limitation(
            what="Search in content, preview, thumbnails, conversion, virus scan at the application",
            why="it holds ciphertext only",
        ),
        Limitation(
            what="Sizes that its pages show",
            why="they are stored sizes: 88 bytes and 16 per 16 KiB more than the content",
        ),
        Limitation(
            what="Archives of several files, made by the application",
            why="the files in them are sealed; each can be downloaded by itself",
        ),
        Limitation(
            what="Resumable and chunked uploads with digests of the file (up2k, tus), files within JSON",
            why="the application compares digests with ciphertext, and a body is sealed as a whole",
        ),
        Limitation(
            what="Texts that are typed into the application",
            why="short ones pass in the clear, in forms and on `clear` routes; long ones are refused",
        ),
        Limitation(
            what="Editing in the browser, by WebSockets above all",
            why="content could leave in messages that nobody seals",
        ),
        Limitation(
            what="Telling that the application put plaintext in a file's place",
            why="it would be a page; paths where only files lie can be made strict by the option `legacy`",
        ),
        Limitation(
            what="Absolute links of pages, in reverse mode",
            why="pages are not rewritten; a forward proxy needs no rewriting",
        ),
        Limitation(
            what="Several ranges in one request",
            why="they are answered by the whole object (200), as RFC 9110 14.2 allows",
        ),
    )
    options: ClassVar[type[ProfileOptions]] = WebOptions

    # ---- requests

    @override
    def plan(self, request: Request) -> RequestPlan:
        head, frame = request.head, request.frame
        request = replace(request, edits=request.edits.also(put=at_service(request)))
        rule = _options(request).rule_for(head.method, head.target)
        if rule is RouteRule.REFUSE:
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        if head.method in ("GET", "HEAD"):
            return super().plan(request)
        if head.method not in _METHODS:
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        if frame.is_declared or frame.framing is Framing.STREAM:
            plan = self._with_body(request, rule)
            if plan is not None:
                return plan
            if frame.is_declared:
                return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        elif head.method == "PUT" and rule is RouteRule.SEAL:
            return super().plan(request)  # an empty object
        return _command(request)

    def _with_body(self, request: Request, rule: RouteRule | None) -> RequestPlan | None:
        """Of a request that brings a body, or may; None: there is no rule for one."""
        head = request.head
        if head.method in ("POST", "PUT"):
            if is_in_chunks(head):
                return Refuse(refusal=refusals.PARTIAL_WRITE)
            if _is_form(head):
                return _form(request)
            if rule is RouteRule.SEAL:
                return super().plan(request)
        if rule is RouteRule.CLEAR and head.method != "OPTIONS" and not _may_bring_files(head):
            return Converse(
                edits=request.edits.also(drop=_RANGES),
                handler=_pass_clear,
                limit_bytes=_options(request).clear_bytes,
            )
        return None

    # ---- answers

    @override
    def plan_answer(
        self, request: Request, plan: Going, answer: AnswerHead, proposed: AnswerPlan
    ) -> AnswerPlan:
        if isinstance(proposed, Refuse):
            return proposed
        proposed = replace(proposed, edits=proposed.edits.also(put=at_client(request, answer)))
        if isinstance(proposed, MapSize) or not _is_foreign_archive(request, answer):
            return proposed
        if isinstance(proposed, OpenWhole):
            return replace(proposed, must_be_sealed=True)
        return Refuse(refusal=refusals.NOT_SEALED) if isinstance(proposed, Pass) else proposed

    @override
    def shape(self, refusal: Refusal, head: RequestHead) -> Shaped | None:
        if not wants_page(head.fields):
            return None
        return Shaped(content_type=PAGE_TYPE, body=refusal_page(refusal))


def _options(request: Request) -> WebOptions:
    if not isinstance(request.options, WebOptions):
        raise RefusedError(refusals.INTERNAL)
    return request.options


def _command(request: Request) -> Forward:
    edits = request.edits.also(drop=_RANGES)
    if request.head.method in ("POST", "PUT", "PATCH"):
        edits = edits.also(put=(("content-length", "0"),))
    return Forward(edits=edits, body_may_come=request.frame.framing is Framing.STREAM)


async def _pass_clear(talk: Conversation) -> Decision:
    request = talk.request
    if talk.body:
        talk.note("body-passed-in-the-clear", size_bytes=len(talk.body))
    edits = request.edits.also(drop=_RANGES)
    return Proceed(plan=Forward(edits=edits), body=talk.body)


def _is_form(head: RequestHead) -> bool:
    """Whether any reader could take the body for a form: also where several types are given."""
    return any(_FORM in value.lower() for value in head.fields.all("content-type"))


def _may_bring_files(head: RequestHead) -> bool:
    """Whether a reader of forms could look into the body: some take any multipart type for one."""
    return any("multipart/" in value.lower() for value in head.fields.all("content-type"))


def _form(request: Request) -> RequestPlan:
    options, head = _options(request), request.head
    boundary = boundary_of(head.fields.sole("content-type") or "")
    digests, total_bytes = request_digests(head.fields), request.frame.length_bytes
    if options.form_length is FormLength.LAST and total_bytes is None:
        return Refuse(refusal=refusals.LENGTH_REQUIRED)

    def make(new_sealer: NewSealer) -> SealedForm:
        return SealedForm(boundary, options, new_sealer, total_bytes=total_bytes, digests=digests)

    edits = request.edits.also(drop=_RANGES)
    if options.form_length is not FormLength.HELD:
        return Reshape(edits=edits, make=make)
    return Converse(
        edits=edits,
        handler=partial(_send_held, edits=edits),
        limit_bytes=HELD_LIMIT_BYTES,
        spool=Reshape(edits=edits, make=make),
    )


async def _send_held(talk: Conversation, *, edits: Edits) -> Decision:
    held, head = talk.spooled, talk.request.head
    if held is None:
        raise RefusedError(refusals.INTERNAL)
    fields = [(name, value) for name, value in edits.put if name in ("origin", "referer")]
    body, size_bytes = held.pieces(), held.stored_bytes
    async with talk.ask(head.method, fields=fields, keep=_KEPT, body=body, body_bytes=size_bytes) as answer:
        seen = AnswerHead(status=answer.status, fields=answer.fields)
        if _is_foreign_archive(talk.request, seen):
            answer.leave()
            raise RefusedError(refusals.NOT_SEALED)
        reply = await talk.relay(answer, limit_bytes=ANSWER_LIMIT_BYTES, to_upload=True)
    if allowed := dict(at_client(talk.request, seen)):
        kept = tuple(field for field in reply.fields if field[0].lower() not in allowed)
        reply = replace(reply, fields=(*kept, *allowed.items()))
    return Answer(reply=reply)


def _is_foreign_archive(request: Request, answer: AnswerHead) -> bool:
    """Whether this answer brings an archive, which is refused unless it is a sealed object itself."""
    if _options(request).archives is Archives.PASS or not 200 <= answer.status < 300:
        return False
    kinds = (value.partition(";")[0].strip(" \t").lower() for value in answer.fields.all("content-type"))
    return not _ARCHIVES.isdisjoint(kinds)
