"""From the head of a message to its plan: pure, default deny (docs/profiles.md).

1. What holds for every service stands here: framing, upgrades, trailers, hop-by-hop fields, addresses. What a
   method means is the profile's.
2. A digest of plaintext never goes up, a digest of ciphertext never comes down.
3. An answer that should be an object and is none is refused, unless the service's policy is to migrate.
4. A service is believed nothing that would make a client take ciphertext for plaintext, take an upload for
   stored that is not, or send it again to where it is not sealed.
5. Nothing a client or a service sends makes a planner raise: it becomes a plan to refuse.
"""

import re
from typing import Final
from urllib.parse import urlsplit

from envelope.errors import FormatError
from envelope.objects import plain_length
from proxy import refusals
from proxy.messages.message import (
    AnswerHead,
    BodyFrame,
    Framing,
    RequestHead,
    body_frame,
    content_range,
    declared_length,
    digest_fields,
    strong_etag,
)
from proxy.messages.ranges import AskedRange
from proxy.plans.answer_plan import AnswerPlan, MapSize, OpenPart, OpenWhole, Pass
from proxy.plans.plan import (
    Answer,
    Converse,
    Forward,
    HeadSize,
    LegacyRange,
    Open,
    OpenRange,
    PassBody,
    Refuse,
    RequestPlan,
    Reshape,
    Seal,
    Unopened,
)
from proxy.plans.profile_options import StoredPolicy
from proxy.plans.request import EMPTY_DIRECTORY, NO_EDITS, Edits, Mode, Request, Route
from proxy.profiles.profile import Profile
from proxy.refusals import RefusedError
from proxy.tenants.model import Directory

# Fields of one connection (RFC 9110 7.6.1), and what a client says to a proxy alone.
_HOP_BY_HOP: Final = frozenset(
    {"http2-settings", "keep-alive", "proxy-authorization", "proxy-connection", "te", "upgrade"}
)
# A Connection field that names one of these wants us to drop what the message is made of.
_ENDS_NOT_HOPS: Final = frozenset(
    {"authorization", "cache-control", "content-length", "cookie", "host", "transfer-encoding"}
)
_CLOSING: Final = frozenset({"close", "keep-alive"})

_WANTED_DIGESTS: Final = frozenset(
    {"want-content-digest", "want-digest", "want-repr-digest", "x-ms-range-get-content-md5"}
)

# Origin form (RFC 9112 3.2.1). HTTP/2 carries any text here: `@other.example/` after our scheme and host
# would name another host, a line end would begin another request towards HTTP/1.
_TARGET: Final = re.compile(r"/[^\x00-\x20\x7f#]*")
_LINE_END: Final = re.compile(r"[\r\n\x00]")

# In reverse mode these may name the service, whom its clients know by our name.
_SPEAK_OF_US: Final = frozenset({"content-location", "link", "location", "refresh", "set-cookie"})
_REFRESH: Final = re.compile(r"(\s*[0-9.]+\s*[;,]\s*(?:url\s*=\s*)?)(.*)", re.IGNORECASE | re.DOTALL)
_LINK_TARGET: Final = re.compile(r"<([^<>]*)>")

_BODILESS_STATUS: Final = frozenset({204, 304})

# A reference that stays at the host it came from, whoever reads it: a path, or what follows on one. Browsers
# take `\\` for `/`, and skip white space and control characters.
_OWN_REFERENCE: Final = re.compile(
    r"(?:/(?![/\\])|[^:/?#\\\x00-\x20\x7f]+(?:[/?#]|\Z)|[?#]|\Z)[^\\\x00-\x20\x7f]*"
)
_ABSOLUTE: Final = re.compile(r"([A-Za-z]+)://[^@/?#\\\x00-\x20\x7f]+(?:[/?#][^\\\x00-\x20\x7f]*)?")


def planned(
    head: RequestHead,
    route: Route,
    profile: Profile,
    *,
    now_s: float = 0.0,
    directory: Directory = EMPTY_DIRECTORY,
) -> tuple[Request, RequestPlan]:
    """What happens to this request on its way to *route*'s service. Whatever a client sends gives a plan."""
    unfit = Request(head=head, frame=BodyFrame(framing=Framing.NONE), edits=NO_EDITS, route=route)
    try:
        frame, edits = body_frame(head), _request_edits(head)
    except RefusedError as refused:
        return unfit, Refuse(refusal=refused.refusal)
    request = Request(head=head, frame=frame, edits=edits, route=route, now_s=now_s, directory=directory)
    try:
        return request, _plan_of(request, profile)
    except RefusedError as refused:
        return request, Refuse(refusal=refused.refusal)


