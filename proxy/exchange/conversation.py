"""What a profile's handler may do while its client waits: ask the service as the client, seal, open, record.

1. Every request goes by asking.py: as the client, signed by the plan's signer, to this service alone.
2. Every use of a key is in the audit log before a byte it changes moves on.
3. What it seals and opens, it seals and opens like a stream: pieces, each asked of the key.
4. It lasts as long as its request: a handler that is slow holds its client, and nobody else.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import replace
from typing import Final, override

from envelope.multipart import Manifest, seal_ending
from envelope.objects import Header, has_magic, plain_length, sealed_length
from proxy import refusals
from proxy.asking import AnswerTooLongError, AskingError, ServiceAnswer, Source
from proxy.bodies.bodies import SealBody, sealing_key
from proxy.bodies.opening import OpenBody
from proxy.bodies.prefetch import Beginning, Prefetch, kind_of
from proxy.bodies.reading import Read, Reading
from proxy.gate.permit import Transform
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.messages.message import AnswerHead, ByteRange, content_range
from proxy.plans.answer_plan import Pass
from proxy.plans.conversing import Conversation, Inspected, Opened, PartOf, Reply, Sealed, Spooled, StoredKind
from proxy.plans.plan import EmptyBody, Forward, OpenRange, Refuse, Seal
from proxy.plans.planner import plan_answer
from proxy.plans.profile_options import StoredPolicy
from proxy.plans.request import NO_EDITS, Request
from proxy.recording import Trail
from proxy.refusals import RefusedError
from proxy.uploads import UploadStore

OF_ONE_CONNECTION: Final = frozenset(
    {"connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)
MAX_ANSWER_BYTES: Final = 1024 * 1024
"""What `ServiceAnswer.read` is mostly given: an answer to a command, not a file."""


class SealingBody:
    """Plaintext on its way to become one message: iterate it once, then ask what it became."""

    def __init__(self, body: SealBody, pieces: AsyncIterator[bytes]) -> None:
        self._body = body
        self._pieces = pieces

    @property
    def stored_bytes(self) -> int:
        """Known before, from the plaintext's length."""
        return self._body.expected_out_bytes or 0

    @property
    def sealed(self) -> Sealed:
        """RefusedError(INTERNAL) before the end."""
        return self._body.sealed

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        async for piece in opened_by(self._body, self._pieces):
            yield piece


