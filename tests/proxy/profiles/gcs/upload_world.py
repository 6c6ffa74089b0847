"""Resumable uploads without sockets: the real handlers, keys, spool and database, and a service that obeys
Google's protocol, or fails as it is told to.

    world = await World.make(store)
    await world.begin(total=None)
    await world.put(content[:GRANULE], "bytes 0-262143/*")
"""

import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, override

from envelope.derive import object_key
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.multipart import TRAILER_SIZE, CompositeOpener, Manifest, ending_range, open_ending
from envelope.objects import Header, Sealer
from proxy import refusals
from proxy.bodies.spool import Spools
from proxy.bodies.spooling import HeldUpload
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.messages.message import ByteRange, Fields, RequestHead
from proxy.plans.conversing import Conversation, Inspected, PartOf, Reply
from proxy.plans.plan import Answer, Converse, Refuse, Reshape
from proxy.plans.planner import request_of
from proxy.plans.request import Mode, Request, Route
from proxy.profiles.gcs import resumable
from proxy.profiles.gcs.routes import operation_of
from proxy.profiles.gcs.sessions import GRANULE_BYTES
from proxy.refusals import RefusedError
from proxy.tenants.model import LegacyPolicy, Listen, ServiceEntry, Upstream
from proxy.uploads import UploadStore
from tests.fakes.clock import ManualClock

HOST = "storage.googleapis.com"
OWNER = NetworkService("acme", "objects")
ENTRY = ServiceEntry(
    owner=OWNER,
    upstream=Upstream("https", HOST, 443),
    profile="gcs",
    legacy=LegacyPolicy.STRICT,
    reverse_listen=Listen("127.0.0.1", 8443),
    certificate=None,
    key_file=Path("unused"),
)
START = "/upload/storage/v1/b/box/o?uploadType=resumable"


def route(mode: Mode = Mode.FORWARD) -> Route:
    return Route(service=ENTRY, mode=mode)


def head(
    method: str, target: str, fields: Mapping[str, str] | None = None, *, host: str = HOST
) -> RequestHead:
    raw = [(name.encode(), value.encode()) for name, value in (fields or {}).items()]
    return RequestHead(method=method, target=target, fields=Fields(raw), host=host, http2=False)


def request(its: RequestHead, mode: Mode = Mode.FORWARD) -> Request:
    return request_of(its, route(mode))


_NOT_ASKED = "a resumable upload has no use for this part of a conversation"


@dataclass(frozen=True, slots=True)
class Came:
    """A request as the service has seen it; `body`: what of it has come."""

    method: str
    target: str
    fields: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Answered:
    """What a conversation sees of an answer."""

    status: int
    fields: Fields
    body: bytes


