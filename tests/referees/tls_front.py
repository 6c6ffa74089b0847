"""TLS in front of a referee that speaks plain HTTP: HAProxy as a terminator that leaves every byte alone."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.ports import free_port

HAPROXY = "/usr/sbin/haproxy"


@contextlib.asynccontextmanager
async def tls_front(
    directory: Path, certificate_file: Path, key_file: Path, *, backend_port: int
) -> AsyncIterator[int]:
    """The port of 127.0.0.1 at which *backend_port* can be reached by TLS (HTTP/1.1)."""
    port = free_port()
    settings = _write_settings(directory, certificate_file, key_file, port, backend_port)
    async with _running(settings, port):
        yield port


@contextlib.asynccontextmanager
async def http_front(
    directory: Path, certificate_file: Path, key_file: Path, *, backend_port: int, rules: Sequence[str]
) -> AsyncIterator[int]:
    """The same as HTTP, with HAProxy's own *rules* for what passes."""
    port = free_port()
    settings = _write_settings(
        directory, certificate_file, key_file, port, backend_port, mode="http", rules=rules
    )
    async with _running(settings, port):
        yield port


@contextlib.asynccontextmanager
async def host_front(
    directory: Path, certificate_file: Path, key_file: Path, *, backend_port: int, host: str
) -> AsyncIterator[int]:
    """The same before a referee that speaks TLS: requests reach it with *host* in their Host field."""
    port = free_port()
    rule = f"http-request set-header Host {host}"
    settings = _write_settings(
        directory, certificate_file, key_file, port, backend_port, mode="http", rules=[rule], tls=True
    )
    async with _running(settings, port):
        yield port


@contextlib.asynccontextmanager
async def _running(settings: Path, port: int) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        HAPROXY, "-db", "-q", "-f", str(settings), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await listening(port, process)
        yield
    finally:
        await ended(process)


def _write_settings(
    directory: Path,
    certificate_file: Path,
    key_file: Path,
    port: int,
    backend_port: int,
    *,
    mode: str = "tcp",
    rules: Sequence[str] = (),
    tls: bool = False,
) -> Path:
    pair = directory / f"front-{port}.pem"
    pair.touch(mode=0o600)
    pair.write_bytes(certificate_file.read_bytes() + key_file.read_bytes())
    settings = directory / f"front-{port}.cfg"
    lines = "\n    ".join(rules)
    settings.write_text(
        f"""\
global
    maxconn 512
    nbthread 1
defaults
    mode {mode}
    timeout connect 5s
    timeout client 120s
    timeout server 120s
listen tls
    bind 127.0.0.1:{port} ssl crt {pair} alpn http/1.1
    {lines}
    server referee 127.0.0.1:{backend_port} {"ssl verify none" if tls else ""}
""",
        encoding="ascii",
    )
    return settings


async def listening(port: int, process: asyncio.subprocess.Process, *, timeout_s: float = 60) -> None:
    """Wait until *process* accepts connections at *port* of 127.0.0.1."""
    async with asyncio.timeout(timeout_s):
        while True:
            if process.returncode is not None:
                raise ChildProcessError(f"the server ended with {process.returncode}")
            try:
                _reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return


async def ended(process: asyncio.subprocess.Process, *, grace_s: float = 5) -> None:
    """End *process*, if need be by force."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def clean_environment() -> dict[str, str]:
    """Ours without proxies and certificate authorities: they change what third-party programs do."""
    return {
        name: value
        for name, value in os.environ.items()
        if "proxy" not in name.lower()
        and name not in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    }
