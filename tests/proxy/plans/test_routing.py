"""Whose connection is it, and where may it go."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envelope.keys import NetworkService
from proxy import refusals
from proxy.plans.request import Mode, Route
from proxy.plans.routing import Routing, Wanted, managed_hosts
from proxy.refusals import Refusal, RefusedError
from proxy.tenants.model import (
    ANY_NAME,
    CertificateFiles,
    Directory,
    LegacyPolicy,
    Listen,
    ServiceEntry,
    TenantEntry,
    Upstream,
)
from tests import pki

ACME, BETA = "regular@127.0.0.1:8001", "regular@::1:8002"
FILES = "reverse:https://files.example:443@127.0.0.1:8003"
SIDECAR = "reverse:http://127.0.0.1:9000@127.0.0.1:8004"


def tenant(name: str, listen: Listen, tunnels: frozenset[str] = frozenset()) -> TenantEntry:
    return TenantEntry(
        tenant=name,
        root_certificate=pki.make_tenant(name).root.certificate,
        forward_listen=listen,
        tunnel_hosts=tunnels,
        interception_ca=CertificateFiles(certificate_file=Path("/unused"), key_file=Path("/unused")),
    )


def service(owner: str, upstream: str, listen: Listen | None) -> ServiceEntry:
    return ServiceEntry(
        owner=NetworkService.parse(owner),
        upstream=Upstream.parse(upstream),
        profile="generic",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=listen,
        certificate=None,
        key_file=Path("/unused"),
    )


@pytest.fixture(scope="module")
def routing() -> Routing:
    return Routing(
        Directory.of(
            1,
            [
                tenant("acme", Listen("127.0.0.1", 8001), frozenset({"*.news.example", "files.example"})),
                tenant("beta", Listen("::1", 8002)),
            ],
            [
                service("acme/files", "https://files.example", Listen("127.0.0.1", 8003)),
                service("acme/sidecar", "http://127.0.0.1:9000", Listen("127.0.0.1", 8004)),
                service("beta/files", "https://files.example:8443", None),
            ],
        )
    )


def wanted(
    host: str = "files.example",
    port: int = 443,
    *,
    scheme: str = "https",
    names: tuple[str, ...] = ("files.example",),
    server_name: str | None = "files.example",
    connected: tuple[str, int] | None = ("files.example", 443),
) -> Wanted:
    return Wanted(
        scheme=scheme, host=host, port=port, names=names, server_name=server_name, connected=connected
    )


def refused(routing: Routing, spec: str, what: Wanted) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        routing.route(spec, what)
    return caught.value.refusal


def test_listeners_are_spelt_for_the_engine(routing: Routing) -> None:
    assert set(routing.listeners) == {ACME, BETA, FILES, SIDECAR}
    assert routing.listener(BETA).tenant().tenant == "beta"
    with pytest.raises(RefusedError):
        routing.listener("regular@127.0.0.1:1")


def test_forward_by_connect(routing: Routing) -> None:
    expected = Route(service=routing.directory.services[NetworkService("acme", "files")], mode=Mode.FORWARD)
    assert routing.route(ACME, wanted()) == expected
    assert routing.route(ACME, wanted(names=("FILES.example.", "files.example:443"))) == expected
    assert routing.route(ACME, wanted(server_name=None)) == expected
    assert routing.route(ACME, wanted(names=())) == expected


@pytest.mark.parametrize(
    "what",
    [
        wanted(names=("other.example",)),
        wanted(names=("files.example:8443",)),
        wanted(names=("files.example", "other.example")),
        wanted(server_name="other.example"),
        wanted(connected=("other.example", 443)),
        wanted(connected=("files.example", 444)),
    ],
)
def test_names_that_disagree(routing: Routing, what: Wanted) -> None:
    assert refused(routing, ACME, what) is refusals.HOST_MISMATCH


@pytest.mark.parametrize(
    "name", ["fi les.example", "files.example:", "files.example:+443", "[::1", "a" * 300]
)
def test_names_that_are_none(routing: Routing, name: str) -> None:
    assert refused(routing, ACME, wanted(names=(name,))) is refusals.BAD_MESSAGE


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (ACME, wanted("other.example")),
        (ACME, wanted(port=8443)),  # the other tenant's
        (ACME, wanted(scheme="http")),
        (ACME, wanted(connected=None)),  # absolute form, in the clear to us
        (BETA, wanted()),
        ("regular@127.0.0.1:1", wanted()),
    ],
)
def test_what_is_not_this_tenants(routing: Routing, spec: str, what: Wanted) -> None:
    assert refused(routing, spec, what) is refusals.UNMANAGED_HOST


def test_plain_http_in_absolute_form_to_a_sidecar(routing: Routing) -> None:
    what = wanted(
        "127.0.0.1", 9000, scheme="http", names=("127.0.0.1:9000",), server_name=None, connected=None
    )
    assert routing.route(ACME, what).service.owner.service == "sidecar"
    what = wanted("127.0.0.1", 9000, scheme="http", names=("127.0.0.1",), server_name=None, connected=None)
    assert refused(routing, ACME, what) is refusals.HOST_MISMATCH


def test_reverse_goes_where_the_listener_leads_whatever_the_names(routing: Routing) -> None:
    got = routing.route(FILES, wanted(names=("public.example",), server_name=None, connected=None))
    assert (got.service.owner.service, got.mode) == ("files", Mode.REVERSE)
    assert refused(routing, FILES, wanted("127.0.0.1", 9000)) is refusals.INTERNAL


def test_connect(routing: Routing) -> None:
    routing.check_connect(ACME, "files.example", 443)
    routing.check_connect(ACME, "www.news.example", 443)
    routing.check_connect(BETA, "files.example", 8443)
    for spec, host, port in (
        (ACME, "files.example", 444),  # a managed host at another port, though on the list
        (ACME, "news.example", 443),
        (ACME, "evil.example", 443),
        (ACME, "bad host", 443),
        (BETA, "files.example", 443),
        (BETA, "www.news.example", 443),
        (FILES, "files.example", 443),
    ):
        with pytest.raises(RefusedError):
            routing.check_connect(spec, host, port)


def test_only_what_is_listed_is_tunnelled(routing: Routing) -> None:
    def tunnels(spec: str, host: str, server_name: str | None, port: int = 443) -> bool:
        return routing.tunnels(spec, host=host, port=port, server_name=server_name)

    assert tunnels(ACME, "www.news.example", "www.news.example")
    assert tunnels(ACME, "www.news.example", "img.news.example")
    assert not tunnels(ACME, "www.news.example", None)
    assert not tunnels(ACME, "www.news.example", "evil.example")
    assert not tunnels(ACME, "www.news.example", "files.example")
    assert not tunnels(ACME, "evil.example", "www.news.example")
    assert not tunnels(ACME, "files.example", "files.example")
    assert not tunnels(ACME, "files.example", "files.example", port=444)
    assert not tunnels(BETA, "www.news.example", "www.news.example")
    assert not tunnels(FILES, "files.example", "www.news.example")


def test_sockets_are_opened_to_known_addresses_only(routing: Routing) -> None:
    for spec, host, port in (
        (ACME, "files.example", 443),
        (ACME, "127.0.0.1", 9000),
        (ACME, "www.news.example", 443),
        (FILES, "files.example", 443),
    ):
        assert routing.may_connect(spec, host, port)
    for spec, host, port in (
        (ACME, "files.example", 8443),
        (ACME, "evil.example", 443),
        (ACME, "bad host", 443),
        (FILES, "127.0.0.1", 9000),
        (BETA, "files.example", 443),
        ("regular@127.0.0.1:1", "files.example", 443),
    ):
        assert not routing.may_connect(spec, host, port)


def test_tenants_that_share_a_listener_are_asked_for_by_name() -> None:
    listen = Listen("127.0.0.1", 8001)
    acme, beta = (
        service("acme/files", "https://files.example", None),
        service("beta/mail", "https://mail.example", None),
    )
    routing = Routing(Directory.of(1, [tenant("acme", listen), tenant("beta", listen)], [acme, beta]))
    assert list(routing.listeners) == [ACME]
    assert routing.route(ACME, wanted(), tenant="acme").service is acme
    for name in (None, "beta", "gamma"):
        with pytest.raises(RefusedError) as caught:
            routing.route(ACME, wanted(), tenant=name)
        assert caught.value.refusal is refusals.UNMANAGED_HOST
    routing.check_connect(ACME, "files.example", 443, tenant="acme")
    for name in (None, "beta", "gamma"):
        with pytest.raises(RefusedError):
            routing.check_connect(ACME, "files.example", 443, tenant=name)
        assert not routing.may_connect(ACME, "files.example", 443, tenant=name)
    assert routing.may_connect(ACME, "mail.example", 443, tenant="beta")
    listener = routing.listener(ACME)
    assert listener.sole is None
    assert listener.holder() is None
    assert listener.holder("acme") != listener.holder("beta") != listener.holder("gamma") is None


# Names below a service's own: S3's buckets.


@pytest.fixture(scope="module")
def buckets() -> Routing:
    def s3(owner: str, upstream: str, **options: object) -> ServiceEntry:
        return replace(service(owner, upstream, None), profile="s3", profile_options=options)

    return Routing(
        Directory.of(
            1,
            [
                tenant("acme", Listen("127.0.0.1", 8001), frozenset({"*.s3.example", "*.news.example"})),
                tenant("beta", Listen("::1", 8002)),
            ],
            [
                s3("acme/s3", "https://s3.example"),
                s3("acme/eu", "https://eu.s3.example"),
                s3("acme/plain", "https://plain.example", virtual_hosts=False),
                service("acme/files", "https://files.example", None),
            ],
        )
    )


def bucket(name: str, **other: Any) -> Wanted:
    return wanted(name, names=(name,), server_name=name, connected=(name, 443), **other)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("s3.example", "acme/s3"),
        ("bucket.s3.example", "acme/s3"),
        ("my.own.bucket.s3.example", "acme/s3"),
        ("Bucket.S3.example.", "acme/s3"),
        ("eu.s3.example", "acme/eu"),
        ("bucket.eu.s3.example", "acme/eu"),
    ],
)
def test_names_below_a_services_own_lead_to_it(buckets: Routing, name: str, owner: str) -> None:
    buckets.check_connect(ACME, name, 443)
    route = buckets.route(ACME, bucket(name))
    assert route.service.owner == NetworkService.parse(owner)
    assert not buckets.tunnels(ACME, name, 443, name), "though a tunnel rule matches"


@pytest.mark.parametrize(
    "name", ["nots3.example", "b.files.example", "b.plain.example", "s3.example.evil.example", ".s3.example"]
)
def test_names_that_are_not_below(buckets: Routing, name: str) -> None:
    with pytest.raises(RefusedError):
        buckets.route(ACME, bucket(name))
    with pytest.raises(RefusedError):
        buckets.check_connect(ACME, name, 443)


def test_another_bucket_or_port_or_tenant_is_refused(buckets: Routing) -> None:
    one = bucket("one.s3.example")
    for what in (
        replace(one, names=("two.s3.example",)),
        replace(one, server_name="two.s3.example"),
        replace(one, server_name="s3.example"),
        replace(one, names=("s3.example",)),
        replace(one, names=("one.s3.example:8443",)),
    ):
        assert refused(buckets, ACME, what) is refusals.HOST_MISMATCH
    assert refused(buckets, ACME, replace(one, port=444)) is refusals.UNMANAGED_HOST
    assert refused(buckets, BETA, one) is refusals.UNMANAGED_HOST
    assert not buckets.tunnels(ACME, "one.s3.example", 8443, "one.s3.example"), "at any port"


def test_connections_go_to_the_service_itself(buckets: Routing) -> None:
    assert buckets.may_connect(ACME, "s3.example", 443)
    assert not buckets.may_connect(ACME, "one.s3.example", 443)


def test_hosts_for_a_pac_file(buckets: Routing) -> None:
    assert managed_hosts(buckets.directory, "acme") == [
        "*.eu.s3.example", "*.s3.example", "eu.s3.example", "files.example", "plain.example", "s3.example",
    ]  # fmt: skip
    assert managed_hosts(buckets.directory, "beta") == []


@pytest.mark.parametrize(
    ("host", "is_served"),
    [
        (None, True),
        ("files.example", True),
        ("localhost", True),
        ("b.files.example", False),
        ("xfiles.example", False),
        ("example", False),
        ("bank.example", False),
    ],
)
def test_a_reverse_listener_has_its_own_names(routing: Routing, host: str | None, is_served: bool) -> None:
    entry = routing.directory.services[NetworkService.parse("acme/files")]
    assert routing.is_served_as(entry, host) is is_served
    assert routing.is_served_as(replace(entry, reverse_names=frozenset({ANY_NAME})), host)
    listed = replace(entry, reverse_names=frozenset({"bank.example"}))
    assert routing.is_served_as(listed, host) is (host == "bank.example")


def test_a_reverse_listener_has_the_name_that_it_listens_at_and_no_other_loopback_name() -> None:
    named = service("acme/named", "https://files.example", Listen("localhost", 8003))
    elsewhere = service("acme/elsewhere", "https://other.example", Listen("10.0.0.5", 8003))
    routing = Routing(Directory.of(1, [tenant("acme", Listen("127.0.0.1", 8001))], [named, elsewhere]))
    assert routing.is_served_as(named, "localhost")
    assert not routing.is_served_as(elsewhere, "localhost")
    assert routing.is_served_as(elsewhere, "10.0.0.5")
    for nowhere in (
        service("acme/gone", "https://files.example", Listen("127.0.0.1", 8003)),
        replace(named, reverse_listen=None),
    ):
        assert not routing.is_served_as(nowhere, "files.example")


def test_names_of_buckets_are_names_of_their_service() -> None:
    s3 = replace(
        service("acme/s3", "https://s3.example", Listen("10.0.0.5", 8003)),
        profile="s3",
        profile_options={"hosts": ["s3.corp.example"]},
    )
    routing = Routing(Directory.of(1, [tenant("acme", Listen("127.0.0.1", 8001))], [s3]))
    for host in ("s3.example", "b.s3.example", "s3.corp.example", "b.s3.corp.example"):
        assert routing.is_served_as(s3, host)
    for host in ("a.b.s3.example", "corp.example", "b.corp.example"):
        assert not routing.is_served_as(s3, host)
