"""`sealgate key`, `credential`, `dialect`: the whole way of an operator, and how soon a revocation counts."""

import asyncio
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from certs import pki
from proxy.config import ProxySettings, database_url
from proxy.encryption_service.access import Access
from proxy.encryption_service.call import Peer
from proxy.encryption_service.credentials import SecretSealer
from proxy.encryption_service.errors import NotAuthenticated
from proxy.encryption_service.model import DialectName
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Directory
from proxy.tenants.watch import DirectoryWatch
from runtime.audit import AuditLog
from runtime.cli import ExitCode
from runtime.clock import SystemClock
from tests.fakes.clock import ManualClock
from tests.pki import Tenant, write_certificate
from tests.proxy.installation import Installation

PEER = Peer(address="127.0.0.1")


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str], acme: Tenant) -> Installation:
    site = Installation.make(tmp_path, capsys)
    root = write_certificate(acme.root.certificate, tmp_path / "acme-root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    return site


def sign(tenant: Tenant, csr_file: Path) -> str:
    csr = x509.load_pem_x509_csr(csr_file.read_bytes())
    certificate = pki.sign_service_csr(
        tenant.root, csr, timedelta(days=3650), valid_from=datetime(2020, 1, 1, tzinfo=UTC)
    )
    return str(write_certificate(certificate, csr_file.with_suffix(".pem")))


def add_key(site: Installation, name: str = "orders", *more: str) -> Any:
    return site.ask("key", "add", f"acme/{name}", "--csr", str(site.path / f"{name}.csr"), *more)


def settings_file(site: Installation, document: object) -> str:
    path = site.path / "settings.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_the_quick_start(site: Installation, acme: Tenant) -> None:
    """The commands of docs/encryption-service.md, in their order."""
    added = add_key(site)
    assert added["key"]["state"] == "waits for its certificate"
    assert added["effective_within_s"] == 0.1
    imported = site.ask("key", "import-cert", "acme/orders", sign(acme, Path(added["csr_file"])))
    assert imported["key"]["state"] == "provisioned"
    assert site.ask("dialect", "enable", "acme", "transit")["dialect"]["settings"] == {
        "mounts": [{"mount": "transit", "namespace": None}]
    }
    issued = site.ask("credential", "issue", "acme", "transit", "--label", "sops", "--key", "orders")
    assert issued["token"].startswith(f"sgt.{issued['credential']['id']}.")
    (listed,) = site.ask("credential", "list", "--tenant", "acme")["credentials"]
    assert listed == issued["credential"]
    assert (listed["label"], listed["keys"], listed["ended"]) == ("sops", ["orders"], False)
    code, out, _err = site.run("credential", "list")
    assert code == 0
    assert issued["token"] not in out + json.dumps(listed)
    code, out, _err = site.run("credential", "issue", "acme", "transit", "--label", "by hand")
    assert code == 0
    assert "token sgt." in out
    assert "a running proxy heeds it within 0.1 s" in out


def test_doing_it_again_changes_nothing(site: Installation, acme: Tenant) -> None:
    first = add_key(site)
    request = Path(first["csr_file"]).read_bytes()
    again = add_key(site)
    assert (again["changed"], again["revision"]) == (False, first["revision"])
    one, other = x509.load_pem_x509_csr(request), x509.load_pem_x509_csr(Path(first["csr_file"]).read_bytes())
    assert one.public_key() == other.public_key()
    certificate = sign(acme, Path(first["csr_file"]))
    assert site.ask("key", "import-cert", "acme/orders", certificate)["changed"]
    assert not site.ask("key", "import-cert", "acme/orders", certificate)["changed"]
    for words in (("dialect", "enable", "acme", "native"), ("key", "block", "acme/orders")):
        assert site.ask(*words)["changed"]
        assert not site.ask(*words)["changed"]
    renewed = site.ask("key", "renew", "acme/orders", "--csr", str(site.path / "orders.csr"))
    assert site.ask("key", "import-cert", "acme/orders", sign(acme, Path(renewed["csr_file"])))["changed"]


def test_keys_are_listed_blocked_and_removed(site: Installation) -> None:
    add_key(site)
    add_key(site, "signer", "--use", "sign", "--algorithm", "ES256", "--operation", "sign")
    listed = {key["key"]: key for key in site.ask("key", "list")["keys"]}
    assert listed["acme/signer"]["operations"] == ["sign"]
    assert (listed["acme/signer"]["use"], listed["acme/signer"]["algorithm"]) == ("sign", "ES256")
    assert listed["acme/orders"]["operations"] == ["decrypt", "encrypt", "generate", "rewrap"]
    assert site.ask("key", "block", "acme/orders")["key"]["blocked"] is True
    assert "BLOCKED" in site.run("key", "list")[1]
    assert site.ask("key", "unblock", "acme/orders")["key"]["blocked"] is False
    assert site.ask("key", "remove", "acme/orders")["removed"] == "acme/orders"
    assert [key["key"] for key in site.ask("key", "list", "--tenant", "acme")["keys"]] == ["acme/signer"]
    assert site.ask("key", "list", "--tenant", "globex")["keys"] == []


def test_an_xks_credential_comes_as_the_file_that_aws_imports(site: Installation) -> None:
    add_key(site)
    document = {"stores": [{"prefix": "a1b2c3", "keys": {"key-1": "orders"}}]}
    site.ask("dialect", "set", "acme", "xks", "--settings", settings_file(site, document))
    secret = site.path / "aws.json"
    issued = site.ask(
        *("credential", "issue", "acme", "xks", "--label", "aws", "--endpoint", "a1b2c3"),
        *("--secret-file", str(secret)),
    )
    assert "raw_secret_access_key" not in issued
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    imported = json.loads(secret.read_text())
    assert imported["XksProxyUriPath"] == "/a1b2c3/kms/xks/v1"
    pair = imported["XksProxyAuthenticationCredential"]
    assert pair["AccessKeyId"] == issued["credential"]["id"]
    # AWS's own pair, from a file in the same form.
    own = {"AccessKeyId": "A" * 20, "RawSecretAccessKey": "s" * 43}
    taken = site.ask(
        *("credential", "issue", "acme", "xks", "--label", "own", "--endpoint", "a1b2c3"),
        *("--access-key-file", settings_file(site, own)),
    )
    assert (taken["access_key_id"], taken["raw_secret_access_key"]) == ("A" * 20, "s" * 43)
    assert site.ask("credential", "rotate-file-key")["resealed"] == 2


def test_a_token_of_another_proxy_is_taken_and_not_shown_again(site: Installation) -> None:
    site.ask("dialect", "enable", "acme", "native")
    token = f"sgt.{'a' * 24}.{'s' * 43}"
    words = ("credential", "issue", "acme", "native", "--label", "both", "--token-file")
    taken = site.ask(*words, settings_file(site, {"token": token}))
    assert taken["credential"]["id"] == "a" * 24
    assert token not in json.dumps(taken)
    assert token not in site.run("credential", "list")[1]
    code, error = site.refused(*words, settings_file(site, {"token": token}))
    assert (code, "already" in error["cause"]) == (ExitCode.REFUSED, True)
    for bad in (token[:-1], f"{token}s", token.upper(), token.replace("sgt", "sgx"), "", None):
        code, error = site.refused(*words, settings_file(site, {"token": bad}))
        assert code == ExitCode.USAGE
        assert token[:-1] not in json.dumps(error)


def test_rotation_and_revocation(site: Installation) -> None:
    site.ask("dialect", "enable", "acme", "native")
    first = site.ask(
        *("credential", "issue", "acme", "native", "--label", "x", "--valid-for", "90d"),
        *("--network", "10.0.0.0/8", "--operation", "decrypt", "--requests-per-s", "5"),
    )["credential"]
    second = site.ask("credential", "rotate", first["id"], "--overlap", "24h")["credential"]
    listed = {entry["id"]: entry for entry in site.ask("credential", "list")["credentials"]}
    assert second["replaces"] == first["id"]
    assert {
        "networks": ["10.0.0.0/8"],
        "operations": ["decrypt"],
        "requests_per_s": 5.0,
    }.items() <= second.items()
    assert listed[first["id"]]["not_after"] < listed[second["id"]]["not_after"]
    code, error = site.refused("credential", "rotate", first["id"])
    assert code == ExitCode.REFUSED
    assert "both live" in error["cause"]
    assert site.ask("credential", "revoke", first["id"])["revoked"] == first["id"]
    assert [entry["id"] for entry in site.ask("credential", "list")["credentials"]] == [second["id"]]
    changes = [change["action"] for change in site.ask("history")["changes"]]
    assert changes[-3:] == ["credential-issued", "credential-rotated", "credential-revoked"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("key", "add", "orders", "--csr", "x"), ExitCode.USAGE),
        (("key", "add", "acme/x", "--csr", "/nonexistent/x"), ExitCode.USAGE),
        (("key", "add", "acme/x", "--csr", "x", "--use", "sign"), ExitCode.REFUSED),
        (("key", "add", "acme/x", "--csr", "x", "--algorithm", "HS256"), ExitCode.USAGE),
        (("key", "add", "nobody/x", "--csr", "x"), ExitCode.REFUSED),
        (("key", "add", "acme/drive", "--csr", "x"), ExitCode.REFUSED),
        (("key", "import-cert", "acme/x", "/nonexistent"), ExitCode.USAGE),
        (("key", "block", "acme/x"), ExitCode.REFUSED),
        (("key", "remove", "acme/drive"), ExitCode.REFUSED),
        (("key", "renew", "acme/drive", "--csr", "x"), ExitCode.REFUSED),
        (("service", "import-cert", "acme/orders", "CERT"), ExitCode.REFUSED),
        (("service", "renew", "acme/orders", "--csr", "x"), ExitCode.REFUSED),
        (("dialect", "enable", "acme", "kmip"), ExitCode.USAGE),
        (("dialect", "enable", "acme", "xks"), ExitCode.REFUSED),
        (("dialect", "set", "acme", "xks", "--settings", "/nonexistent"), ExitCode.USAGE),
        (("dialect", "set", "acme", "native", "--settings", "NOT_JSON"), ExitCode.USAGE),
        (("credential", "issue", "acme", "native", "--label", "x"), ExitCode.REFUSED),
        (("credential", "issue", "acme", "transit", "--label", "x", "--valid-for", "1y"), ExitCode.USAGE),
        (("credential", "issue", "acme", "transit", "--label", "x", "--valid-for", "0d"), ExitCode.USAGE),
        (("credential", "issue", "acme", "transit", "--label", "x", "--network", "10/33"), ExitCode.USAGE),
        (("credential", "issue", "acme", "transit", "--label", "x", "--key", "no"), ExitCode.REFUSED),
        (("credential", "issue", "acme", "transit", "--label", "x", "--secret-file", "CERT"), ExitCode.USAGE),
        (
            ("credential", "issue", "acme", "transit", "--label", "x", "--access-key-file", "NOT_JSON"),
            ExitCode.USAGE,
        ),
        (("credential", "rotate", "nothing"), ExitCode.REFUSED),
        (("credential", "revoke", "nothing"), ExitCode.REFUSED),
    ],
)
def test_refusals_change_nothing(
    site: Installation, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: ExitCode
) -> None:
    monkeypatch.chdir(site.path)
    add_key(site)
    drive = ("acme/drive", "--upstream", "https://drive.example.com", "--csr", "drive.csr")
    site.ask("service", "add", *drive)
    site.ask("dialect", "enable", "acme", "transit")
    before = site.ask("list")["revision"]
    broken = site.path / "broken.json"
    broken.write_text('{"secret": "word')
    names = {"CERT": str(site.path / "push.pem"), "NOT_JSON": str(broken)}
    found, error = site.refused(*(names.get(word, word) for word in words))
    assert found == code, error
    assert "word" not in error["cause"]
    assert site.ask("list")["revision"] == before


