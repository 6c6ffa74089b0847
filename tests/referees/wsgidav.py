"""WsgiDAV on cheroot over TLS, in a process of its own; and what all WebDAV servers here have in common."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tests.referees.tls_front import ended

REPOSITORY = Path(__file__).parents[2]
HOST = "localhost"


@dataclass(frozen=True, slots=True)
class DavServer:
    """A running WebDAV server. Everybody may write."""

    name: str
    port: int
    root: Path
    """Where it stores files under the names of their URLs."""

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    def stored(self) -> list[tuple[str, bytes]]:
        """Path below the root and content of every file; not the server's own notes of properties."""
        return [
            (str(path.relative_to(self.root)), path.read_bytes())
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and ".DAV" not in path.relative_to(self.root).parts
        ]


@contextlib.asynccontextmanager
async def wsgidav(directory: Path, certificate_file: Path, key_file: Path) -> AsyncIterator[DavServer]:
    root = directory / "wsgidav"
    root.mkdir()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.webdav_server",
        str(root),
        str(certificate_file),
        str(key_file),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        yield DavServer("wsgidav", port, root)
    finally:
        await ended(process)
