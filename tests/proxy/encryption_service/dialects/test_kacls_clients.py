"""The clients there are: Google's own uploader, and a browser with a page of Google's origin."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from drive_cse_upload import _cse_crypter, _cse_kacls_client, _cse_util
from playwright.async_api import Page, async_playwright

from tests.proxy.encryption_service.dialects.kacls_rig import (
    ADMIN,
    GOOGLE,
    IDP,
    ORIGIN,
    RESOURCE,
    KaclsRig,
    b64,
    new_key,
)
from tests.proxy.encryption_service.dialects.kacls_site import Site, Tls, issuers, set_up

CHROMIUM: Final = "/usr/bin/chromium"
EVIL: Final = "https://evil.example"
FETCH: Final = """
async ([url, options]) => {
    try {
        const answer = await fetch(url, options);
        return {status: answer.status, body: await answer.json(), retry: answer.headers.get("retry-after")};
    } catch (error) {
        return {blocked: String(error)};
    }
}
"""


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    tls = Tls(tmp_path)
    site = Site(KaclsRig(tmp_path), tls)
    try:
        async with issuers(tls, IDP, GOOGLE) as where:
            set_up(site, where)
            async with site.serving():
                yield site
    finally:
        site.rig.close()


# drive-cse-upload


async def test_googles_uploader(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `CseUploader.upload` does with a KACLS, step by step, by its own classes; Drive is left out."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(site.tls.ca_file))
    client, crypter = _cse_kacls_client.CseKaclsClient(), _cse_crypter.CseCrypter()
    document = tmp_path / "document"
    document.write_bytes(b"minutes of the board\n" * 200_000)  # 4 MB: three chunks
    sealed, opened = tmp_path / "sealed", tmp_path / "opened"
    with document.open("rb") as source, sealed.open("wb") as sink:
        crypter.encrypt(source, sink)
    key = crypter.get_key()
    token = site.rig.authentication(ADMIN)

    wrapped = await asyncio.to_thread(
        client.privileged_wrap, _cse_util.b64encode(key), RESOURCE, token, site.url
    )
    unwrapped = await asyncio.to_thread(client.privileged_unwrap, wrapped, RESOURCE, token, site.url)
    with sealed.open("rb") as source, opened.open("wb") as sink:
        _cse_crypter.CseCrypter().decrypt(_cse_util.b64decode(unwrapped), source, sink)
    assert opened.read_bytes() == document.read_bytes()
    assert [record["reason"] for record in site.service.records()] == ["import", "import"]

    # Its own idea of the key's hash is what `/digest` says.
    import requests

    verifier = site.rig.authorization("verifier", kacls_url=site.url)
    answer = await asyncio.to_thread(
        requests.post,
        f"{site.url}/digest",
        json={"authorization": verifier, "reason": "", "wrapped_key": wrapped},
        timeout=60,
    )
    assert answer.json() == {"resource_key_hash": client.resource_key_hash(key, RESOURCE)}

    with pytest.raises(RuntimeError, match="admin-list"):
        await asyncio.to_thread(
            client.privileged_unwrap, wrapped, RESOURCE, site.rig.authentication(), site.url
        )
    with pytest.raises(RuntimeError, match="resource-name"):
        await asyncio.to_thread(client.privileged_unwrap, wrapped, RESOURCE + "x", token, site.url)
    site.service.withdraw(site.rig.key)
    with pytest.raises(RuntimeError, match="revoked"):
        await asyncio.to_thread(client.privileged_unwrap, wrapped, RESOURCE, token, site.url)


# Chromium


async def call(page: Page, site: Site, operation: str, **members: object) -> dict[str, Any]:
    options = {
        "method": "POST",
        "headers": {"content-type": "application/json"},
        "body": json.dumps(members),
    }
    answer = await page.evaluate(FETCH, [f"{site.url}/{operation}", options])
    assert isinstance(answer, dict)
    return answer


async def test_a_page_of_googles_origin_and_one_of_another(site: Site) -> None:
    """Chromium decides what a page may send and read. The pages are the test's, the answers the service's."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-features=LocalNetworkAccessChecks,PrivateNetworkAccessPermissionPrompt",
            ],
        )
        try:
            context = await browser.new_context(ignore_https_errors=True)
            for origin in (ORIGIN, EVIL):
                await context.route(
                    f"{origin}/**",
                    lambda route: route.fulfill(
                        body="<!doctype html><title>page</title>", content_type="text/html"
                    ),
                )
            google, evil = await context.new_page(), await context.new_page()
            await google.goto(f"{ORIGIN}/")
            await evil.goto(f"{EVIL}/")

            key = b64(new_key())
            tokens = {
                "authentication": site.rig.authentication(),
                "authorization": site.rig.authorization("writer", kacls_url=site.url),
                "reason": "{client:'drive' op:'update'}",
            }
            wrapped = await call(google, site, "wrap", **tokens, key=key)
            assert wrapped["status"] == 200, wrapped
            blob = wrapped["body"]["wrapped_key"]
            opened = await call(google, site, "unwrap", **tokens, wrapped_key=blob)
            assert (opened["status"], opened["body"]) == (200, {"key": key})

            # Errors can be read as well, of every layer.
            reader = tokens | {"authorization": site.rig.authorization("reader", kacls_url=site.url)}
            denied = await call(google, site, "wrap", **reader, key=key)
            assert (denied["status"], denied["body"]["details"]) == (403, "role")
            missing = await call(google, site, "nothing")
            assert (missing["status"], missing["body"]["code"]) == (404, 404)
            large = await call(google, site, "wrap", reason="x" * 100_000)
            assert (large["status"], large["body"]["code"]) == (413, 413)
            assert await google.evaluate(FETCH, [f"{site.url}/status", {}])

            # The same call, with good tokens, from elsewhere: never sent, or refused, and not to be read.
            before = len(site.service.records())
            assert (
                "Failed to fetch" in (await call(evil, site, "unwrap", **tokens, wrapped_key=blob))["blocked"]
            )
            plain = {
                "method": "POST",
                "body": json.dumps(tokens | {"wrapped_key": blob}),
            }  # needs no preflight
            for options in (plain, plain | {"mode": "no-cors"}, {}):
                answer = await evil.evaluate(FETCH, [f"{site.url}/unwrap", options])
                assert "blocked" in answer, answer
            assert "blocked" in await evil.evaluate(FETCH, [f"{site.url}/status", {}])
            assert len(site.service.records()) == before

            site.service.withdraw(site.rig.key)
            revoked = await call(google, site, "unwrap", **tokens, wrapped_key=blob)
            assert (revoked["status"], revoked["body"]["details"]) == (403, "revoked")
            site.service.push(site.rig.key)
            site.rig.clock.shift(331)
            stale = await call(google, site, "unwrap", **tokens, wrapped_key=blob)
            assert (stale["status"], stale["retry"]) == (503, "5")
        finally:
            await browser.close()
