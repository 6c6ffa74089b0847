"""A connection to NATS: settings, TLS on both sides, and keeping it up.

1. TLS 1.3 with our own certificate, or no connection: `urls` name nothing else, and who answers there has no
   say in it (the library would go on in the clear with a server that asks for no TLS).
2. The client library is an extra (`nats`). Who configures a broker without it is told what to install.
3. A broker that is not there is no error of ours: the connection is tried again for ever, and whoever wants
   to use it asks whether it is up.
4. Nobody who took the broker's place fills our memory: the library keeps whatever comes until it is whole, so
   a message that says it is larger than any, or a line without an end, ends the connection. Nor does he hold
   up the event loop: no line takes the library longer than it is long.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from envelope.errors import SealgateError
from runtime.settings import SettingsError
from runtime.tls import TlsError, client_context

RECONNECT_S: Final = 1.0
CONNECT_S: Final = 5.0
CLOSE_S: Final = 2.0
_PING_S: Final = 5
_PENDING_BYTES: Final = 8 << 20
MOST_MESSAGE_BYTES: Final = 64 << 20
"""No server can be told to take larger ones (max_payload)."""
MOST_LINE_BYTES: Final = 1 << 20
"""Of the protocol: what a server says of itself is the longest, with the addresses of its cluster."""
_INFO: Final = re.compile(rb"\AINFO\s++([^\r\n]++)\r\n")
_log: Final = structlog.get_logger("broker")


class BrokerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[nats]` section of agent and proxy: an optional road for envelopes beside the direct one."""

    urls: list[str]
    """tls://host:port, one or more of a cluster."""
    ca_file: Path
    """PEM: who vouches for the broker."""
    certificate_file: Path
    """PEM, for clients; the broker maps it to permissions."""
    key_file: Path
    credentials_file: Path | None = None
    """A `.creds` file (JWT and seed), where the broker wants one besides."""
    stream: str = "SEALGATE"
    """The JetStream stream; the agent makes it if it may and there is none."""
    receipt_timeout_s: float = 2.0
    """The agent: without receipts after so long it pushes directly."""

    def __post_init__(self) -> None:
        if not self.urls or not all(url.startswith("tls://") for url in self.urls):
            raise ValueError("nats.urls must name at least one tls://host:port, and nothing but those")
        if not 0.1 <= self.receipt_timeout_s <= 30:
            raise ValueError("nats.receipt_timeout_s must be between 0.1 and 30")
        if not self.stream or not self.stream.replace("-", "").replace("_", "").isalnum():
            raise ValueError("nats.stream must consist of letters, digits, - and _")


class BrokerError(SealgateError):
    """The broker did not do what it was asked."""


def check_library() -> None:
    """SettingsError unless the client library is installed."""
    try:
        import nats  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise SettingsError(
            "[nats]",
            "",
            allowed="needs the NATS client: install nats-py from the lock file, or leave the section out",
        ) from None


def unusable_files(settings: BrokerSettings) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files that *settings* name, and those of them that hold secrets."""
    secrets = {"nats.key_file": settings.key_file}
    if settings.credentials_file is not None:
        secrets["nats.credentials_file"] = settings.credentials_file
    return {"nats.ca_file": settings.ca_file, "nats.certificate_file": settings.certificate_file}, secrets


@asynccontextmanager
async def connected(settings: BrokerSettings, *, name: str) -> AsyncIterator[Any]:
    """A NATS client that reconnects for ever, connected once; closed when the block ends.

    BrokerError if there is no connection now. TlsError for files that are no good.
    """
    from nats.aio.client import Client  # noqa: PLC0415 - an extra
    from nats.errors import ProtocolError, SecureConnRequiredError  # noqa: PLC0415
    from nats.protocol import parser  # noqa: PLC0415

    # The library's own tries each number of blanks with each rest of the line: an hour for one of a megabyte.
    parser.INFO_RE = _INFO

    class Bounded(parser.Parser):  # type: ignore[misc]  # the library is an extra
        async def parse(self, data: bytes = b"") -> None:
            await super().parse(data)
            in_line = self.state == parser.AWAITING_CONTROL_LINE
            if len(self.buf) > MOST_LINE_BYTES if in_line else self.needed > MOST_MESSAGE_BYTES:
                raise ProtocolError

    class TlsOnly(Client):  # type: ignore[misc]  # the library is an extra
        def __init__(self) -> None:
            super().__init__()
            self._ps = Bounded(self)

        async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
            # At each connection, before anything is sent: TLS begins by the server's word alone.
            if initial_connection and not info.get("tls_required"):
                raise SecureConnRequiredError
            await super()._process_info(info, initial_connection=initial_connection)

    async def told(error: Exception) -> None:
        _log.debug("broker", error=f"{type(error).__name__}: {error}")

    client = TlsOnly()
    options: dict[str, Any] = {}
    if settings.credentials_file is not None:
        options["user_credentials"] = str(settings.credentials_file)
    context = client_context(settings.ca_file, settings.certificate_file, settings.key_file)
    try:
        # It would try for ever, and tell nobody.
        async with asyncio.timeout(CONNECT_S):
            await client.connect(
                servers=list(settings.urls),
                name=name,
                tls=context,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_S,
                connect_timeout=5,
                ping_interval=_PING_S,
                error_cb=told,
                pending_size=_PENDING_BYTES,
                **options,
            )
    except BaseException as error:
        await _let_go(client)
        if isinstance(error, broker_failures()):
            raise BrokerError(f"{', '.join(settings.urls)}: {_reason(error)}") from None
        raise
    try:
        yield client
    finally:
        await _let_go(client)


async def _let_go(client: Any) -> None:
    with suppress(*broker_failures()):
        # It would wait for ever for a broker that takes nothing more.
        async with asyncio.timeout(CLOSE_S):
            await client.close()


def broker_failures() -> tuple[type[Exception], ...]:
    """What the client raises when the broker is away, slow, or refuses."""
    from nats.errors import Error  # noqa: PLC0415 - an extra

    return (Error, OSError, asyncio.TimeoutError, asyncio.InvalidStateError)


def link_failures() -> tuple[type[Exception], ...]:
    """What `connected` and the use of its client raise: try again later."""
    return (BrokerError, TlsError, *broker_failures())


def in_payloads(tokens: list[str], *, most_bytes: int) -> Iterator[list[str]]:
    """*tokens* in parts of at most *most_bytes*. BrokerError if one alone is larger."""
    part: list[str] = []
    size = 0
    for token in tokens:
        if len(token) >= most_bytes:
            raise BrokerError(f"an envelope of {len(token)} bytes does not fit the broker's messages")
        if part and size + len(token) + 1 > most_bytes:
            yield part
            part, size = [], 0
        part.append(token)
        size += len(token) + 1
    if part:
        yield part


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
