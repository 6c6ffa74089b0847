"""Whoever has taken the broker's place: speaks NATS as far as a client needs to believe it, and lies."""

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

type Answer = Callable[[str], bytes]
"""What to answer a request to a subject by."""


FLOOD_BYTES = 24 << 20


@dataclass
class HostileBroker:
    """Use as a context. Without *context* it asks for no TLS, and speaks none."""

    answer: Answer
    context: ssl.SSLContext | None = None
    max_payload: float = 1 << 20
    """How much it says that it takes."""
    floods: bytes = b""
    """What it begins to say to whoever is connected, and does not end before FLOOD_BYTES."""
    flooded_bytes: int = 0
    flood_ended: asyncio.Event = field(default_factory=asyncio.Event)
    """By the other side, or because all of it was taken."""
    port: int = 0
    requests: list[str] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)
    """Whatever came in the clear."""
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            await self._speak(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = {
            "server_id": "x",
            "version": "2.10.0",
            "proto": 1,
            "headers": True,
            "max_payload": self.max_payload,
            "tls_required": self.context is not None,
        }
        writer.write(b"INFO " + json.dumps(told).encode() + b"\r\n")
        await writer.drain()
        if self.context is not None:
            await writer.start_tls(self.context)
        subscriptions: list[tuple[str, str]] = []
        while line := await reader.readline():
            if self.context is None:
                self.received += line
            match line.split():
                case [b"PING"]:
                    writer.write(b"PONG\r\n")
                    if self.floods:
                        await self._flood(writer)
                case [b"SUB", subject, *_, sid]:
                    subscriptions.append((subject.decode(), sid.decode()))
                case [b"PUB" | b"HPUB", subject, reply, *_, size]:
                    await reader.readexactly(int(size) + 2)
                    self.requests.append(subject.decode())
                    for pattern, name in subscriptions:
                        if reply.decode().startswith(pattern.rstrip("*>")):
                            body = self.answer(subject.decode())
                            head = f"MSG {reply.decode()} {name} {len(body)}\r\n"
                            writer.write(head.encode() + body + b"\r\n")
            await writer.drain()

    async def _flood(self, writer: asyncio.StreamWriter) -> None:
        """OSError once the other side has gone."""
        writer.write(self.floods)
        piece = b"A" * (256 << 10)
        try:
            while self.flooded_bytes < FLOOD_BYTES and not writer.is_closing():
                writer.write(piece)
                await writer.drain()
                self.flooded_bytes += len(piece)
        finally:
            self.flood_ended.set()
