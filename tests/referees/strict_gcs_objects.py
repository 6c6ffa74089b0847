"""Objects of the strict emulator of Google Cloud Storage: resources, conditions, reads, lists.

https://cloud.google.com/storage/docs/json_api/v1/objects, .../request-preconditions, .../how-tos/performance

1. A write makes a new generation; a change of metadata a new metageneration. The ETag is of both.
2. What a write states of its content, in metadata or X-Goog-Hash, is compared, or nothing is written.
3. Generation 0 is that of an object which is not there.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any, Final
from urllib.parse import quote

from aiohttp import web
from multidict import CIMultiDict

from proxy.messages.checksums import Crc32C

WRITABLE: Final = frozenset(
    {"acl", "cacheControl", "contentDisposition", "contentEncoding", "contentLanguage", "contentType",
     "customTime", "eventBasedHold", "metadata", "storageClass", "temporaryHold"}
)  # fmt: skip
_REASONS: Final = {
    400: "invalid", 404: "notFound", 405: "methodNotAllowed", 409: "conflict", 410: "gone",
    412: "conditionNotMet", 413: "uploadTooLarge", 416: "requestedRangeNotSatisfiable",
}  # fmt: skip
_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)")
_FIELD: Final = re.compile(r"[\w*/-]+|[(),]")


class FaultError(Exception):
    """An answer in Google's words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    def answer(self, *, as_text: bool = False) -> web.Response:
        """*as_text*: as reads of content answer."""
        if self.status == 304:
            return web.Response(status=304)
        if as_text:
            return web.Response(status=self.status, text=self.message, content_type="text/html")
        reason = _REASONS.get(self.status, "backendError")
        errors = [{"message": self.message, "domain": "global", "reason": reason}]
        error = {"code": self.status, "message": self.message, "errors": errors}
        return web.json_response({"error": error}, status=self.status)


@dataclass(frozen=True, slots=True)
class Digests:
    """In base64, as the API writes them."""

    crc32c: str
    md5: str

    @classmethod
    def of(cls, data: bytes | bytearray) -> "Digests":
        crc = Crc32C()
        crc.update(data)
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        return cls(base64.b64encode(crc.digest()).decode(), base64.b64encode(md5).decode())

    def check(self, said: Mapping[str, str]) -> None:
        """FaultError(400). *said*: `crc32c` and `md5`, as far as there are any."""
        for name, mine in (("crc32c", self.crc32c), ("md5", self.md5)):
            if said.get(name, mine) != mine:
                message = f'Provided {name.upper()} "{said[name]}" doesn\'t match calculated "{mine}".'
                raise FaultError(400, message)


def stated(resource: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, str]:
    """The digests that a write states of its content."""
    found = {"crc32c": resource.get("crc32c"), "md5": resource.get("md5Hash") or headers.get("Content-MD5")}
    for part in headers.get("X-Goog-Hash", "").split(","):
        name, _, value = part.strip().partition("=")
        found[name] = value or found.get(name)
    return {name: value for name, value in found.items() if value}


@dataclass(slots=True)
class Stored:
    data: bytes
    resource: dict[str, Any]

    @property
    def generation(self) -> int:
        return int(self.resource["generation"])

    @property
    def metageneration(self) -> int:
        return int(self.resource["metageneration"])

    def change(self, members: Mapping[str, Any], *, whole: bool) -> None:
        """By PATCH, or by PUT (*whole*: what is not there goes)."""
        unknown = members.keys() - WRITABLE if not whole else set()
        if unknown:
            raise FaultError(400, f"Invalid argument: {', '.join(sorted(unknown))}")
        kept = {} if whole else dict(self.resource.get("metadata", {}))
        new = members.get("metadata", {} if whole else kept)
        kept.update(new or {})
        for name in WRITABLE:
            if name in members:
                self.resource[name] = members[name]
            elif whole and name != "storageClass":
                self.resource.pop(name, None)
        metadata = {name: value for name, value in kept.items() if value is not None}
        self.resource["metadata"] = metadata if new is not None else {}
        self.resource["metageneration"] = str(self.metageneration + 1)
        self._settle()

    def _settle(self) -> None:
        for name in [name for name, value in self.resource.items() if value is None or value == {}]:
            del self.resource[name]
        self.resource["updated"] = _now()
        etag = f"{self.generation}/{self.metageneration}".encode()
        self.resource["etag"] = base64.b64encode(etag).decode()

    def copy(self) -> "Stored":
        return Stored(self.data, dict(self.resource))


