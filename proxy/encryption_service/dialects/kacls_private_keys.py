"""What a KACLS does with a user's own RSA key (Gmail): decrypt a data key, sign a digest.

1. RSA only, 2048 to 4096 bits, kept as PKCS #8. A key is checked when it is wrapped; a blob that verifies
   holds what was checked, so it is not checked again (it costs more than the use of the key).
2. PKCS #1 v1.5 decryption never says that the padding was wrong: OpenSSL 3.2 and later answers with random
   bytes (implicit rejection), which this module insists on. Only OAEP's padding errors are told, by one text.
3. A digest has the length of its algorithm; signing adds the padding.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)

from envelope.errors import MisuseError
from proxy.encryption_service.dialects.kacls_messages import MalformedError

MIN_BITS: Final = 2048
MAX_BITS: Final = 4096
PKCS1: Final = "RSA/ECB/PKCS1Padding"
_IMPLICIT_REJECTION: Final = 0x30200000

_OAEP: Final[Mapping[str, hashes.HashAlgorithm]] = {
    "RSA/ECB/OAEPwithSHA-1andMGF1Padding": hashes.SHA1(),  # noqa: S303 - OAEP needs no collision resistance
    "RSA/ECB/OAEPwithSHA-256andMGF1Padding": hashes.SHA256(),
    "RSA/ECB/OAEPwithSHA-512andMGF1Padding": hashes.SHA512(),
}
_PKCS1_SIGNATURES: Final[Mapping[str, hashes.HashAlgorithm]] = {
    "SHA256withRSA": hashes.SHA256(),
    "SHA384withRSA": hashes.SHA384(),
    "SHA512withRSA": hashes.SHA512(),
}
_PSS_SIGNATURES: Final[Mapping[str, hashes.HashAlgorithm]] = {
    f"{name}/PSS": algorithm for name, algorithm in _PKCS1_SIGNATURES.items()
}
DECRYPTIONS: Final = frozenset({PKCS1, *_OAEP})
SIGNATURES: Final = frozenset({*_PKCS1_SIGNATURES, *_PSS_SIGNATURES})


def admit(der: bytes) -> tuple[bytes, bytes]:
    """PKCS #8, and SHA-256 of the public half, of a private key that may be wrapped. MalformedError."""
    try:
        key = load_der_private_key(der, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise MalformedError("private_key is not an RSA key in DER, without a password") from None
    if not isinstance(key, rsa.RSAPrivateKey) or not MIN_BITS <= key.key_size <= MAX_BITS:
        raise MalformedError(f"private_key is not an RSA key of {MIN_BITS} to {MAX_BITS} bits")
    pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return pkcs8, spki_hash(key)


def spki_hash(key: rsa.RSAPrivateKey) -> bytes:
    """SHA-256 of the public half's SubjectPublicKeyInfo."""
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def decrypt(pkcs8: bytes, algorithm: str, ciphertext: bytes, label: bytes) -> bytes:
    """The data key. MalformedError for an unknown algorithm, a wrong size, and what OAEP refuses."""
    key = _load(pkcs8)
    if algorithm == PKCS1:
        if label:
            raise MalformedError("PKCS #1 v1.5 has no label")
        _insist_on_implicit_rejection()
        chosen: padding.AsymmetricPadding = padding.PKCS1v15()
    elif algorithm in _OAEP:
        digest = _OAEP[algorithm]
        chosen = padding.OAEP(mgf=padding.MGF1(digest), algorithm=digest, label=label or None)
    else:
        raise MalformedError("the algorithm is not one that private keys decrypt by here")
    if len(ciphertext) != key.key_size // 8:
        raise MalformedError("encrypted_data_encryption_key is not of the key's length")
    try:
        return key.decrypt(ciphertext, chosen)
    except ValueError:
        raise MalformedError("encrypted_data_encryption_key does not decrypt") from None


def sign(pkcs8: bytes, algorithm: str, digest: bytes, salt_length: int | None) -> bytes:
    """The signature of *digest*. MalformedError for an unknown algorithm or a length that does not fit."""
    hash_algorithm = _PKCS1_SIGNATURES.get(algorithm) or _PSS_SIGNATURES.get(algorithm)
    if hash_algorithm is None:
        raise MalformedError("the algorithm is not one that private keys sign by here")
    if len(digest) != hash_algorithm.digest_size:
        raise MalformedError(f"a digest of {hash_algorithm.name} has {hash_algorithm.digest_size} bytes")
    key = _load(pkcs8)
    if algorithm in _PKCS1_SIGNATURES:  # where the salt's length is ignored, as the reference says
        return key.sign(digest, padding.PKCS1v15(), Prehashed(hash_algorithm))
    salt = hash_algorithm.digest_size if salt_length is None else salt_length
    if not 0 <= salt <= key.key_size // 8 - hash_algorithm.digest_size - 2:  # RFC 8017 9.1.1
        raise MalformedError("rsa_pss_salt_length does not fit the key")
    return key.sign(digest, padding.PSS(padding.MGF1(hash_algorithm), salt), Prehashed(hash_algorithm))


def _load(pkcs8: bytes) -> rsa.RSAPrivateKey:
    key = load_der_private_key(pkcs8, password=None, unsafe_skip_rsa_key_validation=True)  # rule 1
    if not isinstance(key, rsa.RSAPrivateKey):
        raise MisuseError("a blob holds a key that `admit` does not let in")
    return key


def _insist_on_implicit_rejection() -> None:
    """Rule 2. An older OpenSSL would make an oracle of us (Bleichenbacher)."""
    if backend.openssl_version_number() < _IMPLICIT_REJECTION:
        raise MalformedError("PKCS #1 v1.5 needs OpenSSL 3.2 or later here")
