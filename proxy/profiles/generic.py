"""The generic object profile: one URL, one object. PUT and POST are sealed, GET is opened.

1. Fits stores that keep a body as it is and give it back at the same URL: WebDAV shares, artefact stores,
   blobs behind a gateway. Whatever else a service offers is refused, so that nothing leaves in the clear.
2. An empty PUT is an empty object (104 stored bytes). An empty POST is a command, and stays without a body.
3. Objects are bound to no name: a service that renames or copies them itself does not damage them.
"""

from typing import ClassVar, override

from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import BodyFrame, Framing, byte_range, request_digests
from proxy.plans.plan import EmptyBody, Forward, HeadSize, Open, OpenRange, Refuse, RequestPlan, Seal
from proxy.plans.request import Request
from proxy.profiles.profile import Limitation, Profile

_BODILESS = frozenset({"DELETE", "MKCOL", "OPTIONS"})
_RANGES = ("if-range", "range")
# Sizes of the plaintext beside the body; some servers believe them more than the framing.
_SIZES = ("oc-total-length", "x-expected-entity-length")
# The body is a part of something that the service puts together, or is put in somewhere.
_PARTS = frozenset(
    {
        "content-range",
        "oc-chunked",
        "upload-offset",
        "x-amz-write-offset-bytes",
        "x-goog-upload-offset",
        "x-ms-blob-condition-appendpos",
        "x-ms-page-write",
        "x-ms-range",
        "x-update-range",
    }
)


class GenericProfile(Profile):
    name: ClassVar[str] = "generic"
    summary: ClassVar[str] = "one URL, one object: uploads are sealed, downloads are opened"
    encrypts: ClassVar[str] = "every uploaded body, as one object"
    sizes: ClassVar[str] = "Content-Length by arithmetic, in GET, HEAD and ranges; lists are not rewritten"
    validators: ClassVar[str] = "ETag, Last-Modified and conditions pass unchanged: they name stored versions"
    digests: ClassVar[str] = "those of a request are checked against the plaintext, none is passed on"
    operations: ClassVar[tuple[tuple[str, str], ...]] = (
        ("PUT, POST", "the body is sealed; digests in the request are checked and dropped"),
        ("GET", "the body is opened; one range is served by range, several as the whole object"),
        ("HEAD", "Content-Length is the plaintext's"),
        ("DELETE, OPTIONS, MKCOL", "pass, without a body"),
        ("PUT with Content-Range or OC-Chunked, PATCH", "refused: partial-write"),
        ("COPY, MOVE, PROPFIND, LOCK, all others", "refused: unknown-route"),
    )
    limitations: ClassVar[tuple[Limitation, ...]] = (
        Limitation(
            what="Search, preview, thumbnails, conversion, virus scan at the service",
            why="the service holds ciphertext only",
        ),
        Limitation(
            what="Web pages, listings and API answers of the service (GET of what was never uploaded here)",
            why="a successful GET must be a sealed object; anything else is answered 409 not-sealed",
        ),
        Limitation(
            what="Sizes in the service's own lists, quotas and bills",
            why="they are stored sizes: 88 bytes and 16 per 16 KiB more than the content",
        ),
        Limitation(
            what="Checksums the service computes or compares",
            why="they are of ciphertext: request digests are checked here and dropped, answers' are dropped",
        ),
        Limitation(
            what="Forms (multipart/form-data), JSON with embedded files, multi-part and resumable uploads",
            why="a body is sealed as a whole, so the service cannot read its structure",
        ),
        Limitation(
            what="Writing a part of an object, appending",
            why="an object is sealed under one salt and cannot be changed in place",
        ),
        Limitation(
            what="Several ranges in one request",
            why="they are answered by the whole object (200), as RFC 9110 14.2 allows",
        ),
        Limitation(
            what="WebSockets and other upgrades, request trailers",
            why="content could leave in the clear beside the sealed body",
        ),
        Limitation(
            what="Detecting that the service brought back an older version of an object",
            why="an older version was sealed just as well",
        ),
    )

    @override
    def plan(self, request: Request) -> RequestPlan:
        frame, edits = request.frame, request.edits
        match request.head.method:
            case "PUT" | "POST":
                return self._upload(request)
            case "GET":
                return self._read(request)
            case "HEAD" if not frame.is_declared:
                return HeadSize(edits=edits.also(drop=_RANGES), body_may_come=_may_come(frame))
            case method if method in _BODILESS and not frame.is_declared:
                return Forward(edits=edits.also(drop=_RANGES), body_may_come=_may_come(frame))
            case "PATCH":
                return Refuse(refusal=refusals.PARTIAL_WRITE)
            case _:
                return Refuse(refusal=refusals.UNKNOWN_ROUTE)

    def _upload(self, request: Request) -> RequestPlan:
        head, frame, edits = request.head, request.frame, request.edits
        if not _PARTS.isdisjoint(head.fields):
            return Refuse(refusal=refusals.PARTIAL_WRITE)
        digests = request_digests(head.fields)
        edits = edits.also(drop=(*_RANGES, *_SIZES))
        empty = EmptyBody.SEAL if head.method == "PUT" else EmptyBody.KEEP
        plain_bytes = 0 if frame.framing is Framing.NONE else frame.length_bytes
        if plain_bytes == 0 and empty is EmptyBody.KEEP:
            return Forward(edits=edits.also(put=(("content-length", "0"),)))
        if plain_bytes is not None:
            edits = edits.also(put=(("content-length", str(sealed_length(plain_bytes))),))
        return Seal(edits=edits, plain_bytes=plain_bytes, empty=empty, digests=digests)

    def _read(self, request: Request) -> RequestPlan:
        head, frame, edits = request.head, request.frame, request.edits
        if frame.is_declared:
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        edits = edits.also(drop=_RANGES)
        wanted = byte_range(head.fields)
        if wanted is None:
            return Open(edits=edits, body_may_come=_may_come(frame))
        return OpenRange(
            edits=edits,
            wanted=wanted,
            if_range=head.fields.first("if-range"),
            body_may_come=_may_come(frame),
        )


def _may_come(frame: BodyFrame) -> bool:
    return frame.framing is Framing.STREAM
