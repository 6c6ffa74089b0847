"""The proxy before Google's object storage, and three ways to it: directly, by forward and by reverse proxy.

async with strict_site(tmp_path) as place:
    place.ways["forward"].url
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from proxy.tenants.model import LegacyPolicy, ServiceEntry
from tests import pki
from tests.integration.proxy_rig import Answer, Rig, curl, proxy
from tests.referees.gcp import GcpStorage, gcp_storage
from tests.referees.strict_gcs import StrictGcs, strict_gcs
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment

REFEREES = Path(__file__).parents[1] / "referees"
HOST = "localhost"
WAYS = ("direct", "forward", "reverse")
THROUGH = ("forward", "reverse")


@dataclass(frozen=True, slots=True)
class Way:
    """How a client reaches the service."""

    name: str
    url: str
    ca_file: Path
    proxy: str | None = None

    async def ask(
        self,
        method: str,
        target: str,
        fields: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        timeout_s: float = 60,
    ) -> Answer:
        """One request by curl; *target* is a path, or the URL of a session."""
        given = {name.lower(): value for name, value in (fields or {}).items()}
        more: list[str] = ["--path-as-is", "--request", method] if method != "HEAD" else ["--head"]
        if body is not None:
            given.setdefault("content-type", "application/octet-stream")
            more += ["--data-binary", "@-"]
        elif method in ("POST", "PUT"):
            given.setdefault("content-length", "0")
        for name, value in given.items():
            more += ["--header", f"{name}: {value}" if value else f"{name};"]
        if self.proxy is not None:
            more += ["--proxy", self.proxy]
        url = target if target.startswith("https://") else f"{self.url}{target}"
        return await curl(*more, "--cacert", str(self.ca_file), url, body=body, timeout_s=timeout_s)

    async def put(self, bucket: str, name: str, body: bytes, query: str = "") -> Answer:
        """uploadType=media."""
        target = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}{query}"
        return await self.ask("POST", target, {}, body)

    async def get(self, bucket: str, name: str, fields: Mapping[str, str] | None = None) -> Answer:
        return await self.ask("GET", f"{place(bucket, name)}?alt=media", fields)

    def spec(self, **more: object) -> dict[str, object]:
        """For programs that run in the referees' environment."""
        return {"url": self.url, "ca": str(self.ca_file), "proxy": self.proxy, **more}


def place(bucket: str, name: str) -> str:
    return f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"


@dataclass(frozen=True, slots=True)
class Site[S: GcpStorage | StrictGcs]:
    server: S
    rig: Rig
    service: ServiceEntry
    ways: Mapping[str, Way]
    ca_file: Path


async def program(name: str, spec: Mapping[str, object]) -> Any:
    """What the referees' program *name* prints."""
    process = await asyncio.create_subprocess_exec(
        BIN / "python",
        REFEREES / name,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    out, errors = await process.communicate(json.dumps(spec).encode())
    assert process.returncode == 0, errors.decode()[-3000:]
    return json.loads(out)


@contextlib.asynccontextmanager
async def emulator_site(directory: Path) -> AsyncIterator[Site[GcpStorage]]:
    """Before gcp-storage-emulator."""
    ca_file, pair = _server_pair(directory)
    async with (
        gcp_storage(directory, *pair) as server,
        proxy(directory, ca_file) as rig,
        started(rig, server, ca_file) as site,
    ):
        yield site


@contextlib.asynccontextmanager
async def strict_site(
    directory: Path,
    *,
    options: Mapping[str, object] | None = None,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
) -> AsyncIterator[Site[StrictGcs]]:
    """Before the strict emulator."""
    ca_file, pair = _server_pair(directory)
    async with (
        strict_gcs(*pair) as server,
        proxy(directory, ca_file) as rig,
        started(rig, server, ca_file, options=options, legacy=legacy) as site,
    ):
        yield site


def _server_pair(directory: Path) -> tuple[Path, tuple[Path, Path]]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, directory, "server-ca")
    return ca_file, pki.write_credential(pki.issue_server(ca, [HOST]), directory, "server")


@contextlib.asynccontextmanager
async def started[S: GcpStorage | StrictGcs](
    rig: Rig,
    server: S,
    ca_file: Path,
    *,
    options: Mapping[str, object] | None = None,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    like: "Site[S] | None" = None,
) -> AsyncIterator[Site[S]]:
    """The engine of *rig* serves *server* to one tenant. *like*: another proxy of it, with the same keys."""
    tenant = rig.tenant("tenant-a")
    entry = rig.service("tenant-a/objects", server.url, profile="gcs", legacy=legacy)
    entry = rig.services[entry.owner] = replace(entry, profile_options=dict(options or {}))
    if like is None:
        rig.push(entry.owner)
    else:
        for key_id, material in like.rig.materials[entry.owner].items():
            rig.push(entry.owner, key_id=key_id, material=material)
    await rig.engine.prepare()
    await rig.engine.start(rig.picture())
    own_ca = tenant.interception_ca.certificate_file
    port = urlsplit(rig.reverse_url(entry, "/")).port
    ways = {
        "direct": Way("direct", server.url, ca_file),
        "forward": Way("forward", server.url, own_ca, f"http://{tenant.forward_listen}"),
        "reverse": Way("reverse", f"https://{HOST}:{port}", own_ca),
    }
    yield Site(server, rig, entry, ways, ca_file)
