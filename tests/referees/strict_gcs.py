"""Google Cloud Storage's JSON API as strict as it is documented, over TLS: an emulator, in this process.

gcp-storage-emulator (gcp.py) is a third party's and judges that Google's client gets along; it knows little
of what goes wrong. This one knows preconditions, digests, sessions that end, and the rules of resumable
uploads (strict_gcs_sessions.py); it is no referee of anything else.

1. Nothing but this API is answered: other paths, methods and protocols are 404 or 405, and noted.
2. Faults happen when the test says so: one `Fault` for the next body that comes to a session.
3. JSON comes coded to whom it may, as Google's does.
4. Memory is bounded: `limit_bytes` for all that is stored, and for each session.

https://cloud.google.com/storage/docs/json_api/v1
"""

import contextlib
import json
import re
import secrets
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from tests.referees.strict_gcs_objects import (
    Buckets,
    Digests,
    FaultError,
    check_conditions,
    content_answer,
    selected,
    stated,
)
from tests.referees.strict_gcs_sessions import Place, Session, Taking

LIMIT_BYTES: Final = 128 * 1024 * 1024
REWRITE_BYTES: Final = 1024 * 1024
"""Of one call of rewrite."""
_UPLOAD: Final = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
_OBJECT: Final = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)")
_COPY: Final = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)")
_LIST: Final = re.compile(r"/storage/v1/b/([^/]+)/o")
_BUCKET: Final = re.compile(r"/storage/v1/b(?:/([^/]+))?")


