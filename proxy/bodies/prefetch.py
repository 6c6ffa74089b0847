"""What must be known of an object before a range of it can be asked for: its first bytes and its true size.

1. Asked as the client, by asking.py: who may not read the object learns nothing from us either.
2. A size the service states is a claim until the last record has opened; of a composite, until its manifest
   has. What was proven is remembered for the object's strong ETag and first bytes, never for the URL alone;
   what is remembered is bounded.
3. Nothing here decides anything: an answer that is no 206 tells nothing (None), and the client's own request
   then brings the service's own answer.
4. At most one record, or one manifest, is read into memory.
"""

import hashlib
import ssl
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from cachetools import LRUCache

from envelope.multipart import TRAILER_SIZE, Ending, ending_range, open_ending
from envelope.objects import (
    PREFIX_SIZE,
    RECORD_SIZE,
    FindKey,
    RangeOpener,
    has_magic,
    sealed_range,
)
from proxy.asking import Asking, AskingError, ServiceAnswer, Source
from proxy.bodies.anonymous_objects import candidate
from proxy.bodies.opening import is_part
from proxy.keys.data_key import DataKey
from proxy.messages.message import content_range, strong_etag
from proxy.plans.conversing import StoredKind

__all__ = ["Beginning", "Prefetch", "PrefetchError", "Source"]

MAX_PROVEN: Final = 4096
MAX_ENDING_BYTES: Final = 4 * 1024 * 1024
"""A manifest lists at most 65,536 parts in 44 bytes each."""
MAX_LISTED_PARTS: Final = 131_072
"""Of all manifests that are remembered: some 16 MiB."""
_TOTAL_S: Final = 15.0

PrefetchError = AskingError


def kind_of(begin: bytes) -> StoredKind:
    """A guess from what is written there, as long as nothing has been opened."""
    if not has_magic(begin):
        return StoredKind.OTHER
    return StoredKind.COMPOSITE if is_part(begin) else StoredKind.SIMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """The first bytes of a stored object, how long the service says it is, and its validators."""

    data: bytes
    stored_bytes: int
    etag: str | None
    """A strong one, or None."""
    last_modified: str | None


