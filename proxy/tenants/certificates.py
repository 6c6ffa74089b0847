"""Keys and certificates that provisioning makes or believes.

1. A network service's private key is made here and never travels; the tenant's root signs its CSR.
2. A file with a private key is created with mode 0600 in a directory of mode 0700, written whole and synced
   before its name appears; an existing file is never overwritten.
3. The interception CA belongs to one tenant, can sign leaves only (path length 0) and lives for two years.
"""

import contextlib
import os
import secrets
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from envelope.certificates import Identity, Role, identity_uri, key_usage
from envelope.errors import SealgateError
from envelope.keys import NetworkService
from runtime.files import sync_directory

INTERCEPTION_CA_VALIDITY: Final = timedelta(days=730)
MAX_PEM_BYTES: Final = 1 << 20
_BACKDATE: Final = timedelta(minutes=5)  # a client's clock may lag behind ours

type PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class CredentialError(SealgateError):
    """A key or certificate file that cannot be used; the text names the file and says why."""


class KeyType(StrEnum):
    """Of a network service's key: decides how envelopes are encrypted to it (docs/format.md section 5)."""

    P256 = "p256"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"


class InterceptionCa(NamedTuple):
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def new_private_key(key_type: KeyType) -> PrivateKey:
    match key_type:
        case KeyType.P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyType.RSA_2048:
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case KeyType.RSA_3072:
            return rsa.generate_private_key(public_exponent=65537, key_size=3072)


def make_service_csr(owner: NetworkService, key: PrivateKey) -> x509.CertificateSigningRequest:
    """A request for the certificate of *owner*: its URI SAN and the key usage that its key type needs."""
    uri = identity_uri(Identity(owner.tenant, Role.SERVICE, owner.service))
    is_rsa = isinstance(key, rsa.RSAPrivateKey)
    usage = key_usage(key_encipherment=True) if is_rsa else key_usage(key_agreement=True)
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, owner.tenant),
                    x509.NameAttribute(NameOID.COMMON_NAME, str(owner)[:64]),
                ]
            )
        )
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def make_interception_ca(tenant: str, *, now_s: float) -> InterceptionCa:
    """The CA under which this proxy answers for the services of *tenant*: P-256, leaves only, two years."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.fromtimestamp(int(now_s), UTC)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, tenant),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{tenant[:36]} Sealgate interception CA"),
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + INTERCEPTION_CA_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return InterceptionCa(key, certificate)


def check_root(certificate: x509.Certificate, *, now_s: float) -> None:
    """CredentialError unless *certificate* is a self-signed CA certificate that is valid now."""
    subject = certificate.subject.rfc4514_string()
    now = datetime.fromtimestamp(now_s, UTC)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        is_ca = constraints.ca and usage.key_cert_sign
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        is_ca = False
    if not is_ca:
        raise CredentialError(
            f"{subject} is not a CA certificate (basicConstraints CA, keyUsage keyCertSign)"
        )
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise CredentialError(f"{subject} is not self-signed, so it is not a root") from None
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise CredentialError(
            f"{subject} is valid from {certificate.not_valid_before_utc.isoformat()} "
            f"to {certificate.not_valid_after_utc.isoformat()}, not now"
        )


def read_certificate(path: Path) -> x509.Certificate:
    """The one certificate in the PEM (or DER) file *path*. CredentialError names the file."""
    data = _read(path)
    try:
        if b"-----BEGIN" not in data:
            return x509.load_der_x509_certificate(data)
        certificates = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise CredentialError(f"{path}: not a certificate ({error})") from None
    if len(certificates) != 1:
        raise CredentialError(f"{path}: holds {len(certificates)} certificates, exactly one is expected")
    return certificates[0]


def read_private_key(path: Path) -> PrivateKey:
    """The unencrypted RSA or EC key in PEM file *path*, readable by us alone. CredentialError otherwise."""
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            raise CredentialError(f"{path}: others may read this private key: chmod 600 {path}")
    data = bytearray(_read(path))
    try:
        # Testing for primes costs 36 ms on the event loop; the file is ours and nobody else may write it.
        key = serialization.load_pem_private_key(data, password=None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Without the cause: it may quote the file.
        raise CredentialError(f"{path}: not an unencrypted PEM private key") from None
    finally:
        data[:] = bytes(len(data))
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise CredentialError(f"{path}: neither an RSA nor an EC key")
    return key


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def write_private_key(key: PrivateKey, path: Path) -> None:
    """Write *key* as PKCS#8 PEM (rule 2). CredentialError if the file exists or cannot be written."""
    pem = bytearray(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    try:
        write_new_file(path, pem, mode=0o600)
    finally:
        pem[:] = bytes(len(pem))


def write_new_file(path: Path, data: bytes | bytearray, *, mode: int) -> None:
    """Create *path* whole or not at all, durably. CredentialError if it exists or cannot be written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        make_private_directory(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike rename, refuses to replace
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except FileExistsError:
        raise CredentialError(f"{path} exists and is not overwritten") from None
    except OSError as error:
        raise CredentialError(f"{path}: {error.strerror}") from None


def make_private_directory(path: Path) -> None:
    """Make *path* and what is missing above it with mode 0700. OSError if that fails."""
    if path.is_dir():
        return
    make_private_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(path.parent)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise CredentialError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_PEM_BYTES:
        raise CredentialError(f"{path}: more than {MAX_PEM_BYTES} bytes")
    return data
