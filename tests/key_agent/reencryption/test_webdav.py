"""Objects in a real WebDAV server, rewritten through a real proxy whose key has changed."""

import contextlib
import dataclasses
import os
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from aiohttp.typedefs import Handler

from envelope.keys import ANONYMOUS, KeyId, KeyMaterial, KeyState
from envelope.objects import Header
from key_agent.reencryption import webdav
from key_agent.reencryption.connector import Found, Rewrite, StoreError
from key_agent.reencryption.job import JobState, Progress, ReencryptionJob
from key_agent.reencryption.spool import PIECE_BYTES
from key_agent.reencryption.webdav import WebDavConnector, WebDavStore, read_listing
from proxy.tenants.model import ServiceEntry
from runtime.clock import SystemClock
from tests import pki
from tests.integration.proxy_rig import Origin, Rig, proxy
from tests.integration.proxy_rig import webdav as webdav_server


@dataclasses.dataclass
class Site:
    rig: Rig
    origin: Origin
    service: ServiceEntry
    connector: WebDavConnector

    async def upload(self, name: str, content: bytes) -> None:
        path = self.origin.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        answer = await self.rig.ask(self.service, f"/{name}".replace(" ", "%20"), "-T", "-", body=content)
        assert answer.status in (201, 204), answer

    def sealed_by(self, name: str) -> KeyId:
        return Header.parse(self.origin.stored(name)).key_id


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    ca = pki.make_server_ca()
    ca_file = tmp_path / "ca.pem"
    pki.write_certificate(ca.certificate, ca_file)
    certificate_file, key_file = pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "origin")
    async with webdav_server(tmp_path, certificate_file, key_file) as origin, proxy(tmp_path, ca_file) as rig:
        tenant = rig.tenant("acme")
        service = rig.service("acme/files", origin.url)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        connector = WebDavConnector(
            WebDavStore(
                store_url=f"{origin.url}/",
                through_url=rig.reverse_url(service, "/"),
                store_ca_file=ca_file,
                through_ca_file=tenant.interception_ca.certificate_file,
            )
        )
        yield Site(rig, origin, service, connector)
        await connector.close()


CONTENTS = {
    "a.txt": b"alpha",
    "a/b.txt": b"beta" * 1000,
    "a/z/deep name.bin": os.urandom(200_000),
    "a.zip": os.urandom(webdav.WHOLE_BYTES + 70_000),
    "empty": b"",
    "z": b"omega",
}


class Paper:
    def __init__(self) -> None:
        self.kept: list[Progress] = []

    async def save_progress(self, progress: Progress) -> None:
        self.kept.append(progress)


async def test_every_object_of_the_old_key_is_written_anew_and_reads_as_before(site: Site) -> None:
    old = site.rig.push(site.service.owner)
    for name, content in CONTENTS.items():
        await site.upload(name, content)
    (site.origin.root / "foreign.txt").write_bytes(b"nobody sealed this")
    (site.origin.root / "nothing").write_bytes(b"")
    before = {name: site.origin.stored(name) for name in CONTENTS}
    assert {site.sealed_by(name) for name in CONTENTS} == {old}

    new = _rotate(site, old)
    names = [name async for name in site.connector.names(after="")]
    assert names == sorted([*CONTENTS, "foreign.txt", "nothing"])
    assert [name async for name in site.connector.names(after="a/b.txt")] == names[
        names.index("a/b.txt") + 1 :
    ]
    paper = Paper()
    progress = Progress(job_id="j", incident_id=None, connector="webdav", sources=(old,))
    done = await ReencryptionJob(progress, site.connector, paper).run()
    assert (done.state, done.rewritten, done.skipped, done.failures) == (
        JobState.DONE,
        len(CONTENTS),
        2,
        {},
    )
    for name, content in CONTENTS.items():
        assert site.sealed_by(name) == new
        assert site.origin.stored(name) != before[name]
        assert site.rig.open_independently(site.service.owner, site.origin.stored(name)) == content
    assert (site.origin.root / "foreign.txt").read_bytes() == b"nobody sealed this"


