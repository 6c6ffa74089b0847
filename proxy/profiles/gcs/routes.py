"""Which operation of Google Cloud Storage's JSON API a request is. Pure.

https://cloud.google.com/storage/docs/json_api/v1

1. An operation is found by method, path and the parameters that choose it. What is not in the table is
   refused: other APIs at the host (XML, batch), and operations nobody has looked at.
2. A parameter or field by which a service might take the request for another operation is refused: one of
   them twice, another method in a field or parameter, older names of the same thing, JSONP.
3. Names are segments of the path, percent-encoded as the API demands: an object's slashes are `%2F`.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

from proxy import refusals
from proxy.messages.message import Fields
from proxy.refusals import RefusedError

JSON_API: Final = "/storage/v1"
_UPLOAD: Final = "/upload/storage/v1"
_DOWNLOAD: Final = "/download/storage/v1"
CONDITIONS: Final = ("if-match", "if-modified-since", "if-none-match", "if-unmodified-since")
"""Of the client's, on what is asked in its place."""
_ESCAPED: Final = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})+")
# Chosen by these, a request is another operation.
_SOLE: Final = frozenset({"alt", "name", "uploadType", "upload_id", "generation", "contentEncoding"})
_CHOOSING: Final = ("generation", "userProject", "key", "quotaUser")
"""Which version of an object is meant, and on whose account it is asked for."""
_REFUSED_PARAMETERS: Final = frozenset({"callback", "upload_protocol"})
# Google's APIs take system parameters with a `$` in front, too; some of them are other methods and fields
# (`$httpMethod`, `$httpHeaders`: requests of browsers that want no preflight).
_HARMLESS_PARAMETERS: Final = frozenset({"$.xgafv", "$fields", "$key", "$prettyprint", "$quotauser"})
_OTHER_METHODS: Final = ("x-http-method-override", "x-http-method", "x-method-override", "x-goog-method")
_OTHER_PROTOCOL: Final = "x-goog-upload-"


class Kind(Enum):
    """What is done; of uploads, by which protocol."""

    MEDIA = "media"  # the body is the object
    RELATED = "multipart"  # multipart/related: metadata, then the object
    START = "resumable"
    SESSION = "session"  # of a resumable upload: a chunk, its status, its end
    CANCEL = "cancel"
    READ = "read"  # content
    OBJECT = "object"  # a read of its metadata
    LIST = "list"
    CHANGE = "change"  # of metadata
    DELETE = "delete"
    COPY = "copy"  # copyTo, moveTo, restore: the answer is an object
    REWRITE = "rewrite"
    SETTINGS = "settings"  # of buckets, access control: no content, no sizes
    OPTIONS = "options"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    kind: Kind
    bucket: str = ""
    """As in the path: percent-encoded."""
    key: str = ""
    """The object's name, likewise; empty where the path has none."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Of the query; of a name that came several times the last value."""


def operation_of(method: str, target: str, fields: Fields) -> Operation:
    """RefusedError(UNKNOWN_ROUTE) for what is none; BAD_MESSAGE for what could be read in two ways."""
    path, _, query = target.partition("?")
    parameters = _parameters(query)
    if any(name in fields for name in _OTHER_METHODS) or any(
        name.startswith(_OTHER_PROTOCOL) for name in fields
    ):
        raise RefusedError(refusals.UNKNOWN_ROUTE)
    if method == "OPTIONS":
        return Operation(kind=Kind.OPTIONS, parameters=parameters)
    for prefix, find in ((_UPLOAD, _upload), (_DOWNLOAD, _download), (JSON_API, _in_api)):
        if path.startswith(f"{prefix}/"):
            found = find(method, _segments(path[len(prefix) + 1 :]), parameters)
            if found is not None:
                return found
    raise RefusedError(refusals.UNKNOWN_ROUTE)


def content_target(bucket: str, name: str, generation: str | None) -> str:
    """Where the content of an object is read, by its names as they are written in JSON."""
    place = (
        f"{JSON_API}/b/{quote(bucket, safe='')}/o/{quote(name, safe='', errors='surrogatepass')}?alt=media"
    )
    return place if generation is None else f"{place}&generation={quote(generation, safe='')}"


def metadata_target(operation: Operation) -> str:
    """Where the custom metadata of the object is read that *operation* changes or copies."""
    generation = "generation" if operation.kind is Kind.CHANGE else "sourceGeneration"
    said = {**operation.parameters, "generation": operation.parameters.get(generation)}
    chosen = [(name, value) for name in _CHOOSING if (value := said.get(name)) is not None]
    query = urlencode([*chosen, ("fields", "metadata")], errors="surrogateescape")
    return f"{JSON_API}/b/{operation.bucket}/o/{operation.key}?{query}"


