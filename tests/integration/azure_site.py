"""The proxy before Azurite, and three ways to it: directly, by the forward and by the reverse proxy.

async with site(tmp_path) as place:
    place.ways["forward"].url
"""

import asyncio
import base64
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from proxy.profiles.azure_signatures import authorization, parse_key
from proxy.tenants.model import LegacyPolicy, ServiceEntry
from proxy.vault.model import Secrets, UpstreamCredential
from tests import pki
from tests.children import output_of
from tests.integration.proxy_rig import Answer, Rig, curl, proxy
from tests.referees.azurite import Azurite, azurite
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment

REFEREES = Path(__file__).parents[1] / "referees"
HOST = "localhost"
WAYS = ("direct", "forward", "reverse")


@dataclass(frozen=True, slots=True)
class Way:
    """How a client reaches the account."""

    name: str
    url: str
    ca_file: Path
    account: str
    key: str = field(repr=False)
    token_key: str = field(repr=False)
    """What the service knows: tokens are signed with it whatever the way."""
    proxy: str | None = None

    async def ask(
        self,
        method: str,
        target: str,
        fields: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        token: bool = False,
    ) -> Answer:
        """One request by curl; *target* is behind the account's URL. *token*: not signed."""
        path = f"{urlsplit(self.url).path}{target}"
        given = {name.lower(): value for name, value in (fields or {}).items()}
        if not token:
            given |= {"x-ms-version": "2025-11-05"} | given
            given.setdefault("x-ms-date", format_datetime(datetime.now(UTC), usegmt=True))
        more: list[str] = ["--path-as-is", "--request", method] if method != "HEAD" else ["--head"]
        if body is not None:
            given.setdefault("content-type", "application/octet-stream")
            given.setdefault("content-length", str(len(body)))
            more += ["--data-binary", "@-"]
        elif method in ("POST", "PUT"):
            given.setdefault("content-length", "0")
        if not token:
            given["authorization"] = authorization(parse_key(self.key), method, path, given, self.account)
        for name, value in given.items():
            more += ["--header", f"{name}: {value}" if value else f"{name};"]
        if self.proxy is not None:
            more += ["--proxy", self.proxy]
        url = f"{self.url.removesuffix(urlsplit(self.url).path)}{path}"
        return await curl(*more, "--cacert", str(self.ca_file), url, body=body)

    def spec(self, **more: object) -> dict[str, object]:
        """For programs that run in the referees' environment."""
        return {
            "url": self.url,
            "account": self.account,
            "key": self.key,
            "token_key": self.token_key,
            "ca": str(self.ca_file),
            "proxy": self.proxy,
            **more,
        }


@dataclass(frozen=True, slots=True)
class Site:
    server: Azurite
    rig: Rig
    service: ServiceEntry
    ways: Mapping[str, Way]


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
    out, errors = await output_of(process, json.dumps(spec).encode())
    assert process.returncode == 0, errors.decode()[-3000:]
    return json.loads(out)


def credential(account: str, secret: Secrets) -> UpstreamCredential:
    return UpstreamCredential(
        access_key=account,
        upstream_access_key=account,
        not_after_s=None,
        created_at_s=0,
        sealed=msgspec.json.encode(secret),
        opener=lambda sealed: sealed,
    )


@contextlib.asynccontextmanager
async def site(
    directory: Path,
    *,
    options: Mapping[str, object] | None = None,
    gateway: bool = False,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    in_vault: bool = True,
    host_style: bool = False,
) -> AsyncIterator[Site]:
    """*gateway*: clients of the proxy have a key of their own. *host_style*: the account is in no path."""
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, directory, "server-ca")
    pair = pki.write_credential(pki.issue_server(ca, [HOST]), directory, "server")
    async with contextlib.AsyncExitStack() as parts:
        server = await parts.enter_async_context(azurite(directory, *pair, host_style=host_style))
        rig = await parts.enter_async_context(proxy(directory, ca_file))
        tenant = rig.tenant("tenant-a")
        entry = rig.service(
            "tenant-a/blobs", f"https://{HOST}:{server.port}", profile="azure-blob", legacy=legacy
        )
        own_key = base64.b64encode(secrets.token_bytes(64)).decode() if gateway else server.key
        held = Secrets(client_secret=own_key, upstream_secret=server.key if gateway else None)
        vault = {server.account: credential(server.account, held)} if in_vault else {}
        entry = replace(
            entry,
            credentials=vault,
            profile_options={"account_in_path": not host_style, **(options or {})},
        )
        rig.services[entry.owner] = entry
        rig.push(entry.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        own_ca = tenant.interception_ca.certificate_file
        port = urlsplit(rig.reverse_url(entry, "/")).port
        path = "" if host_style else f"/{server.account}"
        direct = f"https://{HOST}:{server.port}{path}"
        ways = {
            "direct": Way("direct", direct, ca_file, server.account, server.key, server.key),
            "forward": Way(
                "forward",
                direct,
                own_ca,
                server.account,
                own_key,
                server.key,
                f"http://{tenant.forward_listen}",
            ),
            "reverse": Way(
                "reverse", f"https://{HOST}:{port}{path}", own_ca, server.account, own_key, server.key
            ),
        }
        yield Site(server, rig, entry, ways)
