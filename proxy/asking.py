"""Requests of our own to a service, for one of a client's: as the client, over connections verified like the
engine's.

1. Asked with the client's own credentials: who may not do it learns nothing from us, and changes nothing. A
   profile's signer signs these like what the engine forwards.
2. TLS is verified by the name of the service's own host (interception.py rule 5). Redirects are not followed,
   cookies not kept, proxies of the environment not used, codings not undone.
3. Each network service has connections of its own: one tenant's slow service takes none from another's.
4. A body that fails on its way up ends without an end: the service sees a request that broke off.
5. Idle time is limited, total time is the caller's affair.
6. A 2xx to a body whose last piece has not gone up yet is no success: the service cannot have it.
7. What may change something is sent once. A kept connection that breaks without an answer leaves open what
   the service has done: sent again, a conditional PUT would be 412 and a DELETE 404 by its own first success.
   The caller hears that it failed, and its client decides, as it would directly. Only reads are asked again.
"""

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from envelope.keys import NetworkService
from proxy.messages.message import Fields
from proxy.tenants.model import ServiceEntry

PIECE_BYTES: Final = 256 * 1024
IDLE_S: Final = 60.0
CONNECT_S: Final = 5.0
_MAX_CONNECTIONS: Final = 32
"""Of one network service; further requests wait for one to be free."""
_KEPT_S: Final = 4.0
"""A connection without a request is closed then: services that close theirs do so after 5 s and more (Apache,
Node), and a request that meets the end of its connection may not be sent again (rule 7)."""
_READ_BUFFER_BYTES: Final = 256 * 1024
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# What belongs to the client's request and not to ours: its conditions, its ranges, its body, its connection,
# and what WebDAV says of one request (RFC 4918 10; WsgiDAV answers no GET with a Depth).
_NOT_OURS: Final = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "depth",
        "destination",
        "expect",
        "host",
        "if",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "keep-alive",
        "lock-token",
        "overwrite",
        "proxy-authorization",
        "proxy-connection",
        "range",
        "te",
        "timeout",
        "transfer-encoding",
        "upgrade",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A request as it is about to leave: `fields` in their order, Host included, names as they came."""

    method: str
    target: str
    fields: tuple[tuple[bytes, bytes], ...]


type Signer = Callable[[Outgoing], Outgoing]
"""Runs last, on every request that leaves for one of the client's: this one, what is read ahead for it, and
what its conversation asks. Pure, and quick: it may set fields and the query. What it raises refuses."""


class AskingError(Exception):
    """The service could not be asked: unreachable, not verified, too slow, or it broke off."""


class AnswerTooLongError(AskingError):
    """The body of an answer is longer than the caller reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where to ask and as whom: the client's target and header fields."""

    service: ServiceEntry
    target: str
    fields: tuple[tuple[bytes, bytes], ...]
    dropped: frozenset[str] = frozenset()
    """Names of fields that do not go along."""
    sign: Signer | None = None


class ServiceAnswer:
    """What the service has answered; its body is read while the question's `async with` lasts."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self.status: Final = answer.status
        self.fields: Final = Fields(answer.raw_headers)

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. AnswerTooLongError beyond the limit; AskingError if it breaks off."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > limit_bytes:
                raise AnswerTooLongError(f"more than {limit_bytes} bytes")
        return bytes(body)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. AskingError if it breaks off."""
        try:
            async for piece in self._answer.content.iter_chunked(PIECE_BYTES):
                yield piece
        except (aiohttp.ClientError, TimeoutError, EOFError, OSError, ValueError) as error:
            raise AskingError(type(error).__name__) from error

    def leave(self) -> None:
        """Do not read the rest: the connection is closed."""
        self._answer.close()


