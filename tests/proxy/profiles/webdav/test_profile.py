"""What becomes of each method, from its head alone; real servers judge the rest (tests/integration)."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from envelope.keys import NetworkService
from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import AnswerHead, Fields, RequestHead
from proxy.plans.answer_plan import AnswerPlan, MapBody, MapWhole, Pass
from proxy.plans.plan import Converse, Forward, Going, HeadSize, Open, OpenRange, Refuse, RequestPlan, Seal
from proxy.plans.planner import plan_answer, planned
from proxy.plans.request import Mode, Route
from proxy.profiles import profile_named
from proxy.profiles.webdav.profile import Asked, WebDavOptions, WebDavProfile
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream

DAV = profile_named("webdav")
XML = (("Content-Length", "10"), ("Content-Type", "application/xml"))


def route(mode: Mode = Mode.FORWARD) -> Route:
    service = ServiceEntry(
        owner=NetworkService("acme", "dav"),
        upstream=Upstream.parse("https://dav.example"),
        profile="webdav",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    return Route(service=service, mode=mode)


def fields(*pairs: tuple[str, str]) -> Fields:
    return Fields([(name.encode(), value.encode()) for name, value in pairs])


def plan(
    method: str, *pairs: tuple[str, str], target: str = "/f", mode: Mode = Mode.FORWARD, http2: bool = False
) -> RequestPlan:
    head = RequestHead(method=method, target=target, fields=fields(*pairs), http2=http2, host="proxy.example")
    return planned(head, route(mode), DAV)[1]


def test_it_is_the_webdav_profile() -> None:
    assert isinstance(DAV, WebDavProfile)


def test_content_is_sealed_and_opened() -> None:
    put = plan("PUT", ("Content-Length", "5"))
    assert isinstance(put, Seal)
    assert ("content-length", str(sealed_length(5))) in put.edits.put
    assert isinstance(plan("PUT", ("Transfer-Encoding", "chunked")), Seal)
    assert isinstance(plan("GET"), Open)
    assert isinstance(plan("GET", ("Range", "bytes=1-2")), OpenRange)
    assert isinstance(plan("HEAD"), HeadSize)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_collection_is_no_object(method: str) -> None:
    got = plan(method, ("Range", "bytes=0-1"), target="/c/?sort=name")
    assert isinstance(got, Forward)
    assert "range" in got.edits.drop
    assert isinstance(plan("GET", target="/c?x=/"), Open)
    head = RequestHead(method=method, target="/c/", fields=fields())
    request, _ = planned(head, route(), DAV)
    for kind, status, passes in (
        ("text/html; charset=utf-8", 200, True),
        ("httpd/unix-directory", 200, True),
        ("application/pdf", 200, False),
        ("application/pdf", 404, True),
    ):
        answer = AnswerHead(status=status, fields=fields(("Content-Type", kind)))
        judged = DAV.plan_answer(request, got, answer, plan_answer(got, answer, route()))
        if passes or method == "HEAD":
            assert isinstance(judged, Pass)
            assert judged.may_be_sealed is (status == 404)
        else:
            assert judged == Refuse(refusal=refusals.NOT_SEALED)


def test_index_pages_can_be_refused() -> None:
    options = WebDavOptions.of({"index_pages": False})
    head = RequestHead(method="GET", target="/c/", fields=fields())
    _, got = planned(head, replace(route(), options=options), DAV)
    assert isinstance(got, Open)


@pytest.mark.parametrize(
    "method", ["COPY", "DELETE", "LOCK", "MKCOL", "MOVE", "OPTIONS", "PROPFIND", "UNLOCK"]
)
@pytest.mark.parametrize("empty", [(), (("Content-Length", "0"),)])
def test_commands_without_a_body_pass(method: str, empty: tuple[tuple[str, str], ...]) -> None:
    assert isinstance(plan(method, *empty), Forward)


@pytest.mark.parametrize("method", ["ACL", "LOCK", "MKCOL", "PROPFIND", "PROPPATCH", "REPORT", "SEARCH"])
def test_documents_are_read_before_they_pass(method: str) -> None:
    got = plan(method, *XML)
    assert isinstance(got, Converse)
    assert got.limit_bytes <= 1024 * 1024
    assert isinstance(plan(method, ("Transfer-Encoding", "chunked")), Converse)
    assert isinstance(plan(method, http2=True), Converse)  # a body may come, or none


@pytest.mark.parametrize(
    "method", ["COPY", "DELETE", "MOVE", "OPTIONS", "UNLOCK", "GET", "POST", "BIND", "put"]
)
def test_a_body_that_no_rule_knows_is_refused(method: str) -> None:
    got = plan(method, *XML)
    assert got == Refuse(refusal=refusals.UNKNOWN_ROUTE)


@pytest.mark.parametrize(
    "method", ["POST", "PROPPATCH", "REPORT", "VERSION-CONTROL", "CHECKOUT", "TRACE", "X"]
)
def test_a_command_that_no_rule_knows_is_refused(method: str) -> None:
    assert plan(method) == Refuse(refusal=refusals.UNKNOWN_ROUTE)


@pytest.mark.parametrize(
    "part", [("Content-Range", "bytes 0-1/5"), ("OC-Chunked", "1"), ("X-Update-Range", "append")]
)
def test_writing_a_part_is_refused(part: tuple[str, str]) -> None:
    assert plan("PUT", ("Content-Length", "2"), part) == Refuse(refusal=refusals.PARTIAL_WRITE)
    assert plan("PATCH", *XML) == Refuse(refusal=refusals.PARTIAL_WRITE)


@pytest.mark.parametrize("method", ["COPY", "MOVE", "PUT", "MKCOL", "PROPFIND"])
def test_addresses_are_rewritten_on_whatever_goes_up(method: str) -> None:
    got = plan(
        method,
        ("Destination", "https://proxy.example/b"),
        ("If", "<https://proxy.example/b> (<urn:x>)"),
        mode=Mode.REVERSE,
    )
    assert isinstance(got, Going)
    assert ("destination", "https://dav.example/b") in got.edits.put
    assert ("if", "<https://dav.example/b> (<urn:x>)") in got.edits.put


@pytest.mark.parametrize("method", ["COPY", "MOVE"])
def test_a_destination_elsewhere_is_refused(method: str) -> None:
    got = plan(method, ("Destination", "https://other.example/b"))
    assert isinstance(got, Refuse)
    assert (got.refusal.code, got.refusal.status) == ("foreign-destination", 502)


def answered(method: str, status: int, *pairs: tuple[str, str], mode: Mode = Mode.FORWARD) -> AnswerPlan:
    head = RequestHead(method=method, target="/f", fields=fields(), host="proxy.example")
    request, _ = planned(head, route(mode), DAV)
    going = Forward(edits=request.edits, memo=None)
    answer = AnswerHead(status=status, fields=fields(*pairs))
    return DAV.plan_answer(request, going, answer, plan_answer(going, answer, request.route))


@pytest.mark.parametrize("method", ["PROPFIND", "REPORT", "SEARCH"])
def test_lists_are_rewritten_whatever_their_type_is_said_to_be(method: str) -> None:
    for kind in ("application/xml", "text/xml; charset=utf-8", "text/plain"):
        got = answered(method, 207, ("Content-Type", kind))
        assert isinstance(got, Pass)
        assert isinstance(got.body, MapBody)
    coded = answered(method, 207, ("Content-Type", "text/xml"), ("Content-Encoding", "gzip"))
    assert coded == Refuse(refusal=refusals.SERVICE_ANSWER)


def test_other_answers_are_rewritten_in_reverse_mode_only() -> None:
    kind = ("Content-Type", "application/xml")
    for method, status in (("PROPPATCH", 207), ("DELETE", 207), ("MOVE", 423), ("PROPFIND", 403)):
        forward = answered(method, status, kind)
        assert isinstance(forward, Pass)
        assert forward.body is None
        reverse = answered(method, status, kind, mode=Mode.REVERSE)
        assert isinstance(reverse, Pass)
        assert isinstance(reverse.body, MapBody)
        html = answered(method, status, ("Content-Type", "text/html"), mode=Mode.REVERSE)
        assert isinstance(html, Pass)
        assert html.body is None


def test_a_lock_that_made_something_is_seen_to() -> None:
    head = RequestHead(method="LOCK", target="/f", fields=fields(), host="proxy.example")
    request, _ = planned(head, route(), DAV)
    for asked, status, is_seen_to in (
        (Asked(), 201, True),
        (Asked(was_absent=True), 200, True),
        (Asked(), 200, False),
        (None, 200, False),
        (Asked(was_absent=True), 423, False),
    ):
        going = Forward(edits=request.edits, memo=asked)
        answer = AnswerHead(status=status, fields=fields(("Content-Type", "application/xml")))
        got = DAV.plan_answer(request, going, answer, plan_answer(going, answer, request.route))
        assert isinstance(got, Pass)
        assert isinstance(got.body, MapWhole) is is_seen_to


def test_refusals_are_in_xml_that_clients_show() -> None:
    head = RequestHead(method="PUT", target="/f", fields=fields())
    shaped = DAV.shape(refusals.NO_ACTIVE_KEY, head)
    assert shaped is not None
    root = ET.fromstring(shaped.body)
    assert root.tag == "{DAV:}error"
    assert root.findtext("{http://sabredav.org/ns}exception") == "sealgate: no-active-key"
    assert refusals.NO_ACTIVE_KEY.cause in (root.findtext("{http://sabredav.org/ns}message") or "")
