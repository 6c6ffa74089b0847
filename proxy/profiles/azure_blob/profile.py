"""The azure-blob profile: what becomes of each operation of the Blob service's REST API.

1. In this order: what is asked for (addressing.py), who asks (authentication.py), and what becomes of it
   (routes.py). What is not in the table of operations is refused, and nothing was sent.
2. Content is sealed and opened. Documents of the protocol are read within a limit and passed on.
3. Every request that leaves is signed anew, or is as its client has signed it, or shows a token.
4. ETags are opaque and stay. Digests of ciphertext are in no answer, digests of plaintext at no service.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Final, override

from envelope.objects import sealed_length
from proxy import refusals
from proxy.asking import Signer, host_field
from proxy.messages.message import AnswerHead, BodyFrame, Framing, RequestHead, byte_range_of, digest_fields
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
from proxy.plans.request import Edits, Request
from proxy.profiles.azure_blob import copying, errors, listing, properties, uploading
from proxy.profiles.azure_blob.addressing import Place, Target, read_target
from proxy.profiles.azure_blob.authentication import (
    AsItCame,
    Authenticated,
    Resigner,
    Standing,
    Unchanged,
    authenticate,
    drops_what_is_signed,
)
from proxy.profiles.azure_blob.block_names import marked_size
from proxy.profiles.azure_blob.bodies import CHECKSUM_FIELDS, Checksums, plain_length_of
from proxy.profiles.azure_blob.call import Call
from proxy.profiles.azure_blob.options import Anonymous, AzureBlobOptions, UnknownKeys
from proxy.profiles.azure_blob.routes import Kind, find_operation, is_block_blob
from proxy.profiles.profile import Limitation, Profile
from proxy.profiles.xml_rewriting import XmlError, document_root
from proxy.refusals import Refusal, RefusedError, Shaped
from runtime.clock import Clock, SystemClock

MAX_DOCUMENT_BYTES: Final = 128 * 1024
"""Of a document that a client sends: settings, tags, signed identifiers."""
_RANGES: Final = ("if-range", "range", "x-ms-range")
# Of the answer's own bytes, which are not what the service would compute them of.
_WANTED: Final = ("x-ms-range-get-content-crc64", "x-ms-range-get-content-md5")
_STORED_DIGESTS: Final = ("x-ms-blob-content-md5",)
_CONTENT: Final = frozenset({Kind.WRITE, Kind.BLOCK, Kind.COMMIT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The memo of an upload on its way: the checksums that its client has named, and that were verified."""

    named: tuple[tuple[str, str], ...]


