"""OpenStack Swift with its s3api: the strict referee of S3 (it verifies signatures, digests and checksums).

One account, container and object server each, in processes of their own, all data below one directory;
HAProxy in front for TLS. `requirements-referees.in` brings Swift.
"""

import asyncio
import contextlib
import getpass
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_port
from tests.referees.tls_front import clean_environment, ended, listening, tls_front

BIN = Path(__file__).parents[2] / ".venv-referees" / "bin"
ACCESS_KEY = "test:tester"
REGION = "us-east-1"

_PROXY_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}
max_clients = 1024
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck proxy-logging listing_formats bulk s3api tempauth slo dlo \
symlink versioned_writes proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:s3api]
use = egg:swift#s3api
s3_acl = no
allow_multipart_uploads = yes
min_segment_size = 5242880
location = us-east-1
{s3api}
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
"""
_PLAIN_FILTERS = {
    "catch_errors": "catch_errors",
    "gatekeeper": "gatekeeper",
    "healthcheck": "healthcheck",
    "proxy-logging": "proxy_logging",
    "listing_formats": "listing_formats",
    "bulk": "bulk",
    "slo": "slo",
    "dlo": "dlo",
    "symlink": "symlink",
}
_SERVER_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}
devices = {devices}
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""


@dataclass(frozen=True, slots=True)
class Swift:
    """A running Swift. `url` is its S3 endpoint, over TLS."""

    url: str
    port: int
    plain_port: int
    """The same endpoint without TLS."""
    devices: Path
    log: Path
    access_key: str = ACCESS_KEY
    secret_key: str = field(default="", repr=False)
    region: str = REGION

    def stored(self) -> list[tuple[str, bytes]]:
        """Path below the object server's directory and content of everything that lies there as an object."""
        root = self.devices / "sdb1" / "objects"
        return [
            (str(path.relative_to(root)), path.read_bytes())
            for path in sorted(root.rglob("*.data"))
            if path.is_file()
        ]

    def stored_attributes(self) -> bytes:
        """All extended attributes of those objects (Swift keeps names, ETags and client metadata there)."""
        root = self.devices / "sdb1" / "objects"
        found = [
            os.getxattr(path, name) for path in sorted(root.rglob("*.data")) for name in os.listxattr(path)
        ]
        return b"\n".join(found)


@contextlib.asynccontextmanager
async def swift(
    directory: Path,
    certificate_file: Path,
    key_file: Path,
    *,
    host: str = "localhost",
    storage_domain: str = "",
) -> AsyncIterator[Swift]:
    """Start all four servers; *storage_domain*: buckets are served as `bucket.storage_domain` too."""
    home = directory / "swift"
    devices = home / "devices"
    (devices / "sdb1").mkdir(parents=True)
    secret = secrets.token_urlsafe(24)
    user = getpass.getuser()
    (home / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = referee\nswift_hash_path_prefix = referee\n"
        "[storage-policy:0]\nname = gold\ndefault = yes\n"
    )
    ports = {name: free_port() for name in ("account", "container", "object")}
    for name, port in ports.items():
        (home / f"{name}-server.conf").write_text(
            _SERVER_CONF.format(port=port, user=user, directory=home, devices=devices, name=name)
        )
    proxy_port = free_port()
    filters = "".join(f"[filter:{name}]\nuse = egg:swift#{part}\n" for name, part in _PLAIN_FILTERS.items())
    s3api = f"storage_domain = {storage_domain}" if storage_domain else ""
    (home / "proxy-server.conf").write_text(
        _PROXY_CONF.format(port=proxy_port, user=user, directory=home, secret=secret, s3api=s3api) + filters
    )
    log = home / "servers.log"
    environment = {**clean_environment(), "SWIFT_DIR": str(home)}
    await _make_rings(home, ports, environment)
    async with contextlib.AsyncExitStack() as stack:
        output = stack.enter_context(log.open("ab"))
        for name, port in {**ports, "proxy": proxy_port}.items():
            process = await asyncio.create_subprocess_exec(
                BIN / f"swift-{name}-server",
                str(home / f"{name}-server.conf"),
                "-v",
                stdout=output,
                stderr=output,
                env=environment,
            )
            stack.push_async_callback(ended, process)
            if name == "proxy":
                await listening(port, process)
        front = await stack.enter_async_context(
            tls_front(home, certificate_file, key_file, backend_port=proxy_port)
        )
        await _ready(list(ports.values()))
        yield Swift(f"https://{host}:{front}", front, proxy_port, devices, log, secret_key=secret)


async def _make_rings(home: Path, ports: dict[str, int], environment: dict[str, str]) -> None:
    async def ring(name: str, port: int) -> None:
        builder = str(home / f"{name}.builder")
        for arguments in (
            ["create", "4", "1", "1"],
            ["add", f"r1z1-127.0.0.1:{port}/sdb1", "1"],
            ["rebalance"],
        ):
            process = await asyncio.create_subprocess_exec(
                BIN / "swift-ring-builder",
                builder,
                *arguments,
                stdout=asyncio.subprocess.DEVNULL,
                env=environment,
            )
            if await process.wait() not in (0, 1):  # 1: a warning
                raise ChildProcessError(f"swift-ring-builder {name} {arguments[0]}")

    async with asyncio.TaskGroup() as group:
        for name, port in ports.items():
            group.create_task(ring(name, port), name=f"ring:{name}")


async def _ready(ports: list[int]) -> None:
    async with asyncio.timeout(60):
        for port in ports:
            while True:
                try:
                    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                break
