"""What becomes of each request, from its head alone, and of the head of its answer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.errors import FormatError
from envelope.objects import sealed_length
from proxy import refusals
from proxy.asking import Outgoing
from proxy.messages.message import AnswerHead, Fields, RequestHead
from proxy.plans.answer_plan import AnswerPlan, MapBody, OpenPart, Pass
from proxy.plans.plan import (
    Converse,
    Forward,
    Going,
    HeadSize,
    Open,
    OpenRange,
    Refuse,
    RequestPlan,
    Reshape,
    Seal,
)
from proxy.plans.planner import plan_answer, plan_request, request_of
from proxy.plans.request import Edits, Mode, Route
from proxy.profiles import PROFILES
from proxy.profiles.s3.options import S3Options
from proxy.profiles.s3.profile import S3Profile
from proxy.profiles.s3.routes import ROUTES
from proxy.profiles.s3.signing import Resigner, Unchanged
from proxy.refusals import Refusal, RefusedError
from proxy.tenants.model import Listen
from tests.fakes.clock import ManualClock
from tests.proxy.profiles.s3.s3_signer import ACCESS_KEY, SECRET, head, presign, sign
from tests.proxy.profiles.s3.test_authentication import NOW_S, credential
from tests.proxy.profiles.s3.test_bodies import service

HEX = "0123456789abcdef0123456789abcdef"
PROFILE = S3Profile(ManualClock())
ENTRY = replace(service(), credentials={ACCESS_KEY: credential()})


def route(*, mode: Mode = Mode.FORWARD, **options: Any) -> Route:
    entry = replace(ENTRY, reverse_listen=Listen("127.0.0.1", 8443))
    return Route(service=entry, mode=mode, options=S3Options.of(options))


def planned(request: RequestHead, to: Route | None = None) -> RequestPlan:
    return PROFILE.plan(request_of(request, to or route(), now_s=NOW_S))


def refused(request: RequestHead, to: Route | None = None) -> Refusal:
    try:
        plan = planned(request, to)
    except RefusedError as error:
        return error.refusal
    assert isinstance(plan, Refuse), plan
    return plan.refusal


def put(*, fields: Mapping[str, str] | None = None, target: str = "/b/k") -> RequestHead:
    given = {"content-length": "20000", **(fields or {})}
    own = {name: value for name, value in given.items() if name.startswith("x-amz-")}
    rest = {name: value for name, value in given.items() if name not in own}
    return sign("PUT", target, now_s=NOW_S, body_hash="UNSIGNED-PAYLOAD", headers=own, unsigned=rest)


def get(target: str, **fields: str) -> RequestHead:
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return sign("GET", target, now_s=NOW_S, unsigned=named)


def put_of(plan: Any, name: str) -> str | None:
    return dict(plan.edits.put).get(name)


def test_a_write_is_sealed_and_signed_anew() -> None:
    plan = planned(put(fields={"content-md5": "A" * 22 + "==", "x-amz-meta-a": "b", "x-amz-acl": "private"}))
    assert isinstance(plan, Seal)
    assert isinstance(plan.sign, Resigner)
    assert (plan.plain_bytes, put_of(plan, "content-length")) == (20_000, str(sealed_length(20_000)))
    assert {"content-md5", "transfer-encoding"} <= plan.edits.drop
    assert not {"x-amz-meta-a", "x-amz-acl"} & plan.edits.drop
    assert plan.decoder is not None


def test_large_objects_by_arithmetic() -> None:
    """5 GiB is what the service takes at once: of ciphertext."""
    most = 5_363_471_256
    assert sealed_length(most) == 5 << 30
    plan = planned(put(fields={"content-length": str(most)}))
    assert put_of(plan, "content-length") == str(5 << 30)
    beyond = planned(put(fields={"content-length": str(1 << 40)}))
    assert put_of(beyond, "content-length") == str(sealed_length(1 << 40))


def test_reads() -> None:
    whole = planned(get("/b/k", if_none_match=f'"{HEX}-1", "{HEX}-3"'))
    assert isinstance(whole, Open)
    assert put_of(whole, "if-none-match") == f'"{HEX}", "{HEX}-3"'
    part = planned(get("/b/k", range="bytes=5-9", if_range=f'"{HEX}-1"'))
    assert isinstance(part, OpenRange)
    assert part.if_range == f'"{HEX}"'
    assert {"range", "if-range"} <= part.edits.drop
    assert isinstance(planned(get("/b/k", range="bytes=0-1,5-6")), Open), "several: the whole, as S3 does"
    assert isinstance(planned(replace(sign("HEAD", "/b/k", now_s=NOW_S))), HeadSize)
    assert isinstance(planned(get("/b/k?partNumber=1")), Converse)
    assert refused(get("/b/k?partNumber=0")) == refusals.PART_NOT_THERE


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        ("GET", "/", Forward),
        ("PUT", "/b", Converse),
        ("GET", "/b?list-type=2&prefix=a", Forward),
        ("GET", "/b?versions", Forward),
        ("DELETE", "/b/k?versionId=1", Forward),
        ("POST", "/b?delete", Converse),
        ("PUT", "/b/k?tagging", Converse),
        ("GET", "/b/k?attributes", Forward),
        ("POST", "/b/k?uploads", Forward),
        ("PUT", "/b/k?partNumber=1&uploadId=u", Seal),
        ("POST", "/b/k?uploadId=u", Converse),
        ("DELETE", "/b/k?uploadId=u", Converse),
        ("GET", "/b/k?uploadId=u", Converse),
    ],
)
def test_every_operation_has_its_plan(method: str, target: str, kind: type[Going]) -> None:
    unsigned = {"content-length": str(6 << 20)} if method == "PUT" and "partNumber" in target else {}
    payload = {"body_hash": "UNSIGNED-PAYLOAD"} if unsigned else {}
    plan = planned(sign(method, target, now_s=NOW_S, unsigned=unsigned, **payload))  # type: ignore[arg-type]
    assert isinstance(plan, kind)
    assert isinstance(plan.sign, Resigner)


def test_no_plan_that_goes_on_lacks_a_signer() -> None:
    """Whatever leaves is signed anew or is as it was signed: Host, too, is the signer's to set."""
    for method, level, subresource in ROUTES:
        target = {"service": "/", "bucket": "/b", "object": "/b/k"}[level.value]
        target += f"?{subresource}" if subresource else ""
        target = target.replace("list-type", "list-type=2").replace("uploadId", "uploadId=u&partNumber=1")
        for request in (
            sign(method, target, now_s=NOW_S, unsigned={"content-length": "0"}),
            head(method, target, {"content-length": "0"}),
        ):
            try:
                plan = planned(request)
            except RefusedError:
                continue
            assert isinstance(plan, Refuse) or (isinstance(plan, Going) and plan.sign is not None), target
    preflight = planned(head("OPTIONS", "/b/k", {"origin": "https://a.example"}))
    assert isinstance(preflight, Forward)
    assert isinstance(preflight.sign, Unchanged)


