"""As much of etcd as an election needs: a lease, a key that only one can make, and who made it.

1. etcd's own JSON gateway over HTTP (`/v3/...`, etcd 3.4 and newer): no client library. Bytes travel in
   base64, 64-bit numbers as text (https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/).
2. Each request has a deadline, and goes to the next member when one fails: a member that is cut off from the
   others does not answer, or says so.
3. What cannot be understood is an EtcdError: never a lease that is believed to be held.
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self

import aiohttp
import msgspec

from key_agent.errors import KeyAgentError
from runtime.tls import TlsError, client_context

_MAX_ANSWER_BYTES: Final = 1 << 20


class EtcdError(KeyAgentError):
    """No member gave an answer to be trusted. Whoever led by it stops when its lease ends."""


class EtcdSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[environments.etcd]`: the manager is elected by an etcd of the administrator's."""

    urls: tuple[str, ...]
    """Of its members: https://host:port. One in each environment, or a witness: a majority has to be up."""
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    key: str = "/sealgate/manager"
    """The tenant's name is added: several tenants may share an etcd."""
    lease_s: int = 15
    keep_alive_s: float = 5.0
    request_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("environments.etcd.urls must name at least one member")
        for url in self.urls:
            is_local = url.startswith(("http://127.0.0.1:", "http://localhost:", "http://[::1]:"))
            if not url.startswith("https://") and not is_local:
                raise ValueError(f"environments.etcd.urls: {url!r} is neither https nor on this machine")
        if any(url.startswith("https://") for url in self.urls) and self.ca_file is None:
            raise ValueError("environments.etcd.ca_file says whom its members have to be vouched for by")
        if (self.certificate_file is None) is not (self.key_file is None):
            raise ValueError("environments.etcd.certificate_file and .key_file belong together")
        if not 0.1 <= self.keep_alive_s <= self.lease_s / 3:
            raise ValueError("environments.etcd.keep_alive_s must be at most a third of lease_s")
        if not 0 < self.request_timeout_s <= self.keep_alive_s:
            raise ValueError("environments.etcd.request_timeout_s must be at most keep_alive_s")


_Number = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,20}$")]


class _Header(msgspec.Struct):
    revision: _Number


class _Granted(msgspec.Struct):
    ID: _Number
    TTL: _Number


class _KeyValue(msgspec.Struct):
    create_revision: _Number
    value: str = ""
    lease: _Number = "0"


class _Range(msgspec.Struct):
    header: _Header
    kvs: list[_KeyValue] = []


class _Transaction(msgspec.Struct):
    header: _Header
    succeeded: bool = False


class _KeptAlive(msgspec.Struct):
    TTL: _Number = "0"


class _KeptAliveAnswer(msgspec.Struct):
    result: _KeptAlive


class _Anything(msgspec.Struct):
    pass


@dataclass(frozen=True, slots=True)
class Held:
    """The key as somebody made it."""

    value: bytes
    create_revision: int
    lease_id: int


class EtcdClient:
    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._first = 0
        """The member that answered last is asked first."""

    async def grant(self, ttl_s: int) -> int:
        """A new lease's id."""
        return int((await self._ask("lease/grant", {"TTL": ttl_s}, _Granted)).ID)

    async def keep_alive(self, lease_id: int) -> bool:
        """False: it has ended."""
        answer = await self._ask("lease/keepalive", {"ID": str(lease_id)}, _KeptAliveAnswer)
        return int(answer.result.TTL) > 0

    async def revoke(self, lease_id: int) -> None:
        """End it now: what hangs on it is gone."""
        await self._ask("lease/revoke", {"ID": str(lease_id)}, _Anything)

    async def create(self, key: str, value: bytes, lease_id: int) -> int | None:
        """Make *key*, to live as long as the lease; its create revision, None if it is there already."""
        name = _text(key.encode())
        answer = await self._ask(
            "kv/txn",
            {
                "compare": [{"key": name, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}],
                "success": [{"request_put": {"key": name, "value": _text(value), "lease": str(lease_id)}}],
            },
            _Transaction,
        )
        return int(answer.header.revision) if answer.succeeded else None

    async def read(self, key: str, *, revision: int | None = None) -> Held | None:
        """Who made *key*; None: nobody, or its lease is over. A linearised read: never an old answer.

        *revision*: as it was then; EtcdError if etcd has compacted that away.
        """
        asked = {"key": _text(key.encode())} | ({} if revision is None else {"revision": str(revision)})
        answer = await self._ask("kv/range", asked, _Range)
        if not answer.kvs:
            return None
        found = answer.kvs[0]
        try:
            value = base64.b64decode(found.value, validate=True)
        except ValueError as error:
            raise EtcdError(f"etcd: {key}: not base64") from error
        return Held(value, int(found.create_revision), int(found.lease))

    async def advance(self, key: str) -> int:
        """Make the store's revision rise by one, by writing to *key*."""
        name = _text(key.encode())
        answer = await self._ask("kv/put", {"key": name, "value": _text(b"-")}, _Transaction)
        return int(answer.header.revision)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask[T](self, what: str, body: Mapping[str, object], answer: type[T]) -> T:
        content = msgspec.json.encode(body)
        problems: list[str] = []
        for url in self._in_order():
            try:
                async with asyncio.timeout(self._settings.request_timeout_s):
                    found = await self._exchange(f"{url}/v3/{what}", content)
                told = msgspec.json.decode(found, type=answer)
            except TimeoutError:
                problems.append(f"{url}: no answer within {self._settings.request_timeout_s:g} s")
            except (aiohttp.ClientError, OSError, ValueError, RecursionError, TlsError) as error:
                problems.append(f"{url}: {str(error)[:200] or type(error).__name__}")
            else:
                self._first = self._settings.urls.index(url)
                return told
        raise EtcdError("etcd: " + "; ".join(problems))

    def _in_order(self) -> Sequence[str]:
        urls = self._settings.urls
        return (*urls[self._first :], *urls[: self._first])

    async def _exchange(self, url: str, content: bytes) -> bytes:
        if self._session is None:
            self._session = self._connect()
        async with self._session.post(url, data=content, allow_redirects=False) as response:
            found = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                found += piece
                if len(found) > _MAX_ANSWER_BYTES:
                    raise ValueError("an answer without end")
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {found[:150].decode(errors='replace')}")
            return bytes(found)

    def _connect(self) -> aiohttp.ClientSession:
        mine = self._settings
        tls = (
            None
            if mine.ca_file is None
            else client_context(mine.ca_file, mine.certificate_file, mine.key_file)
        )
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls or True, limit=8),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Content-Type": "application/json"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
