"""A proxy that is gone, and a line that breaks: what a browser does then, it can do here."""

import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from playwright.async_api import Page

from proxy.tenants.model import Listen
from tests.browser.browser_site import (
    TENANT,
    Site,
    browser,
    let,
    only_the_proxy_resolves,
    opens,
    put,
    signed_in,
    site,
)
from tests.browser.first_proxy import Told
from tests.integration.proxy_rig import REPOSITORY, Rig, until
from tests.ports import free_port


@pytest.fixture(autouse=True)
def _name(monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_proxy_resolves(monkeypatch)


@contextlib.asynccontextmanager
async def first_proxy(directory: Path, place: Site, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another proxy of the same tenant and service, with the same key."""
    authority = place.tenant.interception_ca
    told = Told(
        owner=str(place.service.owner),
        upstream=str(place.service.upstream),
        options=dict(place.service.profile_options),
        port=port,
        ca_file=str(place.ca_file),
        interception=(str(authority.certificate_file), str(authority.key_file)),
        materials={
            key_id.raw.hex(): bytes(material)
            for key_id, material in place.rig.materials[place.service.owner].items()
        },
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.browser.first_proxy", str(directory)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(told))
        process.stdin.close()
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_second_proxy_takes_over_when_the_first_is_killed(tmp_path: Path) -> None:
    port = free_port()
    directory = tmp_path / "first"
    directory.mkdir()

    def two(rig: Rig) -> None:
        let(rig, proxies=(f"127.0.0.1:{port}", str(rig.tenants[TENANT].forward_listen)))

    async with (
        site(tmp_path, change=two) as place,
        first_proxy(directory, place, port) as first,
        browser(place) as context,
    ):
        page = await signed_in(context, place, "forward")
        assert await put(page, "/first.txt", "stored by way of the first proxy") == 201
        assert place.rig.audit_lines() == []
        assert "object-seal" in (directory / "audit.jsonl").read_text()
        first.kill()
        await first.wait()
        await page.goto(f"{place.application.url}/")  # no browser sends an upload again by itself
        assert await put(page, "/second.txt", "stored by way of the second proxy") == 201
        read = await page.evaluate("fetch('/first.txt').then((answer) => answer.text())")
        assert read == "stored by way of the first proxy"
        assert any("object-seal" in line for line in place.rig.audit_lines())
        await place.rig.engine.stop(grace_s=0)
        assert await opens(page, place) == "ERR_PROXY_CONNECTION_FAILED", "and never past them"
        assert place.opened([]).keys() == {"first.txt", "second.txt"}


class Road:
    """Carries bytes between browser and proxy; breaks off once, *break_at* bytes into some answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.break_at: int | None = None
        self.breaks = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer), name="road")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            ends.append(back)
            up = asyncio.create_task(self._pass(reader, back), name="road:up")
            down = asyncio.create_task(self._pass(there, writer, is_answer=True), name="road:down")
            try:
                await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        finally:
            for end in ends:
                end.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool = False
    ) -> None:
        passed = 0
        while piece := await reader.read(16384):
            passed += len(piece)
            writer.write(piece)
            await writer.drain()
            if is_answer and self.break_at is not None and passed > self.break_at:
                self.break_at, self.breaks = None, self.breaks + 1
                return


def over(road_port: int, listen: int) -> Callable[[Rig], None]:
    """The proxy listens at *listen*, and its users are told of the road."""

    def change(rig: Rig) -> None:
        let(rig, proxies=(f"127.0.0.1:{road_port}",))
        entry = rig.tenants[TENANT]
        rig.tenants[TENANT] = dataclasses.replace(entry, forward_listen=Listen("127.0.0.1", listen))

    return change


async def resume(page: Page) -> None:
    """What a person does in the browser's list of downloads."""
    await page.goto("chrome://downloads/")
    await page.click("downloads-item #more-actions")
    await page.click("downloads-item #pause-or-resume")


async def test_a_download_that_broke_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """Chromium asks for the rest, of the same version (If-Range); what it keeps is the whole file."""
    content = os.urandom(9 * 1024 * 1024 + 1)
    (tmp_path / "large.bin").write_bytes(content)
    kept = tmp_path / "kept" / "large.bin"
    road = Road(listen := free_port())
    async with (
        road.open() as port,
        site(tmp_path, change=over(port, listen)) as place,
        browser(place) as context,
    ):
        page = await signed_in(context, place, "forward")
        await page.click("a[data-dest=bup]")
        await page.set_input_files("#op_bup input[type=file]", tmp_path / "large.bin")
        async with page.expect_navigation():
            await page.click("#op_bup input[type=submit]")
        assert place.opened([content]) == {"large.bin": content}
        # A date tells versions apart if it is a minute old (RFC 9110 8.8.2.2); browsers go by that.
        os.utime(place.application.root / "large.bin", (1_700_000_000, 1_700_000_000))
        chromium = await context.new_cdp_session(page)
        behaviour = {"behavior": "allow", "downloadPath": str(kept.parent)}  # the browser's own, not a test's
        await chromium.send("Browser.setDownloadBehavior", behaviour)
        before = len(place.rig.audit_lines())
        road.break_at = 4 * 1024 * 1024
        await page.evaluate("() => { location.href = '/large.bin?dl'; }")
        await until(lambda: road.breaks == 1, timeout_s=60)
        await resume(page)
        await until(lambda: kept.exists() and kept.stat().st_size == len(content), timeout_s=60)
        assert kept.read_bytes() == content
        opened = [
            msgspec.json.decode(line) for line in place.rig.audit_lines()[before:] if '"object-open"' in line
        ]
        assert [line["start"] is None for line in opened] == [True, False]
        assert 1024 * 1024 < opened[1]["start"] < len(content), "only the rest was asked for"
        assert opened[1]["stop"] == len(content)
