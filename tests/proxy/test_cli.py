"""`sealgate`, command by command, on a real directory."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from certs import pki
from envelope.certificates import fingerprint
from envelope.derive import object_key
from envelope.keys import KeyId, NetworkService
from envelope.objects import Sealer
from proxy.command_line.errors_cli import all_refusals, refusal_table
from runtime.audit import AuditLog
from runtime.cli import ExitCode
from tests.fakes.clock import ManualClock
from tests.pki import Tenant, make_tenant, write_certificate
from tests.ports import free_port
from tests.proxy.installation import Installation

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Installation:
    return Installation.make(tmp_path, capsys)


@pytest.fixture
def root(tmp_path: Path, acme: Tenant) -> str:
    return str(write_certificate(acme.root.certificate, tmp_path / "acme-root.pem"))


def sign(tenant: Tenant, csr_file: Path) -> Path:
    """What the tenant's administrator does with the request."""
    csr = x509.load_pem_x509_csr(csr_file.read_bytes())
    certificate = pki.sign_service_csr(
        tenant.root, csr, timedelta(days=3650), valid_from=datetime(2020, 1, 1, tzinfo=UTC)
    )
    return write_certificate(certificate, csr_file.with_suffix(".pem"))


def provision(site: Installation, tenant: Tenant, root: str) -> None:
    site.ask("tenant", "add", "acme", "--root", root)
    csr = site.path / "drive.csr"
    site.ask("service", "add", "acme/drive", "--upstream", "https://drive.example.com", "--csr", str(csr))
    site.ask("service", "import-cert", "acme/drive", str(sign(tenant, csr)))


