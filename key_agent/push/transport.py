"""How the agent speaks to a proxy: HTTPS (TLS 1.3) with certificates on both sides, connections kept warm.

1. The proxy proves its name to the certificate authority that the administrator gave for it, and to nobody
   else's.
2. A proxy that answers under another id than asked for is refused: envelopes name their audience.
3. Answers are bounded and parsed strictly; what cannot be understood is a failed push, never a success. No
   text of a proxy reaches log, registry or terminal but cut and printable, and nothing is unpacked for it.
4. A kept connection that has died is found out before it is needed, or replaced at once: the withdrawal is
   often the first to use it.
5. Asking who is there never takes the connection that a refresh or a withdrawal needs.
"""

import asyncio
import base64
import binascii
import contextlib
import io
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final, Literal, Self, override

import aiohttp
import msgspec

from envelope.errors import FormatError
from envelope.keys import NetworkService
from key_agent.cancelling import is_to_end
from key_agent.errors import KeyAgentError
from key_agent.registry.model import Proxy

CHALLENGE_SIZE: Final = 16
INSTANCE_SIZE: Final = 16
MAX_ENVELOPES: Final = 1000
MAX_REQUEST_BYTES: Final = 8 << 20
_MAX_ANSWER_BYTES: Final = 16 << 20
# Many are asked at once, any of which may answer with all it is allowed to.
_MAX_PRESENCE_BYTES: Final = 4 << 10
# One for the refresh, one that a withdrawal never has to wait for, one for asking who is there.
_CONNECTIONS_PER_PROXY: Final = 3
# Longer than the refresh interval, so that a withdrawal finds a connection open.
_KEEPALIVE_S: Final = 420
# Middle boxes forget connections that are silent for minutes, and tell nobody (the shortest known: 240 s).
_PROBE_AFTER_S: Final = 30
_MAX_TEXT: Final = 300


class Purpose(StrEnum):
    """What something is sent for. A proxy keeps a rate and places of their own for withdrawals."""

    KEYS = "keys"
    WITHDRAWAL = "withdrawal"


class PushError(KeyAgentError):
    """The proxy did not take what was sent. `code` is stable: for status, metrics and audit."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldService:
    """What a proxy says of a network service of ours: hosted under which certificate, holding which keys."""

    owner: NetworkService
    certificate_sha256: str
    key_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A proxy's challenge, good until the next session or its restart."""

    proxy_id: str
    challenge: bytes | None
    """None: the proxy cannot be asked; only what follows an earlier session, by a broker, is believed."""
    time_ms: int
    services: tuple[HeldService, ...]
    instance: bytes | None = None
    """INSTANCE_SIZE bytes that tell this start of the proxy from every other; None: it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A proxy is there; `instance` as in `Session`."""

    proxy_id: str
    instance: bytes
    time_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentWord:
    """What proxies are told of this environment (proxy/environments.py)."""

    environment: str
    state: str
    reason: str | None
    term: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentInForce:
    """What a proxy acts on: a newer word than ours may be. Another *instance* has forgotten it."""

    state: str
    term: int
    epoch: int
    instance: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A proxy's word on one envelope."""

    accepted: bool
    owner: NetworkService | None
    sequence: int = 0
    keys: int = 0
    valid_for_s: float = 0.0
    code: str = ""
    detail: str = ""


