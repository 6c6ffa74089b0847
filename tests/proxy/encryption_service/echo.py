"""A dialect that does what its path says, and a raw client: for the tests of the HTTP layer."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import ClassVar, Self, override

from proxy.encryption_service.call import Answer, Call, StreamingAnswer
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from proxy.encryption_service.model import DialectName

MAX_BODY_BYTES = 100_000


class Echo(Dialect):
    """/e/echo /e/wait /e/crash /e/headers /e/stream /e/cut /e/long; `refuse` names the trouble."""

    max_body_bytes = MAX_BODY_BYTES

    def __init__(self, name: DialectName = DialectName.TRANSIT, prefix: str = "/e/") -> None:
        self.name = name
        self._prefix = prefix
        self.calls: list[Call] = []
        self.go_on = asyncio.Event()
        self.received = 0
        self.sent = 0
        self.failure: BaseException | None = None
        self.tenants: dict[str, str] | None = None
        """By the token of a call; None: heads do not tell."""
        self.asked = 0

    @override
    def tenant_of(self, call: Call) -> str | None:
        self.asked += 1
        return None if self.tenants is None else self.tenants.get(call.header("token") or "", "")

    @override
    def claims(self, path: str) -> bool:
        return path.startswith(self._prefix)

    @override
    def wants_stream(self, method: str, path: str) -> bool:
        return path.endswith(("/stream", "/consume"))

    @override
    def handle(self, call: Call) -> Answer | Awaitable[Answer | StreamingAnswer]:
        self.calls.append(call)
        match call.path.rpartition("/")[2]:
            case "wait":
                return self._waited(call)
            case "crash":
                raise ZeroDivisionError("a bug")
            case "crash-later":
                return self._crashed()
            case "breakout":
                return Answer(status=200, headers=(("A", "b\x01"),))
            case "stream":
                return self._streamed(call)
            case "consume":
                return self._consumed(call)
            case "cut":
                return self._cut()
            case "long":
                return self._long()
            case "nothing":
                return Answer(status=204, content_type="", headers=(("Access-Control-Allow-Origin", "x"),))
            case "too-much":
                return Answer(status=429, body=call.body)
            case "big":
                return Answer(status=200, body=bytes(20 << 20))
            case _:
                return Answer(status=200, body=call.body, headers=(("X-Path", call.path),))

    @override
    def refuse(self, trouble: Trouble, call: Call | None, detail: str = "") -> Answer:
        status = {Trouble.TOO_LARGE: 413, Trouble.CRASH: 500, Trouble.TIMEOUT: 408, Trouble.OVERLOAD: 503}
        document = {"trouble": trouble.value, "detail": detail, "path": call.path if call else None}
        return Answer(status=status.get(trouble, 400), body=json.dumps(document).encode() + b"\n")

    async def _waited(self, call: Call) -> Answer:
        await self.go_on.wait()
        return Answer(status=200, body=call.body)

    async def _crashed(self) -> Answer:
        await asyncio.sleep(0)
        raise ZeroDivisionError("a bug")

    async def _streamed(self, call: Call) -> StreamingAnswer:
        return StreamingAnswer(status=200, chunks=self._pieces(call))

    async def _pieces(self, call: Call) -> AsyncIterator[bytes]:
        assert call.body_stream is not None
        async for piece in call.body_stream:
            self.received += len(piece)
            yield piece

    async def _consumed(self, call: Call) -> Answer:
        assert call.body_stream is not None
        await self.go_on.wait()
        try:
            async for piece in call.body_stream:
                self.received += len(piece)
        except BaseException as error:
            self.failure = error
            raise
        return Answer(status=200, body=str(self.received).encode())

    async def _cut(self) -> StreamingAnswer:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"some"
            raise ZeroDivisionError("half way")

        return StreamingAnswer(status=200, chunks=chunks())

    async def _long(self) -> StreamingAnswer:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(1000):
                self.sent += 65536
                yield bytes(65536)

        return StreamingAnswer(status=200, chunks=chunks())


@dataclass(slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes = b""
    trailing: bytes = field(default=b"", repr=False)

    @property
    def json(self) -> dict[str, object]:
        document: dict[str, object] = json.loads(self.body)
        assert self.body.count(b"\n") <= 1
        return document


class Client:
    """Bytes out, answers in; nothing is hidden. `close_all` when the test ends."""

    _open: ClassVar[list["Client"]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._open.append(self)

    @classmethod
    async def connect(cls, port: int, **options: object) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port, **options))  # type: ignore[arg-type]

    async def ask(
        self, path: str, body: bytes = b"", *, method: str = "POST", headers: str = "", version: str = "1.1"
    ) -> Reply:
        await self.send(request(path, body, method=method, headers=headers, version=version))
        return await self.reply(head_only=method == "HEAD")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, *, head_only: bool = False) -> Reply:
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            reply = Reply(int(first.split(" ")[1]), headers)
            if head_only or reply.status == 100:
                return reply
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    reply.body += await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
                await self.reader.readexactly(2)
            else:
                reply.body = await self.reader.readexactly(int(headers.get("content-length", "0")))
            return reply

    async def ended(self) -> bytes:
        """What still comes before the other side closes; a reset is an end as well."""
        async with asyncio.timeout(30):
            try:
                return await self.reader.read(-1)
            except ConnectionResetError:
                return b"<reset>"

    def reset(self) -> None:
        """End the connection by RST: by FIN it is but half closed."""
        connection: socket.socket = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    @classmethod
    def close_all(cls) -> None:
        while cls._open:
            cls._open.pop().close()

    def close(self) -> None:
        self.writer.transport.abort()


def request(
    path: str, body: bytes = b"", *, method: str = "POST", headers: str = "", version: str = "1.1"
) -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/{version}\r\nHost: x\r\n{headers}{length}\r\n".encode() + body