def test_the_quick_start(site: Installation, acme: Tenant, root: str) -> None:
    answer = site.ask("tenant", "add", "acme", "--root", root, "--forward-listen", "127.0.0.1:3128")
    assert answer["changed"] is True
    assert answer["tenant"]["root_sha256"] == fingerprint(acme.root.certificate).hex()
    csr = site.path / "drive.csr"
    answer = site.ask(
        "service", "add", "acme/drive", "--upstream", "https://drive.example.com", "--csr", str(csr)
    )
    assert answer["service"]["state"] == "waits for its certificate"
    answer = site.ask("service", "import-cert", "acme/drive", str(sign(acme, csr)))
    assert answer["service"]["state"] == "provisioned"
    listed = site.ask("list")
    assert listed["revision"] == 3
    (tenant,) = listed["tenants"]
    assert tenant["forward_listen"] == "127.0.0.1:3128"
    assert [service["service"] for service in tenant["services"]] == ["acme/drive"]
    _, text, _ = site.run("list")
    assert "acme/drive -> https://drive.example.com:443" in text
    code, pem, _ = site.run("tenant", "ca", "acme")
    assert code == 0
    ca = x509.load_pem_x509_certificate(pem.encode())
    assert "PRIVATE" not in pem
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    changes = site.ask("history")["changes"]
    assert [change["action"] for change in changes] == [
        "tenant-added",
        "service-added",
        "certificate-imported",
    ]
    assert f"(uid {os.getuid()})" in changes[0]["actor"]
    assert site.ask("history", "--after", "2")["changes"][0]["revision"] == 3
    for directory in (site.state_dir, site.state_dir / "keys", site.state_dir / "ca"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for key in site.state_dir.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_doing_it_again_changes_nothing(site: Installation, acme: Tenant, root: str) -> None:
    provision(site, acme, root)
    csr, certificate = site.path / "drive.csr", site.path / "drive.pem"
    request = csr.read_bytes()
    csr.unlink()
    add = ("service", "add", "acme/drive", "--upstream", "https://DRIVE.example.com:443", "--csr", str(csr))
    for command in (
        ("tenant", "add", "acme", "--root", root),
        add,
        ("service", "import-cert", "acme/drive", str(certificate)),
    ):
        assert site.ask(*command)["changed"] is False
    again = x509.load_pem_x509_csr(csr.read_bytes())
    assert again.public_key() == x509.load_pem_x509_csr(request).public_key()
    assert site.ask("list")["revision"] == 3
    code, error = site.refused(*add, "--legacy", "migrate")
    assert (code, error["code"]) == (ExitCode.REFUSED, "refused")


def test_options_of_a_profile(site: Installation, acme: Tenant, root: str) -> None:
    site.ask("tenant", "add", "acme", "--root", root)
    csr = str(site.path / "drive.csr")
    add = ("service", "add", "acme/drive", "--upstream", "https://drive.example", "--csr", csr)
    given = ("--option", "sealed_upload=pass", "--option", "legacy:/old=migrate")
    assert site.ask(*add, *given)["service"]["profile_options"] == {
        "sealed_upload": "pass",
        "legacy": {"/old": "migrate"},
    }
    assert site.ask(*add, *given)["changed"] is False
    update = ("service", "update", "acme/drive")
    more = site.ask(*update, "--option", "legacy:/older=passthrough", "--option", "sealed_upload=")
    assert more["service"]["profile_options"] == {"legacy": {"/old": "migrate", "/older": "passthrough"}}
    assert site.ask("list")["tenants"][0]["services"][0]["profile_options"]["legacy"]["/old"] == "migrate"
    for wrong in (
        "legacy:/old=never",
        "nothing=1",
        "sealed_upload=PASS",
        "legacy:old=migrate",
        "=x",
        "legacy",
    ):
        code, error = site.refused(*update, "--option", wrong)
        assert (code, error["next_step"]) == (ExitCode.USAGE, "see `sealgate profile show generic`")
    detail = site.ask("history")["changes"][-1]["detail"]
    assert detail["profile_options"] == '{"legacy": {"/old": "migrate", "/older": "passthrough"}}'


def test_a_profile_tells_what_it_does(site: Installation) -> None:
    for name in (entry["name"] for entry in site.ask("profile", "list")["profiles"]):
        told = site.ask("profile", "show", name)
        for what in ("encrypts", "sizes", "validators", "digests"):
            assert len(told[what]) > 10
        assert told["limitations"] or told["operations"]
        assert {"legacy", "sealed_upload"} <= set(told["options"])
        _, text, _ = site.run("profile", "show", name)
        for heading in ("Encrypts", "Sizes", "Validators", "Digests", "What stops working on ciphertext"):
            assert heading in text


def test_updates_and_removals(site: Installation, acme: Tenant, root: str, tmp_path: Path) -> None:
    provision(site, acme, root)
    signer = write_certificate(acme.agent_signing().certificate, tmp_path / "signing.pem")
    answer = site.ask(
        "tenant", "update", "acme", "--forward-listen", "127.0.0.1:3129", "--tunnel-host", "*.sso.example",
        "--signer", str(signer),
    )  # fmt: skip
    assert answer["tenant"]["tunnel_hosts"] == ["*.sso.example"]
    assert len(answer["tenant"]["signers"]) == 1
    answer = site.ask("tenant", "update", "acme", "--no-forward", "--no-tunnel-hosts", "--no-signers")
    assert answer["tenant"]["forward_listen"] is None
    assert answer["tenant"]["tunnel_hosts"] == answer["tenant"]["signers"] == []
    answer = site.ask(
        "service", "update", "acme/drive", "--legacy", "migrate", "--reverse-listen", "[::1]:9443"
    )
    assert answer["service"]["legacy"] == "migrate"
    assert answer["service"]["reverse_listen"] == "[::1]:9443"
    assert answer["service"]["state"] == "provisioned"
    for words, names in (
        (("--reverse-name", "files.acme.example"), ["files.acme.example"]),
        (("--any-reverse-name",), ["*"]),
        (("--own-reverse-names",), []),
    ):
        answer = site.ask("service", "update", "acme/drive", *words)
        assert answer["service"]["reverse_names"] == names
    csr = site.path / "new.csr"
    site.ask("service", "renew", "acme/drive", "--csr", str(csr), "--key-type", "rsa-2048")
    answer = site.ask("service", "import-cert", "acme/drive", str(sign(acme, csr)))
    assert answer["changed"] is True
    adding = (
        "service", "add", "acme/files", "--upstream", "https://files.example.com", "--profile", "s3",
        "--reverse-listen", "127.0.0.1:9444", "--reverse-name", "*.files.acme.example",
        "--option", "anonymous=refuse", "--csr", str(csr),
    )  # fmt: skip
    assert site.ask(*adding)["service"]["reverse_names"] == ["*.files.acme.example"]
    assert site.ask(*adding)["changed"] is False
    _, listed, _ = site.run("list")
    assert "in reverse mode as *.files.acme.example\n" in listed
    assert 'options {"anonymous": "refuse"}' in listed
    code, error = site.refused(*adding[:-2], "--reverse-name", "other.example", *adding[-2:])
    assert (code, error["code"]) == (ExitCode.REFUSED, "refused")
    for service in ("acme/drive", "acme/files"):
        site.ask("service", "remove", service)
    site.ask("tenant", "remove", "acme")
    assert site.ask("list")["tenants"] == []
    assert list(site.state_dir.rglob("*.key")) == []
    code, error = site.refused("tenant", "remove", "acme")
    assert (code, error["code"]) == (ExitCode.REFUSED, "not-there")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("tenant", "add", "acme", "--root", "/nonexistent.pem"), ExitCode.USAGE),
        (("tenant", "add", "acme", "--root", "ROOT", "--signer", "/nonexistent.pem"), ExitCode.USAGE),
        (("service", "import-cert", "acme/x", "/nonexistent.pem"), ExitCode.USAGE),
        (("inspect", "/nonexistent"), ExitCode.USAGE),
        (("tenant", "add", "Ac me", "--root", "ROOT"), ExitCode.REFUSED),
        (("tenant", "add", "acme", "--root", "ROOT", "--forward-listen", "8080"), ExitCode.USAGE),
        (("tenant", "add", "acme", "--root", "ROOT", "--tunnel-host", "*.com"), ExitCode.USAGE),
        (("tenant", "add", "acme"), ExitCode.USAGE),
        (("tenant", "update", "acme"), ExitCode.USAGE),
        (("tenant", "update", "acme", "--no-forward", "--forward-listen", "127.0.0.1:1"), ExitCode.USAGE),
        (("tenant", "update", "nobody", "--no-forward"), ExitCode.REFUSED),
        (("tenant", "ca", "nobody"), ExitCode.REFUSED),
        (("service", "add", "drive", "--upstream", "https://a.b", "--csr", "x"), ExitCode.USAGE),
        (("service", "add", "acme/x", "--upstream", "http://a.b", "--csr", "x"), ExitCode.USAGE),
        (
            ("service", "add", "acme/x", "--upstream", "https://a.b", "--csr", "x", "--profile", "none"),
            ExitCode.USAGE,
        ),
        (
            ("service", "add", "acme/x", "--upstream", "https://a.b", "--csr", "x", "--key-type", "dsa"),
            ExitCode.USAGE,
        ),
        (("service", "add", "nobody/x", "--upstream", "https://a.b", "--csr", "x"), ExitCode.REFUSED),
        (("service", "import-cert", "acme/x", "ROOT"), ExitCode.REFUSED),
        (("service", "update", "acme/x", "--legacy", "strict"), ExitCode.REFUSED),
        (("service", "remove", "acme/x"), ExitCode.REFUSED),
        (("profile", "show", "none"), ExitCode.USAGE),
        (("nonsense",), ExitCode.USAGE),
    ],
)
def test_errors_have_a_cause_a_next_step_and_a_code(
    site: Installation, root: str, command: tuple[str, ...], code: ExitCode
) -> None:
    site.ask(
        "tenant",
        "add",
        "globex",
        "--root",
        str(write_certificate(make_tenant("globex").root.certificate, site.path / "g.pem")),
    )
    got, _ = site.refused(*(root if word == "ROOT" else word for word in command))
    assert got == code
    assert site.ask("list")["revision"] == 1


