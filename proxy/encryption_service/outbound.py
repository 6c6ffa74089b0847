"""The few HTTPS calls that the encryption service itself makes: key sets, and another KACLS on migration.

1. Only URLs that the configuration names are called, never one out of a request or a token; this module does
   not know which those are, so it takes nothing for granted: HTTPS, no user, no fragment, a certificate that
   verifies.
2. A name that resolves to an address of the inside (private, loopback, link-local, shared, metadata services)
   is refused unless the operator has listed the host. The check is on the address that is connected to, so
   that a second, different answer of the DNS changes nothing.
3. A redirect is an answer like any other, and not the one that is wanted: none is followed.
4. Bodies are bounded while they are read, uncompressed, with one deadline for the whole call.
5. No proxy, cookie or credential of the environment is used.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self, override
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.errors import SealgateError
from runtime.tls import load_certificates

MAX_ANSWER_BYTES: Final = 256 * 1024
TIMEOUT_S: Final = 5.0
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_MAX_URL_CHARS: Final = 2048


class OutboundError(SealgateError):
    """A call that could not be made or was not answered as it should: worth a retry, later."""


def outbound_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """Verifies servers by the system's roots and those in *ca_file*. TlsError names a file without any."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for root in [] if ca_file is None else load_certificates(ca_file):
        context.load_verify_locations(cadata=root.public_bytes(Encoding.DER))
    return context


def check_url(url: str) -> str:
    """*url* if it may be called at all, wherever its name leads; OutboundError otherwise."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise OutboundError("not a URL") from None
    if (
        len(url) > _MAX_URL_CHARS
        or not url.isascii()
        or any(character.isspace() or character in '\\"<>^`{|}' for character in url)
        or parts.scheme != "https"
        or not parts.hostname
        or "@" in parts.netloc
        or parts.fragment
        or port == 0
    ):
        raise OutboundError(
            "not a URL that may be called: https://host[:port]/path, without user and fragment"
        )
    return url


def is_outside(address: str) -> bool:
    """Whether *address* is one of the public internet, also when it stands inside an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_outside(str(inner))
        if parsed.teredo is not None or parsed.is_site_local:
            return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)


class GuardedResolver(AbstractResolver):
    """Resolves like the one it is given, and gives out the addresses that may be called (rule 2)."""

    def __init__(self, inner: AbstractResolver, *, private_hosts: frozenset[str]) -> None:
        self._inner = inner
        self._private_hosts = private_hosts

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if host in self._private_hosts:
            return found
        outside = [one for one in found if is_outside(one["host"])]
        if not outside:
            raise OSError(None, f"{host} is at an address of the inside")
        return outside

    @override
    async def close(self) -> None:
        await self._inner.close()


class Outbound:
    """`async with Outbound(tls) as outbound`: a pool of verified connections.

    *tls*: verifies servers (`ssl.create_default_context` or one with the operator's roots). *private_hosts*:
    hosts, as they stand in URLs, that may be at an address of the inside.
    """

    def __init__(
        self,
        tls: ssl.SSLContext,
        *,
        private_hosts: Iterable[str] = (),
        timeout_s: float = TIMEOUT_S,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        resolver: AbstractResolver | None = None,
    ) -> None:
        if tls.verify_mode is not ssl.CERT_REQUIRED or not tls.check_hostname:
            raise ValueError("an outbound call needs a context that verifies the server and its name")
        self._tls = tls
        self._private_hosts = frozenset(host.lower() for host in private_hosts)
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. A later call opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, url: str) -> bytes:
        """The body of a 200 answer. OutboundError for any other."""
        status, body = await self._call("GET", url, None)
        if status != 200:
            raise OutboundError(f"{_place(url)} answered {status}")
        return body

    async def post_json(self, url: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer, whatever it is. OutboundError if there was none."""
        return await self._call("POST", url, body)

    async def _call(self, method: str, url: str, body: bytes | None) -> tuple[int, bytes]:
        check_url(url)
        host = urlsplit(url).hostname or ""
        if _is_literal(host) and host not in self._private_hosts and not is_outside(host):
            raise OutboundError(f"{_place(url)} is at an address of the inside")
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if body is not None:
            headers["content-type"] = "application/json"
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._opened().request(
                    method, url, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                return response.status, await self._read(response)
        except TimeoutError:
            raise OutboundError(f"{_place(url)} did not answer within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The kind alone: what the library writes may quote the other side.
            raise OutboundError(f"{_place(url)} cannot be called: {type(error).__name__}") from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise OutboundError("the answer is compressed, which was not asked for")
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > self._max_answer_bytes:
                raise OutboundError(f"the answer has more than {self._max_answer_bytes} bytes")
        return bytes(body)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:  # not in __init__: a session belongs to the running loop
            resolver = GuardedResolver(
                self._resolver or aiohttp.ThreadedResolver(), private_hosts=self._private_hosts
            )
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=self._tls, resolver=resolver, use_dns_cache=False, limit=32, limit_per_host=8
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        # Numbers that some resolvers take for an address: 2130706433, 0x7f.1, 127.1
        return host.replace(".", "").isdecimal() or host.startswith("0x")
    return True


def _place(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}{parts.path}"
