"""copyparty: a web application for files that people use in a browser, and a strict reader of forms.

It reads a form by its Content-Length only, compares Origin with Host, serves ranges, and logs in by a form.
Its uploader for large files (up2k) hashes content, so that it cannot work on ciphertext; the plain form, PUT
and everything that is read can.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.ports import free_port
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment, ended, listening

USER: Final = "alice"
ROUTES: Final = {
    "PUT /": "seal",
    "POST /?delete": "clear",
    "GET /?zip": "refuse",
    "GET /?tar": "refuse",
}
"""The options of the profile `web` that fit it (docs/profiles-web.md)."""


@dataclass(frozen=True, slots=True)
class Copyparty:
    """A running one, by TLS. Who knows *password* may do everything in its only volume."""

    url: str
    port: int
    root: Path
    password: str = field(default="referee", repr=False)

    def stored(self) -> list[tuple[str, bytes]]:
        """Name and content of every file."""
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        return [(str(path.relative_to(self.root)), path.read_bytes()) for path in files]


@contextlib.asynccontextmanager
async def copyparty(
    directory: Path, certificate_file: Path, key_file: Path, *, host: str = "localhost"
) -> AsyncIterator[Copyparty]:
    port = free_port()
    home, root = directory / "copyparty", directory / "volume"
    home.mkdir()
    root.mkdir()
    pair = _write_pair(home, certificate_file, key_file)
    place = Copyparty(f"https://{host}:{port}", port, root)
    with (directory / "copyparty.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            BIN / "copyparty",
            *("-i", "127.0.0.1", "-p", str(port), "--https-only", "--cert", str(pair)),
            *("-a", f"{USER}:{place.password}", "-v", f"{root}::A,{USER}", "--hist", str(home / "hist")),
            *("--no-thumb", "--no-crt", "--no-ansi", "-q", "--localtime"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**clean_environment(), "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")},
            cwd=home,
        )
        try:
            await listening(port, process)
            yield place
        finally:
            await ended(process)


def _write_pair(home: Path, certificate_file: Path, key_file: Path) -> Path:
    pair = home / "pair.pem"
    pair.touch(mode=0o600)
    pair.write_bytes(key_file.read_bytes() + certificate_file.read_bytes())
    return pair