def test_a_foreign_certificate_is_refused(
    site: Installation, acme: Tenant, globex: Tenant, root: str
) -> None:
    provision(site, acme, root)
    foreign = write_certificate(globex.service("drive").certificate, site.path / "foreign.pem")
    code, error = site.refused("service", "import-cert", "acme/drive", str(foreign))
    assert (code, error["code"]) == (ExitCode.REFUSED, "tenant")


def test_the_proxys_own_addresses_are_taken(site: Installation, root: str) -> None:
    push = site.settings().push
    address = f"{push.host}:{push.port}"
    code, error = site.refused("tenant", "add", "acme", "--root", root, "--forward-listen", address)
    assert code == ExitCode.REFUSED
    assert "the proxy itself" in error["cause"]


def test_another_users_state_is_not_touched(site: Installation, root: str) -> None:
    if os.getuid() != 0:
        pytest.skip("giving a directory to another user needs root")
    site.state_dir.mkdir(mode=0o700)
    os.chown(site.state_dir, 65534, 65534)
    code, error = site.refused("tenant", "add", "acme", "--root", root)
    assert (code, error["code"]) == (ExitCode.REFUSED, "user")
    assert "sudo -u nobody" in error["next_step"]
    assert list(site.state_dir.iterdir()) == []


def test_a_lost_database_is_unavailable(site: Installation, root: str) -> None:
    site.state_dir.mkdir(mode=0o700)
    (site.state_dir / "directory.db").write_bytes(b"rubbish" * 1000)
    code, error = site.refused("list")
    assert (code, error["code"]) == (ExitCode.UNAVAILABLE, "database")


