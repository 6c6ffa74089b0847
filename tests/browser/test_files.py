"""A person's day with a web application: the same with the proxy as without it, over ciphertext.

Forms, scripts, downloads and ranges, by Chromium against copyparty: directly, through the forward proxy by
its PAC file, and at the reverse proxy's address.
"""

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Page

from tests.browser.browser_site import Site, browser, only_the_proxy_resolves, signed_in, site

BIG = 3 * 1024 * 1024 + 3
UPLOADS = {"big.bin": BIG, "a b+ü&.txt": 40_000, "empty.bin": 0, "one.bin": 1, "by fetch.bin": 70_001}

PUT = """
async ([address, name]) => {
    const file = [...document.querySelector("#chosen").files].find((each) => each.name === name);
    const seen = [];
    const asked = new XMLHttpRequest();
    asked.upload.onprogress = (event) => seen.push([event.loaded, event.total, event.lengthComputable]);
    const ended = new Promise((resolve) => { asked.onloadend = resolve; });
    asked.open("PUT", address);
    asked.send(file);
    await ended;
    return {status: asked.status, events: seen};
}
"""
POST = """
async ([address, names]) => {
    const form = new FormData();
    form.append("act", "bput");
    for (const file of document.querySelector("#chosen").files)
        if (names.includes(file.name)) form.append("f", file, file.name);
    const answer = await fetch(address, {method: "POST", body: form});
    return [answer.status, (await answer.json()).files.map((each) => each.fn)];
}
"""
GET = """
async ([address, options]) => {
    const answer = await fetch(address, options);
    const body = await answer.arrayBuffer();
    const digest = [...new Uint8Array(await crypto.subtle.digest("SHA-256", body))];
    const named = ["content-type", "content-length", "content-range", "accept-ranges", "content-disposition"];
    return [
        answer.status, body.byteLength, digest.map((each) => each.toString(16).padStart(2, "0")).join(""),
        named.map((name) => answer.headers.get(name)),
    ];
}
"""
RANGES = ["bytes=0-0", "bytes=16380-16390", "bytes=-7", f"bytes={BIG - 20_000}-"]


