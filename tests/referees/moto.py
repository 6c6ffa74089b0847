"""moto's server: an S3 of great breadth that verifies nothing. HAProxy in front for TLS.

What it accepts proves little; what it shows of a request (`/moto-api`), versions, tags, locks and buckets'
settings is worth a second referee beside Swift.
"""

import asyncio
import contextlib
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

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
        # Not `/moto-api/data.json`: it fails as soon as there is an upload in parts.
        found: list[tuple[str, bytes]] = []
        for bucket in self._texts("", "Bucket", "Name"):
            names = (path for path in self._versions(bucket["Name"]))
            found += [(f"{bucket['Name']}/{name}", self._read(address)) for name, address in names]
        return found

    def _versions(self, bucket: str) -> list[tuple[str, str]]:
        entries = self._texts(f"{bucket}?versions&max-keys=1000", "Version", "Key", "VersionId")
        return [
            (
                entry["Key"],
                f"{bucket}/{urllib.parse.quote(entry['Key'])}"
                + ("" if entry["VersionId"] == "null" else f"?versionId={entry['VersionId']}"),
            )
            for entry in entries
        ]

    def _texts(self, address: str, entry: str, *names: str) -> list[dict[str, str]]:
        root = ET.fromstring(self._read(address))
        return [
            {name: found.findtext(f"{{*}}{name}") or "" for name in names}
            for found in root.iterfind(f".//{{*}}{entry}")
        ]

    def _read(self, address: str) -> bytes:
        url = f"http://127.0.0.1:{self.plain_port}/{address}"
        request = urllib.request.Request(url, headers={"Authorization": _ANYONE})
        with urllib.request.urlopen(request, timeout=30) as answer:
            body: bytes = answer.read()
            return body


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
