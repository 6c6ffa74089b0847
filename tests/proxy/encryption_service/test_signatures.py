"""Signatures by every algorithm: judged by another implementation, and by whoever changes something."""

import dataclasses
import hashlib
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from envelope.keys import SigningAlgorithm
from proxy.encryption_service.errors import DoesNotVerify, InputRefused
from proxy.encryption_service.signatures import (
    ANY_SALT,
    HashName,
    Marshaling,
    RsaPadding,
    SignatureScheme,
    sign,
    verify,
)
from proxy.keys.data_key import SigningKey
from tests.proxy.encryption_service.service_rig import signing_material

MESSAGE = b"the quick brown fox"
HASHES = {HashName.SHA256: "sha256", HashName.SHA384: "sha384", HashName.SHA512: "sha512"}


@pytest.fixture(scope="module")
def keys() -> dict[SigningAlgorithm, SigningKey]:
    found: dict[SigningAlgorithm, SigningKey] = {}
    for algorithm in SigningAlgorithm:
        key = load_der_private_key(signing_material(algorithm), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey)
        found[algorithm] = key
    return found


def schemes(algorithm: SigningAlgorithm) -> list[SignatureScheme]:
    if algorithm is SigningAlgorithm.EDDSA:
        return [SignatureScheme()]
    if algorithm is SigningAlgorithm.ES256:
        ways = [SignatureScheme(marshaling=marshaling) for marshaling in (None, *Marshaling)]
    else:
        ways = [SignatureScheme(padding=padding) for padding in (None, *RsaPadding)]
    return [
        dataclasses.replace(way, hash_name=name, prehashed=prehashed)
        for way in ways
        for name in HashName
        for prehashed in (False, True)
    ]


def input_of(scheme: SignatureScheme, message: bytes = MESSAGE) -> bytes:
    return hashlib.new(HASHES[scheme.hash_name], message).digest() if scheme.prehashed else message


@pytest.mark.parametrize("algorithm", SigningAlgorithm)
def test_what_is_signed_verifies_and_nothing_else_does(
    keys: dict[SigningAlgorithm, SigningKey], algorithm: SigningAlgorithm
) -> None:
    key = keys[algorithm]
    public = key.public_key()
    for scheme in schemes(algorithm):
        made = sign(key, algorithm, input_of(scheme), scheme)
        verify(public, algorithm, made, input_of(scheme), scheme)
        wrong = [
            made[:-1],
            made + b"\0",
            b"",
            bytes([made[0] ^ 1]) + made[1:],
            made[:-1] + bytes([made[-1] ^ 1]),
        ]
        for signature in wrong:
            with pytest.raises(DoesNotVerify):
                verify(public, algorithm, signature, input_of(scheme), scheme)
        with pytest.raises(DoesNotVerify):
            verify(public, algorithm, made, input_of(scheme, b"another"), scheme)


def test_a_digest_made_by_the_caller_gives_the_same_signature(
    keys: dict[SigningAlgorithm, SigningKey],
) -> None:
    key = keys[SigningAlgorithm.RS256]
    plain, prehashed = SignatureScheme(), SignatureScheme(prehashed=True)
    assert sign(key, "RS256", MESSAGE, plain) == sign(key, "RS256", input_of(prehashed), prehashed)


