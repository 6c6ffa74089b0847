"""The proxy before a real S3 server, and three ways to it: directly, by the forward and by the reverse proxy.

The vault knows the server's access key, under the secret that clients use at the proxy: by default the
server's own, with `gateway=True` another one that the server does not know.
"""

import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from envelope.derive import object_key
from envelope.multipart import CompositeOpener, ending_range, open_ending
from envelope.objects import Bind, Header, Opener
from proxy.tenants.model import LegacyPolicy, ServiceEntry
from proxy.vault.model import Secrets, UpstreamCredential
from tests import pki
from tests.integration.proxy_rig import Rig, proxy
from tests.referees.moto import Moto, moto
from tests.referees.swift import Swift, swift

type Server = Swift | Moto

HOST = "localhost"


@dataclass(frozen=True, slots=True)
class Way:
    """How a client reaches the service."""

    name: str
    endpoint: str
    ca_file: Path
    access_key: str
    secret_key: str = field(repr=False)
    proxy: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For programs that take their settings from there."""
        found = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CA_BUNDLE": str(self.ca_file),
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_MAX_ATTEMPTS": "1",
        }
        if self.proxy is not None:
            found["HTTPS_PROXY"] = self.proxy
        return found


@dataclass(frozen=True, slots=True)
class Site:
    server: Server
    rig: Rig
    service: ServiceEntry
    ways: Mapping[str, Way]
    ca_file: Path
    """Of the server's certificate."""

    def opened(self, stored: bytes) -> bytes:
        """The plaintext of what lies in the store, opened by the formats alone: an object, or a composite."""
        owner = self.service.owner

        def find_key(header: Header) -> bytes:
            return object_key(self.rig.materials[owner][header.key_id], owner, header.key_id)

        if Header.parse(stored[:88]).bind is not Bind.PART:
            opener = Opener(owner, find_key)
            return bytes(opener.update(stored)) + opener.finalize()
        begin, end = ending_range(stored[-16:], stored_bytes=len(stored))
        ending = open_ending(owner, find_key, stored[begin:end], stored_bytes=len(stored))
        composite = CompositeOpener(owner, find_key, ending)
        return bytes(composite.update(stored)) + composite.finalize()


@contextlib.asynccontextmanager
async def site(
    directory: Path,
    kind: str,
    *,
    options: Mapping[str, object] | None = None,
    gateway: bool = False,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    server_host: str = HOST,
) -> AsyncIterator[Site]:
    """*kind*: `swift` or `moto`. *server_host*: its name for the proxy; directly it is `localhost`."""
    server_ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(server_ca, directory, "server-ca")
    names = [server_host, f"*.{server_host}", HOST]
    pair = pki.write_credential(pki.issue_server(server_ca, names), directory, "server")
    async with contextlib.AsyncExitStack() as parts:
        server: Server
        if kind == "swift":
            server = await parts.enter_async_context(
                swift(directory, *pair, host=server_host, storage_domain=server_host)
            )
        else:
            server = await parts.enter_async_context(moto(directory, *pair, host=server_host))
        rig = await parts.enter_async_context(proxy(directory, ca_file))
        yield await provisioned(rig, server, ca_file, options=options, gateway=gateway, legacy=legacy)


async def provisioned(
    rig: Rig,
    server: Server,
    ca_file: Path,
    *,
    options: Mapping[str, object] | None = None,
    gateway: bool = False,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    like: "Site | None" = None,
) -> Site:
    """Start *rig* before *server*. *like*: another proxy of the same network service, with the same keys."""
    tenant = rig.tenant("tenant-a")
    entry = rig.service("tenant-a/store", server.url, profile="s3", legacy=legacy)
    secret = secrets.token_urlsafe(24) if gateway else server.secret_key
    access_key = "GATEWAYKEY" if gateway else server.access_key
    held = Secrets(client_secret=secret, upstream_secret=server.secret_key if gateway else None)
    credential = UpstreamCredential(
        access_key=access_key,
        upstream_access_key=server.access_key,
        not_after_s=None,
        created_at_s=0,
        sealed=msgspec.json.encode(held),
        opener=lambda sealed: sealed,
    )
    entry = replace(
        entry, credentials={access_key: credential}, profile_options=dict(options or {"max_parts": 1000})
    )
    rig.services[entry.owner] = entry
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
        "direct": Way(
            "direct", f"https://{HOST}:{server.port}", ca_file, server.access_key, server.secret_key
        ),
        "forward": Way("forward", server.url, own_ca, access_key, secret, f"http://{tenant.forward_listen}"),
        "reverse": Way("reverse", f"https://{HOST}:{port}", own_ca, access_key, secret),
    }
    return Site(server, rig, entry, ways, ca_file)
