"""Ten thousand connections that say nothing, or never finish: bounded memory for each, and others are served.

The proxy is a process of its own; what it keeps is read from the kernel.
"""

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.hostile_proxy import HostileProxy, hostile_proxy
from tests.integration.proxy_rig import curl

KIB = 1024
CLEAR_BYTES = 48 * KIB
"""20 KiB were measured."""
TLS_BYTES = 128 * KIB
"""50 KiB were measured over HTTP/1, 65 over HTTP/2."""
CROWD = 10_000
ENCRYPTED = 300
SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture(scope="module")
def crowd() -> Iterator[int]:
    """As many as this process may open, and no fewer than a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CROWD + 1_000
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    assert allowed >= 2_000, "ulimit -n is too low to try it"
    yield allowed - 1_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[HostileProxy]:
    with hostile_proxy(tmp_path) as proxy:
        yield proxy


def joined(
    group: contextlib.ExitStack, count: int, port: int, data: bytes = b"", tls: ssl.SSLContext | None = None
) -> None:
    """*count* more connections that send *data* and stay, until *group* is closed."""
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        if tls is not None:
            connection = tls.wrap_socket(connection, server_hostname="127.0.0.1")
        group.enter_context(connection)
        if data:
            connection.sendall(data)


async def served(proxy: HostileProxy) -> None:
    """An upload by each road."""
    trust = ["--cacert", proxy.address.ca_file]
    reverse = await curl(
        *trust, "-T", "-", f"https://127.0.0.1:{proxy.address.reverse_port}/x", body=b"content", timeout_s=30
    )
    assert reverse.status == 200, reverse.error
    forward = await curl(
        *trust, "-x", f"http://127.0.0.1:{proxy.address.forward_port}", "http://nobody.invalid/", timeout_s=30
    )
    assert forward.code == "unmanaged-host", forward.error


async def test_ten_thousand_that_are_idle(proxy: HostileProxy, crowd: int) -> None:
    address = proxy.address
    trust = {}
    for protocol in ("http/1.1", "h2"):
        trust[protocol] = ssl.create_default_context(cafile=address.ca_file)
        trust[protocol].set_alpn_protocols([protocol])
    await served(proxy)
    before = proxy.resident_bytes()
    with contextlib.ExitStack() as group:
        silent = crowd - 2 * ENCRYPTED
        await asyncio.to_thread(joined, group, silent // 2, address.forward_port)
        await asyncio.to_thread(
            joined, group, silent // 2, address.forward_port, b"GET http://x/ HTTP/1.1\r\nX-A: "
        )
        await served(proxy)
        assert proxy.open_files() > silent, "they are all there"
        clear = proxy.resident_bytes() - before
        assert clear < silent * CLEAR_BYTES, f"{clear / silent / KIB:.0f} KiB each"
        await asyncio.to_thread(
            joined, group, ENCRYPTED, address.reverse_port, b"GET /x HTTP", trust["http/1.1"]
        )
        await asyncio.to_thread(joined, group, ENCRYPTED, address.reverse_port, SETTINGS, trust["h2"])
        await served(proxy)
        assert proxy.open_files() > crowd
        encrypted = proxy.resident_bytes() - before - clear
        assert encrypted < 2 * ENCRYPTED * TLS_BYTES, f"{encrypted / 2 / ENCRYPTED / KIB:.0f} KiB each"
    await served(proxy)
    peak = proxy.resident_bytes("VmHWM")
    with contextlib.ExitStack() as group:  # and again: nothing is left of those before
        await asyncio.to_thread(joined, group, crowd // 3, address.forward_port)
        await served(proxy)
    assert proxy.resident_bytes("VmHWM") < peak + crowd // 3 * CLEAR_BYTES // 2