def plan_request(head: RequestHead, route: Route, profile: Profile) -> RequestPlan:
    """The plan alone."""
    return planned(head, route, profile)[1]


def _plan_of(request: Request, profile: Profile) -> RequestPlan:
    """The profile's plan, where the route's policy leaves it to the profile. RefusedError as it raises."""
    plan = profile.plan(request)
    if request.route.policy is StoredPolicy.PASSTHROUGH and isinstance(plan, Open | OpenRange | HeadSize):
        # The range goes up as it came; what the profile has said of conditions holds here, too.
        edits = plan.edits
        return Unopened(
            edits=Edits(drop=edits.drop - ({"range", "if-range"} - request.edits.drop), put=edits.put),
            target=plan.target,
            sign=plan.sign,
            memo=plan.memo,
            body_may_come=plan.body_may_come,
        )
    return plan


def request_of(head: RequestHead, route: Route, *, now_s: float = 0.0) -> Request:
    """The request as a profile is asked about it. RefusedError for what no service may get."""
    return Request(head=head, frame=body_frame(head), edits=_request_edits(head), route=route, now_s=now_s)


def _request_edits(head: RequestHead) -> Edits:
    """Changes that every request to a managed service needs. RefusedError for what must not go on."""
    fields = head.fields
    if not _TARGET.fullmatch(head.target) and (head.method, head.target) != ("OPTIONS", "*"):
        raise RefusedError(refusals.BAD_MESSAGE)
    if _LINE_END.search(fields.joined_values()):
        raise RefusedError(refusals.BAD_MESSAGE)
    upgrades = fields.tokens("upgrade")
    if "upgrade" in fields and upgrades != ["h2c"]:  # an offer of h2c may be ignored by anyone (RFC 9110 7.8)
        raise RefusedError(refusals.UPGRADE)
    if "trailer" in fields:
        raise RefusedError(refusals.TRAILERS)
    if fields.tokens("expect") not in ([], ["100-continue"]) or len(fields.all("expect")) > 1:
        raise RefusedError(refusals.BAD_MESSAGE)
    if len(fields.all("host")) > 1:
        raise RefusedError(refusals.BAD_MESSAGE)
    nominated = frozenset(fields.tokens("connection"))
    if nominated & _ENDS_NOT_HOPS:
        raise RefusedError(refusals.BAD_MESSAGE)
    drop = (_HOP_BY_HOP | _WANTED_DIGESTS | nominated - _CLOSING).intersection(fields) | digest_fields(fields)
    put = [("accept-encoding", "identity")]
    if nominated - _CLOSING:
        # Our own word to the next hop; to the client the connection closes if it asked for that.
        put.append(("connection", "close" if "close" in nominated else "keep-alive"))
    return Edits(drop=frozenset(drop), put=tuple(put))


def is_target(text: str) -> bool:
    """Whether this can be asked for: path and query, and nothing that is another host or another request."""
    return _TARGET.fullmatch(text) is not None or text == "*"


def plan_answer(
    plan: RequestPlan,
    answer: AnswerHead,
    route: Route,
    *,
    asked: AskedRange | None = None,
    composites: bool = False,
) -> AnswerPlan:
    """What happens to the answer to a request that went on by *plan*.

    *asked*: the range that went up in place of the client's, if one did. *composites*: the object may be one,
    so that its length tells nothing.
    """
    edits = _answer_edits(answer, route)
    status = answer.status
    if status == 101:
        return Refuse(refusal=refusals.UPGRADE)
    match plan:
        case Refuse():
            return Refuse(refusal=plan.refusal)
        case Answer() | Converse():
            return Refuse(refusal=refusals.INTERNAL)  # it never left
        case Seal() | Reshape() if (
            300 <= status < 400 and status not in (303, 304) and not _stays(answer, route)
        ):
            return Refuse(refusal=refusals.ANSWER_REFUSED)
        case Open() | OpenRange() | LegacyRange() | HeadSize() if (
            300 <= status < 400 and status != 304 and not route.pages and not _stays(answer, route)
        ):
            # Whoever followed it would be given ciphertext, by somebody who is not asked for an object.
            return Refuse(refusal=refusals.ANSWER_REFUSED)
        case Unopened():
            return Pass(edits=edits)
        case Forward() | PassBody() | Seal() | Reshape():
            return Pass(edits=edits, may_be_sealed=not 200 <= status < 300)
        case LegacyRange():
            return _plan_legacy_range(plan, answer, route, edits)
        case HeadSize():
            return _plan_head(answer, route, edits, composites=composites)
        case Open() | OpenRange():
            if asked is not None and (refusal := _range_refusal(answer, asked)) is not None:
                return Refuse(refusal=refusal)
            if status == 206:
                if asked is None:
                    return Refuse(refusal=refusals.UPSTREAM_CHANGED)
                return OpenPart(edits=_opened_part(answer, asked, edits))
            if not 200 <= status < 300 or status in _BODILESS_STATUS:
                return Pass(edits=edits.also(drop=_stored_size(answer)))
            return _plan_whole(answer, route, edits)


