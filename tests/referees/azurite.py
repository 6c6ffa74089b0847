"""Azurite, Microsoft's emulator of Azure Blob Storage: checks SharedKey signatures, ids, ranges, conditions.

It speaks TLS itself. `tests/referees/node` brings it; everything it stores lies below one directory.
"""

import asyncio
import base64
import contextlib
import secrets
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_port
from tests.referees.tls_front import clean_environment, ended, host_front, listening

ROOT = Path(__file__).parents[2]
AZURITE = ROOT / ".node-referees" / "node_modules" / ".bin" / "azurite-blob"
ACCOUNT = "refereeaccount"


@dataclass(frozen=True, slots=True)
class Azurite:
    """A running Azurite. `url` is the account's endpoint: the account is in its path, or in no path."""

    port: int
    directory: Path
    log: Path
    account: str = ACCOUNT
    key: str = field(default="", repr=False)
    """Of the account, in base64."""
    host_style: bool = False

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" + ("" if self.host_style else f"/{self.account}")

    def stored(self) -> list[tuple[str, bytes]]:
        """Name and content of every file below its directory: blobs lie in extents, many in one file."""
        return [
            (str(path.relative_to(self.directory)), path.read_bytes())
            for path in sorted(self.directory.rglob("*"))
            if path.is_file()
        ]


@contextlib.asynccontextmanager
async def azurite(
    directory: Path, certificate_file: Path, key_file: Path, *, host_style: bool = False
) -> AsyncIterator[Azurite]:
    """Start it with one account whose key is drawn now.

    *host_style*: Azurite finds the account in the host's name, which HAProxy in front of it says for all.
    """
    home = directory / "azurite"
    home.mkdir()
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    port, log = free_port(), directory / "azurite.log"
    environment = {**clean_environment(), "AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"}
    async with contextlib.AsyncExitStack() as parts:
        output = parts.enter_context(log.open("wb"))
        process = await asyncio.create_subprocess_exec(
            shutil.which("node") or "node", str(AZURITE.resolve()),
            "--location", str(home), "--blobPort", str(port),
            "--cert", str(certificate_file), "--key", str(key_file),
            "--disableTelemetry", "--skipApiVersionCheck",
            *(() if host_style else ("--disableProductStyleUrl",)),
            stdout=output, stderr=output, env=environment,
        )  # fmt: skip
        parts.push_async_callback(ended, process)
        await listening(port, process)
        if host_style:
            port = await parts.enter_async_context(
                host_front(
                    directory,
                    certificate_file,
                    key_file,
                    backend_port=port,
                    host=f"{ACCOUNT}.blob.localhost:{port}",
                )
            )
        yield Azurite(port, home, log, key=key, host_style=host_style)
