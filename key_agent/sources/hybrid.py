"""Sealing key material to the public half of an asymmetric KEK: any environment can do it, without its HSM.

1. A fresh content key is used once: encapsulated for the KEK, and AES-256-GCM of the material under it, the
   binding as AAD. OAEP alone would hold 318 bytes; a signing key is longer.
2. The algorithms are JWE's (RFC 7518): RSA-OAEP-256, or ECDH-ES+A256KW with A256GCM. The bytes are ours:

       RSA   OAEP(content key)                                  384
       EC    ephemeral public key, uncompressed point            65
             AES key wrap of the content key                     40
       both  IV 12 ‖ ciphertext ‖ tag 16

3. Whoever knows the public key can write such bytes. So they count for nothing by themselves: in the registry
   an HMAC by a key in the HSM follows them (hsm/hybrid_wrapping.py).
4. The binding is in the key agreement too (as PartyVInfo), so a share of one place is useless in another.
"""

import os
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, HashAlgorithm
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from key_agent.sources.source import WrapMethod

CONTENT_KEY_SIZE: Final = 32
IV_SIZE: Final = 12
TAG_SIZE: Final = 16
RSA_SIZE: Final = 384
POINT_SIZE: Final = 65
_WRAPPED_CONTENT_KEY_SIZE: Final = CONTENT_KEY_SIZE + 8
_AGREEMENT: Final = b"ECDH-ES+A256KW"
_OAEP_HASH: Final[dict[WrapMethod, HashAlgorithm]] = {
    WrapMethod.RSA_OAEP_256: SHA256(),
    WrapMethod.RSA_OAEP_1: SHA1(),  # noqa: S303 - in OAEP: no collision resistance is needed
}


class HybridError(Exception):
    """The bytes are not of this form, or not of this place, or the key is not of this method."""


def encapsulation_size(method: WrapMethod) -> int:
    return POINT_SIZE + _WRAPPED_CONTENT_KEY_SIZE if method is WrapMethod.ECDH_ES else RSA_SIZE


def hybrid_size(method: WrapMethod, size: int) -> int:
    """Bytes that *size* bytes of material are sealed to, without the HMAC."""
    return encapsulation_size(method) + IV_SIZE + size + TAG_SIZE


def seal_to_public_key(
    method: WrapMethod, public_key_der: bytes, content_key: bytes, material: bytes, binding: bytes
) -> bytes:
    """*material* sealed to that public key. HybridError if the key is not of *method*.

    *content_key*: 32 fresh random bytes, which the caller wipes.
    """
    try:
        public = load_der_public_key(public_key_der)
    except Exception as error:  # noqa: BLE001 - the parser's ValueError, TypeError, UnsupportedAlgorithm
        raise HybridError(f"not a public key ({type(error).__name__})") from None
    if method is WrapMethod.ECDH_ES:
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise HybridError("the public key is not on P-256")
        encapsulated = _agree(public, content_key, binding)
    else:
        if not isinstance(public, rsa.RSAPublicKey) or public.key_size != 8 * RSA_SIZE:
            raise HybridError(f"the public key is not RSA of {8 * RSA_SIZE} bits")
        digest = _OAEP_HASH[method]
        encapsulated = public.encrypt(content_key, padding.OAEP(padding.MGF1(digest), digest, None))
    iv = os.urandom(IV_SIZE)
    return encapsulated + iv + AESGCM(content_key).encrypt(iv, material, binding)


def open_sealed(method: WrapMethod, content_key: bytes, sealed: bytes, binding: bytes) -> bytes:
    """The material, once the HSM's part has given the content key."""
    rest = sealed[encapsulation_size(method) :]
    try:
        return AESGCM(content_key).decrypt(rest[:IV_SIZE], rest[IV_SIZE:], binding)
    except (InvalidTag, ValueError):
        raise HybridError("does not open with its content key") from None


def ephemeral_point(sealed: bytes) -> bytes:
    """The sender's public key, 65 bytes, once it is known to be on the curve."""
    point = sealed[:POINT_SIZE]
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError:
        raise HybridError("the ephemeral key is no point of P-256") from None
    return point


def agreed_content_key(shared_secret: bytes, sealed: bytes, binding: bytes) -> bytes:
    """The content key from the 32-byte x coordinate that ECDH in the HSM gave."""
    wrapped = sealed[POINT_SIZE : POINT_SIZE + _WRAPPED_CONTENT_KEY_SIZE]
    try:
        return aes_key_unwrap(_wrapping_key(shared_secret, binding), wrapped)
    except (InvalidUnwrap, ValueError):
        raise HybridError("the key agreement gives another key") from None


def _agree(public: ec.EllipticCurvePublicKey, content_key: bytes, binding: bytes) -> bytes:
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    shared_secret = ephemeral.exchange(ec.ECDH(), public)
    point = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return point + aes_key_wrap(_wrapping_key(shared_secret, binding), content_key)


def _wrapping_key(shared_secret: bytes, binding: bytes) -> bytes:
    """Concat KDF with the OtherInfo of RFC 7518 4.6.2: algorithm, no PartyUInfo, the binding's hash, 256."""
    party = sha256(binding).digest()
    other = b"".join(len(part).to_bytes(4) + part for part in (_AGREEMENT, b"", party)) + (256).to_bytes(4)
    return ConcatKDFHash(SHA256(), 32, other).derive(shared_secret)
