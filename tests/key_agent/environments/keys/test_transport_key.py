"""The key that material on its way is sealed to: made once, whole or not at all."""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from key_agent.environments.keys.transport_key import transport_files


def _pair(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_file, key_file = transport_files(directory)
    key = load_pem_private_key(key_file.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(certificate_file.read_bytes()), key


def test_it_is_made_once_and_for_the_agent_alone(tmp_path: Path) -> None:
    certificate, key = _pair(tmp_path)
    assert certificate.public_key() == key.public_key()
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_agreement
    assert not usage.digital_signature
    assert (tmp_path / "transport.key").stat().st_mode & 0o777 == 0o600
    assert _pair(tmp_path)[0] == certificate


def test_a_crash_between_both_files_leaves_a_pair_in_the_end(tmp_path: Path) -> None:
    transport_files(tmp_path)
    (tmp_path / "transport.key").unlink()  # the certificate was there first
    certificate, key = _pair(tmp_path)
    assert certificate.public_key() == key.public_key()
