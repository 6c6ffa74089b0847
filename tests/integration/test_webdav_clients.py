"""WebDAV clients directly and through the proxy: the same answers, and only ciphertext at the service.

Each way works in a collection of its own at the same server, so that nothing but the way differs.
"""

import asyncio
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.tenants.model import LegacyPolicy
from tests.children import output_of
from tests.integration.proxy_rig import Answer
from tests.integration.webdav_site import THROUGH, WAYS, DavSite, StartServer, dav_site
from tests.referees.apache import apache
from tests.referees.comparison import Declared, Seen
from tests.referees.tls_front import clean_environment
from tests.referees.wsgidav import REPOSITORY, DavServer, wsgidav

RCLONE = REPOSITORY / ".venv-referees" / "bin" / "rclone"

PROPFIND = (
    b'<?xml version="1.0"?><d:propfind xmlns:d="DAV:"><d:prop><d:getcontentlength/><d:getetag/>'
    b"<d:resourcetype/><d:getlastmodified/></d:prop></d:propfind>"
)
PROPPATCH = (
    b'<?xml version="1.0"?><d:propertyupdate xmlns:d="DAV:"><d:set><d:prop><x:colour xmlns:x="urn:x">'
    b"gr\xc3\xbcn</x:colour></d:prop></d:set></d:propertyupdate>"
)
LOCK = (
    b'<?xml version="1.0"?><d:lockinfo xmlns:d="DAV:"><d:lockscope><d:exclusive/></d:lockscope><d:locktype>'
    b"<d:write/></d:locktype><d:owner><d:href>https://people.example/me</d:href></d:owner></d:lockinfo>"
)
BODY = os.urandom(40_000)
SMALL = os.urandom(100)

type Step = tuple[str, str, Mapping[str, str], bytes | None]


def steps() -> list[Step]:
    """A client's life: `{base}` is the service's URL as it knows it; paths are below its own collection."""
    depth = [{"Depth": value} for value in ("0", "1", "infinity")]
    xml = {"Content-Type": "application/xml"}
    return [
        ("OPTIONS", "/", {}, None),
        ("MKCOL", "/c", {}, None),
        ("MKCOL", "/c", {}, None),
        ("MKCOL", "/no/c", {}, None),
        ("MKCOL", "/d", {"Content-Type": "text/plain"}, b"what is this"),
        ("PUT", "/c/f", {}, BODY),
        ("PUT", "/c/f", {"If-None-Match": "*"}, SMALL),
        ("PUT", "/c/g%20%C3%BC%26", {"Content-Type": "text/plain"}, SMALL),
        ("PUT", "/c/empty", {}, b""),
        ("PUT", "/no/f", {}, SMALL),
        ("GET", "/c/f", {}, None),
        ("GET", "/c/f", {"Range": "bytes=16380-16390"}, None),
        ("GET", "/c/f", {"Range": "bytes=-5"}, None),
        ("GET", "/c/f", {"Range": "bytes=50000-"}, None),
        ("GET", "/c/g%20%C3%BC%26", {}, None),
        ("GET", "/c/empty", {}, None),
        ("GET", "/c/nothing", {}, None),
        ("HEAD", "/c/f", {}, None),
        ("HEAD", "/c/empty", {}, None),
        ("HEAD", "/c/nothing", {}, None),
        *(("PROPFIND", "/", {**each, **xml}, PROPFIND) for each in depth),
        *(("PROPFIND", "/c/f", each, None) for each in depth),  # as Windows asks: everything, without a body
        ("PROPFIND", "/", {"Depth": "1"}, None),
        ("PROPFIND", "/c/nothing", {"Depth": "0", **xml}, PROPFIND),
        ("PROPFIND", "/", {"Depth": "0", **xml}, PROPFIND[:-1]),
        ("PROPPATCH", "/c/f", xml, PROPPATCH),
        ("PROPFIND", "/c/f", {"Depth": "0"}, None),
        ("COPY", "/c/f", {"Destination": "{base}{here}/c/copy"}, None),
        ("COPY", "/c/f", {"Destination": "{base}{here}/c/copy", "Overwrite": "F"}, None),
        ("COPY", "/c/", {"Destination": "{base}{here}/e/", "Depth": "infinity"}, None),
        ("COPY", "/c/f", {"Destination": "{base}{here}/no/f"}, None),
        ("MOVE", "/c/copy", {"Destination": "{base}{here}/moved%20on"}, None),
        ("GET", "/moved%20on", {}, None),
        ("GET", "/e/f", {"Range": "bytes=0-99"}, None),
        ("MOVE", "/e/", {"Destination": "{base}{here}/h/"}, None),
        ("LOCK", "/c/f", {"Depth": "0", "Timeout": "Second-1000", **xml}, LOCK),
        ("PUT", "/c/f", {}, SMALL),
        ("DELETE", "/c/", {}, None),
        ("LOCK", "/new", {"Depth": "0", **xml}, LOCK),
        ("GET", "/new", {}, None),
        ("HEAD", "/new", {}, None),
        ("DELETE", "/moved%20on", {}, None),
        ("DELETE", "/moved%20on", {}, None),
        ("GET", "/h/", {}, None),
        ("PROPFIND", "/", {"Depth": "infinity", **xml}, PROPFIND),
    ]