@pytest.mark.parametrize("name", HashName)
def test_openssl_agrees(keys: dict[SigningAlgorithm, SigningKey], tmp_path: Path, name: HashName) -> None:
    """The judge knows nothing of our code: openssl(1) verifies what we sign."""
    (tmp_path / "message").write_bytes(MESSAGE)
    for algorithm, scheme, options in (
        (SigningAlgorithm.ES256, SignatureScheme(hash_name=name), []),
        (SigningAlgorithm.RS256, SignatureScheme(hash_name=name), []),
        (
            SigningAlgorithm.PS256,
            SignatureScheme(hash_name=name),
            ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"],
        ),
    ):
        key = keys[algorithm]
        (tmp_path / "key.pem").write_bytes(
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
        (tmp_path / "signature").write_bytes(sign(key, algorithm, MESSAGE, scheme))
        words = ["openssl", "dgst", f"-{HASHES[name]}", "-verify", "key.pem", "-signature", "signature"]
        result = subprocess.run(
            [*words, *options, "message"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.stdout == "Verified OK\n", (algorithm, result.stderr)


def test_an_ecdsa_signature_for_jws_has_a_fixed_length(keys: dict[SigningAlgorithm, SigningKey]) -> None:
    """Also when r or s begin with zeros: one in 128 does."""
    key, scheme = keys[SigningAlgorithm.ES256], SignatureScheme(marshaling=Marshaling.JWS)
    for number in range(300):
        made = sign(key, "ES256", b"%d" % number, scheme)
        assert len(made) == 64
        verify(key.public_key(), "ES256", made, b"%d" % number, scheme)


def test_the_keys_own_way_is_its_algorithms(keys: dict[SigningAlgorithm, SigningKey]) -> None:
    for algorithm, own, other in (
        (SigningAlgorithm.PS256, RsaPadding.PSS, RsaPadding.PKCS1V15),
        (SigningAlgorithm.RS256, RsaPadding.PKCS1V15, RsaPadding.PSS),
    ):
        key = keys[algorithm]
        made = sign(key, algorithm, MESSAGE, SignatureScheme())
        verify(key.public_key(), algorithm, made, MESSAGE, SignatureScheme(padding=own))
        with pytest.raises(DoesNotVerify):
            verify(key.public_key(), algorithm, made, MESSAGE, SignatureScheme(padding=other))


def test_salt_lengths(keys: dict[SigningAlgorithm, SigningKey]) -> None:
    key = keys[SigningAlgorithm.PS256]
    public = key.public_key()
    for salt in (0, 20, 32, 64, 222):  # 256 - 32 - 2 at most
        scheme = SignatureScheme(salt_length=salt)
        made = sign(key, "PS256", MESSAGE, scheme)
        verify(public, "PS256", made, MESSAGE, scheme)
        verify(public, "PS256", made, MESSAGE, SignatureScheme(salt_length=ANY_SALT))
        if salt != 32:
            with pytest.raises(DoesNotVerify):
                verify(public, "PS256", made, MESSAGE, SignatureScheme())
    for salt in (223, 10**9, -2, ANY_SALT):
        with pytest.raises(InputRefused):
            sign(key, "PS256", MESSAGE, SignatureScheme(salt_length=salt))


REFUSED = [
    (SigningAlgorithm.ES256, SignatureScheme(padding=RsaPadding.PSS)),
    (SigningAlgorithm.ES256, SignatureScheme(salt_length=32)),
    (SigningAlgorithm.PS256, SignatureScheme(marshaling=Marshaling.JWS)),
    (SigningAlgorithm.RS256, SignatureScheme(salt_length=32)),
    (SigningAlgorithm.EDDSA, SignatureScheme(prehashed=True)),
    (SigningAlgorithm.EDDSA, SignatureScheme(padding=RsaPadding.PSS)),
    (SigningAlgorithm.EDDSA, SignatureScheme(marshaling=Marshaling.ASN1)),
    (SigningAlgorithm.ES256, SignatureScheme(prehashed=True)),  # MESSAGE is no digest
    (SigningAlgorithm.PS256, SignatureScheme(prehashed=True, hash_name=HashName.SHA512)),
]


@pytest.mark.parametrize(("algorithm", "scheme"), REFUSED)
def test_what_the_algorithm_does_not_know_is_refused(
    keys: dict[SigningAlgorithm, SigningKey], algorithm: SigningAlgorithm, scheme: SignatureScheme
) -> None:
    with pytest.raises(InputRefused):
        sign(keys[algorithm], algorithm, MESSAGE, scheme)
    with pytest.raises(InputRefused):
        verify(keys[algorithm].public_key(), algorithm, b"", MESSAGE, scheme)