class ServiceConversation(Conversation):
    """One request's, made by the exchange (exchange/exchange.py)."""

    def __init__(
        self,
        request: Request,
        trail: Trail,
        source: Source,
        *,
        keys: KeyCache,
        prefetch: Prefetch,
        reading: Reading,
        composites: bool,
        wait_s: float,
        uploads: UploadStore | None,
        body: bytes = b"",
        spooled: Spooled | None = None,
    ) -> None:
        self.request = request
        self.body = body
        self.spooled = spooled
        self._trail = trail
        self._source = source
        self._keys = keys
        self._prefetch = prefetch
        self._reading = reading
        self._composites = composites
        self._wait_s = wait_s
        self._uploads = uploads

    @property
    @override
    def uploads(self) -> UploadStore:
        if self._uploads is None:
            raise RefusedError(refusals.UPLOADS_UNAVAILABLE)
        return self._uploads

    # ---- the service

    @override
    @contextlib.asynccontextmanager
    async def ask(
        self,
        method: str,
        target: str | None = None,
        *,
        fields: Iterable[tuple[str, str]] = (),
        keep: Iterable[str] = (),
        body: bytes | AsyncIterator[bytes] | None = None,
        body_bytes: int | None = None,
    ) -> AsyncIterator[ServiceAnswer]:
        try:
            async with self._prefetch.asking.ask(
                self._source,
                method,
                target=target,
                fields=fields,
                keep=keep,
                body=body,
                body_bytes=body_bytes,
            ) as answer:
                yield answer
        except AskingError as error:
            raise RefusedError(refusals.UPSTREAM) from error

    @override
    async def relay(
        self, answer: ServiceAnswer, *, limit_bytes: int = MAX_ANSWER_BYTES, to_upload: bool = False
    ) -> Reply:
        head = AnswerHead(status=answer.status, fields=answer.fields)
        asked = (
            Seal(edits=NO_EDITS, plain_bytes=None, empty=EmptyBody.SEAL)
            if to_upload
            else Forward(edits=NO_EDITS)
        )
        plan = plan_answer(asked, head, self.request.route)
        if not isinstance(plan, Pass):
            raise RefusedError(plan.refusal if isinstance(plan, Refuse) else refusals.INTERNAL)
        try:
            body = await answer.read(limit_bytes)
        except AnswerTooLongError as error:
            raise RefusedError(refusals.SERVICE_ANSWER) from error
        except AskingError as error:
            raise RefusedError(refusals.UPSTREAM) from error
        if has_magic(body):
            raise RefusedError(refusals.OBJECT_INVALID)
        put = [*dict(plan.edits.put).items()]
        put += [(name, value) for name, values in plan.edits.lists for value in values]
        gone = plan.edits.drop | OF_ONE_CONNECTION | dict(put).keys()
        names = [name for name in answer.fields if name not in gone]
        kept = [(name, value) for name in names for value in answer.fields.all(name)]
        return Reply(status=answer.status, fields=(*kept, *put), body=body)

    # ---- sealing

    @override
    async def sealing_key(self, *, size_bytes: int | None = None, target: str | None = None) -> DataKey:
        key = await sealing_key(self._keys, self._trail.owner, wait_s=self._wait_s)
        self._trail.use("object-seal", key, size_bytes=size_bytes, target=target)
        return key

    @override
    async def sealing(
        self,
        pieces: AsyncIterator[bytes],
        plain_bytes: int,
        *,
        part: PartOf | None = None,
        record_digests: tuple[str, ...] = (),
        target: str | None = None,
    ) -> SealingBody:
        key = await self.sealing_key(size_bytes=plain_bytes, target=target)
        body = SealBody(
            key,
            plain_bytes=plain_bytes,
            empty=EmptyBody.SEAL,
            part=part,
            record_digests=record_digests,
            meter=self._trail.meters.sealed,
        )
        return SealingBody(body, pieces)

    @override
    async def ending(self, manifest: Manifest) -> bytes:
        key = await self.sealing_key()
        return seal_ending(key.object_key, key.owner, key.key_id, manifest)

    # ---- opening

    @override
    @contextlib.asynccontextmanager
    async def opened(
        self,
        target: str | None = None,
        *,
        wanted: ByteRange | None = None,
        fields: Iterable[tuple[str, str]] = (),
    ) -> AsyncIterator[Opened]:
        source = self._source if target is None else replace(self._source, target=target)
        try:
            begin = await self._prefetch.beginning(source)
            if begin is None:
                raise RefusedError(refusals.SERVICE_ANSWER)
            stored, object_bytes, body = await self._plan_read(source, begin, wanted)
            pinned = [("Range", f"bytes={stored[0]}-{stored[1] - 1}"), *fields]
            if begin.etag is not None:
                pinned.append(("If-Match", begin.etag))
            async with self._prefetch.asking.ask(source, "GET", fields=pinned) as answer:
                if answer.status != 206 or content_range(answer.fields) != (*stored, begin.stored_bytes):
                    answer.leave()
                    raise RefusedError(refusals.UPSTREAM_CHANGED)
                size = body.expected_out_bytes if body is not None else stored[1] - stored[0]
                pieces = answer.pieces() if body is None else opened_by(body, answer.pieces())
                yield Opened(size or 0, object_bytes, begin.etag, answer.fields, pieces)
        except AskingError as error:
            raise RefusedError(refusals.UPSTREAM) from error

    async def _plan_read(
        self, source: Source, begin: Beginning, wanted: ByteRange | None
    ) -> tuple[tuple[int, int], int, Transform | None]:
        """Stored range to ask for, the whole object's length, and what opens it (None: it is not sealed)."""
        read = self._read(source)
        every = ByteRange(first=0, last=None)
        if not has_magic(begin.data):
            if self.request.route.policy is StoredPolicy.STRICT:
                raise RefusedError(refusals.NOT_SEALED)
            span = (wanted or every).resolve(begin.stored_bytes)
            if span is None:
                raise RefusedError(refusals.RANGE_NOT_SATISFIABLE)
            self._trail.legacy_passed()
            return span, begin.stored_bytes, None
        if wanted is None and begin.stored_bytes == sealed_length(0):
            find_key = self._reading.find_key(read, size_bytes=begin.stored_bytes)
            empty = OpenBody(read.owner, find_key, out_bytes=0, meter=self._trail.meters.opened)
            return (0, begin.stored_bytes), 0, empty
        plan = OpenRange(edits=NO_EDITS, wanted=wanted or every, if_range=None)
        read.asked = asked = await self._reading.asked(read, plan, begin)
        return asked.stored, asked.plain_bytes, self._reading.open_part(read)

    @override
    async def inspect(self, target: str | None = None) -> Inspected | None:
        source = self._source if target is None else replace(self._source, target=target)
        try:
            begin = await self._prefetch.beginning(source)
            return None if begin is None else await self._inspected(source, begin)
        except AskingError as error:
            raise RefusedError(refusals.UPSTREAM) from error

    async def _inspected(self, source: Source, begin: Beginning) -> Inspected:
        read, kind = self._read(source), kind_of(begin.data)
        manifest, plain_bytes = None, begin.stored_bytes
        if kind is StoredKind.OTHER:
            if self.request.route.policy is StoredPolicy.STRICT:
                raise RefusedError(refusals.NOT_SEALED)
        else:
            self._reading.key_of(read, begin.data, size_bytes=begin.stored_bytes)
            if kind is StoredKind.SIMPLE:
                plain_bytes = plain_length(begin.stored_bytes)
            else:
                manifest = await self._reading.manifest(read, begin)
                plain_bytes = manifest.plain_bytes
        return Inspected(
            kind=kind,
            stored_bytes=begin.stored_bytes,
            plain_bytes=plain_bytes,
            etag=begin.etag,
            manifest=manifest,
        )

    def _read(self, source: Source) -> Read:
        return Read(route=self.request.route, trail=self._trail, source=source, composites=self._composites)

    @override
    async def composite_bytes(self, target: str, *, etag: str | None, stored_bytes: int) -> int | None:
        read = self._read(replace(self._source, target=target))
        return await self._reading.size_of(read, etag=etag, stored_bytes=stored_bytes)

    @override
    def opening_key(self, header: Header) -> DataKey:
        key = self._keys.opening_key(self._trail.owner, header.key_id)
        self._trail.use("object-open", key, size_bytes=None)
        return key

    # ---- the log

    @override
    def note(self, action: str, *, target: str | None = None, size_bytes: int | None = None) -> None:
        self._trail.note(action, target=target, size_bytes=size_bytes)


async def opened_by(body: Transform, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """*pieces* through a transform, as the gate would feed it. What it raises ends the stream."""
    async for piece in pieces:
        if piece:
            for made in body(piece):
                yield bytes(made)
            if body.pending:
                await body.settle()
    for made in body(b""):
        yield bytes(made)