class Asking:
    """Asks services. Use as `async with`."""

    def __init__(self, trust: ssl.SSLContext) -> None:
        self._trust = trust
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

    @contextlib.asynccontextmanager
    async def ask(
        self,
        source: Source,
        method: str,
        *,
        target: str | None = None,
        fields: Iterable[tuple[str, str]] = (),
        keep: Iterable[str] = (),
        body: bytes | AsyncIterator[bytes] | None = None,
        body_bytes: int | None = None,
        total_s: float | None = None,
    ) -> AsyncIterator[ServiceAnswer]:
        """Ask *method* *target* (None: the client's). AskingError, from the answer's reading too.

        The client's fields go with it, but for those of its conditions, range, body and connection; those
        that *keep* names do go, *fields* replace. *body_bytes*: how much an iterator yields; it must.
        """
        outgoing = _outgoing(source, method, target or source.target, fields, frozenset(keep))
        length = len(body) if isinstance(body, bytes) else body_bytes
        if length is not None:
            outgoing = _with(outgoing, "Content-Length", str(length))
        elif body is not None:
            raise AskingError("a body of unknown length is not sent")
        if source.sign is not None:
            outgoing = source.sign(outgoing)
        url = URL(f"{source.service.upstream}{_path(outgoing.target)}", encoded=True)
        headers = CIMultiDict(
            (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
            for name, value in outgoing.fields
        )
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_S, sock_read=IDLE_S)
        if isinstance(body, bytes) and len(body) > PIECE_BYTES:
            body = _cut(body)  # written at once it would hold everybody else up
        content = body if body is None or isinstance(body, bytes) else _Exactly(body, length or 0)
        async with contextlib.AsyncExitStack() as stack:
            try:
                answer = await stack.enter_async_context(
                    self._session(source.service.owner).request(
                        method, url, headers=headers, data=content, allow_redirects=False, timeout=timeout
                    )
                )
            except (aiohttp.ClientError, TimeoutError, EOFError, OSError, ValueError) as error:
                raise AskingError(f"{source.service.upstream}: {type(error).__name__}") from error
            if isinstance(content, _Exactly) and not content.has_left and 200 <= answer.status < 300:
                answer.close()
                raise AskingError(f"{source.service.upstream}: {answer.status} before the body had gone up")
            yield ServiceAnswer(answer)

    def _session(self, owner: NetworkService) -> aiohttp.ClientSession:
        if self._sessions is None:
            raise AskingError("not open")
        session = self._sessions.get(owner)
        if session is None:
            session = self._sessions[owner] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=self._trust, limit=_MAX_CONNECTIONS, keepalive_timeout=_KEPT_S
                ),
                middlewares=(_sent_once,),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=_READ_BUFFER_BYTES,
                skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.CONTENT_TYPE),
            )
        return session


async def _sent_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Rule 7: the library repeats PUT and DELETE (RFC 9110 9.2.2), conditions or not."""
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        if request.method in _READS:
            raise
        raise AskingError(f"{request.url.origin()}: {type(error).__name__}") from error


async def _cut(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), PIECE_BYTES):
        yield body[at : at + PIECE_BYTES]


class _Exactly:
    """*pieces*, if they come to *length_bytes*. The library would leave out what is too much."""

    def __init__(self, pieces: AsyncIterator[bytes], length_bytes: int) -> None:
        self._pieces = pieces
        self._left_bytes = length_bytes

    @property
    def has_left(self) -> bool:
        """Whether the last of it is on its way (rule 6)."""
        return not self._left_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            self._left_bytes -= len(piece)
            if self._left_bytes < 0:
                break
            yield piece
        if self._left_bytes:
            raise AskingError("the body is not as long as was said")


def host_field(service: ServiceEntry) -> str:
    """The service's host as the Host field names it: without the port that its scheme stands for."""
    upstream = service.upstream
    default = {"http": 80, "https": 443}.get(upstream.scheme)
    return upstream.authority.rpartition(":")[0] if upstream.port == default else upstream.authority


def _path(target: str) -> str:
    if not target.startswith("/"):
        # It would go on in the authority, and the client's credentials with it to whom it names there.
        raise AskingError("the target is no path")
    return target


def _outgoing(
    source: Source, method: str, target: str, fields: Iterable[tuple[str, str]], keep: frozenset[str]
) -> Outgoing:
    ours = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in fields]
    ours += [(b"Accept-Encoding", b"identity"), (b"Host", host_field(source.service).encode())]
    dropped = (_NOT_OURS - keep) | source.dropped | {name.decode().lower() for name, _ in ours}
    theirs = [
        (name, value)
        for name, value in source.fields
        if not name.startswith(b":") and name.decode("latin-1").lower() not in dropped
    ]
    return Outgoing(method=method, target=_path(target), fields=(*_one_cookie(theirs), *ours))


def _one_cookie(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """HTTP/2 cuts Cookie into several fields; HTTP/1 knows one (RFC 9113 8.2.3)."""
    kept: list[tuple[bytes, bytes]] = []
    crumbs: list[bytes] = []
    for name, value in fields:
        if name.lower() == b"cookie":
            crumbs.append(value)
        else:
            kept.append((name, value))
    return [*kept, (b"cookie", b"; ".join(crumbs))] if crumbs else kept


def _with(outgoing: Outgoing, name: str, value: str) -> Outgoing:
    kept = [field for field in outgoing.fields if field[0].decode("latin-1").lower() != name.lower()]
    return Outgoing(
        method=outgoing.method,
        target=outgoing.target,
        fields=(*kept, (name.encode(), value.encode())),
    )
