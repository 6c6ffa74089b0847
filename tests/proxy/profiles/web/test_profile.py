"""What becomes of a web application's requests and answers, from their heads; a browser judges the rest."""

from dataclasses import replace
from pathlib import Path

import pytest

from envelope.keys import NetworkService
from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import AnswerHead, Fields, RequestHead
from proxy.plans.answer_plan import AnswerPlan, OpenWhole, Pass
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
from proxy.plans.planner import plan_answer, planned
from proxy.plans.request import Mode, Route
from proxy.profiles import profile_named
from proxy.profiles.web.options import WebOptions
from proxy.profiles.web.profile import HELD_LIMIT_BYTES, WebProfile
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream

WEB = profile_named("web")
FORM = (("Content-Type", "multipart/form-data; boundary=abcdefgh"), ("Content-Length", "500"))
JSON = (("Content-Type", "application/json"), ("Content-Length", "5"))
ROUTES = {"PUT /": "seal", "POST /up": "seal", "* /api": "clear", "GET /?zip": "refuse", "* /raw": "refuse"}


def route(mode: Mode = Mode.FORWARD, **options: object) -> Route:
    service = ServiceEntry(
        owner=NetworkService("acme", "app"),
        upstream=Upstream.parse("https://app.example"),
        profile="web",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    return Route(service=service, mode=mode, options=WebOptions.of({"routes": ROUTES} | options), pages=True)


def fields(*pairs: tuple[str, str]) -> Fields:
    return Fields([(name.encode(), value.encode()) for name, value in pairs])


def plan(
    method: str, *pairs: tuple[str, str], target: str = "/f", http2: bool = False, at: Route | None = None
) -> RequestPlan:
    head = RequestHead(method=method, target=target, fields=fields(*pairs), http2=http2, host="proxy.example")
    return planned(head, at or route(), WEB)[1]


def is_refused(got: RequestPlan, refusal: refusals.Refusal = refusals.UNKNOWN_ROUTE) -> bool:
    return isinstance(got, Refuse) and got.refusal is refusal


def test_it_is_the_web_profile() -> None:
    assert isinstance(WEB, WebProfile)
    assert WEB.options is WebOptions


def test_what_is_read_may_be_sealed() -> None:
    assert isinstance(plan("GET"), Open)
    assert isinstance(plan("GET", ("Range", "bytes=1-2")), OpenRange)
    assert isinstance(plan("HEAD"), HeadSize)
    assert is_refused(plan("GET", *JSON))


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("target", ["/f", "/api/x", "/up"])
def test_the_files_of_a_form_are_sealed_wherever_it_goes(method: str, target: str) -> None:
    held = plan(method, *FORM, target=target)
    assert isinstance(held, Converse)
    assert isinstance(held.spool, Reshape)
    assert held.limit_bytes == HELD_LIMIT_BYTES
    for form_length in ("last", "chunked"):
        streamed = plan(method, *FORM, target=target, at=route(form_length=form_length))
        assert isinstance(streamed, Reshape)
    chunked = (FORM[0], ("Transfer-Encoding", "chunked"))
    assert is_refused(plan(method, *chunked, at=route(form_length="last")), refusals.LENGTH_REQUIRED)
    assert is_refused(plan(method, *FORM, target="/raw"))


@pytest.mark.parametrize(
    "kind",
    [
        "Multipart/Form-Data; boundary=abcdefgh",
        "text/plain, multipart/form-data; boundary=abcdefgh",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "x; multipart/form-data; boundary=abcdefgh",
    ],
)
def test_what_a_reader_might_take_for_a_form_is_never_a_command(kind: str) -> None:
    got = plan("POST", ("Content-Type", kind), ("Content-Length", "500"), target="/api")
    assert is_refused(got, refusals.BAD_MESSAGE) or (isinstance(got, Converse) and got.spool is not None)
    assert is_refused(plan("PATCH", ("Content-Type", kind), ("Content-Length", "500"), target="/api"))
    two = plan("POST", *FORM, ("Content-Type", "text/plain"), target="/api")
    assert is_refused(two, refusals.BAD_MESSAGE)


def test_other_bodies_go_by_rules() -> None:
    put = plan("PUT", ("Content-Length", "5"))
    assert isinstance(put, Seal)
    assert ("content-length", str(sealed_length(5))) in put.edits.put
    assert isinstance(plan("PUT", ("Content-Length", "0")), Seal), "an empty file is one"
    assert isinstance(plan("POST", *JSON, target="/up/x"), Seal)
    clear = plan("POST", *JSON, target="/api/login")
    assert isinstance(clear, Converse)
    assert (clear.spool, clear.limit_bytes) == (None, 64 * 1024)
    assert isinstance(plan("PATCH", *JSON, target="/api"), Converse)
    assert isinstance(plan("DELETE", *JSON, target="/api"), Converse)


@pytest.mark.parametrize("kind", ["multipart/mixed; boundary=a", "x, Multipart/related; boundary=abcdefg"])
def test_a_command_is_no_multipart_body(kind: str) -> None:
    """Some readers of forms take any multipart type, and files in it."""
    assert is_refused(plan("POST", ("Content-Type", kind), ("Content-Length", "9"), target="/api/login"))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/f"),
        ("PATCH", "/f"),
        ("DELETE", "/f"),
        ("PATCH", "/up"),
        ("OPTIONS", "/api"),
        ("PROPFIND", "/api"),
        ("MKCOL", "/f"),
        ("POST", "/api/../f"),
        ("POST", "/api//f"),
        ("PUT", "/raw/x"),
    ],
)
def test_what_no_rule_names_is_refused(method: str, target: str) -> None:
    assert is_refused(plan(method, *JSON, target=target))
    assert is_refused(plan(method, ("Transfer-Encoding", "chunked"), target=target))


