"""Requests to the agents of other environments: mutual TLS, bounded in time and size, connections kept warm.

1. Every call has a deadline for all of it, and a shorter one for the connection: an environment that hangs
   delays nobody but itself. An answer of many rows has as long as it takes at MIN_BYTES_PER_S, and a bound:
   it may be slow, but one that dribbles is cut off.
2. Answers are bounded and parsed strictly. What cannot be understood is a failure; no text of a peer reaches
   log or terminal but cut and printable.
3. A kept connection that has died is replaced at once, and the request sent again: every request of the
   protocol can be repeated.
4. The own certificate's files are read again when they change. With another revocation list every connection
   is made anew: who is on the list would go on answering on one that is open.
"""

import asyncio
import contextlib
import io
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from key_agent.cancelling import is_to_end
from key_agent.environments.peers.peer_trust import PeerTrust
from key_agent.errors import KeyAgentError

MAX_ANSWER_BYTES: Final = 64 << 20
CONNECT_TIMEOUT_S: Final = 2.0
MIN_BYTES_PER_S: Final = 128 << 10
_CONNECTIONS_PER_PEER: Final = 4
_KEEPALIVE_S: Final = 60.0
# Middle boxes forget connections that are silent, and tell nobody.
_PROBE_AFTER_S: Final = 15
_MAX_TEXT: Final = 300


class PeerError(KeyAgentError):
    """Another environment's agent did not do what it was asked. `code` is stable: `unreachable`, `timeout`,
    `tls` (not that agent, or not any more), `bad-answer`, or the code of the peer's own refusal."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail

    @property
    def is_silence(self) -> bool:
        """Nobody can tell whether the peer has done it."""
        return self.code in ("unreachable", "timeout", "bad-answer")


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where an agent answers its peers, and who it has to be."""

    url: str
    """https://host:port"""
    agent_id: str


class _Problem(msgspec.Struct):
    code: str = ""
    detail: str = ""


