"""A proxy under attack: a recording origin that lies as told, and clients that speak by the byte."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from certs.pki import Credential
from envelope.keys import NetworkService
from proxy.limits import ClientLimits
from proxy.tenants.model import LegacyPolicy, ServiceEntry
from tests import pki
from tests.fakes.origin import End, RecordingOrigin
from tests.integration.proxy_rig import Rig, proxy

CANARY = b"canary-52d9-in-the-clear-" * 8
FIRST_BYTE_S = 60.0
type Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def server_tls(directory: Path, ca: Credential, names: list[str], stem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pki.write_credential(pki.issue_server(ca, names), directory, stem))
    return context


@dataclass(frozen=True, slots=True)
class Siege:
    rig: Rig
    origin: RecordingOrigin
    service: ServiceEntry

    @property
    def owner(self) -> NetworkService:
        return self.service.owner

    def nothing_left(self) -> bool:
        """No plaintext arrived, and no body with a proper end."""
        return not self.origin.saw(CANARY) and not any(
            exchange.end is End.COMPLETE and exchange.body for exchange in self.origin.exchanges
        )

    def trust(self, tenant: str = "acme", *, http2: bool = False) -> ssl.SSLContext:
        entry = self.rig.tenants[tenant]
        context = ssl.create_default_context(cafile=entry.interception_ca.certificate_file)
        context.set_alpn_protocols(["h2"] if http2 else ["http/1.1"])
        return context

    async def sealed(self, plain: bytes) -> bytes:
        """What the service stores of *plain*."""
        assert (await self.rig.ask(self.service, "/x", "-T", "-", body=plain)).status == 200
        return bytes(self.origin.exchanges[-1].body)

    @contextlib.asynccontextmanager
    async def reverse(
        self, service: ServiceEntry | None = None, *, http2: bool = False
    ) -> AsyncIterator[Stream]:
        """TLS to a reverse listener."""
        entry = service or self.service
        assert entry.reverse_listen is not None
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            entry.reverse_listen.port,
            ssl=self.trust(entry.owner.tenant, http2=http2),
            server_hostname="127.0.0.1",
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def forward(self, tenant: str = "acme") -> AsyncIterator[Stream]:
        """The clear leg to a forward listener."""
        listen = self.rig.tenants[tenant].forward_listen
        assert listen is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", listen.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def connect(
        self, stream: Stream, target: str, *, server_name: str | None = None, http2: bool = False
    ) -> Stream:
        """CONNECT, and with *server_name* TLS inside of it."""
        reader, writer = stream
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        if server_name is not None:
            await writer.start_tls(self.trust(http2=http2), server_hostname=server_name)
        return reader, writer


@contextlib.asynccontextmanager
async def besieged(
    directory: Path, *, legacy: LegacyPolicy = LegacyPolicy.STRICT, limits: ClientLimits | None = None
) -> AsyncIterator[Siege]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, directory, "server-ca")
    tls = server_tls(directory, ca, ["localhost", "127.0.0.1"], "server")
    async with RecordingOrigin(tls).listening() as origin, proxy(directory, ca_file, limits=limits) as rig:
        rig.tenant("acme")
        service = rig.service("acme/files", f"https://localhost:{origin.port}", legacy=legacy)
        rig.push(service.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        async with asyncio.TaskGroup() as group:
            cutter = group.create_task(rig.engine.cut_ended(), name="cut")
            yield Siege(rig, origin, service)
            cutter.cancel()


async def answers(stream: Stream, request: bytes, *, within_s: float = 10) -> bytes:
    """Everything that comes back, until the proxy closes, or *within_s* have gone without a byte more.

    For the first byte it has FIRST_BYTE_S: a busy machine's proxy is not one that says nothing.
    """
    reader, writer = stream
    writer.write(request)
    got = b""
    with contextlib.suppress(OSError, TimeoutError):
        while data := await asyncio.wait_for(reader.read(1 << 16), within_s if got else FIRST_BYTE_S):
            got += data
    return got


class Http2Client:
    """Speaks HTTP/2 without checking what it sends."""

    def __init__(self, stream: Stream) -> None:
        self.reader, self.writer = stream
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []

    async def ask(
        self, headers: Iterable[tuple[str, str]], body: bytes | None = None, *, within_s: float = FIRST_BYTE_S
    ) -> tuple[str | None, dict[str, str], bytes, bool]:
        """Status (None: stream or connection was cut), header fields, body, whether it is complete."""
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, list(headers), end_stream=body is None)
        if body is not None:
            self.h2.send_data(stream_id, body, end_stream=True)
        self.writer.write(self.h2.data_to_send())
        status, fields, content = None, {}, b""
        with contextlib.suppress(OSError, TimeoutError, h2.exceptions.ProtocolError):
            while data := await asyncio.wait_for(self.reader.read(1 << 16), within_s):
                for event in self.h2.receive_data(data):
                    match event:
                        case h2.events.ResponseReceived(stream_id=which) if which == stream_id:
                            fields = {str(name): str(value) for name, value in event.headers}
                            status = fields[":status"]
                        case h2.events.DataReceived(stream_id=which) if which == stream_id:
                            content += event.data
                            self.h2.acknowledge_received_data(event.flow_controlled_length, which)
                        case h2.events.StreamEnded(stream_id=which) if which == stream_id:
                            return status, fields, content, True
                        case h2.events.StreamReset(stream_id=which) if which == stream_id:
                            return status, fields, content, False
                self.writer.write(self.h2.data_to_send())
        return status, fields, content, False
