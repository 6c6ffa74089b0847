"""Speed: what mitmproxy 12.2.3 does more often than it must, done less often. Each lever can be left out.

1. A lever changes when and how bytes are copied, never which bytes, which events or which hooks there are.
   The gate stands above all of them and is not told which are pulled.
2. A lever is here because `bench/` shows it (`make bench ONLY=lever`) and goes when it no longer does. The
   gain in its comment is its own share of CPU, everything else pulled. Tried and dropped: telling the
   layers of a hook's end within the event that asked (no gain; `stream` does without telling them), skipping
   hooks without listeners (< 1 %).
3. What is replaced is named in PINNED, so that another mitmproxy is noticed at start and not in production.
"""

import asyncio
import collections
import contextlib
import gc
import ssl
import types
from collections.abc import Awaitable, Callable, Generator
from enum import StrEnum
from typing import Any, Final, Never, cast, override

from h11._readers import ContentLengthReader
from mitmproxy import connection, http, optmanager
from mitmproxy.coretypes import multidict
from mitmproxy.proxy import commands, context, events, mode_servers, server
from mitmproxy.proxy.layers import tls
from mitmproxy.proxy.layers.http import _base, _http1
from OpenSSL import SSL

READ_BYTES: Final = 256 * 1024
READER_LIMIT_BYTES: Final = 2 * READ_BYTES
MAX_PIECES: Final = 1024
BACKLOG: Final = 1024
CONNECT_TIMEOUT_S: Final = 10.0
"""Name resolution included. The kernel alone would wait two minutes for a service that does not answer."""
_SCRATCH_BYTES: Final = 1 << 20
_MAX_RECORD_BYTES: Final = 16 * 1024 + 256

Commands = Generator[commands.Command, Any, None]


class Lever(StrEnum):
    """What can be switched, one by one; the reasons and gains stand with the code of each."""

    BIG_READS = "big-reads"
    DIRECT_TLS = "direct-tls"
    HTTP1_BODY = "http1-body"
    TRUSTED_MESSAGES = "trusted-messages"
    DIRECT_HEADERS = "direct-headers"
    LEAN_CONTEXTS = "lean-contexts"
    FROZEN_HEAP = "frozen-heap"


ALL: Final[frozenset[Lever]] = frozenset(Lever)

PINNED: Final[tuple[object, ...]] = (
    server.ConnectionHandler.handle_connection,
    server.ConnectionHandler.open_connection,
    server.ConnectionHandler.drain_writers,
    mode_servers.AsyncioServerInstance.listen,
    tls.TLSLayer.receive_data,
    tls.TLSLayer.tls_interact,
    tls.TLSLayer.send_data,
    SSL.Connection.recv,
    SSL.Connection.bio_read,
    SSL.Connection.bio_write,
    SSL.Connection._raise_ssl_error,  # noqa: SLF001 - the pin is what makes leaning on it bearable
    _http1.Http1Connection._handle_event,  # noqa: SLF001
    _http1.Http1Connection.read_body,
    ContentLengthReader,
    http.Headers,
    multidict._MultiDict,  # noqa: SLF001
    context.Context.fork,
    optmanager._Option.current,  # noqa: SLF001
    http.MessageData,
    http.RequestData,
    http.ResponseData,
)


def install(
    enabled: frozenset[Lever] = ALL, *, reuse_port: bool = False, backlog: int = BACKLOG
) -> contextlib.ExitStack:
    """Pull the *enabled* levers, and have listeners opened from now on with *reuse_port* and *backlog*.

    Returns what undoes it when closed. Call it before a Master exists, and once.
    """
    undo = contextlib.ExitStack()
    streams = _Streams(
        limit_bytes=READER_LIMIT_BYTES if Lever.BIG_READS in enabled else None,
        reuse_port=reuse_port,
        backlog=backlog,
    )
    _replace(undo, server, "asyncio", streams)
    _replace(undo, mode_servers, "asyncio", streams)
    if Lever.DIRECT_TLS in enabled:
        _replace(undo, tls.TLSLayer, "receive_data", _receive_data)
        _replace(undo, tls.TLSLayer, "tls_interact", _tls_interact)
    if Lever.HTTP1_BODY in enabled:
        _replace(undo, _http1.Http1Connection, "_handle_event", _http1_handle_event)
    if Lever.TRUSTED_MESSAGES in enabled:
        _replace(undo, http.MessageData, "__post_init__", _trust)
    if Lever.DIRECT_HEADERS in enabled:
        _replace(undo, http.Headers, "get_all", _headers_get_all)
        for name, ours in (("__getitem__", _headers_getitem), ("__contains__", _headers_contains)):
            _add(undo, http.Headers, name, ours)
        _add(undo, http.Headers, "get", _headers_get)
    if Lever.LEAN_CONTEXTS in enabled:
        _replace(undo, context.Context, "fork", _fork)
        _replace(undo, optmanager._Option, "current", _current)  # noqa: SLF001
    return undo


