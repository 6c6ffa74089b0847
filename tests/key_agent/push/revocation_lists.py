"""Revocation lists, made at run time."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from certs.pki import Credential

LAST_UPDATE = datetime(2027, 1, 1, tzinfo=UTC)


def make_list(
    issuer: Credential,
    revoked: Iterable[x509.Certificate] = (),
    *,
    last_update: datetime = LAST_UPDATE,
    days: int = 3650,
    extension: x509.ExtensionType | None = None,
) -> x509.CertificateRevocationList:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(last_update)
        .next_update(last_update + timedelta(days=days))
    )
    for certificate in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(last_update)
            .build()
        )
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(issuer.key, hashes.SHA256())


def write_lists(path: Path, *lists: x509.CertificateRevocationList) -> None:
    """Whole, as whoever publishes them should: a new file under the old name."""
    new = path.with_suffix(".new")
    new.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in lists))
    new.replace(path)