@dataclass(slots=True)
class Buckets:
    """All that is stored, at most *limit_bytes* of it."""

    base_url: str
    limit_bytes: int
    objects: dict[str, dict[str, Stored]] = field(default_factory=dict)
    last_generation: int = 1_700_000_000_000_000

    def bucket(self, name: str) -> dict[str, Stored]:
        """FaultError(404)."""
        if name not in self.objects:
            raise FaultError(404, "The specified bucket does not exist.")
        return self.objects[name]

    def find(self, bucket: str, name: str, query: Mapping[str, str]) -> Stored:
        """FaultError(404, 412, 304): also by `generation` and preconditions of *query*."""
        found = self.bucket(bucket).get(name)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise FaultError(404, f"No such object: {bucket}/{name}")
        check_conditions(found, query, reads=True)
        return found

    def write(
        self, bucket: str, name: str, data: bytes, members: Mapping[str, Any], digests: Digests | None = None
    ) -> Stored:
        """A new generation. FaultError(404, 413)."""
        objects = self.bucket(bucket)
        held = sum(len(stored.data) for one in self.objects.values() for stored in one.values())
        if held + len(data) > self.limit_bytes:
            raise FaultError(413, "The emulator is full.")
        digests = digests or Digests.of(data)
        self.last_generation += 1
        generation, now = str(self.last_generation), _now()
        place = f"b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"
        told = {key: value for key, value in members.items() if key in WRITABLE and value is not None}
        resource = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "selfLink": f"{self.base_url}/storage/v1/{place}",
            "mediaLink": f"{self.base_url}/download/storage/v1/{place}?generation={generation}&alt=media",
            "name": name,
            "bucket": bucket,
            "generation": generation,
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(data)),
            "md5Hash": digests.md5,
            "crc32c": digests.crc32c,
            "timeCreated": now,
            "timeStorageClassUpdated": now,
            **told,
        }
        stored = objects[name] = Stored(data, resource)
        stored._settle()
        return stored

    def listed(self, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
        """By prefix, delimiter and pages. FaultError(404)."""
        objects, prefix, delimiter = self.bucket(bucket), query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, Stored | None] = {}
        for name in sorted(objects, key=lambda one: one.encode()):
            if not name.startswith(prefix):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entries.setdefault(name if cut < 0 else name[: cut + len(delimiter)], None)
            if cut < 0:
                entries[name] = objects[name]
        names = [name for name in entries if name > query.get("pageToken", "")]
        count = int(query.get("maxResults", 1000))
        page = names[:count]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        if len(names) > count:
            answer["nextPageToken"] = page[-1]
        if prefixes := [name for name in page if entries[name] is None]:
            answer["prefixes"] = prefixes
        if items := [stored.resource for name in page if (stored := entries[name]) is not None]:
            answer["items"] = items
        return answer


def check_conditions(
    found: Stored | None, query: Mapping[str, str], *, reads: bool = False, source: bool = False
) -> None:
    """FaultError(412; 304 for a read whose object is the one that the client knows)."""
    generation = 0 if found is None else found.generation
    metageneration = 0 if found is None else found.metageneration
    for name, value in (("Generation", generation), ("Metageneration", metageneration)):
        prefix = f"if{'Source' if source else ''}{name}"
        if int(query.get(f"{prefix}Match", value)) != value:
            raise FaultError(412, "At least one of the pre-conditions you specified did not hold.")
        if f"{prefix}NotMatch" in query and int(query[f"{prefix}NotMatch"]) == value:
            raise FaultError(304 if reads else 412, "The condition did not hold.")


