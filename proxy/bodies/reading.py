"""Reads of stored objects: what to ask the service for, and how to open what comes (docs/profiles.md).

1. What an object is, is told by its first bytes; how long it is, by what has opened of it. Its length at the
   service is a claim.
2. A range is asked for with the version pinned that was looked at, where it has a strong ETag.
3. A composite is read by its manifest: whole, or the records that hold a range, from the prefix of the part
   in which it begins.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from envelope.cobblestone import invalid
from envelope.keys import NetworkService
from envelope.multipart import Ending, Manifest, composite_range
from envelope.objects import MAGIC, PREFIX_SIZE, Bind, Header, has_magic, plain_length, sealed_range
from proxy import refusals
from proxy.bodies.anonymous_objects import AnonymousKeys
from proxy.bodies.opening import CODINGS, FindKey, OpenBody, OpenRangeBody
from proxy.bodies.prefetch import Beginning, Prefetch, PrefetchError, Source
from proxy.gate.permit import CLEAR, Clear
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.messages.message import AnswerHead, ByteRange, Fields, declared_length, strong_etag
from proxy.messages.ranges import AskedRange, RangeRefusal
from proxy.plans.answer_plan import MapSize, OpenWhole
from proxy.plans.conversing import StoredKind
from proxy.plans.plan import Going, LegacyRange, OpenRange
from proxy.plans.profile_options import StoredPolicy
from proxy.plans.request import Edits, Route
from proxy.recording import Trail
from proxy.refusals import RefusedError

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Read:
    """One read on its way: what was asked for in place of the client's range, and what is known by now."""

    route: Route
    trail: Trail
    source: Source
    composites: bool
    """Objects of this profile may be composites."""
    asked: AskedRange | None = None
    prefix: bytes = b""
    key: DataKey | None = None

    @property
    def owner(self) -> NetworkService:
        return self.route.service.owner

    def passes_unsealed(self) -> None:
        """Recorded, unless it is a page of the service's: that is nobody's content."""
        if not self.route.pages:
            self.trail.legacy_passed()


@dataclass(frozen=True, slots=True, kw_only=True)
class RangePlan:
    """How a range is asked for: *plan* goes on with *edits*."""

    plan: Going
    edits: Edits


