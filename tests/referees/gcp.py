"""gcp-storage-emulator: Google's JSON API with resumable uploads, by a third party; HAProxy in front for TLS.

1. It checks no credentials and few digests: it judges that Google's client gets along, not that it is
   refused. Of its own, and not Google's: no preconditions, no update by PUT, no DELETE of a session,
   `Range: bytes=0-0` for a session that has nothing, `http` in mediaLink. strict_gcs.py judges those.
2. It believes that it speaks HTTP in the clear: HAProxy mends the scheme of a session's Location, without
   which no client could go on by TLS.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port
from tests.referees.tls_front import clean_environment, ended, http_front, listening

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

    def contents(self, bucket: str) -> dict[str, bytes]:
        """Every object of a bucket as it is stored."""
        below = self.directory / ".cloudstorage" / bucket
        return {
            str(path.relative_to(below)): path.read_bytes() for path in below.rglob("*") if path.is_file()
        }


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
            rules = [r"http-response replace-header Location ^http://(.*)$ https://\1"]
            async with http_front(
                directory, certificate_file, key_file, backend_port=plain_port, rules=rules
            ) as port:
                yield GcpStorage(port, home, log)
        finally:
            await ended(process)