class FaultKind(Enum):
    ERROR = "error"  # 503 after so many bytes; what came in whole granules counts
    CUT = "cut"  # the connection ends after so many bytes
    SILENT = "silent"  # all is taken, and the connection ends without an answer
    PARTIAL = "partial"  # all is read, so many bytes are kept, as `Range` says


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    after_bytes: int = 0
    status: int = 503


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that reached the service."""

    method: str
    path: str
    content_range: str | None
    body_bytes: int


@dataclass(slots=True)
class StrictGcs:
    port: int = 0
    bucket: str = "referee-bucket"
    buckets: Buckets = field(default_factory=lambda: Buckets("", LIMIT_BYTES))
    sessions: dict[str, Session] = field(default_factory=dict)
    faults: deque[Fault] = field(default_factory=deque)
    trouble: list[str] = field(default_factory=list)
    """What no client does that has read the documentation."""
    asked: list[Asked] = field(default_factory=list)
    """Of sessions."""
    rewrites: dict[str, int] = field(default_factory=dict)
    quotes: bool = True
    """Google's JSON API sends ETags without quotes, its XML API with them."""

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def stored(self) -> list[tuple[str, bytes]]:
        """`bucket/name` and content of every object."""
        return [
            (f"{bucket}/{name}", stored.data)
            for bucket, objects in sorted(self.buckets.objects.items())
            for name, stored in sorted(objects.items())
        ]

    def contents(self, bucket: str) -> dict[str, bytes]:
        """Every object of a bucket as it is stored."""
        return {name: stored.data for name, stored in self.buckets.bucket(bucket).items()}

    def held(self) -> bytes:
        """What sessions have received that have not ended."""
        return b"".join(bytes(session.held) for session in self.sessions.values())

    def end_sessions(self, status: int) -> None:
        """As after a week (410), or as if they had never been (404)."""
        for session in self.sessions.values():
            session.ended = status

    # ---- requests

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        is_media = request.query.get("alt") == "media"
        try:
            answer = await self._route(request, path)
        except FaultError as error:
            return error.answer(as_text=is_media)
        except web.HTTPException as error:
            self.trouble.append(f"{request.method} {path}: {error.status}")
            raise
        if not isinstance(answer, web.Response) or is_media or answer.content_type != "application/json":
            return answer
        if (fields := request.query.get("fields")) and answer.status == 200:
            answer = web.json_response(selected(json.loads(answer.text or "{}"), fields))
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            answer.enable_compression(web.ContentCoding.gzip)
            answer.headers["Vary"] = "Accept-Encoding"
        return answer

    async def _route(self, request: web.Request, path: str) -> web.StreamResponse:
        routes: list[tuple[re.Pattern[str], dict[str, Callable[..., Awaitable[web.StreamResponse]]]]] = [
            (_UPLOAD, {"POST": self._upload, "PUT": self._put_session, "DELETE": self._cancel}),
            (_COPY, {"POST": self._copy}),
            (_LIST, {"GET": self._list}),
            (
                _OBJECT,
                {
                    "GET": self._read, "HEAD": self._read, "PATCH": self._change, "PUT": self._change,
                    "DELETE": self._delete,
                },
            ),
            (_BUCKET, {"GET": self._buckets, "POST": self._new_bucket, "DELETE": self._no_bucket}),
        ]  # fmt: skip
        for pattern, methods in routes:
            match = pattern.fullmatch(path)
            if match is not None:
                if request.method not in methods:
                    raise web.HTTPMethodNotAllowed(request.method, methods)
                names = [unquote(name) if name is not None else None for name in match.groups()]
                return await methods[request.method](request, *names)
        raise web.HTTPNotFound

    # ---- uploads

    async def _upload(self, request: web.Request, bucket: str) -> web.StreamResponse:
        how, query = request.query.get("uploadType"), request.query
        self.buckets.bucket(bucket)
        if how == "media":
            content_type = request.headers.get("Content-Type", "application/octet-stream")
            body = await self._body(request)
            return self._made(bucket, query.get("name"), body, {"contentType": content_type}, request=request)
        if how == "multipart":
            resource, content_type, body = await self._related(request)
            resource.setdefault("contentType", content_type)
            return self._made(
                bucket, query.get("name", resource.get("name")), body, resource, request=request
            )
        if how != "resumable":
            raise web.HTTPMethodNotAllowed("POST", ["PUT"])
        # Go's clients post chunks.
        return await (self._put_session if "upload_id" in query else self._start)(request, bucket)

    def _made(
        self,
        bucket: str,
        name: str | None,
        body: bytes,
        resource: Mapping[str, Any],
        *,
        request: web.Request,
        query: Mapping[str, str] | None = None,
    ) -> web.Response:
        if not name:
            raise FaultError(400, "Required parameter: name")
        check_conditions(self.buckets.bucket(bucket).get(name), request.query if query is None else query)
        digests = Digests.of(body)
        digests.check(stated(resource, request.headers))
        return web.json_response(self.buckets.write(bucket, name, body, resource, digests).resource)

    async def _body(self, request: web.Request) -> bytes:
        body = bytearray()
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > self.buckets.limit_bytes:
                raise FaultError(413, "The emulator is full.")
        return bytes(body)

    async def _related(self, request: web.Request) -> tuple[dict[str, Any], str, bytes]:
        """FaultError(400) for what is not metadata and content in two parts (RFC 2387)."""
        found = re.fullmatch(
            r'multipart/related;\s*boundary="?([^";]+)"?', request.headers.get("Content-Type", "")
        )
        if found is None:
            raise FaultError(400, "Bad content type. Please use multipart.")
        mark, body = b"--" + found[1].encode(), await self._body(request)
        before, *parts = (b"\r\n" + body).split(b"\r\n" + mark)
        if before or len(parts) != 3 or parts[2].rstrip(b"\r\n") != b"--":
            raise FaultError(400, "Malformed multipart body.")
        heads, contents = [], []
        for part in parts[:2]:
            head, gap, content = part.partition(b"\r\n\r\n")
            lines = [line.partition(b":") for line in head.strip(b"\r\n").split(b"\r\n") if line]
            heads.append({name.strip().lower(): value.strip().decode() for name, _, value in lines})
            contents.append(content)
            if not gap:
                raise FaultError(400, "Malformed multipart body.")
        if not heads[0].get(b"content-type", "").lower().startswith("application/json"):
            raise FaultError(400, "The metadata part is not JSON.")
        return _document(contents[0]), heads[1].get(b"content-type", "application/octet-stream"), contents[1]

    async def _start(self, request: web.Request, bucket: str) -> web.StreamResponse:
        resource = _document(await self._body(request))
        name = request.query.get("name", resource.get("name"))
        if not name:
            raise FaultError(400, "Required parameter: name")
        if "X-Upload-Content-Type" in request.headers:
            resource.setdefault("contentType", request.headers["X-Upload-Content-Type"])
        check_conditions(self.buckets.bucket(bucket).get(name), request.query)
        said = request.headers.get("X-Upload-Content-Length")
        upload_id = secrets.token_urlsafe(48)
        self.sessions[upload_id] = Session(
            upload_id, bucket, name, resource, dict(request.query), None if said is None else int(said),
            self.trouble,
        )  # fmt: skip
        place = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload_id}"
        return web.Response(headers={"Location": place, "X-GUploader-UploadID": upload_id})

    def _session(self, request: web.Request, bucket: str) -> Session:
        session = self.sessions.get(request.query.get("upload_id", ""))
        if session is None or session.bucket != bucket:
            raise FaultError(404, "Not Found")
        if session.ended is not None:
            raise FaultError(session.ended, "The upload session is gone.")
        return session

    async def _cancel(self, request: web.Request, bucket: str) -> web.StreamResponse:
        session = self._session(request, bucket)
        if session.result is None:
            session.ended = 499
            session.held.clear()
        return web.Response(status=499, reason="Client Closed Request")

    async def _put_session(self, request: web.Request, bucket: str) -> web.StreamResponse:
        content_range = request.headers.get("Content-Range")
        path = request.raw_path.partition("?")[0]
        self.asked.append(Asked(request.method, path, content_range, request.content_length or 0))
        session = self._session(request, bucket)
        if session.result is not None:
            await self._body(request)
            return web.json_response(session.result.resource)
        taking = session.begin(Place.of(content_range), request.content_length)
        if taking.is_gap and not taking.place.is_status:
            await self._body(request)
            return _gap(taking)
        fault = self.faults.popleft() if self.faults and not taking.place.is_status else None
        if fault is not None:
            stopped = await self._faulty(request, taking, fault)
            if stopped is not None:
                return stopped
        else:
            await self._take(request, taking)
        answer = self._finish(request, taking)
        if fault is not None and fault.kind is FaultKind.SILENT:
            return _cut(request)
        return answer

    async def _take(self, request: web.Request, taking: Taking) -> None:
        try:
            async for piece in request.content.iter_any():
                taking.feed(piece, limit_bytes=self.buckets.limit_bytes)
        except BaseException:  # a client that is cut off cancels this task: what came whole stays
            taking.keep_granules()
            raise

    async def _faulty(self, request: web.Request, taking: Taking, fault: Fault) -> web.StreamResponse | None:
        """None: the request is gone on with."""
        session, before = taking.session, len(taking.session.held)
        if fault.kind is FaultKind.SILENT:
            await self._take(request, taking)
            return None
        if fault.kind is FaultKind.PARTIAL:
            await self._take(request, taking)
            taking.keep_granules(before + fault.after_bytes)
            return _incomplete(request, session)
        async for piece in request.content.iter_any():
            taking.feed(piece, limit_bytes=self.buckets.limit_bytes)
            if len(session.held) - before >= fault.after_bytes:
                break
        taking.keep_granules(before + fault.after_bytes)
        if fault.kind is FaultKind.CUT:
            return _cut(request)
        return FaultError(fault.status, "Backend Error").answer()

    def _finish(self, request: web.Request, taking: Taking) -> web.Response:
        session = taking.session
        if not taking.finish():
            return _incomplete(request, session)
        try:
            answer = self._made(
                session.bucket, session.name, bytes(session.held), session.resource,
                request=request, query=session.query,
            )  # fmt: skip
        except FaultError:
            session.ended = 410
            session.held.clear()
            raise
        session.result = self.buckets.bucket(session.bucket)[session.name].copy()
        session.result.data = b""
        session.held.clear()
        return answer

    # ---- objects

    async def _read(self, request: web.Request, bucket: str, name: str) -> web.StreamResponse:
        query, path = request.query, request.raw_path
        stored = self.buckets.find(bucket, name, query)
        if query.get("alt", "json") == "json":
            if path.startswith("/download/") or request.method == "HEAD":
                raise web.HTTPNotFound
            return web.json_response(stored.resource)
        return content_answer(request, stored, quotes=self.quotes)

    async def _change(self, request: web.Request, bucket: str, name: str) -> web.StreamResponse:
        members = _document(await self._body(request))
        stored = self.buckets.find(bucket, name, request.query)
        stored.change(members, whole=request.method == "PUT")
        return web.json_response(stored.resource)

    async def _delete(self, request: web.Request, bucket: str, name: str) -> web.StreamResponse:
        self.buckets.find(bucket, name, request.query)
        del self.buckets.bucket(bucket)[name]
        return web.Response(status=204)

    async def _copy(self, request: web.Request, *names: str) -> web.StreamResponse:
        bucket, name, verb, to_bucket, to = names
        query, members = request.query, _document(await self._body(request))
        source = self.buckets.bucket(bucket).get(name)
        generation = query.get("sourceGeneration")
        if source is None or generation not in (None, str(source.generation)):
            raise FaultError(404, f"No such object: {bucket}/{name}")
        check_conditions(source, query, source=True)
        check_conditions(self.buckets.bucket(to_bucket).get(to), query)
        token = query.get("rewriteToken") or secrets.token_urlsafe(16)
        size = done = len(source.data)
        if verb == "rewriteTo":
            done = min(self.rewrites.pop(token, 0) + REWRITE_BYTES, size)
        answer = {"kind": "storage#rewriteResponse", "objectSize": str(size), "done": done == size}
        answer["totalBytesRewritten"] = str(done)
        if done < size:
            self.rewrites[token] = done
            return web.json_response({**answer, "rewriteToken": token})
        digests = Digests(source.resource["crc32c"], source.resource["md5Hash"])
        # A destination's metadata replaces the source's; without one it is copied.
        stored = self.buckets.write(to_bucket, to, source.data, members or source.resource, digests)
        if verb == "copyTo":
            return web.json_response(stored.resource)
        return web.json_response({**answer, "resource": stored.resource})

    async def _list(self, request: web.Request, bucket: str) -> web.StreamResponse:
        return web.json_response(self.buckets.listed(bucket, request.query))

    # ---- buckets

    async def _buckets(self, _request: web.Request, name: str | None) -> web.StreamResponse:
        if name is None:
            items = [_bucket(one) for one in sorted(self.buckets.objects)]
            return web.json_response({"kind": "storage#buckets", "items": items})
        self.buckets.bucket(name)
        return web.json_response(_bucket(name))

    async def _new_bucket(self, request: web.Request, _name: str | None) -> web.StreamResponse:
        name = _document(await self._body(request)).get("name")
        if not isinstance(name, str):
            raise FaultError(400, "Required: name")
        if name in self.buckets.objects:
            raise FaultError(409, "Your previous request to create the named bucket succeeded.")
        self.buckets.objects[name] = {}
        return web.json_response(_bucket(name))

    async def _no_bucket(self, _request: web.Request, name: str | None) -> web.StreamResponse:
        if name is None or self.buckets.bucket(name):
            raise FaultError(409, "The bucket you tried to delete is not empty.")
        del self.buckets.objects[name]
        return web.Response(status=204)


