"""`sealgate tenant access` and `sealgate user`, as their operator uses them."""

import stat
from pathlib import Path

import pytest

from envelope.certificates import fingerprint
from proxy.users.model import verifier_of
from runtime.cli import ExitCode
from tests.pki import Tenant, make_tenant, write_certificate
from tests.proxy.installation import Installation


@pytest.fixture
def acme() -> Tenant:
    return make_tenant("acme")


@pytest.fixture
def site(tmp_path: Path, acme: Tenant, capsys: pytest.CaptureFixture[str]) -> Installation:
    site = Installation.make(tmp_path, capsys)
    root = write_certificate(acme.root.certificate, tmp_path / "root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    return site


def test_users(site: Installation) -> None:
    _, shown, _ = site.run("user", "add", "acme/alice")
    assert "keep it now" in shown
    answer = site.ask("user", "add", "acme/alice", "--not-after", "2099-12-31")
    assert answer["user"]["not_after"] == "2100-01-01T00:00:00+00:00"
    assert answer["password"] not in shown, "another one"
    listed = site.ask("user", "list", "acme")["users"]
    assert [user["user"] for user in listed] == ["acme/alice"]
    assert answer["password"] not in str(listed)
    assert site.ask("user", "remove", "acme/alice")["changed"] is True
    code, error = site.refused("user", "remove", "acme/alice")
    assert (code, error["code"]) == (ExitCode.REFUSED, "not-there")
    assert site.run("user", "list")[1].strip() == "no users"


def test_a_password_file(site: Installation, tmp_path: Path) -> None:
    file = tmp_path / "alice.txt"
    answer = site.ask("user", "add", "acme/alice", "--password-file", str(file))
    assert "password" not in answer
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    password = file.read_text().strip()
    assert len(password) == 32
    assert len(verifier_of("acme", "alice", password.encode())) == 32
    code, _ = site.refused("user", "add", "acme/alice", "--password-file", str(file))
    assert code == ExitCode.USAGE


@pytest.mark.parametrize("user", ["alice", "acme/", "acme/a:b", "ACME/alice"])
def test_what_is_no_user(site: Installation, user: str) -> None:
    assert site.refused("user", "add", user)[0] == ExitCode.USAGE


def test_another_tenants_user(site: Installation) -> None:
    assert site.refused("user", "add", "globex/alice")[0] == ExitCode.REFUSED
    assert site.refused("user", "list", "globex")[0] == ExitCode.REFUSED
    assert site.refused("tenant", "access", "globex")[0] == ExitCode.REFUSED


def test_access(site: Installation, acme: Tenant, tmp_path: Path) -> None:
    assert site.ask("tenant", "access", "acme")["requires"] == []
    root = write_certificate(acme.root.certificate, tmp_path / "clients.pem")
    rules = (
        "tenant", "access", "acme", "--network", "10.0.0.0/8", "--require", "credentials",
        "--require", "certificate", "--client-ca", str(root), "--proxy", "p.example:3128", "--proxy-tls",
    )  # fmt: skip
    answer = site.ask(*rules)
    assert answer["changed"] is True
    assert answer["requires"] == ["certificate", "credentials"]
    assert answer["client_roots"] == [fingerprint(acme.root.certificate).hex()]
    assert site.ask(*rules)["changed"] is False
    _, text, _ = site.run("tenant", "access", "acme")
    assert "users of acme show certificate, credentials, and come from 10.0.0.0/8" in text
    assert site.ask("tenant", "access", "acme", "--open")["requires"] == []


@pytest.mark.parametrize(
    "words",
    [
        ("--network", "10.0.0.1/8"),
        ("--proxy", "nowhere"),
        ("--open", "--require", "credentials"),
        ("--require", "trust"),
    ],
)
def test_wrong_rules(site: Installation, words: tuple[str, ...]) -> None:
    assert site.refused("tenant", "access", "acme", *words)[0] == ExitCode.USAGE


def test_certificates_without_an_authority(site: Installation) -> None:
    code, error = site.refused("tenant", "access", "acme", "--require", "certificate")
    assert (code, error["code"]) == (ExitCode.REFUSED, "refused")