class AzureBlobProfile(Profile):
    name: ClassVar[str] = "azure-blob"
    summary: ClassVar[str] = "Azure Blob Storage's REST API: block blobs, whole or in blocks"
    encrypts: ClassVar[str] = "block blobs and their blocks; not names, metadata and tags"
    sizes: ClassVar[str] = "by arithmetic; of blobs in blocks by their manifest, cached, in lists by a mark"
    validators: ClassVar[str] = "ETags and dates pass: they are the service's own, and no digests"
    digests: ClassVar[str] = (
        "Content-MD5 and x-ms-content-crc64 of uploads are verified over plaintext and dropped, with"
        " x-ms-blob-content-md5; answers have none of stored bytes"
    )
    operations: ClassVar[tuple[tuple[str, str], ...]] = (
        ("Put Blob", "a block blob is verified, sealed, signed anew"),
        ("Put Block", "each block is sealed by itself, under a name of its own"),
        ("Put Block List", "a manifest is added; it makes the blocks one blob, in the list's order"),
        ("Get Block List", "names and sizes as the client knows them, the manifest hidden"),
        ("Get Blob", "opened; one range (Range, x-ms-range) is served by range"),
        ("Get Blob Properties", "size as GET shows it"),
        ("Set Blob Properties", "pass, the MD5 kept for us"),
        ("List Blobs", "sizes mapped and digests dropped as the list streams"),
        ("Copy Blob", "within the account: the service copies ciphertext"),
        ("Delete, undelete, snapshot, lease, tier, expiry, legal hold, immutability", "pass"),
        ("Metadata, tags, find by tags", "pass, in the clear"),
        ("Containers, service settings, account information, delegation keys", "pass"),
        ("Page blobs, append blobs", "refused: unknown-route"),
        ("Put from URL, batches, queries, structured bodies", "refused: unknown-route"),
        ("all others", "refused: unknown-route"),
    )
    limitations: ClassVar[tuple[Limitation, ...]] = (
        Limitation(
            what="Page blobs and append blobs",
            why="they are written in place; a sealed object is sealed under one salt and cannot be changed",
        ),
        Limitation(
            what="Put Blob, Put Block and Append Block From URL, copies from other accounts",
            why="the service would fetch what nobody has sealed",
        ),
        Limitation(
            what="Blob batches (delete_blobs of SDKs), Query Blob Contents, indexing, replication to readers"
            " without the keys",
            why="requests lie inside of a body, or the service would have to read the content",
        ),
        Limitation(
            what="Content-MD5 and CRC-64 in answers to reads and lists, structured bodies (CRC-64 of SDKs)",
            why="the service's are of ciphertext, and those of plaintext would confirm what a blob holds",
        ),
        Limitation(
            what="Account keys that the vault does not have, where something signed has to be changed",
            why="the request could not be signed anew: refused, cannot-sign-anew. Tokens always work",
        ),
        Limitation(
            what="Block 50,000 of a blob, blocks of exactly 4,000 MiB",
            why="the manifest is a block, and sealed blocks are longer by 0.1 %",
        ),
        Limitation(
            what="New blocks behind those of a blob that was copied",
            why="blocks are bound to the blob for which they were sent: refused, blocks-of-a-copy",
        ),
        Limitation(
            what="Detecting that the service brought back an older version of a blob",
            why="an older version was sealed just as well",
        ),
    )
    options: ClassVar[type[ProfileOptions]] = AzureBlobOptions
    makes_composites: ClassVar[bool] = True

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()

    # ---- requests

    @override
    def plan(self, request: Request) -> RequestPlan:
        head, frame, options = request.head, request.frame, _options(request)
        if head.method == "OPTIONS":
            return _preflight(request)
        target = read_target(head.target, account_in_path=options.account_in_path)
        authenticated = authenticate(head, target, request.service.credentials, now_s=request.now_s)
        _admit(authenticated, options)
        if drops_what_is_signed(head):
            return Refuse(refusal=refusals.BAD_MESSAGE)
        operation = find_operation(head.method, target, frozenset(head.fields))
        if operation is None:
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        kind = operation.kind
        if frame.is_declared and kind not in _CONTENT and kind is not Kind.DOCUMENT:
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        sign = self._signer(request, authenticated)
        call = Call(
            request=request, operation=operation, target=target, edits=_edits(request, target), sign=sign
        )
        return _PLANNERS[kind](call)

    def _signer(self, request: Request, authenticated: Authenticated) -> Signer:
        host = host_field(request.service)
        match authenticated.standing:
            case Standing.VERIFIED:
                return Resigner(
                    account=authenticated.account,
                    key=authenticated.upstream_key,
                    host=host,
                    wall_s=self._clock.wall_s,
                )
            case Standing.UNJUDGED:
                return Unchanged(account=authenticated.account, head=request.head, host=host)
        return AsItCame(host=host)

    # ---- answers

    @override
    def plan_answer(
        self, request: Request, plan: Going, answer: AnswerHead, proposed: AnswerPlan
    ) -> AnswerPlan:
        if _options(request).directories and (directory := _directory(plan, answer)) is not None:
            return directory
        if isinstance(proposed, Refuse):
            return proposed
        put = list(proposed.edits.put)
        drop = proposed.edits.drop | digest_fields(answer.fields)
        match plan.memo:
            case listing.Listing() as listed if isinstance(proposed, Pass) and answer.status == 200:
                proposed = replace(proposed, body=MapBody(make=lambda talk: listing.mapper(listed, talk)))
            case Written() as written if 200 <= answer.status < 300:
                put += written.named
        source = answer.fields.sole(copying.FIELD)
        if source is not None and (ours := copying.source_at_client(request, source)) is not None:
            put.append((copying.FIELD, ours))
        edits = Edits(drop=drop, put=tuple(put), lists=proposed.edits.lists)
        return replace(proposed, edits=edits)

    @override
    def may_be_composite(self, request: Request, answer: AnswerHead) -> bool:
        """The service keeps an MD5 of what was put at once, and none of its own of what was put in blocks."""
        md5 = answer.fields.sole("content-md5")
        return md5 is None or marked_size(md5) is not None

    @override
    def shape(self, refusal: Refusal, head: RequestHead) -> Shaped:
        return errors.shaped(refusal)


# ---- who


def _options(request: Request) -> AzureBlobOptions:
    options = request.options
    return options if isinstance(options, AzureBlobOptions) else AzureBlobOptions()


def _admit(authenticated: Authenticated, options: AzureBlobOptions) -> None:
    """RefusedError for whom the service's options keep out."""
    match authenticated.standing:
        case Standing.UNJUDGED if options.unknown_keys is UnknownKeys.REFUSE:
            raise RefusedError(refusals.ACCESS_KEY_UNKNOWN)
        case Standing.ANONYMOUS if options.anonymous is Anonymous.REFUSE:
            raise RefusedError(refusals.ANONYMOUS)


# ---- requests


def _preflight(request: Request) -> RequestPlan:
    """CORS: browsers do not sign it."""
    if request.frame.is_declared:
        return Refuse(refusal=refusals.UNKNOWN_ROUTE)
    sign = AsItCame(host=host_field(request.service))
    return Forward(edits=request.edits, sign=sign, body_may_come=_may_come(request.frame))


def _edits(request: Request, target: Target) -> Edits:
    """Of every request; what is said of digests of a document stays, for the document does."""
    edits = request.edits
    if target.place is Place.BLOB:
        edits = edits.also(drop=(*_WANTED, *_STORED_DIGESTS))
    return edits


