import os
import re
import shlex
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from certs import pki
from envelope.certificates import AnyHolder, Identity, Role, identity_uri, read_identity, verify_certificate
from tests.pki import Tenant, make_csr, make_tenant, new_key, rsa_key

URI = "urn:sealgate:acme:service:s3"


def cli(*arguments: str | Path) -> int:
    return pki.main([str(argument) for argument in arguments])


def test_roots_differ_and_know_their_tenant() -> None:
    one, two = pki.make_root("acme"), pki.make_root("acme")
    assert one.key.private_numbers() != two.key.private_numbers()
    assert pki.tenant_of(one.certificate) == "acme"


def test_a_server_ca_is_no_tenants_root() -> None:
    with pytest.raises(pki.PkiError, match="not a tenant's root"):
        pki.tenant_of(pki.make_server_ca("servers").certificate)


@pytest.mark.parametrize("key_type", ["p256", "p384", "rsa-2048", "rsa-3072"])
def test_a_csr_is_signed(acme: Tenant, key_type: str) -> None:
    key = new_key(key_type)
    certificate = pki.sign_service_csr(acme.root, make_csr(key, [URI]), timedelta(days=1))
    assert certificate.public_key() == key.public_key()
    now_s = certificate.not_valid_after_utc.timestamp()
    identity = Identity("acme", Role.SERVICE, "s3")
    assert (
        verify_certificate(certificate, root=acme.root.certificate, expected=identity, now_s=now_s)
        == identity
    )


@pytest.mark.parametrize(
    ("uris", "reason"),
    [
        (["urn:sealgate:globex:service:s3"], "not of tenant acme"),
        (["urn:sealgate:acme:agent:hq:signing"], "not a network service"),
        (["urn:sealgate:acme:agent:hq:tls"], "not a network service"),
        ([], "exactly one"),
        ([URI, "urn:sealgate:acme:service:box"], "exactly one"),
        (["urn:sealgate:acme:service:S3"], "not valid"),
    ],
)
def test_a_csr_for_something_else_is_refused(acme: Tenant, uris: list[str], reason: str) -> None:
    with pytest.raises(pki.PkiError, match=reason):
        pki.sign_service_csr(acme.root, make_csr(new_key(), uris))


def test_a_csr_with_a_weak_key_is_refused(acme: Tenant) -> None:
    with pytest.raises(pki.PkiError, match="1024 bits"):
        pki.sign_service_csr(acme.root, make_csr(rsa_key(1024), [URI]))


def test_a_csr_that_its_key_did_not_sign_is_refused(acme: Tenant) -> None:
    der = bytearray(make_csr(new_key(), [URI]).public_bytes(Encoding.DER))
    position = der.index(b"acme:service:s3")
    der[position : position + 15] = b"acme:service:s4"
    forged = x509.load_der_x509_csr(bytes(der))
    assert read_identity(forged).name == "s4"
    with pytest.raises(pki.PkiError, match="not signed by its own key"):
        pki.sign_service_csr(acme.root, forged)


def test_a_root_issues_agents_of_its_own_tenant_only(acme: Tenant) -> None:
    with pytest.raises(pki.PkiError, match="not of tenant acme"):
        pki.issue_agent_signing(acme.root, "globex", "hq")
    with pytest.raises(pki.PkiError, match="not of tenant acme"):
        pki.issue_agent_tls(acme.root, "globex", "hq")


def test_a_server_needs_a_name() -> None:
    with pytest.raises(pki.PkiError, match="host name"):
        pki.issue_server(pki.make_server_ca("servers"), [])


def test_private_keys_are_not_in_a_repr(acme: Tenant) -> None:
    secret = format(acme.root.key.private_numbers().private_value, "x")
    assert secret not in repr(acme.root)
    assert secret not in repr(acme)


def test_files(tmp_path: Path) -> None:
    root = pki.make_root("acme")
    certificate_file, key_file = pki.write_credential(root, tmp_path / "new", "root")
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert certificate_file.read_bytes().count(b"-----BEGIN") == 1
    again = pki.read_credential(tmp_path / "new", "root")
    assert again.certificate == root.certificate
    assert again.key.private_numbers() == root.key.private_numbers()


def test_no_key_is_overwritten(tmp_path: Path) -> None:
    _, key_file = pki.write_credential(pki.make_root("acme"), tmp_path, "root")
    before = key_file.read_bytes()
    with pytest.raises(FileExistsError):
        pki.write_credential(pki.make_root("acme"), tmp_path, "root")
    assert key_file.read_bytes() == before


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    pki.write_credential(pki.make_root("acme"), tmp_path, "root")
    other, _ = pki.write_credential(pki.make_root("acme"), tmp_path / "other", "root")
    other.replace(tmp_path / "root.pem")
    with pytest.raises(pki.PkiError, match="not the key of"):
        pki.read_credential(tmp_path, "root")
    (tmp_path / "root.pem").write_text("nothing")
    with pytest.raises(pki.PkiError, match="no usable"):
        pki.read_credential(tmp_path, "root")


