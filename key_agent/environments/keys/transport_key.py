"""The key pair that key material for this environment is sealed to on its way here, where the KEK has no
public half.

1. EC P-256, made by the agent, in `state_dir` with mode 0600. Its certificate is self-signed: what vouches
   for it is that the environment's request to join names it, signed with the registry key whose fingerprint
   two administrators have compared.
2. It wraps nothing that is stored: material is opened in the worker that wraps it under the KEK.
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from envelope.certificates import key_usage
from runtime.files import replace_file, write_new_file

KEY_NAME: Final = "transport.key"
CERTIFICATE_NAME: Final = "transport.pem"
_VALIDITY: Final = timedelta(days=30 * 365)
"""The row that names it is what ends it."""


def transport_files(state_dir: Path) -> tuple[Path, Path]:
    """Certificate and key; made if there are none. OSError."""
    certificate_file, key_file = state_dir / CERTIFICATE_NAME, state_dir / KEY_NAME
    if not os.path.lexists(key_file):
        key = ec.generate_private_key(ec.SECP256R1())
        # The certificate first: a key without one would never be completed.
        replace_file(certificate_file, _certificate(key).public_bytes(Encoding.PEM))
        write_new_file(key_file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate_file, key_file


def _certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sealgate transport key")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _VALIDITY)
        .add_extension(key_usage(key_agreement=True), critical=True)
        .sign(key, hashes.SHA256())
    )
