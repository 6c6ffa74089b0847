"""Writing compact JWS and JWE (RFC 7515, 7516), for the few algorithms that envelopes have.

1. Writing only. Whatever comes from outside is read by joserfc, with all its checks; and the tests let
   joserfc judge what is written here.
2. An agent writes tens of thousands of these every five minutes, each at half of what joserfc takes, and no
   library keeps copies of the key material on the way.
3. The caller has checked that keys and algorithms belong together.
"""

import os
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

from envelope.base64url import b64u_encode

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


def sign_es256(header: str, body: bytes, key: ec.EllipticCurvePrivateKey) -> str:
    """The compact JWS of *body*. *header*: JSON with alg ES256; *key*: on P-256."""
    signed = f"{b64u_encode(header.encode())}.{b64u_encode(body)}"
    r, s = decode_dss_signature(key.sign(signed.encode(), _ES256))
    return f"{signed}.{b64u_encode(r.to_bytes(_P256_SIZE) + s.to_bytes(_P256_SIZE))}"


def encrypt_to_rsa(header: str, content: bytes, key: rsa.RSAPublicKey) -> str:
    """The compact JWE of *content*. *header*: JSON with alg RSA-OAEP-256 and enc A256GCM."""
    content_key = os.urandom(_CONTENT_KEY_SIZE)
    return _encrypt(header, key.encrypt(content_key, _OAEP), content_key, content)


def encrypt_to_ec(header: str, content: bytes, key: ec.EllipticCurvePublicKey, curve: str) -> str:
    """The compact JWE of *content*. *header*: JSON with alg ECDH-ES+A256KW and enc A256GCM, without `epk`,
    which is added as the last member. *curve*: *key*'s, by JOSE's name.
    """
    ephemeral = ec.generate_private_key(key.curve)
    numbers = ephemeral.public_key().public_numbers()
    size = (key.curve.key_size + 7) // 8
    x, y = (b64u_encode(number.to_bytes(size)) for number in (numbers.x, numbers.y))
    header = f'{header[:-1]},"epk":{{"kty":"EC","crv":"{curve}","x":"{x}","y":"{y}"}}}}'
    shared_secret = ephemeral.exchange(ec.ECDH(), key)
    wrapping_key = ConcatKDFHash(SHA256(), _CONTENT_KEY_SIZE, _OTHER_INFO).derive(shared_secret)
    content_key = os.urandom(_CONTENT_KEY_SIZE)
    return _encrypt(header, aes_key_wrap(wrapping_key, content_key), content_key, content)


def _encrypt(header: str, encrypted_key: bytes, content_key: bytes, content: bytes) -> str:
    protected = b64u_encode(header.encode())
    iv = os.urandom(_IV_SIZE)
    sealed = AESGCM(content_key).encrypt(iv, content, protected.encode())
    parts = (encrypted_key, iv, sealed[:-_TAG_SIZE], sealed[-_TAG_SIZE:])
    return ".".join([protected, *map(b64u_encode, parts)])
