import base64
import contextlib
import hashlib
import json
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.encryption_service.dialects.xks_messages import (
    MAX_FIELD_BYTES,
    CiphertextError,
    DecryptRequest,
    EncryptInput,
    EncryptRequest,
    EncryptResponse,
    HealthRequest,
    MetadataRequest,
    Reader,
    SizeError,
    ValidationError,
    bound,
    decrypt_input,
    encrypt_input,
    integrity_value,
    metadata_of,
    nonce_of,
    unbase64,
    written,
)

METADATA = {
    "awsPrincipalArn": "arn:aws:iam::123456789012:user/Alice",
    "kmsKeyArn": "arn:aws:kms:us-east-2:123456789012:/key/1234abcd-12ab-34cd-56ef-1234567890ab",
    "kmsOperation": "Encrypt",
    "kmsRequestId": "4112f4d6-db54-4af4-ae30-c55a22a8dfae",
}
NONCE = bytes(range(24))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def encrypt_request(**fields: object) -> EncryptRequest:
    body = {"requestMetadata": METADATA, "plaintext": "AA==", "encryptionAlgorithm": "AES_GCM"} | fields
    return Reader(EncryptRequest).read(json.dumps(body).encode())


def decrypt_request(**fields: object) -> DecryptRequest:
    body = {
        "requestMetadata": METADATA,
        "ciphertext": "AA==",
        "encryptionAlgorithm": "AES_GCM",
        "initializationVector": b64(NONCE[12:]),
        "authenticationTag": b64(bytes(16)),
        "ciphertextMetadata": b64(metadata_of(7, NONCE)),
    } | fields
    return Reader(DecryptRequest).read(json.dumps(body).encode())


# The specification's own example (appendix C).


def test_the_specifications_integrity_value() -> None:
    value = integrity_value(
        aad=base64.b64decode("cHJvamVjdD1uaWxlLGRlcGFydG1lbnQ9bWFya2V0aW5n"),
        metadata=base64.b64decode("a2V5X3ZlcnNpb249MQ=="),
        iv=base64.b64decode("HMrlRw85cAJUd5Ax"),
        ciphertext=base64.b64decode("ghxkK1txeDNn3q8Y"),
        tag=base64.b64decode("vBxN2ncH1oEkR8WVXpmyYQ=="),
    )
    assert b64(value) == "qHA/ImC9h5HsLRXqCyPmWgYx7tzyoTplzILbP0fPXsc="


def test_the_integrity_value_has_no_lengths_in_it() -> None:
    parts = {"aad": b"a", "metadata": b"m", "iv": b"i", "ciphertext": b"c", "tag": b"t"}
    assert integrity_value(**parts) == hashlib.sha256(b"amict").digest()
    parts["metadata"] = b""
    assert integrity_value(**parts) == hashlib.sha256(b"aict").digest()


# What the cipher authenticates, and what is stored.


def test_the_lengths_tell_aad_from_metadata() -> None:
    assert bound(b"", b"") == b"\x00\x00\x00"
    assert bound(b"aad", b"meta") == b"\x00\x03aad\x04meta"
    assert bound(b"x" * 8192, b"") == b"\x20\x00" + b"x" * 8192 + b"\x00"
    assert bound(b"meta", b"") != bound(b"", b"meta")


@given(st.binary(max_size=40), st.binary(max_size=20), st.binary(max_size=40), st.binary(max_size=20))
@example(b"", b"\x00\x01", b"\x00", b"\x01")
def test_two_pairs_never_share_an_aad(aad: bytes, metadata: bytes, aad2: bytes, metadata2: bytes) -> None:
    assert (bound(aad, metadata) == bound(aad2, metadata2)) == ((aad, metadata) == (aad2, metadata2))


def test_the_metadata_is_format_version_and_nonce_prefix() -> None:
    metadata = metadata_of(0x01020304, NONCE)
    assert metadata == b"\x01\x01\x02\x03\x04" + NONCE[:12]
    assert len(metadata) <= 20
    assert nonce_of(metadata, NONCE[12:]) == NONCE


def test_a_decryption_takes_apart_what_an_encryption_put_together() -> None:
    given_aad = b"project=nile"
    taken = decrypt_input(decrypt_request(additionalAuthenticatedData=b64(given_aad)))
    assert taken.version == 7
    assert taken.nonce == NONCE
    assert taken.aad == bound(given_aad, metadata_of(7, NONCE))


# Presence and types.


