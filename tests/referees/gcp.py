"""gcp-storage-emulator: Google's JSON API with resumable uploads, by a third party; HAProxy in front for TLS.

It checks no credentials and few digests: it judges that Google's client gets along, not that it is refused.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port
from tests.referees.tls_front import clean_environment, ended, listening, tls_front

EMULATOR = Path(__file__).parents[2] / ".venv-referees" / "bin" / "gcp-storage-emulator"
BUCKET = "referee-bucket"


@dataclass(frozen=True, slots=True)
class GcpStorage:
    port: int
    directory: Path
    log: Path
    bucket: str = BUCKET

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def stored(self) -> list[tuple[str, bytes]]:
        """Name and content of every file below its directory."""
        return [
            (str(path.relative_to(self.directory)), path.read_bytes())
            for path in sorted(self.directory.rglob("*"))
            if path.is_file()
        ]


@contextlib.asynccontextmanager
async def gcp_storage(directory: Path, certificate_file: Path, key_file: Path) -> AsyncIterator[GcpStorage]:
    """Start it with one bucket."""
    home = directory / "gcp"
    home.mkdir()
    plain_port, log = free_port(), directory / "gcp.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(EMULATOR), "-d", str(home), "start", "--host", "127.0.0.1", "--port", str(plain_port),
            "--default-bucket", BUCKET,
            stdout=output, stderr=output, env=clean_environment(), cwd=home,
        )  # fmt: skip
        try:
            await listening(plain_port, process)
            async with tls_front(directory, certificate_file, key_file, backend_port=plain_port) as port:
                yield GcpStorage(port, home, log)
        finally:
            await ended(process)
