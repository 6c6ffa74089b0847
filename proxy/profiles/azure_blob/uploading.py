"""Blobs in blocks, carried out: a block, a list of blocks that makes a blob of them, what blocks there are.

1. Each block is one message of a composite (docs/format.md 3.5, version 02), stored under a name of its own
   (block_names.py). It is remembered in the directory's database before its client learns that it is
   stored.
2. The client's list decides which blocks make the blob, and in which order. Of blocks that were sent under
   one name the one counts that was acknowledged last. A committed block is known by the blob's own
   manifest.
3. The manifest goes up as the last block; then the list is committed, with the client's own conditions.
4. A block of which nothing is known cannot be in a manifest: InvalidBlockList, as if the service had not
   had it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Final

from envelope.multipart import LISTED, Manifest, Part, block_number
from envelope.objects import sealed_length
from proxy import refusals
from proxy.asking import ServiceAnswer
from proxy.messages.message import AnswerHead, Fields
from proxy.plans.conversing import Conversation, Inspected, PartOf, Reply, Sealed, StoredKind
from proxy.plans.plan import Answer, Converse, Decision, EmptyBody, Forward, RequestPlan, Seal
from proxy.plans.profile_options import StoredPolicy
from proxy.plans.request import NO_EDITS, Edits
from proxy.profiles.azure_blob.block_lists import (
    MAX_ANSWER_BYTES,
    MAX_LIST_BYTES,
    Listed,
    Shown,
    Source,
    block_list_document,
    read_block_list,
    shown_block_list,
    stored_names,
)
from proxy.profiles.azure_blob.block_names import NONCE_SIZE, BlockName, Stem, manifest_name, size_mark
from proxy.profiles.azure_blob.bodies import Checksums, plain_length_of
from proxy.profiles.azure_blob.call import CONDITIONS, Call
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart, Upload

_EMPTY_NAME_SIZE: Final = 16
"""Of the one block of an empty list: any length would do."""
MAX_REPLY_BYTES: Final = 1024 * 1024
_MD5: Final = "x-ms-blob-content-md5"


def upload_of(call: Call) -> Upload:
    return Upload(call.request.service.owner, call.target.upload_ref)


# A block.


def plan_block(call: Call, checksums: Checksums, memo: object) -> RequestPlan:
    """RefusedError for a block without a length or a usable name."""
    name = BlockName.of(call.target.parameters.get("blockid", ""))
    plain_bytes = plain_length_of(call.request.frame)
    stored_name = name.stored(os.urandom(NONCE_SIZE))
    number = block_number(name.raw)
    upload = upload_of(call)

    async def remember(talk: Conversation, _answer: AnswerHead, sealed: Sealed) -> Edits:
        part = Part(number, sealed.stored_bytes, sealed.commitment)
        await talk.uploads.add_part(upload, KeptPart(part=part, tag=stored_name))
        return NO_EDITS

    return Seal(
        edits=call.edits.also(put=(("content-length", str(sealed_length(plain_bytes))),)),
        target=call.target.asking(("blockid", stored_name)),
        sign=call.sign,
        memo=memo,
        plain_bytes=plain_bytes,
        empty=EmptyBody.SEAL,
        digests=checksums.digests,
        decoder=checksums.decoder,
        part=PartOf(upload_ref=upload.ref, number=number),
        after=remember,
    )


# A list that is committed.


def plan_commit(call: Call, checksums: Checksums) -> RequestPlan:
    return Converse(
        edits=call.asking_edits(),
        sign=call.sign,
        handler=lambda talk: _commit(talk, call, checksums),
        limit_bytes=MAX_LIST_BYTES,
    )


async def _commit(talk: Conversation, call: Call, checksums: Checksums) -> Decision:
    checksums.check(talk.body)
    listed = await asyncio.to_thread(read_block_list, talk.body)
    upload = upload_of(call)
    rows = await talk.uploads.parts(upload)
    blocks = await _resolved(talk, call, listed, rows)
    if blocks:
        ref = _one_ref(blocks)
        manifest = Manifest(ref, tuple(block.part for block in blocks), LISTED)
        ending, plain_bytes = await talk.ending(manifest), manifest.plain_bytes
        last = manifest_name(blocks[0].stored_name, os.urandom(NONCE_SIZE))
    else:
        sealing = await talk.sealing(_nothing(), 0)
        ending, plain_bytes = b"".join([piece async for piece in sealing]), 0
        last = BlockName(os.urandom(_EMPTY_NAME_SIZE)).stored(os.urandom(NONCE_SIZE))
    target = call.target.asking(("comp", "block"), ("blockid", last))
    async with talk.ask("PUT", target, body=ending) as answer:
        if answer.status != 201:
            return Answer(reply=await _relayed(talk, answer))
        answer.leave()
    entries = [*(Listed(block.source, block.stored_name) for block in blocks), Listed(Source.LATEST, last)]
    fields = [(name, value) for name, value in call.its_own_fields() if name != _MD5]
    fields.append((_MD5, size_mark(plain_bytes)))
    body = block_list_document(entries)
    async with talk.ask("PUT", fields=fields, keep=CONDITIONS, body=body) as answer:
        reply = await _relayed(talk, answer, named=checksums.named)
    if 200 <= reply.status < 300:
        await talk.uploads.forget_parts(upload, rows)
    return Answer(reply=reply)


@dataclass(frozen=True, slots=True)
class _Block:
    """A block that was found for an entry of the list. `ref`: the upload reference to which it is bound."""

    source: Source
    stored_name: str
    part: Part
    ref: bytes


async def _resolved(
    talk: Conversation, call: Call, listed: Iterable[Listed], rows: Iterable[KeptPart]
) -> list[_Block]:
    """RefusedError(BLOCK_UNKNOWN) for an entry that names no block that could be in a manifest."""
    waiting = _waiting(rows)
    committed: dict[object, tuple[str, Part, bytes]] | None = None
    found: list[_Block] = []
    for entry in listed:
        name = BlockName.of(entry.name)
        sent = waiting.get(name.stem) if entry.source is not Source.COMMITTED else None
        if sent is not None:
            found.append(_Block(entry.source, sent.tag, sent.part, upload_of(call).ref))
            continue
        if entry.source is Source.UNCOMMITTED:
            raise RefusedError(refusals.BLOCK_UNKNOWN)
        if committed is None:
            committed = await _committed(talk, call)
        its = committed.get(name.stem) or committed.get(entry.name)
        if its is None:
            raise RefusedError(refusals.BLOCK_UNKNOWN)
        found.append(_Block(entry.source, *its))
    return found


def _waiting(rows: Iterable[KeptPart]) -> dict[Stem, KeptPart]:
    """The blocks that are not committed yet: of those with one name the newest."""
    found: dict[Stem, KeptPart] = {}
    for row in rows:  # of one number the newest first, and one name has one number
        if (stem := Stem.of(row.tag)) is not None:
            found.setdefault(stem, row)
    return found


async def _committed(talk: Conversation, call: Call) -> dict[object, tuple[str, Part, bytes]]:
    """The blocks that the blob has now: stored name, part, upload reference; by stem and by stored name."""
    target = call.target.asking(("comp", "blocklist"), ("blocklisttype", "committed"))
    async with talk.ask("GET", target) as answer:
        if answer.status != 200:
            answer.leave()
            return {}
        names = await asyncio.to_thread(stored_names, await answer.read(MAX_ANSWER_BYTES))
        etag = answer.fields.sole("etag")
    if not names:
        return {}
    found = await talk.inspect(call.target.asking(without=("comp",)))
    if found is None or found.manifest is None:
        return {}
    if found.etag != etag or len(names) != len(found.manifest.parts) + 1:
        raise RefusedError(refusals.UPSTREAM_CHANGED)
    ref = found.manifest.upload_ref
    by_name: dict[object, tuple[str, Part, bytes]] = {}
    for stored_name, part in zip(names, found.manifest.parts, strict=False):
        by_name[stored_name] = its = (stored_name, part, ref)
        by_name.setdefault(Stem.of(stored_name), its)
    return by_name


def _one_ref(blocks: Iterable[_Block]) -> bytes:
    """The upload reference to which all are bound. Of a blob that was copied it is its source's."""
    refs = {block.ref for block in blocks}
    if len(refs) > 1:
        raise RefusedError(refusals.BLOCKS_OF_A_COPY)
    return refs.pop()


