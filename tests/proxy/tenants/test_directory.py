"""The directory on real databases: SQLite, and PostgreSQL where SEALGATE_TEST_POSTGRES_URL names one."""

import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from envelope.certificates import CertificateError, fingerprint
from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy.tenants import migrations
from proxy.tenants.certificates import KeyType, read_certificate, read_private_key
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import ChangeRefusedError, DirectoryUnavailableError, NotThereError
from proxy.tenants.model import LegacyPolicy, Listen, Upstream
from proxy.tenants.network_service_store import add_service, remove_service, update_service
from proxy.tenants.recipient_store import certificate_request, import_certificate, renew_key
from proxy.tenants.tables import metadata
from proxy.tenants.tenant_store import add_tenant, remove_tenant, update_tenant
from tests.fakes.clock import ManualClock
from tests.pki import Tenant, make_csr, make_tenant, new_key
from tests.proxy.tenants.places import Place, sign

ACTOR = "tester"
DRIVE = NetworkService("acme", "drive")
UPSTREAM = Upstream.parse("https://drive.example.com")


def test_what_is_provisioned_is_found_again(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(
        store,
        "acme",
        acme.root.certificate,
        actor=ACTOR,
        forward_listen=Listen("127.0.0.1", 8080),
        tunnel_hosts=["*.SSO.example", "time.example"],
        signers=[acme.agent_signing().certificate],
    )
    csr = add_service(
        store,
        DRIVE,
        UPSTREAM,
        actor=ACTOR,
        legacy=LegacyPolicy.MIGRATE,
        reverse_listen=Listen("127.0.0.1", 8081),
    )
    certificate = sign(acme, csr)
    entry = import_certificate(store, DRIVE, certificate, actor=ACTOR)
    store.close()
    with place.open() as again:
        directory = again.snapshot()
    assert directory.revision == 3
    tenant = directory.tenants["acme"]
    assert tenant.root_certificate == acme.root.certificate
    assert tenant.forward_listen == Listen("127.0.0.1", 8080)
    assert tenant.tunnel_hosts == {"*.sso.example", "time.example"}
    assert len(tenant.signers) == 1
    service = directory.services[DRIVE]
    assert service == entry
    assert (service.upstream, service.legacy, service.profile) == (UPSTREAM, LegacyPolicy.MIGRATE, "generic")
    assert service.reverse_listen == Listen("127.0.0.1", 8081)
    assert service.certificate == certificate
    assert read_private_key(service.key_file).public_key() == certificate.public_key()
    assert stat.S_IMODE(service.key_file.stat().st_mode) == 0o600
    ca = read_certificate(tenant.interception_ca.certificate_file)
    assert read_private_key(tenant.interception_ca.key_file).public_key() == ca.public_key()
    assert stat.S_IMODE(tenant.interception_ca.key_file.stat().st_mode) == 0o600


def test_every_change_is_one_revision_and_one_row_of_history(store: DirectoryStore, acme: Tenant) -> None:
    assert store.revision() == 0
    add_tenant(store, "acme", acme.root.certificate, actor="ada (uid 0)")
    csr = add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    certificate = sign(acme, csr)
    import_certificate(store, DRIVE, certificate, actor=ACTOR)
    assert store.revision() == 3
    import_certificate(store, DRIVE, certificate, actor=ACTOR)  # again: no change
    assert store.revision() == 3
    with pytest.raises(ChangeRefusedError):
        add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    assert store.revision() == 3
    remove_service(store, DRIVE, actor=ACTOR)
    remove_tenant(store, "acme", actor=ACTOR)
    changes = store.history()
    assert [(change.revision, change.action) for change in changes] == [
        (1, "tenant-added"),
        (2, "service-added"),
        (3, "certificate-imported"),
        (4, "service-removed"),
        (5, "tenant-removed"),
    ]
    assert changes[0].actor == "ada (uid 0)"
    assert changes[2].detail["certificate_sha256"] == fingerprint(certificate).hex()
    assert [change.revision for change in store.history(after=3)] == [4, 5]


def test_a_tenants_ids_listeners_and_roots_are_its_own(
    store: DirectoryStore, acme: Tenant, globex: Tenant
) -> None:
    listen = Listen("127.0.0.1", 8080)
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR, forward_listen=listen)
    for name, root, address in [
        ("acme", globex.root.certificate, None),
        ("globex", globex.root.certificate, listen),
        ("globex", globex.root.certificate, Listen("0.0.0.0", 8080)),
        ("globex", acme.root.certificate, None),
        ("globex", make_tenant("acme").root.certificate, None),  # another key under acme's name
        ("globex", globex.agent_tls().certificate, None),
    ]:
        with pytest.raises(ChangeRefusedError):
            add_tenant(store, name, root, actor=ACTOR, forward_listen=address)
    reserved = [Listen("0.0.0.0", 8443)]
    with pytest.raises(ChangeRefusedError, match="the proxy itself"):
        add_tenant(
            store,
            "globex",
            globex.root.certificate,
            actor=ACTOR,
            forward_listen=Listen("127.0.0.1", 8443),
            reserved=reserved,
        )
    with pytest.raises(FormatError):
        add_tenant(store, "../etc", globex.root.certificate, actor=ACTOR)
    assert set(store.snapshot().tenants) == {"acme"}


