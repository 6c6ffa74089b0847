"""One tenant's agent that has gone mad, as a program of its own: it floods a proxy's push listener.

    python -m tests.scenarios.flooder PORT CA CERTIFICATE KEY CONNECTIONS

Over so many connections at once, each as fast as it can: sessions, questions of presence, huge bodies of
envelopes that are none, bodies that never end, and connections on which nothing is said. What is refused is
tried again at once. It prints `floods` once all connections were made; on SIGTERM, as JSON, what it was
answered, by status (0: no connection, or cut).
"""

import asyncio
import itertools
import json
import random
import signal
import ssl
import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

_HUGE = json.dumps({"envelopes": ["e30.a.b.c." + "A" * 7000] * 1000}).encode()
_MANY = json.dumps({"envelopes": ["e30.a.b.c.d"] * 1000}).encode()


def _request(method: str, path: str, body: bytes = b"", *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + body


class Flooder:
    def __init__(self, port: int, context: ssl.SSLContext, agent: str) -> None:
        self._port = port
        self._context = context
        session = json.dumps({"agent": agent}).encode()
        self._requests = (
            _request("POST", "/push/v1/session", session),
            _request("GET", "/push/v1/presence"),
            _request("POST", "/push/v1/envelopes", _MANY),
            _request("POST", "/push/v1/envelopes", _HUGE),
            _request("POST", "/push/v1/envelopes?purpose=withdrawal", _MANY),
            _request("POST", "/push/v1/envelopes", b"{", length=8 << 20),
        )
        self.answers: Counter[int] = Counter()
        self.all_begun = asyncio.Event()
        """Each connection was made at least once."""
        self._begun = 0

    async def run(self, connections: int) -> NoReturn:
        async with asyncio.TaskGroup() as group:
            for number in range(connections):
                group.create_task(self._flood(number, connections), name=f"flood-{number}")
        raise AssertionError("unreachable: no connection ends by itself")

    async def _flood(self, number: int, connections: int) -> NoReturn:
        chosen = random.Random(number)
        is_begun = False
        while True:
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self._port, ssl=self._context, server_hostname="localhost"
                )
            except (OSError, TimeoutError):
                self.answers[0] += 1
                await asyncio.sleep(0)
                continue
            self._begun += not is_begun
            is_begun = True
            if self._begun == connections:
                self.all_begun.set()
            try:
                if number % 4 == 0:
                    await reader.read()  # nothing is ever said on this one
                for _ in itertools.count():
                    writer.write(chosen.choice(self._requests))
                    await writer.drain()
                    self.answers[await _status(reader)] += 1
            except (OSError, EOFError, ValueError):
                self.answers[0] += 1
            finally:
                writer.transport.abort()


async def _status(reader: asyncio.StreamReader) -> int:
    """Of the answer, which is read to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    _, _, rest = head.partition("content-length: ")
    if rest:
        await reader.readexactly(int(rest.split("\r\n", 1)[0]))
    return int(head.split()[1])


async def main(port: str, ca: str, certificate: str, key: str, connections: str) -> None:
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(certificate, key)
    flooder = Flooder(int(port), context, f"agent-{Path(certificate).parent.name}")
    running = asyncio.create_task(flooder.run(int(connections)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    begun = asyncio.create_task(flooder.all_begun.wait())
    await asyncio.wait([running, begun], return_when=asyncio.FIRST_COMPLETED)
    print("floods", flush=True)
    await asyncio.wait([running])
    begun.cancel()
    print(json.dumps(flooder.answers), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
