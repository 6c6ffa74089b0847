"""Gmail's calls: a user's private key wrapped here, used here; judged by the public half alone."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from envelope.base64url import b64u_encode
from proxy.encryption_service.call import Answer
from proxy.encryption_service.dialects.kacls_private_keys import DECRYPTIONS, PKCS1, SIGNATURES, admit
from tests.pki import rsa_key
from tests.proxy.encryption_service.dialects.kacls_rig import (
    ADMIN,
    USER,
    KaclsRig,
    b64,
    new_key,
    ok,
    refused,
    unb64,
)

ALICE = rsa_key(2048, 21)
BOB = rsa_key(2048, 22)
OAEP = "RSA/ECB/OAEPwithSHA-256andMGF1Padding"
HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA-1": hashes.SHA1(),
    "SHA-256": hashes.SHA256(),
    "SHA-512": hashes.SHA512(),
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}


def der(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, form: PrivateFormat = PrivateFormat.PKCS8
) -> bytes:
    return key.private_bytes(Encoding.DER, form, NoEncryption())


def spki_hash(key: rsa.RSAPrivateKey) -> bytes:
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


@pytest.fixture
async def kacls(tmp_path: Path) -> AsyncIterator[KaclsRig]:
    rig = KaclsRig(tmp_path)
    await rig.fetch_keys()
    yield rig
    await rig.issuer_keys.aclose()
    rig.close()


def wrap(kacls: KaclsRig, private_key: bytes, *, email: str = ADMIN, perimeter_id: str = "") -> Answer:
    return kacls.call(
        "wrapprivatekey",
        authentication=kacls.authentication(email),
        perimeter_id=perimeter_id,
        private_key=b64(private_key),
    )


def wrapped(kacls: KaclsRig, key: rsa.RSAPrivateKey = ALICE, perimeter_id: str = "") -> str:
    text = str(ok(wrap(kacls, der(key), perimeter_id=perimeter_id))["wrapped_private_key"])
    assert len(text) <= 8192
    return text


def gmail(kacls: KaclsRig, role: str, key: rsa.RSAPrivateKey = ALICE, **claims: object) -> dict[str, Any]:
    """The tokens that Gmail sends with a message."""
    usual: dict[str, Any] = {
        "message_id": "<1@mail>",
        "spki_hash": b64(spki_hash(key)),
        "spki_hash_algorithm": "SHA-256",
        "resource_name": "//googleapis.com/gmail/messages/" + "x" * 480,
    }
    return {
        "authentication": kacls.authentication(),
        "authorization": kacls.authorization(role, **(usual | claims)),
        "reason": "gmail",
    }


def encrypted(algorithm: str, key: bytes, *, label: bytes | None = None) -> bytes:
    if algorithm == PKCS1:
        return ALICE.public_key().encrypt(key, padding.PKCS1v15())
    digest = HASHES[algorithm.partition("with")[2].partition("and")[0]]
    return ALICE.public_key().encrypt(key, padding.OAEP(padding.MGF1(digest), digest, label))


@pytest.mark.parametrize("algorithm", sorted(DECRYPTIONS))
def test_a_data_key_is_decrypted(kacls: KaclsRig, algorithm: str) -> None:
    blob, key = wrapped(kacls), new_key()
    answer = kacls.call(
        "privatekeydecrypt",
        **gmail(kacls, "decrypter"),
        algorithm=algorithm,
        encrypted_data_encryption_key=b64(encrypted(algorithm, key)),
        wrapped_private_key=blob,
    )
    assert unb64(ok(answer)["data_encryption_key"]) == key
    record = kacls.service.records()[-1]
    assert (record["operation"], record["caller"], record["message_id"]) == (
        "privatekeydecrypt",
        USER,
        "<1@mail>",
    )


def test_an_oaep_label_counts(kacls: KaclsRig) -> None:
    blob, key = wrapped(kacls), new_key()

    def decrypt(algorithm: str, ciphertext: bytes, label: str) -> Answer:
        return kacls.call(
            "privatekeydecrypt",
            **gmail(kacls, "decrypter"),
            algorithm=algorithm,
            encrypted_data_encryption_key=b64(ciphertext),
            rsa_oaep_label=label,
            wrapped_private_key=blob,
        )

    labelled = encrypted(OAEP, key, label=b"mail")
    assert unb64(ok(decrypt(OAEP, labelled, b64(b"mail")))["data_encryption_key"]) == key
    assert refused(decrypt(OAEP, labelled, ""))[0] == 400
    assert refused(decrypt(OAEP, labelled, b64(b"other")))[0] == 400
    assert refused(decrypt(PKCS1, encrypted(PKCS1, key), b64(b"mail")))[0] == 400


def test_pkcs1_padding_is_no_oracle(kacls: KaclsRig) -> None:
    """Bleichenbacher: whatever is sent decrypts to something; which of it was well padded is not told."""
    blob = wrapped(kacls)
    good = encrypted(PKCS1, b"k" * 32)
    statuses, keys = set(), []
    for index in range(0, 256, 16):
        changed = bytearray(good)
        changed[index + 1] ^= 1
        answer = kacls.call(
            "privatekeydecrypt",
            **gmail(kacls, "decrypter"),
            algorithm=PKCS1,
            encrypted_data_encryption_key=b64(bytes(changed)),
            wrapped_private_key=blob,
        )
        statuses.add(answer.status)
        keys.append(answer.body)
    assert statuses <= {200, 400}
    assert 200 in statuses
    assert len(set(keys)) > 1
    assert not any(b64(b"k" * 32).encode() in body for body in keys)


@pytest.mark.parametrize(
    "algorithm", ["RSA", "RSA/ECB/NoPadding", "RSA/ECB/OAEPwithMD5andMGF1Padding", "SHA256withRSA", ""]
)
def test_other_decryptions_are_refused(kacls: KaclsRig, algorithm: str) -> None:
    answer = kacls.call(
        "privatekeydecrypt",
        **gmail(kacls, "decrypter"),
        algorithm=algorithm,
        encrypted_data_encryption_key=b64(bytes(256)),
        wrapped_private_key=wrapped(kacls),
    )
    assert refused(answer) == (400, "input-refused")


@pytest.mark.parametrize("size", [1, 255, 257, 1025])
def test_a_ciphertext_has_the_keys_length(kacls: KaclsRig, size: int) -> None:
    for algorithm in (PKCS1, OAEP):
        answer = kacls.call(
            "privatekeydecrypt",
            **gmail(kacls, "decrypter"),
            algorithm=algorithm,
            encrypted_data_encryption_key=b64(b"\x01" * size),
            wrapped_private_key=wrapped(kacls),
        )
        assert refused(answer) == (400, "input-refused")


@pytest.mark.parametrize("algorithm", sorted(SIGNATURES))
def test_a_digest_is_signed(kacls: KaclsRig, algorithm: str) -> None:
    name, _with, scheme = algorithm.partition("withRSA")
    chosen = HASHES[name]
    digest = hashlib.new(name, b"signed attributes").digest()
    for text, salt in ((b64(digest), 20), (b64(digest).rstrip("="), None)):
        answer = kacls.call(
            "privatekeysign",
            **gmail(kacls, "signer"),
            algorithm=algorithm,
            digest=text,
            rsa_pss_salt_length=salt,
            wrapped_private_key=wrapped(kacls),
        )
        signature = unb64(ok(answer)["signature"])
        expected: padding.AsymmetricPadding = padding.PKCS1v15()
        if scheme:
            expected = padding.PSS(padding.MGF1(chosen), chosen.digest_size if salt is None else salt)
        ALICE.public_key().verify(signature, digest, expected, Prehashed(chosen))


@pytest.mark.parametrize(
    ("algorithm", "digest", "salt"),
    [
        ("SHA256withRSA", bytes(31), None),
        ("SHA256withRSA", bytes(48), None),
        ("SHA256withRSA", bytes(129), None),
        ("SHA1withRSA", bytes(20), None),
        ("NONEwithRSA", bytes(32), None),
        ("SHA256withECDSA", bytes(32), None),
        ("", bytes(32), None),
        ("SHA256withRSA/PSS", bytes(32), -1),
        ("SHA256withRSA/PSS", bytes(32), 223),
        ("SHA256withRSA/PSS", bytes(32), 2**80),
    ],
)
def test_what_is_not_signed(kacls: KaclsRig, algorithm: str, digest: bytes, salt: int | None) -> None:
    answer = kacls.call(
        "privatekeysign",
        **gmail(kacls, "signer"),
        algorithm=algorithm,
        digest=b64(digest),
        rsa_pss_salt_length=salt,
        wrapped_private_key=wrapped(kacls),
    )
    assert refused(answer) == (400, "input-refused")


def test_the_key_must_be_the_one_that_google_names(kacls: KaclsRig) -> None:
    blob, key = wrapped(kacls), new_key()

    def decrypt(role: str = "decrypter", named: rsa.RSAPrivateKey = ALICE, **claims: object) -> Answer:
        return kacls.call(
            "privatekeydecrypt",
            **gmail(kacls, role, named, **claims),
            algorithm=OAEP,
            encrypted_data_encryption_key=b64(encrypted(OAEP, key)),
            wrapped_private_key=blob,
        )

    assert ok(decrypt(spki_hash=b64u_encode(spki_hash(ALICE))))
    assert ok(decrypt(spki_hash=b64(spki_hash(ALICE)).rstrip("=")))
    assert refused(decrypt(named=BOB)) == (403, "spki-hash")
    assert refused(decrypt(spki_hash="")) == (403, "spki-hash")
    for claims in (
        {"spki_hash": None},
        {"spki_hash": 1},
        {"spki_hash_algorithm": "SHA-1"},
        {"spki_hash_algorithm": None},
    ):
        assert refused(decrypt(**claims)) == (403, "spki-hash-missing")
    for role in ("signer", "reader", "writer"):
        assert refused(decrypt(role)) == (403, "role")
    assert refused(decrypt(email="bob@acme.example")) == (403, "not-the-same-user")
    assert refused(decrypt(kacls_url="https://evil.example")) == (403, "kacls-url")


def test_perimeters_hold_for_private_keys(kacls: KaclsRig) -> None:
    blob = wrapped(kacls, perimeter_id="board")
    answer = kacls.call(
        "privatekeysign",
        **gmail(kacls, "signer"),
        algorithm="SHA256withRSA",
        digest=b64(bytes(32)),
        wrapped_private_key=blob,
    )
    assert refused(answer) == (403, "perimeter")
    assert refused(wrap(kacls, der(ALICE), perimeter_id="nowhere")) == (403, "unknown-perimeter")


def test_a_data_keys_blob_is_no_private_keys(kacls: KaclsRig) -> None:
    data_blob, private_blob = kacls.wrapped(new_key()), wrapped(kacls)
    answer = kacls.call(
        "privatekeysign",
        **gmail(kacls, "signer"),
        algorithm="SHA256withRSA",
        digest=b64(bytes(32)),
        wrapped_private_key=data_blob,
    )
    assert refused(answer) == (400, "does-not-verify")
    assert refused(kacls.unwrap(private_blob))[0] == 400


def test_admins_decrypt_what_was_exported(kacls: KaclsRig) -> None:
    blob, key = wrapped(kacls), new_key()

    def decrypt(email: str, spki: bytes, algorithm: str = "SHA-256") -> Answer:
        return kacls.call(
            "privilegedprivatekeydecrypt",
            authentication=kacls.authentication(email),
            algorithm=OAEP,
            encrypted_data_encryption_key=b64(encrypted(OAEP, key)),
            rsa_oaep_label="",
            reason="takeout",
            spki_hash=b64(spki),
            spki_hash_algorithm=algorithm,
            wrapped_private_key=blob,
        )

    assert unb64(ok(decrypt(ADMIN, spki_hash(ALICE)))["data_encryption_key"]) == key
    assert refused(decrypt(USER, spki_hash(ALICE))) == (403, "admin-list")
    assert refused(decrypt(ADMIN, spki_hash(BOB))) == (403, "spki-hash")
    assert refused(decrypt(ADMIN, spki_hash(ALICE), "SHA-1")) == (403, "spki-hash-missing")


def test_which_keys_are_wrapped(kacls: KaclsRig) -> None:
    assert refused(wrap(kacls, der(ALICE), email=USER)) == (403, "admin-list")
    assert ok(wrap(kacls, der(ALICE, PrivateFormat.TraditionalOpenSSL)))
    record = kacls.service.records()[-1]
    assert record["spki_hash"] == spki_hash(ALICE).hex()
    locked = ALICE.private_bytes(Encoding.DER, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    public = ALICE.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    small = der(rsa.generate_private_key(public_exponent=65537, key_size=1024))
    curve = der(ec.generate_private_key(ec.SECP256R1()))
    for content in (b"x", b"\x30\x82", locked, public, small, curve, der(ALICE)[:-1], b"\x30" * 4097):
        assert refused(wrap(kacls, content)) == (400, "input-refused")


def test_a_key_that_does_not_fit_itself_is_not_wrapped(kacls: KaclsRig) -> None:
    """Rule 1: what is not checked at its use is checked here."""
    broken = bytearray(der(ALICE))
    private_exponent = ALICE.private_numbers().d.to_bytes(256)
    at = bytes(broken).index(private_exponent)
    broken[at + 200] ^= 1
    assert refused(wrap(kacls, bytes(broken))) == (400, "input-refused")
    assert admit(der(ALICE))[1] == spki_hash(ALICE)


def test_the_largest_key_fits(kacls: KaclsRig) -> None:
    assert len(wrapped(kacls, rsa_key(4096, 23))) < 8192
