"""Calls of our own: where to, and what is taken back. Real servers on the loopback interface, with TLS."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import override

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from proxy.encryption_service.outbound import (
    GuardedResolver,
    Outbound,
    OutboundError,
    check_url,
    is_outside,
    outbound_context,
)
from runtime.tls import TlsError
from tests.pki import issue_server, make_server_ca, write_certificate, write_credential

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """A server whose answer is the test's."""

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[web.BaseRequest] = []
        self.answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]] = self._fine

    def url(self, path: str = "/keys", host: str = "localhost") -> str:
        return f"https://{host}:{self.port}{path}"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        return await self.answer(request)

    async def _fine(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=await request.read() or b"fine")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    ca = make_server_ca()
    write_certificate(ca.certificate, tmp_path / "ca.crt")
    certificate_file, key_file = write_credential(issue_server(ca), tmp_path, "server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate_file, key_file)
    site = Site()
    runner = web.ServerRunner(web.Server(site.handle), shutdown_timeout=0.1)
    await runner.setup()
    try:
        where = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await where.start()
        site.port = runner.addresses[0][1]
        yield site
    finally:
        await runner.cleanup()


@pytest.fixture
async def outbound(tmp_path: Path, site: Site) -> AsyncIterator[Outbound]:
    tls = outbound_context(tmp_path / "ca.crt")
    async with Outbound(tls, private_hosts={"localhost"}, max_answer_bytes=1000) as outbound:
        yield outbound


async def test_what_is_there_is_read(site: Site, outbound: Outbound) -> None:
    assert await outbound.get(site.url("/keys?x=1")) == b"fine"
    assert await outbound.post_json(site.url("/rewrap"), b'{"a":1}') == (200, b'{"a":1}')
    first, second = site.requests
    assert first.headers["accept-encoding"] == "identity"
    assert "cookie" not in first.headers
    assert second.headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 308, 400, 404, 500])
async def test_any_other_status_is_no_key_set(site: Site, outbound: Outbound, status: int) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, headers={"location": site.url("/elsewhere")})

    site.answer = answer
    with pytest.raises(OutboundError, match=str(status)):
        await outbound.get(site.url())
    assert (await outbound.post_json(site.url(), b"{}"))[0] == status
    assert [request.path for request in site.requests] == ["/keys", "/keys"]  # no redirect is followed


async def test_a_body_is_bounded_while_it_is_read(site: Site, outbound: Outbound) -> None:
    sent = 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(10_000):
            await response.write(b"x" * 10_000)
            sent += 10_000
        return response

    site.answer = answer
    with pytest.raises(OutboundError, match="more than 1000 bytes"):
        await outbound.get(site.url())
    assert sent < 50_000_000


async def test_compressed_bodies_are_not_asked_for_and_not_taken(site: Site, outbound: Outbound) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"\x1f\x8b" + b"x" * 50, headers={"content-encoding": "gzip"})

    site.answer = answer
    with pytest.raises(OutboundError, match="compressed"):
        await outbound.get(site.url())


async def test_a_silent_server_is_given_up(site: Site, tmp_path: Path) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(3600)
        return web.Response()

    site.answer = answer
    tls = outbound_context(tmp_path / "ca.crt")
    async with Outbound(tls, private_hosts=["localhost"], timeout_s=0.2) as outbound:
        with pytest.raises(OutboundError, match=r"within 0\.2 s"):
            await outbound.get(site.url())


async def test_a_server_must_be_who_it_is_called(site: Site, outbound: Outbound, tmp_path: Path) -> None:
    async with Outbound(outbound_context(), private_hosts=["localhost"]) as stranger:
        with pytest.raises(OutboundError, match="Certificate"):
            await stranger.get(site.url())
    tls = outbound_context(tmp_path / "ca.crt")
    async with Outbound(tls, private_hosts=["localhost.localdomain"], resolver=_To("127.0.0.1")) as misled:
        with pytest.raises(OutboundError, match="Certificate"):
            await misled.get(site.url(host="localhost.localdomain"))
    assert site.requests == []
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    for context in (unverified, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)):
        with pytest.raises(ValueError, match="verifies"):
            Outbound(context)


