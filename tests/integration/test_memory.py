"""Memory of the proxy does not grow with bodies, slow peers, late hooks or many requests (promise 7).

The proxy is a process of its own (this file, run as a module) with the gate and the HTTP/2 patch; its peak
resident size is read from the kernel. Bodies are larger than the bound several times over: what stock
mitmproxy would park could not hide in it, which `test_stock_*` proves on the same cases.
"""

import argparse
import asyncio
import contextlib
import hashlib
import http.client
import io
import os
import random
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast, override

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest

from tests import pki

MIB: Final = 1 << 20
BODY_BYTES: Final = 128 * MIB
BOUND_BYTES: Final = 48 * MIB
SLOW_BYTES_PER_S: Final = 100 * MIB
HOOK_S: Final = 2.0
STOCK_HOOK_S: Final = 40.0
"""At the most."""
SMALL_BUFFER_BYTES: Final = 128 * 1024
PIECE: Final = random.Random(7).randbytes(MIB)
TIMEOUT_S: Final = 60.0


# --- the proxy, in its own process ------------------------------------------------------------------------


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _serve(arguments: argparse.Namespace) -> None:
    from mitmproxy import master, options
    from mitmproxy.addons import core, next_layer, proxyserver, tlsconfig
    from mitmproxy.http import HTTPFlow
    from mitmproxy.proxy.mode_specs import ProxyMode

    from proxy import gate
    from proxy.limits import ClientLimits

    class Passing(gate.Transform):
        """Makes of a body the same body: content stays comparable, the gate's whole path is taken."""

        def __init__(self, expected_out_bytes: int | None) -> None:
            self.expected_out_bytes = expected_out_bytes

        @override
        def feed(self, piece: bytes) -> list[gate.Piece]:
            return [piece]

        @override
        def finish(self) -> list[gate.Piece]:
            return []

    def passing(message: Any) -> Any:
        """Stream *message* through a transform if it has a body."""
        length = message.headers.get("content-length")
        if not int(length or 0):
            return gate.CLEAR
        message.stream = Passing(int(length))
        return message.stream

    class Addon:
        async def requestheaders(self, flow: HTTPFlow) -> None:
            if "late" in flow.request.path:
                await asyncio.sleep(HOOK_S)
            if "refused" not in flow.request.path:
                gate.permit(flow).request = passing(flow.request)

        async def responseheaders(self, flow: HTTPFlow) -> None:
            gate.permit(flow).response = passing(flow.response)

    class Streaming:
        async def requestheaders(self, flow: HTTPFlow) -> None:
            if "late" in flow.request.path:
                idle_bytes, until_s = _resident_bytes(), time.monotonic() + STOCK_HOOK_S
                # Late for as long as a client on a loaded machine takes to fill the memory.
                while _resident_bytes() < idle_bytes + 2 * BOUND_BYTES and time.monotonic() < until_s:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            flow.request.stream = True

        def responseheaders(self, flow: HTTPFlow) -> None:
            if flow.response:
                flow.response.stream = True

    if not arguments.stock:
        gate.install()
    opts = options.Options()
    server = proxyserver.Proxyserver()  # type: ignore[no-untyped-call]
    running = master.Master(opts)
    addon = Streaming() if arguments.stock else Addon()
    running.addons.add(  # type: ignore[no-untyped-call]
        core.Core(), server, next_layer.NextLayer(), tlsconfig.TlsConfig(), addon
    )
    spec = f"reverse:https://localhost:{arguments.origin_port}@127.0.0.1:{arguments.port}"
    ProxyMode.parse(spec).transport_protocol = "tcp"  # type: ignore[misc]
    opts.update(  # type: ignore[no-untyped-call]
        mode=[spec],
        certs=[f"*={arguments.certificate}"],
        ssl_verify_upstream_trusted_ca=arguments.ca,
        connection_strategy="lazy",
        http2=True,
        http3=False,
        rawtcp=False,
        websocket=False,
    )
    if not arguments.stock:
        gate.limit(running, gate.Clients(ClientLimits(idle_s=arguments.idle_s)))
    await server.setup_servers()
    await running.running()
    await asyncio.Event().wait()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--origin-port", type=int, required=True)
    parser.add_argument("--ca", required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--idle-s", type=float, default=600)
    parser.add_argument("--stock", action="store_true")
    asyncio.run(_serve(parser.parse_args()))


# --- its memory -------------------------------------------------------------------------------------------


@dataclass
class Proxy:
    port: int
    child: "subprocess.Popen[bytes]"
    ca_file: Path
    idle_bytes: int = 0

    def reset_peak(self) -> None:
        """From now on `growth_bytes` counts; what is resident now is idle."""
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")
        self.idle_bytes = self._status("VmRSS")

    def growth_bytes(self) -> int:
        assert self.child.poll() is None, "the proxy has died"
        return self._status("VmHWM") - self.idle_bytes

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        pytest.fail(f"no {name}")


@dataclass
class Lab:
    """Certificates for both sides, and origins and proxies that end with the test."""

    directory: Path
    ca_file: Path
    certificate_file: Path
    key_file: Path
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def origin(self, protocol: str) -> "Http1Origin | Http2Origin":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate_file, self.key_file)
        kind = Http1Origin if protocol == "h1" else Http2Origin
        context.set_alpn_protocols(["http/1.1" if protocol == "h1" else "h2"])
        origin = kind(context)
        self.cleanup.callback(origin.close)
        return origin

    def proxy(self, origin: "Http1Origin | Http2Origin", *, stock: bool = False, **more: Any) -> Proxy:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        both = self.directory / "both.pem"
        both.write_bytes(self.key_file.read_bytes() + self.certificate_file.read_bytes())
        argv = [sys.executable, "-m", "tests.integration.test_memory", "--port", str(port)]
        argv += ["--origin-port", str(origin.port), "--ca", str(self.ca_file), "--certificate", str(both)]
        argv += ["--stock"] if stock else []
        argv += [text for name, value in more.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        with (self.directory / "proxy.log").open("wb") as log:
            child = subprocess.Popen(argv, stderr=log)
        self.cleanup.callback(child.wait)
        self.cleanup.callback(child.kill)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            said = (self.directory / "proxy.log").read_text()
            assert child.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        proxy = Proxy(port, child, self.ca_file)
        # What a first request loads belongs to idle. An origin that speaks HTTP/2 alone is for such clients.
        for protocol in ("h1", "h2") if isinstance(origin, Http1Origin) else ("h2",):
            with connected(proxy, protocol) as peer:
                peer.get("/warm-up", size=MIB)
                peer.put("/warm-up", MIB)
        proxy.reset_peak()
        return proxy


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    ca = pki.make_server_ca()
    certificate, key = pki.write_credential(pki.issue_server(ca), tmp_path, "server")
    made = Lab(tmp_path, pki.write_certificate(ca.certificate, tmp_path / "ca.pem"), certificate, key)
    with made.cleanup:
        yield made


# --- bodies and their speed -------------------------------------------------------------------------------


class Pace:
    """Holds its caller to *bytes_per_s*; None: as fast as it goes."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._began = time.monotonic()
        self._passed = 0

    def passed(self, size: int) -> None:
        if self._bytes_per_s is None:
            return
        self._passed += size
        ahead_s = self._passed / self._bytes_per_s - (time.monotonic() - self._began)
        if ahead_s > 0.01:
            time.sleep(ahead_s)


def pieces(size: int) -> Iterator[bytes]:
    """The body of *size* bytes, the same every time."""
    for start in range(0, size, MIB):
        yield PIECE[: min(MIB, size - start)]


def digest(size: int) -> bytes:
    whole = hashlib.blake2b()
    for piece in pieces(size):
        whole.update(piece)
    return whole.digest()


@dataclass
class Received:
    size: int = 0
    hash: Any = field(default_factory=hashlib.blake2b)

    def add(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        self.hash.update(data)

    def assert_is(self, size: int) -> None:
        assert self.size == size
        assert self.hash.digest() == digest(size)


# --- origins ----------------------------------------------------------------------------------------------


class _Origin:
    """Accepts connections, one thread each; keeps what was uploaded by path."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self.bytes_per_s: float | None = None
        """How fast uploads are taken, from the next connection on."""
        self.uploads: dict[str, Received] = {}
        self.complete: set[str] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="origin accepts")
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._guarded, args=(plain,), name="origin serves")
            self._threads.append(thread)
            self._sockets.add(plain)
            thread.start()

    def _guarded(self, plain: socket.socket) -> None:
        plain.settimeout(TIMEOUT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A proxy that cuts its connection is part of some tests.
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError), plain:
            secure = self._context.wrap_socket(plain, server_side=True)
            self._sockets.discard(plain)
            self._sockets.add(secure)
            try:
                self._serve(secure)
            finally:
                self._sockets.discard(secure)
                secure.close()

    def _serve(self, secure: ssl.SSLSocket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


def _size_of(path: str) -> int:
    """How much a GET of *path* returns: `/anything?size=123`."""
    return int(path.partition("size=")[2] or 0)


class Http1Origin(_Origin):
    @override
    def _serve(self, secure: ssl.SSLSocket) -> None:
        reader = cast("io.BufferedReader", secure.makefile("rb", buffering=65536))
        while line := reader.readline():
            method, path, _ = line.decode().split(" ")
            headers = http.client.parse_headers(reader)
            if method == "PUT":
                upload = self.uploads[path] = Received()
                pace = Pace(self.bytes_per_s)
                size = int(headers["content-length"])
                while upload.size < size:
                    piece = reader.read1(min(65536, size - upload.size))
                    if not piece:
                        return
                    upload.add(piece)
                    pace.passed(len(piece))
                self.complete.add(path)
                secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            else:
                size = _size_of(path)
                secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                for piece in pieces(size):
                    secure.sendall(piece)


class Http2Origin(_Origin):
    @override
    def _serve(self, secure: ssl.SSLSocket) -> None:
        Http2Peer(secure, client_side=False, bytes_per_s=self.bytes_per_s, origin=self).serve()


# --- HTTP/2, both ends ------------------------------------------------------------------------------------


class Http2Peer:
    """Blocking: reads, answers, and grants credit at its pace, or never."""

    def __init__(
        self,
        secure: ssl.SSLSocket,
        *,
        client_side: bool,
        bytes_per_s: float | None = None,
        grants: bool = True,
        origin: Http2Origin | None = None,
    ) -> None:
        self._secure = secure
        self._origin = origin
        self._pace = Pace(bytes_per_s)
        self._grants = grants
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client_side, header_encoding="utf-8")
        )
        self._h2.initiate_connection()
        self.received: dict[int, Received] = {}
        self.statuses: dict[int, str] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self._paths: dict[int, str] = {}
        self._bodies: dict[int, Iterator[bytes]] = {}
        self._rests: dict[int, memoryview] = {}
        self._flush()

    # What a client does.

    def get(self, path: str, *, size: int) -> None:
        """Fetch *size* bytes, check every one."""
        stream_id = self.ask("GET", f"{path}?size={size}")
        self.run_until(lambda: stream_id in self.ended)
        assert self.statuses[stream_id] == "200"
        self.received.pop(stream_id).assert_is(size)

    def put(self, path: str, size: int) -> None:
        stream_id = self.ask("PUT", path, size)
        self.run_until(lambda: stream_id in self.ended)
        assert self.statuses[stream_id] == "200"

    def ask(self, method: str, path: str, size: int | None = None) -> int:
        """Open a stream, with a body of *size* to follow; its id."""
        stream_id = self._h2.get_next_available_stream_id()
        headers = [(":method", method), (":scheme", "https"), (":authority", "localhost"), (":path", path)]
        if size is not None:
            headers.append(("content-length", str(size)))
            self._bodies[stream_id] = pieces(size)
        self._h2.send_headers(stream_id, headers, end_stream=size is None)
        return stream_id

    def run_until(self, done: Callable[[], bool], *, within_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + within_s
        while not done():
            assert time.monotonic() < deadline, "the proxy did not answer in time"
            if not self.step(wait_s=0.2):
                raise ConnectionError("the connection was closed")

    # What both do.

    def serve(self) -> None:
        while self.step(wait_s=TIMEOUT_S):
            pass

    def step(self, *, wait_s: float) -> bool:
        """Send what may be sent, receive what is there; False when the peer has closed."""
        is_sending = self._send_bodies()
        self._flush()
        if (
            not self._secure.pending()
            and not select.select([self._secure], [], [], 0 if is_sending else wait_s)[0]
        ):
            return True
        data = self._secure.recv(65536)
        if not data:
            return False
        for event in self._h2.receive_data(data):
            self._handle(event)
        self._flush()
        return True

    def _send_bodies(self) -> bool:
        """A frame of each body that has credit; True if there was any."""
        sent = False
        for stream_id, body in list(self._bodies.items()):
            rest = self._rests.get(stream_id) or memoryview(next(body, b""))
            if not rest:
                self._h2.end_stream(stream_id)
                del self._bodies[stream_id]
                continue
            size = min(
                self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size, len(rest)
            )
            if size > 0:
                self._h2.send_data(stream_id, bytes(rest[:size]))
                sent = True
            self._rests[stream_id] = rest[max(size, 0) :]
        return sent

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._secure.sendall(data)

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                headers = {str(name): str(value) for name, value in event.headers}
                self._paths[event.stream_id] = headers[":path"]
                assert self._origin is not None
                if headers[":method"] == "PUT":
                    self.received[event.stream_id] = self._origin.uploads[headers[":path"]] = Received()
                else:
                    size = _size_of(headers[":path"])
                    fields = [(":status", "200"), ("content-length", str(size))]
                    self._h2.send_headers(event.stream_id, fields)
                    self._bodies[event.stream_id] = pieces(size)
            case h2.events.ResponseReceived():
                headers = {str(name): str(value) for name, value in event.headers}
                self.statuses[event.stream_id] = headers[":status"]
                self.received[event.stream_id] = Received()
            case h2.events.DataReceived():
                self.received[event.stream_id].add(event.data)
                self._pace.passed(len(event.data))
                if self._grants:
                    self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                self.ended.add(event.stream_id)
                if self._origin is not None and event.stream_id in self.received:
                    self._origin.complete.add(self._paths[event.stream_id])
                    self._h2.send_headers(event.stream_id, [(":status", "200")], end_stream=True)
            case h2.events.StreamReset():
                self.reset.add(event.stream_id)
                self.ended.add(event.stream_id)
                self._bodies.pop(event.stream_id, None)


# --- an HTTP/1 client -------------------------------------------------------------------------------------


class Http1Client:
    def __init__(self, secure: ssl.SSLSocket, *, bytes_per_s: float | None = None) -> None:
        self._secure = secure
        self._bytes_per_s = bytes_per_s

    def get(self, path: str, *, size: int) -> None:
        self.ask("GET", f"{path}?size={size}")
        received, pace = Received(), Pace(self._bytes_per_s)
        response = self._response("GET")
        while piece := response.read1(65536):
            received.add(piece)
            pace.passed(len(piece))
        received.assert_is(size)

    def put(self, path: str, size: int) -> None:
        self.ask("PUT", path, size)
        for piece in pieces(size):
            self._secure.sendall(piece)
        self._response("PUT").read()

    def ask(self, method: str, path: str, size: int | None = None) -> None:
        length = "" if size is None else f"Content-Length: {size}\r\n"
        self._secure.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode())

    def _response(self, method: str) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(self._secure, method=method)
        response.begin()
        assert response.status == 200
        return response