def test_configuration_is_checked(site: Installation) -> None:
    assert site.ask("--check-config")["ok"] is True
    (site.path / "push.key").chmod(0o644)
    (site.path / "push.pem").rename(site.path / "push.moved")
    code, error = site.refused("--check-config")
    assert code == ExitCode.USAGE
    assert "push.certificate_file" in error["cause"]
    assert "chmod 600" in error["cause"]
    site.config_file.write_text(site.config_file.read_text() + "[kyes]\n")
    code, error = site.refused("--check-config")
    assert code == ExitCode.USAGE
    assert "keys" in error["cause"]
    code, _ = site.refused("list")
    assert code == ExitCode.USAGE
    code, _, err = site.run()
    assert code == ExitCode.USAGE
    assert "no command given" in err


def test_every_command_has_help_with_an_example(site: Installation) -> None:
    for words in (
        ("tenant", "add"), ("tenant", "update"), ("tenant", "remove"), ("tenant", "ca"), ("service", "add"),
        ("service", "update"), ("service", "renew"), ("service", "import-cert"), ("service", "remove"),
        ("list",), ("history",), ("run",), ("inspect",), ("doctor",), ("errors",), ("profile", "show"),
    ):  # fmt: skip
        code, out, _ = site.run(*words, "--help")
        assert code == 0
        assert "Example: sealgate" in out, words


def test_inspect(site: Installation) -> None:
    owner, key_id = NetworkService("acme", "drive"), KeyId.random()
    sealer = Sealer(object_key(os.urandom(32), owner, key_id), owner, key_id)
    sealed = bytes(sealer.update(b"x" * 100_000)) + sealer.finalize()
    file = site.path / "object"
    file.write_bytes(sealed)
    answer = site.ask("inspect", str(file))
    assert answer["kind"] == "object"
    assert answer["key_id"] == str(key_id)
    assert answer["plain_bytes"] == 100_000
    assert answer["authenticated"] is False
    _, text, _ = site.run("inspect", str(file))
    assert f"key_id {key_id}" in text
    file.write_bytes(sealed[:95])  # no object has this length
    code, out, _ = site.run("inspect", str(file), as_json=True)
    assert code == ExitCode.REFUSED
    assert json.loads(out)["problems"]
    file.write_bytes(b"hello")
    assert site.ask("inspect", str(file))["kind"] == "plain"
    code, error = site.refused("inspect", str(site.path / "absent"))
    assert code == ExitCode.USAGE
    assert "absent" in error["cause"]


def test_the_table_of_errors(site: Installation) -> None:
    _, out, _ = site.run("errors")
    assert out.strip() == refusal_table()
    codes = [entry["code"] for entry in site.ask("errors")["errors"]]
    assert codes == [refusal.code for refusal in all_refusals()]
    assert len(set(codes)) == len(codes)
    document = (ROOT / "docs" / "proxy.md").read_text()
    assert refusal_table() in document, "docs/proxy.md: replace the table by `sealgate errors`"


def test_profiles_are_described(site: Installation) -> None:
    assert "generic" in {profile["name"] for profile in site.ask("profile", "list")["profiles"]}
    _, text, _ = site.run("profile", "show", "generic")
    assert "What stops working" in text


def test_a_request_that_cannot_be_written_is_noticed_before_a_key_is_made(
    site: Installation, root: str
) -> None:
    site.ask("tenant", "add", "acme", "--root", root)
    add = ("service", "add", "acme/drive", "--upstream", "https://drive.example.com", "--csr")
    for csr in (site.path / "none" / "x.csr", site.path):
        code, error = site.refused(*add, str(csr))
        assert code == ExitCode.USAGE
        assert str(csr) in error["cause"]
    assert site.ask("list")["tenants"][0]["services"] == []
    assert not (site.state_dir / "keys").exists()


def test_a_request_that_was_not_written_can_be_had_again(site: Installation, root: str) -> None:
    site.ask("tenant", "add", "acme", "--root", root)
    add = ("service", "add", "acme/drive", "--upstream", "https://drive.example.com", "--csr")
    code, error = site.refused(*add, "/dev/full")  # there, writable, and full
    assert (code, error["code"]) == (ExitCode.FAILED, "csr-not-written")
    assert "repeat the command" in error["next_step"]
    answer = site.ask(*add, str(site.path / "drive.csr"))
    assert answer["changed"] is False
    assert x509.load_pem_x509_csr((site.path / "drive.csr").read_bytes()).is_signature_valid


def test_a_service_of_no_tenant_leaves_nothing_behind(site: Installation, root: str) -> None:
    site.ask("tenant", "add", "acme", "--root", root)
    csr = site.path / "box.csr"
    add = ("service", "add", "nope/box", "--upstream", "https://box.example.com", "--csr", str(csr))
    code, error = site.refused(*add)
    assert (code, error["code"]) == (ExitCode.REFUSED, "not-there")
    assert not csr.exists()
    assert not (site.state_dir / "keys").exists()