def test_the_commands_of_a_new_tenant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca, agent = tmp_path / "ca", tmp_path / "agent"
    assert cli("root", "--tenant", "acme", "--out", ca) == 0
    csr_file, certificate_file = tmp_path / "s3.csr", tmp_path / "out" / "s3.pem"
    key = new_key()
    csr_file.write_bytes(make_csr(key, [URI]).public_bytes(Encoding.PEM))
    assert cli("sign-service", "--root", ca, "--csr", csr_file, "--out", certificate_file, "--days", "7") == 0
    assert cli("agent", "--root", ca, "--agent", "hq", "--host", "127.0.0.1", "--out", agent) == 0
    assert cli("server-ca", "--name", "servers", "--out", tmp_path / "servers") == 0
    assert (
        cli("server", "--ca", tmp_path / "servers", "--name", "localhost", "--name", "::1", "--out", tmp_path)
        == 0
    )
    assert cli("interception-ca", "--tenant", "acme", "--out", tmp_path) == 0
    written = capsys.readouterr().out.splitlines()
    assert str(certificate_file) in written
    assert all(Path(line).is_file() for line in written)

    root = x509.load_pem_x509_certificate((ca / "root.pem").read_bytes())
    certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(days=7)
    now_s = certificate.not_valid_before_utc.timestamp() + 600
    for file, role in (
        (certificate_file, Role.SERVICE),
        (agent / "signing.pem", Role.AGENT_SIGNING),
        (agent / "tls.pem", Role.AGENT_TLS),
    ):
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        verify_certificate(certificate, root=root, expected=AnyHolder("acme", role), now_s=now_s)
    for key_file in [*tmp_path.rglob("*.key")]:
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        loaded = serialization.load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)


def test_commands_explain_their_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("root", "--tenant", "Not Valid", "--out", tmp_path) == 1
    assert "'Not Valid' is not valid" in capsys.readouterr().err
    assert cli("root", "--tenant", "acme", "--out", tmp_path) == 0
    assert cli("root", "--tenant", "acme", "--out", tmp_path) == 1
    assert "exists\n  next: choose another --out" in capsys.readouterr().err
    assert cli("agent", "--root", tmp_path / "nowhere", "--agent", "hq", "--out", tmp_path) == 1
    assert "no usable root.pem" in capsys.readouterr().err
    junk = tmp_path / "junk.csr"
    junk.write_text("junk")
    assert cli("sign-service", "--root", tmp_path, "--csr", junk, "--out", tmp_path / "x.pem") == 1
    assert "not a CSR in PEM form" in capsys.readouterr().err
    assert not (tmp_path / "x.pem").exists()


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "certs.pki", "root", "--tenant", "acme", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "root.key").is_file()


def test_the_readmes_commands(tmp_path: Path) -> None:
    readme = (Path(pki.__file__).parent / "README.md").read_text()
    commands = re.findall(r"^\$ (python -m certs\.pki .*?)(?:\s+#.*)?$", readme, re.MULTILINE)
    assert len(commands) == 7
    (tmp_path / "s3.csr").write_bytes(make_csr(new_key(), [URI]).public_bytes(Encoding.PEM))
    for command in commands:
        words = [sys.executable, *shlex.split(command)[1:]]
        environment = os.environ | {"PYTHONPATH": str(Path(pki.__file__).parents[1])}
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
    for file in (
        "acme/root/root.key",
        "s3.pem",
        "acme/agent/tls.pem",
        "acme/lb/tls.pem",
        "servers/server.pem",
    ):
        assert (tmp_path / file).is_file()


def test_openssl_agrees(tmp_path: Path) -> None:
    """Another implementation, as strict as it can be, accepts the chains."""
    tenant = make_tenant("acme")
    root = tmp_path / "root.pem"
    root.write_bytes(pki.certificate_pem(tenant.root.certificate))
    for number, certificate in enumerate(
        [tenant.service().certificate, tenant.agent_signing().certificate, tenant.agent_tls().certificate]
    ):
        leaf = tmp_path / f"{number}.pem"
        leaf.write_bytes(pki.certificate_pem(certificate))
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", root, leaf],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert identity_uri(Identity("acme", Role.SERVICE, "s3")) == URI
