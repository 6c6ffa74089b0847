"""KACLS as they are deployed: `EncryptionService` behind TLS on a port, key sets at a real HTTPS server."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from certs.pki import Credential
from proxy.encryption_service.model import DialectName, TokenIssuer
from proxy.encryption_service.service import EncryptionService
from proxy.encryption_service.settings import (
    EncryptionServiceSettings,
    ListenSettings,
    OutboundSettings,
)
from tests.pki import issue_server, make_server_ca, write_certificate, write_credential
from tests.ports import free_port
from tests.proxy.encryption_service.dialects.kacls_rig import GOOGLE, IDP, KaclsRig
from tests.proxy.encryption_service.service_rig import ServiceRig
from tests.proxy.encryption_service.token_mint import Mint


class Tls:
    """A CA for servers on localhost, and one certificate of it."""

    def __init__(self, directory: Path) -> None:
        self._ca: Credential = make_server_ca()
        self.ca_file = write_certificate(self._ca.certificate, directory / "ca.crt")
        self.certificate_file, self.key_file = write_credential(
            issue_server(self._ca), directory, "localhost"
        )


@asynccontextmanager
async def issuers(tls: Tls, *mints: Mint) -> AsyncIterator[dict[Mint, TokenIssuer]]:
    """Serve the key set of each, at `https://localhost:<port>/<number>`."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=mints[int(request.path[1:])].key_set(), content_type="application/json")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.certificate_file, tls.key_file)
    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        port = runner.addresses[0][1]
        yield {
            mint: TokenIssuer(
                issuer=mint.issuer, jwks_url=f"https://localhost:{port}/{number}", audience=mint.audience
            )
            for number, mint in enumerate(mints)
        }
    finally:
        await runner.cleanup()


class Site:
    """One running KACLS; its rig gives tokens and keys, `url` is where it is."""

    def __init__(self, rig: KaclsRig, tls: Tls) -> None:
        self.rig = rig
        self.tls = tls
        self.port = free_port()
        self.url = f"https://localhost:{self.port}/kacls/acme"

    @property
    def service(self) -> ServiceRig:
        return self.rig.service

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[EncryptionService]:
        settings = EncryptionServiceSettings(
            listen=(
                ListenSettings(
                    host="127.0.0.1",
                    port=self.port,
                    dialects=(DialectName.KACLS,),
                    certificate_file=self.tls.certificate_file,
                    key_file=self.tls.key_file,
                ),
            ),
            outbound=OutboundSettings(ca_file=self.tls.ca_file, private_hosts=("localhost",)),
        )
        rig = self.service
        service = EncryptionService(
            settings,
            state_dir=rig.audit_file.parent,
            keys=rig.keys,
            audit=rig.audit,
            clock=rig.clock,
            directory=rig.directory,
        )
        service.start()
        try:
            yield service
        finally:
            await service.stop(grace_s=0)


def set_up(site: Site, where: dict[Mint, TokenIssuer], **changes: Any) -> None:
    """The endpoint at the site's URL, believing the issuers that are *where*."""
    usual: dict[str, Any] = {
        "url": site.url,
        "authentication_issuers": (where[IDP],),
        "authorization_issuers": (where[GOOGLE],),
        "trusted_kacls": (),
    }
    site.rig.set_endpoint(**(usual | changes))