def _add(undo: contextlib.ExitStack, owner: type, name: str, ours: object) -> None:
    """Define what *owner* inherits; `_replace` would leave the inherited function in it afterwards."""
    if name in vars(owner):
        raise RuntimeError(f"{owner.__name__}.{name} is there already")
    undo.callback(delattr, owner, name)
    setattr(owner, name, ours)


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, ours: object) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, ours)


# --- FROZEN_HEAP: small requests 2 %, their p99 20 % --------------------------------------------------------


def warmed_up(enabled: frozenset[Lever] = ALL) -> None:
    """Call once everything is imported and has run, before the first listener opens.

    What lives now lives until the end (modules, code, settings: some 300,000 objects); the collector need not
    walk it each time a flow's cycles push it into a full collection. Raising the thresholds instead makes p99
    worse (61 ms): rarer, longer pauses.
    """
    if Lever.FROZEN_HEAP in enabled:
        gc.collect()
        gc.freeze()


# --- BIG_READS: bulk 30 % -----------------------------------------------------------------------------------
#
# mitmproxy reads 65,535 bytes at a time: each costs a walk through eight generators, a lock and a drain.
# asyncio and uvloop fetch 256 KiB from the socket at once anyhow; asyncio's StreamReader then copies them
# into a bytearray and out of it in slices. `PieceReader` hands on the pieces as they came, uncopied.


