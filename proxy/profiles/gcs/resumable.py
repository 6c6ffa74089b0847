"""Resumable uploads, carried out: begun, chunk by chunk, asked about, ended (docs/profiles-gcs.md).

https://cloud.google.com/storage/docs/performing-resumable-uploads

1. A chunk is held here, sealed, until it is whole and was judged. Then its content becomes the next part of
   the upload's composite (sessions.py), and goes up in granules of the service's.
2. What its client is told is stored, is sealed, and with the service or held in the directory's database.
   Bytes that come again are skipped; bytes beyond that place are not taken, and the place is told.
3. Before anything is sent, the service is asked what it has: only what is remembered here, or a piece of the
   very part that is claimed, can be gone on with. A database that has forgotten something loses an upload,
   and never mixes two.
4. Where the state is lost, or other content comes, the upload is over: 410, and its client begins anew.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from envelope.objects import Header, Opener
from proxy import refusals
from proxy.asking import ServiceAnswer
from proxy.keys.data_key import DataKey
from proxy.messages.checksums import Crc32C
from proxy.messages.message import request_digests
from proxy.plans.conversing import Conversation, Reply
from proxy.plans.plan import Answer, Converse, Decision, Refuse, RequestPlan, Reshape
from proxy.plans.request import Request
from proxy.profiles.gcs.chunks import Chunk, SealedChunk
from proxy.profiles.gcs.content_ranges import AskedRange, may_have_body, persisted_bytes
from proxy.profiles.gcs.digests import Digests, Uploaded
from proxy.profiles.gcs.next_parts import Content, NextPart, cut
from proxy.profiles.gcs.resources import (
    HELD_LIMIT_BYTES,
    METADATA_LIMIT_BYTES,
    object_reply,
    stored_size_in,
)
from proxy.profiles.gcs.routes import CONDITIONS, Kind, Operation
from proxy.profiles.gcs.sessions import GRANULE_BYTES, Claim, Known, State, key_header
from proxy.profiles.gcs.starting import GONE, TOTAL, cancel, session_ref, start
from proxy.refusals import RefusedError
from proxy.uploads import Session, Upload

_NO_308: Final = "x-guploader-no-308"
"""`yes`: 308 is to come as a 200 that says so. Go's client wants it; the service is asked for the 308."""
_ATTEMPTS: Final = 3
"""To send what the service has taken a part of only."""


def plan(request: Request, operation: Operation) -> RequestPlan:
    """Of START, SESSION and CANCEL. RefusedError."""
    if operation.kind is Kind.START:
        return Converse(
            edits=request.edits.also(drop=(TOTAL, _NO_308)),
            handler=lambda talk: start(talk, operation),
            limit_bytes=METADATA_LIMIT_BYTES,
        )
    name = operation.parameters.get("upload_id", "")
    if not name:
        return Refuse(refusal=refusals.BAD_MESSAGE)
    edits = request.edits.also(drop=("content-range", _NO_308))
    upload = Upload(request.service.owner, session_ref(operation.bucket, name))
    if operation.kind is Kind.CANCEL:
        return Converse(edits=edits, handler=lambda talk: cancel(talk, upload), limit_bytes=0)
    asked = AskedRange.of(request)
    if asked.is_status or not may_have_body(request):
        if request.frame.is_declared:
            return Refuse(refusal=refusals.BAD_MESSAGE)
        return Converse(
            edits=edits, handler=lambda talk: Uploading(talk, upload).status(asked), limit_bytes=0
        )
    chunk = Chunk(request_digests(request.head.fields))
    return Converse(
        edits=edits,
        handler=lambda talk: Uploading(talk, upload).take(asked, chunk),
        limit_bytes=HELD_LIMIT_BYTES,
        spool=Reshape(edits=edits, make=lambda new_sealer: SealedChunk(chunk, new_sealer())),
    )