async def _nothing() -> AsyncIterator[bytes]:
    yield b""


async def _relayed(
    talk: Conversation, answer: ServiceAnswer, *, named: Iterable[tuple[str, str]] = ()
) -> Reply:
    """The service's answer. Its checksums are of what we have sent; those in *named* are the client's."""
    reply = await relayed(talk, answer)
    ours = without_checksums(reply)
    return replace(ours, fields=(*ours.fields, *named)) if 200 <= reply.status < 300 else ours


async def relayed(talk: Conversation, answer: ServiceAnswer, *, limit_bytes: int = MAX_REPLY_BYTES) -> Reply:
    """The service's answer to what was asked in the client's place: a redirect of that is for nobody."""
    if 300 <= answer.status < 400 and answer.status != 304:
        answer.leave()
        raise RefusedError(refusals.ANSWER_REFUSED)
    return await talk.relay(answer, limit_bytes=limit_bytes)


def without_checksums(reply: Reply) -> Reply:
    gone = ("content-md5", "x-ms-content-crc64")
    return replace(reply, fields=tuple(item for item in reply.fields if item[0].lower() not in gone))


# What blocks there are.


def plan_block_list(call: Call) -> RequestPlan:
    if call.request.route.policy is StoredPolicy.PASSTHROUGH:
        return Forward(edits=call.edits, sign=call.sign)
    return Converse(
        edits=call.asking_edits(),
        sign=call.sign,
        handler=lambda talk: _block_list(talk, call),
        limit_bytes=0,
    )