def session_id(target: str, bucket: str) -> str | None:
    """The id of the resumable upload to *bucket* whose URL has this path and query; None: it is none's."""
    path, _, query = target.partition("?")
    try:
        parameters = _parameters(query)
        segments = _segments(path.removeprefix(f"{_UPLOAD}/"))
    except RefusedError:
        return None
    is_place = path.startswith(f"{_UPLOAD}/") and _is_bucket_place(segments) and segments[1] == bucket
    return (parameters.get("upload_id") or None) if is_place else None


def _parameters(query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True, encoding="utf-8", errors="surrogateescape")
    names = [name for name, _ in pairs]
    folded = [name.lower() for name in names]
    if ";" in query or any(
        folded.count(name.lower()) > names.count(name) or names.count(name) > 1 for name in _SOLE
    ):
        raise RefusedError(refusals.BAD_MESSAGE)  # twice, or in other letters: who knows which one counts
    if not _REFUSED_PARAMETERS.isdisjoint(folded) or any(
        name.startswith("$") and name not in _HARMLESS_PARAMETERS for name in folded
    ):
        raise RefusedError(refusals.UNKNOWN_ROUTE)
    return dict(pairs)


def _segments(path: str) -> list[str]:
    segments = path.split("/")
    for segment in segments:
        name = unquote(segment, errors="surrogateescape")
        if not _ESCAPED.fullmatch(segment) or name in (".", "..") or "\\" in segment:
            raise RefusedError(refusals.UNKNOWN_ROUTE)
    return segments


def _is_bucket_place(segments: list[str]) -> bool:
    return len(segments) == 3 and segments[0] == "b" and segments[2] == "o"


def _upload(method: str, segments: list[str], parameters: dict[str, str]) -> Operation | None:
    if not _is_bucket_place(segments):
        return None
    kind: Kind | None = None
    how = parameters.get("uploadType")
    if "upload_id" in parameters:
        if how in (None, "resumable"):
            # Google's own clients put; some others post.
            kind = {"PUT": Kind.SESSION, "POST": Kind.SESSION, "DELETE": Kind.CANCEL}.get(method)
    elif method == "POST" and how in ("media", "multipart", "resumable"):
        kind = Kind(how)
    return None if kind is None else Operation(kind=kind, bucket=segments[1], parameters=parameters)


def _download(method: str, segments: list[str], parameters: dict[str, str]) -> Operation | None:
    if len(segments) != 4 or (segments[0], segments[2]) != ("b", "o"):
        return None
    if method not in ("GET", "HEAD") or parameters.get("alt") != "media":
        return None
    return Operation(kind=Kind.READ, bucket=segments[1], key=segments[3], parameters=parameters)


def _in_api(method: str, segments: list[str], parameters: dict[str, str]) -> Operation | None:
    kind: Kind | None = None
    is_media = parameters.get("alt", "json") == "media"
    if parameters.get("alt", "json") not in ("json", "media") or "uploadType" in parameters:
        return None
    match segments:
        case ["b", _, "o"]:
            kind = Kind.LIST if method == "GET" else None
        case ["b", _, "o", _] if is_media:
            kind = Kind.READ if method in ("GET", "HEAD") else None
        case ["b", _, "o", _]:
            kind = {
                "GET": Kind.OBJECT,
                "PATCH": Kind.CHANGE,
                "PUT": Kind.CHANGE,
                "DELETE": Kind.DELETE,
            }.get(method)
        case ["b", _, "o", _, "copyTo" | "rewriteTo" as verb, "b", _, "o", _]:
            kind = (Kind.COPY if verb == "copyTo" else Kind.REWRITE) if method == "POST" else None
        case ["b", _, "o", _, "moveTo", "o", _] | ["b", _, "o", _, "restore"]:
            kind = Kind.COPY if method == "POST" else None
        case _ if _is_settings(method, segments):
            kind = Kind.SETTINGS
    if kind is None or (is_media and kind is not Kind.READ):
        return None
    bucket = segments[1] if len(segments) > 1 else ""
    key = segments[3] if len(segments) > 3 and segments[2] == "o" else ""
    return Operation(kind=kind, bucket=bucket, key=key, parameters=parameters)


def _is_settings(method: str, segments: list[str]) -> bool:
    match segments:
        case ["b"]:
            methods = {"GET", "POST"}
        case ["b", _]:
            methods = {"GET", "PATCH", "PUT", "DELETE"}
        case ["b", _, "iam"]:
            methods = {"GET", "PUT"}
        case (
            ["b", _, "iam", "testPermissions"] | ["b", _, "storageLayout"] | ["projects", _, "serviceAccount"]
        ):
            methods = {"GET"}
        case ["b", _, "lockRetentionPolicy"]:
            methods = {"POST"}
        case ["b", _, "acl" | "defaultObjectAcl"] | ["b", _, "o", _, "acl"]:
            methods = {"GET", "POST"}
        case ["b", _, "acl" | "defaultObjectAcl", _] | ["b", _, "o", _, "acl", _]:
            methods = {"GET", "PUT", "PATCH", "DELETE"}
        case _:
            return False
    return method in methods
