"""`sealgate s3-credential`, as its operator uses it."""

import io
import stat
from pathlib import Path

import pytest

from envelope.keys import NetworkService
from proxy.config import database_url
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Upstream
from proxy.tenants.network_service_store import add_service
from proxy.vault.model import Secrets
from runtime.cli import ExitCode
from tests.fakes.clock import ManualClock
from tests.pki import make_tenant, write_certificate
from tests.proxy.installation import Installation

SECRET = "client-secret-that-nobody-may-see"
UPSTREAM = "upstream-secret-that-nobody-may-see"
S3 = NetworkService("acme", "s3")


def opened(site: Installation) -> DirectoryStore:
    return DirectoryStore.open(database_url(site.settings().proxy), site.state_dir, clock=ManualClock())


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Installation:
    site = Installation.make(tmp_path, capsys)
    root = write_certificate(make_tenant("acme").root.certificate, tmp_path / "root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    with opened(site) as store:
        add_service(store, S3, Upstream("https", "s3.example.com", 443), profile="s3", actor="tester")
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "upstream").write_text(UPSTREAM)
    return site


def stored(site: Installation, access_key: str) -> Secrets:
    with opened(site) as store:
        return store.snapshot().services[S3].credentials[access_key].open()


def test_a_clients_key(site: Installation, tmp_path: Path) -> None:
    file = str(tmp_path / "secret")
    answer = site.ask(
        "s3-credential", "add", "acme/s3", "test:tester", "--secret-file", file, "--not-after", "2099-12-31"
    )
    assert answer["credential"]["upstream_access_key"] == "test:tester"
    assert answer["credential"]["not_after"] == "2100-01-01T00:00:00+00:00"
    assert stored(site, "test:tester").client_secret == SECRET
    code, error = site.refused("s3-credential", "add", "acme/s3", "test:tester", "--secret-file", file)
    assert (code, error["code"]) == (ExitCode.REFUSED, "refused")
    _, listed, _ = site.run("s3-credential", "list", "acme/s3")
    assert "test:tester" in listed
    for text in (str(answer), str(error), listed):
        assert SECRET not in text
    assert site.ask("s3-credential", "remove", "acme/s3", "test:tester")["changed"] is True
    code, error = site.refused("s3-credential", "remove", "acme/s3", "test:tester")
    assert (code, error["code"]) == (ExitCode.REFUSED, "not-there")
    assert site.ask("s3-credential", "list", "acme/s3")["credentials"] == []


def test_a_secret_from_standard_input(site: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SECRET + "\n"))
    site.ask("s3-credential", "add", "acme/s3", "KEY", "--secret-file", "-")
    assert stored(site, "KEY").client_secret == SECRET


def test_a_gateway_key_is_drawn(site: Installation, tmp_path: Path) -> None:
    upstream = ("--upstream-access-key", "AKID", "--upstream-secret-file", str(tmp_path / "upstream"))
    answer = site.ask("s3-credential", "add", "acme/s3", "--generate", *upstream)
    drawn = answer["credential"]["access_key"]
    secrets = stored(site, drawn)
    assert (secrets.client_secret, secrets.upstream_secret) == (answer["secret"], UPSTREAM)
    file = tmp_path / "drawn"
    answer = site.ask(
        "s3-credential", "add", "acme/s3", "--generate", *upstream, "--write-secret-file", str(file)
    )
    assert "secret" not in answer
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stored(site, answer["credential"]["access_key"]).client_secret == file.read_text().strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "acme/s3"),
        ("add", "acme/s3", "KEY"),
        ("add", "acme/s3", "KEY", "--generate"),
        ("add", "acme/s3", "--generate"),
        ("add", "acme/s3", "KEY", "--secret-file", "-", "--upstream-secret-file", "-"),
        ("add", "acme/s3", "KEY", "--secret-file", "/nonexistent"),
        ("add", "acme/s3", "K/Y", "--secret-file", "{secret}"),
        ("add", "no-service", "KEY", "--secret-file", "{secret}"),
    ],
)
def test_usage(site: Installation, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    words = [word.format(secret=tmp_path / "secret") for word in arguments]
    code, _error = site.refused("s3-credential", *words)
    assert code == ExitCode.USAGE


def test_the_doctor_tries_every_secret(site: Installation, tmp_path: Path) -> None:
    site.ask("s3-credential", "add", "acme/s3", "KEY", "--secret-file", str(tmp_path / "secret"))

    def said() -> str:
        return site.run("doctor")[1]

    assert "1 open by their file keys" in said()
    for file in (site.state_dir / "file-keys").iterdir():
        file.unlink()
    assert "acme/s3 KEY" in said()