@pytest.fixture(autouse=True)
def _name(monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_proxy_resolves(monkeypatch)


@dataclass(frozen=True, slots=True)
class Day:
    """One person's, in a folder of their own."""

    context: BrowserContext
    page: Page
    files: dict[str, Path]
    folder: str
    """Its address."""

    async def spend(self) -> dict[str, Any]:
        """What the person saw."""
        seen: dict[str, Any] = {}
        seen["folder"] = await self.make_folder()
        seen["by the form"] = await self.upload_by_form("big.bin", "a b+ü&.txt", "empty.bin")
        await self.page.goto(self.folder)
        await self.choose_for_scripts()
        async with self.slow():
            progress = await self.page.evaluate(PUT, [self.address("one more.bin"), "big.bin"])
        seen["progress"] = self.judged(progress)
        seen["put"] = (await self.page.evaluate(PUT, [self.address("one.bin"), "one.bin"]))["status"]
        seen["post"] = await self.page.evaluate(POST, [f"{self.folder}?j", ["by fetch.bin"]])
        for name in (*UPLOADS, "one more.bin"):
            seen[f"get {name}"] = await self.page.evaluate(GET, [self.address(name), {}])
            seen[f"head {name}"] = await self.page.evaluate(GET, [self.address(name), {"method": "HEAD"}])
        for wanted in RANGES:
            options = {"headers": {"Range": wanted}}
            seen[wanted] = await self.page.evaluate(GET, [self.address("big.bin"), options])
        # What is wrong with them is said in the application's words, or in ours.
        beyond = {"headers": {"Range": f"bytes={BIG}-"}}
        seen["beyond"] = (await self.page.evaluate(GET, [self.address("big.bin"), beyond]))[0]
        seen["missing"] = (await self.page.evaluate(GET, [self.address("missing"), {}]))[0]
        seen["download"] = await self.download("a b+ü&.txt")
        seen["names"] = await self.names()
        doomed = self.address("one.bin")
        seen["deleted"] = (await self.page.evaluate(GET, [f"{doomed}?delete", {"method": "POST"}]))[0]
        seen["gone"] = (await self.page.evaluate(GET, [doomed, {}]))[0]
        return seen

    def address(self, name: str) -> str:
        return f"{self.folder}{name}"

    async def make_folder(self) -> str:
        name = self.folder.rstrip("/").rpartition("/")[2]
        await self.page.click("a[data-dest=mkdir]")
        await self.page.fill("#op_mkdir input[name=name]", name)
        async with self.page.expect_response(lambda answer: answer.request.method == "POST") as answered:
            await self.page.click("#op_mkdir input[type=submit]")
        status = (await answered.value).status
        await self.page.goto(self.folder)
        return f"{status} {await self.page.title() == name}"

    async def upload_by_form(self, *names: str) -> list[str]:
        await self.page.click("a[data-dest=bup]")
        await self.page.set_input_files("#op_bup input[type=file]", [self.files[name] for name in names])
        async with self.page.expect_navigation():
            await self.page.click("#op_bup input[type=submit]")
        text = await self.page.inner_text("body")
        return [name for name in names if name in text and "OK //" in text]

    @contextlib.asynccontextmanager
    async def slow(self) -> AsyncIterator[None]:
        """Uploads take long enough for their progress to be told of."""
        chromium = await self.context.new_cdp_session(self.page)
        line = {"offline": False, "latency": 0, "downloadThroughput": -1}
        await chromium.send("Network.enable")
        await chromium.send("Network.emulateNetworkConditions", {**line, "uploadThroughput": BIG})
        yield
        await chromium.send("Network.emulateNetworkConditions", {**line, "uploadThroughput": -1})
        await chromium.detach()

    async def choose_for_scripts(self) -> None:
        """A field of a page, from which its scripts may take files."""
        await self.page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<input type=file multiple id=chosen>')"
        )
        await self.page.set_input_files("#chosen", list(self.files.values()))

    @staticmethod
    def judged(progress: dict[str, Any]) -> dict[str, Any]:
        """Which events there are is the moment's; that they tell of all, and nothing wrong, is not."""
        loaded = [event[0] for event in progress["events"]]
        return {
            "status": progress["status"],
            "rising": loaded == sorted(loaded),
            "last": loaded[-1:],
            "several": len(loaded) > 1,
            "of": {(total, computable) for _, total, computable in progress["events"]},
        }

    async def download(self, name: str) -> list[str]:
        async with self.page.expect_download() as begun:
            await self.page.evaluate(
                "(address) => { location.href = address; }", f"{self.address(name.replace('&', '%26'))}?dl"
            )
        download = await begun.value
        content = Path(await download.path()).read_bytes()  # noqa: ASYNC240 - a small file
        return [download.suggested_filename, hashlib.sha256(content).hexdigest()]

    async def names(self) -> list[str]:
        await self.page.goto(self.folder)
        await self.page.wait_for_selector("#files tbody tr")
        return sorted(await self.page.eval_on_selector_all("#files a[id^=f-]", "all => all.map(a => a.text)"))


async def spent(place: Site, way: str, files: dict[str, Path]) -> dict[str, Any]:
    async with browser(place, way=way) as context:
        page = await signed_in(context, place, way)
        return await Day(context, page, files, f"{place.base(way)}/{way}/").spend()


async def test_a_day_is_the_same_with_the_proxy(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    contents = {name: os.urandom(size) for name, size in UPLOADS.items()}
    files = {name: sources / name for name in UPLOADS}
    for name, path in files.items():
        path.write_bytes(contents[name])
    async with site(tmp_path) as place:
        direct = await spent(place, "direct", files)
        assert direct["by the form"] == ["big.bin", "a b+ü&.txt", "empty.bin"]
        assert direct["get big.bin"][2] == hashlib.sha256(contents["big.bin"]).hexdigest()
        assert direct["progress"]["several"]
        for way in ("forward", "reverse"):
            through = await spent(place, way, files)
            different = [
                f"{name}: {saw}\n  {through[name]}" for name, saw in direct.items() if saw != through[name]
            ]
            assert not different, "\n".join([way, *different])
        plaintexts = [content for content in contents.values() if len(content) > 100]
        stored = place.opened(plaintexts, but="direct/")
        expected = contents | {"one more.bin": contents["big.bin"]}
        del expected["one.bin"]
        for way in ("forward", "reverse"):
            assert {name: stored[f"{way}/{name}"] for name in expected} == expected
        assert len(stored) == 2 * len(expected), "and nothing else"
