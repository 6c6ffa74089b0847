"""The client of the encryption service's rows: prepared requests over kept connections, cheaply.

One process, uvloop, one request at a time on each connection. Closed loop: the next when the answer is here.
Open loop (`--rate`): at its time, whatever became of the ones before; how long it took counts from that time.
"""

import argparse
import asyncio
import json
import ssl
import sys
import time
from pathlib import Path
from typing import Final, override

import msgspec
import uvloop

_TIMEOUT_S: Final = 60.0


class _LoadError(Exception):
    """An answer that is none, or a connection lost."""


class _Run:
    """What all connections share."""

    def __init__(self, requests: list[bytes], *, seconds: float, rate: float) -> None:
        self.requests = requests
        self.next = 0
        self.rate = rate
        self.took_s: list[float] = []
        self.failure: str | None = None
        self.refused = 0
        self.done = asyncio.Event()
        self.open = 0
        self.idle: list[_Connection] = []
        self.due: list[float] = []  # of an open loop: times whose request waits for a connection
        self.began = time.perf_counter()
        self.end = self.began + seconds

    def request(self) -> bytes:
        request = self.requests[self.next]
        self.next = (self.next + 1) % len(self.requests)
        return request

    async def pace(self) -> None:
        """Open loop: hand out requests at their times."""
        number = 0
        while (now := time.perf_counter()) < self.end:
            while self.began + number / self.rate <= now:
                self.due.append(self.began + number / self.rate)
                number += 1
            while self.due and self.idle:
                self.idle.pop().ask(self.due.pop(0))
            await asyncio.sleep(0.0005)
        for connection in self.idle:
            connection.close()
        self.idle.clear()


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run, *, may_refuse: bool) -> None:
        self._run = run
        self._may_refuse = may_refuse
        self._answer = b""
        self._began = 0.0
        run.open += 1

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._go_on()

    def ask(self, began: float) -> None:
        self._began = began
        self._transport.write(self._run.request())

    def close(self) -> None:
        self._transport.close()

    @override
    def data_received(self, data: bytes) -> None:
        answer = self._answer + data if self._answer else data
        end = answer.find(b"\r\n\r\n")
        if end < 0 or not _is_complete(answer, end):
            self._answer = answer
            return
        self._answer = b""
        run = self._run
        if not answer.startswith(b"HTTP/1.1 200"):
            if not self._may_refuse or not answer.startswith(b"HTTP/1.1 429"):
                run.failure = answer[:500].decode("latin-1")
                run.done.set()
                return
            run.refused += 1
        else:
            run.took_s.append(time.perf_counter() - self._began)
        self._go_on()

    def _go_on(self) -> None:
        run, now = self._run, time.perf_counter()
        if now >= run.end:
            self._transport.close()
        elif not run.rate:
            self.ask(now)
        elif run.due:
            self.ask(run.due.pop(0))
        else:
            run.idle.append(self)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        run = self._run
        run.open -= 1
        if time.perf_counter() < run.end and run.failure is None:
            run.failure = f"a connection was lost: {exc}"
        if not run.open or run.failure is not None:
            run.done.set()


def _is_complete(answer: bytes, end: int) -> bool:
    at = answer.find(b"ontent-Length: ", 0, end)
    if at < 0:
        at = answer.find(b"ontent-length: ", 0, end)  # as HAProxy writes it
    if at < 0:  # chunked: one answer at a time, so this is its end
        return answer.endswith(b"0\r\n\r\n")
    return len(answer) >= end + 4 + int(answer[at + 15 : answer.find(b"\r", at)])


async def _main(arguments: argparse.Namespace, requests: list[bytes]) -> dict[str, float]:
    context = ssl.create_default_context(cafile=arguments.ca) if arguments.ca else None
    run = _Run(requests, seconds=arguments.seconds, rate=arguments.rate)
    loop = asyncio.get_running_loop()
    for _ in range(arguments.connections):
        await loop.create_connection(
            lambda: _Connection(run, may_refuse=arguments.may_refuse),
            "127.0.0.1",
            arguments.port,
            ssl=context,
            server_hostname="localhost" if context else None,
        )
    pacing = asyncio.create_task(run.pace()) if arguments.rate else None
    cpu_s = time.process_time()
    async with asyncio.timeout(arguments.seconds + _TIMEOUT_S):
        await run.done.wait()
    if pacing is not None:
        await pacing
    if run.failure is not None:
        raise _LoadError(run.failure)
    took_s = sorted(run.took_s)
    count = len(took_s)
    return {
        "per_s": count / arguments.seconds,
        "p50_ms": took_s[count // 2] * 1000,
        "p99_ms": took_s[int(count * 0.99)] * 1000,
        "refused": run.refused,
        "client_us": (time.process_time() - cpu_s) * 1e6 / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ca", default="")
    parser.add_argument("--requests", required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--may-refuse", action="store_true")
    arguments = parser.parse_args()
    requests = msgspec.msgpack.decode(Path(arguments.requests).read_bytes(), type=list[bytes])
    try:
        print(json.dumps(uvloop.run(_main(arguments, requests))))
    except (_LoadError, OSError, TimeoutError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