async def test_the_inside_is_not_called(site: Site, tmp_path: Path) -> None:
    """SSRF: by name, by address, by the numbers that some resolvers take for one; whatever the DNS says."""
    tls = outbound_context(tmp_path / "ca.crt")
    async with Outbound(tls, timeout_s=2) as outbound:
        for host in (
            "localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f000001", "127.1",
            "0.0.0.0", "169.254.169.254", "10.0.0.1", "[fd00::1]", "[fe80::1%25lo]",
        ):  # fmt: skip
            with pytest.raises(OutboundError):
                await outbound.get(site.url(host=host))
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "0.0.0.0"):
        async with Outbound(tls, resolver=_To(address), timeout_s=2) as rebound:
            with pytest.raises(OutboundError):
                await rebound.get(site.url(host="idp.example.com"))
    # One that is in the list does not open the door for another.
    async with Outbound(tls, private_hosts=["other.internal"], resolver=_To("127.0.0.1")) as listed:
        with pytest.raises(OutboundError):
            await listed.get(site.url(host="idp.example.com"))
    assert site.requests == []


async def test_of_mixed_answers_only_the_outside_is_given_out() -> None:
    found = _To("127.0.0.1", "8.8.8.8", "::1", "2606:4700::1")
    guarded = GuardedResolver(found, private_hosts=frozenset({"idp.inside"}))
    assert [one["host"] for one in await guarded.resolve("idp.example.com", 443)] == [
        "8.8.8.8",
        "2606:4700::1",
    ]
    assert len(await guarded.resolve("idp.inside", 443)) == 4
    with pytest.raises(OSError, match=r"idp\.example\.com"):
        await GuardedResolver(_To("127.0.0.1"), private_hosts=frozenset()).resolve("idp.example.com")


@pytest.mark.parametrize(
    "url",
    [
        "http://idp.example.com/", "file:///etc/passwd", "ftp://x/", "https:///x", "https://", "", "idp",
        "https://user@idp.example.com/", "https://idp.example.com@evil.example/", "https://idp.example/#x",
        "https://idp.example:0/", "https://idp.example:99999/", "https://idp.example:x/",
        "https://idp.example/a b", "https://idp.example/\r\nx: y", "https://idp.example\\@evil.example/",
        "https://idp.example/é", "https://" + "a" * 3000, "HTTPS //x", "https://[::1", "gopher://x",
    ],
)  # fmt: skip
async def test_only_plain_https_urls_are_called(url: str) -> None:
    with pytest.raises(OutboundError):
        check_url(url)
    async with Outbound(outbound_context()) as outbound:
        with pytest.raises(OutboundError):
            await outbound.get(url)


def test_urls_that_may_be_called() -> None:
    for url in (
        "https://idp.example.com/keys?v=2",
        "https://idp.example.com:8443",
        "https://[2606:4700::1]/x",
    ):
        assert check_url(url) == url


@pytest.mark.parametrize(
    ("address", "outside"),
    [
        ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("100.64.0.1", False), ("169.254.169.254", False), ("0.0.0.0", False), ("255.255.255.255", False),
        ("224.0.0.1", False), ("240.0.0.1", False), ("192.0.2.1", False), ("198.18.0.1", False),
        ("::", False), ("::1", False), ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False),
        ("fec0::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False), ("2001:0:808:808::", False), ("2001:db8::1", False), ("localhost", False),
    ],
)  # fmt: skip
def test_what_is_outside(address: str, outside: bool) -> None:
    assert is_outside(address) is outside


def test_a_file_without_roots_is_named(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"none\.crt"):
        outbound_context(tmp_path / "none.crt")


class _To(AbstractResolver):
    """The attacker's DNS."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    @override
    async def close(self) -> None:
        """Nothing is open."""