def _bucket(name: str) -> dict[str, Any]:
    return {
        "kind": "storage#bucket", "id": name, "name": name, "location": "EU", "locationType": "multi-region",
        "storageClass": "STANDARD", "metageneration": "1", "projectNumber": "1",
    }  # fmt: skip


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body or b"{}")
    except ValueError:
        raise FaultError(400, "Parse Error") from None
    if document is None:  # Go's clients write it for nothing
        return {}
    if not isinstance(document, dict):
        raise FaultError(400, "Parse Error")
    return document


def _incomplete(request: web.Request, session: Session) -> web.Response:
    headers = {"X-GUploader-UploadID": session.upload_id}
    if session.held:
        headers["Range"] = f"bytes=0-{len(session.held) - 1}"
    if request.headers.get("X-GUploader-No-308") == "yes":
        return web.Response(headers={**headers, "X-HTTP-Status-Code-Override": "308"})
    return web.Response(status=308, reason="Resume Incomplete", headers=headers)


def _gap(taking: Taking) -> web.Response:
    """In these very words: some clients look for them."""
    text = (
        "Invalid request.  According to the Content-Range header, the upload offset is"
        f" {taking.place.start} byte(s), which exceeds already uploaded size of"
        f" {len(taking.session.held)} byte(s)."
    )
    return web.Response(status=503, text=text)


def _cut(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


@contextlib.asynccontextmanager
async def strict_gcs(certificate_file: Path, key_file: Path) -> AsyncIterator[StrictGcs]:
    """Start it with one bucket."""
    server = StrictGcs()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate_file, key_file)
    app = web.Application(client_max_size=LIMIT_BYTES)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        server.port = runner.addresses[0][1]
        server.buckets.base_url = server.url
        server.buckets.objects[server.bucket] = {}
        yield server
    finally:
        await runner.cleanup()