def _rotate(site: Site, old: KeyId) -> KeyId:
    """The next key seals, *old* opens only."""
    rig, owner, new = site.rig, site.service.owner, KeyId.random()
    rig.materials[owner][new] = os.urandom(32)
    keys = [
        KeyMaterial(owner=owner, key_id=key_id, state=state, version=version, secret=bytearray(secret))
        for version, (key_id, state, secret) in enumerate(
            [
                (old, KeyState.DEACTIVATED, rig.materials[owner][old]),
                (new, KeyState.ACTIVE, rig.materials[owner][new]),
            ],
            start=1,
        )
    ]
    rig.keys.install(owner, keys, deadline_boot_s=SystemClock().boot_s() + 300)
    return new


async def test_what_somebody_else_has_written_meanwhile_is_not_replaced(site: Site) -> None:
    old = site.rig.push(site.service.owner)
    await site.upload("doc", b"first")
    found = await site.connector.look("doc")
    assert found is not None
    assert found.key_id == old
    _rotate(site, old)
    await site.upload("doc", b"second, by a user, and longer")
    assert (await site.connector.rewrite(found))[0] is Rewrite.CHANGED
    stored = site.origin.stored("doc")
    assert site.rig.open_independently(site.service.owner, stored) == b"second, by a user, and longer"
    (site.origin.root / "doc").unlink()
    assert await site.connector.look("doc") is None
    assert (await site.connector.rewrite(found))[0] in (Rewrite.GONE, Rewrite.CHANGED)


async def test_what_does_not_open_is_not_written(site: Site) -> None:
    old = site.rig.push(site.service.owner)
    large = os.urandom(webdav.WHOLE_BYTES + 3 * 65536)
    await site.upload("spoiled", large)
    spoiled = bytearray(site.origin.stored("spoiled"))
    spoiled[-20] ^= 1
    (site.origin.root / "spoiled").write_bytes(spoiled)
    _rotate(site, old)
    found = await site.connector.look("spoiled")
    assert found is not None
    assert await site.connector.rewrite(found) == (Rewrite.REFUSED, "it breaks off: spoiled, or cut")
    assert site.origin.stored("spoiled") == spoiled


async def test_a_key_that_opens_nothing_is_a_matter_of_its_objects(site: Site) -> None:
    old = site.rig.push(site.service.owner)
    await site.upload("doc", b"first")
    found = await site.connector.look("doc")
    assert found is not None
    site.rig.push(site.service.owner, key_id=old, state=KeyState.COMPROMISED)
    became, why = await site.connector.rewrite(found)
    assert became is Rewrite.REFUSED
    assert "key-" in why


async def test_a_store_that_is_not_there_is_an_error_to_come_back_from(site: Site, tmp_path: Path) -> None:
    lost = WebDavConnector(
        dataclasses.replace(site.connector._store, store_url="https://localhost:1/", timeout_s=5)
    )
    try:
        with pytest.raises(StoreError):
            await lost.look("x")
        with pytest.raises(StoreError):
            [name async for name in lost.names(after="")]
    finally:
        await lost.close()


@pytest.mark.parametrize("url", ["http://host/", "https:///x", "https://user@host/", "https://h/?q"])
async def test_only_a_folders_url_is_one(url: str, site: Site) -> None:
    with pytest.raises(StoreError):
        WebDavConnector(dataclasses.replace(site.connector._store, through_url=url))


def test_a_listing_says_what_is_a_folder() -> None:
    listing = b"""<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">
      <D:response><D:href>/a%20b/</D:href><D:propstat><D:prop><D:resourcetype><D:collection/>
        </D:resourcetype></D:prop></D:propstat></D:response>
      <D:response><D:href>
        /c</D:href><D:propstat><D:prop><D:resourcetype/></D:prop></D:propstat></D:response>
      </D:multistatus>"""
    assert read_listing(listing) == [("/a%20b/", True), ("/c", False)]


@pytest.mark.parametrize(
    "listing",
    [
        b"",
        b"<a>",
        b"\xff\xfe",
        b'<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>',
        b'<!DOCTYPE a SYSTEM "http://elsewhere/"><a/>',
    ],
)
def test_a_listing_that_is_none_or_may_hide_something_is_refused(listing: bytes) -> None:
    with pytest.raises(StoreError):
        read_listing(listing)


def _listed(*hrefs: str) -> web.Response:
    """A folder's listing: what ends in a slash is a folder, and so is the store's own."""
    kinds = {True: "<resourcetype><collection/></resourcetype>", False: "<resourcetype/>"}
    each = [f"<href>{href}</href>{kinds[href.endswith(('/', '/dav'))]};" for href in hrefs]
    return _multistatus("".join(each))