def _stays(answer: AnswerHead, route: Route) -> bool:
    """Whether a client that follows this redirect comes to this service by us again."""
    for reference in answer.fields.all("location"):
        if _OWN_REFERENCE.fullmatch(reference):
            continue
        absolute = _ABSOLUTE.fullmatch(reference)
        if absolute is None or absolute[1].lower() != route.service.upstream.scheme:
            return False
        if not _names_service(reference, route) and not _names_below(reference, route):
            return False
    return True


def _plan_legacy_range(plan: LegacyRange, answer: AnswerHead, route: Route, edits: Edits) -> AnswerPlan:
    if answer.status == 206:
        is_same = (
            answer.fields.sole("content-length") == "0"
            if plan.etag is None
            else strong_etag(answer.fields) == plan.etag
        )
        if not is_same:
            return Refuse(refusal=refusals.UPSTREAM_CHANGED)
        return Pass(edits=_opened_edits(answer, edits), may_be_sealed=False)
    if answer.status == 412 and plan.pinned:
        return Refuse(refusal=refusals.UPSTREAM_CHANGED)
    if not 200 <= answer.status < 300 or answer.status in _BODILESS_STATUS:
        return Pass(edits=edits.also(drop=_stored_size(answer)))
    return _plan_whole(answer, route, edits)


def _stored_size(answer: AnswerHead) -> tuple[str, ...]:
    # A 304 may state the length of what it stands for (RFC 9110 8.6): of the stored object, here.
    return ("content-length",) if answer.status == 304 else ()


def _range_refusal(answer: AnswerHead, asked: AskedRange) -> refusals.Refusal | None:
    if answer.status == 206:
        got = content_range(answer.fields)
        same_version = asked.etag is None or strong_etag(answer.fields) in (None, asked.etag)
        if got != (*asked.stored, asked.stored_bytes) or not same_version:
            return refusals.UPSTREAM_CHANGED
        length = answer.fields.sole("content-length")
        if length is not None and length != str(asked.stored[1] - asked.stored[0]):
            return refusals.UPSTREAM_CHANGED
        return None
    if answer.status == 416 or (answer.status == 412 and asked.pinned):
        return refusals.UPSTREAM_CHANGED
    return None


def _opened_edits(answer: AnswerHead, edits: Edits) -> Edits:
    """Of an answer whose body is plaintext now, or whose head speaks of it."""
    cache = answer.fields.all("cache-control")
    directives = [*cache]
    if "private" not in answer.fields.tokens("cache-control"):
        directives.append("private")
    # `public` would contradict it; `s-maxage` speaks to shared caches, which have no business here.
    kept = [
        token
        for value in directives
        for token in (part.strip(" \t") for part in value.split(","))
        if token and token.lower() != "public" and not token.lower().startswith("s-maxage")
    ]
    return edits.also(
        drop=digest_fields(answer.fields) | {"trailer"}, put=(("cache-control", ", ".join(kept)),)
    )


def _opened_part(answer: AnswerHead, asked: AskedRange, edits: Edits) -> Edits:
    start, stop = asked.plain
    return _opened_edits(answer, edits).also(
        put=(
            ("content-length", str(stop - start)),
            ("content-range", f"bytes {start}-{stop - 1}/{asked.plain_bytes}"),
        )
    )


def _plain_or_none(stored_bytes: int | None) -> int | None:
    if stored_bytes is None:
        return None
    try:
        return plain_length(stored_bytes)
    except FormatError:
        return None


def _plan_whole(answer: AnswerHead, route: Route, edits: Edits) -> AnswerPlan:
    try:
        stored = declared_length(answer.fields)
    except RefusedError as refused:
        return Refuse(refusal=refused.refusal)
    if stored == 0:
        if route.policy is StoredPolicy.MIGRATE:
            return Pass(edits=_opened_edits(answer, edits))
        return Refuse(refusal=refusals.OBJECT_INVALID)
    return OpenWhole(
        edits=_opened_edits(answer, edits), stored_bytes=stored, plain_bytes=_plain_or_none(stored)
    )


