"""The proxy between WebDAV clients and a referee, and the three ways to it: directly, forward, reverse."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from proxy.tenants.model import LegacyPolicy, ServiceEntry
from tests import pki
from tests.integration.proxy_rig import Answer, Rig, curl, proxy
from tests.referees.comparison import opened
from tests.referees.wsgidav import DavServer

WAYS = ["direct", "forward", "reverse"]
THROUGH = ["forward", "reverse"]


class Stores(Protocol):
    """A server, and what lies there."""

    @property
    def url(self) -> str: ...

    def stored(self) -> list[tuple[str, bytes]]: ...


type Start[S: Stores] = Callable[[Path, Path, Path], AbstractAsyncContextManager[S]]
type StartServer = Start[DavServer]


@dataclass(frozen=True, slots=True)
class DavSite[S: Stores]:
    server: S
    rig: Rig
    service: ServiceEntry
    server_ca: Path

    def base(self, way: str) -> str:
        """What the client takes for the service's URL, without a path."""
        return self.rig.reverse_url(self.service, "") if way == "reverse" else self.server.url

    def trust(self, way: str) -> Path:
        if way == "direct":
            return self.server_ca
        return self.rig.tenants[self.service.owner.tenant].interception_ca.certificate_file

    def proxy_url(self, way: str) -> str | None:
        """The forward proxy to be used."""
        tenant = self.rig.tenants[self.service.owner.tenant]
        return f"http://{tenant.forward_listen}" if way == "forward" else None

    async def ask(self, way: str, path: str, *arguments: str, body: bytes | None = None) -> Answer:
        """One request by curl."""
        via = ["-x", url] if (url := self.proxy_url(way)) else []
        trust = ["--cacert", str(self.trust(way)), "--path-as-is"]
        return await curl(*arguments, *trust, *via, self.base(way) + path, body=body)

    async def dav(
        self,
        way: str,
        method: str,
        path: str,
        *,
        fields: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Any method, by curl. `{base}` in *fields* is the service's URL as this client knows it."""
        arguments = ["-X", method] if method != "HEAD" else ["--head"]
        for name, value in (fields or {}).items():
            arguments += ["-H", f"{name}: {value.replace('{base}', self.base(way))}"]
        if body is not None:
            arguments += ["--data-binary", "@-"]
            if not fields or "Content-Type" not in fields:
                arguments += ["-H", "Content-Type:"]
        answer = await self.ask(way, path, *arguments, body=body)
        # curl prints the head of what has no body.
        return replace(answer, body=b"") if method == "HEAD" else answer

    def opened(self, plaintexts: Iterable[bytes], *, but: str | None = None) -> dict[str, bytes]:
        """All that lies at the service, opened by an independent reader; nothing of *plaintexts* is in it.

        *but*: what lies below this path was not stored through us.
        """
        owner = self.service.owner
        stored = [each for each in self.server.stored() if but is None or not each[0].startswith(but)]
        return opened(stored, owner=owner, materials=self.rig.materials[owner], plaintexts=plaintexts)


@contextlib.asynccontextmanager
async def dav_site[S: Stores](
    directory: Path,
    start: Start[S],
    *,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    host: str = "localhost",
) -> AsyncIterator[DavSite[S]]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, directory, "server-ca")
    server_pair = pki.write_credential(pki.issue_server(ca, [host]), directory, "server")
    async with start(directory, *server_pair) as server, proxy(directory, ca_file) as rig:
        rig.tenant("acme")
        service = rig.service("acme/dav", server.url, profile="webdav", legacy=legacy)
        rig.push(service.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        yield DavSite(server, rig, service, ca_file)