def _forward(call: Call) -> RequestPlan:
    return Forward(edits=call.edits, sign=call.sign, body_may_come=_may_come(call.request.frame))


def _list(call: Call) -> RequestPlan:
    memo = listing.Listing(target=call.target)
    return Forward(edits=call.edits, sign=call.sign, memo=memo, body_may_come=_may_come(call.request.frame))


def _read(call: Call) -> RequestPlan:
    edits, frame = call.edits.also(drop=_RANGES), call.request.frame
    # Azure's own field outweighs the other one.
    wanted = byte_range_of(call.fields.sole("x-ms-range") or call.fields.sole("range"))
    if wanted is None:
        return Open(edits=edits, sign=call.sign, body_may_come=_may_come(frame))
    return OpenRange(
        edits=edits,
        sign=call.sign,
        wanted=wanted,
        if_range=call.fields.first("if-range"),
        body_may_come=_may_come(frame),
    )


def _head(call: Call) -> RequestPlan:
    return HeadSize(
        edits=call.edits.also(drop=_RANGES), sign=call.sign, body_may_come=_may_come(call.request.frame)
    )


def _write(call: Call) -> RequestPlan:
    if not is_block_blob(call.fields.sole("x-ms-blob-type")):
        return Refuse(refusal=refusals.UNKNOWN_ROUTE)
    checksums = Checksums.of(call.fields)
    plain_bytes = plain_length_of(call.request.frame)
    return Seal(
        edits=call.edits.also(
            drop=(*_RANGES, *CHECKSUM_FIELDS),
            put=(("content-length", str(sealed_length(plain_bytes))),),
        ),
        sign=call.sign,
        memo=Written(named=checksums.named),
        plain_bytes=plain_bytes,
        empty=EmptyBody.SEAL,
        digests=checksums.digests,
        decoder=checksums.decoder,
    )


def _block(call: Call) -> RequestPlan:
    checksums = Checksums.of(call.fields)
    call = replace(call, edits=call.edits.also(drop=CHECKSUM_FIELDS))
    return uploading.plan_block(call, checksums, Written(named=checksums.named))


def _commit(call: Call) -> RequestPlan:
    checksums = Checksums.of(call.fields)
    return uploading.plan_commit(replace(call, edits=call.edits.also(drop=CHECKSUM_FIELDS)), checksums)


def _copy(call: Call) -> RequestPlan:
    source = copying.source_at_service(call.request, call.target)
    edits = call.edits.also(put=((copying.FIELD, source),))
    return Forward(edits=edits, sign=call.sign, body_may_come=_may_come(call.request.frame))


def _document(call: Call) -> RequestPlan:
    """What is passed on is what came, with what its client has said of its checksum."""
    checksums = Checksums.of(call.fields)
    edits, sign = call.edits.also(put=checksums.named), call.sign
    if isinstance(sign, Unchanged):
        sign = replace(sign, same_body=True)

    async def check(talk: Conversation) -> Decision:
        checksums.check(talk.body)
        if talk.body:  # an empty list of identifiers may be no document at all
            try:
                root = document_root(talk.body)
            except XmlError:
                raise RefusedError(refusals.MALFORMED_DOCUMENT) from None
            if root[1] != call.operation.root:
                raise RefusedError(refusals.MALFORMED_DOCUMENT)
        return Proceed(plan=Forward(edits=edits, sign=sign), body=talk.body)

    return Converse(edits=edits, sign=sign, handler=check, limit_bytes=MAX_DOCUMENT_BYTES)


_PLANNERS: Final[dict[Kind, Callable[[Call], RequestPlan]]] = {
    Kind.FORWARD: _forward,
    Kind.DOCUMENT: _document,
    Kind.LIST: _list,
    Kind.READ: _read,
    Kind.HEAD: _head,
    Kind.WRITE: _write,
    Kind.BLOCK: _block,
    Kind.COMMIT: _commit,
    Kind.BLOCK_LIST: uploading.plan_block_list,
    Kind.COPY: _copy,
    Kind.PROPERTIES: properties.plan_properties,
}


def _may_come(frame: BodyFrame) -> bool:
    return frame.framing is Framing.STREAM


# ---- answers


def _directory(plan: Going, answer: AnswerHead) -> AnswerPlan | None:
    """A directory of an account with a hierarchy of names: an empty blob that the service itself makes.
    Nobody reads a range of one: by then the object is known."""
    if not isinstance(plan, Open | HeadSize) or answer.status != 200:
        return None
    fields = answer.fields
    is_directory = (
        fields.sole("x-ms-resource-type") == "directory"
        or (fields.sole("x-ms-meta-hdi_isfolder") or "").lower() == "true"
    )
    if not is_directory or fields.sole("content-length") != "0":
        return None
    return Pass(edits=Edits(drop=digest_fields(fields).union({"alt-svc", "sealgate-error", "trailer"})))
