"""What we write compactly, joserfc reads: signatures, RSA-OAEP-256 and ECDH-ES+A256KW."""

import json
import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jwe, jws
from joserfc.errors import BadSignatureError, DecodeError
from joserfc.jwk import ECKey, RSAKey

from envelope.compact import ECDH_ES_A256KW, RSA_OAEP_256, encrypt_to_ec, encrypt_to_rsa, sign_es256

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
CURVES: dict[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}


def header(algorithm: str) -> str:
    return json.dumps({"alg": algorithm, "enc": "A256GCM", "typ": "t"}, separators=(",", ":"))


def opened(token: str, key: Any, algorithm: str) -> bytes:
    registry = jwe.JWERegistry(algorithms=[algorithm, "A256GCM"])
    content = jwe.decrypt_compact(token, key, registry=registry).plaintext
    assert content is not None
    return content


def test_signatures_are_es256() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = ECKey.import_key(key.public_key())
    # Many, for r or s is shorter than 32 bytes in one of 128.
    for number in range(400):
        body = f"body {number}".encode()
        token = sign_es256('{"alg":"ES256","typ":"t"}', body, key)
        assert jws.deserialize_compact(token, public, algorithms=["ES256"]).payload == body
        assert len(token.split(".")[2]) == 86
    token = sign_es256('{"alg":"ES256","typ":"t"}', b"body", key)
    other = ECKey.import_key(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(BadSignatureError):
        jws.deserialize_compact(token, other, algorithms=["ES256"])


@pytest.mark.parametrize("size", [0, 1, 1000, 40_000])
def test_encryption_to_rsa(size: int) -> None:
    content = os.urandom(size)
    token = encrypt_to_rsa(header(RSA_OAEP_256), content, RSA.public_key())
    assert opened(token, RSAKey.import_key(RSA), RSA_OAEP_256) == content
    assert token != encrypt_to_rsa(header(RSA_OAEP_256), content, RSA.public_key())
    head, rest = token.split(".", 1)
    changed = f"{head[:-1]}{'A' if head[-1] != 'A' else 'B'}.{rest}"
    with pytest.raises((DecodeError, ValueError)):
        opened(changed, RSAKey.import_key(RSA), RSA_OAEP_256)


@pytest.mark.parametrize("curve", CURVES)
def test_encryption_to_elliptic_curves(curve: str) -> None:
    key = ec.generate_private_key(CURVES[curve])
    ours = ECKey.import_key(key)
    tokens = set()
    # Many, for a coordinate begins with a zero byte in one of 128, and has its full length all the same.
    for number in range(300):
        content = f"content {number}".encode()
        token = encrypt_to_ec(header(ECDH_ES_A256KW), content, key.public_key(), curve)
        assert opened(token, ours, ECDH_ES_A256KW) == content
        tokens.add(token)
    assert len(tokens) == 300
