"""Nextcloud's uploads in chunks through the proxy: by rclone, and step by step, against a strict emulator."""

import asyncio
import functools
import hashlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.children import output_of
from tests.integration.proxy_rig import Answer
from tests.integration.webdav_site import THROUGH, DavSite, dav_site
from tests.referees.nextcloud_emulator import DAV, USER, Nextcloud, nextcloud
from tests.referees.tls_front import clean_environment
from tests.referees.wsgidav import REPOSITORY

RCLONE = REPOSITORY / ".venv-referees" / "bin" / "rclone"
FILES = f"{DAV}/files/{USER}"
UPLOADS = f"{DAV}/uploads/{USER}"
MIB = 1024 * 1024
SIZES = b"<d:propfind xmlns:d='DAV:'><d:prop><d:getcontentlength/></d:prop></d:propfind>"


@pytest.fixture(params=[False, True], ids=["files", "object-store"])
async def site(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[DavSite[Nextcloud]]:
    start = functools.partial(nextcloud, object_store=request.param)
    async with dav_site(tmp_path, start) as running:
        yield running
        assert running.server.trouble == []


class Client:
    """Uploads as the developer manual says."""

    def __init__(self, site: DavSite[Nextcloud], way: str, name: str, *, upload: str = "u-1") -> None:
        self.site = site
        self.way = way
        self.name = name
        self.folder = f"{UPLOADS}/{upload}"

    async def ask(self, method: str, path: str, body: bytes | None = None, /, **given: str) -> Answer:
        """*given*: fields, with `_` for `-`."""
        fields = {"Destination": f"{{base}}{FILES}/{self.name}"}
        fields |= {name.replace("_", "-"): value for name, value in given.items()}
        return await self.site.dav(self.way, method, path, fields=fields, body=body)

    async def begin(self) -> Answer:
        return await self.ask("MKCOL", self.folder)

    async def put(self, name: str, body: bytes, **fields: str) -> Answer:
        return await self.ask("PUT", f"{self.folder}/{name}", body, **fields)

    async def move(self, **fields: str) -> Answer:
        return await self.ask("MOVE", f"{self.folder}/.file", **fields)

    async def upload(self, chunks: dict[str, bytes]) -> Answer:
        assert (await self.begin()).status == 201
        total = str(sum(map(len, chunks.values())))
        for name, chunk in chunks.items():
            assert (await self.put(name, chunk, OC_Total_Length=total)).status == 201
        return await self.move(OC_Total_Length=total, X_OC_Mtime="1700000000")

    async def get(self, *arguments: str) -> Answer:
        return await self.site.ask(self.way, f"{FILES}/{self.name}", *arguments)

    async def sizes(self, path: str, *, asked: bool = False) -> dict[str, list[int]]:
        """Sizes that a PROPFIND says: name -> getcontentlength and oc:size. *asked*: for these alone."""
        fields, body = {"Depth": "1", "Content-Type": "text/xml"}, SIZES if asked else None
        listed = await self.site.dav(self.way, "PROPFIND", path, fields=fields, body=body)
        assert listed.status == 207
        assert (b"getetag" in listed.body) is (not asked)
        found = {}
        for href, rest in re.findall(r"<d:href>([^<]*)</d:href>(.*?)</d:response>", listed.body.decode()):
            numbers = re.findall(r"<(?:d:getcontentlength|oc:size)>(\d+)<", rest)
            found[href.rstrip("/").rpartition("/")[2]] = [int(number) for number in numbers]
        return found


@pytest.mark.parametrize("way", THROUGH)
async def test_a_file_in_chunks_is_one_sealed_object(site: DavSite[Nextcloud], way: str) -> None:
    client = Client(site, way, "film%20%C3%BC.mp4")
    chunks = {"2": os.urandom(100_001), "1": os.urandom(5 * MIB + 17)}
    moved = await client.upload(chunks)
    assert moved.status == 201
    assert moved.headers["x-oc-mtime"] == "accepted"
    assert moved.headers["oc-etag"]
    plain = chunks["1"] + chunks["2"]
    assert site.opened([chunks["2"], chunks["1"][:50_000]]) == {"film ü.mp4": plain}
    got = await client.get()
    assert got.body == plain
    assert got.headers["content-length"] == str(len(plain))
    start = 5 * MIB
    assert (await client.get("-r", f"{start}-{start + 29}")).body == plain[start : start + 30]
    assert (await client.get("-r", "-7")).body == plain[-7:]
    head = await site.dav(way, "HEAD", f"{FILES}/{client.name}")
    assert head.headers["content-length"] == str(len(plain))
    small = os.urandom(10)
    assert (await site.dav(way, "PUT", f"{FILES}/small", body=small)).status == 201
    expected = {"film%20%C3%BC.mp4": [len(plain)] * 2, "small": [10, 10], "alice": [1]}
    assert await client.sizes(FILES + "/") == expected
    reads = len(site.server.reads)
    assert await client.sizes(FILES + "/") == expected
    # Remembered by the ETag, which is asked for where the client has not.
    assert await client.sizes(FILES + "/", asked=True) == expected
    assert len(site.server.reads) == reads
    # Renamed by the service, it is the same object.
    renamed = {"Destination": f"{{base}}{FILES}/renamed"}
    assert (await site.dav(way, "MOVE", f"{FILES}/{client.name}", fields=renamed)).status == 201
    assert (await site.ask(way, f"{FILES}/renamed")).body == plain


@pytest.mark.parametrize(
    "sizes",
    [[1], [5 * MIB], [5 * MIB, 0], [5 * MIB + 1, 16384]],
)
async def test_any_last_chunk_goes(site: DavSite[Nextcloud], sizes: list[int]) -> None:
    client = Client(site, "reverse", "f")
    chunks = {f"{number:05}": os.urandom(size) for number, size in enumerate(sizes, 1)}
    assert (await client.upload(chunks)).status == 201
    plain = b"".join(chunks.values())
    assert site.opened([]) == {"f": plain}
    assert (await client.get()).body == plain


async def test_chunks_sent_again_count_once_and_the_last_one(site: DavSite[Nextcloud]) -> None:
    client = Client(site, "forward", "f")
    first, second = os.urandom(5 * MIB), os.urandom(300)
    assert (await client.begin()).status == 201
    for body in (os.urandom(300), first):
        assert (await client.put("1", body)).status == 201
    for body in (os.urandom(5 * MIB), second):
        assert (await client.put("2", body)).status == 201
    listed = await client.sizes(client.folder + "/")
    assert (listed["1"], listed["2"]) == ([len(first)] * 2, [len(second)] * 2)
    assert (await client.move()).status == 201
    assert site.opened([second]) == {"f": first + second}


async def test_an_upload_that_was_begun_anew_knows_nothing_of_the_old_one(site: DavSite[Nextcloud]) -> None:
    client = Client(site, "reverse", "f")
    assert (await client.begin()).status == 201
    assert (await client.put("1", os.urandom(5 * MIB))).status == 201
    assert (await client.ask("DELETE", client.folder + "/")).status == 204
    assert (await client.upload({"1": b"new"})).status == 201
    assert site.opened([]) == {"f": b"new"}
    # And is replaced as a whole by another.
    again = Client(site, "reverse", "f", upload="u-2")
    assert (await again.upload({"7": b"newer"})).status == 204
    assert site.opened([]) == {"f": b"newer"}


async def test_a_sum_that_is_not_true_joins_nothing(site: DavSite[Nextcloud]) -> None:
    client = Client(site, "reverse", "f")
    assert (await client.begin()).status == 201
    assert (await client.put("1", b"one")).status == 201
    refused = await client.move(OC_Total_Length="4")
    assert (refused.status, refused.code) == (400, "upload-size")
    assert site.server.files == {}
    assert (await client.move(OC_Total_Length="3")).status == 201
    assert site.opened([]) == {"f": b"one"}


async def test_digests_of_chunks_are_compared_and_none_arrives(site: DavSite[Nextcloud]) -> None:
    client = Client(site, "reverse", "f")
    chunk = os.urandom(1000)
    right = "SHA1:" + hashlib.sha1(chunk, usedforsecurity=False).hexdigest()
    wrong = "SHA1:" + "0" * 40
    assert (await client.begin()).status == 201
    refused = await client.put("1", chunk, OC_Checksum=wrong)
    assert (refused.status, refused.code) == (400, "bad-digest")
    assert (await client.put("1", chunk, OC_Checksum=right)).status == 201
    assert (await client.move(OC_Checksum=right)).status == 201
    assert [stored.checksum for stored in site.server.files.values()] == [None]
    assert site.opened([chunk]) == {"f": chunk}


async def test_a_chunk_that_the_service_has_lost_is_noticed_before_the_client_is_told(tmp_path: Path) -> None:
    async with dav_site(tmp_path, nextcloud) as site:
        client = Client(site, "reverse", "f")
        assert (await client.begin()).status == 201
        for name in ("1", "2", "3"):
            assert (await client.put(name, os.urandom(20_000))).status == 201
        del site.server.uploads["u-1"]["2"]
        moved = await client.move()
        assert (moved.status, moved.code) == (502, "object-invalid")
        assert (await client.get()).status == 502


@pytest.mark.parametrize("length", [1000, 6 * MIB], ids=["held", "streamed"])
async def test_a_chunk_is_led_nowhere_else(site: DavSite[Nextcloud], length: int) -> None:
    """Whoever followed would send it as it is, to there."""
    client = Client(site, "reverse", "f")
    assert (await client.begin()).status == 201
    for place in ("https://elsewhere.example/chunk", "//elsewhere.example/chunk", "http://localhost/chunk"):
        site.server.elsewhere = place
        refused = await client.put("1", os.urandom(length))
        assert (refused.status, refused.code) == (502, "answer-refused"), place
        assert "location" not in refused.headers
    site.server.elsewhere = None
    moved = await client.move()
    assert (moved.status, moved.code) == (404, "chunks-unknown"), "nothing of it is remembered"
    assert site.server.uploads == {"u-1": {}}


async def test_what_is_not_how_uploads_go_is_refused(site: DavSite[Nextcloud]) -> None:
    client = Client(site, "reverse", "f")
    assert (await client.move()).code == "chunks-unknown"
    assert (await client.begin()).status == 201
    for name in ("x", "1.5", ".target", "99999999999", "1-2"):
        assert (await client.put(name, b"chunk")).code == "chunk-name"
    assert (await client.put("1", b"chunk")).status == 201
    assert (await client.put("01", b"chunk")).status == 201
    assert (await client.move()).code == "chunk-name"
    for method, path in [
        ("GET", "/1"),
        ("HEAD", "/1"),
        ("DELETE", "/1"),
        ("COPY", "/1"),
        ("MOVE", "/1"),
        ("MOVE", ""),
        ("COPY", "/.file"),
        ("GET", "/.file"),
        ("LOCK", "/1"),
        ("MKCOL", "/1"),
    ]:
        answer = await client.ask(method, client.folder + path)
        assert answer.code == "unknown-route", f"{method} {path}"
    into = {"Destination": f"{{base}}{client.folder}/2"}
    assert (await site.dav("reverse", "PUT", f"{FILES}/g", body=b"whole")).status == 201
    assert (await site.dav("reverse", "MOVE", f"{FILES}/g", fields=into)).code == "unknown-route"
    for spelling in (
        f"{DAV}/%75ploads/{USER}/u-1/1",
        f"{DAV}/files/../uploads/{USER}/u-1/1",
        f"{DAV}//uploads/{USER}/u-1/1",
        f"{DAV}/uploads/{USER}/u-1/1/",
        f"{DAV}/uploads/{USER}%2Fu-1/1",
        f"{DAV}/uploads/{USER}/u-1/a/1",
    ):
        answer = await client.ask("PUT", spelling, b"chunk")
        assert answer.code in ("bad-message", "unknown-route", "chunk-name"), spelling
    assert (await client.ask("PUT", client.folder + "/1", b"x", OC_Chunked="1")).code == "partial-write"
    assert set(site.server.files) == {"g"}


@pytest.mark.parametrize("way", THROUGH)
async def test_rclone_uploads_in_chunks(tmp_path: Path, way: str) -> None:
    local = tmp_path / "local"
    local.mkdir()
    files = {"large": os.urandom(3 * MIB + 1), "exact": os.urandom(2 * MIB), "small": os.urandom(1000)}
    for name, content in files.items():
        (local / name).write_bytes(content)
    async with dav_site(tmp_path, nextcloud) as site:
        remote = f":webdav,vendor=nextcloud,url='{site.base(way)}{FILES}':"

        async def rclone(*arguments: str) -> str:
            proxy = [f"--http-proxy={url}"] if (url := site.proxy_url(way)) is not None else []
            process = await asyncio.create_subprocess_exec(
                RCLONE,
                *arguments,
                "--config=",
                f"--ca-cert={site.trust(way)}",
                "--webdav-nextcloud-chunk-size=1Mi",
                "--retries=1",
                "--low-level-retries=1",
                "-v",
                *proxy,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=clean_environment(),
            )
            async with asyncio.timeout(300):
                _, log = await output_of(process)
            assert process.returncode == 0, log.decode()
            return log.decode()

        assert (await rclone("sync", str(local), remote)).count(": Copied") == 3
        assert (await rclone("sync", str(local), remote)).count(": Copied") == 0
        await rclone("check", "--download", str(local), remote)
        assert site.server.uploads == {}
        kinds = {name: data[28] for name, data in site.server.stored()}
        assert kinds == {"large": 3, "exact": 3, "small": 0}
        assert site.opened([files["small"], files["large"][:50_000]]) == files
