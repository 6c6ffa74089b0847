"""Upstream credentials in the directory, on both databases."""

import pytest
from sqlalchemy import create_engine, text

from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy.tenants.credential_store import rotate_file_key
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import ChangeRefusedError, NotThereError
from proxy.tenants.model import Upstream
from proxy.tenants.network_service_store import add_service, remove_service
from proxy.tenants.tenant_store import add_tenant
from proxy.tenants.vault_store import add_credential, remove_credential
from proxy.vault.model import Secrets, VaultError
from tests.pki import make_tenant
from tests.proxy.tenants.places import Place

ACTOR = "tester"
S3 = NetworkService("acme", "s3")
OTHER = NetworkService("acme", "s3-too")
SECRET = "client-secret-that-nobody-may-see"
UPSTREAM = "upstream-secret-that-nobody-may-see"
TOKEN = "session-token-that-nobody-may-see"


@pytest.fixture
def ready(store: DirectoryStore) -> DirectoryStore:
    add_tenant(store, "acme", make_tenant("acme").root.certificate, actor=ACTOR)
    for owner, profile, port in (
        (S3, "s3", 1),
        (OTHER, "s3", 2),
        (NetworkService("acme", "dav"), "generic", 3),
    ):
        add_service(store, owner, Upstream("https", "s3.example.com", port), profile=profile, actor=ACTOR)
    return store


def everything_on_disk(place: Place) -> bytes:
    return b"".join(path.read_bytes() for path in place.state_dir.rglob("*") if path.is_file())


def test_what_goes_in_comes_out_and_is_nowhere_in_the_clear(place: Place, ready: DirectoryStore) -> None:
    add_credential(
        ready,
        S3,
        "GATEWAY",
        Secrets(client_secret=SECRET, upstream_secret=UPSTREAM, session_token=TOKEN),
        actor=ACTOR,
        upstream_access_key="AKID",
        not_after_s=5000.5,
    )
    ready.close()
    with place.open() as again:
        found = again.snapshot().services[S3].credentials
        assert list(found) == ["GATEWAY"]
        entry = found["GATEWAY"]
        assert (entry.upstream_access_key, entry.not_after_s) == ("AKID", 5000.5)
        opened = entry.open()
        assert (opened.client_secret, opened.upstream_secret, opened.session_token) == (
            SECRET,
            UPSTREAM,
            TOKEN,
        )
        assert again.snapshot().services[OTHER].credentials == {}
        change = again.history()[-1]
        assert (change.action, change.tenant, change.service) == ("upstream-credential-added", "acme", "s3")
        for secret in (SECRET, UPSTREAM, TOKEN):
            assert secret not in str(change.detail)
            assert secret.encode() not in everything_on_disk(place)
            assert secret not in repr(again.snapshot())


def test_a_row_opens_at_its_place_only(place: Place, ready: DirectoryStore) -> None:
    add_credential(ready, S3, "KEY", Secrets(client_secret=SECRET), actor=ACTOR)
    engine = create_engine(place.url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO upstream_credential SELECT tenant_id, 's3-too', access_key, upstream_access_key,"
                " sealed, not_after_ms, created_at_ms, updated_at_ms FROM upstream_credential"
            )
        )
    engine.dispose()
    services = ready.snapshot().services
    assert services[S3].credentials["KEY"].open().client_secret == SECRET
    with pytest.raises(VaultError):
        services[OTHER].credentials["KEY"].open()


def test_replacing_is_said(ready: DirectoryStore) -> None:
    add_credential(ready, S3, "KEY", Secrets(client_secret=SECRET), actor=ACTOR)
    with pytest.raises(ChangeRefusedError, match="already"):
        add_credential(ready, S3, "KEY", Secrets(client_secret=UPSTREAM), actor=ACTOR)
    assert ready.snapshot().services[S3].credentials["KEY"].open().client_secret == SECRET
    add_credential(ready, S3, "KEY", Secrets(client_secret=UPSTREAM), actor=ACTOR, replace=True)
    assert ready.snapshot().services[S3].credentials["KEY"].open().client_secret == UPSTREAM
    assert ready.history()[-1].action == "upstream-credential-replaced"


def test_what_makes_no_sense_is_refused(ready: DirectoryStore) -> None:
    revision = ready.revision()
    own = Secrets(client_secret=SECRET)
    with pytest.raises(ChangeRefusedError, match="signs nothing"):
        add_credential(ready, NetworkService("acme", "dav"), "KEY", own, actor=ACTOR)
    with pytest.raises(NotThereError):
        add_credential(ready, NetworkService("acme", "none"), "KEY", own, actor=ACTOR)
    with pytest.raises(ChangeRefusedError, match="secret of its own"):
        add_credential(ready, S3, "KEY", own, actor=ACTOR, upstream_access_key="OTHER")
    with pytest.raises(ChangeRefusedError, match="session token"):
        add_credential(ready, S3, "KEY", Secrets(client_secret=SECRET, session_token=TOKEN), actor=ACTOR)
    with pytest.raises(FormatError):
        add_credential(ready, S3, "a/b", own, actor=ACTOR)
    with pytest.raises(FormatError):
        add_credential(ready, S3, "KEY", Secrets(client_secret="short"), actor=ACTOR)
    assert ready.revision() == revision


def test_credentials_go_alone_and_with_their_service(ready: DirectoryStore) -> None:
    for owner in (S3, OTHER):
        add_credential(ready, owner, "KEY", Secrets(client_secret=SECRET), actor=ACTOR)
    remove_credential(ready, S3, "KEY", actor=ACTOR)
    with pytest.raises(NotThereError):
        remove_credential(ready, S3, "KEY", actor=ACTOR)
    assert ready.snapshot().services[S3].credentials == {}
    remove_service(ready, OTHER, actor=ACTOR)
    add_service(ready, OTHER, Upstream("https", "s3.example.com", 2), profile="s3", actor=ACTOR)
    assert ready.snapshot().services[OTHER].credentials == {}


def test_rotating_the_file_key_seals_the_vault_anew(place: Place, ready: DirectoryStore) -> None:
    add_credential(ready, S3, "KEY", Secrets(client_secret=SECRET), actor=ACTOR)
    before = ready.snapshot().services[S3].credentials["KEY"]
    old = list((place.state_dir / "file-keys").iterdir())
    assert rotate_file_key(ready, actor=ACTOR) == 1
    after = ready.snapshot().services[S3].credentials["KEY"]
    assert after.sealed[:8] != before.sealed[:8]
    assert after.open().client_secret == SECRET
    assert not set(old) & set((place.state_dir / "file-keys").iterdir())
    # A process that had read the old picture can use it until it has the new one.
    assert before.open().client_secret == SECRET
    with place.open() as fresh:
        assert fresh.snapshot().services[S3].credentials["KEY"].open().client_secret == SECRET


def test_a_secret_that_does_not_open_stops_the_rotation(place: Place, ready: DirectoryStore) -> None:
    add_credential(ready, S3, "KEY", Secrets(client_secret=SECRET), actor=ACTOR)
    engine = create_engine(place.url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE upstream_credential SET access_key = 'OTHER'"))
    engine.dispose()
    with pytest.raises(ChangeRefusedError, match="does not open"):
        rotate_file_key(ready, actor=ACTOR)
