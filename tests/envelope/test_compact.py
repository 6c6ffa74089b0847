"""What we write compactly, joserfc reads, and the other way round: ES256, RSA-OAEP-256, ECDH-ES+A256KW."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap
from joserfc import jwe, jws
from joserfc.errors import BadSignatureError, DecodeError
from joserfc.jwk import ECKey, RSAKey

from envelope.base64url import b64u_decode, b64u_encode
from envelope.compact import (
    ECDH_ES_A256KW,
    RSA_OAEP_256,
    decrypt_by_ec,
    decrypt_by_rsa,
    encrypt_to_ec,
    encrypt_to_rsa,
    sign_es256,
    verify_es256,
)
from envelope.errors import FormatError

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
        token = sign_es256('{"alg":"ES256","typ":"t"}', body, key).decode()
        assert jws.deserialize_compact(token, public, algorithms=["ES256"]).payload == body
        assert len(token.split(".")[2]) == 86
    token = sign_es256('{"alg":"ES256","typ":"t"}', b"body", key).decode()
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


def test_signatures_of_others_are_read() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    signed, good = "", b""
    for number in range(100):
        token = jws.serialize_compact({"alg": "ES256"}, f"body {number}", ECKey.import_key(key))
        signed, _, signature = token.rpartition(".")
        good = b64u_decode(signature)
        verify_es256(signed.encode(), good, key.public_key())
    for wrong in (good[1:], good + b"\0", b"", good[:32], bytes(64), good[32:] + good[:32]):
        with pytest.raises((InvalidSignature, ValueError)):
            verify_es256(signed.encode(), wrong, key.public_key())
    with pytest.raises(InvalidSignature):
        verify_es256(signed.encode()[1:], good, key.public_key())


def _everything_changed(token: str) -> Iterator[list[str]]:
    """Each part with one bit changed at its begin, middle and end, and each part a byte shorter or longer."""
    parts = token.split(".")
    for number, part in enumerate(parts):
        data = b64u_decode(part)
        places = {0, len(data) // 2, len(data) - 1}
        flipped = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in places]
        for other in [data[:-1], data + b"\0", b"", *flipped]:
            yield [*parts[:number], b64u_encode(other), *parts[number + 1 :]]


def test_content_of_others_is_read_from_rsa() -> None:
    registry = jwe.JWERegistry(algorithms=[RSA_OAEP_256, "A256GCM"])
    content = b""
    for size in (0, 1, 1000, 40_000):
        content = os.urandom(size)
        head = {"alg": RSA_OAEP_256, "enc": "A256GCM"}
        token = jwe.encrypt_compact(head, content, RSAKey.import_key(RSA), registry=registry)
        assert decrypt_by_rsa(token.split("."), RSA) == content
    token = encrypt_to_rsa(header(RSA_OAEP_256), content, RSA.public_key())
    assert decrypt_by_rsa(token.split("."), RSA) == content
    for changed in _everything_changed(token):
        with pytest.raises((InvalidTag, ValueError)):
            decrypt_by_rsa(changed, RSA)
    with pytest.raises((InvalidTag, ValueError)):
        decrypt_by_rsa(token.split("."), rsa.generate_private_key(public_exponent=65537, key_size=2048))


@pytest.mark.parametrize("curve", CURVES)
def test_content_of_others_is_read_from_elliptic_curves(curve: str) -> None:
    key = ec.generate_private_key(CURVES[curve])
    registry = jwe.JWERegistry(algorithms=[ECDH_ES_A256KW, "A256GCM"])
    token, epk = "", {}
    for number in range(100):
        head = {"alg": ECDH_ES_A256KW, "enc": "A256GCM"}
        content = f"content {number}".encode()
        token = jwe.encrypt_compact(head, content, ECKey.import_key(key), registry=registry)
        epk = json.loads(b64u_decode(token.split(".")[0]))["epk"]
        assert decrypt_by_ec(token.split("."), key, epk) == content
    for changed in _everything_changed(token):
        with pytest.raises((InvalidUnwrap, InvalidTag, ValueError)):
            decrypt_by_ec(changed, key, epk)
    ours = key.public_key().public_numbers()
    of_another_point = b64u_encode(ours.y.to_bytes(len(b64u_decode(epk["y"]))))
    for wrong in (
        {"x": epk["y"], "y": epk["x"]},  # not on the curve
        {"x": epk["x"], "y": of_another_point},
        {"x": epk["x"][:-4], "y": epk["y"]},
        {"x": "AAAA" + epk["x"], "y": epk["y"]},
        {"x": epk["x"] + "=", "y": epk["y"]},
    ):
        with pytest.raises((ValueError, FormatError)):
            decrypt_by_ec(token.split("."), key, wrong)
