"""One HTTP/1.1 connection of the encryption service: a protocol between `RequestReader` and dialects.

1. One call at a time, in order: what a client pipelines waits in the reader, and reading pauses when that is
   full. A dialect that returns its answer at once costs neither a task nor an await.
2. Whatever goes wrong is said by the dialect whose path it is, and where that is not known by a problem
   document: one line of JSON always. A request that was not understood, not read to its end or came too
   slowly ends the connection, after the answer: what follows on it could be taken for another request.
3. Every wait has an end: for a head, a body (idle, and a slowest rate), the next request, an answer, a client
   that does not read, and for the rest of what was refused. The sweeper of the site looks at them
   (`http_site`).
4. A body (`body_stream`) or an answer that streams stops the other side when it is ahead. A stream that fails
   is cut by a reset: its chunked end is never sent.
5. Who was told that it asks too much (429) has its next request looked at PAUSE_S later: a client that goes
   on at once would cost, refused, nearly what it costs served.
6. Of a body that does not come at once it is asked whose it is before any of it is kept (`kept_bodies`).
7. Stopping: answers under way are sent with `Connection: close`; idle connections are closed.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from http import HTTPStatus
from typing import Final, override

import structlog

from proxy.encryption_service.body_stream import READ_AHEAD_BYTES, BodyCutError, BodyStream
from proxy.encryption_service.call import Answer, Call, Peer, StreamingAnswer
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from proxy.encryption_service.http_messages import Head, MalformedError, RequestReader, answer_head
from proxy.encryption_service.http_site import Site, Waiting, problem_answer
from proxy.encryption_service.kept_bodies import STRANGER

IN_A_ROW: Final = 16
"""Requests of one connection served before the others' turn comes."""
LINGER_BYTES: Final = 1 << 20
PAUSE_S: Final = 0.02
"""Too short to harm other tenants' calls that share the connection: AWS KMS waits 0.25 s."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_log: Final = structlog.get_logger("service.http")


class HttpConnection(asyncio.Protocol):
    """See the module's rules."""

    __slots__ = (
        "_address",
        "_began_s",
        "_body_since_s",
        "_dialect",
        "_dropped",
        "_ending",
        "_head",
        "_holder",
        "_kept",
        "_loop",
        "_pausing",
        "_peer",
        "_reader",
        "_reading",
        "_running",
        "_scheduled",
        "_site",
        "_stream",
        "_transport",
        "_waiting",
        "_writable",
        "closed",
        "deadline_s",
    )

    def __init__(self, site: Site, address: str) -> None:
        self._site = site
        self._address = address
        self._peer = Peer(address=address)
        self._reader = RequestReader()
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._head: Head | None = None
        self._dialect: Dialect | None = None
        self._stream: BodyStream | None = None
        self._running: asyncio.Task[None] | None = None
        self._writable: asyncio.Event | None = None  # while writing is held back
        self._reading = True
        self._pausing = False  # rule 5
        self._scheduled = False  # more requests are here, and others' turn first
        self._ending = False  # nothing more is read as a request
        self._dropped = 0
        self._kept = 0  # bytes of an incomplete body, counted in the site's `kept`
        self._holder: str | None = None  # whose that body is, once it was asked
        self._began_s = 0.0
        self._body_since_s = 0.0
        self._waiting = Waiting.HEAD
        self.deadline_s = site.now_s + site.limits.head_s

    # ---- asyncio's side

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._site.connections.add(self)
        peer = self._site.identify(transport, self._address)
        if peer is None or self._site.stopping:
            self.abort()
        else:
            self._peer = peer

    @override
    def data_received(self, data: bytes) -> None:
        if self._ending:
            self._drop(len(data))
            return
        self._reader.feed(data)
        self._advance()

    @override
    def eof_received(self) -> bool:
        """A client that has said its last request may still get its answer; a cut body gets none."""
        if self._running is not None and not self._reader.in_body and self._site.scheme == "http":
            self._ending = True
            return True
        if self._stream is not None:
            self._stream.fail("the connection ended within the body")
        return False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._site.connections.discard(self)
        self._keep(0)
        if not self.closed.done():
            self.closed.set_result(None)
        self._ending = True
        self._transport = None
        if self._stream is not None:
            self._stream.fail("the client has gone")
        if self._writable is not None:
            self._writable.set()
        if self._running is not None:
            self._running.cancel()

    @override
    def pause_writing(self) -> None:
        self._writable = asyncio.Event()
        self._wait_for(Waiting.WRITE)

    @override
    def resume_writing(self) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None
        if not self._ending:
            self._advance()

    # ---- the site's side

    def is_too_slow(self, now_s: float) -> bool:
        """Whether the body under way comes slower than any honest one (rule 3)."""
        if self._waiting is not Waiting.BODY or self._stream is not None:
            return False  # a stream waits for both sides, and holds one of its tenant's places
        limits = self._site.limits
        late_s = now_s - self._body_since_s - limits.body_idle_s
        return self._reader.body_bytes < late_s * limits.body_bytes_per_s

    def expired(self) -> None:
        """The wait is over."""
        match self._waiting:
            case Waiting.HEAD if self._reader.buffered_bytes:
                self._refuse(
                    Trouble.TIMEOUT, HTTPStatus.REQUEST_TIMEOUT, "the head of the request came too slowly"
                )
            case Waiting.BODY if self._stream is not None:
                self._stream.fail("the body came too slowly", Trouble.TIMEOUT)
                self._wait_for(Waiting.ANSWER)
            case Waiting.BODY:
                self._refuse(Trouble.TIMEOUT, HTTPStatus.REQUEST_TIMEOUT, "the body came too slowly")
            case Waiting.WRITE | Waiting.ANSWER | Waiting.LINGER:
                self.abort()
            case Waiting.HEAD | Waiting.NEXT:
                self._close()

    def stop(self) -> None:
        """Close if nothing is under way; else the answer under way is the last."""
        if (
            self._running is None
            and self._head is None
            and not self._reader.buffered_bytes
            and not self._ending
        ):
            self._close()

    def abort(self) -> None:
        """Cut: what was begun has no proper end."""
        self._ending = True
        if self._transport is not None:
            self._transport.abort()

    # ---- requests

    def _wants_more(self) -> None:
        """The stream has room again."""
        if self._stream is not None and not self._ending:
            self._advance()

    def _advance(self) -> None:
        """Serve what is here; then say what is waited for."""
        served = 0
        self._scheduled = False
        try:
            while self._running is None and self._writable is None and not (self._ending or self._pausing):
                if self._head is None and not self._begin():
                    break
                if self._head is not None and not self._finish(self._head):
                    break
                served += 1
                if served == IN_A_ROW and self._reader.buffered_bytes:
                    self._scheduled = True
                    self._loop.call_soon(self._advance)
                    break
            if self._stream is not None and not self._ending:
                self._pump(self._stream)
        except MalformedError as error:
            if self._stream is not None:
                self._stream.fail(str(error))
            else:
                self._refuse(Trouble.MALFORMED_HTTP, error.status, str(error), path=error.path)
        if not self._ending:
            self._look_at_waiting(served > 0)

    def _look_at_waiting(self, served: bool) -> None:
        reader, waiting = self._reader, self._waiting
        if self._writable is not None:
            if waiting is not Waiting.WRITE:
                self._wait_for(Waiting.WRITE)
        elif self._running is not None:
            wanted = self._of_running()
            if wanted is Waiting.BODY or waiting is not wanted:
                self._wait_for(wanted)
        elif self._head is not None:
            self._wait_for(Waiting.BODY)  # each piece gives it time
        elif reader.buffered_bytes:
            if served or waiting is not Waiting.HEAD:  # no piece gives it more time
                self._wait_for(Waiting.HEAD)
        elif served or waiting not in (Waiting.HEAD, Waiting.NEXT):
            self._wait_for(Waiting.NEXT)
        ahead = self._running is not None or self._writable is not None or self._scheduled or self._pausing
        full = ahead and reader.buffered_bytes >= READ_AHEAD_BYTES
        self._read(not (full or (self._stream is not None and self._stream.is_full)))

    def _of_running(self) -> Waiting:
        """Whom a running call waits for: the client, if its body streams and there is room for it."""
        stream = self._stream
        return Waiting.BODY if stream and self._reader.in_body and not stream.is_full else Waiting.ANSWER

    def _begin(self) -> bool:
        """Read a head and decide by it. False: there is none yet."""
        head = self._reader.read_head()
        if head is None:
            return False
        self._began_s = time.perf_counter()
        dialect = self._site.dialect_of(head.path)
        self._head, self._dialect = head, dialect
        if dialect is None:
            self._refuse(Trouble.NOT_FOUND, HTTPStatus.NOT_FOUND, "there is nothing at this path")
            return True
        streams = dialect.wants_stream(head.method, head.path)
        if not streams and (head.content_length or 0) > dialect.max_body_bytes:
            self._refuse(Trouble.TOO_LARGE, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(dialect))
            return True
        if self._reader.in_body:
            self._body_since_s = self._site.now_s
            if head.expects_continue and not self._reader.buffered_bytes:
                if self._is_strangers(dialect, head):
                    return True
                self._write(_CONTINUE)
        if streams:
            self._stream = BodyStream(self._wants_more)
            self._call(dialect, self._described(head, stream=self._stream))
        return True

    def _finish(self, head: Head) -> bool:
        """Read the body and serve the call. False: some of it is missing."""
        dialect = self._dialect
        if dialect is None or self._stream is not None:
            return False
        body = self._reader.read_body()
        if (self._reader.body_bytes if body is None else len(body)) > dialect.max_body_bytes:
            self._refuse(Trouble.TOO_LARGE, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(dialect))
            return True
        if body is None:
            if self._is_strangers(dialect, head):
                return True
            if not self._keep(self._reader.body_bytes):
                self._refuse(
                    Trouble.OVERLOAD, HTTPStatus.SERVICE_UNAVAILABLE, "too many bodies are on their way"
                )
                return True
            return False
        self._keep(0)
        self._call(dialect, self._described(head, body))
        return True

    def _is_strangers(self, dialect: Dialect, head: Head) -> bool:
        """Whether the body that is awaited is nobody's: then the call is answered, by its head alone."""
        if self._holder is None:
            call = self._described(head)
            tenant = dialect.tenant_of(call)
            if tenant == STRANGER:
                self._call(dialect, call)
                return True
            self._holder = tenant or STRANGER
        return False

    def _keep(self, count: int) -> bool:
        """Account for *count* bytes of the body. False: this is too much."""
        if count == self._kept:
            return True
        more, self._kept = count - self._kept, count
        return self._site.kept.add(self._holder or STRANGER, more)

    def _described(self, head: Head, body: bytes = b"", stream: BodyStream | None = None) -> Call:
        return Call(
            method=head.method,
            path=head.path,
            query=head.query,
            headers=head.headers,
            body=body,
            peer=self._peer,
            scheme=self._site.scheme,
            body_stream=stream,
        )

    def _call(self, dialect: Dialect, call: Call) -> None:
        try:
            answer = dialect.handle(call)
        except Exception:  # noqa: BLE001 - logged there
            answer = self._crashed(dialect, call)
        if isinstance(answer, Answer):
            self._answer(answer)
        else:
            self._running = self._loop.create_task(
                self._awaited(dialect, call, answer), name=f"service:{dialect.name}"
            )

    def _pump(self, stream: BodyStream) -> None:
        pieces = []
        room = not stream.is_full
        while room and (piece := self._reader.read_piece()) is not None:
            pieces.append(piece)
        complete = room and not self._reader.in_body
        if pieces or complete:
            stream.put(pieces, complete=complete)

    async def _awaited(
        self, dialect: Dialect, call: Call, answer: Awaitable[Answer | StreamingAnswer]
    ) -> None:
        """The slow path: an answer to wait for, whole or in pieces."""
        ready: Answer | StreamingAnswer
        try:
            try:
                if call.body_stream is None:
                    async with asyncio.timeout(self._site.limits.answer_s):
                        ready = await answer
                else:  # how long its body may take is watched piece by piece
                    ready = await answer
            except TimeoutError:
                _log.warning("call took too long", dialect=dialect.name)
                ready = dialect.refuse(Trouble.OVERLOAD, call, "it took too long")
            except BodyCutError as error:
                ready = dialect.refuse(error.trouble, call, str(error))
            except Exception:  # noqa: BLE001 - logged there
                ready = self._crashed(dialect, call)
            if isinstance(ready, Answer):
                self._running = None
                self._answer(ready)
            else:
                await self._send_stream(dialect, call, ready)
        except Exception:  # noqa: BLE001 - whatever it was, the stream's end is not sent
            _log.exception("answer was cut", dialect=dialect.name)
            self.abort()
        finally:
            self._running = None
        if not self._ending:
            self._advance()
        elif self._transport is not None and self._waiting is not Waiting.LINGER:
            self._close()

    async def _send_stream(self, dialect: Dialect, call: Call, answer: StreamingAnswer) -> None:
        head = self._head
        async with contextlib.aclosing(_closable(answer.chunks)) as chunks:
            if head is None or head.http_1_0 or head.method == "HEAD":
                self._running = None
                self._answer(
                    dialect.refuse(Trouble.MALFORMED_HTTP, call, "a stream needs HTTP/1.1 and a body")
                )
                return
            close = self._is_last(head)
            self._write(
                answer_head(
                    answer.status,
                    answer.content_type,
                    None,
                    answer.headers,
                    close=close,
                    date=self._site.date,
                )
            )
            async for chunk in chunks:
                if chunk:
                    self._write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                while (writable := self._writable) is not None:
                    await writable.wait()
                    if self._transport is None:
                        return
                self._wait_for(self._of_running())
        close = close or self._reader.in_body
        self._running = None
        self._write(b"0\r\n\r\n")
        self._note(answer.status)
        self._done(close=close)

    def _crashed(self, dialect: Dialect, call: Call) -> Answer:
        _log.exception("call failed", dialect=dialect.name, method=call.method)
        return dialect.refuse(Trouble.CRASH, call)

    # ---- answers

    def _refuse(self, trouble: Trouble, status: HTTPStatus, detail: str, *, path: str = "") -> None:
        """Rule 2. The connection goes on only if the whole request was read and understood."""
        head, dialect = self._head, self._dialect
        if dialect is None:
            dialect = self._site.dialect_of(path) if path or head is None else None
        if dialect is None:
            answer = problem_answer(status, trouble.value, detail)
        else:
            answer = dialect.refuse(trouble, None if head is None else self._described(head), detail)
        close = head is None or self._reader.in_body or trouble is Trouble.MALFORMED_HTTP
        self._answer(answer, close=close)

    def _answer(self, answer: Answer, *, close: bool = False) -> None:
        head = self._head
        close = close or head is None or self._is_last(head) or self._reader.in_body
        length = len(answer.body)
        try:
            start = self._site.head_of(answer, length=length, close=close)
        except ValueError:
            _log.exception("an answer's header cannot be sent")
            self.abort()
            return
        self._write(start if head is not None and head.method == "HEAD" else start + answer.body)
        self._note(answer.status)
        self._done(close=close)
        if answer.status == HTTPStatus.TOO_MANY_REQUESTS and not self._ending:
            self._pausing = True
            self._loop.call_later(PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        self._pausing = False
        if not self._ending:
            self._advance()

    def _done(self, *, close: bool) -> None:
        """The answer is out: on to the next request, or to the end."""
        unread = self._reader.in_body or self._reader.buffered_bytes > 0
        self._keep(0)
        self._head = self._dialect = self._stream = self._holder = None
        self._began_s = 0.0
        if not close:
            return
        self._ending = True
        transport = self._transport
        if transport is None:
            return
        if not unread:
            self._close()
            return
        # To close with bytes unread would reset the connection, and with it the answer.
        if transport.can_write_eof():
            transport.write_eof()
        self._read(True)
        self._wait_for(Waiting.LINGER)

    def _is_last(self, head: Head) -> bool:
        return not head.keep_alive or self._site.stopping or self._ending

    def _note(self, status: int) -> None:
        name = self._dialect.name.value if self._dialect is not None else "none"
        self._site.metrics.answered(
            name, status, time.perf_counter() - self._began_s if self._began_s else 0.0
        )

    def _drop(self, count: int) -> None:
        self._dropped += count
        if self._dropped > LINGER_BYTES and self._waiting is Waiting.LINGER:
            # Not closed: a reset could overtake the answer, as at a load balancer that is still sending.
            self._read(False)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _close(self) -> None:
        self._ending = True
        self._wait_for(Waiting.WRITE)
        if self._transport is not None:
            self._transport.close()

    def _read(self, wanted: bool) -> None:
        if self._transport is None or wanted is self._reading or self._transport.is_closing():
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _wait_for(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.deadline_s = self._site.now_s + self._site.longest_s[waiting]


def _too_large(dialect: Dialect) -> str:
    return f"a body may have {dialect.max_body_bytes} bytes here"


async def _closable(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """*chunks* as a generator that can be closed, whatever kind of iterator it is."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()