def test_another_upstream_is_an_update(site: Installation, acme: Tenant, root: str) -> None:
    provision(site, acme, root)
    csr = str(site.path / "drive.csr")
    code, error = site.refused(
        "service", "add", "acme/drive", "--upstream", "https://elsewhere.example.com", "--csr", csr
    )
    assert code == ExitCode.REFUSED
    assert "sealgate service update acme/drive" in error["next_step"]


@pytest.mark.parametrize("command", [["list"], ["history"], ["tenant", "ca", "acme"]])
def test_looking_creates_nothing(site: Installation, command: list[str]) -> None:
    code, error = site.refused(*command)
    assert code == ExitCode.UNAVAILABLE
    assert "sealgate tenant add" in error["next_step"]
    assert not site.state_dir.exists()


# The program itself.


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_an_environment_without_the_engine_is_named(site: Installation, command: str) -> None:
    script = "import sys; sys.modules['mitmproxy'] = None; from proxy.cli import main; main()"
    words = [sys.executable, "-c", script, "--config", str(site.config_file), command]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    told = ended.stdout + ended.stderr
    assert ended.returncode == (ExitCode.UNAVAILABLE if command == "run" else ExitCode.FAILED), told
    assert "the package mitmproxy is not installed here" in told
    assert "requirements-proxy.lock" in told


def test_what_commands_make_is_this_users_alone(site: Installation, root: str) -> None:
    script = "import os; os.umask(0); from proxy.cli import main; main()"
    words = [sys.executable, "-c", script, "--config", str(site.config_file)]
    csr = site.path / "drive.csr"
    for command in (
        ["tenant", "add", "acme", "--root", root],
        ["service", "add", "acme/drive", "--upstream", "https://drive.example", "--csr", str(csr)],
    ):
        subprocess.run([*words, *command], cwd=ROOT, capture_output=True, check=True)
    made = [site.state_dir, *site.state_dir.rglob("*")]
    assert site.state_dir / "directory.db" in made
    assert [path for path in made if path.stat().st_mode & 0o077 and path.suffix != ".pem"] == []
    assert stat.S_IMODE(csr.stat().st_mode) == 0o644, "the tenant's administrator reads it"


@pytest.mark.parametrize("command", [["list"], ["run"]])
def test_a_state_dir_open_to_others_is_refused(site: Installation, root: str, command: list[str]) -> None:
    site.ask("tenant", "add", "acme", "--root", root)
    site.state_dir.chmod(0o750)
    code, error = site.refused(*command)
    assert (code, error["code"]) == (ExitCode.REFUSED, "mode")
    assert error["next_step"] == f"chmod 700 {site.state_dir}"


@contextmanager
def running(site: Installation) -> Iterator[subprocess.Popen[str]]:
    """`sealgate run` as a process of its own."""
    command = [
        sys.executable,
        "-c",
        "from proxy.cli import main; main()",
        "--config",
        str(site.config_file),
        "run",
    ]
    with (site.path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def until[T](what: str, site: Installation, ask: Any, *, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if answer := ask():
                return answer
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen; log:\n{(site.path / 'log').read_text()[-3000:]}")


def test_the_running_proxy_takes_changes_over_and_records_them(
    site: Installation, acme: Tenant, root: str
) -> None:
    health = site.settings().health
    with running(site) as process:

        def is_ready() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{health.port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)

        until("readiness", site, is_ready)
        listen = f"127.0.0.1:{free_port()}"
        site.ask("tenant", "add", "acme", "--root", root, "--forward-listen", listen)
        audit = site.state_dir / "audit.jsonl"
        until("the audit event", site, lambda: '"change":"tenant-added"' in audit.read_text())

        def answers() -> bool:
            host, _, port = listen.partition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
            return True

        until("the new listener", site, answers)
        report = site.run("doctor", as_json=True)
        checks = {check["name"]: check for check in json.loads(report[1])["checks"]}
        assert checks["forward proxy of acme"]["outcome"] == "ok"
        assert "proxy running" in checks["configuration"]["detail"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, (site.path / "log").read_text()[-3000:]
    AuditLog.open(site.state_dir / "audit.jsonl", ManualClock()).close()  # the chain holds


def test_a_proxy_that_cannot_start_says_why(site: Installation) -> None:
    (site.path / "push.pem").unlink()
    with running(site) as process:
        assert process.wait(timeout=60) != 0
    log = (site.path / "log").read_text()
    assert "push.pem" in log
    assert "next:" in log
    assert "Traceback" not in log