async def test_a_running_proxy_heeds_a_revocation_within_its_interval(site: Installation) -> None:
    """`proxy.reload_s` is the bound, by the watch's own clock; its default is a quarter of a second."""
    assert ProxySettings(id="proxy-1").reload_s == 0.25
    site.ask("dialect", "enable", "acme", "native")
    issued = [site.ask("credential", "issue", "acme", "native", "--label", "x") for _ in range(2)]
    settings, clock = site.settings().proxy, ManualClock()
    with DirectoryStore.open(database_url(settings), settings.state_dir, clock=SystemClock()) as store:
        audit = AuditLog.open(site.path / "watch.jsonl", clock)
        watch = DirectoryWatch(
            store, audit, clock, interval_s=0.25, recorded_file=site.path / "watch.revision"
        )
        now = [await watch.load()]
        access = Access(lambda: now[0].encryption_service, clock, SecretSealer(settings.state_dir))

        applied = asyncio.Event()

        async def apply(directory: Directory) -> None:
            now[0] = directory
            applied.set()

        def is_in(document: dict[str, Any]) -> bool:
            try:
                access.bearer(document["token"], dialect=DialectName.NATIVE, peer=PEER)
            except NotAuthenticated:
                return False
            return True

        task = asyncio.create_task(watch.run(now[0], apply), name="test:watch")
        try:
            assert [is_in(document) for document in issued] == [True, True]
            await asyncio.to_thread(site.ask, "credential", "revoke", issued[0]["credential"]["id"])
            await clock.wait_for_sleepers()
            clock.shift(0.25)
            async with asyncio.timeout(60):  # for the look at the database: the clock stands still
                await applied.wait()
            assert [is_in(document) for document in issued] == [False, True]
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            audit.close()
    events = (site.path / "watch.jsonl").read_text()
    assert '"change":"credential-revoked"' in events, "recorded before it took effect"
