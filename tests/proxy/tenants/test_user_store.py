"""Users and access rules in the directory, on both databases."""

import ipaddress

import pytest
from sqlalchemy import create_engine, text

from envelope.errors import FormatError
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import ChangeRefusedError, DirectoryUnavailableError, NotThereError
from proxy.tenants.model import Listen
from proxy.tenants.tenant_store import add_tenant, remove_tenant, update_tenant
from proxy.tenants.user_store import issue_password, remove_user, set_access
from proxy.users.identification import Shown, identify
from proxy.users.model import OPEN, Proof, UserAccess, parse_networks, verifier_of
from tests.pki import Tenant, make_tenant
from tests.proxy.tenants.places import Place

ACTOR = "tester"
KNOWN = UserAccess(requires=frozenset({Proof.CREDENTIALS}))
LISTEN = Listen("127.0.0.1", 3128)


def test_rules_are_found_again(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    assert store.snapshot().tenants["acme"].access == OPEN
    access = UserAccess(
        networks=parse_networks(["10.0.0.0/8", "2001:db8::/32"]),
        client_roots=(acme.root.certificate,),
        requires=frozenset(Proof),
        proxies=("one.example:3128", "[2001:db8::1]:3128"),
        proxies_speak_tls=True,
    )
    set_access(store, "acme", access, actor=ACTOR)
    store.close()
    with place.open() as again:
        assert again.snapshot().tenants["acme"].access == access
        assert again.history()[-1].detail["requires"] == "certificate credentials"


def test_users_come_and_go(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    first = issue_password(store, "acme", "alice", actor=ACTOR)
    entry = store.snapshot().users["acme", "alice"]
    assert entry.verifier == verifier_of("acme", "alice", first.text.encode())
    assert entry.not_after_s is None
    second = issue_password(store, "acme", "alice", actor=ACTOR, not_after_s=5000.5)
    renewed = store.snapshot().users["acme", "alice"]
    assert (renewed.verifier, renewed.not_after_s) == (second.verifier, 5000.5)
    everything = b"".join(path.read_bytes() for path in place.state_dir.rglob("*") if path.is_file())
    for password in (first, second):
        assert password.text.encode() not in everything
        assert not any(password.text in str(change.detail) for change in store.history())
    remove_user(store, "acme", "alice", actor=ACTOR)
    assert store.snapshot().users == {}
    with pytest.raises(NotThereError):
        remove_user(store, "acme", "alice", actor=ACTOR)
    with pytest.raises(NotThereError):
        issue_password(store, "globex", "alice", actor=ACTOR)
    with pytest.raises(FormatError):
        issue_password(store, "acme", "a:b", actor=ACTOR)


def test_a_tenant_takes_its_users_along(store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    issue_password(store, "acme", "alice", actor=ACTOR)
    remove_tenant(store, "acme", actor=ACTOR)
    assert store.snapshot().users == {}


def test_tenants_share_a_listener_only_while_their_users_can_be_told_apart(
    store: DirectoryStore, acme: Tenant
) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR, forward_listen=LISTEN)
    add_tenant(store, "globex", make_tenant("globex").root.certificate, actor=ACTOR)
    with pytest.raises(ChangeRefusedError, match="clashes"):
        update_tenant(store, "globex", actor=ACTOR, forward_listen=LISTEN)
    set_access(store, "globex", KNOWN, actor=ACTOR)
    with pytest.raises(ChangeRefusedError, match="clashes"):
        update_tenant(store, "globex", actor=ACTOR, forward_listen=LISTEN)
    set_access(store, "acme", UserAccess(networks=parse_networks(["10.0.0.0/8"])), actor=ACTOR)
    update_tenant(store, "globex", actor=ACTOR, forward_listen=LISTEN)
    directory = store.snapshot()
    sharing = directory.tenants_of_listener(LISTEN)
    assert [entry.tenant for entry in sharing] == ["acme", "globex"]
    with pytest.raises(ChangeRefusedError, match="told from others"):
        set_access(store, "acme", OPEN, actor=ACTOR)
    candidates = {entry.tenant: entry.access for entry in sharing}
    here = Shown(address=ipaddress.ip_address("10.1.1.1"))
    assert identify(candidates, here, directory.users, now_s=0).tenant == "acme"
    with pytest.raises(ChangeRefusedError, match="clashes"):
        update_tenant(store, "globex", actor=ACTOR, forward_listen=Listen("0.0.0.0", 3128))
    with pytest.raises(ChangeRefusedError, match="clashes"):
        add_tenant(store, "third", make_tenant("third").root.certificate, actor=ACTOR, forward_listen=LISTEN)


def test_certificates_are_not_required_where_nobody_vouches(store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    with pytest.raises(ChangeRefusedError, match="no authority"):
        set_access(store, "acme", UserAccess(requires=frozenset({Proof.CERTIFICATE})), actor=ACTOR)


@pytest.mark.parametrize(
    "damage",
    [
        '{"networks": ["ten"]}',
        '{"unknown": 1}',
        "[]",
        "",
        '{"client_roots": ["!"]}',
        '{"client_roots": ["AAAA"]}',
        '{"requires": ["nothing"]}',
        '{"proxies": ["\\"; x"]}',
    ],
)
def test_damaged_rules_let_nobody_in(place: Place, store: DirectoryStore, acme: Tenant, damage: str) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    engine = create_engine(place.url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE tenant SET access = :damage"), {"damage": damage})
    engine.dispose()
    with pytest.raises(DirectoryUnavailableError):
        store.snapshot()