@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH", "OPTIONS", "PUT"])
def test_a_command_without_a_body_passes(method: str) -> None:
    got = plan(method, ("Content-Length", "0"), target="/x", at=route(routes={}))
    assert isinstance(got, Forward)
    assert not got.body_may_come
    unknown = plan(method, target="/x", http2=True, at=route(routes={}))
    assert isinstance(unknown, Forward)
    assert unknown.body_may_come, "and then not a byte of one"


@pytest.mark.parametrize("method", ["COPY", "MOVE", "PROPFIND", "TRACE", "MKCOL", "get"])
def test_other_methods_are_refused(method: str) -> None:
    assert is_refused(plan(method))
    assert is_refused(plan(method, http2=True))


def test_a_route_may_be_refused_altogether() -> None:
    assert is_refused(plan("GET", target="/d?zip"))
    assert is_refused(plan("DELETE", target="/raw/x"))


def test_chunks_of_a_file_are_refused() -> None:
    assert is_refused(plan("POST", *FORM, ("Content-Range", "bytes 0-1/5")), refusals.PARTIAL_WRITE)
    assert is_refused(plan("POST", *FORM, target="/f?flowTotalChunks=2"), refusals.PARTIAL_WRITE)
    assert is_refused(plan("PUT", *JSON, ("Content-Range", "bytes 0-1/5")), refusals.PARTIAL_WRITE)


def test_in_reverse_mode_the_application_sees_its_own_origin() -> None:
    origin = ("Origin", "https://proxy.example")
    for body in (FORM, JSON):
        got = plan("POST", *body, origin, target="/api", at=route(Mode.REVERSE))
        assert isinstance(got, Going)
        assert ("origin", "https://app.example") in got.edits.put


# Answers.


def answered(
    method: str, status: int, *pairs: tuple[str, str], target: str = "/f", at: Route | None = None
) -> AnswerPlan:
    where = at or route()
    head = RequestHead(method=method, target=target, fields=fields())
    request, going = planned(head, where, WEB)
    assert isinstance(going, Going)
    answer = AnswerHead(status=status, fields=fields(*pairs))
    return WEB.plan_answer(request, going, answer, plan_answer(going, answer, where))


def test_what_is_read_may_be_a_page() -> None:
    page = answered("GET", 200, ("Content-Type", "text/html"), ("Content-Length", "500"))
    assert isinstance(page, OpenWhole)
    assert not page.must_be_sealed
    assert isinstance(answered("GET", 404, ("Content-Type", "text/html")), Pass)


@pytest.mark.parametrize("kind", ["application/zip", "Application/X-Tar; x=y", "application/gzip"])
def test_an_archive_has_to_be_sealed_itself(kind: str) -> None:
    got = answered("GET", 200, ("Content-Type", kind), ("Content-Length", "500"))
    assert isinstance(got, OpenWhole)
    assert got.must_be_sealed
    post = answered("POST", 200, ("Content-Type", kind))
    assert isinstance(post, Refuse)
    assert post.refusal is refusals.NOT_SEALED
    passing = route(archives="pass")
    assert isinstance(answered("POST", 200, ("Content-Type", kind), at=passing), Pass)
    page = answered("GET", 200, ("Content-Type", kind), at=passing)
    assert isinstance(page, OpenWhole)
    assert not page.must_be_sealed
    assert isinstance(answered("GET", 404, ("Content-Type", kind)), Pass)


def test_where_only_files_lie_there_are_no_pages() -> None:
    strict = replace(route(), pages=False)
    got = answered("GET", 200, ("Content-Length", "0"), at=strict)
    assert isinstance(got, Refuse)
    assert got.refusal is refusals.OBJECT_INVALID
    assert isinstance(answered("GET", 200, ("Content-Length", "0")), Pass)


def test_who_asks_for_a_document_gets_one() -> None:
    head = RequestHead(method="GET", target="/", fields=fields(("Accept", "text/html,*/*;q=0.8")))
    shaped = WEB.shape(refusals.KEY_EXPIRED, head)
    assert shaped is not None
    assert shaped.content_type == "text/html; charset=utf-8"
    assert b"key-expired" in shaped.body
    script = RequestHead(method="GET", target="/", fields=fields(("Sec-Fetch-Dest", "empty")))
    assert WEB.shape(refusals.KEY_EXPIRED, script) is None