class PeerTransport:
    def __init__(self, *, trust: PeerTrust, certificate_file: Path, key_file: Path) -> None:
        self._trust = trust
        self._files = (certificate_file, key_file)
        self._version: tuple[object, ...] = ()
        self._clients: dict[PeerAddress, aiohttp.ClientSession] = {}

    async def request(
        self,
        peer: PeerAddress,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_s: float,
        at_most_s: float | None = None,
        limit_bytes: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """The body of the answer 200. PeerError for everything else.

        *timeout_s*: for all of it; with *at_most_s* each MIN_BYTES_PER_S of the answer are worth another
        second, up to that.
        """
        began_s = asyncio.get_running_loop().time()

        def progress(received: int) -> None:
            if at_most_s is not None:
                deadline.reschedule(began_s + allowed_s(received, timeout_s=timeout_s, at_most_s=at_most_s))

        try:
            async with asyncio.timeout(timeout_s) as deadline:
                return await self._request(
                    peer, method, path, body, limit_bytes=limit_bytes, progress=progress
                )
        except TimeoutError:
            took_s = asyncio.get_running_loop().time() - began_s
            raise PeerError(
                "timeout", f"{peer.agent_id} at {peer.url}: no answer within {took_s:.3g} s"
            ) from None

    async def call[T](
        self,
        peer: PeerAddress,
        method: str,
        path: str,
        body: msgspec.Struct | None,
        answer: type[T],
        *,
        timeout_s: float,
    ) -> T:
        """*body* as JSON; the answer as *answer*. PeerError."""
        content = await self.request(
            peer,
            method,
            path,
            None if body is None else msgspec.json.encode(body),
            timeout_s=timeout_s,
        )
        try:
            return msgspec.json.decode(content, type=answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PeerError("bad-answer", f"{peer.agent_id}: {printable(str(error))}") from None

    async def close(self) -> None:
        """Let go of every connection. Idempotent."""
        clients = list(self._clients.values())
        self._clients.clear()
        for client in clients:
            await client.close()

    async def _request(
        self,
        peer: PeerAddress,
        method: str,
        path: str,
        body: bytes | None,
        *,
        limit_bytes: int,
        progress: Callable[[int], None],
    ) -> bytes:
        try:
            client = await self._client(peer)
            try:
                return await _exchange(client, method, path, body, limit_bytes=limit_bytes, progress=progress)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError):
                if client.closed:
                    raise
                return await _exchange(client, method, path, body, limit_bytes=limit_bytes, progress=progress)
        except aiohttp.ClientSSLError as error:
            raise PeerError("tls", f"{peer.agent_id} at {peer.url}: {_reason(error)}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PeerError("unreachable", f"{peer.agent_id} at {peer.url}: {_reason(error)}") from error
        except asyncio.CancelledError as error:
            if is_to_end():
                raise
            # Another request has found that connections are to be made anew (rule 4).
            raise PeerError(
                "unreachable", f"{peer.agent_id} at {peer.url}: connections were let go"
            ) from error

    async def _client(self, peer: PeerAddress) -> aiohttp.ClientSession:
        version = (*version_of(*self._files), *self._trust.standing())
        if version != self._version:
            await self.close()
            self._version = version
        if (client := self._clients.get(peer)) is not None:
            return client
        for stale in [known for known in self._clients if known.agent_id == peer.agent_id]:
            await self._clients.pop(stale).close()  # it has moved
        try:
            context = self._trust.client_context(*self._files, agent_id=peer.agent_id)
        except (OSError, ValueError) as error:
            raise PeerError("tls", f"own certificate: {_reason(error)}") from error
        client = aiohttp.ClientSession(
            base_url=peer.url,
            connector=aiohttp.TCPConnector(
                ssl=context,
                limit=_CONNECTIONS_PER_PEER,
                keepalive_timeout=_KEEPALIVE_S,
                socket_factory=_probing_socket,
            ),
            auto_decompress=False,  # a bomb in it would unpack before it is counted
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            headers={
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
                "User-Agent": "sealgate-key-agent",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        self._clients[peer] = client
        return client


def allowed_s(received: int, *, timeout_s: float, at_most_s: float) -> float:
    """How long an answer of which so many bytes are here may take, from the question on."""
    return max(timeout_s, min(at_most_s, timeout_s + received / MIN_BYTES_PER_S))


async def _exchange(
    client: aiohttp.ClientSession,
    method: str,
    path: str,
    body: bytes | None,
    *,
    limit_bytes: int,
    progress: Callable[[int], None],
) -> bytes:
    # As a stream: aiohttp warns of large `bytes`.
    data = None if body is None else io.BytesIO(body)
    async with client.request(method, path, data=data, allow_redirects=False) as response:
        content = bytearray()
        async for piece in response.content.iter_chunked(1 << 16):
            content += piece
            if len(content) > limit_bytes:
                raise PeerError("bad-answer", f"more than {limit_bytes} bytes")
            progress(len(content))
        if response.status != 200:
            raise _problem(response.status, bytes(content))
        return bytes(content)


def _problem(status: int, content: bytes) -> PeerError:
    try:
        told = msgspec.json.decode(content, type=_Problem)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # of a breached one
        told = _Problem()
    code = told.code if told.code.replace("-", "").replace("_", "").isalnum() else ""
    return PeerError(code[:63] or f"http-{status}", printable(told.detail) or f"HTTP {status}")


def printable(text: str) -> str:
    """*text* of a stranger, cut and without what a terminal would obey."""
    return "".join(one if one.isprintable() else "?" for one in text[:_MAX_TEXT])


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return printable(str(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__))


def version_of(*files: Path) -> tuple[int, ...]:
    """Tells these contents of *files* from others. A missing one is found when it is read."""
    found: list[int] = []
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found += [status.st_mtime_ns, status.st_ino, status.st_size]
    return tuple(found)


def _probing_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return made
