"""The gcs profile: what becomes of each operation of Google Cloud Storage's JSON API (docs/profiles-gcs.md).

1. Content is sealed as one object, by whichever of the three protocols it comes; names and metadata are the
   service's, in the clear.
2. What the service says of objects, in lists too, is rewritten as it streams (resources.py).
3. A document that a client sends is read whole, and passes only if it is one that the operation takes.
4. Copies inside the service carry ciphertext, and stay readable: nothing is bound to a name.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Final, override

from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import (
    AnswerHead,
    BodyFrame,
    Framing,
    RequestHead,
    byte_range,
    digest_fields,
    request_digests,
)
from proxy.plans.answer_plan import AnswerPlan, MapBody, MapWhole, OpenPart, OpenWhole, Pass
from proxy.plans.conversing import Conversation, Reply
from proxy.plans.plan import (
    Converse,
    Decision,
    EmptyBody,
    Forward,
    Going,
    HeadSize,
    Open,
    OpenRange,
    Proceed,
    Refuse,
    RequestPlan,
    Seal,
)
from proxy.plans.request import Edits, Request
from proxy.profiles.gcs import multipart, resumable
from proxy.profiles.gcs.digests import Digests, Tally, Uploaded
from proxy.profiles.gcs.errors import CONTENT_TYPE, error_document
from proxy.profiles.gcs.resources import METADATA_LIMIT_BYTES, Resources, edited, edited_rewrite
from proxy.profiles.gcs.routes import Kind, Operation, metadata_target, operation_of
from proxy.profiles.gcs.selections import Selection
from proxy.profiles.gcs.told import (
    MARK,
    UNKNOWN_SIZE,
    changes_metadata,
    is_coded,
    is_nothing,
    settings_document,
    told_metadata,
)
from proxy.profiles.json_rewriting import JsonError, JsonListMapper, JsonObject
from proxy.profiles.profile import Limitation, Profile
from proxy.refusals import Refusal, RefusedError, Shaped

ANSWER_LIMIT_BYTES: Final = 1024 * 1024
"""Of one object's metadata."""
_RANGES: Final = ("if-range", "range")
_STORED_SIZE: Final = "x-goog-stored-content-length"
_OURS: Final = (f"x-goog-meta-{MARK}",)
_UPLOADS: Final = frozenset({Kind.MEDIA, Kind.RELATED, Kind.START, Kind.SESSION})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The memo of what went on."""

    kind: Kind
    tally: Tally | None = None
    """Of an upload that was sealed as it passed."""


class GcsProfile(Profile):
    name: ClassVar[str] = "gcs"
    makes_composites: ClassVar[bool] = True
    summary: ClassVar[str] = "Google Cloud Storage by its JSON API: client libraries, rclone"
    encrypts: ClassVar[str] = "the content of every object; names, metadata and settings are not content"
    sizes: ClassVar[str] = (
        "by arithmetic; of resumable uploads by an entry of ours in their metadata, or by their manifest"
    )
    validators: ClassVar[str] = (
        "generations, ETags, Last-Modified and conditions name stored versions, unchanged"
    )
    digests: ClassVar[str] = (
        "X-Goog-Hash, Content-MD5, crc32c and md5Hash of an upload are checked against the plaintext and"
        " dropped; its answer names the plaintext's; no other answer names any"
    )
    operations: ClassVar[tuple[tuple[str, str], ...]] = (
        ("insert, uploadType=media", "the body is sealed as it streams"),
        (
            "insert, uploadType=multipart",
            "the second part is sealed and held, then sent with checked metadata",
        ),
        (
            "insert, uploadType=resumable",
            "each chunk is a part of one sealed object; held until it is whole, its state in the database",
        ),
        ("get with alt=media", "the content is opened; one range is served by range, several as the whole"),
        ("get, list", "size is the plaintext's, digests are left out; lists stream"),
        ("patch, update", "pass, if the document is an object's metadata without sizes and digests"),
        ("copy, rewrite, move, restore", "pass: inside the service ciphertext is carried"),
        ("delete", "passes"),
        ("buckets, IAM, access control, storage layout", "pass, with a JSON object or without a body"),
        ("compose", "refused: unknown-route; parts are not one sealed object"),
        ("batch, watch, notifications, XML API, signed URLs, gRPC", "refused: unknown-route"),
        ("Content-Encoding, contentEncoding", "refused: content-coding; the service would undo it"),
    )
    limitations: ClassVar[tuple[Limitation, ...]] = (
        Limitation(
            what="compose, and clients' parallel composite uploads (gcloud's, gsutil's)",
            why="the service would join sealed objects into what is none",
        ),
        Limitation(
            what="Batches of requests", why="their inner requests are not looked into; clients can do without"
        ),
        Limitation(
            what="The XML API, signed URLs and HMAC keys at the same host",
            why="another dialect; signed URLs name it",
        ),
        Limitation(
            what="Objects with a Content-Encoding (gsutil -z, decompressive transcoding)",
            why="the service would decompress what it stores, which is ciphertext",
        ),
        Limitation(
            what="md5Hash in the answer to a resumable upload in chunks, digests in all later answers",
            why="they would be of ciphertext; crc32c is answered to every upload",
        ),
        Limitation(
            what="More than 1 GiB in one request of a resumable or multipart upload",
            why="it waits here, sealed, until it is whole: let the client send chunks",
        ),
        Limitation(
            what="A resumable upload of more than 9,999 chunks, or whose chunk is repeated with other bounds",
            why="a chunk is a sealed message: one that the service has begun to take cannot become another",
        ),
        Limitation(
            what="Sizes in metadata and lists of resumable uploads whose entry was removed past the proxy",
            why="they are found by sealgate-size in the object's metadata; downloads tell the right one",
        ),
        Limitation(
            what="componentCount, sizes in bills, quotas, inventories and notifications",
            why="they are of what is stored: 88 bytes and 16 per 16 KiB more than the content",
        ),
        Limitation(
            what="Names, custom metadata, contexts", why="they are the service's to search, in the clear"
        ),
        Limitation(
            what="Detecting that the service brought back an older version of an object",
            why="an older version was sealed just as well",
        ),
    )

    @override
    def plan(self, request: Request) -> RequestPlan:
        head, frame = request.head, request.frame
        operation = operation_of(head.method, head.target, head.fields)
        kind = operation.kind
        if is_coded(operation.parameters.get("contentEncoding")) or any(
            is_coded(coding) for coding in head.fields.tokens("content-encoding")
        ):
            return Refuse(refusal=refusals.CONTENT_CODING)
        match kind:
            case Kind.MEDIA:
                return _seal(request)
            case Kind.RELATED:
                return multipart.plan(request)
            case Kind.START | Kind.SESSION | Kind.CANCEL:
                return resumable.plan(request, operation)
            case Kind.READ:
                return Refuse(refusal=refusals.UNKNOWN_ROUTE) if frame.is_declared else _read(request)
            case Kind.CHANGE | Kind.COPY | Kind.REWRITE | Kind.SETTINGS if frame.is_declared or _may_come(
                frame
            ):
                return Converse(
                    edits=request.edits.also(drop=_RANGES),
                    handler=partial(_pass_document, request, operation),
                    limit_bytes=METADATA_LIMIT_BYTES,
                )
            case _ if not frame.is_declared:
                return _forward(request, operation)
            case _:
                return Refuse(refusal=refusals.UNKNOWN_ROUTE)

    # ---- answers

    @override
    def plan_answer(
        self, request: Request, plan: Going, answer: AnswerHead, proposed: AnswerPlan
    ) -> AnswerPlan:
        if isinstance(proposed, Refuse):
            return proposed
        proposed = replace(proposed, edits=_without_stored(proposed, answer))
        asked = plan.memo
        if not isinstance(proposed, Pass) or not isinstance(asked, Asked) or not 200 <= answer.status < 300:
            return proposed
        make: MapBody | MapWhole
        match asked.kind:
            case Kind.LIST:
                make = MapBody(make=lambda talk: JsonListMapper("items", Resources(talk)))
            case Kind.MEDIA | Kind.OBJECT | Kind.CHANGE | Kind.COPY | Kind.REWRITE:
                make = MapWhole(limit_bytes=ANSWER_LIMIT_BYTES, function=partial(_map, asked))
            case _:
                return proposed
        if any(coding != "identity" for coding in answer.fields.tokens("content-encoding")):
            return Refuse(refusal=refusals.SERVICE_ANSWER)
        return Pass(edits=proposed.edits, body=make)

    @override
    def shape(self, refusal: Refusal, head: RequestHead) -> Shaped:
        return Shaped(content_type=CONTENT_TYPE, body=error_document(refusal))


def _seal(request: Request) -> RequestPlan:
    head, frame, edits = request.head, request.frame, request.edits.also(drop=_RANGES)
    tally = Tally(Digests.of_fields(head.fields))
    plain_bytes = 0 if frame.framing is Framing.NONE else frame.length_bytes
    if plain_bytes is not None:
        edits = edits.also(put=(("content-length", str(sealed_length(plain_bytes))),))
    return Seal(
        edits=edits,
        plain_bytes=plain_bytes,
        empty=EmptyBody.SEAL,
        digests=request_digests(head.fields),
        decoder=lambda: tally,
        memo=Asked(kind=Kind.MEDIA, tally=tally),
    )


def _read(request: Request) -> RequestPlan:
    edits, body_may_come = request.edits.also(drop=_RANGES), _may_come(request.frame)
    if request.head.method == "HEAD":
        return HeadSize(edits=edits, body_may_come=body_may_come)
    wanted = byte_range(request.head.fields)
    if wanted is None:
        return Open(edits=edits, body_may_come=body_may_come)
    if_range = request.head.fields.first("if-range")
    return OpenRange(edits=edits, wanted=wanted, if_range=if_range, body_may_come=body_may_come)


def _forward(request: Request, operation: Operation) -> Forward:
    return Forward(
        edits=request.edits.also(drop=_RANGES),
        target=Selection.of(request.head, operation).target,
        body_may_come=_may_come(request.frame),
        memo=Asked(kind=operation.kind),
    )


async def _pass_document(request: Request, operation: Operation, talk: Conversation) -> Decision:
    """The request with the document it came with, if its operation takes that one."""
    body = talk.body
    if not is_nothing(body):
        if operation.kind is Kind.SETTINGS:
            settings_document(body)
        else:
            merges = operation.kind is Kind.CHANGE and request.head.method == "PATCH"
            is_changed = changes_metadata(body, merges=merges)
            mark, entries = await _mark_of(operation, talk) if is_changed else (None, ())
            body = told_metadata(body, mark=mark, entries=entries).document
    return Proceed(plan=replace(_forward(request, operation), body_may_come=False), body=body)


async def _mark_of(operation: Operation, talk: Conversation) -> tuple[str | None, tuple[str, ...]]:
    """Our mark on the object that is changed or copied, None if it has none; and its other entries."""
    async with talk.ask("GET", metadata_target(operation)) as answer:
        reply = await talk.relay(answer)
    if reply.status != 200:
        return UNKNOWN_SIZE, ()
    try:
        metadata = JsonObject(reply.body).inner("metadata")
    except JsonError as error:
        raise RefusedError(refusals.SERVICE_ANSWER) from error
    if metadata is None:
        return None, ()
    return metadata.text(MARK), tuple(name for name in metadata.names() if name != MARK)


def _may_come(frame: BodyFrame) -> bool:
    return frame.framing is Framing.STREAM


async def _map(asked: Asked, talk: Conversation, answer: AnswerHead, body: bytes) -> Reply:
    if not body.strip():
        return Reply(status=answer.status, body=body)
    if asked.kind is Kind.REWRITE:
        return Reply(status=answer.status, body=await edited_rewrite(body, talk))
    # Its size by arithmetic: the upload may have been a sealed object already (option `sealed_upload`).
    known = None if asked.tally is None else Uploaded(digests=asked.tally.digests)
    return Reply(status=answer.status, body=await edited(body, talk, known=known))


def _without_stored(proposed: AnswerPlan, answer: AnswerHead) -> Edits:
    """The edits, with nothing in the head that is of ciphertext."""
    assert not isinstance(proposed, Refuse)  # noqa: S101 - the caller's own check
    edits = proposed.edits.also(drop=(*digest_fields(answer.fields), *_OURS))
    if _STORED_SIZE not in answer.fields:
        return edits
    plain = None
    if isinstance(proposed, OpenWhole):
        plain = proposed.plain_bytes
    elif isinstance(proposed, OpenPart):
        total = dict(proposed.edits.put).get("content-range", "").rpartition("/")[2]
        plain = int(total) if total.isdecimal() else None
    if plain is None:
        return edits.also(drop=(_STORED_SIZE,))
    return edits.also(put=((_STORED_SIZE, str(plain)),))