def _plan_head(answer: AnswerHead, route: Route, edits: Edits, *, composites: bool) -> AnswerPlan:
    if not 200 <= answer.status < 300 or answer.status in _BODILESS_STATUS:
        return Pass(edits=edits.also(drop=("content-length",) if answer.status == 304 else ()))
    opened = _opened_edits(answer, edits)
    try:
        stored = declared_length(answer.fields)
    except RefusedError as refused:
        return Refuse(refusal=refused.refusal)
    if stored is None:
        return Pass(edits=opened)
    plain = _plain_or_none(stored)
    if route.policy is StoredPolicy.MIGRATE and plain is None and not composites:
        return Pass(edits=opened)
    if composites or route.policy is StoredPolicy.MIGRATE:
        return MapSize(edits=opened, stored_bytes=stored, plain_bytes=plain, probe=True)
    if plain is None:
        return Refuse(refusal=refusals.OBJECT_INVALID)
    return MapSize(
        edits=opened.also(put=(("content-length", str(plain)),)), stored_bytes=stored, plain_bytes=plain
    )


def _answer_edits(answer: AnswerHead, route: Route) -> Edits:
    """Changes that every answer needs: no way round the proxy, our words and our address for us alone."""
    drop = frozenset({"alt-svc", "proxy-connection", "sealgate-error"}).intersection(answer.fields)
    if route.mode is not Mode.REVERSE or _SPEAK_OF_US.isdisjoint(answer.fields):
        return Edits(drop=drop)
    put: list[tuple[str, str]] = []
    for name in ("location", "content-location"):
        value = answer.fields.sole(name)
        if value is not None and (ours := _our_address(value, route)) is not None:
            put.append((name, ours))
    lists: list[tuple[str, tuple[str, ...]]] = []
    for name, ours_of in (("refresh", _our_refresh), ("link", _our_links), ("set-cookie", _our_cookie)):
        values = tuple(answer.fields.all(name))
        changed = tuple(ours_of(value, route) for value in values)
        if changed != values:
            lists.append((name, changed))
    return Edits(drop=drop, put=tuple(put), lists=tuple(lists))


def _our_refresh(value: str, route: Route) -> str:
    """`5; url=https://...`, as browsers read it."""
    match = _REFRESH.fullmatch(value)
    ours = _our_address(match[2].strip("\"'"), route) if match is not None else None
    return value if match is None or ours is None else f"{match[1]}{ours}"


def _our_links(value: str, route: Route) -> str:
    """RFC 8288: the targets stand in angle brackets."""
    return _LINK_TARGET.sub(lambda match: f"<{_our_address(match[1], route) or match[1]}>", value)


def _our_cookie(value: str, route: Route) -> str:
    """Without a Domain that is the service's, or above it: the cookie is then our host's (RFC 6265 5.3)."""
    pair, *attributes = value.split(";")
    kept = [pair]
    for part in attributes:
        name, _, domain = part.partition("=")
        place = domain.strip(" \t").lstrip(".").lower()
        is_theirs = f".{route.service.upstream.host}".endswith(f".{place}") and place
        if not (name.strip(" \t").lower() == "domain" and is_theirs):
            kept.append(part)
    return ";".join(kept)


def _our_address(reference: str, route: Route) -> str | None:
    """*reference* without the service's scheme and host, if it names that host: then it means us."""
    if not _names_service(reference, route):
        return None
    rest = urlsplit(reference)._replace(scheme="", netloc="").geturl()
    # To a browser `//x` and `/\\x` are other hosts; an empty path is the root.
    return "/" + rest.lstrip("/\\")


def _names_below(reference: str, route: Route) -> bool:
    """Whether *reference* is to a host below the service's, which a forward proxy leads to it (S3)."""
    if route.mode is not Mode.FORWARD or not route.options.has_subdomains:
        return False
    upstream = route.service.upstream
    try:
        url = urlsplit(reference)
        host, port = url.hostname or "", url.port
    except ValueError:
        return False
    default = {"http": 80, "https": 443}.get(url.scheme)
    return host.lower().endswith("." + upstream.host) and (port or default) == upstream.port


def _names_service(reference: str, route: Route) -> bool:
    """Whether *reference* is absolute, and to the service's host and port."""
    upstream = route.service.upstream
    try:
        url = urlsplit(reference)
        host, port = url.hostname, url.port
    except ValueError:
        return False
    if host is None:
        return False
    default = {"http": 80, "https": 443, "": upstream.port}.get(url.scheme)
    return default is not None and host.lower() == upstream.host and (port or default) == upstream.port
