"""The words of the directory and its look-ups."""

import dataclasses
from pathlib import Path

import pytest

from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy.tenants.model import (
    ANY_NAME,
    CertificateFiles,
    Directory,
    LegacyPolicy,
    Listen,
    ServiceEntry,
    TenantEntry,
    TunnelRule,
    Upstream,
    normal_host,
)
from tests.pki import make_tenant


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8080", Listen("127.0.0.1", 8080)),
        ("[::1]:1", Listen("::1", 1)),
        ("localhost:65535", Listen("localhost", 65535)),
    ],
)
def test_listen_round_trip(text: str, expected: Listen) -> None:
    assert Listen.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "8080", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80", "example.com:80",
     "127.0.0.1:8o", "127.0.0.1:٣"],
)  # fmt: skip
def test_listen_refuses(text: str) -> None:
    with pytest.raises(FormatError):
        Listen.parse(text)


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("0.0.0.0:80", "127.0.0.1:80", True),
        ("[::]:80", "127.0.0.1:80", True),
        ("localhost:80", "127.0.0.1:80", True),
        ("localhost:80", "[::1]:80", True),
        ("127.0.0.1:80", "127.0.0.1:81", False),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("localhost:80", "10.0.0.1:80", False),
    ],
)
def test_listeners_clash(one: str, other: str, clash: bool) -> None:
    assert Listen.parse(one).clashes_with(Listen.parse(other)) is clash
    assert Listen.parse(other).clashes_with(Listen.parse(one)) is clash


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://Drive.Example.COM", Upstream("https", "drive.example.com", 443)),
        ("https://drive.example.com.:8443/", Upstream("https", "drive.example.com", 8443)),
        ("http://127.0.0.1:8081", Upstream("http", "127.0.0.1", 8081)),
        ("https://[2001:DB8::1]", Upstream("https", "2001:db8::1", 443)),
    ],
)
def test_upstream(text: str, expected: Upstream) -> None:
    assert Upstream.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "drive.example.com", "ftp://a.b", "https://", "https://a.b/path", "https://u:p@a.b", "https://a.b?x",
     "https://a.b#x", "http://drive.example.com", "https://a.b:99999", "https://a b", "https://*.a.b", "https://-a.b"],
)  # fmt: skip
def test_upstream_refuses(text: str) -> None:
    with pytest.raises(FormatError):
        Upstream.parse(text)


def test_tunnel_rules() -> None:
    assert TunnelRule.parse("Login.Example.com").matches("login.example.com")
    assert not TunnelRule.parse("login.example.com").matches("xlogin.example.com")
    wild = TunnelRule.parse("*.example.com")
    assert wild.matches("a.example.com")
    assert wild.matches("b.a.example.com")
    assert not wild.matches("example.com")
    assert not wild.matches("badexample.com")
    for text in ("*", "*.com", "a.*.com", "", "**.example.com"):
        with pytest.raises(FormatError):
            TunnelRule.parse(text)


def test_hosts_have_one_form() -> None:
    assert normal_host("EXAMPLE.com.") == "example.com"
    assert normal_host("[2001:0db8::0001]") == "2001:db8::1"
    for text in ("", ".", "a..b", "a_b", "exa mple", "ünicode.example", "a" * 64 + ".com"):
        with pytest.raises(FormatError):
            normal_host(text)


def test_look_ups_stay_within_the_tenant() -> None:
    files = CertificateFiles(certificate_file=Path("/x"), key_file=Path("/y"))
    tenants = [
        TenantEntry(
            tenant=name,
            root_certificate=make_tenant(name).root.certificate,
            forward_listen=Listen("127.0.0.1", port),
            tunnel_hosts=frozenset({"*.sso.example"}),
            interception_ca=files,
        )
        for name, port in (("acme", 1001), ("globex", 1002))
    ]
    drive = ServiceEntry(
        owner=NetworkService("acme", "drive"),
        upstream=Upstream("https", "drive.example.com", 443),
        profile="generic",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=Listen("127.0.0.1", 2001),
        certificate=make_tenant("acme").service("drive").certificate,
        key_file=Path("/k"),
    )
    directory = Directory.of(3, tenants, [drive])
    assert directory.service_for_host("acme", "DRIVE.example.com.", 443) is drive
    assert directory.service_for_host("globex", "drive.example.com", 443) is None
    assert directory.service_for_host("acme", "drive.example.com", 8443) is None
    assert directory.service_for_host("acme", "not a host", 443) is None
    assert directory.tenants_of_listener(Listen("127.0.0.1", 1002)) == (tenants[1],)
    assert directory.tenants_of_listener(Listen("127.0.0.1", 2001)) == (tenants[0],)
    assert directory.tenants_of_listener(Listen("127.0.0.1", 9)) == ()
    assert directory.service_of_listener(Listen("127.0.0.1", 2001)) is drive
    assert directory.recipient_of_certificate(bytes(32)) is None
    assert directory.services_of("globex") == []
    assert tenants[0].tunnels("A.SSO.example")
    assert not tenants[0].tunnels("drive.example.com")


def test_names_in_reverse_mode() -> None:
    entry = ServiceEntry(
        owner=NetworkService("acme", "drive"),
        upstream=Upstream("https", "drive.example.com", 443),
        profile="generic",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=Listen("127.0.0.1", 2001),
        certificate=None,
        key_file=Path("/k"),
        reverse_names=frozenset({"files.acme.example", "*.s3.acme.example"}),
    )
    for host in ("files.acme.example", "bucket.s3.acme.example"):
        assert entry.is_named(host)
    for other in (None, "other.example", "s3.acme.example", "xfiles.acme.example"):
        assert not entry.is_named(other)
        assert not dataclasses.replace(entry, reverse_names=frozenset()).is_named(other)
        assert dataclasses.replace(entry, reverse_names=frozenset({ANY_NAME})).is_named(other)