def test_bodies_where_there_are_none() -> None:
    for method, target in (
        ("GET", "/b/k"),
        ("DELETE", "/b/k"),
        ("HEAD", "/b"),
        ("GET", "/b?acl"),
        ("OPTIONS", "/b"),
    ):
        request = sign(
            method, target, now_s=NOW_S, body_hash="UNSIGNED-PAYLOAD", unsigned={"content-length": "5"}
        )
        assert refused(request) == refusals.UNKNOWN_ROUTE, (method, target)


def test_who_is_let_in() -> None:
    stranger = sign("GET", "/b/k", now_s=NOW_S, access_key="SOMEBODY")
    plan = planned(stranger)
    assert isinstance(plan, Open)
    assert isinstance(plan.sign, Unchanged)
    assert refused(stranger, route(unknown_keys="refuse")) == refusals.ACCESS_KEY_UNKNOWN
    nobody = head("GET", "/b/k", {})
    assert isinstance(planned(nobody), Open)
    assert refused(nobody, route(anonymous="refuse")) == refusals.ANONYMOUS
    assert refused(sign("GET", "/b/k", now_s=NOW_S, secret=SECRET + "x")) == refusals.SIGNATURE_MISMATCH
    # Who sends a form signs the form: post_form.py judges it by the same options.
    form = head("POST", "/b", {"content-type": "multipart/form-data; boundary=abcdef", "content-length": "9"})
    assert isinstance(planned(form, route(anonymous="refuse")), Reshape)
    # A wrong signature is told before a wrong operation.
    assert refused(sign("PATCH", "/b/k", now_s=NOW_S, secret="wrong-one")) == refusals.SIGNATURE_MISMATCH


