"""Copies that the service makes, and copies of a part (docs/profiles-s3.md).

1. Ciphertext may be copied as it lies: it is bound to no name. So an object that was sealed at once is copied
   by the service, metadata rules and all.
2. An object in parts is copied in parts, by the service too: an ETag without `-N` on it would make clients
   see a wrong size in every list. Its metadata is asked for and given again where S3 would have kept it.
3. A part made of a range of another object is a message of its own: the range is opened here and sealed anew.
4. Only what this network service's own keys open is copied. Plaintext that was there before us is copied as
   it is where the service's policy lets it be read, and is refused where not.
"""

import contextlib
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from envelope.multipart import Part
from proxy import refusals
from proxy.asking import Signer
from proxy.messages.message import AnswerHead, ByteRange, Fields
from proxy.plans.answer_plan import AnswerPlan, MapBody, Pass
from proxy.plans.conversing import Conversation, Inspected, Reply, StoredKind
from proxy.plans.plan import Answer, Converse, Decision, Forward, Proceed, RequestPlan
from proxy.plans.request import Request
from proxy.profiles.s3 import etags
from proxy.profiles.s3.addressing import Address
from proxy.profiles.s3.call import MAX_DOCUMENT_BYTES, Call, reply_of, reply_with_body
from proxy.profiles.s3.documents import ResultMapper, elements_of, root_of
from proxy.profiles.s3.multipart import check_part_number, completion_document
from proxy.profiles.s3.signing import Resigner
from proxy.profiles.s3.uploading import part_of, tag_of, upload_of
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart

PIECE_BYTES: Final = 512 * 1024 * 1024
"""Of a copy in parts: each is one request, and has to end before connections are given up."""
_MAX_PIECES: Final = 9_000
_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"
_RANGE: Final = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})")
_SOURCE: Final = re.compile(r"/?([^/?]+)/([^?]+)(?:\?versionId=([^&]+))?")
_CONDITIONS: Final = (
    "x-amz-copy-source-if-match",
    "x-amz-copy-source-if-modified-since",
    "x-amz-copy-source-if-none-match",
    "x-amz-copy-source-if-unmodified-since",
)
_METADATA: Final = (
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-type",
    "expires",
)
# Of the new object, whatever becomes of the old one's metadata.
_OF_THE_COPY: Final = re.compile(
    r"x-amz-(?:acl|grant-[a-z-]+|storage-class|website-redirect-location|object-lock-[a-z-]+"
    r"|server-side-encryption(?:-aws-kms-key-id|-context|-bucket-key-enabled)?)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySource:
    """Where a copy comes from: bucket and key as the client has encoded them."""

    bucket: str
    key: str
    version: str | None

    @classmethod
    def of(cls, text: str) -> "CopySource":
        """Of a field `x-amz-copy-source`. RefusedError(COPY_SOURCE) for what names no object."""
        match = _SOURCE.fullmatch(text)
        if match is None or match[1].startswith("arn:") or unquote(match[1]) in {".", ".."}:
            raise RefusedError(refusals.COPY_SOURCE)
        return cls(bucket=match[1], key=match[2], version=match[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ways:
    """How requests of ours reach source and copy, which may lie in two buckets, by one signer."""

    source: str
    copy: str
    """Path alone."""
    sign: Signer | None

    def target(self, **query: str | int) -> str:
        pairs = [
            f"{name}={quote(str(value), safe='-_.~')}" if value != "" else name
            for name, value in query.items()
        ]
        return f"{self.copy}?{'&'.join(pairs)}"


def _ways(call: Call, source: CopySource) -> _Ways:
    query = f"?versionId={source.version}" if source.version is not None else ""
    key = quote(unquote(source.key), safe="/-_.~")
    address, sign = call.address, call.sign
    if not address.virtual_host:
        return _Ways(source=f"/{source.bucket}/{key}{query}", copy=call.path, sign=sign)
    if source.bucket == address.bucket:
        return _Ways(source=f"/{key}{query}", copy=call.path, sign=sign)
    if not isinstance(sign, Resigner):
        raise RefusedError(refusals.CANNOT_SIGN)
    by_path = Address(bucket=address.bucket, key=address.key, virtual_host=False)
    return _Ways(
        source=f"/{source.bucket}/{key}{query}",
        copy=f"/{address.bucket}{call.path}",
        sign=replace(sign, address=by_path),
    )


def _source_of(call: Call) -> CopySource:
    if any(name.startswith("x-amz-copy-source-server-side-encryption") for name in call.fields):
        raise RefusedError(refusals.UNKNOWN_ROUTE)
    text = call.fields.sole("x-amz-copy-source")
    if text is None:
        raise RefusedError(refusals.COPY_SOURCE)
    return CopySource.of(text)


# CopyObject.


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The memo of a copy that the service makes."""


def plan_copy(call: Call) -> RequestPlan:
    """RefusedError(COPY_SOURCE) for a source that is no object."""
    ways = _ways(call, _source_of(call))
    return Converse(
        edits=call.asking_edits(),
        sign=ways.sign,
        handler=lambda talk: _copy(talk, call, ways),
        limit_bytes=MAX_DOCUMENT_BYTES,
    )


async def _copy(talk: Conversation, call: Call, ways: _Ways) -> Decision:
    found = await talk.inspect(ways.source)
    if found is None or found.kind is not StoredKind.COMPOSITE:
        # None: not there, not ours to read, or empty. The service says so itself.
        plan = Forward(edits=call.edits, sign=call.sign, memo=Copied(), body_may_come=True)
        return Proceed(plan=plan)
    return await _copy_in_parts(talk, call, ways, found)


def plan_copied(request: Request, answer: AnswerHead, proposed: AnswerPlan) -> AnswerPlan:
    """The answer to a copy: its result has an ETag, and may be an error though its status is 200."""
    if not isinstance(proposed, Pass) or answer.status != 200:
        return proposed

    async def ended(_root: str) -> None:
        return

    return replace(proposed, body=MapBody(make=lambda _talk: ResultMapper(request, ended)))


async def _copy_in_parts(talk: Conversation, call: Call, ways: _Ways, found: Inspected) -> Decision:
    async with talk.ask("HEAD", ways.source) as head:
        if head.status != 200:
            raise RefusedError(refusals.UPSTREAM_CHANGED)
        its = head.fields
    created = list(_kept(call, its))
    tagging = await _tagging(talk, call, ways)
    if tagging is not None:
        created.append(("x-amz-tagging", tagging))
    async with talk.ask("POST", ways.target(uploads=""), fields=created, body=b"") as answer:
        if answer.status != 200:
            return Answer(reply=await reply_with_body(answer))
        upload_id = _text_of(await answer.read(MAX_DOCUMENT_BYTES), "UploadId")
    reply: Reply | None = None
    try:
        tags = await _copy_pieces(talk, call, ways, found, upload_id)
        if isinstance(tags, Reply):
            return Answer(reply=tags)
        done = await _finish(talk, call, ways.target(uploadId=upload_id), tags)
        if isinstance(done, Reply):
            reply = done
            version = its.sole("x-amz-version-id")
            more = () if version is None else (("x-amz-copy-source-version-id", version),)
            return Answer(reply=replace(reply, fields=(*reply.fields, *more)))
        return done
    finally:
        if reply is None:
            with contextlib.suppress(RefusedError):
                async with talk.ask("DELETE", ways.target(uploadId=upload_id)) as answer:
                    await answer.read(MAX_DOCUMENT_BYTES)


async def _copy_pieces(
    talk: Conversation, call: Call, ways: _Ways, found: Inspected, upload_id: str
) -> list[tuple[int, str]] | Reply:
    """Numbers and tags of the copied parts; the service's answer if it has refused one."""
    fields = call.fields
    pins = [(name, etags.to_service(value)) for name in _CONDITIONS for value in fields.all(name)]
    if found.etag is not None and "x-amz-copy-source-if-match" not in fields:
        pins.append(("x-amz-copy-source-if-match", found.etag))
    copied_from = ("x-amz-copy-source", fields.sole("x-amz-copy-source") or "")
    tags: list[tuple[int, str]] = []
    for number, (begin, end) in enumerate(pieces_of(found.stored_bytes), start=1):
        part = [copied_from, ("x-amz-copy-source-range", f"bytes={begin}-{end - 1}"), *pins]
        target = ways.target(partNumber=number, uploadId=upload_id)
        async with talk.ask("PUT", target, fields=part, body=b"") as answer:
            document = await answer.read(MAX_DOCUMENT_BYTES)
            if answer.status != 200 or root_of(document) == "Error":
                return reply_of(answer, document)
        tags.append((number, _text_of(document, "ETag").strip('"')))
    return tags


async def _finish(
    talk: Conversation, call: Call, target: str, tags: list[tuple[int, str]]
) -> Reply | Decision:
    """The reply to a copy that has been made; a decision if the service has refused it."""
    fields = [
        (name, etags.to_service(value))
        for name in ("if-match", "if-none-match")
        for value in call.fields.all(name)
    ]
    async with talk.ask("POST", target, fields=fields, body=completion_document(tags)) as answer:
        document = await answer.read(MAX_DOCUMENT_BYTES)
        if answer.status != 200 or root_of(document) == "Error":
            return Answer(reply=reply_of(answer, document))
        tag = _text_of(document, "ETag")
        return reply_of(answer, _copy_result("CopyObjectResult", tag, call.request))


def pieces_of(stored_bytes: int) -> list[tuple[int, int]]:
    """[from, to) of each part of a copy: none is smaller than a part may be, unless it is the only one."""
    piece_bytes = max(PIECE_BYTES, -(-stored_bytes // _MAX_PIECES))
    count = max(1, stored_bytes // piece_bytes)
    ends = [piece_bytes * number for number in range(1, count)]
    return list(zip([0, *ends], [*ends, stored_bytes], strict=True))


def _kept(call: Call, its: Fields) -> Iterable[tuple[str, str]]:
    """What the copy is created with: the client's words for it, and the source's where S3 keeps them."""
    asked = call.fields
    described = asked if (asked.sole("x-amz-metadata-directive") or "").upper() == "REPLACE" else its
    for name in described:
        if name in _METADATA or name.startswith("x-amz-meta-"):
            yield from ((name, value) for value in described.all(name))
    for name in asked:
        if _OF_THE_COPY.fullmatch(name):
            yield from ((name, value) for value in asked.all(name))


async def _tagging(talk: Conversation, call: Call, ways: _Ways) -> str | None:
    """The tags of the copy as a field has them."""
    if (call.fields.sole("x-amz-tagging-directive") or "").upper() == "REPLACE":
        return call.fields.sole("x-amz-tagging")
    mark = "&" if "?" in ways.source else "?"
    async with talk.ask("GET", f"{ways.source}{mark}tagging") as answer:
        document = await answer.read(MAX_DOCUMENT_BYTES)
        if answer.status in {404, 501}:
            return None
        if answer.status != 200:
            raise RefusedError(refusals.SERVICE_ANSWER)
    pairs: list[str] = []
    key = ""
    for element in elements_of(document):
        if element.path[1:3] == ("TagSet", "Tag") and element.path[3:] == ("Key",):
            key = element.text or ""
        elif element.path[3:] == ("Value",):
            pairs.append(f"{quote(key, safe='')}={quote(element.text or '', safe='')}")
    return "&".join(pairs) or None


# UploadPartCopy.


def plan_part_copy(call: Call) -> RequestPlan:
    """RefusedError for a source that is no object, or a part number that is not usable."""
    ways = _ways(call, _source_of(call))
    return Converse(
        edits=call.asking_edits(),
        sign=ways.sign,
        handler=lambda talk: _copy_part(talk, call, ways),
        limit_bytes=MAX_DOCUMENT_BYTES,
    )


async def _copy_part(talk: Conversation, call: Call, ways: _Ways) -> Decision:
    async with talk.ask("GET", ways.source, fields=[("range", "bytes=0-0")]) as answer:
        if answer.status not in {200, 206, 416}:
            return Answer(reply=await reply_with_body(answer))
        answer.leave()
        check_conditions(call.fields, answer.fields)
    wanted = copy_range(call.fields.sole("x-amz-copy-source-range"))
    upload = upload_of(call)
    async with talk.opened(ways.source, wanted=wanted) as opened:
        if wanted is not None and (wanted.last or 0) >= opened.object_bytes:
            raise RefusedError(refusals.RANGE_NOT_SATISFIABLE)
        number = check_part_number(call.parameters["partNumber"], opened.plain_bytes, call.rules)
        sealing = await talk.sealing(opened.pieces, opened.plain_bytes, part=part_of(call, number))
        held: bytes | None = None
        body: bytes | AsyncIterator[bytes] = aiter(sealing)
        if call.rules.is_held(opened.plain_bytes):
            body = held = b"".join([piece async for piece in sealing])
        target = ways.target(partNumber=number, uploadId=call.parameters["uploadId"])
        async with talk.ask("PUT", target, body=body, body_bytes=sealing.stored_bytes) as answer:
            if answer.status != 200:
                return Answer(reply=await reply_with_body(answer))
            tag = tag_of(answer)
            part = Part(number, sealing.stored_bytes, sealing.sealed.commitment)
            await talk.uploads.add_part(upload, KeptPart(part=part, tag=tag), held=held)
            reply = reply_of(answer, _copy_result("CopyPartResult", f'"{tag}"', call.request))
    return Answer(reply=replace(reply, fields=(*_without(reply.fields, "etag"), _XML)))


_XML: Final = ("content-type", "application/xml")


def _without(fields: Iterable[tuple[str, str]], *names: str) -> list[tuple[str, str]]:
    return [item for item in fields if item[0] not in (*names, "content-type")]


def copy_range(text: str | None) -> ByteRange | None:
    """RefusedError(COPY_SOURCE) for anything but `bytes=first-last`."""
    if text is None:
        return None
    match = _RANGE.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise RefusedError(refusals.COPY_SOURCE)
    return ByteRange(first=int(match[1]), last=int(match[2]))


def check_conditions(asked: Fields, its: Fields) -> None:
    """`x-amz-copy-source-if-*` of the request, judged on the source. RefusedError(PRECONDITION).

    As S3 documents it: a match that holds outweighs a date that does not, a tag that matches fails
    `if-none-match` whatever the date.
    """
    tag = (its.sole("etag") or "").strip('"').lower()
    match, none_match = (asked.sole(f"x-amz-copy-source-if-{name}") for name in ("match", "none-match"))
    changed = _date(its.sole("last-modified"))
    if match is not None and tag not in _tags(match):
        raise RefusedError(refusals.PRECONDITION)
    limit = _date(asked.sole("x-amz-copy-source-if-unmodified-since"))
    if match is None and limit is not None and (changed is None or changed > limit):
        raise RefusedError(refusals.PRECONDITION)
    if none_match is not None and (tag in _tags(none_match) or none_match.strip() == "*"):
        raise RefusedError(refusals.PRECONDITION)
    since = _date(asked.sole("x-amz-copy-source-if-modified-since"))
    if none_match is None and since is not None and (changed is None or changed <= since):
        raise RefusedError(refusals.PRECONDITION)


def _tags(text: str) -> set[str]:
    return {etags.to_service(tag.strip(' "')).lower() for tag in text.split(",")}


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _copy_result(root: str, etag: str, request: Request) -> bytes:
    now = datetime.fromtimestamp(request.now_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    tag = escape(etags.to_client(etag), {'"': "&quot;"})
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="{_NAMESPACE}">'
        f"<LastModified>{now}</LastModified><ETag>{tag}</ETag></{root}>"
    ).encode()


def _text_of(document: bytes, name: str) -> str:
    """The text of the root's child *name*. RefusedError(SERVICE_ANSWER) without one."""
    for element in elements_of(document):
        if element.path[1:] == (name,) and element.text:
            return element.text.strip()
    raise RefusedError(refusals.SERVICE_ANSWER)
