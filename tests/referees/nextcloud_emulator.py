"""What Nextcloud's file and upload endpoints do, as strict as they are: an emulator, for there is none here.

Written from the developer manual ("Chunked file upload", "Basic APIs") and the public sources of
apps/dav/lib/Upload. It is no referee of anything but these rules:

1. Chunks lie in `uploads/USER/ID` and can be listed, not read. Moving `.file` joins them by the natural order
   of their names and removes the collection.
2. `OC-Total-Length` at the move must be the sum of the chunks, else 400 (ChunkingPlugin::verifySize).
3. With `object_store` every request of an upload names its Destination, chunks are numbers from 1 to 10000,
   and all but the last in order have 5 MiB (ChunkingV2Plugin, S3's EntityTooSmall).
4. A checksum that a client states is kept and shown, never compared.
"""

import contextlib
import hashlib
import re
import secrets
import ssl
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from xml.sax.saxutils import escape

from aiohttp import web

USER = "alice"
DAV = "/remote.php/dav"
MIN_PART_BYTES = 5 * 1024 * 1024


@dataclass(slots=True)
class Stored:
    data: bytes
    checksum: str | None = None
    mtime_s: int = 1_700_000_000
    etag: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(slots=True)
class Nextcloud:
    port: int
    object_store: bool
    files: dict[str, Stored] = field(default_factory=dict)
    """By path below `files/USER/`."""
    folders: set[str] = field(default_factory=lambda: {""})
    uploads: dict[str, dict[str, Stored]] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    """Requests that no client of Nextcloud sends, or sends so."""
    reads: list[str] = field(default_factory=list)
    """Ranges of files that were read."""
    elsewhere: str | None = None
    """Where it sends whoever uploads a chunk, if anywhere (307)."""

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def stored(self) -> list[tuple[str, bytes]]:
        return [(name, stored.data) for name, stored in sorted(self.files.items())]

    # ---- requests

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = unquote(request.raw_path.partition("?")[0])
        body = await request.read()
        for kind, act in (("files", self._file), ("uploads", self._upload)):
            prefix = f"{DAV}/{kind}/{USER}"
            if path == prefix or path.startswith(prefix + "/"):
                return act(request, path[len(prefix) + 1 :].rstrip("/"), body)
        return web.Response(status=404)

    def _file(self, request: web.Request, name: str, body: bytes) -> web.StreamResponse:
        match request.method:
            case "PUT":
                if name.rpartition("/")[0] not in self.folders:
                    return web.Response(status=409)
                status = 204 if name in self.files else 201
                return self._made(name, _sent(request, body), status)
            case "MKCOL":
                if name in self.folders:
                    return web.Response(status=405)
                self.folders.add(name)
                return web.Response(status=201)
            case "PROPFIND":
                return self._list_files(request, name, body)
            case "GET" | "HEAD":
                return self._read(request, name)
            case "MOVE":
                moved, target = self.files.pop(name), self._destination(request)
                return self._made(target, moved, 204 if target in self.files else 201)
            case "PATCH" if "X-Recalculate-Hash" in request.headers and name in self.files:
                stored = self.files[name]
                stored.checksum = "SHA1:" + hashlib.sha1(stored.data, usedforsecurity=False).hexdigest()
                return web.Response(status=204, headers={"OC-Checksum": stored.checksum})
            case "DELETE" if name in self.files:
                del self.files[name]
                return web.Response(status=204)
            case _:
                return web.Response(status=404)

    def _made(self, name: str, stored: Stored, status: int) -> web.Response:
        self.files[name] = stored
        tag = f'"{stored.etag}"'
        return web.Response(status=status, headers={"ETag": tag, "OC-ETag": tag, "OC-FileId": "00000042ocx"})

    def _read(self, request: web.Request, name: str) -> web.Response:
        stored = self.files.get(name)
        if stored is None:
            return web.Response(status=404)
        headers = {"ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes"}
        if request.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return web.Response(status=412)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            if request.method == "HEAD":
                return web.Response(headers={**headers, "Content-Length": str(len(stored.data))})
            return web.Response(body=stored.data, headers=headers)
        size = len(stored.data)
        start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        stop = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
        self.reads.append(f"{name} {start}-{stop}")
        if start >= stop:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return web.Response(status=206, body=stored.data[start:stop], headers=headers)

    def _upload(self, request: web.Request, below: str, body: bytes) -> web.StreamResponse:
        upload, _, name = below.partition("/")
        chunks = self.uploads.get(upload)
        if self.object_store and request.method != "PROPFIND" and "Destination" not in request.headers:
            self.trouble.append(f"{request.method} {below} without Destination")
            return web.Response(status=400)
        if not name and request.method == "MKCOL":
            if chunks is not None:
                return web.Response(status=405)
            self.uploads[upload] = {}
            return web.Response(status=201)
        if chunks is None:
            return web.Response(status=404)
        match request.method, name:
            case "DELETE", "":
                del self.uploads[upload]
                return web.Response(status=204)
            case "PROPFIND", "":
                return self._list_chunks(upload, chunks)
            case "MOVE", ".file":
                return self._join(request, upload, chunks)
            case "PUT", _ if name and self.elsewhere is not None:
                return web.Response(status=307, headers={"Location": self.elsewhere})
            case "PUT", _ if name:
                if self.object_store and not (name.isdecimal() and 1 <= int(name) <= 10_000):
                    return web.Response(status=400, text="Invalid chunk name")
                key = str(int(name)) if self.object_store else name
                chunks[key] = stored = Stored(body)
                tags = {} if self.object_store else {"ETag": f'"{stored.etag}"'}
                return web.Response(status=201, headers=tags)
            case _:
                return web.Response(status=405)

    def _join(self, request: web.Request, upload: str, chunks: dict[str, Stored]) -> web.Response:
        ordered = [chunks[name].data for name in sorted(chunks, key=natural)]
        total = request.headers.get("OC-Total-Length")
        if total is not None and total != str(sum(map(len, ordered))):
            text = f"Chunks on server do not sum up to {total} but to {sum(map(len, ordered))} bytes"
            return web.Response(status=400, text=text)
        if self.object_store and any(len(each) < MIN_PART_BYTES for each in ordered[:-1]):
            return web.Response(status=500, text="EntityTooSmall")
        target = self._destination(request)
        status = 204 if target in self.files else 201
        made = self._made(target, _sent(request, b"".join(ordered)), status)
        if "X-OC-Mtime" in request.headers:
            made.headers["X-OC-Mtime"] = "accepted"
        del self.uploads[upload]
        return made

    def _destination(self, request: web.Request) -> str:
        url = urlsplit(request.headers["Destination"])
        if url.netloc not in ("", f"localhost:{self.port}"):
            self.trouble.append(f"Destination {request.headers['Destination']}")
        prefix = f"{DAV}/files/{USER}/"
        path = unquote(url.path)
        if not path.startswith(prefix):
            self.trouble.append(f"Destination {path}")
        return path.removeprefix(prefix)

    # ---- lists

    def _list_files(self, request: web.Request, name: str, body: bytes) -> web.Response:
        if request.headers.get("Depth") not in ("0", "1"):
            return web.Response(status=403)
        if name not in self.files and name not in self.folders:
            return web.Response(status=404)
        names = [name]
        if name in self.folders and request.headers["Depth"] == "1":
            names += [each for each in (*sorted(self.folders), *sorted(self.files)) if _parent(each) == name]
        listed = [
            _response(f"files/{USER}/{each}" + ("/" if each in self.folders else ""), self.files.get(each))
            for each in names
        ]
        if body and b"getetag" not in body:  # as asked
            listed = [re.sub(r"<d:getetag>[^<]*</d:getetag>", "", each) for each in listed]
        return _multistatus(listed)

    def _list_chunks(self, upload: str, chunks: dict[str, Stored]) -> web.Response:
        base = f"uploads/{USER}/{upload}/"
        whole = Stored(b"".join(each.data for each in chunks.values()))
        return _multistatus(
            [
                _response(base, None),
                _response(base + ".file", whole),
                *(_response(base + name, chunks[name]) for name in sorted(chunks, key=natural)),
            ]
        )