class Prefetch:
    """Asks services for pieces of objects. Use as `async with`."""

    def __init__(self, trust: ssl.SSLContext, *, max_proven: int = MAX_PROVEN) -> None:
        self.asking: Final = Asking(trust)
        self._proven: LRUCache[bytes, int] = LRUCache(maxsize=max_proven)
        self._kinds: LRUCache[bytes, StoredKind] = LRUCache(maxsize=max_proven)
        self._manifests: LRUCache[bytes, Ending] = LRUCache(
            maxsize=MAX_LISTED_PARTS, getsizeof=lambda ending: len(ending.manifest.parts)
        )

    async def __aenter__(self) -> Self:
        await self.asking.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.asking.__aexit__(kind, error, traceback)

    async def beginning(self, source: Source, *, may_be_empty: bool = False) -> Beginning | None:
        """The object's first bytes; None if the service does not serve them as a range. PrefetchError.

        *may_be_empty*: an object of no bytes is a beginning, too, though no service has a range of it.
        """
        return await self._piece(source, (0, PREFIX_SIZE), etag=None, may_be_empty=may_be_empty)

    async def kind(self, source: Source, etag: str | None) -> StoredKind | None:
        """What the object is; None if that cannot be told. PrefetchError.

        *etag*: the strong one of the answer this is about; an object that has another by now tells nothing.
        """
        mark = _mark(source, etag, b"")
        if mark is not None and (known := self._kinds.get(mark)) is not None:
            return known
        begin = await self.beginning(source)
        if begin is None or begin.etag != etag:
            return None
        kind = kind_of(begin.data)
        if mark is not None:
            self._kinds[mark] = kind
        return kind

    async def proven_size(self, source: Source, begin: Beginning, key: DataKey, plain_bytes: int) -> bool:
        """Whether the object is *plain_bytes* long, by opening its last record under *key* if need be.

        False: the service gave something else in the meantime, or does not serve the range. PrefetchError.
        FormatError, IntegrityError, KeyUnavailableError if the record does not open.
        """
        mark = _mark(source, begin.etag, begin.data)
        if mark is not None and self._proven.get(mark) == plain_bytes:
            key.check()
            return True
        start, stop = sealed_range(plain_bytes, plain_bytes, plain_bytes=plain_bytes)
        last = await self._piece(source, (start, stop), etag=begin.etag)
        if last is None or last.stored_bytes != begin.stored_bytes or len(last.data) != stop - start:
            return False
        opener = RangeOpener(
            key.owner,
            lambda _header: key.object_key,
            begin.data,
            start=plain_bytes,
            stop=plain_bytes,
            plain_bytes=plain_bytes,
            candidates=lambda: [candidate(key)],
        )
        opener.update(last.data)
        opener.finalize()
        if mark is not None:
            self._proven[mark] = plain_bytes
        return True

    async def ending(
        self, source: Source, find_key: FindKey, *, etag: str | None, stored_bytes: int | None
    ) -> Ending | None:
        """Manifest of the composite, opened; None: the service gave something else, or serves no ranges.

        *etag*, *stored_bytes*: of the answer this is about, as far as known. PrefetchError; FormatError,
        IntegrityError, KeyUnavailableError if it does not open.
        """
        mark = _mark(source, etag, b"ending")
        if mark is not None and (known := self._manifests.get(mark)) is not None:
            return known
        # Not by a suffix where the length is known: Azure serves none.
        wanted: tuple[int, int] | int = TRAILER_SIZE
        if stored_bytes is not None and stored_bytes >= TRAILER_SIZE:
            wanted = (stored_bytes - TRAILER_SIZE, stored_bytes)
        tail = await self._piece(source, wanted, etag=etag)
        if tail is None or (etag is not None and tail.etag != etag):
            return None
        if stored_bytes is not None and tail.stored_bytes != stored_bytes:
            return None
        begin, end = ending_range(tail.data, stored_bytes=tail.stored_bytes)
        stored = await self._piece(source, (begin, end), etag=etag)
        if stored is None or stored.stored_bytes != tail.stored_bytes or len(stored.data) != end - begin:
            return None
        ending = open_ending(source.service.owner, find_key, stored.data, stored_bytes=tail.stored_bytes)
        if mark is not None and len(ending.manifest.parts) <= MAX_LISTED_PARTS // 8:
            self._manifests[mark] = ending
        return ending

    async def part_prefix(self, source: Source, offset: int, *, etag: str | None) -> Beginning | None:
        """The first bytes of the part message at *offset* of a composite; None as `beginning`."""
        return await self._piece(source, (offset, offset + PREFIX_SIZE), etag=etag)

    async def _piece(
        self,
        source: Source,
        wanted: tuple[int, int] | int,
        *,
        etag: str | None,
        may_be_empty: bool = False,
    ) -> Beginning | None:
        """*wanted*: [from, to), or so many bytes at the end. Fewer come where the object is shorter."""
        size = wanted if isinstance(wanted, int) else wanted[1] - wanted[0]
        if not 0 < size <= max(PREFIX_SIZE, RECORD_SIZE, MAX_ENDING_BYTES):
            raise PrefetchError(f"{size} bytes are not read ahead")
        spelt = f"bytes=-{wanted}" if isinstance(wanted, int) else f"bytes={wanted[0]}-{wanted[1] - 1}"
        fields = [("Range", spelt)]
        if etag is not None:
            fields.append(("If-Match", etag))
        async with self.asking.ask(source, "GET", fields=fields, total_s=_TOTAL_S) as answer:
            if answer.status != 206:
                answer.leave()  # not to read what may be the whole object
                is_empty = answer.status == 416 or (
                    answer.status == 200 and answer.fields.sole("content-length") == "0"
                )
                # What has a first byte has a range from it (RFC 9110 14.1.2).
                return _beginning(answer, b"", 0) if may_be_empty and is_empty else None
            got = content_range(answer.fields)
            if got is None or not _is_asked(got, wanted):
                answer.leave()
                return None
            data = await answer.read(got[1] - got[0])
            if len(data) != got[1] - got[0]:
                raise PrefetchError("fewer bytes than the service said")
            if "content-encoding" in answer.fields and got[0] == 0 and not has_magic(data):
                # Coded on its way, or what was there before us. A label that the object's owner gave it (S3's
                # Content-Encoding) codes nothing: then these are our own bytes, and the rest verifies or not.
                return None
        return _beginning(answer, data, got[2])


def _beginning(answer: ServiceAnswer, data: bytes, stored_bytes: int) -> Beginning:
    return Beginning(
        data=data,
        stored_bytes=stored_bytes,
        etag=strong_etag(answer.fields),
        last_modified=answer.fields.sole("last-modified"),
    )


def _is_asked(got: tuple[int, int, int], wanted: tuple[int, int] | int) -> bool:
    if isinstance(wanted, int):
        return got[1] == got[2] and got[1] - got[0] == min(wanted, got[2])
    return got[0] == wanted[0] and got[1] <= wanted[1]


def _mark(source: Source, etag: str | None, begin: bytes) -> bytes | None:
    """What something known is remembered by: hashed, for targets may hold credentials (presigned URLs)."""
    if etag is None:
        return None
    digest = hashlib.sha256()
    for part in (str(source.service.owner), source.target, etag):
        raw = part.encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8) + raw)
    digest.update(begin)
    return digest.digest()