def leaving(plan: RequestPlan, request: RequestHead) -> Outgoing:
    assert isinstance(plan, Going)
    assert plan.sign is not None
    fields = [
        (name.encode(), value.encode()) for name in request.fields for value in request.fields.all(name)
    ]
    return plan.sign(
        Outgoing(method=request.method, target=plan.target or request.target, fields=tuple(fields))
    )


@pytest.mark.parametrize(
    ("host", "to", "expected"),
    [
        ("s3.example.com", route(), "s3.example.com"),
        ("b.s3.example.com", route(), "b.s3.example.com"),
        ("b.s3.example.com", route(virtual_hosts=False), "s3.example.com"),
        ("b.own.corp:8443", route(mode=Mode.REVERSE, hosts=["own.corp"]), "b.s3.example.com"),
        ("own.corp:8443", route(mode=Mode.REVERSE, hosts=["own.corp"]), "s3.example.com"),
        ("b.s3.example.com", route(mode=Mode.REVERSE), "b.s3.example.com"),
        ("127.0.0.1:8443", route(mode=Mode.REVERSE), "s3.example.com"),
        ("localhost:8443", route(mode=Mode.REVERSE), "s3.example.com"),
    ],
)
def test_the_bucket_stays_where_the_client_had_it(host: str, to: Route, expected: str) -> None:
    request = sign("GET", "/k", now_s=NOW_S, host=host)
    made = leaving(planned(request, to), request)
    assert Fields(made.fields).all("host") == [expected]
    assert made.target == "/k"


def reverse(listen: str = "127.0.0.1:8443", names: frozenset[str] = frozenset(), **options: Any) -> Route:
    entry = replace(ENTRY, reverse_listen=Listen.parse(listen), reverse_names=names)
    return Route(service=entry, mode=Mode.REVERSE, options=S3Options.of(options))