def _sent(request: web.Request, body: bytes) -> Stored:
    """With the time and the checksum that the client states."""
    mtime_s = int(request.headers.get("X-OC-Mtime", "1700000000"))
    return Stored(body, request.headers.get("OC-Checksum"), mtime_s)


def natural(name: str) -> tuple[object, ...]:
    """PHP's strnatcmp for names of digits: by value, but from left to right where one begins with 0."""
    if name.isdecimal() and not name.startswith("0"):
        return (0, int(name))
    return (0, int(name), name) if name.isdecimal() else (1, name)


def _parent(name: str) -> str | None:
    return None if not name else name.rpartition("/")[0]


def _response(path: str, stored: Stored | None) -> str:
    if stored is None:
        found = "<d:resourcetype><d:collection/></d:resourcetype><oc:size>1</oc:size>"
    else:
        checksums = f"<oc:checksums><oc:checksum>{escape(stored.checksum or '')}</oc:checksum></oc:checksums>"
        found = (
            f"<d:resourcetype/><d:getcontentlength>{len(stored.data)}</d:getcontentlength>"
            f"<oc:size>{len(stored.data)}</oc:size><d:getetag>&quot;{stored.etag}&quot;</d:getetag>"
            f"<d:getlastmodified>{formatdate(stored.mtime_s, usegmt=True)}</d:getlastmodified>"
        ) + (checksums if stored.checksum else "")
    return (
        f"<d:response><d:href>{escape(quote(f'{DAV}/{path}'))}</d:href><d:propstat><d:prop>{found}</d:prop>"
        "<d:status>HTTP/1.1 200 OK</d:status></d:propstat></d:response>"
    )


def _multistatus(responses: Iterable[str]) -> web.Response:
    text = (
        '<?xml version="1.0"?>\n<d:multistatus xmlns:d="DAV:" xmlns:s="http://sabredav.org/ns"'
        f' xmlns:oc="http://owncloud.org/ns">{"".join(responses)}</d:multistatus>'
    )
    return web.Response(status=207, text=text, content_type="application/xml", charset="utf-8")


@contextlib.asynccontextmanager
async def nextcloud(
    _directory: Path, certificate_file: Path, key_file: Path, *, object_store: bool = False
) -> AsyncIterator[Nextcloud]:
    server = Nextcloud(0, object_store)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate_file, key_file)
    app = web.Application(client_max_size=256 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        server.port = runner.addresses[0][1]
        yield server
    finally:
        await runner.cleanup()
