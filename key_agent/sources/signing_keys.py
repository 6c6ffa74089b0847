"""Signing key pairs: made outside of the HSM, for proxies sign with them, and wrapped by the KEK like KM.

1. EC and Edwards keys are a number of the right size, so their randomness is ours to choose: the HSM's
   generator and the kernel's, mixed by HKDF-SHA-512. Either alone suffices; neither can be steered by the
   other's owner. A scalar comes from 64 bits more than the order has (FIPS 186-5 A.2.1), so that its bias is
   out of reach.
2. RSA keys are OpenSSL's, from the generator that the kernel seeds. A prime search of our own over the HSM's
   bytes would be worse practice than it cures, and `cryptography` offers no way to seed OpenSSL's.
3. A key is PKCS#8 DER, unencrypted, in `bytes` that the caller wipes. Other copies are best effort.
"""

import os
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from envelope.keys import SigningAlgorithm

SEED_SIZE: Final = 64
"""Bytes that the HSM's generator contributes to one key."""
RSA_BITS: Final = 3072
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_P256_CANDIDATE_SIZE: Final = 40  # 256 + 64 bits
_DER_SEQUENCE: Final = 0x30

type SigningKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


def make_signing_key(algorithm: SigningAlgorithm, hsm_random: bytes) -> bytes:
    """A new key for *algorithm*, PKCS#8 DER. *hsm_random*: 64 bytes from the HSM's generator.

    ValueError if that generator is dead, also where its bytes would not be used.
    """
    if len(hsm_random) != SEED_SIZE or hsm_random == bytes(SEED_SIZE):
        raise ValueError("the HSM's generator gave no random bytes")
    key: SigningKey
    match algorithm:
        case SigningAlgorithm.ES256:
            candidate = int.from_bytes(_mixed(hsm_random, algorithm, _P256_CANDIDATE_SIZE))
            key = ec.derive_private_key(candidate % (_P256_ORDER - 1) + 1, ec.SECP256R1())
        case SigningAlgorithm.EDDSA:
            key = ed25519.Ed25519PrivateKey.from_private_bytes(_mixed(hsm_random, algorithm, 32))
        case SigningAlgorithm.PS256 | SigningAlgorithm.RS256:
            key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def _mixed(hsm_random: bytes, algorithm: SigningAlgorithm, size: int) -> bytes:
    info = b"sealgate/v1 signing key " + algorithm.encode()
    return HKDF(SHA512(), size, salt=os.urandom(SEED_SIZE), info=info).derive(hsm_random)


def is_key_for(algorithm: str | None, der: bytes) -> bool:
    """Whether *der* is exactly one PKCS#8 key of the kind and size that *algorithm* signs with."""
    try:
        # Its numbers are not validated: that takes 0.1 s per RSA key, and a wrapped key is authenticated.
        key = load_der_private_key(der, password=None, unsafe_skip_rsa_key_validation=True)
    except Exception:  # noqa: BLE001 - the parser's ValueError, TypeError, UnsupportedAlgorithm
        return False
    match algorithm:
        case SigningAlgorithm.ES256:
            return isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
        case SigningAlgorithm.EDDSA:
            return isinstance(key, ed25519.Ed25519PrivateKey)
        case SigningAlgorithm.PS256 | SigningAlgorithm.RS256:
            return isinstance(key, rsa.RSAPrivateKey) and key.key_size == RSA_BITS
        case _:
            return False


def der_size(padded: bytes) -> int:
    """Length of the DER SEQUENCE at the beginning of *padded*; 0 if there is none."""
    if len(padded) < 2 or padded[0] != _DER_SEQUENCE:
        return 0
    first = padded[1]
    if first < 0x80:
        size = 2 + first
    else:
        count = first & 0x7F
        if not 1 <= count <= 2 or len(padded) < 2 + count:
            return 0
        size = 2 + count + int.from_bytes(padded[2 : 2 + count])
    return size if size <= len(padded) else 0