class Service:
    """One bucket. `faults`: what becomes of the next requests with content, in turn; "": it works.

    "refuse": 503 before anything is taken. "cut N": what has come of the first N bytes is taken, in granules,
    and the connection breaks. "deaf": all is done, and the answer does not arrive.
    """

    def __init__(self) -> None:
        self.came: list[Came] = []
        self.faults: list[str] = []
        self.sessions: dict[str, bytearray] = {}
        self.objects: dict[str, bytes] = {}
        self.documents: dict[str, dict[str, Any]] = {}
        self.location: str | None = None
        """In place of the right one."""
        self.object_more: dict[str, Any] = {}
        self.gone = False

    async def answer(
        self, method: str, target: str, fields: dict[str, str], body: bytes | AsyncIterator[bytes] | None
    ) -> Answered:
        fault = self.faults.pop(0) if self.faults and not isinstance(body, bytes | None) else ""
        if fault == "refuse":
            return _answered(503, {}, b"later")
        limit = int(fault.removeprefix("cut ")) if fault.startswith("cut ") else None
        data = await _collected(body, limit)
        self.came.append(Came(method, target, fields, data))
        if method == "POST":
            return self._begin(data)
        name = target.rpartition("upload_id=")[2]
        if method == "DELETE":
            self.sessions.pop(name, None)
            return _answered(499, {}, b"")
        reply = self._put(name, fields.get("content-range", ""), data, is_cut=limit is not None)
        if fault:
            raise RefusedError(refusals.UPSTREAM)
        return reply

    def _begin(self, data: bytes) -> Answered:
        name = f"session-{len(self.came)}"
        self.sessions[name] = bytearray()
        self.documents[name] = json.loads(data)
        location = self.location or f"https://{HOST}{START}&upload_id={name}"
        return _answered(200, {"location": location.replace("{name}", name)}, b"")

    def _put(self, name: str, content_range: str, data: bytes, *, is_cut: bool) -> Answered:
        if name in self.objects:
            return self._object(name)
        held = self.sessions.get(name)
        if held is None or self.gone:
            return _answered(410 if self.gone else 404, {}, b"")
        place, _, total = content_range.removeprefix("bytes ").partition("/")
        if place != "*":
            start = int(place.partition("-")[0])
            if start > len(held):
                return _answered(503, {}, b"beyond")
            held += data[len(held) - start :]
        if total != "*" and len(held) == int(total) and not is_cut:
            self.objects[name] = bytes(held)
            return self._object(name)
        del held[len(held) // GRANULE_BYTES * GRANULE_BYTES :]
        return _answered(308, {"range": f"bytes=0-{len(held) - 1}"} if held else {}, b"")

    def _object(self, name: str) -> Answered:
        document = {
            **self.documents[name],
            "kind": "storage#object",
            "name": "o",
            "bucket": "box",
            "size": str(len(self.objects[name])),
            "crc32c": "AAAAAA==",
            "md5Hash": "AAAAAAAAAAAAAAAAAAAAAA==",
            **self.object_more,
        }
        return _answered(200, {"x-goog-hash": "crc32c=AAAAAA=="}, json.dumps(document).encode())


async def _collected(body: bytes | AsyncIterator[bytes] | None, limit: int | None) -> bytes:
    if body is None or isinstance(body, bytes):
        return body or b""
    data = bytearray()
    async for piece in body:
        data += piece
        if limit is not None and len(data) >= limit:
            return bytes(data[:limit])
    return bytes(data)


def _answered(status: int, fields: Mapping[str, str], body: bytes) -> Answered:
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    return Answered(status, Fields(raw), body)


class Talk(Conversation):
    """Of one request. What these handlers do not use is not here."""

    def __init__(self, world: "World", its: Request, body: bytes, spooled: HeldUpload | None) -> None:
        self.request = its
        self.body = body
        self.spooled = spooled
        self._world = world

    @property
    @override
    def uploads(self) -> UploadStore:
        return self._world.store

    @contextlib.asynccontextmanager
    @override
    async def ask(
        self,
        method: str,
        target: str | None = None,
        *,
        fields: Iterable[tuple[str, str]] = (),
        keep: Iterable[str] = (),
        body: bytes | AsyncIterator[bytes] | None = None,
        body_bytes: int | None = None,
    ) -> AsyncIterator[Any]:
        its = self.request.head
        kept = {name: its.fields.sole(name) or "" for name in keep if name in its.fields}
        sent = kept | {name.lower(): value for name, value in fields}
        yield await self._world.service.answer(method, target or its.target, sent, body)

    @override
    async def relay(self, answer: Any, *, limit_bytes: int = 1024 * 1024, to_upload: bool = False) -> Reply:
        assert len(answer.body) <= limit_bytes
        fields = [(name, value) for name in answer.fields for value in answer.fields.all(name)]
        return Reply(status=answer.status, fields=tuple(fields), body=answer.body)

    @override
    async def sealing_key(self, *, size_bytes: int | None = None, target: str | None = None) -> DataKey:
        return self._world.keys.sealing_key(OWNER)

    @override
    def opening_key(self, header: Header) -> DataKey:
        return self._world.keys.opening_key(OWNER, header.key_id)

    @override
    async def inspect(self, target: str | None = None) -> Inspected | None:
        raise RefusedError(refusals.NOT_SEALED)

    @override
    async def sealing(self, pieces: AsyncIterator[bytes], plain_bytes: int, **_: Any) -> Any:
        raise AssertionError(_NOT_ASKED)

    @override
    async def ending(self, manifest: Manifest) -> bytes:
        raise AssertionError(_NOT_ASKED)

    @override
    def opened(
        self,
        target: str | None = None,
        *,
        wanted: ByteRange | None = None,
        fields: Iterable[tuple[str, str]] = (),
    ) -> Any:
        raise AssertionError(_NOT_ASKED)

    @override
    async def composite_bytes(self, target: str, *, etag: str | None, stored_bytes: int) -> int | None:
        raise AssertionError(_NOT_ASKED)

    @override
    def note(self, action: str, *, target: str | None = None, size_bytes: int | None = None) -> None:
        raise AssertionError(_NOT_ASKED)


@dataclass(slots=True)
class World:
    store: UploadStore
    keys: KeyCache
    service: Service = field(default_factory=Service)
    spools: Spools = field(default_factory=Spools)
    materials: dict[bytes, bytes] = field(default_factory=dict)
    session: str = ""

    @classmethod
    def make(cls, store: UploadStore) -> "World":
        world = cls(store, KeyCache(ManualClock()))
        world.push()
        return world

    def push(self) -> KeyId:
        """Another key is active; those before it are good for reading only."""
        self.materials[KeyId.random().raw] = os.urandom(32)
        *before, active = map(KeyId, self.materials)
        keys = [self._material(key_id, KeyState.DEACTIVATED) for key_id in before]
        self.keys.install(OWNER, [*keys, self._material(active, KeyState.ACTIVE)], deadline_boot_s=1e9)
        return active

    def _material(self, key_id: KeyId, state: KeyState) -> KeyMaterial:
        version = list(self.materials).index(key_id.raw) + 1
        secret = bytearray(self.materials[key_id.raw])
        return KeyMaterial(owner=OWNER, key_id=key_id, state=state, version=version, secret=secret)

    # ---- the client

    async def begin(
        self, document: bytes = b'{"name": "o"}', *, mode: Mode = Mode.FORWARD, **fields: str
    ) -> Reply:
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        its = head("POST", START, {"content-length": str(len(document)), **named})
        reply = await self._answered(request(its, mode), document)
        location = dict(reply.fields).get("Location", "")
        self.session = location.removeprefix(f"https://{HOST}")
        return reply

    async def put(
        self,
        content: bytes | None,
        content_range: str | None,
        *,
        method: str = "PUT",
        **fields: str,
    ) -> Reply:
        """*content* None: without a body."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        if content_range is not None:
            named["content-range"] = content_range
        named.setdefault("content-length", str(len(content or b"")))
        return await self._answered(request(head(method, self.session, named)), content or b"")

    async def _answered(self, its: Request, body: bytes) -> Reply:
        plan = resumable.plan(its, operation_of(its.head.method, its.head.target, its.head.fields))
        if isinstance(plan, Refuse):
            raise RefusedError(plan.refusal)
        assert isinstance(plan, Converse)
        spooled: HeldUpload | None = None
        if isinstance(plan.spool, Reshape):
            key = self.keys.sealing_key(OWNER)

            def new_sealer(part: PartOf | None = None) -> Sealer:
                assert part is None
                return Sealer(key.object_key, OWNER, key.key_id)

            reshaper, spool = plan.spool.make(new_sealer), self.spools.open("acme")
            spool.write(reshaper.feed(body))
            spool.write(reshaper.finish())
            spooled, body = HeldUpload(spool, None), b""
        try:
            decision = await plan.handler(Talk(self, its, body, spooled))
        finally:
            if spooled is not None:
                spooled.close()
        if isinstance(decision, Refuse):
            raise RefusedError(decision.refusal)
        assert isinstance(decision, Answer)
        return decision.reply

    async def place(self) -> int | None:
        """Where the client is told that the upload is; None: it has ended."""
        reply = await self.put(None, "bytes */*")
        if reply.status != 308:
            return None
        told = dict(reply.fields).get("Range")
        return 0 if told is None else int(told.rpartition("-")[2]) + 1

    # ---- what is stored

    @property
    def stored(self) -> bytes:
        (made,) = self.service.objects.values()
        return made

    def opened(self, stored: bytes) -> bytes:
        def find(header: Header) -> bytes:
            return object_key(self.materials[header.key_id.raw], OWNER, header.key_id)

        begin, end = ending_range(stored[-TRAILER_SIZE:], stored_bytes=len(stored))
        ending = open_ending(OWNER, find, stored[begin:end], stored_bytes=len(stored))
        opener = CompositeOpener(OWNER, find, ending)
        return bytes(opener.update(stored)) + opener.finalize()
