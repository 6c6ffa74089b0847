"""Between NATS clients and a real nats-server: messages are lost, come twice and out of order.

    async with LossyBroker(nats) as lossy:           # *nats* runs (tests/nats_server.py)
        settings = lossy.settings("agent")           # for a client, as of NatsServer
        lossy.is_lossy = True                        # from now on; before, everything passes
        lossy.seen                                   # every byte of both directions, in the clear
        lossy.deliveries                             # what agents published to proxies, in order

1. TLS ends here on both sides, by the broker's own authority: that is what a broker is. Connections are never
   hurt by it: what NATS says of itself passes, its messages (PUB, HPUB, MSG, HMSG) are at its mercy.
2. Of DECK messages of each connection and direction 30 % are lost, some come twice, and some late: after the
   next one to the same subject, or LATE_S. Shuffled with a seed: the share does not depend on chance.
3. A connection ends when either side ends it: the server that is killed takes its clients' along.
"""

import asyncio
import random
import ssl
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, override

from runtime.broker import BrokerSettings
from tests.nats_server import NatsServer
from tests.scenarios.listener import Listener

LATE_S: Final = 1.0
_MESSAGES: Final = frozenset({b"PUB", b"HPUB", b"MSG", b"HMSG"})
_DELIVERIES: Final = (b"sealgate.v1.envelopes.", b"sealgate.v1.withdrawals.")


class Fate(StrEnum):
    PASSES = "passes"
    LOST = "lost"
    TWICE = "twice"
    LATE = "late"


DECK: Final = (*(Fate.LOST,) * 6, *(Fate.TWICE,) * 3, *(Fate.LATE,) * 2, *(Fate.PASSES,) * 9)


@dataclass
class _Direction:
    """One direction of one connection, and what is held back of it."""

    writer: asyncio.StreamWriter
    shuffled: random.Random
    deck: list[Fate] = field(default_factory=list)
    late: dict[bytes, list[bytes]] = field(default_factory=dict)

    def draw(self) -> Fate:
        if not self.deck:
            self.deck = list(DECK)
            self.shuffled.shuffle(self.deck)
        return self.deck.pop()

    def hold(self, subject: bytes, frame: bytes) -> None:
        self.late.setdefault(subject, []).append(frame)
        asyncio.get_running_loop().call_later(LATE_S, self.let_go, subject)

    def let_go(self, subject: bytes) -> None:
        for frame in self.late.pop(subject, ()):
            if not self.writer.is_closing():
                self.writer.write(frame)


class LossyBroker(Listener):
    def __init__(self, nats: NatsServer, *, seed: int = 47) -> None:
        super().__init__()
        self._nats = nats
        self._random = random.Random(seed)
        self.is_lossy = False
        self.seen = bytearray()
        self.deliveries: list[tuple[str, bytes]] = []
        """Subject and content, each once however often it came to the server."""
        self.fates: Counter[tuple[str, Fate]] = Counter()
        """By what a message is (`delivery`, `receipt`, or the broker's own business): what became of it."""

    def settings(self, name: str, **changes: Any) -> BrokerSettings:
        return self._nats.settings(name, urls=[f"tls://localhost:{self.port}"], **changes)

    @override
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._relay(reader, writer)
        finally:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._nats.port)
        try:
            # NATS begins in the clear: INFO, then TLS.
            writer.write(await there.readuntil(b"\r\n"))
            await writer.drain()
            await writer.start_tls(self._nats.server_context())
            await back.start_tls(self._client_context(), server_hostname="localhost")
            pumps = [
                asyncio.create_task(self._pump(reader, self._direction(back)), name="lossy:there"),
                asyncio.create_task(self._pump(there, self._direction(writer)), name="lossy:back"),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            back.transport.abort()

    def _direction(self, writer: asyncio.StreamWriter) -> _Direction:
        return _Direction(writer, random.Random(self._random.random()))

    def _client_context(self) -> ssl.SSLContext:
        settings = self._nats.settings("relay")
        context = ssl.create_default_context(cafile=settings.ca_file)
        context.load_cert_chain(settings.certificate_file, settings.key_file)
        return context

    async def _pump(self, reader: asyncio.StreamReader, to: _Direction) -> None:
        while True:
            frame = await reader.readuntil(b"\r\n")
            words = frame.split()
            if words and words[0] in _MESSAGES:
                frame += await reader.readexactly(int(words[-1]) + 2)
                self.seen += frame
                self._treat(words, frame, to)
            else:
                self.seen += frame
                to.writer.write(frame)
            await to.writer.drain()

    def _treat(self, words: list[bytes], frame: bytes, to: _Direction) -> None:
        subject = words[1]
        what = "other"
        if subject.startswith(_DELIVERIES):
            what = "delivery"
            head = int(words[-2]) if words[0] == b"HPUB" else 0  # headers of its own
            content = frame[frame.index(b"\r\n") + 2 + head : -2]
            if words[0] in (b"PUB", b"HPUB") and (subject.decode(), content) not in self.deliveries:
                self.deliveries.append((subject.decode(), content))
        elif subject.startswith(b"sealgate.v1.receipts."):
            what = "receipt"
        fate = to.draw() if self.is_lossy else Fate.PASSES
        self.fates[what, fate] += 1
        match fate:
            case Fate.LOST:
                return
            case Fate.LATE:
                to.hold(subject, frame)
                return
            case Fate.TWICE:
                to.writer.write(frame)
        to.writer.write(frame)
        to.let_go(subject)