@dataclass(slots=True)
class Reading:
    """Asks keys and services on behalf of reads."""

    keys: KeyCache
    prefetch: Prefetch

    # ---- keys

    def find_key(self, read: Read, *, size_bytes: int | None, span: tuple[int, int] | None = None) -> FindKey:
        """Finds the keys that objects name, and records their use."""

        def find(header: Header) -> DataKey:
            if header.key_id.is_anonymous:  # a part, or an upload: nothing is tried for those
                raise invalid()
            key = self.keys.opening_key(read.owner, header.key_id)
            read.trail.use("object-open", key, size_bytes=size_bytes, span=span)
            read.key = key
            return key

        return find

    def anonymous(
        self, read: Read, *, size_bytes: int | None, span: tuple[int, int] | None = None
    ) -> AnonymousKeys:
        """Finds the key of an object that names none, and records the search and the use."""

        def use(key: DataKey) -> None:
            read.trail.use("object-open", key, size_bytes=size_bytes, span=span)
            read.key = key

        return AnonymousKeys(self.keys, read.owner, tried=read.trail.tried, use=use)

    def key_of(
        self, read: Read, prefix: bytes, *, size_bytes: int | None, span: tuple[int, int] | None = None
    ) -> DataKey:
        """The key of the object that begins with *prefix*, 88 bytes, whether it names one or not."""
        header = Header.parse(prefix)
        if header.key_id.is_anonymous:
            return self.anonymous(read, size_bytes=size_bytes, span=span).of(prefix)
        return self.find_key(read, size_bytes=size_bytes, span=span)(header)

    # ---- what to ask for

    async def range(self, read: Read, plan: OpenRange, fields: Fields) -> RangePlan:
        """What to send up for a read of one range; `plan.edits` alone reads the whole object."""
        whole = RangePlan(plan=plan, edits=plan.edits)
        try:
            may_be_empty = read.route.policy is StoredPolicy.MIGRATE
            begin = await self.prefetch.beginning(read.source, may_be_empty=may_be_empty)
            if begin is not None and not begin.stored_bytes:
                return _range_of_nothing(plan)
            if begin is None or not _same_version(plan.if_range, begin):
                return whole
            if not has_magic(begin.data):
                return self._legacy_range(read, plan, begin, fields)
            asked = await self.asked(read, plan, begin)
        except PrefetchError as error:
            # The client's own request meets the same trouble and brings the true answer.
            log.info("range not prepared", service=str(read.owner), cause=str(error))
            return whole
        pin, is_ours = _pin(plan.edits, fields, begin.etag)
        read.asked = replace(asked, pinned=is_ours)
        first, last = asked.stored[0], asked.stored[1] - 1
        return RangePlan(plan=plan, edits=plan.edits.also(put=(("range", f"bytes={first}-{last}"), *pin)))

    async def asked(self, read: Read, plan: OpenRange, begin: Beginning) -> AskedRange:
        """The stored range that holds what *plan* wants of the object that begins so; keeps prefix and key.

        RefusedError (RangeRefusal if it lies outside); PrefetchError; what opening raises.
        """
        header = Header.parse(begin.data)
        if header.bind is Bind.PART and read.composites:
            return await self._asked_of_composite(read, plan, begin)
        if header.bind is not Bind.NOTHING:
            raise RefusedError(refusals.OBJECT_INVALID)
        plain_bytes = plain_length(begin.stored_bytes)
        span = plan.wanted.resolve(plain_bytes)
        key = self.key_of(read, begin.data, size_bytes=begin.stored_bytes, span=span)
        if not await self.prefetch.proven_size(read.source, begin, key, plain_bytes):
            raise RefusedError(refusals.UPSTREAM_CHANGED)
        if span is None:
            raise RefusedError(RangeRefusal.of(plain_bytes))
        read.prefix = begin.data
        return AskedRange(
            stored=sealed_range(*span, plain_bytes=plain_bytes),
            stored_bytes=begin.stored_bytes,
            plain=span,
            plain_bytes=plain_bytes,
            pinned=False,
            etag=begin.etag,
        )

    async def _asked_of_composite(self, read: Read, plan: OpenRange, begin: Beginning) -> AskedRange:
        find_key = self.find_key(read, size_bytes=begin.stored_bytes)
        find_key(Header.parse(begin.data))
        manifest = await self.manifest(read, begin)
        span = plan.wanted.resolve(manifest.plain_bytes)
        if span is None:
            raise RefusedError(RangeRefusal.of(manifest.plain_bytes))
        first, *more = intervals = composite_range(manifest, *span)
        read.prefix = b""
        if first[1] - first[0] == PREFIX_SIZE:  # the records lie farther on in the part than its prefix
            part = (
                begin
                if not first[0]
                else await self.prefetch.part_prefix(read.source, first[0], etag=begin.etag)
            )
            if part is None or len(part.data) != PREFIX_SIZE:
                raise RefusedError(refusals.UPSTREAM_CHANGED)
            read.prefix = part.data
            intervals = tuple(more)
        find_key(Header.parse(read.prefix or begin.data))
        return AskedRange(
            stored=(intervals[0][0], intervals[-1][1]),
            stored_bytes=begin.stored_bytes,
            plain=span,
            plain_bytes=manifest.plain_bytes,
            pinned=False,
            etag=begin.etag,
            composite=manifest,
            intervals=intervals,
        )

    async def manifest(self, read: Read, begin: Beginning) -> Manifest:
        """Of the composite that begins so. RefusedError; PrefetchError; what opening raises."""
        if not read.composites:
            raise RefusedError(refusals.OBJECT_INVALID)
        find_key = self.find_key(read, size_bytes=begin.stored_bytes)
        ending = await self._ending(read, find_key, etag=begin.etag, stored_bytes=begin.stored_bytes)
        if ending is None:
            raise RefusedError(refusals.UPSTREAM_CHANGED)
        return ending.manifest

    def _legacy_range(self, read: Read, plan: OpenRange, begin: Beginning, fields: Fields) -> RangePlan:
        """A range of what was there before us. Only where it can be pinned to what was looked at."""
        if read.route.policy is StoredPolicy.STRICT:
            raise RefusedError(refusals.NOT_SEALED if begin.data else refusals.OBJECT_INVALID)
        pin, is_ours = _pin(plan.edits, fields, begin.etag)
        if not pin:
            return RangePlan(plan=plan, edits=plan.edits)
        read.passes_unsealed()
        wanted = _spelt(plan.wanted)
        legacy = LegacyRange(
            edits=plan.edits,
            target=plan.target,
            sign=plan.sign,
            memo=plan.memo,
            etag=pin[0][1],
            pinned=is_ours,
            body_may_come=plan.body_may_come,
        )
        return RangePlan(plan=legacy, edits=plan.edits.also(put=(("range", wanted), *pin)))

    # ---- how to open what comes

    def open_part(self, read: Read) -> OpenRangeBody:
        if read.asked is None or read.key is None:
            raise RefusedError(refusals.INTERNAL)
        find_key = self.find_key(read, size_bytes=read.asked.stored_bytes)
        return OpenRangeBody(
            read.key, read.prefix, read.asked, find_key=find_key, meter=read.trail.meters.opened
        )

    async def open_whole(
        self, read: Read, plan: OpenWhole, answer: AnswerHead, *, on_length: Callable[[int], None]
    ) -> OpenBody:
        """*on_length* is told the length of a composite, once it is known, in place of the declared one."""
        codings = [coding for coding in answer.fields.tokens("content-encoding") if coding != "identity"]
        may_be_simple = plan.stored_bytes is None or plan.plain_bytes is not None
        may_be_sealed, may_be_legacy = may_be_simple or read.composites, False
        # Of a composite the stored length stands in for its own until the manifest is read.
        out_bytes = plan.plain_bytes if plan.plain_bytes is not None else plan.stored_bytes
        is_page = read.route.pages and not read.composites and not plan.must_be_sealed
        if is_page:
            # Not asked for twice: its service may have made it for this request. The first bytes tell.
            may_be_legacy = CODINGS.issuperset(codings) and len(codings) <= 1
            out_bytes = out_bytes if may_be_sealed else plan.stored_bytes
        elif read.route.policy is StoredPolicy.MIGRATE and not plan.must_be_sealed:
            # What it is has to be known before its length is declared; a second look costs a request.
            known = (
                await self._kind(read, strong_etag(answer.fields))
                if may_be_sealed and out_bytes is not None
                else None
            )
            # A coding that cannot be looked through may hide what is sealed.
            is_sealed = known in (StoredKind.SIMPLE, StoredKind.COMPOSITE)
            may_be_legacy = not is_sealed and CODINGS.issuperset(codings) and len(codings) <= 1
            may_be_sealed = may_be_sealed and known is not StoredKind.OTHER
            if may_be_legacy:
                out_bytes = None if may_be_sealed else plan.stored_bytes
        etag = strong_etag(answer.fields)

        async def find_ending(find_key: FindKey) -> Ending | None:
            return await self._ending(read, find_key, etag=etag, stored_bytes=plan.stored_bytes)

        return OpenBody(
            read.owner,
            self.find_key(read, size_bytes=plan.stored_bytes),
            anonymous=self.anonymous(read, size_bytes=plan.stored_bytes),
            out_bytes=out_bytes if may_be_sealed or may_be_legacy else None,
            may_be_simple=may_be_sealed and may_be_simple,
            may_be_legacy=may_be_legacy,
            legacy_bytes=plan.stored_bytes if is_page else None,
            find_ending=find_ending if may_be_sealed and read.composites else None,
            on_length=on_length,
            on_legacy=read.passes_unsealed,
            coding=codings[0] if codings else None,
            meter=read.trail.meters.opened,
        )

    def not_sealed(self, read: Read, answer: AnswerHead) -> Clear | OpenBody:
        """Passes anything but what begins like an object."""
        length = declared_length(answer.fields)
        if answer.status == 204 or (length is not None and length < len(MAGIC)):
            return CLEAR
        return OpenBody(
            read.owner,
            lambda header: self.keys.opening_key(read.owner, header.key_id),
            out_bytes=length,
            may_be_simple=False,
            may_be_legacy=True,
            meter=read.trail.meters.opened,
        )

    async def size(self, read: Read, plan: MapSize, answer: AnswerHead) -> int | None:
        """What to say an object's length is, by a look at it; None: that cannot be told.

        RefusedError where a GET of it would be refused for the same reason.
        """
        etag = strong_etag(answer.fields)
        return await self.size_of(read, etag=etag, stored_bytes=plan.stored_bytes)

    async def size_of(self, read: Read, *, etag: str | None, stored_bytes: int) -> int | None:
        """The same for the object of *read*, as far as is known of it."""
        kind = await self._kind(read, etag)
        if kind is None or (kind is StoredKind.COMPOSITE and not read.composites):
            return None
        if kind is StoredKind.OTHER:
            if read.route.policy is StoredPolicy.STRICT:
                raise RefusedError(refusals.NOT_SEALED)
            return stored_bytes
        if kind is StoredKind.SIMPLE:
            return plain_length(stored_bytes)
        find_key = self.find_key(read, size_bytes=stored_bytes)
        try:
            ending = await self._ending(read, find_key, etag=etag, stored_bytes=stored_bytes)
        except PrefetchError as error:
            log.info("object not probed", service=str(read.owner), cause=str(error))
            return None
        return None if ending is None else ending.manifest.plain_bytes

    async def _kind(self, read: Read, etag: str | None) -> StoredKind | None:
        try:
            return await self.prefetch.kind(read.source, etag)
        except PrefetchError as error:
            log.info("object not probed", service=str(read.owner), cause=str(error))
            return None

    async def _ending(
        self, read: Read, find_key: FindKey, *, etag: str | None, stored_bytes: int | None
    ) -> Ending | None:
        return await self.prefetch.ending(
            read.source,
            lambda header: find_key(header).object_key,
            etag=etag,
            stored_bytes=stored_bytes,
        )


