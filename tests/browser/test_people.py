"""Who may use the proxy from a browser, and what a person sees of a refusal."""

import hashlib
import os
from pathlib import Path

import pytest

from proxy.users.model import Proof
from tests.browser.browser_site import (
    NAME,
    TENANT,
    browser,
    let,
    only_the_proxy_resolves,
    opens,
    put,
    signed_in,
    site,
    typing,
)
from tests.integration.proxy_rig import Rig


@pytest.fixture(autouse=True)
def _name(monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_proxy_resolves(monkeypatch)


async def test_only_known_users_get_through(tmp_path: Path) -> None:
    passwords: list[str] = []

    def credentials_wanted(rig: Rig) -> None:
        let(rig, requires=frozenset({Proof.CREDENTIALS}))
        passwords.append(rig.user(TENANT, "alice"))

    async with site(tmp_path, change=credentials_wanted) as place, browser(place) as context:
        page = context.pages[0]
        assert await opens(page, place) == "ERR_INVALID_AUTH_CREDENTIALS", "nobody typed anything"
        async with typing(page, "alice", "wrong") as asked:
            assert await opens(page, place) == "ERR_INVALID_AUTH_CREDENTIALS"
        assert asked == [f"Sealgate {TENANT}"] * 2
        refused = [line for line in place.rig.audit_lines() if "request-refused" in line]
        assert any("proxy-authentication-required" in line for line in refused)
        assert any("proxy-credentials-refused" in line for line in refused)
        assert len(refused) == len(place.rig.audit_lines()), "and nothing else has happened"
        async with typing(page, "alice", passwords[0]) as asked:
            assert await opens(page, place) == "200"
        assert len(asked) == 1
        page = await signed_in(context, place, "forward")
        assert await put(page, "/of alice.txt", "what alice wrote, and nobody else reads") == 201
        assert place.opened([]) == {"of alice.txt": b"what alice wrote, and nobody else reads"}
        sealed = [line for line in place.rig.audit_lines() if "object-seal" in line]
        assert all('"user":"alice"' in line for line in sealed)
        assert len(sealed) == 2, "the form she signed in by, and her file"


async def test_a_browser_that_does_not_trust_the_authority_stops(tmp_path: Path) -> None:
    async with site(tmp_path) as place, browser(place, trusts=False) as context:
        assert await opens(context.pages[0], place) == "ERR_CERT_AUTHORITY_INVALID"
        page = await context.new_page()
        await page.goto(place.portal)
        shown = await page.inner_text("body")
        assert NAME in shown
        assert str(place.tenant.forward_listen) in shown
        async with page.expect_download() as begun:
            await page.click("a[href='ca.crt']")
        authority = Path(await (await begun.value).path()).read_bytes()  # noqa: ASYNC240 - a small file
        digest = hashlib.sha256(authority).hexdigest().upper()
        assert ":".join(digest[at : at + 2] for at in range(0, 64, 2)) in shown


async def test_what_a_person_sees_of_a_refusal(tmp_path: Path) -> None:
    async with site(tmp_path, options={"fields": {"body": "refuse"}}) as place, browser(place) as context:
        page = await signed_in(context, place, "forward")
        assert await put(page, "/a.txt", "the text of the file, which stays unread") == 201
        # A folder as an archive: of ciphertext.
        answer = await page.goto(f"{place.application.url}/?zip")
        assert answer is not None
        assert (answer.status, answer.headers["sealgate-error"]) == (501, "unknown-route")
        assert await page.inner_text("#code") == "unknown-route"
        assert "nothing was sent" in await page.inner_text("#cause")
        # The application's own uploader for large files hashes content: refused before anything of it leaves.
        await page.goto(f"{place.application.url}/")
        (tmp_path / "large.bin").write_bytes(content := os.urandom(100_000))
        await page.click("a[data-dest=up2k]")
        await page.set_input_files("#u2form input[type=file] >> nth=0", tmp_path / "large.bin")
        async with page.expect_response(lambda each: each.request.method == "POST") as asked:
            await page.click("#modal-ok")
        assert (await asked.value).status == 501
        assert place.opened([content]).keys() == {"a.txt"}
        # The enterprise has withdrawn its key.
        place.rig.keys.withdraw_tenant(TENANT)
        answer = await page.goto(f"{place.application.url}/a.txt")
        assert answer is not None
        assert answer.status == 503
        assert await page.inner_text("h1") == "This was not done"
        assert await page.inner_text("#code") == "key-withdrawn"
        assert "unread" not in await page.content()
        # Pages are nobody's secret: the application can still be used.
        await page.goto(f"{place.application.url}/")
        assert "a.txt" in await page.inner_text("#files")
        assert await page.evaluate(
            "fetch('/b.txt', {method: 'PUT', body: 'x'}).then((got) => got.json())"
        ) == {
            "code": "key-withdrawn",
            "status": 503,
            "cause": "The enterprise has withdrawn this key.",
            "next_step": "Ask the enterprise's key administrator.",
        }
