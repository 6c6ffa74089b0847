"""Nextcloud's uploads in chunks, carried out: begin, upload, join, abort (docs/profiles-webdav.md).

1. Each chunk is one message of a composite (docs/format.md 3.5); it is remembered in the directory's database
   before its client learns that it is stored (uploads.py).
2. The chunks are never joined without the manifest: it goes up first, and what then lies at the destination
   is looked at before the client is told that its file is there.
3. What is in an upload is in it for this alone: it cannot be read, copied, or taken out.
"""

import hashlib
import hmac
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

from envelope.multipart import Part
from proxy import refusals
from proxy.messages.message import AnswerHead, ExpectedDigest
from proxy.plans.conversing import Conversation, PartOf, Sealed
from proxy.plans.plan import Answer, Converse, Decision, Handler, Refuse, RequestPlan, Seal
from proxy.plans.request import NO_EDITS, Edits, Request
from proxy.profiles.webdav.addresses import Addresses
from proxy.profiles.webdav.chunk_names import (
    FUTURE_FILE,
    UploadPath,
    in_order,
    manifest_of,
    name_behind,
)
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart, Upload

_TOTAL: Final = "oc-total-length"
_CONDITIONS: Final = ("if", "if-match", "if-none-match", "if-unmodified-since", "overwrite")
_PASSING: Final = frozenset({"OPTIONS", "PROPFIND"})
_MAX_DIGITS: Final = 19


def plan_in_upload(request: Request, path: UploadPath, simple: RequestPlan) -> RequestPlan:
    """*simple*: what the request would be planned as elsewhere. RefusedError."""
    method = request.head.method
    if method in _PASSING or isinstance(simple, Refuse):
        return simple
    if isinstance(simple, Seal):
        return _plan_chunk(request, path, simple)
    if request.frame.is_declared:
        return Refuse(refusal=refusals.UNKNOWN_ROUTE)
    if path.name == "" and method == "MKCOL":
        return _converse(request, partial(_begin, path=path))
    if path.name == "" and method == "DELETE":
        return _converse(request, partial(_abort, path=path))
    if path.name == FUTURE_FILE and method == "MOVE":
        return _converse(request, partial(_join, path=path))
    return Refuse(refusal=refusals.UNKNOWN_ROUTE)


def _converse(request: Request, handler: Handler) -> Converse:
    return Converse(edits=request.edits, handler=handler, limit_bytes=0)


def _upload(request: Request, path: UploadPath) -> Upload:
    return Upload(request.service.owner, path.ref)


def _fields(request: Request) -> list[tuple[str, str]]:
    """Those that an upload streamed to an object store needs on every request, and mapped conditions."""
    addresses = Addresses(request)
    fields = []
    if (destination := addresses.destination()) is not None:
        fields.append(("Destination", destination))
    if (conditions := addresses.conditions()) is not None:
        fields.append(("If", conditions))
    return fields


# Upload.


def _plan_chunk(request: Request, path: UploadPath, simple: Seal) -> RequestPlan:
    number = path.number
    part = PartOf(upload_ref=path.ref, number=number)
    if path.may_be_held(simple.plain_bytes):
        return Converse(
            edits=request.edits,
            handler=lambda talk: _upload_held(talk, path, part, simple.digests),
            limit_bytes=simple.plain_bytes or 0,
        )

    async def remember(talk: Conversation, _answer: AnswerHead, sealed: Sealed) -> Edits:
        kept = KeptPart(part=Part(number, sealed.stored_bytes, sealed.commitment), tag=path.name)
        await talk.uploads.add_part(_upload(request, path), kept)
        return NO_EDITS

    return Seal(
        edits=simple.edits,
        plain_bytes=simple.plain_bytes,
        empty=simple.empty,
        digests=simple.digests,
        part=part,
        after=remember,
    )


