"""`sealgate doctor` on sound and on broken installations; the network is real, on loopback."""

import json
import re
import socket
import sqlite3
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from proxy.command_line.doctor import examine, unheard_dialects
from proxy.encryption_service.model import DialectEntry, DialectName, ServiceDirectory, TransitSettings
from proxy.encryption_service.settings import EncryptionServiceSettings, ListenSettings
from runtime.audit import AuditLog
from runtime.cli import ExitCode
from runtime.clock import SystemClock
from runtime.doctor import Check
from tests.fakes.clock import ManualClock
from tests.pki import Tenant, issue_server, make_server_ca, write_certificate, write_credential
from tests.ports import free_port
from tests.proxy.installation import Installation
from tests.proxy.test_cli import running, sign, until


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Installation:
    return Installation.make(tmp_path, capsys)


@contextmanager
def cloud(path: Path, hostname: str = "localhost") -> Iterator[tuple[int, Path]]:
    """A TLS server as a cloud service: its port and its authority."""
    ca = make_server_ca()
    certificate_file, key_file = write_credential(issue_server(ca, [hostname]), path, f"cloud-{hostname}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            try:
                with context.wrap_socket(connection, server_side=True) as tls:
                    tls.settimeout(5)
                    tls.recv(1)
            except OSError:
                connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], write_certificate(ca.certificate, path / f"cloud-{hostname}-ca.pem")
    finally:
        ended.set()
        thread.join()
        listener.close()


