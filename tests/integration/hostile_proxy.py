"""A besieged proxy in a process of its own, so that its memory is the proxy's: run as a module.

One line of JSON says where it is; it ends with its standard input. Its limits are so large that nobody comes
to the end of them: what is tried against it is what costs most. Its two services keep what is put there, and
answer with it; the second is a `webdav` one.
"""

import asyncio
import contextlib
import functools
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import brotli  # type: ignore[import-untyped]
import msgspec
import zstandard

from proxy.limits import ClientLimits
from runtime.lifecycle import raise_open_files
from tests.fakes.origin import Exchange, RecordingOrigin, Reply
from tests.integration.attack_rig import besieged
from tests.integration.proxy_rig import REPOSITORY

MANY: ClientLimits = ClientLimits(
    connections=20_000, connections_per_peer=20_000, handshake_s=600, head_s=600, keep_alive_s=600
)

BOMB_BYTES = 512 << 20


class Address(msgspec.Struct, frozen=True):
    forward_port: int
    reverse_port: int
    dav_port: int
    ca_file: str


@dataclass(frozen=True, slots=True)
class HostileProxy:
    address: Address
    pid: int

    def resident_bytes(self, kind: str = "VmRSS") -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {kind}")

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@contextlib.contextmanager
def hostile_proxy(directory: Path) -> Iterator[HostileProxy]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.hostile_proxy", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = msgspec.json.decode(process.stdout.readline(), type=Address)
            yield HostileProxy(address, process.pid)
        finally:
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


class _Store:
    """What an origin keeps, by path: body and Content-Encoding."""

    def __init__(self, origin: RecordingOrigin) -> None:
        self._kept: dict[str, tuple[bytes, str | None]] = {}
        origin.reads_first = True
        origin.reply = self._answer

    def _answer(self, exchange: Exchange) -> Reply:
        if exchange.method == "PUT":
            self._kept[exchange.path] = (bytes(exchange.body), exchange.header("content-encoding"))
            return Reply()
        body, coding = self._kept.get(exchange.path, (b"", None))
        headers = [("Content-Encoding", coding)] if coding is not None else []
        if exchange.method == "PROPFIND":
            headers = [("Content-Type", "application/xml"), ("Content-Encoding", exchange.path[1:])]
            return Reply(207, headers, [bomb(exchange.path[1:])])
        if exchange.path.startswith("/bomb/"):
            headers = [("Content-Encoding", exchange.path[6:])]
            return Reply(200, headers, [bomb(exchange.path[6:])])
        return Reply(200, headers, [body])


@functools.cache
def bomb(coding: str) -> bytes:
    """Zeros, BOMB_BYTES of them when they are decoded: gzip, br or zstd."""
    part = bytes(BOMB_BYTES // 16)
    match coding:
        case "gzip":
            return gzip.compress(part) * 16
        case "zstd":
            return zstandard.compress(part) * 16
        case "br":
            encoder = brotli.Compressor(quality=1)
            return b"".join([*(encoder.process(part) for _ in range(16)), encoder.finish()])
    raise ValueError(coding)


async def _serve(directory: Path) -> None:
    raise_open_files()
    loop = asyncio.get_running_loop()
    async with (
        besieged(directory, limits=MANY) as siege,
        RecordingOrigin(keep_bytes=False).listening() as dav_origin,
    ):
        tenant, listen = siege.rig.tenants["acme"], siege.service.reverse_listen
        dav = siege.rig.service("acme/dav", f"http://localhost:{dav_origin.port}", profile="webdav")
        siege.rig.push(dav.owner)
        await siege.rig.engine.apply(siege.rig.picture())
        _Store(siege.origin)
        _Store(dav_origin)
        assert tenant.forward_listen is not None
        assert listen is not None
        assert dav.reverse_listen is not None
        where = {
            "forward_port": tenant.forward_listen.port,
            "reverse_port": listen.port,
            "dav_port": dav.reverse_listen.port,
            "ca_file": str(tenant.interception_ca.certificate_file),
        }
        print(json.dumps(where), flush=True)
        await loop.run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
