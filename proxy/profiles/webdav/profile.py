"""The webdav profile: what becomes of each of WebDAV's methods (docs/profiles-webdav.md).

1. Content is sealed and opened as by `generic`; properties, names and locks are the service's, in the clear.
2. A request's XML is read whole, within a limit, and passes only if it is the document that its method takes.
   Anything else might be content.
3. What the answers say of sizes, digests and addresses is rewritten as they stream (lists.py, addresses.py).
4. A collection is no object: an index page at its URL, which ends in a slash, passes if it is HTML and does
   not look sealed. A service that lies can show one in place of a file; the option `index_pages` ends that.
5. A resource that LOCK makes becomes an empty object (locks.py).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Final, override
from xml.sax.saxutils import escape

from proxy import refusals
from proxy.messages.message import AnswerHead, BodyFrame, Framing, RequestHead, digest_fields
from proxy.plans.answer_plan import AnswerPlan, MapBody, Pass
from proxy.plans.conversing import Conversation
from proxy.plans.plan import Converse, Decision, Forward, Going, Proceed, Refuse, RequestPlan
from proxy.plans.profile_options import ProfileOptions
from proxy.plans.request import Mode, Request
from proxy.profiles.generic import GenericProfile
from proxy.profiles.profile import Limitation
from proxy.profiles.webdav.addresses import Addresses
from proxy.profiles.webdav.chunk_names import upload_path
from proxy.profiles.webdav.chunking import plan_in_upload
from proxy.profiles.webdav.lists import (
    DAV,
    address_mapper,
    is_nextcloud,
    list_mapper,
    needs_a_look,
    with_etags,
)
from proxy.profiles.webdav.locks import is_absent, plan_locked
from proxy.profiles.xml_rewriting import Name, XmlError, document_root
from proxy.refusals import Refusal, Shaped

XML_LIMIT_BYTES: Final = 1024 * 1024
"""Of a request's document: some ten thousand properties."""


# The documents that a method takes; None: any. Their content is properties, filters, owners of locks.
_DOCUMENTS: Final[dict[str, frozenset[Name] | None]] = {
    "ACL": frozenset({(DAV, "acl")}),
    "LOCK": frozenset({(DAV, "lockinfo")}),
    "MKCOL": frozenset({(DAV, "mkcol")}),
    "PROPFIND": frozenset({(DAV, "propfind")}),
    "PROPPATCH": frozenset({(DAV, "propertyupdate")}),
    "REPORT": None,
    "SEARCH": frozenset({(DAV, "searchrequest")}),
}
_LISTS: Final = frozenset({"PROPFIND", "REPORT", "SEARCH"})
_BODILESS: Final = frozenset({"COPY", "DELETE", "LOCK", "MKCOL", "MOVE", "OPTIONS", "PROPFIND", "UNLOCK"})
_RANGES: Final = ("if-range", "range")
_RECALCULATE: Final = "x-recalculate-hash"
_INDEX_TYPES: Final = frozenset({"text/html", "application/xhtml+xml", "httpd/unix-directory"})
_READS: Final = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True)
class Asked:
    """Of a request that went on, for its answer."""

    added_etags: bool = False
    """To a PROPFIND: the client does not know them."""
    was_absent: bool = False
    """What a LOCK is about."""


INDEX_PAGE: Final = object()
"""The memo of a read of a collection."""


