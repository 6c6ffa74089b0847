"""Compact JWS and JWE (RFC 7515, 7516), for the few algorithms that envelopes have (docs/adr/0016).

1. Nothing is negotiated: who calls says which algorithm it is. joserfc is the tests' judge of what is written
   here, and writes what is read here.
2. An agent writes tens of thousands of these every five minutes, each at half of what joserfc takes.
3. What holds key material, or opens what holds it, is a buffer with a name, and overwritten when it has
   served; what is returned as `bytearray` is the caller's to overwrite. Only ciphertext becomes text.
4. The caller has checked headers, and that keys and algorithms belong together.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap, aes_key_wrap

from envelope.base64url import Buffer, b64u_decode, b64u_encode, encode_secret, encoded_length
from envelope.memory import wipe

RSA_OAEP_256: Final = "RSA-OAEP-256"
ECDH_ES_A256KW: Final = "ECDH-ES+A256KW"
_CONTENT_KEY_SIZE: Final = 32
_IV_SIZE: Final = 12
_TAG_SIZE: Final = 16
_P256_SIZE: Final = 32
_ES256: Final = ec.ECDSA(SHA256())
_OAEP: Final = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)
# Concat KDF's OtherInfo (RFC 7518 4.6.2): the algorithm, no parties, 256 bits.
_OTHER_INFO: Final = (
    len(ECDH_ES_A256KW).to_bytes(4) + ECDH_ES_A256KW.encode() + bytes(4) + bytes(4) + (256).to_bytes(4)
)


# --- writing ---


def sign_es256(header: str, body: Buffer, key: ec.EllipticCurvePrivateKey) -> bytearray:
    """The compact JWS of *body*. *header*: JSON with alg ES256; *key*: on P-256."""
    written = encode_secret(body)
    lead = b64u_encode(header.encode()).encode() + b"."
    signed = bytearray(len(lead) + len(written) + 1 + encoded_length(2 * _P256_SIZE))
    end = len(lead) + len(written)
    signed[: len(lead)] = lead
    signed[len(lead) : end] = written
    written[:] = bytes(len(written))
    with memoryview(signed) as view:
        r, s = decode_dss_signature(key.sign(view[:end], _ES256))
    signed[end:] = b"." + b64u_encode(r.to_bytes(_P256_SIZE) + s.to_bytes(_P256_SIZE)).encode()
    return signed


def encrypt_to_rsa(header: str, content: Buffer, key: rsa.RSAPublicKey) -> str:
    """The compact JWE of *content*. *header*: JSON with alg RSA-OAEP-256 and enc A256GCM."""
    content_key = os.urandom(_CONTENT_KEY_SIZE)
    try:
        return _encrypt(header, key.encrypt(content_key, _OAEP), content_key, content)
    finally:
        wipe(content_key)


def encrypt_to_ec(header: str, content: Buffer, key: ec.EllipticCurvePublicKey, curve: str) -> str:
    """The compact JWE of *content*. *header*: JSON with alg ECDH-ES+A256KW and enc A256GCM, without `epk`,
    which is added as the last member. *curve*: *key*'s, by JOSE's name.
    """
    ephemeral = ec.generate_private_key(key.curve)
    numbers = ephemeral.public_key().public_numbers()
    size = _coordinate_size(key.curve)
    x, y = (b64u_encode(number.to_bytes(size)) for number in (numbers.x, numbers.y))
    header = f'{header[:-1]},"epk":{{"kty":"EC","crv":"{curve}","x":"{x}","y":"{y}"}}}}'
    wrapping_key = _agreed(ephemeral, key)
    content_key = os.urandom(_CONTENT_KEY_SIZE)
    try:
        return _encrypt(header, aes_key_wrap(wrapping_key, content_key), content_key, content)
    finally:
        wipe(content_key)
        wipe(wrapping_key)


def _encrypt(header: str, encrypted_key: bytes, content_key: bytes, content: Buffer) -> str:
    protected = b64u_encode(header.encode())
    iv = os.urandom(_IV_SIZE)
    sealed = AESGCM(content_key).encrypt(iv, content, protected.encode())
    parts = (encrypted_key, iv, sealed[:-_TAG_SIZE], sealed[-_TAG_SIZE:])
    return ".".join([protected, *map(b64u_encode, parts)])


# --- reading ---


def decrypt_by_rsa(parts: Sequence[str], key: rsa.RSAPrivateKey) -> bytearray:
    """The content of a compact JWE, given as its five parts, with alg RSA-OAEP-256 and enc A256GCM.

    Any exception of `cryptography`, or FormatError or ValueError: it does not open. No text says why.
    """
    return _decrypt(parts, key.decrypt(b64u_decode(parts[1]), _OAEP))


def decrypt_by_ec(parts: Sequence[str], key: ec.EllipticCurvePrivateKey, epk: Mapping[str, str]) -> bytearray:
    """As `decrypt_by_rsa`, with alg ECDH-ES+A256KW. *epk*: the header's, on *key*'s curve."""
    x, y = (b64u_decode(epk[name]) for name in ("x", "y"))
    size = _coordinate_size(key.curve)
    if len(x) != size or len(y) != size:
        raise ValueError("a coordinate has another length than the curve's")
    # Raises for a point that is not on the curve (RFC 7518 4.6, the invalid-curve attack).
    theirs = ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), key.curve).public_key()
    wrapping_key = _agreed(key, theirs)
    try:
        return _decrypt(parts, aes_key_unwrap(wrapping_key, b64u_decode(parts[1])))
    finally:
        wipe(wrapping_key)


def _decrypt(parts: Sequence[str], content_key: bytes) -> bytearray:
    try:
        protected, _, *rest = parts
        iv, ciphertext, tag = map(b64u_decode, rest)
        if len(content_key) != _CONTENT_KEY_SIZE or len(iv) != _IV_SIZE or len(tag) != _TAG_SIZE:
            raise ValueError("key, nonce or tag has another length than A256GCM's")
        content = bytearray(len(ciphertext))
        try:
            AESGCM(content_key).decrypt_into(iv, ciphertext + tag, protected.encode(), content)
        except BaseException:
            content[:] = bytes(len(content))  # it may hold what did not verify
            raise
        return content
    finally:
        wipe(content_key)


def verify_es256(signed: Buffer, signature: bytes, key: ec.EllipticCurvePublicKey) -> None:
    """InvalidSignature or ValueError unless *signature*, r and s of 32 bytes each, is *key*'s of *signed*."""
    if len(signature) != 2 * _P256_SIZE:
        raise ValueError("an ES256 signature has 64 bytes")
    r, s = int.from_bytes(signature[:_P256_SIZE]), int.from_bytes(signature[_P256_SIZE:])
    key.verify(encode_dss_signature(r, s), signed, _ES256)


# --- both ---


def _agreed(ours: ec.EllipticCurvePrivateKey, theirs: ec.EllipticCurvePublicKey) -> bytes:
    shared_secret = ours.exchange(ec.ECDH(), theirs)
    try:
        return ConcatKDFHash(SHA256(), _CONTENT_KEY_SIZE, _OTHER_INFO).derive(shared_secret)
    finally:
        wipe(shared_secret)


def _coordinate_size(curve: ec.EllipticCurve) -> int:
    return (curve.key_size + 7) // 8