@contextlib.contextmanager
def connected(proxy: Proxy, protocol: str, **how: Any) -> Iterator[Any]:
    """A client of the proxy: Http1Client or Http2Peer."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    plain.settimeout(TIMEOUT_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.connect(("127.0.0.1", proxy.port))
    context = ssl.create_default_context()
    context.load_verify_locations(proxy.ca_file)
    context.set_alpn_protocols(["h2" if protocol == "h2" else "http/1.1"])
    with context.wrap_socket(plain, server_hostname="localhost") as secure:
        assert secure.selected_alpn_protocol() == ("h2" if protocol == "h2" else "http/1.1")
        if protocol == "h2":
            yield Http2Peer(secure, client_side=True, **how)
        else:
            yield Http1Client(secure, **how)


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("client", "origin"), [("h1", "h1"), ("h2", "h1"), ("h2", "h2")])
def test_upload_to_a_slow_origin(lab: Lab, client: str, origin: str) -> None:
    slow = lab.origin(origin)
    proxy = lab.proxy(slow)
    slow.bytes_per_s = SLOW_BYTES_PER_S
    with connected(proxy, client) as peer:
        peer.put("/big", BODY_BYTES)
    slow.uploads["/big"].assert_is(BODY_BYTES)
    assert proxy.growth_bytes() <= BOUND_BYTES


@pytest.mark.parametrize(("client", "origin"), [("h1", "h1"), ("h2", "h1"), ("h2", "h2")])
def test_download_to_a_slow_client(lab: Lab, client: str, origin: str) -> None:
    proxy = lab.proxy(lab.origin(origin))
    with connected(proxy, client, bytes_per_s=SLOW_BYTES_PER_S) as peer:
        peer.get("/big", size=BODY_BYTES)
    assert proxy.growth_bytes() <= BOUND_BYTES


@pytest.mark.parametrize("client", ["h1", "h2"])
def test_upload_while_a_hook_is_late(lab: Lab, client: str) -> None:
    origin = lab.origin("h1")
    proxy = lab.proxy(origin)
    with connected(proxy, client) as peer:
        peer.put("/late", BODY_BYTES)
    origin.uploads["/late"].assert_is(BODY_BYTES)
    assert proxy.growth_bytes() <= BOUND_BYTES


@pytest.mark.parametrize("client", ["h1", "h2"])
def test_a_refused_upload_is_not_read(lab: Lab, client: str) -> None:
    origin = lab.origin("h1")
    proxy = lab.proxy(origin)
    with connected(proxy, client) as peer, contextlib.suppress(OSError):
        if client == "h2":
            stream_id = peer.ask("PUT", "/refused", BODY_BYTES)
            peer.run_until(lambda: stream_id in peer.ended)
            assert peer.statuses[stream_id] == "502"
        else:
            peer.ask("PUT", "/refused", BODY_BYTES)
            for piece in pieces(BODY_BYTES):
                peer._secure.sendall(piece)
    assert "/refused" not in origin.uploads
    assert proxy.growth_bytes() <= BOUND_BYTES / 2


def test_many_requests_of_one_http2_connection(lab: Lab) -> None:
    """Each has an upstream connection of its own, some 48 KiB, which is forgotten when it has closed."""
    proxy = lab.proxy(lab.origin("h1"))
    with connected(proxy, "h2") as peer:
        for _ in range(50):
            peer.get("/small", size=100)
        proxy.reset_peak()
        for _ in range(500):
            peer.get("/small", size=100)
        assert proxy.growth_bytes() <= 10 * MIB


def test_parallel_streams_of_a_slow_http2_client(lab: Lab) -> None:
    proxy = lab.proxy(lab.origin("h1"))
    with connected(proxy, "h2", bytes_per_s=SLOW_BYTES_PER_S) as peer:
        streams = [peer.ask("GET", f"/{number}?size={BODY_BYTES // 8}") for number in range(8)]
        peer.run_until(lambda: peer.ended.issuperset(streams))
        for stream_id in streams:
            peer.received[stream_id].assert_is(BODY_BYTES // 8)
    assert proxy.growth_bytes() <= BOUND_BYTES


@pytest.mark.parametrize("origin", ["h1", "h2"])
def test_a_client_that_never_grants_credit_is_cut_in_the_end(lab: Lab, origin: str) -> None:
    proxy = lab.proxy(lab.origin(origin), idle_s=2)
    with connected(proxy, "h2", grants=False) as peer:
        stream_id = peer.ask("GET", f"/big?size={BODY_BYTES}")
        with contextlib.suppress(OSError):
            peer.run_until(lambda: stream_id in peer.ended, within_s=20)
            pytest.fail("the response ended")
        assert 0 < peer.received[stream_id].size <= 65535
    assert proxy.growth_bytes() <= BOUND_BYTES


# --- and without the patch --------------------------------------------------------------------------------


def test_stock_mitmproxy_parks_the_download_of_a_slow_client(lab: Lab) -> None:
    proxy = lab.proxy(lab.origin("h1"), stock=True)
    with connected(proxy, "h2", bytes_per_s=SLOW_BYTES_PER_S) as peer:
        peer.get("/big", size=BODY_BYTES)
    assert proxy.growth_bytes() > 2 * BOUND_BYTES


def test_stock_mitmproxy_parks_an_upload_while_a_hook_is_late(lab: Lab) -> None:
    proxy = lab.proxy(lab.origin("h1"), stock=True)
    with connected(proxy, "h2") as peer:
        peer.put("/late", BODY_BYTES)
    assert proxy.growth_bytes() > 2 * BOUND_BYTES


if __name__ == "__main__":
    _main()