class PieceReader(asyncio.StreamReader):
    """A stream reader that keeps the transport's pieces apart; `read` returns the next ones uncopied.

    `read` may return more than it was asked for, up to READ_BYTES: its only caller passes on what it gets.
    The transport is paused while more than *limit* bytes, or MAX_PIECES however small, wait here.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit)
        self._pieces: collections.deque[bytes] = collections.deque()
        self._waiting_bytes = 0
        self._limit_bytes = limit
        self._ended = False
        self._failure: Exception | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._held: asyncio.ReadTransport | None = None
        self._is_paused = False

    @override
    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        self._held = cast("asyncio.ReadTransport", transport)  # uvloop's does not inherit from asyncio's.

    @override
    def feed_data(self, data: Any) -> None:
        if not data:
            return
        self._pieces.append(bytes(data))  # No copy: transports deliver bytes.
        self._waiting_bytes += len(data)
        self._wake()
        if (
            (self._waiting_bytes > self._limit_bytes or len(self._pieces) >= MAX_PIECES)
            and not self._is_paused
            and self._held is not None
        ):
            self._held.pause_reading()
            self._is_paused = True

    @override
    def feed_eof(self) -> None:
        self._ended = True
        self._wake()

    @override
    def set_exception(self, exc: Exception) -> None:
        self._failure = exc
        self._wake()

    @override
    def exception(self) -> Exception | None:
        return self._failure

    @override
    def at_eof(self) -> bool:
        return self._ended and not self._pieces

    @override
    async def read(self, n: int = -1) -> bytes:
        if self._failure is not None:
            raise self._failure
        if not self._pieces and not self._ended:
            if self._arrived is not None:
                raise RuntimeError("two tasks read the same connection")
            self._arrived = asyncio.get_running_loop().create_future()
            try:
                await self._arrived
            finally:
                self._arrived = None
            return await self.read(n)
        return self._take()

    def _take(self) -> bytes:
        if not self._pieces:
            return b""
        taken = [self._pieces.popleft()]
        size = len(taken[0])
        while self._pieces and size + len(self._pieces[0]) <= READ_BYTES:
            taken.append(self._pieces.popleft())
            size += len(taken[-1])
        self._waiting_bytes -= size
        if (
            self._is_paused
            and self._held is not None
            and self._waiting_bytes <= self._limit_bytes // 2
            and len(self._pieces) < MAX_PIECES // 2
        ):
            self._is_paused = False
            self._held.resume_reading()
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    @override
    async def readexactly(self, n: int) -> Never:
        raise NotImplementedError("PieceReader knows only read()")

    @override
    async def readuntil(self, separator: Any = b"\n") -> Never:
        raise NotImplementedError("PieceReader knows only read()")


class _Streams(types.ModuleType):
    """Stands for the name `asyncio` in mitmproxy's modules that open sockets; differs in two functions."""

    def __init__(
        self,
        *,
        limit_bytes: int | None,
        reuse_port: bool,
        backlog: int,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        super().__init__("asyncio")
        self._limit_bytes = limit_bytes
        self._reuse_port = reuse_port
        self._backlog = backlog
        self._connect_timeout_s = connect_timeout_s

    @override
    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def _reader(self) -> asyncio.StreamReader:
        return asyncio.StreamReader() if self._limit_bytes is None else PieceReader(self._limit_bytes)

    async def open_connection(
        self, host: str, port: int, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """OSError (TimeoutError is one), which mitmproxy turns into a failed connection."""
        loop = asyncio.get_running_loop()
        reader = self._reader()
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        async with asyncio.timeout(self._connect_timeout_s):
            transport, _ = await loop.create_connection(lambda: protocol, host, port, **options)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def start_server(
        self,
        client_connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
        host: str,
        port: int,
        *,
        ssl: ssl.SSLContext | None = None,
    ) -> asyncio.Server:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(self._reader(), client_connected, loop=loop)

        return await loop.create_server(
            protocol, host, port, backlog=self._backlog, reuse_port=self._reuse_port or None, ssl=ssl
        )


# --- DIRECT_TLS: bulk 17 % ----------------------------------------------------------------------------------
#
# pyOpenSSL allocates a buffer per call, 65,535 bytes for each 16 KiB record, and mitmproxy gathers the
# records in a bytearray that it then copies. Here the records of a flight are decrypted side by side into one
# scratch buffer. All connections share it, so: fill it and copy out of it without a yield in between.

_lib: Final[Any] = SSL._lib  # type: ignore[attr-defined]  # noqa: SLF001 - pinned with pyOpenSSL's version
_ffi: Final[Any] = SSL._ffi  # type: ignore[attr-defined]  # noqa: SLF001
_scratch: Final[Any] = _ffi.new_allocator(should_clear_after_alloc=False)("char[]", _SCRATCH_BYTES)
_scratch_bytes: Final[Any] = _ffi.buffer(_scratch)


def _receive_data(self: tls.TLSLayer, data: bytes) -> Commands:
    if data:
        self.tls.bio_write(data)
    pieces: list[bytes] = []
    filled = 0
    closed = False
    warning: SSL.Error | None = None
    handle = self.tls._ssl  # noqa: SLF001
    while True:
        if _SCRATCH_BYTES - filled < _MAX_RECORD_BYTES:
            pieces.append(_scratch_bytes[:filled])
            filled = 0
        size = _lib.SSL_read(handle, _scratch + filled, _SCRATCH_BYTES - filled)
        if size > 0:
            filled += size
            continue
        try:
            self.tls._raise_ssl_error(handle, size)  # noqa: SLF001
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            closed = True
        except SSL.Error as error:
            warning = error  # Often an alert, which comes after the handshake where the peer mistrusts us.
        break
    pieces.append(_scratch_bytes[:filled])
    plaintext = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if warning is not None:
        yield commands.Log(f"TLS Error: {warning}", 30)

    # After SSL_read, which may have advanced the state machine: key updates are answered here (#7550).
    yield from self.tls_interact()
    if plaintext:
        yield from self.event_to_child(events.DataReceived(self.conn, plaintext))
    if closed:
        self.conn.state &= ~connection.ConnectionState.CAN_READ
        yield from self.event_to_child(events.ConnectionClosed(self.conn))


def _tls_interact(self: tls.TLSLayer) -> Commands:
    outgoing = self.tls._from_ssl  # noqa: SLF001
    while (size := _lib.BIO_read(outgoing, _scratch, _SCRATCH_BYTES)) > 0:
        yield commands.SendData(self.conn, _scratch_bytes[:size])


# --- HTTP1_BODY: bulk 9 % -----------------------------------------------------------------------------------
#
# Inside a body of known length a piece passes as it is, instead of into h11's buffer, out of it, and into
# bytes. The piece that holds the body's end, and whatever comes after it, takes mitmproxy's own way.

_stock_http1_handle_event: Final = _http1.Http1Connection._handle_event  # noqa: SLF001


def _http1_handle_event(self: _http1.Http1Connection, event: events.Event) -> Commands:
    if (
        type(event) is events.DataReceived
        and self.state == self.read_body
        and type(self.body_reader) is ContentLengthReader
        and self.stream_id is not None
        and not self.buf
        and self.body_reader._remaining > len(event.data) > 0  # noqa: SLF001
    ):
        self.body_reader._remaining -= len(event.data)  # noqa: SLF001
        yield _base.ReceiveHttp(self.ReceiveData(self.stream_id, event.data))
    else:
        yield from _stock_http1_handle_event(self, event)


# --- TRUSTED_MESSAGES: small requests 10 % ------------------------------------------------------------------


def _trust(_: http.MessageData) -> None:
    """Replaces a check of each field's type in each message: assertions, which `python -O` drops as well."""


# --- DIRECT_HEADERS: small requests 5 % ---------------------------------------------------------------------
#
# mitmproxy looks a header up by five calls, two of them for every header there is, and by an exception where
# it is missing. Some forty look-ups are made for each request, in three sets of headers that hardly change.

type _Index = dict[bytes, list[bytes]]


def _values(headers: http.Headers, name: str | bytes) -> list[bytes]:
    """The values of *name*, from an index that is good for as long as `fields` is the same tuple."""
    fields = headers.fields
    known: tuple[tuple[tuple[bytes, bytes], ...], _Index] | None = headers.__dict__.get("_sealgate_index")
    if known is not None and known[0] is fields and type(fields) is tuple:
        index = known[1]
    else:
        index = {}
        for field, value in fields:
            index.setdefault(field.lower(), []).append(value)
        headers.__dict__["_sealgate_index"] = (fields, index)
    wanted = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return index.get(wanted.lower(), [])


def _text(values: list[bytes]) -> str:
    return ", ".join([value.decode("utf-8", "surrogateescape") for value in values])


def _headers_get_all(self: http.Headers, name: str | bytes) -> list[str]:
    return [value.decode("utf-8", "surrogateescape") for value in _values(self, name)]


def _headers_getitem(self: http.Headers, name: str | bytes) -> str:
    if values := _values(self, name):
        return _text(values)
    raise KeyError(name)


def _headers_contains(self: http.Headers, name: str | bytes) -> bool:
    return bool(_values(self, name))


def _headers_get(self: http.Headers, name: str | bytes, default: Any = None) -> Any:
    values = _values(self, name)
    return _text(values) if values else default


# --- LEAN_CONTEXTS: its share not measured yet (`make bench ONLY=lever_lean_contexts`) ---------------------
#
# Each flow has a copy of its connection's context, made with a new upstream connection (a UUID, twenty
# attributes) that is thrown away at once; each look at an option makes a deep copy of its value, twice.


def _fork(self: context.Context) -> context.Context:
    copy = context.Context.__new__(context.Context)
    copy.__dict__.update(self.__dict__)
    copy.layers = self.layers.copy()
    return copy


_UNCHANGEABLE: Final = (str, int, bool, type(None))
_stock_current: Final = optmanager._Option.current  # noqa: SLF001


def _current(self: optmanager._Option) -> Any:
    value = self._default if self.value is optmanager.unset else self.value
    return value if type(value) in _UNCHANGEABLE else _stock_current(self)