def test_what_must_be_there_for_whom() -> None:
    body = {"requestMetadata": {"kmsOperation": "KmsHealthCheck", "kmsRequestId": ""}}
    Reader(HealthRequest).read(json.dumps(body).encode())
    without_arn = {name: value for name, value in METADATA.items() if name != "kmsKeyArn"}
    Reader(MetadataRequest).read(json.dumps({"requestMetadata": without_arn}).encode())
    for reader in (Reader(EncryptRequest), Reader(DecryptRequest)):
        with pytest.raises(ValidationError):
            reader.read(json.dumps({"requestMetadata": without_arn}).encode())


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("value", [None, 7, [], {}, True], ids=str)
def test_a_required_name_is_a_string(name: str, value: object) -> None:
    body = {"requestMetadata": METADATA | {name: value}}
    with pytest.raises(ValidationError):
        Reader(EncryptRequest).read(json.dumps(body).encode())


@pytest.mark.parametrize("name", ["awsSourceVpc", "awsSourceVpce", "kmsViaService"])
def test_an_optional_name_may_be_null_but_not_of_another_type(name: str) -> None:
    for value in ("text", None):
        encrypt_request(requestMetadata=METADATA | {name: value})
    with pytest.raises(ValidationError):
        encrypt_request(requestMetadata=METADATA | {name: 1})


def test_more_fields_and_longer_values_are_accepted() -> None:
    more = METADATA | {
        "awsPrincipalArn": "arn:" + "a" * 2044,
        "kmsRequestId": "no UUID at all é",
        "kmsOperation": "BulkEncrypt2031",
        "sourceIdentity": {"deep": [1, 2, {}]},
    }
    request = encrypt_request(requestMetadata=more, somethingNew=[None])
    assert request.request_metadata.kms_operation == "BulkEncrypt2031"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"x"',
        b"\xef\xbb\xbf{}",
        b'{"requestMetadata":{}}',
        b'{"requestMetadata":null}',
        b'{"requestMetadata":{"awsPrincipalArn":"\xff"}}',
        b'{"requestMetadata":{"awsPrincipalArn":"\\ud800"}}',
        b'{"a":' * 2000,
        b'{"requestMetadata":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
        b'{"x":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
        b'{"requestMetadata":NaN}',
        json.dumps({"requestMetadata": METADATA}).encode() + b"x",
    ],
    ids=range(15),
)
def test_what_is_no_request(body: bytes) -> None:
    for reader in (
        Reader(EncryptRequest),
        Reader(DecryptRequest),
        Reader(MetadataRequest),
        Reader(HealthRequest),
    ):
        with pytest.raises(ValidationError):
            reader.read(body)


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_reading_raises_nothing_else(body: bytes) -> None:
    for reader in (
        Reader(EncryptRequest),
        Reader(DecryptRequest),
        Reader(MetadataRequest),
        Reader(HealthRequest),
    ):
        with contextlib.suppress(ValidationError):
            reader.read(body)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(
        [
            "plaintext",
            "encryptionAlgorithm",
            "additionalAuthenticatedData",
            "ciphertextDataIntegrityValueAlgorithm",
        ]
    ),
    _JSON,
)
def test_a_field_of_an_encryption_may_be_any_json(name: str, value: object) -> None:
    with contextlib.suppress(ValidationError):
        encrypt_input(encrypt_request(**{name: value}))


@given(
    st.sampled_from(
        [
            "ciphertext",
            "encryptionAlgorithm",
            "initializationVector",
            "authenticationTag",
            "ciphertextMetadata",
            "additionalAuthenticatedData",
        ]
    ),
    _JSON | st.binary(max_size=40).map(b64),
)
def test_a_field_of_a_decryption_may_be_any_json(name: str, value: object) -> None:
    with contextlib.suppress(ValidationError, CiphertextError):
        decrypt_input(decrypt_request(**{name: value}))


# Fields.