async def _upload_held(
    talk: Conversation, path: UploadPath, part: PartOf, digests: tuple[ExpectedDigest, ...]
) -> Decision:
    """A chunk that may be the last one: its sealed bytes are kept, for the manifest to be joined to them."""
    plain, declared = talk.body, talk.request.frame.length_bytes
    if declared is not None and len(plain) != declared:
        raise RefusedError(refusals.BAD_LENGTH)
    for expected in digests:
        digest = hashlib.new(expected.algorithm, plain, usedforsecurity=False).digest()
        if not hmac.compare_digest(digest, expected.value):
            raise RefusedError(refusals.BAD_DIGEST)
    sealing = await talk.sealing(_once(plain), len(plain), part=part)
    stored = b"".join([piece async for piece in sealing])
    fields = _fields(talk.request)
    async with talk.ask("PUT", fields=fields, keep=("content-type", *_CONDITIONS), body=stored) as answer:
        if 300 <= answer.status < 400:  # whoever followed it would send the chunk as it is, elsewhere
            raise RefusedError(refusals.ANSWER_REFUSED)
        reply = await talk.relay(answer)
    if 200 <= reply.status < 300:
        kept = KeptPart(part=Part(part.number, len(stored), sealing.sealed.commitment), tag=path.name)
        await talk.uploads.add_part(_upload(talk.request, path), kept, held=stored)
    return Answer(reply=reply)


async def _once(piece: bytes) -> AsyncIterator[bytes]:
    yield piece


# Begin and abort.


async def _begin(talk: Conversation, path: UploadPath) -> Decision:
    async with talk.ask("MKCOL", fields=_fields(talk.request), keep=_CONDITIONS) as answer:
        reply = await talk.relay(answer)
    if reply.status == 201:  # a new one: what was known of another of this name is of no use
        await talk.uploads.forget(_upload(talk.request, path))
    return Answer(reply=reply)


async def _abort(talk: Conversation, path: UploadPath) -> Decision:
    async with talk.ask("DELETE", fields=_fields(talk.request), keep=_CONDITIONS) as answer:
        reply = await talk.relay(answer)
    if 200 <= reply.status < 300 or reply.status == 404:
        await talk.uploads.forget(_upload(talk.request, path))
    return Answer(reply=reply)


# Join.


async def _join(talk: Conversation, path: UploadPath) -> Decision:
    request, upload = talk.request, _upload(talk.request, path)
    destination = Addresses(request).destination_path()
    if destination is None:
        raise RefusedError(refusals.BAD_MESSAGE)
    ordered = in_order(await talk.uploads.parts(upload))
    manifest = manifest_of(path.ref, ordered)
    _check_total(request, manifest.plain_bytes)
    ending = await talk.ending(manifest)
    last, fields = ordered[-1], _fields(request)
    held = await talk.uploads.held(upload, last) if last.is_held else None
    behind = name_behind(ordered, len(ending)) if held is None else last.tag
    sent = ending if held is None else held + ending
    async with talk.ask("PUT", path.sibling(behind), fields=fields, body=sent) as answer:
        if not 200 <= answer.status < 300:
            return Answer(reply=await talk.relay(answer))
        answer.leave()
    stored_bytes = manifest.parts_bytes + len(ending)
    if _TOTAL in request.head.fields:
        fields.append(("OC-Total-Length", str(stored_bytes)))
    async with talk.ask("MOVE", fields=fields, keep=_CONDITIONS) as answer:
        reply = await talk.relay(answer)
    if 200 <= reply.status < 300:
        await _check_joined(talk, destination, stored_bytes)
        await talk.uploads.forget(upload)
    return Answer(reply=reply)


def _check_total(request: Request, plain_bytes: int) -> None:
    declared = request.head.fields.all(_TOTAL)
    if not declared:
        return
    if (
        len(declared) > 1
        or not (declared[0].isascii() and declared[0].isdecimal())
        or len(declared[0]) > _MAX_DIGITS
    ):
        raise RefusedError(refusals.BAD_MESSAGE)
    if int(declared[0]) != plain_bytes:
        raise RefusedError(refusals.UPLOAD_SIZE)


async def _check_joined(talk: Conversation, destination: str, stored_bytes: int) -> None:
    """What the service has made of the chunks ends as it must. Who may not read there is believed."""
    found = await talk.inspect(destination)
    if found is not None and (found.stored_bytes != stored_bytes or found.manifest is None):
        raise RefusedError(refusals.SERVICE_ANSWER)