def _range_of_nothing(plan: OpenRange) -> RangePlan:
    """Some services say 416, some 200. Each may judge it itself: what comes can be no bytes, or the whole."""
    put = [("range", _spelt(plan.wanted))]
    if plan.if_range is not None:
        put.append(("if-range", plan.if_range))
    legacy = LegacyRange(
        edits=plan.edits,
        target=plan.target,
        sign=plan.sign,
        memo=plan.memo,
        etag=None,
        pinned=False,
        body_may_come=plan.body_may_come,
    )
    return RangePlan(plan=legacy, edits=plan.edits.also(put=put))


def _spelt(wanted: ByteRange) -> str:
    first = "" if wanted.first is None else wanted.first
    last = "" if wanted.last is None else wanted.last
    return f"bytes={first}-{last}"


def _same_version(if_range: str | None, begin: Beginning) -> bool:
    """Whether the range may be served (RFC 9110 13.1.5): no condition, or exactly this version."""
    if if_range is None:
        return True
    if if_range.startswith(('"', "W/")):
        return begin.etag is not None and if_range == begin.etag
    return begin.last_modified is not None and if_range == begin.last_modified


def _pin(edits: Edits, fields: Fields, etag: str | None) -> tuple[tuple[tuple[str, str], ...], bool]:
    """If-Match for the version that was looked at; nothing where it has no strong ETag. True: it is ours.

    A condition of the client's that does not name this version stays as it is, for the service to judge.
    """
    put = dict(edits.put)
    theirs = put.get("if-match") or (fields.first("if-match") if "if-match" not in edits.drop else None)
    if etag is None:
        return (), False
    if theirs is None and "if-unmodified-since" in fields and "if-unmodified-since" not in edits.drop:
        # The service would not look at it any more (RFC 9110 13.2.2). The answer's ETag is compared anyway.
        return (), False
    if theirs is not None and theirs.strip() != "*" and etag not in theirs:
        return (), False
    return (("if-match", etag),), theirs is None