def test_a_refused_change_leaves_no_file(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    before = place.files()
    assert len(before) == 3
    with pytest.raises(ChangeRefusedError):
        add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    with pytest.raises(ChangeRefusedError):
        add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    with pytest.raises(NotThereError):
        add_service(store, NetworkService("nobody", "drive"), UPSTREAM, actor=ACTOR)
    assert place.files() == before


def test_services_do_not_collide_within_a_tenant_but_across_they_may(
    store: DirectoryStore, acme: Tenant, globex: Tenant
) -> None:
    for tenant in (acme, globex):
        add_tenant(store, tenant.name, tenant.root.certificate, actor=ACTOR)
        add_service(store, NetworkService(tenant.name, "drive"), UPSTREAM, actor=ACTOR)
    ours, theirs = (
        store.snapshot().service_for_host(name, "drive.example.com", 443) for name in ("acme", "globex")
    )
    assert ours is not None
    assert theirs is not None
    assert ours.owner != theirs.owner
    assert ours.key_file != theirs.key_file
    with pytest.raises(ChangeRefusedError, match="is acme/drive already"):
        add_service(store, NetworkService("acme", "drive-2"), UPSTREAM, actor=ACTOR)
    other = Upstream.parse("https://drive.example.com:8443")
    listen = Listen("127.0.0.1", 9001)
    add_service(store, NetworkService("acme", "drive-2"), other, actor=ACTOR, reverse_listen=listen)
    with pytest.raises(ChangeRefusedError, match="clashes"):
        add_service(store, NetworkService("globex", "drive-2"), other, actor=ACTOR, reverse_listen=listen)
    with pytest.raises(ChangeRefusedError, match="clashes"):
        update_tenant(store, "globex", actor=ACTOR, forward_listen=listen)


def test_a_managed_host_is_never_tunnelled(store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR, tunnel_hosts=["*.example.com"])
    with pytest.raises(ChangeRefusedError, match="unsealed"):
        add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    update_tenant(store, "acme", actor=ACTOR, tunnel_hosts=["sso.example.com"])
    add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    for pattern in ("drive.example.com", "*.example.com", "DRIVE.EXAMPLE.COM."):
        with pytest.raises(ChangeRefusedError, match="unsealed"):
            update_tenant(store, "acme", actor=ACTOR, tunnel_hosts=[pattern])
    assert store.snapshot().tenants["acme"].tunnel_hosts == {"sso.example.com"}


def test_only_the_tenants_root_certifies_only_this_service(
    store: DirectoryStore, acme: Tenant, globex: Tenant
) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    wrong = {
        "another tenant's": globex.service("drive").certificate,
        "another root of that name": make_tenant("acme").service("drive").certificate,
        "another service's": acme.service("mail").certificate,
        "an agent's": acme.agent_tls().certificate,
        "the root itself": acme.root.certificate,
    }
    for what, certificate in wrong.items():
        with pytest.raises(CertificateError):
            import_certificate(store, DRIVE, certificate, actor=ACTOR)
        assert store.snapshot().services[DRIVE].certificate is None, what
    with pytest.raises(ChangeRefusedError, match="another key"):
        import_certificate(store, DRIVE, acme.service("drive").certificate, actor=ACTOR)
    place_clock_expired = sign(acme, make_csr(new_key(), ["urn:sealgate:acme:service:drive"]))
    with pytest.raises(ChangeRefusedError):
        import_certificate(store, DRIVE, place_clock_expired, actor=ACTOR)
    assert store.revision() == 2


@pytest.mark.parametrize("key_type", list(KeyType))
def test_renewal_serves_on_until_the_new_certificate_comes(
    place: Place, store: DirectoryStore, acme: Tenant, key_type: KeyType
) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    abandoned = add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    first = sign(acme, renew_key(store, DRIVE, actor=ACTOR))  # before the first import: replaces the key
    with pytest.raises(ChangeRefusedError):
        import_certificate(store, DRIVE, sign(acme, abandoned), actor=ACTOR)
    import_certificate(store, DRIVE, first, actor=ACTOR)
    renew_key(store, DRIVE, actor=ACTOR)
    second = sign(acme, renew_key(store, DRIVE, actor=ACTOR, key_type=key_type))
    entry = store.snapshot().services[DRIVE]
    assert entry.certificate == first
    assert read_private_key(entry.key_file).public_key() == first.public_key()
    import_certificate(store, DRIVE, second, actor=ACTOR)
    entry = store.snapshot().services[DRIVE]
    assert entry.certificate == second
    assert read_private_key(entry.key_file).public_key() == second.public_key()
    keys = {name for name in place.files() if name.startswith("keys/")}
    assert keys == {str(entry.key_file.relative_to(place.state_dir))}, "no key that nobody uses is left"


def test_a_new_root_voids_what_it_has_not_signed(store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    import_certificate(
        store, DRIVE, sign(acme, add_service(store, DRIVE, UPSTREAM, actor=ACTOR)), actor=ACTOR
    )
    successor = make_tenant("acme")
    update_tenant(store, "acme", actor=ACTOR, root=successor.root.certificate)
    assert store.snapshot().services[DRIVE].certificate is None


def test_pinned_signers_must_be_this_tenants(store: DirectoryStore, acme: Tenant, globex: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    for certificate in (globex.agent_signing().certificate, acme.agent_tls().certificate):
        with pytest.raises(CertificateError):
            update_tenant(store, "acme", actor=ACTOR, signers=[certificate])
    update_tenant(store, "acme", actor=ACTOR, signers=[acme.agent_signing().certificate])
    assert len(store.snapshot().tenants["acme"].signers) == 1
    update_tenant(store, "acme", actor=ACTOR, signers=[])
    assert store.snapshot().tenants["acme"].signers == ()


def test_removal_takes_the_keys_along(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR, tunnel_hosts=["a.example"])
    add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    with pytest.raises(ChangeRefusedError) as caught:
        remove_tenant(store, "acme", actor=ACTOR)
    assert "service remove acme/drive" in caught.value.next_step
    remove_service(store, DRIVE, actor=ACTOR)
    remove_tenant(store, "acme", actor=ACTOR)
    assert place.files() == set()
    with pytest.raises(NotThereError):
        remove_service(store, DRIVE, actor=ACTOR)
    with pytest.raises(NotThereError):
        remove_tenant(store, "acme", actor=ACTOR)
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)  # may come back
    assert store.snapshot().tenants["acme"].tunnel_hosts == frozenset()


def test_changes_from_many_sides_queue(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    outcomes: list[str] = []

    def provision(number: int) -> None:
        with place.open() as mine:
            for owner in (NetworkService("acme", f"s{number}"), NetworkService("acme", "contested")):
                upstream = Upstream("https", f"{owner.service}.example.com", 443)
                try:
                    add_service(mine, owner, upstream, actor=ACTOR)
                    outcomes.append(owner.service)
                except ChangeRefusedError:
                    outcomes.append("refused")

    threads = [threading.Thread(target=provision, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["contested", "refused", "refused", "refused", "s0", "s1", "s2", "s3"]
    assert store.revision() == 6
    assert [change.revision for change in store.history()] == list(range(1, 7))


def test_two_programs_may_make_the_schema_at_once(place: Place) -> None:
    failures: list[BaseException] = []

    def make() -> None:
        try:
            place.open().close()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with place.open() as store:
        assert store.revision() == 0


def test_reading_waits_for_no_change(place: Place, store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    with place.open() as other, store._transaction() as change:
        change.execute(text("UPDATE directory SET revision = 99"))
        assert other.revision() == 1
        assert other.snapshot().revision == 1


def test_the_migrations_make_exactly_these_tables(place: Place) -> None:
    place.open().close()
    engine = create_engine(place.url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        script = ScriptDirectory.from_config(migrations.configuration(connection))
        assert script.get_heads() == [migrations.HEAD]
    engine.dispose()


def test_another_schema_is_refused_without_migration(place: Place) -> None:
    if place.url.startswith("sqlite"):
        with pytest.raises(DirectoryUnavailableError, match="does not exist"):
            place.open(migrate=False)
        assert not place.state_dir.exists()
    place.open().close()
    engine = create_engine(place.url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(DirectoryUnavailableError, match="9999"):
        place.open(migrate=False)


def test_a_database_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "directory.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(DirectoryUnavailableError, match="not a database"):
        DirectoryStore.open(f"sqlite:///{path}", tmp_path, clock=ManualClock())
    url = "postgresql+psycopg://nobody:hidden-word@127.0.0.1:1/none"
    with pytest.raises(DirectoryUnavailableError) as caught:
        DirectoryStore.open(url, tmp_path, clock=ManualClock())
    assert "hidden-word" not in str(caught.value)


def test_sqlite_is_durable(tmp_path: Path) -> None:
    path = tmp_path / "directory.db"
    store = DirectoryStore.open(f"sqlite:///{path}", tmp_path, clock=ManualClock())
    with store, store._transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    raw = sqlite3.connect(path)
    try:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        raw.close()


def test_a_service_changes_but_keeps_its_keys(store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR, tunnel_hosts=["sso.example"])
    certificate = sign(acme, add_service(store, DRIVE, UPSTREAM, actor=ACTOR, legacy=LegacyPolicy.MIGRATE))
    before = import_certificate(store, DRIVE, certificate, actor=ACTOR)
    add_service(store, NetworkService("acme", "mail"), Upstream.parse("https://mail.example"), actor=ACTOR)
    moved = Upstream.parse("https://drive.example.org")
    listen = Listen("127.0.0.1", 8090)
    after = update_service(
        store, DRIVE, actor=ACTOR, upstream=moved, legacy=LegacyPolicy.STRICT, reverse_listen=listen
    )
    assert (after.upstream, after.legacy, after.reverse_listen) == (moved, LegacyPolicy.STRICT, listen)
    assert (after.certificate, after.key_file) == (before.certificate, before.key_file)
    assert update_service(store, DRIVE, actor=ACTOR, upstream=moved).reverse_listen == listen
    assert update_service(store, DRIVE, actor=ACTOR, reverse_listen=None).reverse_listen is None
    for taken in ("https://mail.example", "https://sso.example"):
        with pytest.raises(ChangeRefusedError):
            update_service(store, DRIVE, actor=ACTOR, upstream=Upstream.parse(taken))
    with pytest.raises(NotThereError):
        update_service(store, NetworkService("acme", "nothing"), actor=ACTOR)


def test_the_request_can_be_written_again(store: DirectoryStore, acme: Tenant) -> None:
    add_tenant(store, "acme", acme.root.certificate, actor=ACTOR)
    csr = add_service(store, DRIVE, UPSTREAM, actor=ACTOR)
    assert certificate_request(store, DRIVE).public_key() == csr.public_key()
    import_certificate(store, DRIVE, sign(acme, csr), actor=ACTOR)
    assert certificate_request(store, DRIVE).public_key() == csr.public_key()
    renewed = renew_key(store, DRIVE, actor=ACTOR)
    assert certificate_request(store, DRIVE).public_key() == renewed.public_key()
