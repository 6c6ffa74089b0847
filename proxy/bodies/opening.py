"""The bodies that change on their way down: transforms for the gate, over the sealed objects of envelope/.

1. The key is asked at every piece and at the end: a body in flight stops when its key ends.
2. Every failure becomes a refusal of the table; which check of an object failed is told to nobody.
3. An answer's head waits until its object has begun to verify.
4. What passes unopened is looked at first, through a coding too: it must not begin like an object of ours.
5. A composite is opened by its manifest, which is read ahead as soon as the first bytes say that it is one;
   only then is its length known, and declared.
"""

import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, override

from envelope.cobblestone import Stream
from envelope.errors import SealgateError
from envelope.keys import NetworkService
from envelope.multipart import CompositeOpener, CompositeRangeOpener, Ending
from envelope.objects import HEADER_SIZE, MAGIC, Bind, Header, Opener, RangeOpener, has_magic
from proxy import refusals
from proxy.bodies.anonymous_objects import AnonymousKeys, candidate
from proxy.bodies.bodies import Meter, refuse
from proxy.gate.permit import Piece, Transform
from proxy.keys.data_key import DataKey
from proxy.messages.ranges import AskedRange
from proxy.plans.answer_plan import BodyMapper
from proxy.refusals import RefusedError

type FindKey = Callable[[Header], DataKey]
"""The key an object names. KeyUnavailableError; AuditUnavailableError if its use could not be recorded."""
type FindEnding = Callable[[FindKey], Awaitable[Ending | None]]
"""Manifest and trailer of the composite that is being opened; None: it is another object by now."""

CODINGS: Final = frozenset({"gzip", "x-gzip", "deflate"})
"""Content codings that can be looked through."""
_MAX_LOOK_BYTES: Final = 16 * 1024
_BIND_AT: Final = 28


def is_part(begin: bytes | bytearray) -> bool:
    """Whether what begins like one of our objects says that it is the first part of a composite."""
    return len(begin) >= HEADER_SIZE and begin[_BIND_AT] == Bind.PART


class OpenBody(Transform):
    """Opens the object in an answer.

    *out_bytes*: what the head will declare, None where it will not. *may_be_simple*, *may_be_legacy*: what
    the body can be, by its length and the service's policy; the first bytes tell which it is. *legacy_bytes*:
    what the head is to declare if it passes as it is, told to *on_length*; None: the same. *find_ending*:
    it may be a composite too; its length is then told to *on_length*, if one is declared. *on_legacy*:
    called once, before anything comes out, when the body passes as it is; what it raises refuses the body.
    *coding*: one of CODINGS that the answer names; a service may have coded what it stores.
    *anonymous*: finds the key of an object that names none; without it such an object is refused.
    """

    holds_head = True

    def __init__(
        self,
        owner: NetworkService,
        find_key: FindKey,
        *,
        out_bytes: int | None,
        may_be_simple: bool = True,
        may_be_legacy: bool = False,
        legacy_bytes: int | None = None,
        find_ending: FindEnding | None = None,
        on_length: Callable[[int], None] | None = None,
        on_legacy: Callable[[], None] | None = None,
        coding: str | None = None,
        anonymous: AnonymousKeys | None = None,
        meter: Meter,
    ) -> None:
        self._find_key = find_key
        self.key: DataKey | None = None
        self._service = owner
        self._anonymous = anonymous
        candidates = None if anonymous is None else anonymous.candidates
        self._opener: Stream = Opener(owner, self._object_key, candidates=candidates)
        self._may_be_simple = may_be_simple
        self._find_ending = find_ending
        self.may_wait = find_ending is not None
        self._on_length = on_length
        self._may_be_legacy = may_be_legacy
        self._legacy_bytes = legacy_bytes
        self._on_legacy = on_legacy
        self._coding = coding
        self._meter = meter
        self._begin: bytearray | None = bytearray()
        self._is_decided = False
        self._passes = False
        self.expected_out_bytes = out_bytes

    def _object_key(self, header: Header) -> memoryview:
        return self._recorded_key(header).object_key

    def _recorded_key(self, header: Header) -> DataKey:
        if self.key is None or self.key.key_id != header.key_id:
            self.key = self._find_key(header)
        return self.key

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        if self._begin is not None:
            self._begin += piece
            if not self._is_decided:
                self._is_decided = len(self._begin) >= len(MAGIC) and self._decide(more_may_come=True)
            if not self._is_decided or self.pending:
                return []
            piece, self._begin = bytes(self._begin), None
        return self._pass_on(piece)

    @override
    async def settle(self) -> None:
        if self._find_ending is None:
            raise RefusedError(refusals.INTERNAL)
        try:
            ending = await self._find_ending(self._recorded_key)
            if ending is None:
                raise RefusedError(refusals.UPSTREAM_CHANGED)
            self._opener = CompositeOpener(self._service, self._object_key, ending)
        except SealgateError as error:
            refuse(error)
        if self.expected_out_bytes is not None:
            self.expected_out_bytes = ending.manifest.plain_bytes
            if self._on_length is not None:
                self._on_length(self.expected_out_bytes)
        self.pending = False

    @override
    def finish(self) -> list[Piece]:
        rest: list[Piece] = []
        if self._begin is not None:
            if not self._is_decided:
                self._decide(more_may_come=False)
            rest = self._pass_on(bytes(self._begin))
        if self._passes:
            return rest
        try:
            if self.key is not None:
                self.key.check()
            last = self._opener.finalize()
        except SealgateError as error:
            refuse(error)
        self._meter(len(last))
        return [*rest, last]

    def _decide(self, *, more_may_come: bool) -> bool:
        """By the first bytes: an object of ours, or what was there before us. False: too few to tell."""
        begin = self._begin or b""
        if has_magic(begin):
            if self._find_ending is not None:
                if len(begin) < HEADER_SIZE and more_may_come:
                    return False
                if is_part(begin):
                    self.pending = True
                    return True
            if not self._may_be_simple:
                raise RefusedError(refusals.OBJECT_INVALID)
            return True
        if not self._may_be_legacy:
            raise RefusedError(refusals.NOT_SEALED if begin else refusals.OBJECT_INVALID)
        decoded = _decoded(begin, self._coding) if self._coding is not None else None
        if decoded is not None:
            is_short = len(decoded) < len(MAGIC)
            if has_magic(decoded) or (is_short and len(begin) > _MAX_LOOK_BYTES):
                raise RefusedError(refusals.OBJECT_INVALID)
            if is_short and more_may_come:
                return False
        self._passes = True
        if self._legacy_bytes is not None and self.expected_out_bytes != self._legacy_bytes:
            self.expected_out_bytes = self._legacy_bytes
            if self._on_length is not None:
                self._on_length(self._legacy_bytes)
        if self._on_legacy is not None:
            try:
                self._on_legacy()
            except SealgateError as error:
                refuse(error)
        return True

    def _pass_on(self, piece: bytes) -> list[Piece]:
        if self._passes:
            return [piece]
        try:
            if self.key is not None:
                self.key.check()
            opened = self._opener.update(piece)
            if self.key is None and self._anonymous is not None:
                self._name_key(self._anonymous)
        except SealgateError as error:
            refuse(error)
        self._meter(len(opened))
        return [opened]

    def _name_key(self, anonymous: AnonymousKeys) -> None:
        """Which key it was that opened it, if none was named; recorded before what it opened leaves."""
        if isinstance(self._opener, Opener) and self._opener.matched is not None:
            self.key = anonymous.found(self._opener.matched)


