"""A person's browser, a web application, and the proxy between them: all of it real.

Chromium has a home of its own in which it trusts what a person was told to trust, and is set to the address
of the proxy's PAC file. The application is copyparty.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.async_api import BrowserContext, Error, Page, async_playwright

from proxy.tenants.model import ServiceEntry, TenantEntry
from proxy.users.portal import make_portal
from runtime.serve import serving
from tests import pki
from tests.children import output_of
from tests.integration.proxy_rig import Rig, proxy
from tests.referees.comparison import opened
from tests.referees.copyparty import ROUTES, Copyparty, copyparty
from tests.referees.tls_front import clean_environment

CHROMIUM: Final = "/usr/bin/chromium"
NAME: Final = "cloud.test"
"""Of the application: browsers send no loopback name to a proxy."""
TENANT: Final = "acme"


def only_the_proxy_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let NAME be this machine, in this process."""
    real = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **more: Any) -> Any:
        known = host in (NAME, NAME.encode())
        return real("127.0.0.1" if known else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@dataclass(frozen=True, slots=True)
class Site:
    application: Copyparty
    rig: Rig
    service: ServiceEntry
    directory: Path
    portal: str
    """Its address, for the tenant."""
    ca_file: Path
    """Of the application's certificate: what the proxy trusts, and no browser."""

    @property
    def tenant(self) -> TenantEntry:
        return self.rig.tenants[TENANT]

    def base(self, way: str) -> str:
        """The application's address, as the browser knows it."""
        return self.rig.reverse_url(self.service, "") if way == "reverse" else self.application.url

    def opened(self, plaintexts: Iterable[bytes], *, but: str | None = None) -> dict[str, bytes]:
        """All that lies at the application, opened by an independent reader; no plaintext is in it.

        *but*: what lies below this path was not stored through us.
        """
        stored = self.application.stored()
        return opened(
            [each for each in stored if but is None or not each[0].startswith(but)],
            owner=self.service.owner,
            materials=self.rig.materials[self.service.owner],
            plaintexts=plaintexts,
        )


@contextlib.asynccontextmanager
async def site(
    directory: Path,
    *,
    options: Mapping[str, object] | None = None,
    change: Callable[[Rig], None] = lambda _rig: None,
) -> AsyncIterator[Site]:
    """*change*: what is provisioned besides."""
    server_ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(server_ca, directory, "server-ca")
    pair = pki.write_credential(pki.issue_server(server_ca, [NAME]), directory, "server")
    async with (
        copyparty(directory, *pair, host=NAME) as application,
        proxy(directory, ca_file) as rig,
    ):
        rig.tenant(TENANT)
        service = rig.service(f"{TENANT}/cloud", application.url, profile="web")
        service = replace(service, profile_options={"routes": ROUTES} | dict(options or {}))
        rig.services[service.owner] = service
        rig.push(service.owner)
        change(rig)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        assert rig.engine.problems == []
        async with serving(make_portal(rig.picture), host="127.0.0.1", port=0) as port:
            yield Site(application, rig, service, directory, f"http://127.0.0.1:{port}/{TENANT}/", ca_file)


@contextlib.asynccontextmanager
async def browser(site: Site, *, way: str = "forward", trusts: bool = True) -> AsyncIterator[BrowserContext]:
    """A person's browser. *way* `direct`: one without the proxy, that trusts the application itself.

    *trusts*: the authority from the portal was installed.
    """
    home = site.directory / f"home-{len(list(site.directory.glob('home-*')))}"
    (home / "downloads").mkdir(parents=True)
    if way == "direct":
        await _trust(home, site.ca_file)
        setting = f"--host-resolver-rules=MAP {NAME} 127.0.0.1"
    else:
        await _trust(home, await _authority(home, site.portal) if trusts else None)
        setting = f"--proxy-pac-url={site.portal}proxy.pac"
    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            home / "profile",
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-quic", setting],
            env={**clean_environment(), "HOME": str(home)},
            downloads_path=home / "downloads",
        )
        try:
            yield context
        finally:
            await context.close()


async def _authority(home: Path, portal: str) -> Path:
    """What a person does by hand: the authority's file from the portal."""
    file = home / "ca.crt"
    await _run("curl", "--silent", "--fail", "--output", str(file), f"{portal}ca.crt")
    return file


async def _trust(home: Path, authority: Path | None) -> None:
    """... and into the browser's store (NSS)."""
    store = home / ".pki" / "nssdb"
    store.mkdir(parents=True)
    await _run("certutil", "-N", "--empty-password", "-d", f"sql:{store}")
    if authority is not None:
        await _run("certutil", "-A", "-d", f"sql:{store}", "-n", "own", "-t", "C,,", "-i", str(authority))


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=clean_environment()
    )
    output, _ = await output_of(process)
    assert process.returncode == 0, output.decode(errors="replace")


@contextlib.asynccontextmanager
async def typing(page: Page, user: str, password: str) -> AsyncIterator[list[str]]:
    """Who is typed in when the proxy asks; once, then the person gives up. Gives the realms that asked."""
    chromium = await page.context.new_cdp_session(page)
    asked: list[str] = []
    answers: list[asyncio.Task[Any]] = []

    def reply(method: str, **what: object) -> None:
        answers.append(asyncio.create_task(chromium.send(method, what), name="a person's answer"))

    def on_paused(event: dict[str, Any]) -> None:
        reply("Fetch.continueRequest", requestId=event["requestId"])

    def on_auth(event: dict[str, Any]) -> None:
        assert event["authChallenge"]["source"] == "Proxy"
        given = {"response": "ProvideCredentials", "username": user, "password": password}
        asked.append(event["authChallenge"]["realm"])
        response = given if len(asked) == 1 else {"response": "CancelAuth"}
        reply("Fetch.continueWithAuth", requestId=event["requestId"], authChallengeResponse=response)

    chromium.on("Fetch.requestPaused", on_paused)
    chromium.on("Fetch.authRequired", on_auth)
    await chromium.send("Fetch.enable", {"handleAuthRequests": True})
    try:
        yield asked
    finally:
        await asyncio.gather(*answers)
        await chromium.send("Fetch.disable")
        await chromium.detach()


async def signed_in(context: BrowserContext, site: Site, way: str) -> Page:
    """The application's page, after its login form."""
    page = context.pages[0]
    await page.goto(f"{site.base(way)}/?h")
    await page.fill("form#lf input[type=password]", site.application.password)
    await page.click("form#lf input[type=submit]")
    await page.wait_for_load_state()
    await page.goto(f"{site.base(way)}/")
    return page


def let(rig: Rig, **access: object) -> None:
    """Change who may use the proxy, and what the PAC file says."""
    entry = rig.tenants[TENANT]
    changed = replace(entry.access, **access)  # type: ignore[arg-type]
    rig.tenants[TENANT] = replace(entry, access=changed)


async def opens(page: Page, place: Site) -> str:
    """The status the application answers with, or the browser's own error."""
    try:
        answer = await page.goto(f"{place.application.url}/?h")
    except Error as error:
        return error.message.partition("net::")[2].partition(" ")[0]
    return str(answer.status if answer is not None else None)


async def put(page: Page, path: str, text: str) -> int:
    script = "([path, body]) => fetch(path, {method: 'PUT', body}).then((answer) => answer.status)"
    status: int = await page.evaluate(script, [path, text])
    return status