def _multistatus(responses: str) -> web.Response:
    """*responses*: each ends in a semicolon."""
    each = "".join(f"<response>{one}</response>" for one in responses.split(";")[:-1])
    return web.Response(status=207, text=f'<multistatus xmlns="DAV:">{each}</multistatus>')


@contextlib.asynccontextmanager
async def _store(directory: Path, answer: Handler) -> AsyncIterator[WebDavConnector]:
    """Of a server that answers whatever *answer* does, below /dav/."""
    ca = pki.make_server_ca()
    ca_file = directory / "ca.pem"
    pki.write_certificate(ca.certificate, ca_file)
    certificate_file, key_file = pki.write_credential(pki.issue_server(ca, ["localhost"]), directory, "store")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate_file, key_file)
    server = TestServer(application := web.Application(), scheme="https")
    application.router.add_route("*", "/{path:.*}", answer)
    await server.start_server(ssl=tls)
    url = f"https://localhost:{server.port}/dav/"
    connector = WebDavConnector(
        WebDavStore(store_url=url, through_url=url, store_ca_file=ca_file, through_ca_file=ca_file)
    )
    try:
        yield connector
    finally:
        await connector.close()
        await server.close()


async def test_a_store_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """Whoever followed it would have foreign content sealed by today's key."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(f"{request.method} {request.path}")
        if request.path == "/forged":
            return web.Response(body=b"forged")
        return web.Response(status=302, headers={"Location": "/forged"})

    async with _store(tmp_path, answer) as connector:
        assert await connector.rewrite(Found(name="a", key_id=None, version='"1"')) == (
            Rewrite.REFUSED,
            "HTTP 302",
        )
        with pytest.raises(StoreError):
            await connector.look("a")
        with pytest.raises(StoreError):
            [name async for name in connector.names(after="")]
    assert asked == ["GET /dav/a", "GET /dav/a", "PROPFIND /dav/"]


async def test_a_listing_is_understood_as_a_whole_or_the_job_stops(tmp_path: Path) -> None:
    """On what is passed over in silence the end of its key would rest."""
    hrefs: list[str] | None = None

    async def answer(_request: web.Request) -> web.Response:
        if hrefs is None:
            return web.Response(status=404)
        return _listed(*hrefs)

    async with _store(tmp_path, answer) as connector:
        for good in (["/dav/", "/dav/a"], ["/dav", "/dav/a"], ["http://inside:81/dav/", "/dav/a"]):
            hrefs = good
            assert [name async for name in connector.names(after="")] == ["a"], good
        for bad in (
            None,  # no such folder: its address has a slip
            [],
            ["/dav/a"],
            ["/dav/", "/elsewhere/a"],
            ["/dav/", "//dav/a"],
            ["/dav/", "/dav/../a"],
            ["/dav/", "/dav/./a"],
            ["/dav/", "/dav/a/b"],
            ["/dav/", "/dav/a%2Fb"],
            ["/dav/", "/dav/caf%E9"],
            ["/dav/", "/dav/a?b"],
            ["/dav/", "/dav/a#b"],
            ["/dav/", "/dav/a?"],
            ["/dav/", "/dav/a", "/dav/a"],  # two, as one that ends in a blank is shown by some
            ["/dav/", "/dav/sub/", "/dav/sub/"],
            ["/dav/", "/dav//"],  # a folder without a name, as S3 has it: not the one that was asked for
            ["/dav/", "/dav/sub//"],
            ["/dav/", "https://[/dav/a"],
        ):
            hrefs = bad
            with pytest.raises(StoreError):
                [name async for name in connector.names(after="")]


@pytest.mark.parametrize(
    "responses",
    [
        # A folder of which that is not told would be taken for a file, and nobody would look into it.
        "<href>/dav/sub</href>;",
        "<href>/dav/sub</href><status>HTTP/1.1 403 Forbidden</status>;",
        "<href>/dav/s</href><propstat><resourcetype/><status>HTTP/1.1 404 None</status></propstat>;",
        # There is more than it says.
        "<href>/dav/</href><status>HTTP/1.1 507 Insufficient Storage</status>;",
    ],
)
async def test_a_listing_that_is_cut_or_does_not_say_what_is_a_folder_stops_the_job(
    tmp_path: Path, responses: str
) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return _multistatus("<href>/dav/</href><resourcetype><collection/></resourcetype>;" + responses)

    async with _store(tmp_path, answer) as connector:
        with pytest.raises(StoreError, match=r"(resourcetype|403|404|507)"):
            [name async for name in connector.names(after="")]


async def test_a_file_whose_address_is_given_for_a_folder_is_not_an_empty_one(tmp_path: Path) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return _multistatus("<href>/dav</href><resourcetype/>;")

    async with _store(tmp_path, answer) as connector:
        with pytest.raises(StoreError, match="not about that folder"):
            [name async for name in connector.names(after="")]


@pytest.mark.parametrize("is_deleted", [True, False], ids=["deleted", "hidden"])
async def test_a_folder_that_is_listed_and_not_there_is_deleted_or_hidden(
    tmp_path: Path, *, is_deleted: bool
) -> None:
    looks = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal looks
        if request.path != "/dav/":
            return web.Response(status=404)
        looks += 1
        is_there = looks == 1 or not is_deleted
        return _listed("/dav/", "/dav/z", *(["/dav/sub/"] if is_there else []))

    async with _store(tmp_path, answer) as connector:
        if is_deleted:
            assert [name async for name in connector.names(after="")] == ["z"]
        else:
            with pytest.raises(StoreError, match="says that it is not there"):
                [name async for name in connector.names(after="")]
    assert looks == 2


async def test_a_folder_whose_folder_is_not_shown_either_is_not_gone(tmp_path: Path) -> None:
    """The store has hidden both since it listed the upper one."""
    looks = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal looks
        path = request.path
        if path == "/dav/sub/":
            looks += 1
        if path not in ("/dav/", "/dav/sub/") or (path == "/dav/sub/" and looks > 1):
            return web.Response(status=404)
        return _listed(path, {"/dav/": "/dav/sub/", "/dav/sub/": "/dav/sub/in/"}[path])

    async with _store(tmp_path, answer) as connector:
        with pytest.raises(StoreError, match="lists /sub/, and says that it is not there"):
            [name async for name in connector.names(after="")]


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {"Content-Encoding": "br"}),
        (206, {"Content-Encoding": "gzip", "Content-Range": "bytes 0-31/100"}),
        (206, {"Content-Range": "bytes 32-63/100"}),
        (206, {}),
    ],
)
async def test_other_bytes_than_an_objects_first_say_nothing_of_its_key(
    tmp_path: Path, status: int, headers: dict[str, str]
) -> None:
    """Taken for an object that is not ours, it would be passed over."""
    told: dict[str, str] = headers

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, body=b"x" * 32, headers=told | {"ETag": '"1"'})

    async with _store(tmp_path, answer) as connector:
        with pytest.raises(StoreError, match="the store answers"):
            await connector.look("a")
        told = {"Content-Range": "bytes 0-31/100"}
        assert await connector.look("a") == Found(name="a", key_id=None, version='"1"')


@pytest.mark.parametrize("status", [416, 206])
async def test_a_server_that_does_not_serve_the_range_is_asked_for_all_of_it(
    tmp_path: Path, status: int
) -> None:
    """One that sends less of an object, or none of it, has not said that nobody sealed it."""
    key_id = KeyId.random()
    stored = Header(key_id).encode() + bytes(68)

    async def answer(request: web.Request) -> web.Response:
        if "Range" not in request.headers:
            return web.Response(body=stored, headers={"ETag": '"1"'})
        told = {"Content-Range": {416: "bytes */100", 206: "bytes 0-3/100"}[status], "ETag": '"1"'}
        return web.Response(status=status, body=stored[:4] if status == 206 else b"", headers=told)

    async with _store(tmp_path, answer) as connector:
        assert await connector.look("a") == Found(name="a", key_id=key_id, version='"1"')
        stored = b""
        assert await connector.look("a") == Found(name="a", key_id=None, version='"1"')


async def test_an_answer_without_an_entity_tag_need_not_be_the_object(tmp_path: Path) -> None:
    """As a login page with status 200: whoever takes it for the object passes over what is there."""
    body = b"<html>Please log in"

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="text/html")

    async with _store(tmp_path, answer) as connector:
        with pytest.raises(StoreError, match="without an entity tag"):
            await connector.look("a")
        body = Header(key_id := KeyId.random()).encode()
        found = await connector.look("a")
        assert found == Found(name="a", key_id=key_id, version=""), "it is refused by its name when rewritten"


async def test_a_coding_that_is_a_mere_label_is_looked_through(tmp_path: Path) -> None:
    """Servers put one on every name that ends with .gz, and send what is stored."""
    key_id = KeyId.random()
    sealed = Header(key_id).encode()

    async def answer(_request: web.Request) -> web.Response:
        label = {"Content-Encoding": "x-gzip", "Content-Range": "bytes 0-31/100", "ETag": '"1"'}
        return web.Response(status=206, body=sealed, headers=label)

    async with _store(tmp_path, answer) as connector:
        assert await connector.look("a.gz") == Found(name="a.gz", key_id=key_id, version='"1"')


async def test_what_begins_as_ours_and_names_no_key_that_can_be_read_may_be_any_keys(tmp_path: Path) -> None:
    """Cut, damaged, or of a version that this agent does not know: it is not passed over as nobody's."""
    sealed = Header(KeyId.random()).encode()
    stored = sealed

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=stored, headers={"ETag": '"1"'})

    async with _store(tmp_path, answer) as connector:
        for odd in (sealed[:20], sealed[:8] + b"\x7f" + sealed[9:], sealed[:-1] + b"\x01"):
            stored = odd
            assert await connector.look("a") == Found(name="a", key_id=ANONYMOUS, version='"1"')
        stored = b"-" + sealed
        assert await connector.look("a") == Found(name="a", key_id=None, version='"1"')