def provision(site: Installation, acme: Tenant, upstream: str) -> None:
    root = write_certificate(acme.root.certificate, site.path / "root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    csr = site.path / "drive.csr"
    site.ask("service", "add", "acme/drive", "--upstream", upstream, "--csr", str(csr))
    site.ask("service", "import-cert", "acme/drive", str(sign(acme, csr)))


def trust(site: Installation, ca_file: Path) -> None:
    site.config_file.write_text(site.config_file.read_text() + f'[engine]\nupstream_ca_file = "{ca_file}"\n')


def checks_of(site: Installation, *, wall_s: float | None = None) -> dict[str, Check]:
    clock = SystemClock() if wall_s is None else ManualClock(wall_s=wall_s)
    return {check.name: check for check in examine(site.config_file, site.settings, clock)}


def test_a_sound_installation(site: Installation, acme: Tenant) -> None:
    with cloud(site.path) as (port, ca_file):
        trust(site, ca_file)
        provision(site, acme, f"https://localhost:{port}")
        code, out, err = site.run("doctor", as_json=True)
    assert code == 0, out + err
    report = json.loads(out)
    assert report["ok"] is True
    assert not [check for check in report["checks"] if check["outcome"] == "failed"]
    names = {check["name"] for check in report["checks"]}
    assert {
        "configuration", "engine", "clock", "state_dir", "audit log", "push certificate", "upstream roots",
        "database", "tenant acme root", "tenant acme interception CA", "service acme/drive", "push", "health",
        "upstream of acme/drive",
    } <= names  # fmt: skip


def test_nothing_is_created(site: Installation) -> None:
    before = {path.name for path in site.path.iterdir()}
    found = checks_of(site)
    assert {path.name for path in site.path.iterdir()} == before
    assert "failed" not in {check.outcome for check in found.values()}, "a fresh installation is sound"
    assert "sealgate tenant add" in found["database"].detail
    assert all(check.mend for check in found.values() if check.outcome != "ok")


def test_a_bad_configuration_is_the_only_finding(site: Installation) -> None:
    site.config_file.write_text("[proxy]\n")
    found = checks_of(site)
    assert list(found) == ["configuration"]
    assert found["configuration"].outcome == "failed"
    code, text, _ = site.run("doctor")
    assert code == ExitCode.FAILED
    assert "mend:" in text


def test_files_that_others_may_read(site: Installation, acme: Tenant) -> None:
    provision(site, acme, "https://127.0.0.1:1")
    (site.path / "push.key").chmod(0o644)
    site.state_dir.chmod(0o755)
    (key,) = (site.state_dir / "keys").rglob("*.key")
    key.chmod(0o640)
    (ca_key,) = (site.state_dir / "ca").glob("*.key")
    ca_key.chmod(0o604)
    found = checks_of(site)
    for name in ("push certificate", "state_dir", "service acme/drive", "tenant acme interception CA"):
        assert found[name].outcome == "failed", name
        assert "chmod" in f"{found[name].detail} {found[name].mend}"


def test_missing_and_exchanged_keys(site: Installation, acme: Tenant) -> None:
    provision(site, acme, "https://127.0.0.1:1")
    (key,) = (site.state_dir / "keys").rglob("*.key")
    content = key.read_bytes()
    (ca_key,) = (site.state_dir / "ca").glob("*.key")
    key.write_bytes(ca_key.read_bytes())
    assert "not the key" in checks_of(site)["service acme/drive"].detail
    key.unlink()
    assert checks_of(site)["service acme/drive"].outcome == "failed"
    key.touch(mode=0o600)
    key.write_bytes(content)
    assert checks_of(site)["service acme/drive"].outcome == "ok"
    site.ask("service", "renew", "acme/drive", "--csr", str(site.path / "new.csr"))
    assert "private keys" not in checks_of(site), "the key of a renewal under way is in use"
    stray = key.with_name("drive-00000000.key")
    stray.write_bytes(content)
    assert str(stray) in checks_of(site)["private keys"].detail


def test_certificates_about_to_end(site: Installation, acme: Tenant) -> None:
    provision(site, acme, "https://127.0.0.1:1")
    names = ("tenant acme interception CA", "service acme/drive", "push certificate")
    two_years = 730 * 86_400.0
    now_s = datetime.now(UTC).timestamp()
    assert checks_of(site)[names[0]].outcome == "ok"
    assert checks_of(site, wall_s=now_s + two_years - 86_400 * 20)[names[0]].outcome == "warning"
    found = checks_of(site, wall_s=now_s + 100 * 365 * 86_400)
    assert [found[name].outcome for name in names] == ["failed"] * 3
    assert found["tenant acme"].outcome == "failed"


def test_a_service_without_certificate_is_a_warning(site: Installation, acme: Tenant) -> None:
    root = write_certificate(acme.root.certificate, site.path / "root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    csr = str(site.path / "drive.csr")
    site.ask("service", "add", "acme/drive", "--upstream", "https://127.0.0.1:1", "--csr", csr)
    assert checks_of(site)["service acme/drive"].outcome == "warning"


def test_a_taken_port(site: Installation) -> None:
    push = site.settings().push
    with socket.create_server((push.host, push.port)):
        found = checks_of(site)
    assert found["push"].outcome == "failed"
    assert str(push.port) in found["push"].detail
    assert found["health"].outcome == "ok"


def test_upstreams_are_reached_and_verified(site: Installation, acme: Tenant) -> None:
    with cloud(site.path) as (port, _), cloud(site.path, "elsewhere.example") as (other_port, other_ca):
        provision(site, acme, f"https://localhost:{port}")
        found = checks_of(site)["upstream of acme/drive"]
        assert found.outcome == "failed", "its authority is not one of certifi's"
        assert "not verified" in found.detail
        site.ask("service", "update", "acme/drive", "--upstream", f"https://localhost:{other_port}")
        trust(site, other_ca)
        found = checks_of(site)["upstream of acme/drive"]
        assert found.outcome == "failed", "the certificate names another host"
    found = checks_of(site)["upstream of acme/drive"]
    assert found.outcome == "failed", "nobody listens"


def test_a_broken_audit_log(site: Installation, acme: Tenant) -> None:
    provision(site, acme, "https://127.0.0.1:1")
    audit = site.state_dir / "audit.jsonl"
    audit.write_bytes(b'{"seq":1}\n')
    audit.chmod(0o600)
    assert checks_of(site)["audit log"].outcome == "failed"


def test_an_old_schema(site: Installation, acme: Tenant) -> None:
    provision(site, acme, "https://127.0.0.1:1")
    with closing(sqlite3.connect(site.state_dir / "directory.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
    found = checks_of(site)["database"]
    assert found.outcome == "failed"
    assert "schema version 0000" in found.detail


def test_an_empty_database_is_a_fresh_one(site: Installation) -> None:
    site.state_dir.mkdir(mode=0o700)
    (site.state_dir / "directory.db").touch(mode=0o600)
    assert checks_of(site)["database"].outcome == "ok"


def test_a_foreign_program_at_a_listener_of_the_running_proxy(site: Installation, acme: Tenant) -> None:
    root = write_certificate(acme.root.certificate, site.path / "root.pem")
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        address = f"127.0.0.1:{foreign.getsockname()[1]}"
        site.ask("tenant", "add", "acme", "--root", str(root), "--forward-listen", address)
        with running(site):
            until("its listeners", site, lambda: "not served" in (site.path / "log").read_text())
            found = checks_of(site)
            assert found["readiness"].outcome == "failed"
            assert address in found["readiness"].detail
            assert found["forward proxy of acme"].outcome == "failed"
            assert found["push"].outcome == found["health"].outcome == "ok"
            free = f"127.0.0.1:{free_port()}"
            site.ask("tenant", "update", "acme", "--forward-listen", free)
            until("readiness", site, lambda: checks_of(site)["readiness"].outcome == "ok")
            assert checks_of(site)["forward proxy of acme"].outcome == "ok"


def test_a_foreign_program_at_the_health_port(site: Installation, acme: Tenant) -> None:
    provision(site, acme, "https://127.0.0.1:1")
    clock = SystemClock()
    with cloud(site.path) as (port, _):
        text = site.config_file.read_text()
        health = f"port = {site.settings().health.port}"
        site.config_file.write_text(text.replace(health, f"port = {port}"))
        log = AuditLog.open(site.settings().proxy.audit_file, clock)  # as a running proxy holds it
        try:
            found = checks_of(site)
        finally:
            log.close()
    assert found["readiness"].outcome == "failed"
    assert "no answer of a proxy" in found["readiness"].detail


def test_the_encryption_services_listeners_are_looked_at(site: Installation) -> None:
    ca = make_server_ca()
    certificate, key = write_credential(issue_server(ca), site.path, "kms")
    roots = write_certificate(ca.certificate, site.path / "kms-clients.pem")
    tls_port, plain_port = free_port(), free_port()
    site.config_file.write_text(
        site.config_file.read_text()
        + f'[[encryption_service.listen]]\nhost = "127.0.0.1"\nport = {tls_port}\ndialects = ["xks"]\n'
        + f'certificate_file = "{certificate}"\nkey_file = "{key}"\nclient_roots_file = "{roots}"\n'
        + f'[[encryption_service.listen]]\nhost = "127.0.0.1"\nport = {plain_port}\nplain = true\n'
        + 'dialects = ["transit"]\n'
    )
    with socket.create_server(("127.0.0.1", plain_port)):
        checks = {
            (check.name, check.outcome): check
            for check in examine(site.config_file, site.settings, SystemClock())
        }
    name = f"certificate of encryption service at 127.0.0.1:{tls_port}"
    assert (name, "ok") in checks
    assert "client_subject" in (checks[name, "warning"].mend or "")
    assert (f"encryption service at 127.0.0.1:{tls_port}", "ok") in checks
    assert (f"encryption service at 127.0.0.1:{plain_port}", "failed") in checks
    key.chmod(0o644)
    assert checks_of(site)[name].outcome == "failed"


def test_named_keys_and_stored_secrets(site: Installation, acme: Tenant) -> None:
    root = write_certificate(acme.root.certificate, site.path / "root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    csr = site.path / "orders.csr"
    site.ask("key", "add", "acme/orders", "--csr", str(csr))
    waiting = checks_of(site)["key acme/orders"]
    assert waiting.outcome == "warning"
    assert "sealgate key import-cert acme/orders" in (waiting.mend or "")
    site.ask("key", "import-cert", "acme/orders", str(sign(acme, csr)))
    settings = site.path / "xks.json"
    settings.write_text('{"stores": [{"prefix": "a1", "keys": {"k": "orders"}}]}')
    site.ask("dialect", "set", "acme", "xks", "--settings", str(settings))
    assert "stored secrets" not in checks_of(site)
    site.ask("credential", "issue", "acme", "xks", "--label", "aws", "--endpoint", "a1")
    sound = checks_of(site)
    assert (sound["key acme/orders"].outcome, sound["stored secrets"].outcome) == ("ok", "ok")
    (file_key,) = (site.state_dir / "file-keys").iterdir()
    file_key.unlink()
    lost = checks_of(site)["stored secrets"]
    assert lost.outcome == "failed"
    assert "file-keys" in (lost.mend or "")


def test_the_kacls_of_the_manual_and_its_token_issuers(site: Installation, acme: Tenant) -> None:
    """The settings that docs/encryption-service-kacls.md shows, but for an issuer that nobody runs here."""
    page = (Path(__file__).parents[3] / "docs" / "encryption-service-kacls.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    root = write_certificate(acme.root.certificate, site.path / "root.pem")
    site.ask("tenant", "add", "acme", "--root", str(root))
    site.ask("key", "add", "acme/workspace", "--csr", str(site.path / "a.csr"))
    sign_it = ("--use", "sign", "--algorithm", "RS256")
    site.ask("key", "add", "acme/workspace-id", *sign_it, "--csr", str(site.path / "b.csr"))
    closed = f"https://127.0.0.1:{free_port()}/keys"
    document = json.loads(shown)
    (place,) = document["endpoints"]
    place["authentication_issuers"][0]["jwks_url"] = closed
    place["authorization_issuers"] = [{"issuer": "google", "audience": "x", "jwks_url": closed}]
    settings = site.path / "kacls.json"
    settings.write_text(json.dumps(document))
    site.ask("dialect", "set", "acme", "kacls", "--settings", str(settings))
    assert [name for name in checks_of(site) if "kacls" in name] == ["kacls of acme"]  # no listener speaks it
    site.config_file.write_text(
        site.config_file.read_text()
        + f'[[encryption_service.listen]]\nhost = "127.0.0.1"\nport = {free_port()}\nplain = true\n'
        + 'dialects = ["kacls"]\n'
    )
    checks = checks_of(site)
    for issuer in ("https://idp.acme.example", "google"):
        found = checks[f"kacls of acme: keys of {issuer}"]
        assert found.outcome == "failed"
        assert "private_hosts" in (found.mend or "")
    settings.write_text(json.dumps(document).replace("https://kacls.example.com", "http://kacls.example.com"))
    code, error = site.refused("dialect", "set", "acme", "kacls", "--settings", str(settings))
    assert code is ExitCode.REFUSED
    assert "https://" in error["cause"]


def test_a_dialect_that_is_on_and_that_no_listener_speaks_is_told() -> None:
    entry = DialectEntry(tenant="acme", dialect=DialectName.TRANSIT, settings=TransitSettings())
    directory = ServiceDirectory(keys={}, dialects={("acme", DialectName.TRANSIT): entry}, credentials={})

    def told(*dialects: DialectName) -> list[str]:
        listeners = tuple(
            ListenSettings(host="127.0.0.1", port=8200 + i, plain=True, dialects=(dialect,))
            for i, dialect in enumerate(dialects)
        )
        settings = EncryptionServiceSettings(listen=listeners)
        return [check.name for check in unheard_dialects(directory, settings)]

    assert told() == told(DialectName.NATIVE) == ["transit of acme"]
    assert told(DialectName.NATIVE, DialectName.TRANSIT) == []
