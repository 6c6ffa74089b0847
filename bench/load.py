"""The client: curl for one big body, a small selector loop for many little requests. One process, core 1."""

import argparse
import json
import selectors
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from bench.machine import OTHER_CORE, BenchError, pinned

_BUFFER_BYTES: Final = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Of many small requests."""

    per_s: float
    p50_ms: float
    p99_ms: float


def transfer(
    method: Literal["PUT", "GET"],
    url: str,
    *,
    ca: Path,
    body: Path | None = None,
    into: Path | None = None,
    http2: bool = False,
    limit_rate: str | None = None,
) -> float:
    """Seconds that one transfer took, connection included. BenchError unless the answer is 2xx."""
    argv = ["curl", "-sS", "--http2" if http2 else "--http1.1", "--tlsv1.3", "--cacert", str(ca)]
    argv += ["-H", "Expect:", "-o", str(into or "/dev/null")]
    argv += ["-w", "%{http_code} %{http_version} %{time_total}"]
    if limit_rate is not None:
        argv += ["--limit-rate", limit_rate]
    if method == "PUT":
        argv += ["-T", str(body)]
    done = subprocess.run(
        pinned([*argv, url], OTHER_CORE), capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode != 0:
        raise BenchError(f"curl {method} {url}: exit {done.returncode}: {done.stderr.strip()}")
    status, version, seconds = done.stdout.split()
    if not status.startswith("2") or (version == "2") != http2:
        raise BenchError(f"curl {method} {url}: status {status}, HTTP/{version}")
    return float(seconds)


def small(
    method: Literal["PUT", "GET"], port: int, path: str, *, ca: Path, connections: int, seconds: float
) -> Rate:
    """1 KiB requests over kept connections, one at a time on each."""
    return _in_process(["small", method, path, "--connections", str(connections)], port, ca, seconds)


def new_connections(port: int, path: str, *, ca: Path, connections: int, seconds: float) -> Rate:
    """A TLS handshake and one small GET, over and over, without resumption."""
    return _in_process(["new", "GET", path, "--connections", str(connections)], port, ca, seconds)


def _in_process(arguments: list[str], port: int, ca: Path, seconds: float) -> Rate:
    argv = [sys.executable, "-m", "bench.load", *arguments, "--port", str(port), "--ca", str(ca)]
    argv += ["--seconds", str(seconds)]
    done = subprocess.run(
        pinned(argv, OTHER_CORE), capture_output=True, text=True, check=False, timeout=seconds + 60
    )
    if done.returncode != 0:
        raise BenchError(f"load on {port}: {done.stderr.strip()[-1000:]}")
    return Rate(**json.loads(done.stdout))


# --- inside the client process ------------------------------------------------------------------------------


class _Connection:
    """One kept connection, nonblocking: writes a request, reads its response, notes how long it took."""

    def __init__(self, port: int, context: ssl.SSLContext, request: bytes) -> None:
        self._request = request
        plain = socket.create_connection(("127.0.0.1", port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = context.wrap_socket(plain, server_hostname="localhost")
        self.socket.setblocking(False)
        self.took_s: list[float] = []
        self._answer = bytearray()
        self._needed = 0
        self._began = 0.0

    def ask(self) -> None:
        self._answer.clear()
        self._needed = 0
        self._began = time.perf_counter()
        if self.socket.send(self._request) != len(self._request):
            raise BenchError("a small request did not fit into the socket")

    def ready(self) -> bool:
        """Read what there is; True when the response is complete."""
        while True:  # What OpenSSL has read ahead, the selector does not report.
            try:
                piece = self.socket.recv(_BUFFER_BYTES)
            except ssl.SSLWantReadError:
                break
            if not piece:
                raise BenchError("the connection was closed")
            self._answer += piece
        if not self._needed and (end := self._answer.find(b"\r\n\r\n")) >= 0:
            self._needed = end + 4 + _body_bytes(bytes(self._answer[:end]))
        if not self._needed or len(self._answer) < self._needed:
            return False
        self.took_s.append(time.perf_counter() - self._began)
        return True


def _body_bytes(head: bytes) -> int:
    status, *lines = head.split(b"\r\n")
    if status.split(b" ")[1][:1] != b"2":
        raise BenchError(f"answered {status.decode()}")
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _small(arguments: argparse.Namespace, context: ssl.SSLContext) -> list[float]:
    selector = selectors.DefaultSelector()
    connections = []
    for index in range(arguments.connections):
        path = arguments.path.replace("@", str(index))
        connection = _Connection(arguments.port, context, _request(arguments.method, path))
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connections.append(connection)
    for connection in connections:
        connection.ask()
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end:
        for key, _ in selector.select(1):
            connection = key.data
            if connection.ready():
                connection.ask()
    return [took for connection in connections for took in connection.took_s]


def _new(arguments: argparse.Namespace, context: ssl.SSLContext) -> list[float]:
    end = time.perf_counter() + arguments.seconds
    took: list[float] = []
    failures: list[BaseException] = []

    def run(index: int) -> None:
        request = _request("GET", arguments.path.replace("@", str(index)))
        try:
            while time.perf_counter() < end:
                began = time.perf_counter()
                with (
                    socket.create_connection(("127.0.0.1", arguments.port)) as plain,
                    context.wrap_socket(plain, server_hostname="localhost") as secure,
                ):
                    secure.sendall(request)
                    answer = b""
                    while b"\r\n\r\n" not in answer:
                        answer += secure.recv(_BUFFER_BYTES)
                    head, _, body = answer.partition(b"\r\n\r\n")
                    left = _body_bytes(head) - len(body)
                    while left > 0:
                        left -= len(secure.recv(_BUFFER_BYTES))
                took.append(time.perf_counter() - began)
        except BaseException as failure:  # noqa: BLE001 - raised below, in the main thread
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(arguments.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return took


def _request(method: str, path: str) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n"
    if method == "PUT":
        return (head + "Content-Length: 1024\r\n\r\n").encode() + b"s" * 1024
    return (head + "\r\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("small", "new"))
    parser.add_argument("method")
    parser.add_argument("path")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ca", required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    context = ssl.create_default_context(cafile=arguments.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    took_s = sorted(_small(arguments, context) if arguments.what == "small" else _new(arguments, context))
    result: dict[str, Any] = {
        "per_s": len(took_s) / arguments.seconds,
        "p50_ms": statistics.median(took_s) * 1000,
        "p99_ms": took_s[int(len(took_s) * 0.99)] * 1000,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
