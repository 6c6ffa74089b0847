"""What must be known of an object before a range of it can be asked for: its first bytes and its true size.

1. Asked with the client's own credentials, at the same URL, over TLS verified like any other (interception.py
   rule 5): who may not read the object learns nothing from us either.
2. A size the service states is a claim until the last record has opened. What was proven is remembered for
   the object's strong ETag and first bytes, never for the URL alone; the number remembered is bounded.
3. Nothing here decides anything: an answer that is no 206 tells nothing (None), and the client's own request
   then brings the service's own answer.
4. At most one record is read into memory. Redirects are not followed, cookies not kept.
5. Each network service has connections of its own: one tenant's slow service takes none from another's.
"""

import hashlib
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import hdrs
from cachetools import LRUCache
from multidict import CIMultiDict
from yarl import URL

from envelope.keys import NetworkService
from envelope.objects import PREFIX_SIZE, RECORD_SIZE, RangeOpener, has_magic, sealed_range
from proxy.keys.cache import DataKey
from proxy.message import Fields, content_range, strong_etag
from proxy.tenants.model import ServiceEntry

MAX_PROVEN: Final = 4096
_MAX_CONNECTIONS: Final = 32
"""Of one network service; further ranged reads wait for one to be free."""
_TIMEOUT: Final = aiohttp.ClientTimeout(total=15, sock_connect=5)
# What belongs to the client's request and not to ours: its conditions, its ranges, its body, its connection.
_NOT_OURS: Final = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "expect",
        "host",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "range",
        "te",
        "transfer-encoding",
        "upgrade",
    }
)


class PrefetchError(Exception):
    """The service could not be asked: unreachable, not verified, too slow, or it broke off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """The first bytes of a stored object, how long the service says it is, and its validators."""

    data: bytes
    stored_bytes: int
    etag: str | None
    """A strong one, or None."""
    last_modified: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the object is and as whom to ask: the client's target and header fields."""

    service: ServiceEntry
    target: str
    fields: tuple[tuple[bytes, bytes], ...]


class Prefetch:
    """Asks services for pieces of objects. Use as `async with`."""

    def __init__(self, trust: ssl.SSLContext, *, max_proven: int = MAX_PROVEN) -> None:
        self._trust = trust
        self._proven: LRUCache[bytes, int] = LRUCache(maxsize=max_proven)
        self._sealed: LRUCache[bytes, bool] = LRUCache(maxsize=max_proven)
        self._sessions: dict[NetworkService, aiohttp.ClientSession] | None = None

    async def __aenter__(self) -> Self:
        self._sessions = {}
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sessions, self._sessions = self._sessions or {}, None
        for session in sessions.values():
            await session.close()

    def _session(self, owner: NetworkService) -> aiohttp.ClientSession:
        if self._sessions is None:
            raise PrefetchError("not open")
        session = self._sessions.get(owner)
        if session is None:
            session = self._sessions[owner] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._trust, limit=_MAX_CONNECTIONS),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                timeout=_TIMEOUT,
                skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.CONTENT_TYPE),
            )
        return session

    async def beginning(self, source: Source) -> Beginning | None:
        """The object's first bytes; None if the service does not serve them as a range. PrefetchError."""
        return await self._piece(source, 0, PREFIX_SIZE, etag=None)

    async def is_sealed(self, source: Source, etag: str | None) -> bool | None:
        """Whether the object begins like a sealed one; None if that cannot be told. PrefetchError.

        *etag*: the strong one of the answer this is about; an object that has another by now tells nothing.
        """
        mark = _mark(source, etag, b"")
        if mark is not None and (known := self._sealed.get(mark)) is not None:
            return known
        begin = await self.beginning(source)
        if begin is None or begin.etag != etag:
            return None
        sealed = has_magic(begin.data)
        if mark is not None:
            self._sealed[mark] = sealed
        return sealed

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
        last = await self._piece(source, start, stop, etag=begin.etag)
        if last is None or last.stored_bytes != begin.stored_bytes or len(last.data) != stop - start:
            return False
        opener = RangeOpener(
            key.owner,
            lambda _header: key.object_key,
            begin.data,
            start=plain_bytes,
            stop=plain_bytes,
            plain_bytes=plain_bytes,
        )
        opener.update(last.data)
        opener.finalize()
        if mark is not None:
            self._proven[mark] = plain_bytes
        return True

    async def _piece(self, source: Source, start: int, stop: int, *, etag: str | None) -> Beginning | None:
        session = self._session(source.service.owner)
        wanted = stop - start
        if not 0 < wanted <= max(PREFIX_SIZE, RECORD_SIZE):
            raise PrefetchError(f"{wanted} bytes are not read ahead")
        if not source.target.startswith("/"):
            # It would go on in the authority, and the client's credentials with it to whom it names there.
            raise PrefetchError("the target is no path")
        url = URL(f"{source.service.upstream}{source.target}", encoded=True)
        headers = _own_fields(source.fields)
        headers[hdrs.HOST] = _host_field(source.service)
        headers[hdrs.ACCEPT_ENCODING] = "identity"
        headers[hdrs.RANGE] = f"bytes={start}-{stop - 1}"
        if etag is not None:
            headers[hdrs.IF_MATCH] = etag
        try:
            async with session.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status != 206:
                    answer.close()  # not to read what may be the whole object
                    return None
                fields = Fields(answer.raw_headers)
                got = content_range(fields)
                if got is None or got[0] != start or got[1] > stop or "content-encoding" in fields:
                    answer.close()
                    return None
                data = await answer.content.readexactly(got[1] - got[0])
        except (aiohttp.ClientError, TimeoutError, EOFError, OSError, ValueError) as error:
            raise PrefetchError(f"{source.service.upstream}: {type(error).__name__}") from error
        return Beginning(
            data=data,
            stored_bytes=got[2],
            etag=strong_etag(fields),
            last_modified=fields.sole("last-modified"),
        )


def _own_fields(fields: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in fields:
        text = name.decode("latin-1")
        if text.lower() not in _NOT_OURS and not text.startswith(":"):
            kept.add(text, value.decode("utf-8", "surrogateescape"))
    return kept


def _host_field(service: ServiceEntry) -> str:
    upstream = service.upstream
    default = {"http": 80, "https": 443}.get(upstream.scheme)
    return upstream.authority.rpartition(":")[0] if upstream.port == default else upstream.authority


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