# As long as each other, and so are the names of server and proxy: what quotes them has one length.
PLACES = {"direct": "place-d", "forward": "place-f", "reverse": "place-r"}


def declared(site: DavSite[DavServer], way: str, method: str, path: str, direct: Answer) -> Declared:
    """What may differ: versions and times; cache directives of what was opened; the framing of what is
    rewritten; stored sizes in index pages; and that in reverse mode the service's own address is a path."""
    is_xml = direct.headers.get("content-type", "").startswith(("application/xml", "text/xml"))
    is_rewritten = (method == "PROPFIND" and direct.status == 207) or (way == "reverse" and is_xml)
    is_index = method == "GET" and path.endswith("/")
    bases = b"|".join(re.escape(site.base(way).encode()) for way in ("direct", "reverse"))
    patterns = [
        (bases + rb"(?=/)", b""),
        (rb"127\.0\.0\.1|localhost", b"HOST"),
        (rb"(?<=bytes>)\d+", b"QUOTA"),
        (rb"Port \d+", b"Port"),
        (rb"place-[dfr]\b", b"HERE"),
        (rb"\b\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", b"TIME"),
        (rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?Z?", b"TIME"),
        (rb"Second-\d+", b"SECONDS"),
        (rb"(?:opaquelocktoken|urn:uuid):[0-9a-fA-Fx-]+", b"TOKEN"),
        (rb"(?:W/)?\"[0-9a-f-]{8,}\"", b"ETAG"),
        (rb"(<[^/<>]*getetag>)[^<]+", rb"\1ETAG"),
        (rb" xmlns:(?:ns|lp)\d=\"[^\"]*\"", b""),  # Apache declares them in an order of the moment
    ]
    if is_index:
        patterns += [(rb"[\d,.]+ (?:Bytes|KB)|(?<=right\">) *[\d.]+[K ]", b"SIZE")]
    # A 204 has no length to state (RFC 9110 8.6), though WsgiDAV does.
    is_reframed = is_rewritten or is_index or direct.status == 204
    length = frozenset({"content-length"})
    return Declared(
        unequal=length if is_index or method == "LOCK" else frozenset(),  # tokens differ in length
        direct_only=length if is_reframed else frozenset(),
        through_only=frozenset({"cache-control"}) | (length if method == "HEAD" else frozenset()),
        refusals=frozenset({"unsupported-body", "range-not-satisfiable", "bad-message"}),
        volatile=[(re.compile(pattern), text) for pattern, text in patterns],
    )


def seen(answer: Answer) -> Seen:
    return Seen(answer.status, answer.headers, answer.body)


@pytest.mark.parametrize("start", [wsgidav, apache])
async def test_no_difference(tmp_path: Path, start: StartServer) -> None:
    found: list[str] = []
    async with dav_site(tmp_path, start) as site:
        for way in WAYS:  # the collections themselves, by what can be seen from everywhere
            assert (await site.dav("direct", "MKCOL", f"/{PLACES[way]}/")).status == 201
        for method, path, fields, body in steps():
            answers = {}
            for way in WAYS:
                mine = {name: value.replace("{here}", f"/{PLACES[way]}") for name, value in fields.items()}
                answers[way] = await site.dav(way, method, f"/{PLACES[way]}{path}", fields=mine, body=body)
            direct = answers["direct"]
            for way in THROUGH:
                allowed = declared(site, way, method, path, direct)
                differences = allowed.differences(seen(direct), seen(answers[way]))
                found += [f"{way}: {method} {path} {dict(fields)}: {line}" for line in differences]
        theirs = {data for name, data in site.server.stored() if name.startswith("place-d/")}
        assert {BODY, SMALL} <= theirs  # directly stored is what is plain
        opened = site.opened([BODY, SMALL], but="place-d/")
        assert {len(plain) for plain in opened.values()} == {0, 100, 40_000}
    assert found == []


# ---- rclone


async def rclone(site: DavSite[DavServer], way: str, *arguments: str) -> str:
    """Its output; AssertionError with its log if it fails."""
    code, out, log = await _rclone(site, way, *arguments)
    assert code == 0, log
    return out


async def _rclone(site: DavSite[DavServer], way: str, *arguments: str) -> tuple[int, str, str]:
    proxy = [f"--http-proxy={url}"] if (url := site.proxy_url(way)) is not None else []
    process = await asyncio.create_subprocess_exec(
        RCLONE,
        *arguments,
        "--config=",
        f"--ca-cert={site.trust(way)}",
        "--retries=1",
        "--low-level-retries=1",
        "--stats=0",
        *proxy,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    async with asyncio.timeout(60):
        out, log = await output_of(process)
    return process.returncode or 0, out.decode(), log.decode()


def remote(site: DavSite[DavServer], way: str) -> str:
    return f":webdav,url='{site.base(way)}/{way}':"


async def moved(site: DavSite[DavServer], way: str, source: str, target: str) -> list[str]:
    """Names of what a sync had to transfer."""
    code, _, log = await _rclone(site, way, "sync", source, target, "-v")
    assert code == 0, log
    return sorted(re.findall(r": ([^:]+): Copied \((?:new|replaced existing)\)", log))


FILES = {
    "empty": b"",
    "one": b"x",
    "record-1": os.urandom(16383),
    "record": os.urandom(16384),
    "deep/er/r\u00e4cord +1": os.urandom(16385),
    "deep/large": os.urandom(300_000),
}


@pytest.mark.parametrize("start", [wsgidav, apache])
@pytest.mark.parametrize("way", THROUGH)
async def test_rclone_syncs_once_and_finds_everything_equal(
    tmp_path: Path, start: StartServer, way: str
) -> None:
    local, back = tmp_path / "local", tmp_path / "back"
    for name, content in FILES.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(content)
    async with dav_site(tmp_path, start) as site:
        assert (await site.dav("direct", "MKCOL", f"/{way}/")).status == 201
        there = remote(site, way)
        assert await moved(site, way, str(local), there) == sorted(FILES)
        assert await moved(site, way, str(local), there) == []
        await rclone(site, way, "check", "--download", str(local), there)
        listed = json.loads(await rclone(site, way, "lsjson", "-R", "--files-only", there))
        assert {each["Path"]: each["Size"] for each in listed} == {
            name: len(content) for name, content in FILES.items()
        }
        await rclone(site, way, "moveto", there + "/deep/large", there + "/moved")
        await rclone(site, way, "copyto", there + "/moved", there + "/copied")
        await rclone(site, way, "sync", there, str(back))
        assert (back / "moved").read_bytes() == (back / "copied").read_bytes() == FILES["deep/large"]
        opened = site.opened(FILES.values())
        assert sorted(opened.values()) == sorted([*FILES.values(), FILES["deep/large"]])


# ---- locks


@pytest.mark.parametrize("start", [wsgidav, apache])
async def test_a_lock_is_named_with_the_resource_it_is_on(tmp_path: Path, start: StartServer) -> None:
    """If with a tagged list: in reverse mode the client names the resource at us."""
    async with dav_site(tmp_path, start) as site:
        statuses = {}
        for way in WAYS:
            name = f"/{PLACES[way]}"
            locked = await site.dav(way, "LOCK", name, fields={"Content-Type": "text/xml"}, body=LOCK)
            token = locked.headers["lock-token"]
            conditions = [
                f"<{{base}}{name}> ({token})",
                f"<{{base}}{name}> (<urn:uuid:00000000-0000-0000-0000-000000000000>)",
                f"<https://other.example{name}> ({token})",
                f'({token} ["none"]) (Not <DAV:no-lock> {token})',
            ]
            put = [await site.dav(way, "PUT", name, fields={"If": each}, body=SMALL) for each in conditions]
            unlocked = await site.dav(way, "UNLOCK", name, fields={"Lock-Token": token})
            statuses[way] = [answer.status for answer in (locked, *put, unlocked)]
            assert (await site.dav(way, "GET", name)).body == SMALL
        assert statuses["forward"] == statuses["reverse"] == statuses["direct"]
        assert statuses["direct"][1] in (201, 204)
        assert statuses["direct"][2] in (412, 423)


# ---- what was there before


@pytest.mark.parametrize("start", [wsgidav, apache])
async def test_a_route_that_migrates_shows_the_sizes_of_both_kinds(
    tmp_path: Path, start: StartServer
) -> None:
    old = os.urandom(1128)  # as long as a sealed object could be
    async with dav_site(tmp_path, start, legacy=LegacyPolicy.MIGRATE) as site:
        assert (await site.dav("direct", "PUT", "/old", body=old)).status == 201
        assert (await site.dav("reverse", "PUT", "/new", body=SMALL)).status == 201
        body = b"<propfind xmlns='DAV:'><prop><getcontentlength/></prop></propfind>"
        fields = {"Depth": "1", "Content-Type": "application/xml"}
        for way in THROUGH:
            listed = (await site.dav(way, "PROPFIND", "/", fields=fields, body=body)).body.decode()
            sizes = re.findall(r"(old|new)</[^/]*?href>.*?getcontentlength>(\d+)<", listed, re.DOTALL)
            assert dict(sizes) == {"old": "1128", "new": "100"}
            assert "etag" not in listed.lower()  # we asked for it, the client has not
            for name, content in (("old", old), ("new", SMALL)):
                assert (await site.dav(way, "GET", f"/{name}")).body == content
                head = await site.dav(way, "HEAD", f"/{name}")
                assert head.headers["content-length"] == str(len(content))


# ---- refusals


async def test_what_might_be_content_does_not_leave(tmp_path: Path) -> None:
    canary = os.urandom(32).hex().encode()
    xml = {"Content-Type": "application/xml"}
    bodies: list[Step] = [
        ("POST", "/f", {}, canary),
        ("PATCH", "/f", {}, canary),
        ("PUT", "/f", {"Content-Range": f"bytes 0-{len(canary) - 1}/*"}, canary),
        ("PUT", "/f", {"OC-Chunked": "1"}, canary),
        ("PROPFIND", "/", xml, canary),
        ("PROPPATCH", "/f", xml, b"<x>" + canary + b"</x>"),
        (
            "PROPPATCH",
            "/f",
            xml,
            b"<!DOCTYPE x><propertyupdate xmlns='DAV:'>" + canary + b"</propertyupdate>",
        ),
        ("LOCK", "/f", xml, b"<propfind xmlns='DAV:'>" + canary + b"</propfind>"),
        ("MKCOL", "/c", xml, canary),
        ("REPORT", "/", xml, canary),
        ("COPY", "/f", {"Destination": "{base}/g"}, canary),
        ("DELETE", "/f", {}, canary),
        ("PROPFIND", "/", xml, b"<propfind xmlns='DAV:'>" + canary * 20_000 + b"</propfind>"),
    ]
    async with dav_site(tmp_path, wsgidav) as site:
        assert (await site.dav("reverse", "PUT", "/f", body=SMALL)).status == 201
        before = site.server.stored()
        for method, path, fields, body in bodies:
            for way in THROUGH:
                answer = await site.dav(way, method, path, fields=fields, body=body)
                assert answer.code is not None, f"{method} {path} {dict(fields)}"
                assert answer.status >= 400
                assert answer.headers["content-type"].startswith("application/xml")
        for way in THROUGH:
            for elsewhere in ("https://other.example/f", "https://localhost:1/f", "//other.example/f"):
                answer = await site.dav(way, "COPY", "/f", fields={"Destination": elsewhere})
                assert answer.code in ("foreign-destination", "bad-destination")
        assert site.server.stored() == before
        notes = b"".join(path.read_bytes() for path in site.server.root.rglob("*") if path.is_file())
        assert canary not in notes