@pytest.mark.parametrize("name", ["plaintext", "encryptionAlgorithm"])
@pytest.mark.parametrize("value", [None, 1, ["AA=="], "aes_gcm", "====", "AES_GCM "], ids=str)
def test_an_encryption_needs_both_fields(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        encrypt_input(encrypt_request(**{name: value}))


def test_absent_null_and_empty_aad_are_the_same() -> None:
    inputs = [
        encrypt_input(encrypt_request()),
        encrypt_input(encrypt_request(additionalAuthenticatedData=None)),
        encrypt_input(encrypt_request(additionalAuthenticatedData="")),
    ]
    assert inputs == [EncryptInput(plaintext=b"\0", aad=b"", wants_cdiv=False)] * 3


def test_the_integrity_algorithm_is_sha_256_or_absent() -> None:
    field = "ciphertextDataIntegrityValueAlgorithm"
    assert encrypt_input(encrypt_request(**{field: "SHA_256"})).wants_cdiv
    assert not encrypt_input(encrypt_request(**{field: None})).wants_cdiv
    for other in ("SHA_512", "", "sha_256", 256, False):
        with pytest.raises(ValidationError):
            encrypt_input(encrypt_request(**{field: other}))


def test_the_specifications_sizes_are_taken_and_ours_are_the_most() -> None:
    plaintext, aad = os.urandom(4300), os.urandom(8192)
    taken = encrypt_input(encrypt_request(plaintext=b64(plaintext), additionalAuthenticatedData=b64(aad)))
    assert (taken.plaintext, taken.aad) == (plaintext, aad)
    most, more = b64(bytes(MAX_FIELD_BYTES)), b64(bytes(MAX_FIELD_BYTES + 1))
    encrypt_input(encrypt_request(plaintext=most))
    encrypt_input(encrypt_request(additionalAuthenticatedData=most))
    for request in (encrypt_request(plaintext=more), encrypt_request(additionalAuthenticatedData=more)):
        with pytest.raises(SizeError):
            encrypt_input(request)
    with pytest.raises(SizeError):
        decrypt_input(decrypt_request(ciphertext=more))


@pytest.mark.parametrize(
    "name", ["ciphertext", "initializationVector", "authenticationTag", "encryptionAlgorithm"]
)
def test_a_decryption_needs_these(name: str) -> None:
    for value in (None, 5, "?"):
        with pytest.raises(ValidationError):
            decrypt_input(decrypt_request(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initializationVector", b""),
        ("initializationVector", bytes(11)),
        ("initializationVector", bytes(13)),
        ("initializationVector", bytes(16)),  # allowed by the specification, never written by us
        ("authenticationTag", bytes(15)),
        ("authenticationTag", bytes(17)),
        ("authenticationTag", b""),
        ("ciphertextMetadata", b""),
        ("ciphertextMetadata", metadata_of(7, NONCE)[:-1]),
        ("ciphertextMetadata", metadata_of(7, NONCE) + b"\0"),
        ("ciphertextMetadata", bytes(21)),
        ("ciphertextMetadata", b"\x00" + metadata_of(7, NONCE)[1:]),
        ("ciphertextMetadata", b"\x02" + metadata_of(7, NONCE)[1:]),
        ("ciphertextMetadata", b"key_version=1"),
    ],
    ids=str,
)
def test_what_we_never_wrote_is_an_invalid_ciphertext(name: str, value: bytes) -> None:
    with pytest.raises(CiphertextError):
        decrypt_input(decrypt_request(**{name: b64(value)}))


def test_a_ciphertext_without_metadata_is_not_ours() -> None:
    with pytest.raises(CiphertextError):
        decrypt_input(decrypt_request(ciphertextMetadata=None))


# Base64.


@pytest.mark.parametrize(
    "text",
    [
        "A", "AA", "AAA", "AA=", "A===", "=", "====", "AA==AA==", "AA==\n", " AA==", "AA ==", "AB==", "AAB=",
        "-_-_", "AAA\0", "ＡＡ==", "AA==é", "AAAA=", "\r\nAAAA",
    ],
)  # fmt: skip
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        unbase64("plaintext", text)


@given(st.binary(max_size=100))
def test_every_value_has_its_spelling(data: bytes) -> None:
    assert unbase64("plaintext", b64(data)) == data


@given(st.text(alphabet="AQgwZ+/-_= \n", max_size=9))
def test_a_value_has_one_spelling(text: str) -> None:
    try:
        data = unbase64("plaintext", text)
    except ValidationError:
        return
    assert b64(data) == text


# What is written.


def test_a_response_is_one_line_with_the_specifications_names() -> None:
    response = EncryptResponse(b"\xff", b"m", b"i", b"t")
    assert written(response) == (
        b'{"ciphertext":"/w==","ciphertextMetadata":"bQ==","initializationVector":"aQ==","authenticationTag":"dA=="}'
    )
    with_cdiv = EncryptResponse(b"", b"", b"", b"", b"\0")
    assert json.loads(written(with_cdiv))["ciphertextDataIntegrityValue"] == "AA=="
