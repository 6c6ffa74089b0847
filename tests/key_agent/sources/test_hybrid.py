"""Sealing to an asymmetric KEK's public half: its sizes, its place, and a second implementation of JWE."""

import base64
import json
import os
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jwe
from joserfc.jwk import ECKey

from key_agent.sources.hybrid import (
    HybridError,
    agreed_content_key,
    encapsulation_size,
    ephemeral_point,
    hybrid_size,
    open_sealed,
    seal_to_public_key,
)
from key_agent.sources.source import WrapMethod

RSA = rsa.generate_private_key(public_exponent=65537, key_size=3072)
SHORT_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
METHODS = [WrapMethod.RSA_OAEP_256, WrapMethod.RSA_OAEP_1, WrapMethod.ECDH_ES]
BINDING = b"a place"


def public_der(method: WrapMethod) -> bytes:
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = EC if method is WrapMethod.ECDH_ES else RSA
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def in_the_hsm(method: WrapMethod, sealed: bytes, binding: bytes) -> bytes:
    """What the HSM does with the private key, and the worker with the result: the content key."""
    if method is WrapMethod.ECDH_ES:
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), ephemeral_point(sealed))
        return agreed_content_key(EC.exchange(ec.ECDH(), point), sealed, binding)
    digest = SHA256() if method is WrapMethod.RSA_OAEP_256 else SHA1()
    return RSA.decrypt(sealed[: encapsulation_size(method)], padding.OAEP(padding.MGF1(digest), digest, None))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [32, 138, 1794])
def test_what_is_sealed_comes_back_and_has_its_size(method: WrapMethod, size: int) -> None:
    material, content_key = os.urandom(size), os.urandom(32)
    sealed = seal_to_public_key(method, public_der(method), content_key, material, BINDING)
    assert len(sealed) == hybrid_size(method, size)
    assert material not in sealed
    assert in_the_hsm(method, sealed, BINDING) == content_key
    assert open_sealed(method, content_key, sealed, BINDING) == material
    assert sealed != seal_to_public_key(method, public_der(method), content_key, material, BINDING)


@pytest.mark.parametrize("method", METHODS)
def test_another_place_or_any_change_is_refused(method: WrapMethod) -> None:
    content_key = os.urandom(32)
    sealed = seal_to_public_key(method, public_der(method), content_key, b"m" * 32, BINDING)
    with pytest.raises(HybridError):
        open_sealed(method, content_key, sealed, b"another place")
    start = encapsulation_size(method)
    for index in range(start, len(sealed), 7):
        flipped = sealed[:index] + bytes([sealed[index] ^ 1]) + sealed[index + 1 :]
        with pytest.raises(HybridError):
            open_sealed(method, content_key, flipped, BINDING)
    for cut in (start, start + 11, len(sealed) - 1):
        with pytest.raises(HybridError):
            open_sealed(method, content_key, sealed[:cut], BINDING)


def test_the_agreement_is_bound_to_its_place() -> None:
    sealed = seal_to_public_key(
        WrapMethod.ECDH_ES, public_der(WrapMethod.ECDH_ES), os.urandom(32), b"m" * 32, BINDING
    )
    with pytest.raises(HybridError, match="gives another key"):
        in_the_hsm(WrapMethod.ECDH_ES, sealed, b"another place")
    with pytest.raises(HybridError, match="no point"):
        ephemeral_point(b"\x04" + bytes(64) + sealed[65:])
    # Compressed or infinite points are other spellings than the format's.
    with pytest.raises(HybridError, match="no point"):
        ephemeral_point(b"\x02" + sealed[1:])


def test_the_agreement_is_jwes() -> None:
    """joserfc opens our key agreement: ECDH-ES+A256KW with the binding's hash as PartyVInfo."""
    content_key = os.urandom(32)
    sealed = seal_to_public_key(
        WrapMethod.ECDH_ES, public_der(WrapMethod.ECDH_ES), content_key, b"material", BINDING
    )
    point, wrapped, rest = sealed[:65], sealed[65:105], sealed[105:]

    def b64u(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    header = {
        "alg": "ECDH-ES+A256KW",
        "enc": "A256GCM",
        "apv": b64u(sha256(BINDING).digest()),
        "epk": {"kty": "EC", "crv": "P-256", "x": b64u(point[1:33]), "y": b64u(point[33:])},
    }
    protected = b64u(json.dumps(header).encode())
    # The content again, under JWE's own associated data: what is judged is how the content key gets across.
    iv = rest[:12]
    body = AESGCM(content_key).encrypt(iv, b"material", protected.encode())
    token = ".".join([protected, b64u(wrapped), b64u(iv), b64u(body[:-16]), b64u(body[-16:])])
    key = ECKey.import_key(EC)
    registry = jwe.JWERegistry(algorithms=["ECDH-ES+A256KW", "A256GCM"])
    assert jwe.decrypt_compact(token, key, registry=registry).plaintext == b"material"


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (WrapMethod.RSA_OAEP_256, EC.public_key()),
        (WrapMethod.ECDH_ES, RSA.public_key()),
        (WrapMethod.ECDH_ES, ec.generate_private_key(ec.SECP384R1()).public_key()),
        (
            WrapMethod.RSA_OAEP_256,
            SHORT_RSA.public_key(),
        ),
    ],
)
def test_keys_of_another_kind_are_refused(
    method: WrapMethod, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
) -> None:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(HybridError):
        seal_to_public_key(method, der, os.urandom(32), b"m" * 32, BINDING)
    with pytest.raises(HybridError, match="not a public key"):
        seal_to_public_key(method, b"rubbish", os.urandom(32), b"m" * 32, BINDING)
