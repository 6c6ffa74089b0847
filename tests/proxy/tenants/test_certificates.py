"""Keys, requests and certificate files of provisioning."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certs import pki
from envelope.certificates import Identity, Role, read_identity, verify_certificate
from envelope.keys import NetworkService
from proxy.tenants.certificates import (
    CredentialError,
    KeyType,
    check_root,
    make_interception_ca,
    make_service_csr,
    new_private_key,
    read_certificate,
    read_private_key,
    write_new_file,
    write_private_key,
)
from tests.fakes.clock import WALL_S
from tests.pki import make_tenant

DRIVE = NetworkService("acme", "drive")


@pytest.mark.parametrize("key_type", list(KeyType))
def test_a_csr_becomes_a_certificate_that_may_receive(key_type: KeyType) -> None:
    tenant = make_tenant("acme")
    key = new_private_key(key_type)
    csr = make_service_csr(DRIVE, key)
    assert read_identity(csr) == Identity("acme", Role.SERVICE, "drive")
    certificate = pki.sign_service_csr(
        tenant.root, csr, timedelta(days=365), valid_from=datetime(2026, 12, 1, tzinfo=UTC)
    )
    identity = verify_certificate(
        certificate,
        root=tenant.root.certificate,
        expected=Identity("acme", Role.SERVICE, "drive"),
        now_s=WALL_S,
    )
    assert identity.name == "drive"
    requested = csr.extensions.get_extension_for_class(x509.KeyUsage).value
    granted = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert requested == granted, "the root need not change what the request asks for"


def test_the_interception_ca_signs_leaves_only_for_two_years() -> None:
    key, certificate = make_interception_ca("acme", now_s=WALL_S)
    assert isinstance(key.curve, ec.SECP256R1)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    now = datetime.fromtimestamp(WALL_S, UTC)
    assert certificate.not_valid_before_utc < now
    assert certificate.not_valid_after_utc - now == timedelta(days=730)
    certificate.verify_directly_issued_by(certificate)
    longest = make_interception_ca("a" * 63, now_s=WALL_S).certificate.subject
    assert len(str(longest.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)) <= 64


def test_private_keys_are_ours_alone_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "acme" / "drive.key"
    key = new_private_key(KeyType.P256)
    write_private_key(key, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    read = read_private_key(path)
    assert read.public_key() == key.public_key()
    before = path.read_bytes()
    with pytest.raises(CredentialError, match="not overwritten"):
        write_private_key(new_private_key(KeyType.P256), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["drive.key"], "no temporary file is left"


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drive.key"
    write_private_key(new_private_key(KeyType.P256), path)
    path.chmod(0o640)
    with pytest.raises(CredentialError, match="chmod 600"):
        read_private_key(path)


def test_unusable_keys_are_refused_by_file_name_alone(tmp_path: Path) -> None:
    secret = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    protected = new_private_key(KeyType.P256).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"pw"),
    )
    for number, content in enumerate((secret, protected, b"", b"-----BEGIN PRIVATE KEY-----\nAAAA")):
        path = tmp_path / f"{number}.key"
        write_new_file(path, content, mode=0o600)
        with pytest.raises(CredentialError) as caught:
            read_private_key(path)
        assert str(path) in str(caught.value)
        assert content.decode()[30:60] not in str(caught.value) or len(content) < 40
    with pytest.raises(CredentialError, match="No such file"):
        read_private_key(tmp_path / "absent")


def test_certificate_files(tmp_path: Path) -> None:
    certificate = make_tenant("acme").root.certificate
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / "pem").write_bytes(pem)
    (tmp_path / "der").write_bytes(certificate.public_bytes(serialization.Encoding.DER))
    (tmp_path / "two").write_bytes(pem + pem)
    (tmp_path / "none").write_bytes(b"hello")
    assert read_certificate(tmp_path / "pem") == read_certificate(tmp_path / "der") == certificate
    for name in ("two", "none", "absent"):
        with pytest.raises(CredentialError, match=name):
            read_certificate(tmp_path / name)


def test_only_a_root_is_a_root() -> None:
    tenant = make_tenant("acme")
    check_root(tenant.root.certificate, now_s=WALL_S)
    for certificate in (tenant.agent_tls().certificate, tenant.service().certificate):
        with pytest.raises(CredentialError, match="not a CA"):
            check_root(certificate, now_s=WALL_S)
    intermediate = pki.make_root("acme")
    crossed = pki.certify(
        intermediate.key.public_key(),
        subject=intermediate.certificate.subject,
        issuer=tenant.root,
        valid_from=datetime(2020, 1, 1, tzinfo=UTC),
        validity=timedelta(days=9000),
        extensions=[
            (extension.value, extension.critical)
            for extension in intermediate.certificate.extensions
            if extension.oid not in (x509.SubjectKeyIdentifier.oid, x509.AuthorityKeyIdentifier.oid)
        ],
    )
    with pytest.raises(CredentialError, match="not self-signed"):
        check_root(crossed, now_s=WALL_S)
    with pytest.raises(CredentialError, match="not now"):
        check_root(tenant.root.certificate, now_s=0)
