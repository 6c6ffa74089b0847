"""Signing keys: of their algorithm's kind, from both generators, and cut out of their padding exactly."""

import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key
from hypothesis import given
from hypothesis import strategies as st

from envelope.errors import MisuseError
from envelope.keys import KeyUse, NetworkService, SigningAlgorithm
from key_agent.sources.signing_keys import RSA_BITS, SEED_SIZE, der_size, is_key_for, make_signing_key
from key_agent.sources.source import NewKey

OWNER = NetworkService("acme", "s3")
KINDS = {
    SigningAlgorithm.ES256: ec.EllipticCurvePrivateKey,
    SigningAlgorithm.EDDSA: ed25519.Ed25519PrivateKey,
    SigningAlgorithm.PS256: rsa.RSAPrivateKey,
    SigningAlgorithm.RS256: rsa.RSAPrivateKey,
}


@pytest.fixture(scope="module")
def made() -> dict[SigningAlgorithm, bytes]:
    return {algorithm: make_signing_key(algorithm, os.urandom(SEED_SIZE)) for algorithm in SigningAlgorithm}


@pytest.mark.parametrize("algorithm", SigningAlgorithm)
def test_a_key_is_of_its_algorithms_kind(
    made: dict[SigningAlgorithm, bytes], algorithm: SigningAlgorithm
) -> None:
    key = load_der_private_key(made[algorithm], password=None)  # validates the numbers
    assert isinstance(key, KINDS[algorithm])
    if isinstance(key, rsa.RSAPrivateKey):
        assert key.key_size == RSA_BITS
    for other in SigningAlgorithm:
        assert is_key_for(other, made[algorithm]) is (KINDS[other] is KINDS[algorithm])
    assert not is_key_for("HS256", made[algorithm])
    assert not is_key_for(None, made[algorithm])
    assert not is_key_for(algorithm, made[algorithm][:-1])
    assert not is_key_for(algorithm, made[algorithm] + b"\0")


@pytest.mark.parametrize("algorithm", [SigningAlgorithm.ES256, SigningAlgorithm.EDDSA])
def test_either_generator_alone_makes_keys_differ(
    algorithm: SigningAlgorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hsm_random = os.urandom(SEED_SIZE)
    # An HSM that repeats itself: the kernel's generator saves the key.
    assert make_signing_key(algorithm, hsm_random) != make_signing_key(algorithm, hsm_random)
    # A kernel that repeats itself: the HSM's does.
    monkeypatch.setattr(os, "urandom", bytes)
    assert make_signing_key(algorithm, hsm_random) == make_signing_key(algorithm, hsm_random)
    assert make_signing_key(algorithm, hsm_random) != make_signing_key(algorithm, b"h" * SEED_SIZE)


@pytest.mark.parametrize("random", [bytes(SEED_SIZE), b"", b"x" * (SEED_SIZE - 1)])
def test_a_dead_generator_makes_no_key(random: bytes) -> None:
    for algorithm in SigningAlgorithm:
        with pytest.raises(ValueError, match="no random bytes"):
            make_signing_key(algorithm, random)


def test_a_key_ends_where_its_der_ends(made: dict[SigningAlgorithm, bytes]) -> None:
    for der in made.values():
        for padding in range(9):
            assert der_size(der + bytes(padding)) == len(der)
        assert der_size(der[:-1]) == 0


@given(st.binary(max_size=300))
def test_no_bytes_are_longer_than_they_are(data: bytes) -> None:
    assert 0 <= der_size(data) <= len(data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"use": KeyUse.SIGN},
        {"use": KeyUse.SIGN, "algorithm": "HS256"},
        {"algorithm": "ES256"},
        {"algorithm": "rubbish"},
    ],
)
def test_only_a_signing_key_names_an_algorithm(wrong: dict[str, str]) -> None:
    with pytest.raises(MisuseError):
        NewKey(owner=OWNER, **wrong)  # type: ignore[arg-type]
