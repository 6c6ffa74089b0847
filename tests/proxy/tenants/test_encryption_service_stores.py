"""Provisioning of the encryption service: on SQLite, and what the database itself does on PostgreSQL too."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import create_engine, text

from envelope.certificates import CertificateError
from envelope.errors import FormatError
from envelope.keys import KeyUse, NetworkService, SigningAlgorithm
from proxy.encryption_service.access import Access
from proxy.encryption_service.call import Peer
from proxy.encryption_service.credentials import FILE_KEY_DIRECTORY, SecretSealer, new_bearer
from proxy.encryption_service.errors import NotAuthenticated
from proxy.encryption_service.model import (
    OPERATIONS_OF,
    DialectName,
    DialectSettings,
    KaclsEndpoint,
    KaclsSettings,
    NativeSettings,
    Op,
    TokenIssuer,
    TransitMount,
    TransitSettings,
    XksSettings,
    XksStore,
)
from proxy.tenants import migrations
from proxy.tenants.certificates import read_private_key
from proxy.tenants.credential_store import (
    Grant,
    Issued,
    issue_credential,
    revoke_credential,
    rotate_credential,
    rotate_file_key,
)
from proxy.tenants.dialect_store import set_dialect
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import ChangeRefusedError, DirectoryUnavailableError, NotThereError
from proxy.tenants.model import Upstream
from proxy.tenants.named_key_store import add_key, remove_key, set_blocked
from proxy.tenants.network_service_store import add_service, remove_service, update_service
from proxy.tenants.recipient_store import certificate_request, import_certificate, renew_key
from proxy.tenants.tenant_store import add_tenant, remove_tenant
from tests.pki import Tenant
from tests.proxy.tenants.places import BOTH, Place, make_place, never_answers, sign

ACTOR = "tester"
ORDERS = NetworkService("acme", "orders")
SIGNER = NetworkService("acme", "signer")
PEER = Peer(address="127.0.0.1")
NATIVE, TRANSIT, XKS, KACLS = DialectName.NATIVE, DialectName.TRANSIT, DialectName.XKS, DialectName.KACLS
ISSUER = TokenIssuer(issuer="https://idp.example", jwks_url="https://idp.example/jwks", audience="kacls")


on_both = pytest.mark.parametrize("place", BOTH, indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with make_place(getattr(request, "param", "sqlite"), tmp_path) as place:
        yield place


@pytest.fixture
def provisioned(store: DirectoryStore, acme: Tenant, globex: Tenant) -> DirectoryStore:
    """Two tenants, one with a key."""
    for tenant in (acme, globex):
        add_tenant(store, tenant.name, tenant.root.certificate, actor=ACTOR)
    add_key(store, ORDERS, actor=ACTOR)
    return store


def xks(*prefixes: str, key: str = "orders") -> XksSettings:
    return XksSettings(stores=tuple(XksStore(prefix=prefix, keys={"key-1": key}) for prefix in prefixes))


def kacls(url: str = "https://kacls.example/kacls/acme", **more: Any) -> KaclsSettings:
    settings = {"wrapping_key": "orders", "authentication_issuers": (ISSUER,), **more}
    return KaclsSettings(endpoints=(KaclsEndpoint(url=url, **settings),))


def refused(attempt: Callable[[], object], store: DirectoryStore) -> str:
    """Why; nothing has changed, and there is a next step."""
    before = store.revision()
    with pytest.raises(ChangeRefusedError) as caught:
        attempt()
    assert store.revision() == before
    assert caught.value.next_step
    return str(caught.value)


@on_both
def test_what_was_not_answered_has_its_files(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    with place.open() as cut, pytest.raises(DirectoryUnavailableError, match="may have been kept"):
        add_tenant(never_answers(cut), acme.name, acme.root.certificate, actor=ACTOR)
    authority = store.snapshot().tenants[acme.name].interception_ca
    read_private_key(authority.key_file)
    assert authority.certificate_file.exists()
    files = place.files()
    refused(lambda: add_tenant(store, acme.name, acme.root.certificate, actor=ACTOR), store)
    assert place.files() == files, "what is refused leaves none"


# Named keys.


@on_both
def test_a_named_key_whose_file_is_lost_is_made_anew_by_a_command_of_keys(
    store: DirectoryStore, provisioned: DirectoryStore, acme: Tenant
) -> None:
    certificate = sign(acme, certificate_request(provisioned, ORDERS))
    store.newest_key_file(ORDERS).unlink()
    for attempt in (
        lambda: certificate_request(store, ORDERS),
        lambda: import_certificate(store, ORDERS, certificate, actor=ACTOR),
    ):
        assert refused_next(attempt) == "make a new key by `sealgate key renew acme/orders`"


@on_both
def test_a_named_key_is_a_recipient_without_an_upstream(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore, acme: Tenant
) -> None:
    csr = add_key(
        provisioned,
        SIGNER,
        actor=ACTOR,
        use=KeyUse.SIGN,
        algorithm=SigningAlgorithm.ES256,
        operations=frozenset({Op.SIGN}),
    )
    with pytest.raises(CertificateError):
        import_certificate(store, SIGNER, sign(acme, certificate_request(store, ORDERS)), actor=ACTOR)
    certificate = sign(acme, csr)
    import_certificate(store, SIGNER, certificate, actor=ACTOR)
    with place.open() as again:
        directory = again.snapshot()
        key = directory.encryption_service.keys[SIGNER]
        assert (key.use, key.algorithm) == (KeyUse.SIGN, SigningAlgorithm.ES256)
        assert key.operations == frozenset({Op.SIGN})
        assert (key.blocked, key.certificate) == (False, certificate)
        assert key.created_at_s == int(place.clock.wall_s())
        assert read_private_key(key.key_file).public_key() == certificate.public_key()
        assert directory.services == {}
        assert directory.recipients_of("acme") == [directory.encryption_service.keys[ORDERS], key]
        assert directory.recipient_of_certificate(certificate.fingerprint(SHA256())) is key
        assert certificate_request(store, SIGNER).public_key() == certificate.public_key()
        orders = directory.encryption_service.keys[ORDERS]
        assert (orders.use, orders.algorithm, orders.operations) == (
            KeyUse.DATA,
            None,
            OPERATIONS_OF[KeyUse.DATA],
        )


def test_a_key_is_renewed_like_a_service(
    store: DirectoryStore, provisioned: DirectoryStore, acme: Tenant
) -> None:
    csr = certificate_request(store, ORDERS)
    import_certificate(store, ORDERS, sign(acme, csr), actor=ACTOR)
    renewed = renew_key(store, ORDERS, actor=ACTOR)
    assert renewed.public_key() != csr.public_key()
    entry = import_certificate(store, ORDERS, sign(acme, renewed), actor=ACTOR)
    assert entry.certificate is not None
    assert entry.certificate.public_key() == renewed.public_key()


@pytest.mark.parametrize(
    ("use", "algorithm", "operations"),
    [
        (KeyUse.SIGN, None, None),
        (KeyUse.DATA, SigningAlgorithm.ES256, None),
        (KeyUse.DATA, None, frozenset({Op.SIGN})),
        (KeyUse.SIGN, SigningAlgorithm.ES256, frozenset({Op.SIGN, Op.ENCRYPT})),
        (KeyUse.DATA, None, frozenset[Op]()),
    ],
)
def test_use_algorithm_and_operations_fit(
    store: DirectoryStore,
    provisioned: DirectoryStore,
    use: KeyUse,
    algorithm: SigningAlgorithm | None,
    operations: frozenset[Op] | None,
) -> None:
    refused(
        lambda: add_key(
            provisioned, SIGNER, actor=ACTOR, use=use, algorithm=algorithm, operations=operations
        ),
        store,
    )


def test_names_are_shared_with_services(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    upstream = Upstream.parse("https://drive.example")
    drive = NetworkService("acme", "drive")
    add_service(store, drive, upstream, actor=ACTOR)
    files = place.files()
    refused(lambda: add_key(provisioned, drive, actor=ACTOR), store)
    refused(lambda: add_key(provisioned, ORDERS, actor=ACTOR), store)
    refused(lambda: add_key(provisioned, NetworkService("nobody", "x"), actor=ACTOR), store)
    refused(lambda: add_service(store, ORDERS, Upstream.parse("https://x.example"), actor=ACTOR), store)
    with pytest.raises(NotThereError):
        remove_service(store, ORDERS, actor=ACTOR)
    with pytest.raises(NotThereError):
        update_service(store, ORDERS, actor=ACTOR)
    assert place.files() == files, "a refused change leaves no private key behind"


@on_both
def test_two_keys_have_no_upstream_in_common(provisioned: DirectoryStore) -> None:
    """The uniqueness of upstreams does not count what is null."""
    for number in range(3):
        add_key(provisioned, NetworkService("acme", f"k{number}"), actor=ACTOR)


def test_blocking_is_a_change_once(store: DirectoryStore, provisioned: DirectoryStore) -> None:
    assert set_blocked(provisioned, ORDERS, blocked=True, actor=ACTOR).blocked
    revision = store.revision()
    assert set_blocked(provisioned, ORDERS, blocked=True, actor=ACTOR).blocked
    assert store.revision() == revision
    assert not set_blocked(provisioned, ORDERS, blocked=False, actor=ACTOR).blocked
    with pytest.raises(NotThereError):
        set_blocked(provisioned, SIGNER, blocked=True, actor=ACTOR)
    assert [change.action for change in store.history(after=3)] == ["key-blocked", "key-unblocked"]


def test_a_key_that_is_named_stays(place: Place, store: DirectoryStore, provisioned: DirectoryStore) -> None:
    set_dialect(provisioned, "acme", XKS, settings=xks("prefix"), actor=ACTOR)
    set_dialect(provisioned, "acme", NATIVE, actor=ACTOR)
    grant = Grant(tenant="acme", dialect=NATIVE, label="x", keys=frozenset({"orders"}))
    issued = issue_credential(provisioned, grant, actor=ACTOR)
    why = refused(lambda: remove_key(provisioned, ORDERS, actor=ACTOR), store)
    assert issued.entry.id in why
    assert "xks" in why
    revoke_credential(provisioned, issued.entry.id, actor=ACTOR)
    set_dialect(provisioned, "acme", XKS, settings=XksSettings(), actor=ACTOR)
    assert sum("orders" in name for name in place.files()) == 1
    remove_key(provisioned, ORDERS, actor=ACTOR)
    assert sum("orders" in name for name in place.files()) == 0
    with pytest.raises(NotThereError):
        remove_key(provisioned, ORDERS, actor=ACTOR)
    add_key(provisioned, ORDERS, actor=ACTOR)


@on_both
def test_a_tenant_goes_with_its_dialects_and_credentials(
    store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", NATIVE, actor=ACTOR)
    issue_credential(provisioned, Grant(tenant="acme", dialect=NATIVE, label="x"), actor=ACTOR)
    assert "sealgate key remove acme/orders" in refused_next(
        lambda: remove_tenant(store, "acme", actor=ACTOR)
    )
    remove_key(provisioned, ORDERS, actor=ACTOR)
    remove_tenant(store, "acme", actor=ACTOR)
    left = store.snapshot().encryption_service
    assert (dict(left.keys), dict(left.dialects), dict(left.credentials)) == ({}, {}, {})


def refused_next(attempt: Callable[[], object]) -> str:
    with pytest.raises(ChangeRefusedError) as caught:
        attempt()
    return caught.value.next_step


# Dialects.


def test_a_dialect_is_off_until_it_is_switched_on(store: DirectoryStore, provisioned: DirectoryStore) -> None:
    assert store.snapshot().encryption_service.dialect("acme", NATIVE) is None
    assert set_dialect(provisioned, "acme", NATIVE, enabled=True, actor=ACTOR).settings == NativeSettings()
    assert set_dialect(provisioned, "acme", TRANSIT, actor=ACTOR).settings == TransitSettings()
    revision = store.revision()
    set_dialect(provisioned, "acme", NATIVE, enabled=True, actor=ACTOR)
    assert store.revision() == revision
    off = set_dialect(provisioned, "acme", TRANSIT, enabled=False, actor=ACTOR)
    assert (off.enabled, off.settings) == (False, TransitSettings())
    assert store.snapshot().encryption_service.dialect("acme", TRANSIT) is None
    assert store.snapshot().encryption_service.dialect("globex", NATIVE) is None
    refused(lambda: set_dialect(provisioned, "acme", XKS, enabled=True, actor=ACTOR), store)
    refused(lambda: set_dialect(provisioned, "acme", KACLS, enabled=True, actor=ACTOR), store)


@on_both
def test_settings_are_read_as_they_were_written(place: Place, provisioned: DirectoryStore) -> None:
    add_key(provisioned, SIGNER, actor=ACTOR, use=KeyUse.SIGN, algorithm=SigningAlgorithm.RS256)
    wanted: dict[DialectName, DialectSettings] = {
        NATIVE: NativeSettings(),
        XKS: xks("a/b_c-D", "other"),
        TRANSIT: TransitSettings(
            mounts=(TransitMount(mount="acme/transit"), TransitMount(mount="transit", namespace="ns1"))
        ),
        KACLS: kacls(
            signing_key="signer",
            owner_domain="acme.example",
            admins={"root@acme.example": ("privilegedwrap",)},
        ),
    }
    for dialect, settings in wanted.items():
        set_dialect(provisioned, "acme", dialect, settings=settings, actor=ACTOR)
    with place.open() as again:
        found = again.snapshot().encryption_service.dialects
        assert {name: found["acme", name].settings for name in DialectName} == wanted


BAD_SETTINGS: list[tuple[DialectName, DialectSettings]] = [
    (XKS, xks("")),
    (XKS, xks("/a")),
    (XKS, xks("a/")),
    (XKS, xks("a//b")),
    (XKS, xks("a/../b")),
    (XKS, xks("a.b")),
    (XKS, xks("a%2f")),
    (XKS, xks("a\n")),
    (XKS, xks("a" * 117)),
    (XKS, xks("a", "a")),
    (XKS, xks("a", key="nothing")),
    (XKS, xks("a", key="signer")),
    (XKS, XksSettings(stores=(XksStore(prefix="a", keys={".": "orders"}),))),
    (XKS, XksSettings(stores=(XksStore(prefix="a", keys={"..": "orders"}),))),
    (XKS, XksSettings(stores=(XksStore(prefix="a", keys={"": "orders"}),))),
    (XKS, XksSettings(stores=(XksStore(prefix="a", keys={"a/b": "orders"}),))),
    (XKS, XksSettings(stores=(XksStore(prefix="a", keys={"a" * 129: "orders"}),))),
    (TRANSIT, TransitSettings(mounts=(TransitMount(mount=""),))),
    (TRANSIT, TransitSettings(mounts=(TransitMount(mount="sys"),))),
    (TRANSIT, TransitSettings(mounts=(TransitMount(mount="auth/x"),))),
    (TRANSIT, TransitSettings(mounts=(TransitMount(mount="../x"),))),
    (TRANSIT, TransitSettings(mounts=(TransitMount(), TransitMount()))),
    (KACLS, kacls("http://kacls.example/kacls")),
    (KACLS, kacls("https://kacls.example/")),
    (KACLS, kacls("https://user:word@kacls.example/x")),
    (KACLS, kacls(authentication_issuers=())),
    (KACLS, kacls(wrapping_key="signer")),
    (KACLS, kacls(signing_key="orders")),
    (KACLS, kacls(wrapping_key="nothing")),
    (KACLS, kacls(trusted_kacls=("http://other.example/x",))),
    (
        KACLS,
        kacls(authentication_issuers=(TokenIssuer(issuer="i", jwks_url="http://idp.example", audience="a"),)),
    ),
]


def test_settings_that_break_a_rule_are_refused(store: DirectoryStore, provisioned: DirectoryStore) -> None:
    add_key(provisioned, SIGNER, actor=ACTOR, use=KeyUse.SIGN, algorithm=SigningAlgorithm.RS256)
    for dialect, settings in BAD_SETTINGS:
        refused(
            lambda dialect=dialect, settings=settings: set_dialect(
                provisioned,  # type: ignore[misc]
                "acme",
                dialect,
                settings=settings,
                actor=ACTOR,
            ),
            store,
        )
    longest = "a" * (128 - len("//kms/xks/v1"))
    set_dialect(provisioned, "acme", XKS, settings=xks(longest), actor=ACTOR)


def test_what_yields_the_tenant_is_one_tenants(store: DirectoryStore, provisioned: DirectoryStore) -> None:
    add_key(provisioned, NetworkService("globex", "orders"), actor=ACTOR)
    set_dialect(provisioned, "acme", XKS, settings=xks("taken"), actor=ACTOR)
    set_dialect(provisioned, "acme", KACLS, settings=kacls(), actor=ACTOR)
    refused(
        lambda: set_dialect(provisioned, "globex", XKS, settings=xks("free", "taken"), actor=ACTOR), store
    )
    refused(lambda: set_dialect(provisioned, "globex", KACLS, settings=kacls(), actor=ACTOR), store)
    set_dialect(provisioned, "acme", XKS, enabled=False, actor=ACTOR)  # and it stays the tenant's
    refused(lambda: set_dialect(provisioned, "globex", XKS, settings=xks("taken"), actor=ACTOR), store)


# Credentials.


def access_of(store: DirectoryStore, place: Place) -> Access:
    return Access(lambda: store.snapshot().encryption_service, place.clock, SecretSealer(place.state_dir))


def enters(store: DirectoryStore, place: Place, issued: Issued) -> bool:
    access, entry = access_of(store, place), issued.entry
    try:
        if entry.dialect is XKS:
            candidate = access.sigv4(entry.id, dialect=XKS, endpoint=entry.endpoint or "", peer=PEER)
            candidate.admit(matches=candidate.secret == issued.secret.encode())
        else:
            access.bearer(issued.secret, dialect=entry.dialect, peer=PEER)
    except NotAuthenticated:
        return False
    return True


@on_both
def test_a_credential_is_issued_used_and_revoked(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", TRANSIT, actor=ACTOR)
    grant = Grant(
        tenant="acme",
        dialect=TRANSIT,
        label="sops of team x",
        keys=frozenset({"orders"}),
        operations=frozenset({Op.DECRYPT}),
        endpoint="transit",
        networks=(ip_network("127.0.0.0/8"), ip_network("2001:db8::/32")),
        not_after_s=place.clock.wall_s() + 3600,
        requests_per_s=2.5,
    )
    issued = issue_credential(provisioned, grant, actor=ACTOR)
    with place.open() as again:
        found = again.snapshot().encryption_service.credentials[issued.entry.id]
    assert found == issued.entry
    assert enters(store, place, issued)
    place.clock.shift(3600)
    assert not enters(store, place, issued)
    assert revoke_credential(provisioned, issued.entry.id, actor=ACTOR) == issued.entry
    assert store.snapshot().encryption_service.credentials == {}
    with pytest.raises(NotThereError):
        revoke_credential(provisioned, issued.entry.id, actor=ACTOR)


@on_both
def test_secrets_stand_nowhere(place: Place, store: DirectoryStore, provisioned: DirectoryStore) -> None:
    """Neither in the database nor in the history, nor in files but the file key; nor in a repr."""
    set_dialect(provisioned, "acme", NATIVE, actor=ACTOR)
    set_dialect(provisioned, "acme", XKS, settings=xks("prefix"), actor=ACTOR)
    made = [
        issue_credential(provisioned, Grant(tenant="acme", dialect=NATIVE, label="x"), actor=ACTOR),
        issue_credential(
            provisioned, Grant(tenant="acme", dialect=XKS, label="x", endpoint="prefix"), actor=ACTOR
        ),
    ]
    store.close()
    everything = b"".join(path.read_bytes() for path in place.state_dir.rglob("*") if path.is_file())
    engine = create_engine(place.url)
    with engine.connect() as connection:
        for table in ("service_credential", "history"):
            rows = connection.execute(text(f"SELECT * FROM {table}")).all()
            everything += repr([list(row) for row in rows]).encode()
    engine.dispose()
    for issued in made:
        assert issued.entry.id.encode() in everything
        for secret in (issued.secret, issued.secret.split(".")[-1]):
            assert secret.encode() not in everything
            assert secret not in repr(issued)


def test_an_xks_credential_is_for_one_key_store(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", XKS, settings=xks("one", "two"), actor=ACTOR)
    refused(
        lambda: issue_credential(provisioned, Grant(tenant="acme", dialect=XKS, label="x"), actor=ACTOR),
        store,
    )
    refused(
        lambda: issue_credential(
            provisioned, Grant(tenant="acme", dialect=XKS, label="x", endpoint="three"), actor=ACTOR
        ),
        store,
    )
    issued = issue_credential(
        provisioned, Grant(tenant="acme", dialect=XKS, label="x", endpoint="one"), actor=ACTOR
    )
    assert enters(store, place, issued)
    refused(lambda: set_dialect(provisioned, "acme", XKS, settings=xks("two"), actor=ACTOR), store)
    revoke_credential(provisioned, issued.entry.id, actor=ACTOR)
    set_dialect(provisioned, "acme", XKS, settings=xks("two"), actor=ACTOR)


def test_an_access_key_of_the_tenants_own(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", XKS, settings=xks("one"), actor=ACTOR)
    set_dialect(provisioned, "acme", NATIVE, actor=ACTOR)
    grant = Grant(tenant="acme", dialect=XKS, label="x", endpoint="one")
    pair = ("A" * 20, "s" * 64)
    issued = issue_credential(provisioned, grant, actor=ACTOR, access_key=pair)
    assert (issued.entry.id, issued.secret) == pair
    assert enters(store, place, issued)
    refused(lambda: issue_credential(provisioned, grant, actor=ACTOR, access_key=pair), store)
    with pytest.raises(FormatError):
        issue_credential(provisioned, grant, actor=ACTOR, access_key=("A" * 20, "short"))
    native = Grant(tenant="acme", dialect=NATIVE, label="x")
    refused(
        lambda: issue_credential(provisioned, native, actor=ACTOR, access_key=("B" * 20, "s" * 64)), store
    )
    refused(lambda: issue_credential(provisioned, grant, actor=ACTOR, token=new_bearer().token), store)


def test_grants_that_name_nothing_are_refused(store: DirectoryStore, provisioned: DirectoryStore) -> None:
    native = Grant(tenant="acme", dialect=NATIVE, label="x")
    refused(lambda: issue_credential(provisioned, native, actor=ACTOR), store)  # the dialect is not set up
    for dialect in (NATIVE, TRANSIT):
        set_dialect(provisioned, "acme", dialect, actor=ACTOR)
    for grant in (
        Grant(tenant="nobody", dialect=NATIVE, label="x"),
        Grant(tenant="globex", dialect=NATIVE, label="x"),
        Grant(tenant="acme", dialect=KACLS, label="x"),
        Grant(tenant="acme", dialect=NATIVE, label=""),
        Grant(tenant="acme", dialect=NATIVE, label="x" * 101),
        Grant(tenant="acme", dialect=NATIVE, label="line\nbreak"),
        Grant(tenant="acme", dialect=NATIVE, label="x", keys=frozenset({"nothing"})),
        Grant(tenant="acme", dialect=NATIVE, label="x", keys=frozenset()),
        Grant(tenant="acme", dialect=NATIVE, label="x", operations=frozenset()),
        Grant(tenant="acme", dialect=NATIVE, label="x", endpoint="transit"),
        Grant(tenant="acme", dialect=TRANSIT, label="x", endpoint="other"),
        Grant(tenant="acme", dialect=NATIVE, label="x", requests_per_s=0),
    ):
        refused(lambda grant=grant: issue_credential(provisioned, grant, actor=ACTOR), store)  # type: ignore[misc]


@pytest.mark.parametrize("dialect", [NATIVE, XKS])
def test_rotation_has_two_live_at_once_and_no_third(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore, dialect: DialectName
) -> None:
    set_dialect(provisioned, "acme", NATIVE, actor=ACTOR)
    set_dialect(provisioned, "acme", XKS, settings=xks("one"), actor=ACTOR)
    grant = Grant(
        tenant="acme",
        dialect=dialect,
        label="x",
        keys=frozenset({"orders"}),
        operations=frozenset({Op.ENCRYPT}),
        endpoint="one" if dialect is XKS else None,
        networks=(ip_network("127.0.0.0/8"),),
    )
    first = issue_credential(provisioned, grant, actor=ACTOR)
    second = rotate_credential(provisioned, first.entry.id, actor=ACTOR, old_ends_s=None)
    assert enters(store, place, first)
    assert enters(store, place, second)
    for name in ("tenant", "dialect", "label", "keys", "operations", "endpoint", "networks", "not_after_s"):
        assert getattr(second.entry, name) == getattr(first.entry, name)
    assert second.entry.replaces == first.entry.id
    for one in (first, second):
        name = one.entry.id
        refused(lambda name=name: rotate_credential(store, name, actor=ACTOR, old_ends_s=None), store)  # type: ignore[misc]
    revoke_credential(provisioned, first.entry.id, actor=ACTOR)
    assert not enters(store, place, first)
    third = rotate_credential(provisioned, second.entry.id, actor=ACTOR, old_ends_s=place.clock.wall_s() + 60)
    assert enters(store, place, second)
    place.clock.shift(60)
    assert not enters(store, place, second)
    assert enters(store, place, third)
    fourth = rotate_credential(
        provisioned, third.entry.id, actor=ACTOR, old_ends_s=None
    )  # what has ended does not count
    assert enters(store, place, fourth)
    with pytest.raises(NotThereError):
        rotate_credential(provisioned, "nothing", actor=ACTOR, old_ends_s=None)


def test_rotation_lengthens_no_life_unasked(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", NATIVE, actor=ACTOR)
    end_s = place.clock.wall_s() + 60
    first = issue_credential(
        provisioned, Grant(tenant="acme", dialect=NATIVE, label="x", not_after_s=end_s), actor=ACTOR
    )
    second = rotate_credential(provisioned, first.entry.id, actor=ACTOR, old_ends_s=end_s + 3600)
    found = store.snapshot().encryption_service.credentials
    assert found[first.entry.id].not_after_s == found[second.entry.id].not_after_s == end_s
    revoke_credential(provisioned, first.entry.id, actor=ACTOR)
    place.clock.shift(61)
    refused(lambda: rotate_credential(provisioned, second.entry.id, actor=ACTOR, old_ends_s=None), store)
    later_s = place.clock.wall_s() + 60
    third = rotate_credential(provisioned, second.entry.id, actor=ACTOR, old_ends_s=None, ends_s=later_s)
    assert third.entry.not_after_s == later_s
    assert enters(store, place, third)


@on_both
def test_the_file_key_is_rotated(place: Place, store: DirectoryStore, provisioned: DirectoryStore) -> None:
    set_dialect(provisioned, "acme", XKS, settings=xks("one"), actor=ACTOR)
    grant = Grant(tenant="acme", dialect=XKS, label="x", endpoint="one")
    made = [issue_credential(provisioned, grant, actor=ACTOR) for _ in range(3)]
    directory = place.state_dir / FILE_KEY_DIRECTORY
    (old,) = directory.iterdir()
    running = access_of(store, place)
    assert rotate_file_key(provisioned, actor=ACTOR) == 3
    (new,) = directory.iterdir()
    assert new != old
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    for issued in made:
        assert enters(store, place, issued)
        candidate = running.sigv4(issued.entry.id, dialect=XKS, endpoint="one", peer=PEER)
        assert candidate.secret == issued.secret.encode(), "the running proxy goes on"
    # One that does not open stops it before anything has changed.
    verifiers = {
        name: entry.verifier for name, entry in store.snapshot().encryption_service.credentials.items()
    }
    with store._transaction() as connection:
        connection.execute(
            text("UPDATE service_credential SET verifier = :verifier WHERE id = :id"),
            {"verifier": os.urandom(80), "id": made[2].entry.id},
        )
    assert made[2].entry.id in refused(lambda: rotate_file_key(provisioned, actor=ACTOR), store)
    assert list(directory.iterdir()) == [new]
    now = store.snapshot().encryption_service.credentials
    assert all(now[issued.entry.id].verifier == verifiers[issued.entry.id] for issued in made[:2])


@on_both
def test_a_rotation_that_was_not_answered_keeps_both_file_keys(
    place: Place, store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", XKS, settings=xks("one"), actor=ACTOR)
    grant = Grant(tenant="acme", dialect=XKS, label="x", endpoint="one")
    issued = issue_credential(provisioned, grant, actor=ACTOR)
    directory = place.state_dir / FILE_KEY_DIRECTORY
    with place.open() as cut, pytest.raises(DirectoryUnavailableError, match="may have been kept"):
        rotate_file_key(never_answers(cut), actor=ACTOR)
    assert len(list(directory.iterdir())) == 2
    assert enters(store, place, issued), "it was kept, and its secret is there"
    assert rotate_file_key(provisioned, actor=ACTOR) == 1
    (_,) = directory.iterdir()
    assert enters(store, place, issued)


def test_every_change_is_in_the_history_with_its_actor(
    store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", NATIVE, actor="alice")
    issued = issue_credential(provisioned, Grant(tenant="acme", dialect=NATIVE, label="x"), actor="bob")
    rotate_credential(provisioned, issued.entry.id, actor="carol", old_ends_s=None)
    revoke_credential(provisioned, issued.entry.id, actor="dave")
    rotate_file_key(provisioned, actor="erin")
    changes = store.history(after=2)
    assert [(change.action, change.actor) for change in changes] == [
        ("key-added", ACTOR),
        ("dialect-set", "alice"),
        ("credential-issued", "bob"),
        ("credential-rotated", "carol"),
        ("credential-revoked", "dave"),
        ("file-key-rotated", "erin"),
    ]
    assert changes[3].detail["replaces"] == issued.entry.id
    assert json.dumps([change.as_json() for change in changes])


# The schema.


@on_both
def test_a_directory_of_the_version_before_is_taken_along(place: Place, acme: Tenant) -> None:
    """Rows of schema 0001 are there after the upgrade, and new ones fit beside them."""
    place.state_dir.mkdir(mode=0o700)
    engine = create_engine(place.url)
    with engine.begin() as connection:
        command.upgrade(migrations.configuration(connection), "0001")
        der = acme.root.certificate.public_bytes(Encoding.DER)
        connection.execute(
            text("INSERT INTO tenant VALUES ('acme', :der, NULL, 'ca/a.pem', 'ca/a.key', 1, 1)"), {"der": der}
        )
        connection.execute(
            text(
                "INSERT INTO network_service VALUES ('acme', 'drive', 'https', 'drive.example', 443, "
                "'generic', 'strict', NULL, NULL, 'keys/drive.key', NULL, 1, 1)"
            )
        )
    engine.dispose()
    with pytest.raises(DirectoryUnavailableError, match="0001"):
        place.open(migrate=False)
    with place.open() as store:
        directory = store.snapshot()
        drive = directory.services[NetworkService("acme", "drive")]
        assert (str(drive.upstream), drive.profile) == ("https://drive.example:443", "generic")
        add_key(store, ORDERS, actor=ACTOR)
        taken = Upstream.parse("https://drive.example")
        with pytest.raises(ChangeRefusedError):
            add_service(store, NetworkService("acme", "again"), taken, actor=ACTOR)
        with pytest.raises(DirectoryUnavailableError), store._transaction() as connection:
            connection.execute(  # the unique constraint came along
                text(
                    "INSERT INTO network_service VALUES ('acme', 'x', 'https', 'drive.example', 443, "
                    "'generic', 'strict', NULL, NULL, 'keys/x.key', NULL, 1, 1)"
                )
            )


def test_a_row_that_cannot_be_read_is_an_unusable_database(
    store: DirectoryStore, provisioned: DirectoryStore
) -> None:
    set_dialect(provisioned, "acme", NATIVE, actor=ACTOR)
    with store._transaction() as connection:
        connection.execute(text("UPDATE service_dialect SET settings = '{\"unknown\": 1}'"))
    with pytest.raises(DirectoryUnavailableError, match="unknown"):
        store.snapshot()
