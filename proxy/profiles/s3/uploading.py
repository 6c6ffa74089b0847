"""Uploads in parts, carried out: create, upload, list, complete, abort (docs/profiles-s3.md).

1. A part is remembered in the directory's database before its client learns that it is stored (uploads.py).
   Whoever completes the upload, after a restart or through another proxy of the pool, finds it there.
2. The manifest goes up as a part before the upload is completed; what the service is then asked is
   remembered, too. A client that asks again, because it got no answer, makes us ask the same again.
3. The service's answer to a completion decides: a document that is no error ends the upload here. It may
   come late, behind white space, and be an error though its status is 200.
4. A part that only we know of is in no list.
5. What is remembered belongs to an upload of one object. Who names the upload and another object, or whom the
   service refuses, changes nothing of it: it is forgotten when the service says that it is no more.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import unquote

from envelope.multipart import UPLOAD_REF_SIZE, Part, upload_ref
from envelope.objects import Header, sealed_length
from proxy import refusals
from proxy.asking import ServiceAnswer
from proxy.keys.data_key import DataKey
from proxy.messages.message import AnswerHead
from proxy.plans.answer_plan import AnswerPlan, MapBody, MapWhole, Pass
from proxy.plans.conversing import Conversation, PartOf, Reply, Sealed
from proxy.plans.plan import Answer, Converse, Decision, EmptyBody, Forward, Proceed, RequestPlan, Seal
from proxy.plans.request import NO_EDITS, Edits, Request
from proxy.profiles.s3 import etags, part_checksums
from proxy.profiles.s3.call import MAX_DOCUMENT_BYTES, Call, reply_of, reply_with_body
from proxy.profiles.s3.documents import ResultMapper, error_code, map_parts
from proxy.profiles.s3.multipart import (
    MAX_COMPLETION_BYTES,
    ListedPart,
    asked_for,
    check_part_number,
    plan_completion,
    read_completion,
)
from proxy.profiles.s3.part_checksums import Said
from proxy.profiles.s3.signing import Unchanged
from proxy.refusals import RefusedError
from proxy.uploads import Completion, KeptPart, Upload

_CREATE_DROPS: Final = ("x-amz-checksum-algorithm", "x-amz-checksum-type", "x-amz-sdk-checksum-algorithm")
"""The service would want checksums of ciphertext with every part."""
_ERROR: Final = "Error"
_FRAMING_BYTES: Final = 64 * 1024
_MAX_SIZE_DIGITS: Final = 15
# Codes of a service whose answer ends what it was asked: the same would be refused again.
_ENDING: Final = frozenset(
    {"EntityTooSmall", "InvalidPart", "InvalidPartOrder", "InvalidRequest", "MalformedXML", "NoSuchUpload"}
)
_NO_UPLOAD: Final = "NoSuchUpload"


def upload_of(call: Call) -> Upload:
    """The upload that a request names: of this object, and no other that bears the same id."""
    names = (unquote(name, errors="surrogateescape") for name in (call.address.bucket, call.address.key))
    raw = [text.encode("utf-8", "surrogateescape") for text in (*names, call.parameters["uploadId"])]
    marked = b"".join(len(item).to_bytes(4) + item for item in raw)
    return Upload(call.request.service.owner, hashlib.sha256(marked).digest()[:UPLOAD_REF_SIZE])


def part_of(call: Call, number: int) -> PartOf:
    """What the message of a part says of itself (docs/format.md 3.5)."""
    return PartOf(upload_ref=upload_ref(call.parameters["uploadId"]), number=number)


# Create.


def plan_create(call: Call) -> RequestPlan:
    """RefusedError(CANNOT_SIGN) where the upload could not be completed: that takes a request of our own."""
    if isinstance(call.sign, Unchanged) and call.sign.authenticated.signed_headers:
        raise RefusedError(refusals.CANNOT_SIGN)
    return Forward(edits=call.edits.also(drop=_CREATE_DROPS), sign=call.sign, body_may_come=True)


# Upload.


def plan_part(call: Call) -> RequestPlan:
    """RefusedError for a part without a length, or with a number that is not usable."""
    content = call.content
    if content is None or content.plain_bytes is None:
        raise RefusedError(refusals.LENGTH_REQUIRED)
    number = check_part_number(call.parameters["partNumber"], content.plain_bytes, call.rules)
    upload = upload_of(call)

    async def remember(talk: Conversation, answer: AnswerHead, sealed: Sealed) -> Edits:
        part = Part(number, sealed.stored_bytes, sealed.commitment)
        sums = await _sealed_sums(talk, upload, part, content.sums)
        await talk.uploads.add_part(upload, KeptPart(part=part, tag=tag_of(answer), digests=sums))
        return NO_EDITS

    length = str(sealed_length(content.plain_bytes))
    seal = Seal(
        edits=call.edits.also(drop=("transfer-encoding",), put=(("content-length", length),)),
        sign=call.sign,
        plain_bytes=content.plain_bytes,
        empty=EmptyBody.SEAL,
        digests=content.digests,
        decoder=content.decoder,
        part=part_of(call, number),
        after=remember,
    )
    if not call.rules.is_held(content.plain_bytes):
        return seal
    return Converse(
        edits=call.asking_edits(),
        sign=call.sign,
        handler=lambda talk: _upload_held(talk, upload, number, content.sums),
        limit_bytes=content.sent_bytes or 2 * content.plain_bytes + _FRAMING_BYTES,
        spool=seal,
    )


async def _sealed_sums(
    talk: Conversation, upload: Upload, part: Part, sums: Mapping[str, bytes]
) -> bytes | None:
    if not sums:
        return None
    return part_checksums.sealed_sums(sums, await talk.sealing_key(), upload.ref, part)


async def _upload_held(
    talk: Conversation, upload: Upload, number: int, sums: Mapping[str, bytes]
) -> Decision:
    """A part that may be the last one: sealed into the spool, sent from there, and kept for the manifest."""
    held = talk.spooled
    if held is None or held.sealed is None:
        raise RefusedError(refusals.INTERNAL)
    async with talk.ask("PUT", body=held.pieces(), body_bytes=held.stored_bytes) as answer:
        if 300 <= answer.status < 400:  # whoever followed it would send the part as it is, elsewhere
            raise RefusedError(refusals.ANSWER_REFUSED)
        if answer.status != 200:
            return Answer(reply=await reply_with_body(answer))
        part = Part(number, held.stored_bytes, held.sealed.commitment)
        digests = await _sealed_sums(talk, upload, part, sums)
        kept = KeptPart(part=part, tag=tag_of(answer), digests=digests)
        await talk.uploads.add_part(upload, kept, held=held.read(0, held.stored_bytes))
        return Answer(reply=reply_of(answer))


def tag_of(answer: AnswerHead | ServiceAnswer) -> str:
    """The service's name for a part. RefusedError without one: the part could not be completed with."""
    tag = (answer.fields.sole("etag") or "").strip('"')
    if not tag or len(tag) > 255 or '"' in tag:
        raise RefusedError(refusals.SERVICE_ANSWER)
    return tag


