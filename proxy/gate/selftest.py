"""A rehearsal of the gate at start, in memory: what is installed must refuse, or the process must not start.

Three flows that must not reach the origin (the addon raises, the addon is silent, the transform fails in
mid-body) and one that must, sealed. It runs whatever stands at mitmproxy's names, so it also notices that
`install` was forgotten or undone: with mitmproxy's own classes it fails.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, override

from mitmproxy import addonmanager, options
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.addons.tlsconfig import TlsConfig
from mitmproxy.connection import ConnectionState
from mitmproxy.http import HTTPFlow
from mitmproxy.proxy import commands, events, layer, layers, mode_servers, server
from mitmproxy.proxy.layers.http import HTTPMode
from mitmproxy.proxy.mode_specs import ProxyMode

from proxy.gate.permit import CLEAR, Piece, Transform, permit

CANARY: Final = b"canary-7c41-in-clear"
_PIECES: Final = 4
_BODY_BYTES: Final = _PIECES * len(CANARY)
_PATIENCE_S: Final = 5.0


class SelfTestError(Exception):
    """The gate does not hold: do not start."""


class _Inverting(Transform):
    """Stands for a sealer; fails on the piece *fails_at*."""

    def __init__(self, fails_at: int = -1) -> None:
        self.expected_out_bytes = _BODY_BYTES
        self._fails_at = fails_at
        self._seen = 0

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        self._seen += 1
        if self._seen == self._fails_at:
            raise RuntimeError("rehearsed failure")
        return [bytes(byte ^ 0xFF for byte in piece)]

    @override
    def finish(self) -> list[Piece]:
        return []


class _Wire:
    """A stream writer that keeps what is written; also its own transport."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_aborted = False
        self.is_closed = False
        self.transport = self

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = self.is_closed = True

    def write_eof(self) -> None:
        pass

    async def drain(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 1) if name in ("peername", "sockname") else default


class _Addon:
    def __init__(self, requestheaders: Callable[[HTTPFlow], None]) -> None:
        self.requestheaders = requestheaders

    def next_layer(self, chosen: layer.NextLayer) -> None:
        chosen.layer = layers.HttpLayer(chosen.context, HTTPMode.transparent)

    def responseheaders(self, flow: HTTPFlow) -> None:
        permit(flow).response = CLEAR


class _Master:
    def __init__(self, addon: _Addon) -> None:
        self.options = options.Options()
        for addon_class in (Proxyserver, TlsConfig):
            addon_class().load(addonmanager.Loader(self))  # type: ignore[no-untyped-call]
        self.options.update(connection_strategy="lazy")  # type: ignore[no-untyped-call]
        self.addons = addonmanager.AddonManager(self)  # type: ignore[no-untyped-call]
        self.addons.chain = [addon]


def _raises(_flow: HTTPFlow) -> None:
    raise RuntimeError("rehearsed failure")


def _is_silent(_flow: HTTPFlow) -> None:
    pass


def _fails_in_mid_body(flow: HTTPFlow) -> None:
    flow.request.stream = permit(flow).request = _Inverting(fails_at=3)


def _seals(flow: HTTPFlow) -> None:
    flow.request.stream = permit(flow).request = _Inverting()


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    decide: Callable[[HTTPFlow], None]
    upstream_bytes: int
    """Of the body: how many may have reached the origin."""
    cut: bool


_CASES: Final = (
    _Case("the addon raises", _raises, 0, cut=False),
    _Case("the addon is silent", _is_silent, 0, cut=False),
    _Case("the transform fails in mid-body", _fails_in_mid_body, 2 * len(CANARY), cut=True),
    _Case("the body is sealed", _seals, _BODY_BYTES, cut=False),
)


async def self_test() -> None:
    """Rehearse every case; SelfTestError says which promise did not hold."""
    ours = logging.getLogger("proxy.gate")
    level = ours.level
    ours.setLevel(logging.CRITICAL)  # Rehearsed errors would alarm whoever reads the log.
    try:
        for case in _CASES:
            if problem := await _problem(case):
                raise SelfTestError(f"self-test of the gate: {case.name}: {problem}")
    finally:
        ours.setLevel(level)


async def _problem(case: _Case) -> str | None:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            client, upstream = await _run(case.decide)
    except TimeoutError:
        return f"no end within {_PATIENCE_S} s"
    return _judge(case, client, upstream)


def _judge(case: _Case, client: _Wire, upstream: _Wire | None) -> str | None:
    _, _, body = (upstream.written if upstream else b"").partition(b"\r\n\r\n")
    status = client.written[9:12]
    if CANARY in body:
        return "plaintext reached the origin"
    if len(body) != case.upstream_bytes:
        return f"{len(body)} bytes of a body reached the origin, not {case.upstream_bytes}"
    if upstream is not None and upstream.is_aborted != case.cut:
        return "the body was ended properly" if case.cut else "the upstream connection was aborted"
    if case.upstream_bytes == _BODY_BYTES:
        return None if status == b"200" else f"the client was told {bytes(status)!r}"
    if status != b"502" or b"Sealgate-Error: " not in client.written or b"Server:" in client.written:
        return f"the client was told {bytes(status)!r}"
    return None


async def _run(decide: Callable[[HTTPFlow], None]) -> tuple[_Wire, _Wire | None]:
    """One PUT through whatever is installed. Returns what the client and the origin have received."""
    upstreams: list[_Wire] = []

    class Rehearsal(mode_servers.ProxyConnectionHandler):
        @override
        async def open_connection(self, command: commands.OpenConnection) -> None:
            wire, connection = _Wire(), command.connection
            upstreams.append(wire)
            reader = asyncio.StreamReader()
            connection.state = ConnectionState.OPEN
            self.transports[connection] = server.ConnectionIO(asyncio.current_task(), reader, wire)  # type: ignore[arg-type]
            await self.server_event(events.OpenConnectionCompleted(command, None))
            answers = asyncio.create_task(_answer(wire, reader), name="self-test origin")
            try:
                await self.handle_connection(connection)
            finally:
                answers.cancel()

    master = _Master(_Addon(decide))
    reader, client = asyncio.StreamReader(), _Wire()
    mode = ProxyMode.parse("reverse:http://origin.test:80")
    handler = Rehearsal(master, reader, client, master.options, mode)  # type: ignore[no-untyped-call]
    handler.layer = layers.modes.ReverseProxy(handler.layer.context)
    serving = asyncio.create_task(handler.handle_client(), name="self-test client")
    try:
        reader.feed_data(b"PUT /x HTTP/1.1\r\nHost: origin.test\r\nContent-Length: %d\r\n\r\n" % _BODY_BYTES)
        for _ in range(_PIECES):
            await _settle()
            reader.feed_data(CANARY)
        while b"\r\n\r\n" not in client.written and not client.is_closed:  # noqa: ASYNC110 - in memory
            await asyncio.sleep(0)
        await _settle()
        reader.feed_eof()
        await serving
    finally:
        serving.cancel()
    return client, upstreams[0] if upstreams else None


async def _settle() -> None:
    for _ in range(32):
        await asyncio.sleep(0)


async def _answer(wire: _Wire, reader: asyncio.StreamReader) -> None:
    while len(wire.written.partition(b"\r\n\r\n")[2]) < _BODY_BYTES:  # noqa: ASYNC110 - in memory
        await asyncio.sleep(0)
    reader.feed_data(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
