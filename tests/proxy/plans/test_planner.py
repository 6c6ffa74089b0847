"""Plans of requests and answers, the generic profile's and every profile's."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.keys import NetworkService
from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import AnswerHead, Fields, RequestHead
from proxy.messages.ranges import AskedRange, RangeRefusal
from proxy.plans.answer_plan import MapSize, OpenPart, OpenWhole, Pass
from proxy.plans.plan import (
    EmptyBody,
    Forward,
    Going,
    HeadSize,
    LegacyRange,
    Open,
    OpenRange,
    Refuse,
    RequestPlan,
    Seal,
)
from proxy.plans.planner import plan_answer, plan_request
from proxy.plans.request import NO_EDITS, Mode, Route
from proxy.profiles import PROFILES, UnknownProfileError, profile_named
from proxy.profiles.s3.options import S3Options
from proxy.refusals import Refusal
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream

GENERIC = profile_named("generic")


def route(
    *,
    mode: Mode = Mode.FORWARD,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    upstream: str = "https://s.example",
) -> Route:
    service = ServiceEntry(
        owner=NetworkService("acme", "files"),
        upstream=Upstream.parse(upstream),
        profile="generic",
        legacy=legacy,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    return Route(service=service, mode=mode)


def fields(*pairs: tuple[str, str]) -> Fields:
    return Fields((name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in pairs)


def plan(method: str, *pairs: tuple[str, str], http2: bool = False) -> RequestPlan:
    head = RequestHead(method=method, target="/x", fields=fields(*pairs), http2=http2)
    return plan_request(head, route(), GENERIC)


def refused(plan: object) -> Refusal:
    assert isinstance(plan, Refuse)
    return plan.refusal


# Requests.


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_an_upload_of_known_length_is_sealed_and_says_its_new_length(method: str) -> None:
    got = plan(method, ("Content-Length", "1000"))
    assert isinstance(got, Seal)
    assert got.plain_bytes == 1000
    assert ("content-length", str(sealed_length(1000))) in got.edits.put


def test_uploads_without_a_length_stay_so() -> None:
    for got in (plan("PUT", ("Transfer-Encoding", "chunked")), plan("PUT", http2=True)):
        assert isinstance(got, Seal)
        assert got.plain_bytes is None
        assert "content-length" not in dict(got.edits.put)


def test_an_empty_put_is_an_object_and_an_empty_post_is_not() -> None:
    for pairs in ([], [("Content-Length", "0")]):
        got = plan("PUT", *pairs)
        assert isinstance(got, Seal)
        assert (got.plain_bytes, dict(got.edits.put)["content-length"]) == (0, "104")
        got = plan("POST", *pairs)
        assert isinstance(got, Forward)
        assert dict(got.edits.put)["content-length"] == "0"
    got = plan("POST", http2=True)
    assert isinstance(got, Seal)
    assert got.empty is EmptyBody.KEEP


@pytest.mark.parametrize(
    ("method", "kind"),
    [("GET", Open), ("HEAD", HeadSize), ("DELETE", Forward), ("OPTIONS", Forward), ("MKCOL", Forward)],
)
def test_requests_without_a_body(method: str, kind: type) -> None:
    got = plan(method)
    assert isinstance(got, kind)
    assert not getattr(got, "body_may_come", None)
    got = plan(method, http2=True)
    assert isinstance(got, kind)
    assert getattr(got, "body_may_come", None)
    assert refused(plan(method, ("Content-Length", "1"))) is refusals.UNKNOWN_ROUTE
    assert refused(plan(method, ("Transfer-Encoding", "chunked"))) is refusals.UNKNOWN_ROUTE


@pytest.mark.parametrize(
    "method",
    ["COPY", "MOVE", "PROPFIND", "PROPPATCH", "LOCK", "UNLOCK", "TRACE", "CONNECT", "get", "Put", "", "X"],
)
def test_unknown_methods_are_refused(method: str) -> None:
    assert refused(plan(method)) is refusals.UNKNOWN_ROUTE


def test_partial_writes_are_refused() -> None:
    assert refused(plan("PATCH", ("Content-Length", "5"))) is refusals.PARTIAL_WRITE
    for method in ("PUT", "POST"):
        got = plan(method, ("Content-Length", "5"), ("Content-Range", "bytes 0-4/10"))
        assert refused(got) is refusals.PARTIAL_WRITE
        for name in (
            "OC-Chunked",
            "X-Update-Range",
            "X-Ms-Range",
            "X-Amz-Write-Offset-Bytes",
            "Upload-Offset",
        ):
            assert refused(plan(method, ("Content-Length", "5"), (name, "1"))) is refusals.PARTIAL_WRITE


@pytest.mark.parametrize(
    ("pairs", "refusal"),
    [
        ([("Upgrade", "websocket")], refusals.UPGRADE),
        ([("Upgrade", "h2c, websocket")], refusals.UPGRADE),
        ([("Upgrade", "")], refusals.UPGRADE),
        ([("Trailer", "X-Sum")], refusals.TRAILERS),
        ([("Expect", "something")], refusals.BAD_MESSAGE),
        ([("Expect", "100-continue"), ("Expect", "100-continue")], refusals.BAD_MESSAGE),
        ([("Host", "a"), ("Host", "b")], refusals.BAD_MESSAGE),
        ([("Connection", "close, Content-Length")], refusals.BAD_MESSAGE),
        ([("Connection", "Authorization")], refusals.BAD_MESSAGE),
        ([("Content-MD5", "x")], refusals.BAD_DIGEST),
        ([("Content-Length", "5"), ("Content-Length", "6")], refusals.BAD_MESSAGE),
    ],
)
def test_heads_that_are_refused(pairs: list[tuple[str, str]], refusal: Refusal) -> None:
    assert refused(plan("PUT", *pairs)) is refusal


@pytest.mark.parametrize(
    "target",
    [
        "",
        "x",
        "@evil.example/",
        "https://evil.example/",
        ".evil.example/",
        "/a b",
        "/a\r\nX: y",
        "/a#b",
        "*",
        "/\x00",
    ],
)
def test_targets_that_are_no_path_are_refused(target: str) -> None:
    for http2 in (True, False):
        head = RequestHead(method="GET", target=target, fields=fields(), http2=http2)
        assert refused(plan_request(head, route(), GENERIC)) is refusals.BAD_MESSAGE


def test_a_line_end_in_a_field_is_refused() -> None:
    for value in ("a\r\nTransfer-Encoding: chunked", "a\nb", "a\x00"):
        assert refused(plan("GET", ("X", value), http2=True)) is refusals.BAD_MESSAGE


def test_a_server_wide_options_passes() -> None:
    head = RequestHead(method="OPTIONS", target="*", fields=fields())
    assert isinstance(plan_request(head, route(), GENERIC), Forward)


def test_fields_of_the_hop_and_digests_do_not_go_on() -> None:
    got = plan(
        "PUT",
        ("Connection", "keep-alive, TE, Upgrade, HTTP2-Settings, X-Mine"),
        ("TE", "trailers"),
        ("Upgrade", "h2c"),
        ("HTTP2-Settings", "AAA"),
        ("X-Mine", "1"),
        ("Proxy-Authorization", "Basic eDp5"),
        ("Proxy-Connection", "keep-alive"),
        ("Want-Digest", "sha-256"),
        ("X-Amz-Checksum-Sha256", "x"),
        ("Content-Length", "5"),
        ("X-Expected-Entity-Length", "5"),
        ("Range", "bytes=0-1"),
        ("X-Kept", "1"),
    )
    assert isinstance(got, Seal)
    assert {
        "te", "upgrade", "http2-settings", "x-mine", "proxy-authorization", "proxy-connection", "want-digest",
        "x-amz-checksum-sha256", "x-expected-entity-length", "range",
    } <= got.edits.drop  # fmt: skip
    assert "x-kept" not in got.edits.drop
    assert dict(got.edits.put)["connection"] == "keep-alive"
    assert dict(got.edits.put)["accept-encoding"] == "identity"


def test_a_client_that_closes_still_closes() -> None:
    got = plan("GET", ("Connection", "close, TE"), ("TE", "trailers"))
    assert isinstance(got, Open)
    assert dict(got.edits.put)["connection"] == "close"
    got = plan("GET", ("Connection", "close"))
    assert isinstance(got, Open)
    assert "connection" not in dict(got.edits.put)


def test_ranges_are_for_get_alone() -> None:
    got = plan("GET", ("Range", "bytes=0-5"), ("If-Range", '"v1"'))
    assert isinstance(got, OpenRange)
    assert got.if_range == '"v1"'
    assert {"range", "if-range"} <= got.edits.drop
    for method, pairs in (("HEAD", []), ("PUT", [("Content-Length", "5")]), ("DELETE", [])):
        other = plan(method, ("Range", "bytes=0-5"), *pairs)
        assert isinstance(other, Going)
        assert not isinstance(other, OpenRange)
        assert "range" in other.edits.drop
    ignored = plan("GET", ("Range", "bytes=0-5,7-9"))
    assert isinstance(ignored, Open)
    assert "range" in ignored.edits.drop


tokens = st.sampled_from(
    ["PUT", "POST", "GET", "HEAD", "DELETE", "OPTIONS", "MKCOL", "PATCH", "COPY", "MERGE", "put", "Ü"]
)
header_names = st.one_of(
    st.sampled_from(
        [
            "Content-Length", "Transfer-Encoding", "Range", "If-Range", "Expect", "Upgrade", "Connection",
            "TE", "Trailer", "Content-Range", "Content-MD5", "Digest", "Content-Digest", "Host",
            "OC-Checksum",
        ]
    ),
    st.text(alphabet="abcXYZ-", min_size=1, max_size=10),
)  # fmt: skip


@given(tokens, st.lists(st.tuples(header_names, st.text(max_size=30)), max_size=8), st.booleans())
def test_whatever_comes_gives_a_plan_and_a_body_is_sealed_or_refused(
    method: str, pairs: list[tuple[str, str]], http2: bool
) -> None:
    got = plan(method, *pairs, http2=http2)
    names = {name.lower() for name, _ in pairs}
    lengths = [value.strip(" \t") for name, value in pairs if name.lower() == "content-length"]
    has_body = "transfer-encoding" in names or any(value not in ("", "0") for value in lengths)
    if has_body and not isinstance(got, Refuse):
        assert isinstance(got, Seal) or all(int(value) == 0 for value in lengths)
    if http2 and not lengths and not isinstance(got, Refuse | Seal):
        assert getattr(got, "body_may_come", False)


# Answers.

OPEN = plan("GET")
FORWARD = plan("DELETE")
RANGED = plan("GET", ("Range", "bytes=0-99"))
ASKED = AskedRange(
    stored=(88, 16488), stored_bytes=sealed_length(50_000), plain=(0, 100), plain_bytes=50_000, pinned=True,
    etag='"v1"',
)  # fmt: skip


def answer(
    request: RequestPlan,
    status: int,
    *pairs: tuple[str, str],
    at: Route | None = None,
    asked: AskedRange | None = None,
) -> object:
    return plan_answer(request, AnswerHead(status=status, fields=fields(*pairs)), at or route(), asked=asked)


@pytest.mark.parametrize("status", [200, 201, 203, 205, 207, 226])
def test_a_successful_read_is_opened(status: int) -> None:
    got = answer(
        OPEN, status, ("Content-Length", str(sealed_length(7))), ("Content-MD5", "x"), ("Digest", "y")
    )
    assert isinstance(got, OpenWhole)
    assert (got.stored_bytes, got.plain_bytes) == (sealed_length(7), 7)
    assert {"content-md5", "digest"} <= got.edits.drop
    assert dict(got.edits.put)["cache-control"] == "private"


@pytest.mark.parametrize("status", [204, 304, 301, 302, 307, 400, 401, 403, 404, 409, 416, 429, 500, 503])
def test_what_is_no_object_passes(status: int) -> None:
    assert isinstance(answer(OPEN, status, ("Content-Length", "5")), Pass)


def test_no_length_of_the_stored_object_stands_in_a_304() -> None:
    got = answer(OPEN, 304, ("Content-Length", "105"))
    assert isinstance(got, Pass)
    assert "content-length" in got.edits.drop


def test_upgrades_and_ranges_nobody_asked_for_are_refused() -> None:
    assert refused(answer(OPEN, 101)) is refusals.UPGRADE
    assert refused(answer(plan("DELETE"), 101)) is refusals.UPGRADE
    assert refused(answer(OPEN, 206, ("Content-Range", "bytes 0-9/104"))) is refusals.UPSTREAM_CHANGED
    assert refused(answer(Refuse(refusal=refusals.INTERNAL), 200)) is refusals.INTERNAL


def test_lengths_no_object_has() -> None:
    got = answer(OPEN, 200, ("Content-Length", "90"))
    assert isinstance(got, OpenWhole)
    assert (got.stored_bytes, got.plain_bytes) == (90, None)
    assert refused(answer(OPEN, 200, ("Content-Length", "0"))) is refusals.OBJECT_INVALID
    assert isinstance(answer(OPEN, 200, ("Content-Length", "0"), at=route(legacy=LegacyPolicy.MIGRATE)), Pass)
    for pairs in ([("Content-Length", "5"), ("Content-Length", "6")], [("Content-Length", "x")]):
        assert refused(answer(OPEN, 200, *pairs)) is refusals.OBJECT_INVALID


def test_a_head_has_the_size_of_the_plaintext() -> None:
    got = answer(plan("HEAD"), 200, ("Content-Length", str(sealed_length(9))), ("Content-MD5", "x"))
    assert isinstance(got, MapSize)
    assert not got.probe
    assert dict(got.edits.put)["content-length"] == "9"
    assert "content-md5" in got.edits.drop
    assert refused(answer(plan("HEAD"), 200, ("Content-Length", "90"))) is refusals.OBJECT_INVALID
    assert isinstance(answer(plan("HEAD"), 200), Pass)
    assert isinstance(answer(plan("HEAD"), 404, ("Content-Length", "90")), Pass)


def test_a_head_of_a_service_that_migrates_is_probed() -> None:
    migrating = route(legacy=LegacyPolicy.MIGRATE)
    got = answer(plan("HEAD"), 200, ("Content-Length", str(sealed_length(9))), at=migrating)
    assert isinstance(got, MapSize)
    assert got.probe
    assert "content-length" not in dict(got.edits.put)
    assert isinstance(answer(plan("HEAD"), 200, ("Content-Length", "90"), at=migrating), Pass)


def part(
    *, where: str = f"bytes 88-16487/{sealed_length(50_000)}", etag: str = '"v1"', length: str = "16400"
) -> object:
    return answer(
        RANGED, 206, ("Content-Range", where), ("ETag", etag), ("Content-Length", length), asked=ASKED
    )


def test_the_part_that_was_asked_for() -> None:
    got = part()
    assert isinstance(got, OpenPart)
    put = dict(got.edits.put)
    assert (put["content-range"], put["content-length"]) == ("bytes 0-99/50000", "100")


@pytest.mark.parametrize(
    "changed",
    [
        {"where": f"bytes 0-16399/{sealed_length(50_000)}"},
        {"where": f"bytes 88-16488/{sealed_length(50_000)}"},
        {"where": "bytes 88-16487/99999"},
        {"where": "bytes 88-16487/*"},
        {"where": ""},
        {"etag": '"v2"'},
        {"length": "16401"},
    ],
)
def test_any_other_part_is_refused(changed: dict[str, str]) -> None:
    assert refused(part(**changed)) is refusals.UPSTREAM_CHANGED


def test_conditions_of_ours_are_not_answered_to_the_client() -> None:
    assert refused(answer(RANGED, 412, asked=ASKED)) is refusals.UPSTREAM_CHANGED
    assert refused(answer(RANGED, 416, asked=ASKED)) is refusals.UPSTREAM_CHANGED
    assert isinstance(answer(OPEN, 412), Pass)
    assert isinstance(answer(RANGED, 200, ("Content-Length", "105"), asked=ASKED), OpenWhole)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "private"),
        ("max-age=60", "max-age=60, private"),
        ("public, max-age=60, s-maxage=600", "max-age=60, private"),
        ("private, no-store", "private, no-store"),
    ],
)
def test_no_shared_cache_keeps_plaintext(before: str, after: str) -> None:
    pairs = [("Cache-Control", before)] if before else []
    got = answer(OPEN, 200, *pairs)
    assert isinstance(got, OpenWhole)
    assert dict(got.edits.put)["cache-control"] == after


@pytest.mark.parametrize(
    ("location", "ours"),
    [
        ("https://s.example/a?b#c", "/a?b#c"),
        ("https://S.EXAMPLE:443/a", "/a"),
        ("//s.example/a", "/a"),
        ("https://s.example", "/"),
        ("https://s.example?x=1", "/?x=1"),
        ("https://s.example//evil.example/", "/evil.example/"),
        ("https://s.example/\\evil.example/", "/evil.example/"),
        ("https://s.example/\t/evil.example/", "/evil.example/"),
        ("https://s.example:8443/a", None),
        ("http://s.example/a", None),
        ("https://evil.example/a", None),
        ("https://s.example.evil.example/", None),
        ("/a", None),
        ("a/b", None),
        ("https://[::1/a", None),
        ("https://s.example:99999/a", None),
    ],
)
def test_in_reverse_mode_the_services_address_becomes_ours(location: str, ours: str | None) -> None:
    for name in ("Location", "Content-Location"):
        got = answer(FORWARD, 302, (name, location), at=route(mode=Mode.REVERSE))
        assert isinstance(got, Pass)
        assert dict(got.edits.put).get(name.lower()) == ours
        got = answer(FORWARD, 302, (name, location))
        assert isinstance(got, Pass)
        assert not got.edits.put


@given(st.text(alphabet="/\\?#@:.\tab", max_size=12))
def test_a_rewritten_location_never_leads_to_another_host(tail: str) -> None:
    got = answer(FORWARD, 302, ("Location", "https://s.example" + tail), at=route(mode=Mode.REVERSE))
    assert isinstance(got, Pass)
    ours = dict(got.edits.put).get("location")
    assert ours is None or (ours.startswith("/") and not ours.startswith(("//", "/\\")))


def test_a_range_of_nothing_brings_nothing() -> None:
    """It was empty when it was looked at: nobody has seen what a service sends in its place by now."""
    nothing = LegacyRange(edits=NO_EDITS, etag=None, pinned=False)
    at = route(legacy=LegacyPolicy.MIGRATE)
    for status, length, passes in ((416, "20", True), (200, "0", True), (206, "0", True), (404, "20", True)):
        got = answer(nothing, status, ("Content-Length", length), at=at)
        assert isinstance(got, Pass) is passes, status
    for fields in ([("Content-Length", "5")], [], [("Content-Length", "5"), ("ETag", '"a"')]):
        got = answer(nothing, 206, ("Content-Range", "bytes 0-4/9"), *fields, at=at)
        assert refused(got) is refusals.UPSTREAM_CHANGED, fields
    assert isinstance(answer(nothing, 200, ("Content-Length", "5"), at=at), OpenWhole)


READS = [OPEN, RANGED, plan("HEAD"), LegacyRange(edits=NO_EDITS, etag='"a"', pinned=True)]


@pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308, 399])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_read_is_led_nowhere_else(status: int, mode: Mode) -> None:
    """Somewhere else nothing is opened: a client would be given ciphertext, with 200."""
    for location in (
        "https://evil.example/a",
        "http://s.example/a",
        "//evil.example/a",
        "https://s.example:8443/a",
        "https://bucket.s.example/a",
        "/\\evil.example/a",
        "https://s.example@evil.example/a",
        "\thttps://evil.example/a",
    ):
        for read in READS:
            got = answer(read, status, ("Location", location), at=route(mode=mode))
            assert refused(got) is refusals.ANSWER_REFUSED, (location, read)
        twice = answer(OPEN, status, ("Location", "/a"), ("Location", location), at=route(mode=mode))
        assert refused(twice) is refusals.ANSWER_REFUSED
    for location in ("/a", "a/b", "?x=1", "https://s.example/a", "https://S.Example:443/a"):
        for read in READS:
            assert isinstance(answer(read, status, ("Location", location), at=route(mode=mode)), Pass)
    for read in READS:
        assert isinstance(answer(read, status), Pass), "S3 has redirects that lead nowhere"


def test_a_page_may_lead_to_where_users_sign_in() -> None:
    at = replace(route(), pages=True)
    assert isinstance(answer(OPEN, 302, ("Location", "https://login.example/"), at=at), Pass)


def test_hosts_below_the_services_own_are_it_where_they_are_led_to_it() -> None:
    for mode, has_subdomains, passes in (
        (Mode.FORWARD, True, True),
        (Mode.FORWARD, False, False),
        (Mode.REVERSE, True, False),
    ):
        at = replace(route(mode=mode), options=S3Options(virtual_hosts=has_subdomains))
        for location in ("https://bucket.s.example/a", "https://a.b.s.example:443/a"):
            got = answer(OPEN, 307, ("Location", location), at=at)
            assert isinstance(got, Pass) is passes
        for location in (
            "https://evils.example/",
            "https://bucket.s.example:444/",
            "http://bucket.s.example/",
            "https://b.s.example.evil.example/",
        ):
            assert isinstance(answer(OPEN, 307, ("Location", location), at=at), Refuse)


def test_there_is_no_way_round_us() -> None:
    got = answer(OPEN, 200, ("Alt-Svc", 'h3=":443"'))
    assert isinstance(got, OpenWhole)
    assert "alt-svc" in got.edits.drop


@given(
    st.integers(200, 599),
    st.lists(
        st.tuples(
            st.sampled_from(["Content-Length", "Content-Range", "ETag", "Location", "Cache-Control"]),
            st.text(max_size=20),
        ),
        max_size=5,
    ),
    st.sampled_from(list(LegacyPolicy)),
)
def test_no_answer_to_a_read_passes_a_success_unopened(
    status: int, pairs: list[tuple[str, str]], legacy: LegacyPolicy
) -> None:
    for request, asked in ((OPEN, None), (RANGED, ASKED), (RANGED, None)):
        got = answer(request, status, *pairs, at=route(mode=Mode.REVERSE, legacy=legacy), asked=asked)
        if isinstance(got, Pass) and 200 <= status < 300 and status != 204:
            assert legacy is LegacyPolicy.MIGRATE  # a stored object of no bytes at all


# Profiles.


def test_profiles_are_found_by_name_and_describe_themselves() -> None:
    for name, profile in PROFILES.items():
        assert profile.name == name
        assert "What stops working" in profile.text()
        assert profile.describe()["limitations"]
    with pytest.raises(UnknownProfileError, match="generic"):
        profile_named("absent")


def test_a_416_says_the_size() -> None:
    assert ("Content-Range", "bytes */7") in RangeRefusal.of(7).headers()
    assert RangeRefusal.of(7).status == 416


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("Refresh", "5; url=https://s.example/next?a=b", "5; url=/next?a=b"),
        ("Refresh", "0;URL='https://s.example:443/next'", "0;URL=/next"),
        ("Refresh", "5", "5"),
        ("Refresh", "5; url=https://other.example/", "5; url=https://other.example/"),
        ("Link", '<https://s.example/a>; rel="next", </b>; rel=x', '</a>; rel="next", </b>; rel=x'),
        ("Link", '<https://other.example/a>; rel="next"', '<https://other.example/a>; rel="next"'),
        ("Set-Cookie", "a=b; Domain=s.example; Path=/; Secure", "a=b; Path=/; Secure"),
        ("Set-Cookie", "a=b; domain=.example", "a=b"),
        ("Set-Cookie", "a=b; Domain=other.example", "a=b; Domain=other.example"),
        ("Set-Cookie", "domain=s.example; Path=/", "domain=s.example; Path=/"),
        ("Set-Cookie", "a=b; Domain=", "a=b; Domain="),
    ],
)
def test_in_reverse_mode_the_service_speaks_of_us(name: str, value: str, ours: str) -> None:
    pairs = ((name, value), (name, "x=y"))
    got = answer(plan("OPTIONS"), 200, *pairs, at=route(mode=Mode.REVERSE))
    assert isinstance(got, Pass)
    assert dict(got.edits.lists) == ({name.lower(): (ours, "x=y")} if ours != value else {})
    got = answer(plan("OPTIONS"), 200, *pairs, at=route(mode=Mode.FORWARD))
    assert isinstance(got, Pass)
    assert got.edits.lists == ()