class Transport(ABC):
    """One way to the proxies. Raises PushError and nothing else on failure; has no time-out of its own."""

    @abstractmethod
    async def open_session(self, proxy: Proxy, *, purpose: Purpose = Purpose.KEYS) -> Session:
        """Ask for a challenge. PushError if the proxy cannot be reached or is not who it should be."""

    @abstractmethod
    async def presence(self, proxy: Proxy) -> Presence:
        """Ask who is there: changes nothing at the proxy. PushError as for `open_session`."""

    @abstractmethod
    async def send(
        self,
        proxy: Proxy,
        tokens: Sequence[str],
        *,
        challenge: bytes | None = None,
        purpose: Purpose = Purpose.KEYS,
    ) -> list[Answer]:
        """Deliver envelopes, at most MAX_ENVELOPES and MAX_REQUEST_BYTES; one answer each, in order.

        *challenge*: the one that they answer, None if they answer none.
        """

    @abstractmethod
    async def tell_environment(self, proxy: Proxy, word: EnvironmentWord) -> EnvironmentInForce:
        """Tell what this environment is; in force there when it is answered. PushError as for `open_session`,
        "environment" if the proxy belongs to another one."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of every connection. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


_Name = Annotated[str, msgspec.Meta(max_length=127)]
_Code = Annotated[str, msgspec.Meta(max_length=63, pattern="^[a-z0-9-]*$")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=2**31)]


class _Held(msgspec.Struct):
    kid: _Name


class _Service(msgspec.Struct):
    service: _Name
    certificate_sha256: _Name
    holds: list[_Held] = []


class _SessionAnswer(msgspec.Struct):
    proxy: _Name
    challenge: _Name
    time_ms: _Count
    services: list[_Service] = []
    instance: _Name | None = None


class _PresenceAnswer(msgspec.Struct):
    proxy: _Name
    instance: _Name
    time_ms: _Count


class _WordAnswer(msgspec.Struct):
    state: _Name
    term: _Count
    epoch: _Count
    instance: _Name


class _Receipt(msgspec.Struct):
    status: Literal["accepted", "refused"]
    service: _Name | None = None
    sequence: _Count = 0
    keys: _Count = 0
    valid_for_s: _Seconds = 0.0
    code: _Code = ""
    detail: str = ""


class _Receipts(msgspec.Struct):
    receipts: list[_Receipt]


class _Problem(msgspec.Struct):
    code: _Code = ""
    detail: str = ""
    title: str = ""


class HttpsTransport(Transport):
    def __init__(
        self,
        *,
        agent_id: str,
        certificate_file: Path,
        key_file: Path,
        signing_certificate_file: Path | None = None,
    ) -> None:
        """*signing_certificate_file*: introduced to each proxy, which verifies its chain."""
        self._agent_id = agent_id
        self._signing_certificate_file = signing_certificate_file
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._clients: dict[Proxy, aiohttp.ClientSession] = {}
        self._identity: tuple[int, ...] = ()
        self._has_looked = False
        """At the own files, in this turn of the event loop: many requests at once share one look."""
        self._contexts: dict[str, ssl.SSLContext] = {}
        """By authority: a thousand proxies under one need one."""

    @override
    async def open_session(self, proxy: Proxy, *, purpose: Purpose = Purpose.KEYS) -> Session:
        body = msgspec.json.encode({"agent": self._agent_id} | self._introduction())
        answer = _decode(await self._request(proxy, _path("session", purpose), body), _SessionAnswer)
        _check_id(proxy, answer.proxy)
        return Session(
            proxy_id=answer.proxy,
            challenge=_bytes("challenge", answer.challenge, CHALLENGE_SIZE),
            instance=None if answer.instance is None else _bytes("instance", answer.instance, INSTANCE_SIZE),
            time_ms=answer.time_ms,
            services=tuple(
                HeldService(
                    owner=_owner(service.service),
                    certificate_sha256=service.certificate_sha256.lower(),
                    key_ids=tuple(held.kid for held in service.holds),
                )
                for service in answer.services
            ),
        )

    @override
    async def presence(self, proxy: Proxy) -> Presence:
        content = await self._request(proxy, "/push/v1/presence", None, limit_bytes=_MAX_PRESENCE_BYTES)
        answer = _decode(content, _PresenceAnswer)
        _check_id(proxy, answer.proxy)
        return Presence(
            proxy_id=answer.proxy,
            instance=_bytes("instance", answer.instance, INSTANCE_SIZE),
            time_ms=answer.time_ms,
        )

    @override
    async def send(
        self,
        proxy: Proxy,
        tokens: Sequence[str],
        *,
        challenge: bytes | None = None,
        purpose: Purpose = Purpose.KEYS,
    ) -> list[Answer]:
        del challenge  # it is inside the envelopes
        body = msgspec.json.encode({"envelopes": list(tokens)})
        return read_receipts(await self._request(proxy, _path("envelopes", purpose), body), len(tokens))

    @override
    async def tell_environment(self, proxy: Proxy, word: EnvironmentWord) -> EnvironmentInForce:
        content = await self._request(
            proxy,
            "/push/v1/environment",
            msgspec.json.encode(word),
            method="PUT",
            limit_bytes=_MAX_PRESENCE_BYTES,
        )
        answer = _decode(content, _WordAnswer)
        return EnvironmentInForce(
            state=answer.state,
            term=answer.term,
            epoch=answer.epoch,
            instance=_bytes("instance", answer.instance, INSTANCE_SIZE),
        )

    @override
    async def close(self) -> None:
        clients = list(self._clients.values())
        self._clients.clear()
        self._contexts.clear()
        for client in clients:
            await client.close()

    def _introduction(self) -> dict[str, str]:
        if self._signing_certificate_file is None:
            return {}
        try:
            return {"signing_certificate": self._signing_certificate_file.read_text(encoding="ascii")}
        except (OSError, ValueError) as error:
            raise PushError("signing-certificate", f"own signing certificate: {_reason(error)}") from error

    async def _request(
        self,
        proxy: Proxy,
        path: str,
        body: bytes | None,
        *,
        method: str | None = None,
        limit_bytes: int = _MAX_ANSWER_BYTES,
    ) -> bytes:
        """POST *body*, or GET where there is none, unless *method* says otherwise."""
        client = await self._client(proxy)
        method = method or ("GET" if body is None else "POST")
        try:
            try:
                return await self._exchange(client, method, path, body, limit_bytes)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError):
                # A kept connection that the proxy or somebody between had given up: once more, on a new one.
                if client.closed:  # the proxy's address has changed meanwhile
                    raise
                return await self._exchange(client, method, path, body, limit_bytes)
        except aiohttp.ClientSSLError as error:
            raise PushError("tls", f"{proxy.url}: {_reason(error)}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PushError("unreachable", f"{proxy.url}: {_reason(error)}") from error
        except asyncio.CancelledError as error:
            if is_to_end():
                raise
            # Another request has found that the own certificate, or the proxy's address, is another one.
            raise PushError("unreachable", f"{proxy.url}: it was let go") from error

    async def _exchange(
        self, client: aiohttp.ClientSession, method: str, path: str, body: bytes | None, limit_bytes: int
    ) -> bytes:
        # As a stream: aiohttp warns of large `bytes`.
        data = None if body is None else io.BytesIO(body)
        async with client.request(method, path, data=data, allow_redirects=False) as response:
            answer = await _read_bounded(response, limit_bytes)
            if response.status != 200:
                raise _problem(response.status, answer)
            return answer

    async def _client(self, proxy: Proxy) -> aiohttp.ClientSession:
        await self._look_at_files()
        if (client := self._clients.get(proxy)) is not None:
            return client
        for stale in [known for known in self._clients if known.id == proxy.id]:
            await self._clients.pop(stale).close()  # its address or its authority changed
        try:
            context = self._context(proxy.ca_pem)
        except (OSError, ValueError) as error:
            raise PushError("tls", f"own certificate or {proxy.id}'s authority: {_reason(error)}") from error
        client = aiohttp.ClientSession(
            base_url=proxy.url,
            connector=aiohttp.TCPConnector(
                ssl=context,
                limit=_CONNECTIONS_PER_PROXY,
                keepalive_timeout=_KEEPALIVE_S,
                socket_factory=_probing_socket,
            ),
            auto_decompress=False,  # a bomb in it would unpack before it is counted
            timeout=aiohttp.ClientTimeout(total=None),  # the caller's deadline counts
            headers={
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
                "User-Agent": "sealgate-key-agent",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        self._clients[proxy] = client
        return client

    async def _look_at_files(self) -> None:
        if self._has_looked:
            return
        self._has_looked = True
        asyncio.get_running_loop().call_soon(self._look_again)
        identity = _identity(self._certificate_file, self._key_file)
        if identity != self._identity:
            # The own certificate was renewed: its files are read for the connections from now on.
            await self.close()
            self._identity = identity

    def _look_again(self) -> None:
        self._has_looked = False

    def _context(self, ca_pem: str) -> ssl.SSLContext:
        if (context := self._contexts.get(ca_pem)) is None:
            context = client_context(ca_pem, self._certificate_file, self._key_file)
            self._contexts[ca_pem] = context
        return context


def read_receipts(content: bytes, count: int) -> list[Answer]:
    """The *count* answers in a proxy's receipts (JSON). PushError `bad-answer` if it is anything else."""
    answer = _decode(content, _Receipts)
    if len(answer.receipts) != count:
        raise PushError("bad-answer", f"{len(answer.receipts)} receipts for {count} envelopes")
    return [
        Answer(
            accepted=receipt.status == "accepted",
            owner=None if receipt.service is None else _owner(receipt.service),
            sequence=receipt.sequence,
            keys=receipt.keys,
            valid_for_s=receipt.valid_for_s,
            code=receipt.code,
            detail=_printable(receipt.detail),
        )
        for receipt in answer.receipts
    ]


