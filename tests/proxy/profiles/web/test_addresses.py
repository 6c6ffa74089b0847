"""As whose origin a browser's request arrives at the application, in reverse mode."""

from pathlib import Path

import pytest

from envelope.keys import NetworkService
from proxy.messages.message import AnswerHead, BodyFrame, Fields, Framing, RequestHead
from proxy.plans.request import NO_EDITS, Mode, Request, Route
from proxy.profiles.web.addresses import at_client, at_service
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream

APP = "https://app.example"


def request(
    *fields: tuple[str, str],
    mode: Mode = Mode.REVERSE,
    host: str = "proxy.example:8443",
    upstream: str = APP,
) -> Request:
    service = ServiceEntry(
        owner=NetworkService("acme", "app"),
        upstream=Upstream.parse(upstream),
        profile="web",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    given = Fields([(name.encode(), value.encode()) for name, value in fields])
    head = RequestHead(method="POST", target="/", fields=given, host=host)
    frame = BodyFrame(framing=Framing.NONE)
    return Request(head=head, frame=frame, edits=NO_EDITS, route=Route(service=service, mode=mode))


def answer(*values: str) -> AnswerHead:
    fields = Fields([(b"Access-Control-Allow-Origin", value.encode()) for value in values])
    return AnswerHead(status=200, fields=fields)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("proxy.example:8443", "https://proxy.example:8443"),
        ("proxy.example:8443", "HTTPS://Proxy.Example.:8443"),
        ("proxy.example", "https://proxy.example"),
        ("proxy.example", "https://proxy.example:443"),
        ("proxy.example:443", "https://proxy.example"),
        ("proxy.example", "http://proxy.example"),  # TLS has ended before us
        ("[::1]:8443", "https://[::1]:8443"),
    ],
)
def test_ours_becomes_the_services(host: str, origin: str) -> None:
    assert at_service(request(("Origin", origin), host=host)) == (("origin", APP),)


def test_a_service_with_a_port_is_named_with_it() -> None:
    given = (("Origin", "https://proxy.example:8443"), ("Referer", "https://proxy.example:8443/a/?b#c"))
    assert at_service(request(*given, upstream="http://127.0.0.1:8080")) == (
        ("origin", "http://127.0.0.1:8080"),
        ("referer", "http://127.0.0.1:8080/a/?b#c"),
    )


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "https://proxy.example",
        "https://proxy.example:8444",
        "https://proxy.example.evil.example:8443",
        "https://evil.example/https://proxy.example:8443",
        "https://proxy.example:8443@evil.example",
        "https://evil.example\\@proxy.example:8443",
        "ftp://proxy.example:8443",
        "https://proxy.example:x",
        "https://",
        "null",
        "",
    ],
)
def test_anybody_else_stays_who_it_is(origin: str) -> None:
    assert at_service(request(("Origin", origin), ("Referer", origin))) == ()


def test_two_origins_stay() -> None:
    both = (("Origin", "https://proxy.example:8443"), ("Origin", "https://proxy.example:8443"))
    assert at_service(request(*both)) == ()


def test_in_forward_mode_nothing_changes() -> None:
    ours = request(("Origin", "https://proxy.example:8443"), mode=Mode.FORWARD)
    assert at_service(ours) == ()
    assert at_client(ours, answer(APP)) == ()


def test_an_answer_for_the_services_own_origin_is_for_ours() -> None:
    origin = "https://proxy.example:8443"
    ours = request(("Origin", origin))
    assert at_client(ours, answer(APP)) == (("access-control-allow-origin", origin),)
    assert at_client(ours, answer("*")) == ()
    assert at_client(ours, answer("https://other.example")) == ()
    assert at_client(ours, answer(APP, APP)) == ()
    assert at_client(ours, answer()) == ()


def test_no_answer_is_opened_to_another_origin() -> None:
    for origin in ("https://evil.example", "null"):
        assert at_client(request(("Origin", origin)), answer(APP)) == ()
    assert at_client(request(), answer(APP)) == ()
