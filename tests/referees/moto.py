"""moto's server: an S3 of great breadth that verifies nothing. HAProxy in front for TLS.

What it accepts proves little; what it shows of a request (`/moto-api`), versions, tags, locks and buckets'
settings is worth a second referee beside Swift.
"""

import asyncio
import contextlib
import json
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment, ended, listening, tls_front

_ANYONE = "AWS4-HMAC-SHA256 Credential=A/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@dataclass(frozen=True, slots=True)
class Moto:
    """A running moto. `url` is its endpoint, over TLS."""

    url: str
    port: int
    plain_port: int
    access_key: str = "moto-access-key"
    secret_key: str = "moto-verifies-nothing-so-this-is-no-secret"
    region: str = "us-east-1"

    def stored(self) -> list[tuple[str, bytes]]:
        """`bucket/key` and content of every object, read behind the proxy's back."""
        found: list[tuple[str, bytes]] = []
        base = f"http://127.0.0.1:{self.plain_port}"
        with urllib.request.urlopen(f"{base}/moto-api/data.json", timeout=30) as answer:
            data = json.load(answer)
        for item in data.get("s3", {}).get("FakeKey", []):
            path = f"{item['bucket_name']}/{item['name']}"
            address = f"{base}/{urllib.parse.quote(path)}"
            if item.get("version_id") not in (None, "null"):
                address += f"?versionId={item['version_id']}"
            request = urllib.request.Request(address, headers={"Authorization": _ANYONE})
            with urllib.request.urlopen(request, timeout=30) as body:
                found.append((path, body.read()))
        return found


@contextlib.asynccontextmanager
async def moto(
    directory: Path, certificate_file: Path, key_file: Path, *, host: str = "localhost"
) -> AsyncIterator[Moto]:
    port = free_port()
    with (directory / "moto.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            BIN / "moto_server",
            "-H",
            "127.0.0.1",
            "-p",
            str(port),
            stdout=output,
            stderr=output,
            env=clean_environment(),
            cwd=directory,
        )
        try:
            await listening(port, process)
            async with tls_front(directory, certificate_file, key_file, backend_port=port) as front:
                yield Moto(f"https://{host}:{front}", front, port)
        finally:
            await ended(process)