def _path(what: str, purpose: Purpose) -> str:
    """Proxies before 0.2 read no purpose: they take withdrawals as they take keys."""
    path = f"/push/v1/{what}"
    return path if purpose is Purpose.KEYS else f"{path}?purpose={purpose}"


def _identity(*files: Path) -> tuple[int, ...]:
    """Tells these contents of *files* from others. A missing one is found when it is read."""
    found: list[int] = []
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found += [status.st_mtime_ns, status.st_ino, status.st_size]
    return tuple(found)


def client_context(ca_pem: str, certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """TLS 1.3, our certificate, trust in that authority alone. OSError, ValueError if a file is no good."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks names and chains
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=ca_pem)
    context.load_cert_chain(certificate_file, key_file)
    return context


def _probing_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return made


async def _read_bounded(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    answer = bytearray()
    async for piece in response.content.iter_chunked(1 << 16):
        answer += piece
        if len(answer) > limit_bytes:
            response.close()
            raise PushError("bad-answer", f"more than {limit_bytes} bytes")
    return bytes(answer)


def _problem(status: int, answer: bytes) -> PushError:
    try:
        problem = _parsed(answer, _Problem)
    except ValueError:
        problem = _Problem()
    text = _printable(problem.detail or problem.title)
    return PushError(problem.code or f"http-{status}", f"HTTP {status} {text}".strip())


def _decode[T](answer: bytes, shape: type[T]) -> T:
    try:
        return _parsed(answer, shape)
    except ValueError as error:
        raise PushError("bad-answer", _printable(str(error))) from None


def _parsed[T](answer: bytes, shape: type[T]) -> T:
    """*answer* as *shape*; ValueError for whatever else it is."""
    try:
        return msgspec.json.decode(answer, type=shape)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _printable(text: str) -> str:
    """A stranger's text, fit for logs and terminals."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_TEXT])


def _check_id(proxy: Proxy, told: str) -> None:
    if told != proxy.id:
        raise PushError("wrong-proxy", f"{proxy.url} says it is {told!r}, not {proxy.id!r}")


def _bytes(name: str, text: str, size: int) -> bytes:
    """What *text* encodes, *size* bytes. PushError `bad-answer` if it is anything else."""
    try:
        found = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if len(found) != size:
        raise PushError("bad-answer", f"the {name} is not {size} bytes in base64url")
    return found


def _owner(text: str) -> NetworkService:
    try:
        return NetworkService.parse(text)
    except FormatError as error:
        raise PushError("bad-answer", _printable(str(error))) from None


def _reason(error: BaseException) -> str:
    return _printable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


async def within[T](timeout_s: float, what: str, work: "asyncio.Future[T] | asyncio.Task[T]") -> T:
    """The result of *work*, or PushError `timeout`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise PushError("timeout", f"{what}: no answer within {timeout_s:g} s") from None