def _decoded(begin: bytes | bytearray, coding: str) -> bytes | None:
    """The first bytes that *begin* decodes to, as far as it goes; None if it is not coded so."""
    windows = [zlib.MAX_WBITS | 32, -zlib.MAX_WBITS] if coding == "deflate" else [zlib.MAX_WBITS | 16]
    for window_bits in windows:  # many send deflate without its zlib frame (RFC 9110 8.4.1.2)
        try:
            return zlib.decompressobj(window_bits).decompress(begin, len(MAGIC))
        except zlib.error:
            continue
    return None


class OpenRangeBody(Transform):
    """Opens the stored range *asked* of an object whose first 88 bytes are *prefix*.

    Of a composite: *prefix* is that of the part in which the range begins, and *find_key* is asked for every
    part.
    """

    holds_head = True

    def __init__(
        self, key: DataKey, prefix: bytes, asked: AskedRange, *, find_key: FindKey | None = None, meter: Meter
    ) -> None:
        """RefusedError if the prefix is no object's under *key*."""
        self.key = key
        self._find_key = find_key
        self._meter = meter
        start, stop = asked.plain
        self.expected_out_bytes = stop - start
        self._at = asked.stored[0]
        self._intervals = deque(asked.intervals)
        self._has_gaps = asked.composite is not None
        try:
            if asked.composite is None:
                self._opener: Stream = RangeOpener(
                    key.owner,
                    lambda _header: key.object_key,
                    prefix,
                    start=start,
                    stop=stop,
                    plain_bytes=asked.plain_bytes,
                    candidates=lambda: [candidate(key)],
                )
            else:
                self._opener = CompositeRangeOpener(
                    key.owner, self._object_key, asked.composite, start=start, stop=stop
                )
                self._opener.update(prefix)
        except SealgateError as error:
            refuse(error)

    def _object_key(self, header: Header) -> memoryview:
        if self.key.key_id != header.key_id:
            if self._find_key is None:
                raise RefusedError(refusals.INTERNAL)
            self.key = self._find_key(header)
        return self.key.object_key

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        wanted = self._wanted(memoryview(piece)) if self._has_gaps else [piece]
        made: list[Piece] = []
        try:
            self.key.check()
            for part in wanted:
                made.append(opened := self._opener.update(part))
                self._meter(len(opened))
        except SealgateError as error:
            refuse(error)
        return made

    def _wanted(self, piece: memoryview) -> list[memoryview]:
        """What of *piece* lies in the intervals of a composite."""
        at, self._at = self._at, self._at + len(piece)
        found = []
        while self._intervals and self._intervals[0][0] < self._at:
            begin, end = self._intervals[0]
            if max(begin, at) < min(end, self._at):
                found.append(piece[max(begin, at) - at : min(end, self._at) - at])
            if end > self._at:
                break
            self._intervals.popleft()
        return found

    @override
    def finish(self) -> list[Piece]:
        try:
            self.key.check()
            return [self._opener.finalize()]
        except SealgateError as error:
            refuse(error)


class MapAnswerBody(Transform):
    """An answer's body that a profile's mapper rewrites; of no known length."""

    may_wait = True

    def __init__(self, mapper: BodyMapper) -> None:
        self._mapper = mapper

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        made = self._mapper.feed(piece)
        self.pending = self._mapper.pending
        return [made]

    @override
    async def settle(self) -> None:
        await self._mapper.settle()
        self.pending = self._mapper.pending

    @override
    def finish(self) -> list[Piece]:
        return [self._mapper.finish()]