class Uploading:
    """One request of an upload that was begun."""

    def __init__(self, talk: Conversation, upload: Upload) -> None:
        self._talk = talk
        self._upload = upload
        self._read = Session(0, b"")

    async def status(self, asked: AskedRange) -> Decision:
        """Where the upload is. Or its end, if all of it is here and only now its length is said."""
        state = await self._state()
        if state is None:
            return await self._unknown()
        total = self._total(state, asked)
        if not state.is_done and asked.total is not None and asked.total == state.plain_bytes:
            return await self._advance(
                state, asked.total, total, is_last=True, chunk=Chunk(()), start=asked.total
            )
        found = await self._ask_status(state)
        if isinstance(found, int):
            return self._incomplete(state.plain_bytes)
        if 200 <= found.status < 300:
            return Answer(reply=await object_reply(self._talk, found, self._uploaded(state)))
        if found.status in GONE:
            await self._talk.uploads.forget_session(self._upload, self._read)
        return Answer(reply=found)

    async def take(self, asked: AskedRange, chunk: Chunk) -> Decision:
        """A chunk of the content, which has come whole."""
        stop = asked.start + chunk.plain_bytes
        if asked.stop not in (None, stop):
            raise RefusedError(refusals.BAD_LENGTH)
        state = await self._state()
        if state is None:
            return await self._unknown()
        if state.is_done:
            return await self.status(AskedRange(is_status=True))
        total = self._total(state, asked)
        if asked.is_rest and total is None:
            total = stop
        is_last = total == stop
        if total is not None and (stop > total or state.plain_bytes > total):
            raise RefusedError(refusals.BAD_MESSAGE)
        if asked.is_rest and not is_last:
            raise RefusedError(refusals.BAD_LENGTH)
        if not is_last:
            stop = stop // GRANULE_BYTES * GRANULE_BYTES  # as the service does: the rest comes again
        if asked.start > state.plain_bytes:
            return Answer(reply=_beyond(asked.start, state.plain_bytes))
        if stop < state.plain_bytes or (stop == state.plain_bytes and not is_last):
            return self._incomplete(state.plain_bytes)
        return await self._advance(state, stop, total, is_last=is_last, chunk=chunk, start=asked.start)

    def _incomplete(self, plain_bytes: int) -> Decision:
        """So much of the content is stored, and its end is not."""
        fields = [("Range", f"bytes=0-{plain_bytes - 1}")] if plain_bytes else []
        if (self._talk.request.head.fields.first(_NO_308) or "").lower() != "yes":
            return Answer(reply=Reply(status=308, fields=tuple(fields)))
        return Answer(reply=Reply(status=200, fields=(*fields, ("X-Http-Status-Code-Override", "308"))))

    # ---- the state

    async def _state(self) -> State | None:
        read = await self._talk.uploads.session(self._upload)
        if read is None:
            return None
        self._read = read
        return State.decode(read.state)

    @staticmethod
    def _total(state: State, asked: AskedRange) -> int | None:
        if state.total_bytes is not None and asked.total not in (None, state.total_bytes):
            raise RefusedError(refusals.BAD_MESSAGE)
        return state.total_bytes if asked.total is None else asked.total

    def _known(self, secrets: bytes, ref: bytes) -> Known:
        return Known.opened(secrets, self._talk.opening_key(key_header(secrets)), ref)

    def _uploaded(self, state: State) -> Uploaded | None:
        """Of an upload of which the service says that it has ended. None: it ended in another way."""
        secrets, plain_bytes, is_over = state.secrets, state.plain_bytes, state.is_done
        if state.claim is not None:
            secrets, plain_bytes, is_over = state.claim.secrets, state.claim.stop, state.claim.is_last
        digests = Digests(crc32c=self._known(secrets, state.ref).crc32c) if is_over else None
        return None if digests is None else Uploaded(plain_bytes=plain_bytes, digests=digests)

    async def _change(self, state: State) -> None:
        """RefusedError(UPLOAD_BUSY) if another request has."""
        changed = await self._talk.uploads.change_session(self._upload, self._read, state.encode())
        if changed is None:
            raise RefusedError(refusals.UPLOAD_BUSY)
        self._read = changed

    async def _lose(self) -> RefusedError:
        """UPLOAD_LOST; or UPLOAD_BUSY if another request has gone on meanwhile: then nothing is lost."""
        is_gone = await self._talk.uploads.forget_session(self._upload, self._read)
        return RefusedError(refusals.UPLOAD_LOST if is_gone else refusals.UPLOAD_BUSY)

    # ---- the content

    async def _advance(
        self, state: State, stop: int, total: int | None, *, is_last: bool, chunk: Chunk, start: int
    ) -> Decision:
        key = await self._talk.sealing_key(size_bytes=stop - state.plain_bytes)
        known = self._known(state.secrets, state.ref)
        computed, content = Crc32C(known.crc32c), self._content(state.plain_bytes - start, stop - start)
        part = await NextPart.of(key, state, content, also=computed, is_last=is_last)
        # An MD5 cannot be gone on with: it is known of what came in one request, or is nothing.
        is_whole = start == 0 and chunk.plain_bytes == stop
        md5 = chunk.md5 if is_whole else None
        uploaded = Uploaded(plain_bytes=stop, digests=Digests(crc32c=computed.digest(), md5=md5))
        if is_last:
            uploaded.digests.check(known.said)
            uploaded.digests.check(Digests.of_fields(self._talk.request.head.fields, body=False))
        sealed_known = msgspec.structs.replace(known, crc32c=computed.digest()).sealed(key, state.ref)
        claim = Claim(commitment=part.part.commitment, stop=stop, is_last=is_last, secrets=sealed_known)
        may_have_left = state.claim is not None
        if not state.allows(claim):
            raise await self._lose()
        state = msgspec.structs.replace(state, claim=claim, total_bytes=total)
        await self._change(state)
        there = await self._ask_status(state)
        if isinstance(there, Reply):
            if 200 <= there.status < 300 and not may_have_left:
                raise await self._lose()  # it ended with something that is not remembered any more
            return await self._finished(state, part, there, uploaded)
        if there != state.sent_bytes and not may_have_left:
            raise await self._lose()  # so did a piece of it
        for _ in range(_ATTEMPTS):
            if there > part.end:
                raise await self._lose()  # more than there can be of this part: of another one
            if there == part.end and not is_last:
                return await self._taken(state, part)
            found = await self._send(part, there)
            if isinstance(found, Reply):
                return await self._finished(state, part, found, uploaded)
            if found <= there < part.end:
                break
            there = found
        raise RefusedError(refusals.UPSTREAM)

    def _content(self, start: int, stop: int) -> Content:
        """Reads plaintext [start, stop) of the chunk that is held; nothing if there is no chunk."""
        spooled = self._talk.spooled
        keys: dict[bytes, DataKey] = {}

        def find_key(header: Header) -> memoryview:
            key = keys.get(header.key_id.raw)
            if key is None:  # its use is recorded once, however often the chunk is read
                key = keys[header.key_id.raw] = self._talk.opening_key(header)
            key.check()
            return memoryview(key.object_key)

        async def read() -> AsyncIterator[bytes]:
            if spooled is None:
                return
            opener = Opener(self._upload.owner, find_key)
            at = 0
            async for piece in spooled.pieces():
                plain = opener.update(piece)
                low, high = max(start - at, 0), min(stop - at, len(plain))
                at += len(plain)
                if low < high:
                    yield bytes(memoryview(plain)[low:high])
                await asyncio.sleep(0)  # other flows have their turn
            end = opener.finalize()
            low, high = max(start - at, 0), min(stop - at, len(end))
            if low < high:
                yield end[low:high]

        return read

    # ---- the service

    async def _send(self, part: NextPart, there: int) -> int | Reply:
        """Where the service is then; or its last word."""
        # Its total is one of stored bytes, known with the last part.
        stored_total = str(part.end) if part.is_last else "*"
        place = f"bytes {there}-{part.end - 1}/{stored_total}" if there < part.end else f"bytes */{part.end}"
        pieces = cut(part.stored(), there - part.begin, part.end - part.begin)
        async with self._talk.ask(
            self._talk.request.head.method,
            fields=[("Content-Range", place)],
            keep=("content-type", *CONDITIONS),
            body=pieces if there < part.end else b"",
            body_bytes=part.end - there,
        ) as answer:
            return await self._judged(answer)

    async def _ask_status(self, state: State) -> int | Reply:
        """How much the service has of what was sent; or its last word. RefusedError(UPLOAD_LOST)."""
        async with self._talk.ask("PUT", fields=[("Content-Range", "bytes */*")], body=b"") as answer:
            found = await self._judged(answer)
        if isinstance(found, int) and (found < state.sent_bytes or state.is_done):
            raise await self._lose()
        return found

    async def _judged(self, answer: ServiceAnswer) -> int | Reply:
        reply = await self._talk.relay(answer, to_upload=True)
        return persisted_bytes(answer.fields) if answer.status == 308 else reply

    async def _taken(self, state: State, part: NextPart) -> Decision:
        """All of a chunk that is not the last is with the service, or carried."""
        carry = await part.carry()
        await self._change(state.advanced(part.part, carry=carry, sent_bytes=part.end))
        return self._incomplete(part.stop)

    async def _finished(self, state: State, part: NextPart, reply: Reply, uploaded: Uploaded) -> Decision:
        """The service's last word: its object, or that it will have none."""
        if not 200 <= reply.status < 300:
            if reply.status in GONE:
                await self._talk.uploads.forget_session(self._upload, self._read)
            return Answer(reply=reply)
        stored = stored_size_in(reply.body)
        if not part.is_last or stored not in (None, part.end):
            raise RefusedError(refusals.SERVICE_ANSWER)
        # The object is there, whoever of several has sent its end; only who asks again profits from this.
        await self._talk.uploads.change_session(self._upload, self._read, state.finished().encode())
        return Answer(reply=await object_reply(self._talk, reply, uploaded))

    async def _unknown(self) -> Decision:
        """Nothing is known of it here: it may have ended long ago, or was begun elsewhere."""
        async with self._talk.ask("PUT", fields=[("Content-Range", "bytes */*")], body=b"") as answer:
            found = await self._judged(answer)
        if isinstance(found, int):
            return Refuse(refusal=refusals.UPLOAD_LOST)
        if 200 <= found.status < 300:
            found = await object_reply(self._talk, found, None)
        return Answer(reply=found)


def _beyond(start: int, plain_bytes: int) -> Reply:
    """In the service's own words: clients ask then where the upload is."""
    text = (
        f"Invalid request.  According to the Content-Range header, the upload offset is {start} byte(s),"
        f" which exceeds already uploaded size of {plain_bytes} byte(s)."
    )
    return Reply(status=503, fields=(("Content-Type", "text/plain; charset=utf-8"),), body=text.encode())
