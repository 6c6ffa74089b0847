"""How the agent speaks to a proxy: HTTPS (TLS 1.3) with certificates on both sides, connections kept warm.

1. The proxy proves its name to the certificate authority that the administrator gave for it, and to nobody
   else's.
2. A proxy that answers under another id than asked for is refused: envelopes name their audience.
3. Answers are bounded and parsed strictly; what cannot be understood is a failed push, never a success.
"""

import asyncio
import base64
import binascii
import io
import ssl
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, override

import aiohttp
import msgspec

from envelope.errors import FormatError
from envelope.keys import NetworkService
from key_agent.errors import KeyAgentError
from key_agent.registry.model import Proxy

CHALLENGE_SIZE: Final = 16
MAX_ENVELOPES: Final = 1000
MAX_REQUEST_BYTES: Final = 8 << 20
_MAX_ANSWER_BYTES: Final = 16 << 20
# One for the refresh, one that a withdrawal never has to wait for.
_CONNECTIONS_PER_PROXY: Final = 2
# Longer than the refresh interval, so that a withdrawal finds a connection open.
_KEEPALIVE_S: Final = 420


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
    challenge: bytes
    time_ms: int
    services: tuple[HeldService, ...]


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
    async def open_session(self, proxy: Proxy) -> Session:
        """Ask for a challenge. PushError if the proxy cannot be reached or is not who it should be."""

    @abstractmethod
    async def send(self, proxy: Proxy, tokens: Sequence[str]) -> list[Answer]:
        """Deliver envelopes, at most MAX_ENVELOPES and MAX_REQUEST_BYTES; one answer each, in order."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of every connection. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Held(msgspec.Struct):
    kid: str


class _Service(msgspec.Struct):
    service: str
    certificate_sha256: str
    holds: list[_Held] = []


class _SessionAnswer(msgspec.Struct):
    proxy: str
    challenge: str
    time_ms: int
    services: list[_Service] = []


class _Receipt(msgspec.Struct):
    status: Literal["accepted", "refused"]
    service: str | None = None
    sequence: int = 0
    keys: int = 0
    valid_for_s: float = 0.0
    code: str = ""
    detail: str = ""


class _Receipts(msgspec.Struct):
    receipts: list[_Receipt]


class _Problem(msgspec.Struct):
    code: str = ""
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

    @override
    async def open_session(self, proxy: Proxy) -> Session:
        body = msgspec.json.encode({"agent": self._agent_id} | self._introduction())
        answer = _decode(await self._post(proxy, "/push/v1/session", body), _SessionAnswer)
        if answer.proxy != proxy.id:
            raise PushError("wrong-proxy", f"{proxy.url} says it is {answer.proxy!r}, not {proxy.id!r}")
        return Session(
            proxy_id=answer.proxy,
            challenge=_challenge(answer.challenge),
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
    async def send(self, proxy: Proxy, tokens: Sequence[str]) -> list[Answer]:
        body = msgspec.json.encode({"envelopes": list(tokens)})
        answer = _decode(await self._post(proxy, "/push/v1/envelopes", body), _Receipts)
        if len(answer.receipts) != len(tokens):
            raise PushError("bad-answer", f"{len(answer.receipts)} receipts for {len(tokens)} envelopes")
        return [
            Answer(
                accepted=receipt.status == "accepted",
                owner=None if receipt.service is None else _owner(receipt.service),
                sequence=receipt.sequence,
                keys=receipt.keys,
                valid_for_s=receipt.valid_for_s,
                code=receipt.code,
                detail=receipt.detail[:300],
            )
            for receipt in answer.receipts
        ]

    @override
    async def close(self) -> None:
        clients = list(self._clients.values())
        self._clients.clear()
        for client in clients:
            await client.close()

    def _introduction(self) -> dict[str, str]:
        if self._signing_certificate_file is None:
            return {}
        try:
            return {"signing_certificate": self._signing_certificate_file.read_text(encoding="ascii")}
        except (OSError, ValueError) as error:
            raise PushError("signing-certificate", f"own signing certificate: {_reason(error)}") from error

    async def _post(self, proxy: Proxy, path: str, body: bytes) -> bytes:
        client = await self._client(proxy)
        try:
            try:
                return await self._exchange(client, path, body)
            except (aiohttp.ServerDisconnectedError, ConnectionResetError):
                # A kept connection that the proxy had closed: once more, on a new one.
                return await self._exchange(client, path, body)
        except aiohttp.ClientSSLError as error:
            raise PushError("tls", f"{proxy.url}: {_reason(error)}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PushError("unreachable", f"{proxy.url}: {_reason(error)}") from error

    async def _exchange(self, client: aiohttp.ClientSession, path: str, body: bytes) -> bytes:
        # As a stream: aiohttp warns of large `bytes`.
        async with client.post(path, data=io.BytesIO(body), allow_redirects=False) as response:
            answer = await _read_bounded(response)
            if response.status != 200:
                raise _problem(response.status, answer)
            return answer

    async def _client(self, proxy: Proxy) -> aiohttp.ClientSession:
        if (client := self._clients.get(proxy)) is not None:
            return client
        for stale in [known for known in self._clients if known.id == proxy.id]:
            await self._clients.pop(stale).close()  # its address or its authority changed
        try:
            context = client_context(proxy.ca_pem, self._certificate_file, self._key_file)
        except (OSError, ValueError) as error:
            raise PushError("tls", f"own certificate or {proxy.id}'s authority: {_reason(error)}") from error
        client = aiohttp.ClientSession(
            base_url=proxy.url,
            connector=aiohttp.TCPConnector(
                ssl=context, limit=_CONNECTIONS_PER_PROXY, keepalive_timeout=_KEEPALIVE_S
            ),
            timeout=aiohttp.ClientTimeout(total=None),  # the caller's deadline counts
            headers={"Content-Type": "application/json", "User-Agent": "sealgate-key-agent"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        self._clients[proxy] = client
        return client


def client_context(ca_pem: str, certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """TLS 1.3, our certificate, trust in that authority alone. OSError, ValueError if a file is no good."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks names and chains
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=ca_pem)
    context.load_cert_chain(certificate_file, key_file)
    return context


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    answer = bytearray()
    async for piece in response.content.iter_chunked(1 << 16):
        answer += piece
        if len(answer) > _MAX_ANSWER_BYTES:
            response.close()
            raise PushError("bad-answer", f"more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


def _problem(status: int, answer: bytes) -> PushError:
    try:
        problem = msgspec.json.decode(answer, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    text = problem.detail or problem.title
    return PushError(problem.code or f"http-{status}", f"HTTP {status} {text}".strip()[:300])


def _decode[T](answer: bytes, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(answer, type=shape)
    except msgspec.DecodeError as error:
        raise PushError("bad-answer", str(error)[:300]) from error


def _challenge(text: str) -> bytes:
    try:
        challenge = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        challenge = b""
    if len(challenge) != CHALLENGE_SIZE:
        raise PushError("bad-answer", f"the challenge is not {CHALLENGE_SIZE} bytes in base64url")
    return challenge


def _owner(text: str) -> NetworkService:
    try:
        return NetworkService.parse(text)
    except FormatError as error:
        raise PushError("bad-answer", str(error)[:300]) from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__


async def within[T](timeout_s: float, what: str, work: "asyncio.Future[T] | asyncio.Task[T]") -> T:
    """The result of *work*, or PushError `timeout`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise PushError("timeout", f"{what}: no answer within {timeout_s:g} s") from None
