"""Signing and verifying with a key at hand: what may be asked of which algorithm, and how it is written.

1. What a key's algorithm does not know is InputRefused, never ignored: a caller who asks for PSS and is
   given something else has no signature he can use.
2. A digest made by the caller has its hash's length, or is refused.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    Prehashed,
    decode_dss_signature,
    encode_dss_signature,
)

from envelope.keys import SigningAlgorithm
from proxy.encryption_service.errors import DoesNotVerify, InputRefused
from proxy.keys.data_key import SigningKey

type PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey

ANY_SALT: Final = -1


class HashName(StrEnum):
    SHA256 = "sha2-256"
    SHA384 = "sha2-384"
    SHA512 = "sha2-512"


class RsaPadding(StrEnum):
    PSS = "pss"
    PKCS1V15 = "pkcs1v15"


class Marshaling(StrEnum):
    """Of an ECDSA signature."""

    ASN1 = "asn1"  # DER
    JWS = "jws"  # r ‖ s, each as long as the curve's order


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureScheme:
    """How to sign; None is the key's own way."""

    hash_name: HashName = HashName.SHA256
    prehashed: bool = False
    padding: RsaPadding | None = None
    """RSA only. None: PKCS #1 v1.5 for an RS256 key, else PSS."""
    salt_length: int | None = None
    """PSS only, bytes. None: the hash's length. ANY_SALT: any, at verification."""
    marshaling: Marshaling | None = None
    """ECDSA only. None: ASN1."""


_HASHES: Final = {
    HashName.SHA256: hashes.SHA256(),
    HashName.SHA384: hashes.SHA384(),
    HashName.SHA512: hashes.SHA512(),
}


def sign(key: SigningKey, algorithm: str | None, message: bytes, scheme: SignatureScheme) -> bytes:
    """The signature of *message*, which is a digest if the scheme says so. InputRefused."""
    match key:
        case ec.EllipticCurvePrivateKey():
            _check(scheme, padding=False, marshaling=True)
            der = key.sign(message, ec.ECDSA(_hash(scheme, message)))
            return _fixed_length(der, key.curve) if scheme.marshaling is Marshaling.JWS else der
        case rsa.RSAPrivateKey():
            _check(scheme, padding=True, marshaling=False)
            if scheme.salt_length == ANY_SALT:
                raise InputRefused("a signature is made with a salt of a given length")
            chosen = _padding(scheme, algorithm, key.key_size)
            return key.sign(message, chosen, _hash(scheme, message))
        case ed25519.Ed25519PrivateKey():
            _check_eddsa(scheme)
            return key.sign(message)


def verify(
    key: PublicKey, algorithm: str | None, signature: bytes, message: bytes, scheme: SignatureScheme
) -> None:
    """DoesNotVerify unless it is *key*'s signature of *message*. InputRefused as `sign`."""
    try:
        match key:
            case ec.EllipticCurvePublicKey():
                _check(scheme, padding=False, marshaling=True)
                digest = _hash(scheme, message)
                if scheme.marshaling is Marshaling.JWS:
                    signature = _der(signature, key.curve)
                key.verify(signature, message, ec.ECDSA(digest))
            case rsa.RSAPublicKey():
                _check(scheme, padding=True, marshaling=False)
                chosen = _padding(scheme, algorithm, key.key_size)
                key.verify(signature, message, chosen, _hash(scheme, message))
            case ed25519.Ed25519PublicKey():
                _check_eddsa(scheme)
                key.verify(signature, message)
    except InvalidSignature:
        raise DoesNotVerify from None


def _check(scheme: SignatureScheme, *, padding: bool, marshaling: bool) -> None:
    if not padding and (scheme.padding is not None or scheme.salt_length is not None):
        raise InputRefused("padding and salt are for RSA keys")
    if not marshaling and scheme.marshaling is not None:
        raise InputRefused("marshaling is for ECDSA keys")


def _check_eddsa(scheme: SignatureScheme) -> None:
    _check(scheme, padding=False, marshaling=False)
    if scheme.prehashed:
        raise InputRefused("an Ed25519 key signs messages, not digests")


def _hash(scheme: SignatureScheme, message: bytes) -> hashes.HashAlgorithm | Prehashed:
    algorithm = _HASHES[scheme.hash_name]
    if not scheme.prehashed:
        return algorithm
    if len(message) != algorithm.digest_size:
        raise InputRefused(f"a {scheme.hash_name} digest has {algorithm.digest_size} bytes")
    return Prehashed(algorithm)


def _padding(scheme: SignatureScheme, algorithm: str | None, key_bits: int) -> padding.AsymmetricPadding:
    chosen = scheme.padding
    if chosen is None:
        chosen = RsaPadding.PKCS1V15 if algorithm == SigningAlgorithm.RS256 else RsaPadding.PSS
    if chosen is RsaPadding.PKCS1V15:
        if scheme.salt_length is not None:
            raise InputRefused("PKCS #1 v1.5 has no salt")
        return padding.PKCS1v15()
    digest = _HASHES[scheme.hash_name]
    mask = padding.MGF1(digest)
    if scheme.salt_length == ANY_SALT:
        return padding.PSS(mask, padding.PSS.AUTO)
    salt = digest.digest_size if scheme.salt_length is None else scheme.salt_length
    if not 0 <= salt <= key_bits // 8 - digest.digest_size - 2:  # RFC 8017 9.1.1
        raise InputRefused(f"a salt of {salt} bytes does not fit this key")
    return padding.PSS(mask, salt)


def _size(curve: ec.EllipticCurve) -> int:
    return (curve.key_size + 7) // 8


def _fixed_length(der: bytes, curve: ec.EllipticCurve) -> bytes:
    r, s = decode_dss_signature(der)
    return r.to_bytes(_size(curve)) + s.to_bytes(_size(curve))


def _der(signature: bytes, curve: ec.EllipticCurve) -> bytes:
    size = _size(curve)
    if len(signature) != 2 * size:
        raise DoesNotVerify
    return encode_dss_signature(int.from_bytes(signature[:size]), int.from_bytes(signature[size:]))