@pytest.mark.parametrize(
    ("host", "to"),
    [
        ("bucket.s3.corp", reverse()),
        ("s3.corp", reverse()),
        ("bucket.localhost", reverse()),
        ("evil-s3.corp", reverse(names=frozenset({"s3.corp"}))),
        (".s3.corp", reverse(names=frozenset({"s3.corp"}))),
        ("bucket.other.corp", reverse(hosts=["s3.corp"])),
        ("evils3.example.com", reverse()),
        ("10.0.0.6", reverse("10.0.0.5:443")),
        ("bucket.10.0.0.5", reverse("10.0.0.5:443")),
        ("localhost", reverse("10.0.0.5:443")),
        ("10.0.0.5", reverse("localhost:443")),
        ("", reverse()),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_a_host_that_is_not_ours_is_refused_before_anything_is_read_into_it(
    host: str, to: Route, method: str
) -> None:
    """Read as path style, a key would be a bucket's name; and the signature is for somebody else's name."""
    assert refused(sign(method, "/k", now_s=NOW_S, host=host), to) == refusals.UNKNOWN_HOST


@pytest.mark.parametrize(
    ("host", "to", "bucket"),
    [
        ("s3.corp:8443", reverse(names=frozenset({"s3.corp"})), "s3.example.com"),
        ("bucket.s3.corp", reverse(names=frozenset({"s3.corp"})), "bucket.s3.example.com"),
        ("s3.corp", reverse(hosts=["corp", "s3.corp"]), "s3.example.com"),
        ("b.s3.corp", reverse(hosts=["corp", "s3.corp"]), "b.s3.example.com"),
        ("10.0.0.5:9", reverse("10.0.0.5:443"), "s3.example.com"),
        ("10.0.0.5", reverse("0.0.0.0:443"), "s3.example.com"),
        ("[::1]:8443", reverse("[::1]:443"), "s3.example.com"),
        ("[::1]:8443", reverse("localhost:443"), "s3.example.com"),
    ],
)
def test_hosts_that_are_ours(host: str, to: Route, bucket: str) -> None:
    request = sign("GET", "/k/k", now_s=NOW_S, host=host)
    assert Fields(leaving(planned(request, to), request).fields).all("host") == [bucket]


@pytest.mark.parametrize(
    "crc32", ["x-amz-checksum-crc32", "X-Amz-Checksum-Crc32", "x%2Damz%2dchecksum-crc32"]
)
@pytest.mark.parametrize("target", ["/b/k?", "/b/k?partNumber=1&uploadId=u&"])
def test_checksums_that_a_presigner_put_into_the_query(crc32: str, target: str) -> None:
    md5 = "x-amz-meta-md5chksum=abc"
    url = presign("PUT", f"{target}{crc32}=AAAAAA%3D%3D&x-amz-meta-a=b&{md5}", now_s=NOW_S)
    for length in (6 << 20, 0):
        fields = Fields([(b"host", url.host.encode()), (b"content-length", str(length).encode())])
        plan = planned(replace(url, fields=fields))
        seal = plan.spool if isinstance(plan, Converse) else plan
        assert isinstance(seal, Seal)
        assert seal.decoder is not None
        made = leaving(plan, replace(url, fields=fields))
        assert made.target == f"{target}x-amz-meta-a=b"
        assert not any(name.lower().startswith(b"x-amz-checksum") for name, _ in made.fields)
        assert seal.decoder().finish() == b"", "the CRC-32 of nothing is zero"
        wrong = seal.decoder()
        wrong.feed(b"x")
        with pytest.raises(RefusedError, match="bad-digest"):
            wrong.finish()
    kept = planned(url, route(metadata_digests="keep"))
    assert leaving(kept, url).target == f"{target}x-amz-meta-a=b&{md5}"


def test_checksums_in_a_query_that_cannot_be_signed_anew_do_not_go_up() -> None:
    url = presign("PUT", "/b/k?x-amz-checksum-crc32=AAAAAA%3D%3D", now_s=NOW_S)
    for target, code in (
        (url.target.replace(quote(ACCESS_KEY, safe=""), "SOMEBODY"), "cannot-sign-anew"),
        ("/b/k?x-amz-checksum-crc32=AAAAAA%3D%3D", None),
    ):
        request = head("PUT", target, {"content-length": "0"})
        if code is None:
            assert leaving(planned(request), request).target == "/b/k"
            continue
        with pytest.raises(RefusedError, match=code):
            leaving(planned(request), request)
    mode = head("GET", url.target.replace(quote(ACCESS_KEY, safe=""), "SOMEBODY"), {})
    assert leaving(planned(mode), mode).target == mode.target, "a read goes on as it was signed"


@pytest.mark.parametrize(
    "query",
    ["x-amz-copy-source=/b/o", "X-Amz-Write-Offset-Bytes=5", "x-amz-mp-object-size=5", "x-amz-unknown=1"],
)
def test_what_would_make_another_request_of_it_is_refused_in_the_query(query: str) -> None:
    url = presign("PUT", f"/b/k?{query}", now_s=NOW_S)
    assert refused(url) == refusals.UNKNOWN_ROUTE


@pytest.mark.parametrize(
    "query",
    [
        "partNumber=1&partNumber=2&uploadId=u",
        "uploadId=u&partNumber=1&upload%49d=v",
        "acl&acl",
        "x-id=a&x-id=b",
    ],
)
def test_a_parameter_that_two_readers_could_read_differently_is_refused(query: str) -> None:
    assert refused(sign("PUT", f"/b/k?{query}", now_s=NOW_S)) == refusals.BAD_MESSAGE


def test_a_presigned_signature_goes_whatever_way_its_names_are_written() -> None:
    url = presign("GET", "/b/k?x-id=GetObject", now_s=NOW_S)
    spelled = replace(url, target=url.target.replace("X-Amz-Date", "X%2DAmz%2dDate"))
    assert leaving(planned(spelled), spelled).target == "/b/k?x-id=GetObject"
    twice = replace(url, target=url.target + "&X%2DAmz-Date=20260101T000000Z")
    assert refused(twice) == refusals.AUTHORIZATION_MALFORMED


def test_digests_in_metadata() -> None:
    fields = {"x-amz-meta-md5chksum": "abc", "x-amz-meta-mtime": "1"}
    stripped = planned(put(fields=fields))
    assert isinstance(stripped, Seal)
    assert "x-amz-meta-md5chksum" in stripped.edits.drop
    kept = planned(put(fields=fields), route(metadata_digests="keep"))
    assert put_of(kept, "x-amz-meta-md5chksum") == "abc"


def test_objects_that_are_to_be_locked_take_a_checksum_along() -> None:
    lock = {"x-amz-object-lock-mode": "GOVERNANCE"}
    plan = planned(put(fields=lock))
    assert isinstance(plan, Reshape)
    assert isinstance(plan.sign, Resigner)
    assert plan.sign.payload == "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    assert isinstance(planned(put(), route(trailing_checksums=True)), Reshape)
    stranger = sign(
        "PUT", "/b/k", now_s=NOW_S, access_key="SOMEBODY", body_hash="UNSIGNED-PAYLOAD", headers=lock,
        unsigned={"content-length": "5"},
    )  # fmt: skip
    assert isinstance(planned(stranger), Seal)


# ---- answers


def answered(
    request: RequestHead, status: int, fields: Mapping[str, str], to: Route | None = None
) -> AnswerPlan:
    to = to or route()
    asked = request_of(request, to, now_s=NOW_S)
    plan = PROFILE.plan(asked)
    assert isinstance(plan, Going)
    head_ = AnswerHead(status=status, fields=Fields([(n.encode(), v.encode()) for n, v in fields.items()]))
    proposed = plan_answer(plan, head_, to)
    return PROFILE.plan_answer(asked, plan, head_, proposed)


def test_tags_are_mapped_and_digests_dropped_in_every_answer() -> None:
    of_object = {"etag": f'"{HEX}"', "x-amz-checksum-crc32": "AAAA", "content-length": "1104"}
    for request, status in (
        (put(), 200),
        (get("/b/k"), 200),
        (get("/b/k"), 304),
        (sign("HEAD", "/b/k", now_s=NOW_S), 200),
    ):
        plan = answered(request, status, of_object)
        assert not isinstance(plan, Refuse)
        assert dict(plan.edits.put)["etag"] == f'"{HEX}-1"'
        assert "x-amz-checksum-crc32" in plan.edits.drop
    assert isinstance(answered(get("/b?list-type=2"), 200, {}), Pass)


def test_lists_are_rewritten_and_errors_are_not() -> None:
    for target in ("/b", "/b?list-type=2", "/b?versions", "/b/k?attributes"):
        listed = answered(get(target), 200, {"content-type": "application/xml"})
        assert isinstance(listed, Pass)
        assert isinstance(listed.body, MapBody)
        failed = answered(get(target), 404, {})
        assert isinstance(failed, Pass)
        assert failed.body is None


def test_composites_are_told_by_their_tag() -> None:
    request = request_of(sign("HEAD", "/b/k", now_s=NOW_S), route(), now_s=NOW_S)

    def answer(etag: str) -> AnswerHead:
        return AnswerHead(status=200, fields=Fields([(b"etag", etag.encode())]))

    assert PROFILE.may_be_composite(request, answer(f'"{HEX}-2"'))
    assert not PROFILE.may_be_composite(request, answer(f'"{HEX}"'))


@pytest.mark.parametrize(
    ("location", "passes"),
    [
        ("https://s3.example.com/b/k", True),
        ("https://b.s3.example.com/k", True),
        ("/b/k", True),
        ("https://s3.eu-west-1.example.com/b/k", False),
        ("http://s3.example.com/b/k", False),
        ("//evil.example/b", False),
        ("https://s3.example.com.evil.example/", False),
        ("https://[", False),
    ],
)
def test_redirects_stay_here(location: str, passes: bool) -> None:
    for status in (301, 302, 307):
        plan = answered(get("/b/k"), status, {"location": location})
        assert isinstance(plan, Refuse) is not passes, plan


def test_folder_markers_that_others_made() -> None:
    fields = {"content-length": "0", "etag": f'"{HEX}"'}
    for request in (get("/b/folder/"), sign("HEAD", "/b/folder/", now_s=NOW_S)):
        assert isinstance(answered(request, 200, fields), Pass)
    for request in (get("/b/file"), sign("HEAD", "/b/file", now_s=NOW_S)):
        assert isinstance(answered(request, 200, fields), Refuse), "an empty object is stored as 104 bytes"
    assert not isinstance(answered(get("/b/folder/"), 200, {"content-length": "104"}), Pass)
    part = answered(get("/b/folder/", range="bytes=0-"), 200, fields)
    assert isinstance(part, Refuse)
    assert ("Content-Range", "bytes */0") in part.refusal.headers()


def test_refusals_are_s3s() -> None:
    made = PROFILE.shape(refusals.BAD_DIGEST, head("PUT", "/b/k", {}))
    assert made is not None
    assert made.content_type == "application/xml"
    assert b"<Code>BadDigest</Code>" in made.body


# ---- the profile itself


def test_it_is_registered_and_says_what_it_does() -> None:
    assert isinstance(PROFILES["s3"], S3Profile)
    text = PROFILE.text()
    for word in ("PutObject", "hex-1", "virtual_hosts", "partNumber", "Select"):
        assert word in text


@pytest.mark.parametrize(
    "options",
    [
        {"unknown": 1},
        {"unknown_keys": "maybe"},
        {"hosts": ["Not A Host"]},
        {"region": ""},
        {"max_parts": 1},
        {"min_part_bytes": 0},
        {"virtual_hosts": "yes"},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        S3Options.of(options)
    assert msgspec.structs.asdict(S3Options.of({}))["virtual_hosts"] is True


def test_edits_of_opened_ranges_are_kept() -> None:
    """What the planner has decided of an opened body is not undone."""
    asked = request_of(get("/b/k", range="bytes=0-9"), route(), now_s=NOW_S)
    plan = PROFILE.plan(asked)
    assert isinstance(plan, Going)
    answer = AnswerHead(status=206, fields=Fields([(b"etag", f'"{HEX}"'.encode())]))
    proposed = OpenPart(edits=Edits(drop=frozenset({"x"}), put=(("content-length", "10"),)))
    made = PROFILE.plan_answer(asked, plan, answer, proposed)
    assert isinstance(made, OpenPart)
    assert "x" in made.edits.drop
    assert ("content-length", "10") in made.edits.put


NAMES = st.sampled_from(
    [
        "authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-copy-source", "x-amz-trailer",
        "content-md5", "x-amz-decoded-content-length", "content-encoding", "content-length", "range",
        "transfer-encoding", "if-match", "x-amz-checksum-crc32", "x-amz-meta-md5", "x-amz-security-token",
        "x-amz-object-lock-mode",
    ]
)  # fmt: skip
VALUES = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "5", "0", "chunked", "aws-chunked", "UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
            "AWS4-HMAC-SHA256 Credential=a/20270115/r/s3/aws4_request,SignedHeaders=h,Signature=" + "0" * 64,
            "x-amz-checksum-crc32", "/bucket/key", f'"{HEX}-1"', "bytes=0-1", "20270115T080000Z",
        ]
    ),
)  # fmt: skip
TARGETS = st.one_of(
    st.text(alphabet="/?&=%.+abAB12\u00e4", max_size=40).map(lambda text: "/" + text),
    st.sampled_from(
        ["/", "/b", "/b/k", "/b/k?uploadId=u&partNumber=1", "/b/k?uploads", "/b?delete", "/b?list-type=2",
         "/b/k?X-Amz-Signature=1&X-Amz-Credential=x", "/b/k?partNumber=x&uploadId=", "/b/k?attributes"]
    ),
)  # fmt: skip


@given(
    st.sampled_from(["GET", "PUT", "POST", "HEAD", "DELETE", "OPTIONS", "PATCH"]),
    TARGETS,
    st.dictionaries(NAMES, VALUES, max_size=6),
    st.booleans(),
)
def test_whatever_a_client_sends_is_planned_or_refused(
    method: str, target: str, fields: dict[str, str], http2: bool
) -> None:
    raw = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in fields.items()]
    request = RequestHead(
        method=method, target=target, fields=Fields(raw), host="s3.example.com", http2=http2
    )
    plan = plan_request(request, route(), PROFILE)
    assert isinstance(plan, Refuse | Going)
    if isinstance(plan, Seal | Reshape):
        assert plan.sign is not None


@pytest.mark.parametrize("target", ["/b%2Fk", "/b%2fk", "/b%2Fk?acl", "/b%2fk/more"])
def test_a_bucket_that_a_service_could_take_for_an_object_is_refused(target: str) -> None:
    assert refused(put(target=target)) is refusals.BAD_MESSAGE


@pytest.mark.parametrize("name", ["x-amz-object-lock-mode", "X-Amz-Acl", "x-amz-meta-a"])
def test_what_was_signed_is_not_taken_away_by_connection(name: str) -> None:
    request = put(fields={name.lower(): "x", "connection": f"keep-alive, {name}"})
    assert refused(request) is refusals.BAD_MESSAGE
    assert isinstance(planned(put(fields={"connection": "keep-alive"})), Seal)
