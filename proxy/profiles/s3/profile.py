"""The s3 profile: what becomes of each operation of S3's API (docs/profiles-s3.md).

1. In this order: who asks (authentication.py), for what (routes.py), and what becomes of it. Whoever has not
   signed as the vault knows learns nothing more, and nothing was sent.
2. Content is sealed and opened. Documents of the protocol are read within a limit and passed on. What is not
   in the table of operations is refused.
3. Every request that leaves is signed anew, or is as its client has signed it (signing.py).
4. ETags are mapped in every place (etags.py), digests of ciphertext are in none.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Final, override
from urllib.parse import urlsplit

from envelope.objects import sealed_length
from proxy import refusals
from proxy.asking import Signer, host_field
from proxy.messages.message import AnswerHead, BodyFrame, Framing, RequestHead, byte_range, digest_fields
from proxy.messages.ranges import RangeRefusal
from proxy.plans.answer_plan import AnswerPlan, MapBody, Pass
from proxy.plans.conversing import Conversation
from proxy.plans.plan import (
    Converse,
    Decision,
    EmptyBody,
    Forward,
    Going,
    HeadSize,
    Open,
    OpenRange,
    Proceed,
    Refuse,
    RequestPlan,
    Seal,
)
from proxy.plans.profile_options import ProfileOptions
from proxy.plans.request import Edits, Mode, Request
from proxy.profiles.profile import Limitation, Profile
from proxy.profiles.s3 import (
    copying,
    documents,
    errors,
    etags,
    listing,
    part_reading,
    post_form,
    trailed,
    uploading,
)
from proxy.profiles.s3.addressing import (
    Address,
    address_of,
    is_of_hosts,
    is_of_listener,
    names_twice,
    parameters,
)
from proxy.profiles.s3.authentication import Authenticated, Standing, admit, authenticate
from proxy.profiles.s3.bodies import CODING, GONE, Incoming, read_document, read_head, without_coding
from proxy.profiles.s3.call import Call
from proxy.profiles.s3.hoisted import gone_of, hoisted
from proxy.profiles.s3.multipart import PartRules
from proxy.profiles.s3.options import MetadataDigests, S3Options, options_of
from proxy.profiles.s3.routes import Kind, find_operation
from proxy.profiles.s3.signing import Resigner, Unchanged
from proxy.refusals import Refusal, Shaped
from runtime.clock import Clock, SystemClock

MAX_DOCUMENT_BYTES: Final = 3 * 1024 * 1024
"""Of a document that a client sends: a DeleteObjects names 1,000 keys of up to 1,024 characters."""
_CONDITIONS: Final = (
    "if-match",
    "if-none-match",
    "if-range",
    "x-amz-copy-source-if-match",
    "x-amz-copy-source-if-none-match",
)
_RANGES: Final = ("if-range", "range")
_META: Final = "x-amz-meta-"

type _Planner = Callable[[Call], RequestPlan]

_ELSEWHERE: Final[dict[Kind, _Planner]] = {
    Kind.COPY: copying.plan_copy,
    Kind.COPY_PART: copying.plan_part_copy,
    Kind.CREATE_UPLOAD: uploading.plan_create,
    Kind.WRITE_PART: uploading.plan_part,
    Kind.COMPLETE_UPLOAD: uploading.plan_complete,
    Kind.ABORT_UPLOAD: uploading.plan_abort,
    Kind.LIST_PARTS: uploading.plan_list_parts,
    Kind.FORM: post_form.plan_form,
    Kind.READ: part_reading.plan_read_part,
    Kind.HEAD: part_reading.plan_read_part,
}
_CONTENT: Final = frozenset({Kind.WRITE, Kind.WRITE_PART})
_DOCUMENTS: Final = frozenset({Kind.DOCUMENT, Kind.COMPLETE_UPLOAD, Kind.FORM})


class S3Profile(Profile):
    name: ClassVar[str] = "s3"
    summary: ClassVar[str] = "Amazon S3's REST API, and services that speak it"
    encrypts: ClassVar[str] = (
        "objects, parts of multipart uploads and files in POST forms; not keys and metadata"
    )
    sizes: ClassVar[str] = (
        "by arithmetic, in headers and lists; of objects in parts (ETag `-N`) by their manifest, cached"
    )
    validators: ClassVar[str] = "ETag `hex` is shown as `hex-1`, reversibly, in every place; dates pass"
    digests: ClassVar[str] = (
        "Content-MD5, x-amz-content-sha256, x-amz-checksum-* (headers, trailers, query) are verified over"
        " plaintext and dropped; answers have none"
    )
    operations: ClassVar[tuple[tuple[str, str], ...]] = (
        ("PutObject", "verified, decoded (aws-chunked), sealed, signed anew"),
        ("GetObject", "opened; one range is served by range, several as the whole object; partNumber too"),
        ("HeadObject", "size and ETag as GET shows them"),
        ("CopyObject", "the service copies ciphertext; objects in parts are copied in parts"),
        ("CreateMultipartUpload, UploadPart, UploadPartCopy", "each part is sealed by itself"),
        (
            "CompleteMultipartUpload",
            "a manifest is added; it makes the parts one object; checksums of the whole are compared",
        ),
        ("AbortMultipartUpload, ListParts", "pass, the manifest hidden, sizes and ETags mapped"),
        ("ListObjects, ListObjectsV2, ListObjectVersions", "sizes and ETags mapped as the list streams"),
        ("GetObjectAttributes", "sizes and ETag mapped, checksums dropped"),
        ("PostObject", "the file of the form is sealed, its policy judged and signed anew"),
        ("DeleteObject, DeleteObjects", "pass"),
        ("Tagging, ACL, retention, legal hold, restore", "pass"),
        ("Buckets and their settings", "pass"),
        ("SelectObjectContent, GetObjectTorrent, appends, Object Lambda", "refused: unknown-route"),
        ("all others", "refused: unknown-route"),
    )
    limitations: ClassVar[tuple[Limitation, ...]] = (
        Limitation(
            what="S3 Select, Object Lambda, torrents, inventories, replication to readers without the keys",
            why="the service holds ciphertext only",
        ),
        Limitation(
            what="An ETag as the MD5 of an object, x-amz-checksum-* in answers",
            why="the service's are of ciphertext; `hex-1` is what clients do not compare",
        ),
        Limitation(
            what="Access keys that the vault does not have, where a signed header or body has to be changed",
            why="the request could not be signed anew: refused, cannot-sign-anew",
        ),
        Limitation(
            what="SigV2, SigV4A, clients' session tokens",
            why="they cannot be verified with a secret of the vault",
        ),
        Limitation(
            what="Digests in client metadata (x-amz-meta-md5chksum), unless the option keeps them",
            why="in the clear they confirm what an object holds",
        ),
        Limitation(
            what="Several ranges in one request",
            why="they are answered by the whole object (200), as S3 does",
        ),
        Limitation(
            what="Appending, writing at an offset, renaming by RenameObject",
            why="an object is sealed under one salt and cannot be changed in place",
        ),
        Limitation(
            what="Detecting that the service brought back an older version of an object",
            why="an older version was sealed just as well",
        ),
    )
    options: ClassVar[type[ProfileOptions]] = S3Options
    makes_composites: ClassVar[bool] = True

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()

    @override
    def plan(self, request: Request) -> RequestPlan:
        head, frame, options = request.head, request.frame, options_of(request)
        if not _is_known(request, options):
            return Refuse(refusal=refusals.UNKNOWN_HOST)
        address = address_of(head.target, head.host, _hosts(request, options))
        if head.method == "OPTIONS":
            nobody = Authenticated(standing=Standing.ANONYMOUS)
            return _preflight(request, self._signer(request, nobody, address, options))
        authenticated = authenticate(head, request.service.credentials, now_s=request.now_s)
        if not address.virtual_host and "%2f" in address.bucket.lower():
            return Refuse(
                refusal=refusals.BAD_MESSAGE
            )  # some services take what follows for an object's name
        if _drops_what_is_signed(head, authenticated) or names_twice(head.target):
            return Refuse(refusal=refusals.BAD_MESSAGE)
        given = parameters(head.target)
        operation = find_operation(head.method, address.level, given, frozenset(head.fields))
        if operation is None or operation.kind is not Kind.FORM:
            admit(authenticated.standing, options)  # who sends a form has signed the form
        if operation is None or operation.kind is Kind.REFUSE:
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        if frame.is_declared and operation.kind not in _CONTENT | _DOCUMENTS:
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        gone = _gone(given, operation.kind, authenticated, options)
        sign = self._signer(request, authenticated, address, options, gone)
        edits = _with_conditions(request.edits, head)
        if options.metadata_digests is MetadataDigests.KEEP:
            edits = _with_metadata(edits, head)
        if authenticated.standing is Standing.UNJUDGED and operation.kind not in _CONTENT:
            edits = _with_digests(edits, head)
        match operation.kind:
            case Kind.FORWARD:
                return Forward(edits=edits, sign=sign, body_may_come=_may_come(frame))
            case Kind.LIST:
                memo = listing.Listing(operation=operation, bucket=address, parameters=given)
                return Forward(edits=edits, sign=sign, memo=memo, body_may_come=_may_come(frame))
            case Kind.READ if "partNumber" not in given:
                return _read(head, frame, edits, sign)
            case Kind.HEAD if "partNumber" not in given:
                return HeadSize(edits=edits.also(drop=_RANGES), sign=sign, body_may_come=_may_come(frame))
            case Kind.DOCUMENT:
                return _document(request, authenticated, operation.name, edits, sign)
            case Kind.WRITE:
                incoming = read_head(replace(request, edits=edits), authenticated)
                always = options.trailing_checksums
                if isinstance(sign, Resigner) and trailed.is_wanted(head.fields, always=always):
                    plan = trailed.plan_trailed(incoming, head.fields, incoming.edits.also(drop=_RANGES))
                    return replace(plan, sign=replace(sign, payload=trailed.PAYLOAD))
                return _write(incoming, sign)
        call = Call(
            request=request,
            operation=operation,
            address=address,
            parameters=given,
            edits=edits.also(drop=GONE),
            sign=sign,
            rules=PartRules(min_part_bytes=options.min_part_bytes, max_parts=options.max_parts),
            read=lambda body: read_document(
                authenticated,
                head.fields,
                body,
                has_checksums=operation.kind is not Kind.COMPLETE_UPLOAD,
            ),
        )
        if operation.kind in _CONTENT:
            incoming = read_head(replace(request, edits=edits), authenticated)
            call = replace(call, edits=incoming.edits, content=incoming.content)
        planner = _ELSEWHERE.get(operation.kind)
        return planner(call) if planner is not None else Refuse(refusal=refusals.UNKNOWN_ROUTE)

    def _signer(
        self,
        request: Request,
        authenticated: Authenticated,
        address: Address,
        options: S3Options,
        gone: frozenset[str] = frozenset(),
    ) -> Signer:
        host = host_field(request.service)
        if authenticated.standing is Standing.VERIFIED:
            return Resigner(
                authenticated=authenticated,
                address=address,
                host=host,
                region=options.region,
                wall_s=self._clock.wall_s,
                gone=gone,
            )
        return Unchanged(
            authenticated=authenticated, head=request.head, address=address, host=host, gone=gone
        )

    @override
    def plan_answer(
        self, request: Request, plan: Going, answer: AnswerHead, proposed: AnswerPlan
    ) -> AnswerPlan:
        if _leads_elsewhere(answer, request):
            return Refuse(refusal=refusals.ANSWER_REFUSED)
        if isinstance(proposed, Refuse):
            return _folder_marker(request, plan, answer) or proposed
        match plan.memo:
            case listing.Listing() as listed if isinstance(proposed, Pass) and answer.status == 200:
                proposed = replace(proposed, body=MapBody(make=lambda talk: listing.mapper(listed, talk)))
            case uploading.Completed() as completed:
                proposed = uploading.plan_completed(completed, request, answer, proposed)
            case copying.Copied():
                proposed = copying.plan_copied(request, answer, proposed)
            case part_reading.ReadPart() as part:
                proposed = part_reading.plan_part_read(part, proposed)
            case post_form.Posted():
                proposed = post_form.plan_posted(request, answer, proposed)
        if isinstance(proposed, Refuse):
            return proposed
        return replace(proposed, edits=_answer_edits(proposed.edits, answer, options_of(request)))

    @override
    def may_be_composite(self, request: Request, answer: AnswerHead) -> bool:
        return etags.is_of_parts(answer.fields.sole("etag") or "")

    @override
    def shape(self, refusal: Refusal, head: RequestHead) -> Shaped:
        return Shaped(content_type=errors.CONTENT_TYPE, body=errors.error_document(refusal, head))


# ---- who


def _is_known(request: Request, options: S3Options) -> bool:
    """Whether the host that the client names, and has signed, is one of this service here.

    Forward mode has compared it already (routing.py).
    """
    host = request.head.host
    if request.route.mode is Mode.FORWARD or is_of_hosts(host, _hosts(request, options)):
        return True
    listen = request.service.reverse_listen
    return listen is not None and is_of_listener(host, listen.host)


def _hosts(request: Request, options: S3Options) -> list[str]:
    """Names before which a bucket may stand."""
    own = request.service.upstream.host
    if request.route.mode is Mode.FORWARD:
        return [own] if options.virtual_hosts else []
    return [*options.hosts, *request.service.reverse_names, own]


def _gone(
    given: Mapping[str, str], kind: Kind, authenticated: Authenticated, options: S3Options
) -> frozenset[str]:
    """Parameters that do not go up (hoisted.py). RefusedError."""
    keeps = options.metadata_digests is MetadataDigests.KEEP
    gone = gone_of(hoisted(given), kind, keeps_metadata=keeps)
    if authenticated.standing is Standing.UNJUDGED and kind not in _CONTENT:
        return frozenset()  # it may be signed, and there is no content that it could tell of
    return gone


# ---- requests


def _preflight(request: Request, sign: Signer) -> RequestPlan:
    """CORS: browsers do not sign it."""
    if request.frame.is_declared:
        return Refuse(refusal=refusals.UNKNOWN_ROUTE)
    return Forward(edits=request.edits, sign=sign, body_may_come=_may_come(request.frame))


def _read(head: RequestHead, frame: BodyFrame, edits: Edits, sign: Signer) -> RequestPlan:
    edits = edits.also(drop=_RANGES)
    wanted = byte_range(head.fields)
    if wanted is None:
        return Open(edits=edits, sign=sign, body_may_come=_may_come(frame))
    if_range = head.fields.first("if-range")
    return OpenRange(
        edits=edits,
        sign=sign,
        wanted=wanted,
        if_range=None if if_range is None else etags.to_service(if_range),
        body_may_come=_may_come(frame),
    )


def _write(incoming: Incoming, sign: Signer) -> RequestPlan:
    length = sealed_length(incoming.content.plain_bytes or 0)
    return Seal(
        edits=incoming.edits.also(drop=_RANGES, put=(("content-length", str(length)),)),
        sign=sign,
        plain_bytes=incoming.content.plain_bytes,
        empty=EmptyBody.SEAL,
        decoder=incoming.content.decoder,
    )


def _drops_what_is_signed(head: RequestHead, authenticated: Authenticated) -> bool:
    """Whether Connection, which nobody signs, takes away what a signature or this profile counts on."""
    nominated = head.fields.tokens("connection")
    return any(name.startswith("x-amz-") or name in authenticated.signed_headers for name in nominated)


def _document(
    request: Request, authenticated: Authenticated, operation: str, edits: Edits, sign: Signer
) -> RequestPlan:
    fields = request.head.fields
    if authenticated.standing is Standing.VERIFIED:
        edits = edits.also(drop={*GONE, *digest_fields(fields)})
        if CODING in fields.tokens("content-encoding"):
            edits = without_coding(edits, fields)
    else:
        edits = _with_digests(edits, request.head)  # it goes on as it was signed

    async def check(talk: Conversation) -> Decision:
        if authenticated.standing is not Standing.VERIFIED:
            documents.check_request(operation, talk.body)
            unchanged = replace(sign, same_body=True) if isinstance(sign, Unchanged) else sign
            return Proceed(plan=Forward(edits=edits, sign=unchanged), body=talk.body)
        body = read_document(authenticated, fields, talk.body)
        documents.check_request(operation, body)
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        put = (("content-md5", md5),) if body else ()
        return Proceed(plan=Forward(edits=edits.also(put=put), sign=sign), body=body)

    return Converse(edits=edits, sign=sign, handler=check, limit_bytes=MAX_DOCUMENT_BYTES)


def _with_conditions(edits: Edits, head: RequestHead) -> Edits:
    """Conditions name ETags as clients are shown them; the service knows others."""
    return edits.also(
        put=[
            (name, etags.to_service(", ".join(head.fields.all(name))))
            for name in _CONDITIONS
            if name in head.fields
        ]
    )


def _with_metadata(edits: Edits, head: RequestHead) -> Edits:
    """Client metadata, though its name says that it is a digest."""
    names = [name for name in edits.drop if name.startswith(_META) and name in head.fields]
    return edits.also(put=[(name, ", ".join(head.fields.all(name))) for name in names])


def _with_digests(edits: Edits, head: RequestHead) -> Edits:
    """What speaks of digests stays: it may be signed, and there is no content that it could tell of."""
    names = digest_fields(head.fields)
    return edits.also(put=[(name, value) for name in sorted(names) for value in head.fields.all(name)])


def _may_come(frame: BodyFrame) -> bool:
    return frame.framing is Framing.STREAM


# ---- answers


def _answer_edits(edits: Edits, answer: AnswerHead, options: S3Options) -> Edits:
    put = list(edits.put)
    drop = {name for name in answer.fields if name.startswith("x-amz-checksum-")}
    if (etag := answer.fields.sole("etag")) is not None:
        put.append(("etag", etags.to_client(etag)))
    metadata = {name for name in answer.fields if name.startswith(_META)}
    if options.metadata_digests is MetadataDigests.KEEP:
        kept = frozenset(metadata)
    else:
        kept = frozenset(metadata - digest_fields(answer.fields))
    return Edits(drop=frozenset((edits.drop | drop) - kept), put=tuple(put))


def _leads_elsewhere(answer: AnswerHead, request: Request) -> bool:
    """Whether a client that follows this answer would leave us: for ciphertext, or with plaintext."""
    if not 300 <= answer.status < 400 or answer.status == 304:
        return False
    upstream = request.service.upstream
    for reference in answer.fields.all("location"):
        try:
            url = urlsplit(reference)
            host = url.hostname
        except ValueError:
            return True
        if reference.startswith(("//", "\\", "/\\")) or (url.scheme and url.scheme != upstream.scheme):
            return True
        if host is not None and host != upstream.host and not host.endswith("." + upstream.host):
            return True
    return False


def _folder_marker(request: Request, plan: Going, answer: AnswerHead) -> AnswerPlan | None:
    """An empty object whose key ends with a slash: consoles make them, and there is nothing to open in it.

    What it says of itself (metadata, type) passes as for any other object. But a service that lies can show a
    sealed object of such a name as an empty one: the option `folder_markers` ends that.
    """
    if not options_of(request).folder_markers:
        return None
    is_read = isinstance(plan, Open | OpenRange | HeadSize)
    is_marker = request.head.target.partition("?")[0].endswith("/")
    if not (is_read and is_marker and 200 <= answer.status < 300):
        return None
    if answer.fields.sole("content-length") != "0":
        return None
    if isinstance(plan, OpenRange) and plan.if_range is None:
        return Refuse(refusal=RangeRefusal.of(0))  # as S3 has it
    edits = Edits(drop=digest_fields(answer.fields).union({"alt-svc", "sealgate-error", "trailer"}))
    return Pass(edits=_answer_edits(edits, answer, options_of(request)))
