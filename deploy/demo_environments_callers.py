"""Callers of the encryption service behind a load balancer, who count every answer.

1. Each seals a random body, then opens one of those that were sealed last, by anybody, at whichever environment the load
   balancer chooses; what comes back is compared.
2. Everything else than the right answer is an error, with one exception: an answer that names the state of a key is a
   *refusal*, kept by itself. Whether it was right to refuse, the reader judges by the key's version and the time.
3. One connection each, kept open. Nothing is repeated: what a caller sees is what the load balancer gave.
"""

import asyncio
import base64
import random
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, NoReturn

import aiohttp

TIMEOUT_S: Final = 20.0
KEY_REFUSED: Final = frozenset({409, 410, 423})
"""Statuses that speak of a key's state (docs/encryption-service-native.md)."""
_KEPT: Final = 64


@dataclass(frozen=True, slots=True)
class Sealed:
    """One body sealed. *at_s*: when the answer was there, by `time.monotonic`; *began_s*: when it was asked for."""

    began_s: float
    at_s: float
    version: int


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer that named the state of the key *version* that had sealed."""

    at_s: float
    version: int
    status: int
    code: str


class Callers:
    """Everything they saw, in lists that grow; read them at any time, from any thread."""

    def __init__(
        self,
        url: str,
        token: str,
        key: str,
        *,
        count: int = 8,
        pause_s: float = 0.0,
        body_bytes: int = 1024,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """*url*: scheme, host and port. *key*: the named key. *pause_s*: between two calls of one caller."""
        self._keys = f"{url}/sealgate/v1/keys/{key}"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._count, self._pause_s, self._body_bytes = count, pause_s, body_bytes
        self._tls: ssl.SSLContext | bool = True if tls is None else tls
        self._recent: deque[tuple[int, str, str]] = deque(maxlen=_KEPT)
        self.sealed: list[Sealed] = []
        self.opened: list[Sealed] = []
        self.refused: list[Refused] = []
        self.errors: list[tuple[float, str]] = []

    @property
    def answered(self) -> int:
        return len(self.sealed) + len(self.opened)

    async def run(self) -> NoReturn:
        """Call until cancelled."""
        connector = aiohttp.TCPConnector(limit=self._count, ssl=self._tls)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with (
            aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=timeout) as session,
            asyncio.TaskGroup() as group,
        ):
            for number in range(self._count):
                group.create_task(self._call(session), name=f"caller-{number}")
        raise AssertionError("unreachable: callers do not end by themselves")

    async def _call(self, session: aiohttp.ClientSession) -> NoReturn:
        while True:
            plain = base64.b64encode(random.randbytes(self._body_bytes)).decode()
            answer = await self._ask(session, "encrypt", {"plaintext": plain})
            if answer is not None:
                done, document = answer
                self.sealed.append(done)
                self._recent.append((done.version, str(document["ciphertext"]), plain))
            await asyncio.sleep(self._pause_s)
            if self._recent:
                version, ciphertext, plain = random.choice(self._recent)
                answer = await self._ask(session, "decrypt", {"ciphertext": ciphertext}, version=version)
                if answer is not None:
                    done, document = answer
                    if document["plaintext"] == plain:
                        self.opened.append(done)
                    else:
                        self.errors.append((done.at_s, "decrypt: another plaintext"))
            await asyncio.sleep(self._pause_s)

    async def _ask(
        self, session: aiohttp.ClientSession, operation: str, body: dict[str, str], *, version: int = 0
    ) -> tuple[Sealed, dict[str, object]] | None:
        """*version*: the one that sealed, where it is opened. None, and it is counted, unless all went well."""
        began_s = time.monotonic()
        try:
            async with session.post(f"{self._keys}/{operation}", json=body) as response:
                document = dict(await response.json(content_type=None))
                now_s = time.monotonic()
                if response.status == 200:
                    return Sealed(began_s, now_s, int(str(document["version"]))), document
                code = str(document.get("code"))
                if version and response.status in KEY_REFUSED and code.startswith("key"):
                    self.refused.append(Refused(now_s, version, response.status, code))
                    for one in [one for one in self._recent if one[0] == version]:
                        self._recent.remove(one)
                else:
                    self.errors.append((now_s, f"{operation}: {response.status} {code}"))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.errors.append((time.monotonic(), f"{operation}: {type(error).__name__} {error}"))
        return None