class WebDavOptions(ProfileOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    index_pages: bool = True
    """False: what is read has to be sealed at URLs that end in a slash, too."""


class WebDavProfile(GenericProfile):
    name: ClassVar[str] = "webdav"
    summary: ClassVar[str] = "WebDAV shares: WsgiDAV, Apache mod_dav, Nextcloud's files"
    encrypts: ClassVar[str] = "the content of every resource; names, properties and locks are not content"
    sizes: ClassVar[str] = (
        "Content-Length, getcontentlength and oc:size by arithmetic; on Nextcloud and on routes that migrate"
        " by a look at the object, once per ETag"
    )
    validators: ClassVar[str] = (
        "ETag, getetag, Last-Modified, If and conditions name stored versions, unchanged"
    )
    digests: ClassVar[str] = (
        "those of a request are checked against the plaintext and dropped; oc:checksums and getcontentmd5 are"
        " taken out of lists"
    )
    operations: ClassVar[tuple[tuple[str, str], ...]] = (
        ("PUT", "the body is sealed; digests in the request are checked and dropped"),
        ("GET", "the body is opened; one range is served by range, several as the whole object"),
        (
            "GET of a collection (URL with a slash at its end)",
            "passes if it is HTML: an index page is no object",
        ),
        ("HEAD", "Content-Length is the plaintext's"),
        ("PROPFIND, REPORT, SEARCH", "the answer's sizes are the plaintext's, at any depth, as it streams"),
        ("PROPPATCH, ACL, LOCK, MKCOL with XML", "pass, if the document is the method's"),
        ("COPY, MOVE", "pass; Destination and If name the service; elsewhere: refused: foreign-destination"),
        ("LOCK where nothing is", "passes, and an empty object is stored under the lock"),
        ("DELETE, MKCOL, OPTIONS, UNLOCK", "pass, without a body"),
        (
            "Nextcloud's chunks (MKCOL uploads/USER/ID, PUT, MOVE .file)",
            "each chunk is sealed; a manifest goes up behind the last one, then they are joined",
        ),
        ("PUT with Content-Range or OC-Chunked, PATCH", "refused: partial-write"),
        ("PATCH with X-Recalculate-Hash, empty", "passes; the hash is of ciphertext, and is shown to nobody"),
        ("POST, all others", "refused: unknown-route"),
    )
    limitations: ClassVar[tuple[Limitation, ...]] = (
        Limitation(
            what="Search in content, preview, thumbnails, conversion, virus scan at the service",
            why="the service holds ciphertext only",
        ),
        Limitation(
            what="Web pages and API answers of the service outside of its shares, and index pages without a"
            " slash at the end of the URL",
            why="a successful GET must be a sealed object (409 not-sealed); the option `legacy` can name"
            " routes that migrate",
        ),
        Limitation(
            what="Sizes in index pages, quotas, bills, and of collections (oc:size)",
            why="they are stored sizes: 88 bytes and 16 per 16 KiB more than the content",
        ),
        Limitation(
            what="Properties that clients set (PROPPATCH), names, owners of locks",
            why="they are the service's to search and to show, and stay in the clear",
        ),
        Limitation(what="Checksums the service computes or compares", why="they would be of ciphertext"),
        Limitation(
            what="Writing a part of a resource, appending (PATCH, PUT with Content-Range, OC-Chunked)",
            why="an object is sealed under one salt and cannot be changed in place",
        ),
        Limitation(
            what="Nextcloud's bulk upload, web interface and API, and more than 9,999 chunks in an upload",
            why="forms and JSON are not this profile's, and the manifest needs a place",
        ),
        Limitation(
            what="OC-Checksum of a file that is uploaded in chunks",
            why="chunks come in any order and at any time: each is authenticated, the whole is not hashed",
        ),
        Limitation(
            what="COPY and MOVE to another host or another network service",
            why="the object's key is not known there",
        ),
        Limitation(
            what="Bodies of requests that are no XML document of their method, forms, POST",
            why="they might be content, and nobody would seal it",
        ),
        Limitation(
            what="Several ranges in one request",
            why="they are answered by the whole object (200), as RFC 9110 14.2 allows",
        ),
        Limitation(
            what="Detecting that the service brought back an older version of an object",
            why="an older version was sealed just as well",
        ),
    )
    options: ClassVar[type[ProfileOptions]] = WebDavOptions
    makes_composites: ClassVar[bool] = True

    # ---- requests

    @override
    def plan(self, request: Request) -> RequestPlan:
        request = _at_service(request)
        path = upload_path(request.head.target)
        plan = self._plan(request)
        if path is not None:
            return plan_in_upload(request, path, plan)
        if request.head.method in ("COPY", "MOVE") and _goes_into_upload(request):
            return Refuse(refusal=refusals.UNKNOWN_ROUTE)
        return plan

    def _plan(self, request: Request) -> RequestPlan:
        method, frame = request.head.method, request.frame
        if method in _READS and _is_collection(request) and not frame.is_declared:
            return _forward(request, memo=INDEX_PAGE)
        wanted = request.head.fields.sole(_RECALCULATE)
        if method == "PATCH" and wanted is not None and not frame.is_declared:
            # No content: Nextcloud is to hash what it has, as rclone asks it to. Its clients never see that.
            return _forward(replace(request, edits=request.edits.also(put=((_RECALCULATE, wanted),))))
        if method in ("PUT", "GET", "HEAD", "PATCH"):
            return super().plan(request)
        if method in _DOCUMENTS and (frame.is_declared or _may_come(frame)):
            return Converse(
                edits=request.edits.also(drop=_RANGES),
                handler=lambda talk: _pass_document(request, talk),
                limit_bytes=XML_LIMIT_BYTES,
            )
        if method in _BODILESS and not frame.is_declared:
            return _forward(request)
        return Refuse(refusal=refusals.UNKNOWN_ROUTE)

    # ---- answers

    @override
    def plan_answer(
        self, request: Request, plan: Going, answer: AnswerHead, proposed: AnswerPlan
    ) -> AnswerPlan:
        if plan.memo is INDEX_PAGE:
            return _index_page(request, answer, proposed)
        if not isinstance(proposed, Pass) or request.head.method in _READS:
            return proposed
        if digests := digest_fields(answer.fields):
            proposed = replace(proposed, edits=proposed.edits.also(drop=digests))
        method, status = request.head.method, answer.status
        asked = plan.memo if isinstance(plan.memo, Asked) else Asked()
        is_list = method in _LISTS and status == 207
        has_addresses = request.route.mode is Mode.REVERSE and _is_xml(answer)
        if not (is_list or has_addresses or method == "LOCK"):
            return proposed
        if any(coding != "identity" for coding in answer.fields.tokens("content-encoding")):
            return Refuse(refusal=refusals.SERVICE_ANSWER)
        if is_list:
            make = partial(list_mapper, drop_etags=asked.added_etags)
            return Pass(edits=proposed.edits, body=MapBody(make=make))
        if has_addresses:
            proposed = Pass(edits=proposed.edits, body=MapBody(make=lambda _talk: address_mapper(request)))
        if method == "LOCK" and plan.memo is not None:
            return plan_locked(answer, proposed, was_absent=asked.was_absent)
        return proposed

    @override
    def may_be_composite(self, request: Request, answer: AnswerHead) -> bool:
        return is_nextcloud(request.head.target)

    @override
    def shape(self, refusal: Refusal, head: RequestHead) -> Shaped:
        """RFC 4918 16, with the elements by which sabre/dav's clients (rclone's, Nextcloud's) show a text."""
        text = escape(f"{refusal.cause} {refusal.next_step}")
        document = (
            '<?xml version="1.0" encoding="utf-8"?>\n'
            '<D:error xmlns:D="DAV:" xmlns:s="http://sabredav.org/ns">'
            f"<s:exception>sealgate: {escape(refusal.code)}</s:exception>"
            f"<s:message>{text}</s:message></D:error>\n"
        )
        return Shaped(content_type="application/xml; charset=utf-8", body=document.encode())


def _at_service(request: Request) -> Request:
    """With those edits by which the request's URLs name the service. RefusedError."""
    addresses = Addresses(request)
    put = []
    if (destination := addresses.destination()) is not None:
        put.append(("destination", destination))
    if (conditions := addresses.conditions()) is not None:
        put.append(("if", conditions))
    return replace(request, edits=request.edits.also(put=put)) if put else request


def _goes_into_upload(request: Request) -> bool:
    """Whole objects are no chunks. RefusedError."""
    destination = Addresses(request).destination_path()
    return destination is not None and upload_path(destination) is not None


def _forward(request: Request, *, memo: object = None) -> Forward:
    edits = request.edits.also(drop=_RANGES)
    return Forward(edits=edits, body_may_come=_may_come(request.frame), memo=memo)


def _is_collection(request: Request) -> bool:
    """Whether the request reads one, where they may be read."""
    options = request.options
    allowed = not isinstance(options, WebDavOptions) or options.index_pages
    return allowed and request.head.target.partition("?")[0].endswith("/")


def _index_page(request: Request, answer: AnswerHead, proposed: AnswerPlan) -> AnswerPlan:
    has_body = request.head.method == "GET" and 200 <= answer.status < 300 and answer.status != 204
    if has_body and _type(answer) not in _INDEX_TYPES:
        return Refuse(refusal=refusals.NOT_SEALED)
    return proposed


def _may_come(frame: BodyFrame) -> bool:
    return frame.framing is Framing.STREAM


def _type(answer: AnswerHead) -> str:
    return (answer.fields.first("content-type") or "").partition(";")[0].strip(" \t").lower()


def _is_xml(answer: AnswerHead) -> bool:
    return _type(answer) in ("application/xml", "text/xml")


async def _pass_document(request: Request, talk: Conversation) -> Decision:
    """The request with the document it came with, if its method takes that one."""
    method, body, asked = request.head.method, talk.body, Asked()
    if not body:
        if method not in _BODILESS:
            return Refuse(refusal=refusals.BAD_MESSAGE)
        return Proceed(plan=_forward(request))
    try:
        root = document_root(body)
        if method == "PROPFIND" and needs_a_look(request, request.head.target):
            body, added = with_etags(body)
            asked = Asked(added_etags=added)
    except XmlError:
        root = None
    taken = _DOCUMENTS[method]
    if root is None or (taken is not None and root not in taken):
        # Broken XML is the client's to mend (RFC 4918 8.2); what never was XML has no business there.
        return Refuse(refusal=refusals.UNSUPPORTED_BODY if method == "MKCOL" else refusals.BAD_MESSAGE)
    if method == "LOCK":
        asked = Asked(was_absent=await is_absent(talk))
    return Proceed(plan=Forward(edits=request.edits.also(drop=_RANGES), memo=asked), body=body)
