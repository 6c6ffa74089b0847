"""Whom a URL in WebDAV's fields names, and what it has to be on the other side."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.keys import NetworkService
from proxy import refusals
from proxy.messages.message import BodyFrame, Fields, Framing, RequestHead
from proxy.plans.request import NO_EDITS, Mode, Request, Route
from proxy.profiles.webdav.addresses import Addresses
from proxy.refusals import Refusal, RefusedError
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream

DAV = "https://dav.example"


def addresses(
    mode: Mode, *fields: tuple[str, str], host: str = "proxy.example:8443", upstream: str = DAV
) -> Addresses:
    head = RequestHead(
        method="MOVE",
        target="/a",
        fields=Fields([(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in fields]),
        host=host,
    )
    service = ServiceEntry(
        owner=NetworkService("acme", "dav"),
        upstream=Upstream.parse(upstream),
        profile="webdav",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    frame = BodyFrame(framing=Framing.NONE)
    return Addresses(Request(head=head, frame=frame, edits=NO_EDITS, route=Route(service=service, mode=mode)))


def destination(mode: Mode, value: str, **given: str) -> str | None:
    return addresses(mode, ("Destination", value), **given).destination()


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        ("https://proxy.example:8443/b%20c/?q#f", "https://dav.example/b%20c/?q#f"),
        ("HTTPS://Proxy.Example:8443/b", "https://dav.example/b"),
        ("http://proxy.example:8443/b", "https://dav.example/b"),  # TLS has ended before us
        ("https://proxy.example:8443", "https://dav.example/"),
        ("https://dav.example/b", "https://dav.example/b"),
        ("https://dav.example:443/b", "https://dav.example/b"),
        ("/b%2F..%2fc", "/b%2F..%2fc"),
    ],
)
def test_in_reverse_mode_a_destination_here_is_one_at_the_service(value: str, becomes: str) -> None:
    assert destination(Mode.REVERSE, value) == becomes


@pytest.mark.parametrize(
    ("host", "value"),
    [
        ("proxy.example", "https://proxy.example/b"),
        ("proxy.example:443", "https://proxy.example/b"),
        ("proxy.example", "https://proxy.example:443/b"),
        ("proxy.example", "http://proxy.example/b"),
        ("[::1]:8443", "https://[::1]:8443/b"),
    ],
)
def test_ports_that_a_scheme_stands_for_may_be_left_out(host: str, value: str) -> None:
    assert destination(Mode.REVERSE, value, host=host) == "https://dav.example/b"


def test_a_service_with_a_port_is_named_with_it() -> None:
    got = destination(Mode.REVERSE, "https://proxy.example:8443/b", upstream="http://127.0.0.1:8080")
    assert got == "http://127.0.0.1:8080/b"


@pytest.mark.parametrize("value", ["https://dav.example/b", "https://DAV.example:443/b", "/b"])
def test_in_forward_mode_nothing_is_rewritten(value: str) -> None:
    assert destination(Mode.FORWARD, value) == value


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    "value",
    [
        "https://other.example/b",
        "https://dav.example.evil.example/b",
        "https://dav.example:8444/b",
        "http://dav.example/b",
        "https://proxy.example:8444/b",
        "https://proxy.example/b",
    ],
)
def test_a_destination_elsewhere_is_refused(mode: Mode, value: str) -> None:
    assert _refused(mode, value) is refusals.FOREIGN_DESTINATION


def test_in_forward_mode_our_own_name_is_elsewhere() -> None:
    assert _refused(Mode.FORWARD, "https://proxy.example:8443/b") is refusals.FOREIGN_DESTINATION


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    "value",
    [
        "",
        "b",
        "//other.example/b",
        "/\\other.example/b",
        "ftp://dav.example/b",
        "https://user@dav.example/b",
        "https://dav.example\\@other.example/b",
        "https:///b",
        "https:dav.example/b",
        "https://dav.example:x/b",
        "https://[dav.example/b",
    ],
)
def test_what_is_no_url_is_refused(mode: Mode, value: str) -> None:
    assert _refused(mode, value) in (refusals.BAD_DESTINATION, refusals.FOREIGN_DESTINATION)


def test_two_destinations_are_refused() -> None:
    both = addresses(Mode.REVERSE, ("Destination", "/a"), ("Destination", "/b"))
    with pytest.raises(RefusedError) as caught:
        both.destination()
    assert caught.value.refusal is refusals.BAD_DESTINATION


def _refused(mode: Mode, value: str) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        destination(mode, value)
    return caught.value.refusal


@given(value=st.text(max_size=80))
def test_a_destination_that_goes_up_names_the_service_or_is_a_path(value: str) -> None:
    try:
        there = destination(Mode.REVERSE, value)
    except RefusedError:
        return
    assert there is not None
    assert there.startswith(("https://dav.example/", "https://dav.example?", "https://dav.example#", "/"))
    assert not there.startswith("//")


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        ("(<urn:uuid:1>)", "(<urn:uuid:1>)"),
        (
            '<https://proxy.example:8443/a> (<urn:x> ["<https://proxy.example:8443/>"]) (Not <DAV:no-lock>)',
            '<https://dav.example/a> (<urn:x> ["<https://proxy.example:8443/>"]) (Not <DAV:no-lock>)',
        ),
        # A state token is any URI: it is no address, and stays.
        ("(<https://proxy.example:8443/token>)", "(<https://proxy.example:8443/token>)"),
        ("</a> (<urn:uuid:1>)", "</a> (<urn:uuid:1>)"),
        ("<https://other.example/a> (<urn:uuid:1>)", "<https://other.example/a> (<urn:uuid:1>)"),
        ('([W/"a)b"]) <http://proxy.example:8443/a>', '([W/"a)b"]) <https://dav.example/a>'),
        ("<", "<"),
        ("))<https://proxy.example:8443/a", "))<https://proxy.example:8443/a"),
    ],
)
def test_resource_tags_of_if_name_the_service(value: str, becomes: str) -> None:
    assert addresses(Mode.REVERSE, ("If", value)).conditions() == becomes
    assert addresses(Mode.FORWARD, ("If", value)).conditions() is None


@given(value=st.text(st.characters(codec="ascii", exclude_characters="\r\n\0"), max_size=60))
def test_whatever_else_if_says_stays_byte_for_byte(value: str) -> None:
    if "proxy.example" not in value:
        assert addresses(Mode.REVERSE, ("If", value)).conditions() == value.strip(" \t")


def test_if_takes_no_longer_for_references_without_an_end() -> None:
    """As many as a head may have: work that grows by their square takes minutes."""
    value = "<" * (256 << 10)
    assert addresses(Mode.REVERSE, ("If", value)).conditions() == value


@pytest.mark.parametrize(
    ("reference", "becomes"),
    [
        ("https://dav.example/a%20b/", "/a%20b/"),
        ("https://dav.example:443/a", "/a"),
        ("https://dav.example", "/"),
        ("/a", None),
        ("https://other.example/a", None),
        ("https://dav.example//other.example/a", None),
        ("urn:uuid:1", None),
    ],
)
def test_what_the_service_says_of_itself_becomes_a_path(reference: str, becomes: str | None) -> None:
    assert addresses(Mode.REVERSE).at_client(reference) == becomes
    assert addresses(Mode.FORWARD).at_client(reference) is None


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("/a%20b", "/a%20b"),
        ("https://dav.example/a", "/a"),
        ("https://other.example/a", None),
        ("//other.example/a", None),
        ("a", None),
        ("/a b", None),
        ("", None),
    ],
)
def test_only_paths_of_the_service_are_asked_for(reference: str, path: str | None) -> None:
    for mode in Mode:
        assert addresses(mode).path_at_service(reference) == path
