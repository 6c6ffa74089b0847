"""A besieged proxy in a process of its own, so that its memory is the proxy's: run as a module.

One line of JSON says where it is; it ends with its standard input. Its limits are so large that nobody comes
to the end of them: what is tried against it is what costs most.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from proxy.limits import ClientLimits
from runtime.lifecycle import raise_open_files
from tests.integration.attack_rig import besieged
from tests.integration.proxy_rig import REPOSITORY

MANY: ClientLimits = ClientLimits(
    connections=20_000, connections_per_peer=20_000, handshake_s=600, head_s=600, keep_alive_s=600
)


class Address(msgspec.Struct, frozen=True):
    forward_port: int
    reverse_port: int
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


async def _serve(directory: Path) -> None:
    raise_open_files()
    loop = asyncio.get_running_loop()
    async with besieged(directory, limits=MANY) as siege:
        tenant, listen = siege.rig.tenants["acme"], siege.service.reverse_listen
        assert tenant.forward_listen is not None
        assert listen is not None
        where = {
            "forward_port": tenant.forward_listen.port,
            "reverse_port": listen.port,
            "ca_file": str(tenant.interception_ca.certificate_file),
        }
        print(json.dumps(where), flush=True)
        await loop.run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