async def test_where_there_is_no_room_to_keep_an_object_aside_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks at the disk for a store that does not answer."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.method)
        return web.Response(body=bytes(4 * PIECE_BYTES), headers={"ETag": '"1"'})

    monkeypatch.setattr(webdav, "WHOLE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    async with _store(tmp_path, answer) as connector:
        with pytest.raises(StoreError, match="no room to keep an object aside: No such file"):
            await connector.rewrite(Found(name="a", key_id=None, version='"1"'))
    assert asked == ["GET"]


@pytest.mark.parametrize(
    ("status", "tag"),
    [(200, ""), (200, '"of another"'), (204, '"1"'), (206, '"1"')],
    ids=["a login page", "another object", "nothing", "a part"],
)
async def test_what_need_not_be_the_object_is_not_written_over_it(
    tmp_path: Path, status: int, tag: str
) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.method)
        if request.method == "PUT":
            return web.Response(status=204)
        body = None if status == 204 else b"<html>"
        return web.Response(status=status, body=body, headers={"ETag": tag} if tag else {})

    async with _store(tmp_path, answer) as connector:
        became, why = await connector.rewrite(Found(name="a", key_id=None, version='"1"'))
    assert became is Rewrite.REFUSED
    assert why.startswith("what the proxy answers is not the object that was looked at")
    assert asked == ["GET"]


