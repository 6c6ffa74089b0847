"""`sealgate azure-credential`, as its operator uses it."""

import base64
import io
import stat
from pathlib import Path

import pytest

from envelope.keys import NetworkService
from proxy.config import database_url
from proxy.profiles.azure_signatures import parse_key
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Upstream
from proxy.tenants.network_service_store import add_service
from proxy.vault.model import Secrets
from runtime.cli import ExitCode
from tests.fakes.clock import ManualClock
from tests.pki import make_tenant, write_certificate
from tests.proxy.installation import Installation

KEY = base64.b64encode(bytes(range(64))).decode()
BLOBS = NetworkService("acme", "blobs")


def opened(site: Installation) -> DirectoryStore:
    return DirectoryStore.open(database_url(site.settings().proxy), site.state_dir, clock=ManualClock())


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Installation:
    site = Installation.make(tmp_path, capsys)
    root = write_certificate(make_tenant("acme").root.certificate, tmp_path / "root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    with opened(site) as store:
        upstream = Upstream("https", "account.blob.core.windows.net", 443)
        add_service(store, BLOBS, upstream, profile="azure-blob", actor="tester")
    (tmp_path / "key").write_text(KEY + "\n")
    (tmp_path / "short").write_text("c2hvcnQ=\n")
    return site


def stored(site: Installation, account: str) -> Secrets:
    with opened(site) as store:
        return store.snapshot().services[BLOBS].credentials[account].open()


def test_an_accounts_key(site: Installation, tmp_path: Path) -> None:
    file = str(tmp_path / "key")
    answer = site.ask("azure-credential", "add", "acme/blobs", "mystorage", "--key-file", file)
    assert stored(site, "mystorage") == Secrets(client_secret=KEY)
    code, error = site.refused("azure-credential", "add", "acme/blobs", "mystorage", "--key-file", file)
    assert (code, error["code"]) == (ExitCode.REFUSED, "refused")
    _, listed, _ = site.run("azure-credential", "list", "acme/blobs")
    assert "mystorage" in listed
    for text in (str(answer), str(error), listed):
        assert KEY not in text
    assert site.ask("azure-credential", "remove", "acme/blobs", "mystorage")["changed"] is True
    assert site.ask("azure-credential", "list", "acme/blobs")["credentials"] == []


def test_a_key_from_standard_input(site: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(KEY + "\n"))
    site.ask("azure-credential", "add", "acme/blobs", "mystorage", "--key-file", "-")
    assert stored(site, "mystorage").client_secret == KEY


def test_a_gateway_key_is_drawn(site: Installation, tmp_path: Path) -> None:
    add = ("azure-credential", "add", "acme/blobs", "mystorage", "--key-file", str(tmp_path / "key"))
    answer = site.ask(*add, "--generate")
    assert parse_key(answer["key"]) != parse_key(KEY)
    assert stored(site, "mystorage") == Secrets(client_secret=answer["key"], upstream_secret=KEY)
    file = tmp_path / "drawn"
    answer = site.ask(*add, "--generate", "--write-key-file", str(file), "--replace")
    assert "key" not in answer
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stored(site, "mystorage").client_secret == file.read_text().strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "acme/blobs", "mystorage"),
        ("add", "acme/blobs", "My_Storage", "--key-file", "{key}"),
        ("add", "acme/blobs", "mystorage", "--key-file", "{short}"),
        ("add", "acme/blobs", "mystorage", "--key-file", "/nonexistent"),
        ("add", "acme/blobs", "mystorage", "--key-file", "{key}", "--write-key-file", "/tmp/x"),
        ("add", "no-service", "mystorage", "--key-file", "{key}"),
    ],
)
def test_usage(site: Installation, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    words = [word.format(key=tmp_path / "key", short=tmp_path / "short") for word in arguments]
    code, _error = site.refused("azure-credential", *words)
    assert code == ExitCode.USAGE