async def _block_list(talk: Conversation, call: Call) -> Decision:
    waiting = _waiting(await talk.uploads.parts(upload_of(call)))
    async with talk.ask("GET", fields=call.its_own_fields(), keep=CONDITIONS) as answer:
        reply = without_checksums(await relayed(talk, answer, limit_bytes=MAX_ANSWER_BYTES))
        its = Fields([(name.encode(), value.encode()) for name, value in reply.fields])
    if reply.status != 200:
        return Answer(reply=reply)
    names = await asyncio.to_thread(stored_names, reply.body)
    found = await talk.inspect(call.target.asking(without=("comp", "blocklisttype"))) if names else None
    fields = [item for item in reply.fields if item[0].lower() != "content-length"]
    if found is not None:
        fields = [item for item in fields if item[0].lower() != "x-ms-blob-content-length"]
        if "x-ms-blob-content-length" in its:
            fields.append(("x-ms-blob-content-length", str(found.plain_bytes)))

    def uncommitted(stored_name: str) -> Shown | None:
        stem = Stem.of(stored_name)
        row = None if stem is None else waiting.get(stem)
        if stem is None or row is None or row.tag != stored_name:
            return None
        return Shown(stem.shown or stored_name, row.part.plain_bytes)

    committed = _committed_of(found, names, its.sole("etag"))
    body = await asyncio.to_thread(
        shown_block_list,
        reply.body,
        committed=None if committed is None else committed.get,
        uncommitted=uncommitted,
    )
    return Answer(reply=replace(reply, fields=tuple(fields), body=body))


def _committed_of(found: Inspected | None, names: list[str], etag: str | None) -> dict[str, Shown] | None:
    """How the committed blocks are shown, by stored name; None: as they are, for they are none of ours."""
    if found is None or found.kind is StoredKind.OTHER:
        return None
    if found.manifest is None:  # an empty blob, of one block that no client has sent
        return {}
    if found.etag != etag or len(names) != len(found.manifest.parts) + 1:
        raise RefusedError(refusals.UPSTREAM_CHANGED)
    shown = {}
    for stored_name, part in zip(names, found.manifest.parts, strict=False):
        stem = Stem.of(stored_name)
        shown[stored_name] = Shown((stem and stem.shown) or stored_name, part.plain_bytes)
    return shown