# Complete.


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The memo of a completion on its way."""

    upload: Upload
    completion: Completion = field(repr=False)


def plan_complete(call: Call) -> RequestPlan:
    """RefusedError for a checksum of the whole that is none."""
    said = part_checksums.said_of_whole(call.fields)
    return Converse(
        edits=call.asking_edits(),
        sign=call.sign,
        handler=lambda talk: _complete(talk, call, said),
        limit_bytes=MAX_COMPLETION_BYTES,
    )


async def _complete(talk: Conversation, call: Call, said: Sequence[Said]) -> Decision:
    upload = upload_of(call)
    listed = [_at_the_service(entry) for entry in read_completion(call.read(talk.body))]
    asked = asked_for(listed, (item.spelt() for item in said))
    if part_checksums.is_asked(said, listed):
        asked = part_checksums.keyed(asked, await talk.sealing_key(), upload.ref)
    recorded = await talk.uploads.completion(upload)
    if recorded is not None and recorded.asked == asked:
        return _completing(call, upload, recorded)
    kept = await talk.uploads.parts(upload)
    if not kept and (unknown := await _unknown(talk, call)) is not None:
        return Answer(reply=unknown)
    ref = upload_ref(call.parameters["uploadId"])
    plan = plan_completion(listed, kept, call.rules, upload_ref=ref)
    _check_size(call, plan.manifest.plain_bytes)
    if part_checksums.is_asked(said, listed):
        find_key = _each_once(talk.opening_key)
        await part_checksums.compare(said, listed, plan.parts, find_key=find_key, upload_ref=upload.ref)
    ending = await talk.ending(plan.manifest)
    if plan.joined is not None:
        held = await talk.uploads.held(upload, plan.joined)
        if held is None:
            raise RefusedError(refusals.PART_UNKNOWN)
        ending = held + ending
    target = call.target(partNumber=plan.final_number, uploadId=call.parameters["uploadId"])
    async with talk.ask("PUT", target, body=ending) as answer:
        if answer.status != 200:
            return Answer(reply=await reply_with_body(answer))
        request = plan.request(tag_of(answer))
    completion = Completion(
        asked=asked,
        request=request,
        final_number=plan.final_number,
        is_joined=plan.joined is not None,
    )
    await talk.uploads.complete(upload, completion)
    return _completing(call, upload, completion)


def _each_once(opening_key: Callable[[Header], DataKey]) -> Callable[[Header], DataKey]:
    """*opening_key*, asked once for each key: an upload has thousands of parts."""
    keys: dict[bytes, DataKey] = {}

    def find_key(header: Header) -> DataKey:
        if header.key_id.raw not in keys:
            keys[header.key_id.raw] = opening_key(header)
        return keys[header.key_id.raw]

    return find_key


async def _unknown(talk: Conversation, call: Call) -> Reply | None:
    """What the service says of an upload that nothing is remembered of; None: it has it."""
    target = call.target(uploadId=call.parameters["uploadId"])
    async with talk.ask("GET", target) as answer:
        return None if answer.status == 200 else await reply_with_body(answer)


def _at_the_service(entry: ListedPart) -> ListedPart:
    return ListedPart(number=entry.number, tag=etags.to_service(entry.tag), checksums=entry.checksums)


def _check_size(call: Call, plain_bytes: int) -> None:
    declared = call.fields.sole("x-amz-mp-object-size")
    if declared is None:
        return
    if not (declared.isascii() and declared.isdecimal() and len(declared) <= _MAX_SIZE_DIGITS):
        raise RefusedError(refusals.UPLOAD_SIZE)
    if int(declared) != plain_bytes:
        raise RefusedError(refusals.UPLOAD_SIZE)


def _completing(call: Call, upload: Upload, completion: Completion) -> Proceed:
    edits = call.edits.also(
        # What they said of the plaintext has been compared.
        drop=(
            "content-encoding",
            "x-amz-mp-object-size",
            *(name for name in call.fields if name.startswith(part_checksums.PREFIX)),
        ),
    )
    plan = Forward(edits=edits, sign=call.sign, memo=Completed(upload=upload, completion=completion))
    return Proceed(plan=plan, body=completion.request)


def plan_completed(memo: Completed, request: Request, answer: AnswerHead, proposed: AnswerPlan) -> AnswerPlan:
    """The answer to a completion: streamed, and read to its end before the client sees that."""
    if not isinstance(proposed, Pass):
        return proposed

    async def ended(talk: Conversation, root: str) -> None:
        if root != _ERROR:
            await talk.uploads.complete(memo.upload, replace(memo.completion, is_done=True))

    async def refused(talk: Conversation, head: AnswerHead, body: bytes) -> Reply:
        if error_code(body) in _ENDING and not memo.completion.is_done:
            await talk.uploads.forget_completion(memo.upload)
        return Reply(status=head.status, body=body)

    mapping: MapBody | MapWhole
    if answer.status == 200:
        mapping = MapBody(make=lambda talk: ResultMapper(request, lambda root: ended(talk, root)))
    elif 400 <= answer.status < 500:
        mapping = MapWhole(limit_bytes=MAX_DOCUMENT_BYTES, function=refused)
    else:
        return proposed
    return replace(proposed, body=mapping)


# Abort and list.


def plan_abort(call: Call) -> RequestPlan:
    return Converse(
        edits=call.asking_edits(), sign=call.sign, handler=lambda talk: _abort(talk, call), limit_bytes=0
    )


async def _abort(talk: Conversation, call: Call) -> Decision:
    async with talk.ask("DELETE") as answer:
        reply = await reply_with_body(answer)
    if 200 <= reply.status < 300 or (reply.status == 404 and error_code(reply.body) == _NO_UPLOAD):
        await talk.uploads.forget(upload_of(call))
    return Answer(reply=reply)


def plan_list_parts(call: Call) -> RequestPlan:
    return Converse(
        edits=call.asking_edits(), sign=call.sign, handler=lambda talk: _list_parts(talk, call), limit_bytes=0
    )


async def _list_parts(talk: Conversation, call: Call) -> Decision:
    upload = upload_of(call)
    kept = await talk.uploads.parts(upload)
    completion = await talk.uploads.completion(upload)
    async with talk.ask("GET") as answer:
        body = await answer.read(MAX_DOCUMENT_BYTES)
        if answer.status == 200:
            body = map_parts(body, kept, completion)
        return Answer(reply=reply_of(answer, body))