async def test_a_write_whose_answer_is_lost_is_sent_once_and_looked_at(tmp_path: Path) -> None:
    """Sent again by the library it would be 412 by its own first success, or undo what came since."""
    old, today = KeyId.random(), KeyId.random()
    kept = {"/dav/done": 1, "/dav/lost": 1}
    puts: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        version = kept[request.path]
        headers = {"ETag": f'"{version}"'}
        if request.method == "GET":
            key_id = old if version == 1 else today
            return web.Response(body=Header(key_id=key_id).encode(), headers=headers)
        await request.read()
        puts.append(request.path)
        if request.headers["If-Match"] != f'"{version}"':
            return web.Response(status=412)
        if request.path == "/dav/done" or puts.count(request.path) > 1:
            kept[request.path] += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response(status=204)

    async with _store(tmp_path, answer) as connector:
        for name in ("done", "lost"):
            found = await connector.look(name)
            assert found is not None
            became, why = await connector.rewrite(found)
            assert became is Rewrite.UNANSWERED
            assert "broke" in why
        assert puts == ["/dav/done", "/dav/lost"]
        paper = Paper()
        progress = Progress(
            job_id="j",
            incident_id=None,
            connector="-",
            sources=(old,),
            batch=("done", "lost"),
            batch_upto="x",
        )
        job = ReencryptionJob(progress, connector, paper)
        await job._finish_batch()
        assert (job.progress.rewritten, job.progress.failed) == (2, 0)
        assert puts == ["/dav/done", "/dav/lost", "/dav/lost"]