def content_answer(request: web.Request, stored: Stored, *, quotes: bool) -> web.Response:
    """To a read of content. *quotes*: its ETag is in quotes, as RFC 9110 wants it. FaultError(412, 304)."""
    resource, size = stored.resource, len(stored.data)
    etag = f'"{resource["etag"]}"' if quotes else resource["etag"]
    if not _matches(request.headers.get("If-Match"), etag, missing=True):
        raise FaultError(412, "At least one of the pre-conditions you specified did not hold.")
    if _matches(request.headers.get("If-None-Match"), etag, missing=False):
        raise FaultError(304, "")
    headers: CIMultiDict[str] = CIMultiDict(
        {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Content-Type": resource["contentType"],
            "Last-Modified": formatdate(stored.generation // 1_000_000, usegmt=True),
            "Cache-Control": resource.get("cacheControl", "no-cache, no-store, max-age=0, must-revalidate"),
            "X-Goog-Generation": resource["generation"],
            "X-Goog-Metageneration": resource["metageneration"],
            "X-Goog-Storage-Class": resource["storageClass"],
            "X-Goog-Stored-Content-Encoding": resource.get("contentEncoding", "identity"),
            "X-Goog-Stored-Content-Length": str(size),
            "X-Goog-Hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
        }
    )
    for name, member in (
        ("Content-Disposition", "contentDisposition"),
        ("Content-Language", "contentLanguage"),
    ):
        if member in resource:
            headers[name] = resource[member]
    for name, value in resource.get("metadata", {}).items():
        headers[f"X-Goog-Meta-{name}"] = value
    asked = _RANGE.fullmatch(request.headers.get("Range", ""))
    is_backwards = asked is not None and asked[1] and asked[2] and int(asked[1]) > int(asked[2])
    if asked is None or is_backwards or not (asked[1] or asked[2]):  # RFC 9110 14.1.1: no range, then
        return _sent(request, 200, stored.data, headers)
    start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
    if start >= stop:
        headers["Content-Range"] = f"bytes */{size}"
        text = "The requested range cannot be satisfied."
        headers["Content-Type"] = "text/html; charset=UTF-8"
        return _sent(request, 416, text.encode(), headers)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return _sent(request, 206, stored.data[start:stop], headers)


def _sent(request: web.Request, status: int, body: bytes, headers: CIMultiDict[str]) -> web.Response:
    if request.method == "HEAD":
        headers["Content-Length"] = str(len(body))
        return web.Response(status=status, headers=headers)
    return web.Response(status=status, body=body, headers=headers)


def _matches(field_value: str | None, etag: str, *, missing: bool) -> bool:
    if field_value is None:
        return missing
    tags = [tag.strip().strip('"') for tag in field_value.split(",")]
    return "*" in tags or etag.strip('"') in tags


def selected(value: Any, fields: str) -> Any:
    """The part of *value* that `fields` names. FaultError(400)."""
    tokens = _FIELD.findall(fields)
    if "".join(tokens) != fields.replace(" ", ""):
        raise FaultError(400, "Invalid field selection")
    tree, rest = _tree(tokens)
    if rest:
        raise FaultError(400, "Invalid field selection")
    return _pick(value, tree)


def _tree(tokens: list[str]) -> tuple[dict[str, Any], list[str]]:
    tree: dict[str, Any] = {}
    while tokens and tokens[0] != ")":
        path, tokens = tokens[0].split("/"), tokens[1:]
        inner: dict[str, Any] = {}
        if tokens[:1] == ["("]:
            inner, tokens = _tree(tokens[1:])
            if tokens[:1] != [")"]:
                raise FaultError(400, "Invalid field selection")
            tokens = tokens[1:]
        for name in reversed(path[1:]):
            inner = {name: inner}
        tree.setdefault(path[0], {}).update(inner)
        if tokens[:1] == [","]:
            tokens = tokens[1:]
    return tree, tokens


def _pick(value: Any, tree: Mapping[str, Any]) -> Any:
    if not tree or "*" in tree:
        return value
    if isinstance(value, list):
        return [_pick(item, tree) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _pick(value[name], inner) for name, inner in tree.items() if name in value}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
