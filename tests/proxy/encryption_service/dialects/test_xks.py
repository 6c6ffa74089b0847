import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, override

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from envelope import derive
from envelope.keys import KeyState, SigningAlgorithm
from envelope.xaes import Xaes256Gcm
from proxy.encryption_service.call import Call, Peer
from proxy.encryption_service.core import Aad, Core, Sealed, Ticket
from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.dialects.xks import MODEL, TRIAL_MAX_AGE_S
from proxy.encryption_service.dialects.xks_errors import MAX_BODY_BYTES, ErrorName
from proxy.encryption_service.limits import Limits, Quota
from proxy.encryption_service.model import DialectName, Op, XksRule, XksSettings, XksStore
from proxy.encryption_service.settings import XksFleet
from proxy.encryption_service.strangers import BURST
from tests.pki import issue_server, make_server_ca, of_unknown_version, with_unknown_string
from tests.proxy.encryption_service.aws_signer import Credentials, signed_headers
from tests.proxy.encryption_service.dialects.xks_rig import (
    AAD,
    AAD2,
    HEALTH_METADATA,
    METADATA,
    PLAINTEXT,
    PREFIX,
    XksRig,
    decrypt_body,
    encrypt_body,
    judged,
)
from tests.proxy.encryption_service.service_rig import VALIDITY_S

PEER = Peer(address="127.0.0.1")
API = f"/{PREFIX}/kms/xks/v1"
CDIV = {"ciphertextDataIntegrityValueAlgorithm": "SHA_256"}
TARGETS = ["keys/foo/metadata", "keys/foo/encrypt", "keys/foo/decrypt", "health"]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[XksRig]:
    rig = XksRig(tmp_path)
    yield rig
    rig.close()


def name_of(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1].get("errorName", "")


def body_for(rig: XksRig, target: str) -> dict[str, object]:
    if target == "health":
        return {"requestMetadata": HEALTH_METADATA}
    if target.endswith("metadata"):
        return {"requestMetadata": METADATA}
    if target.endswith("encrypt"):
        return encrypt_body()
    return decrypt_body(rig.encrypt(target.split("/")[1])[1])


# The four operations.


@pytest.mark.parametrize("size", [0, 1, 16, 4096, 4300])
@pytest.mark.parametrize("aad_size", [0, 33, 8192])
@pytest.mark.parametrize("cdiv", [{}, CDIV], ids=["plain", "cdiv"])
def test_what_was_encrypted_decrypts(rig: XksRig, size: int, aad_size: int, cdiv: dict[str, str]) -> None:
    plaintext = base64.b64encode(os.urandom(size)).decode()
    aad: dict[str, Any] = {"additionalAuthenticatedData": base64.b64encode(os.urandom(aad_size)).decode()}
    status, sealed = rig.encrypt(plaintext=plaintext, **aad | cdiv)
    assert status == 200
    sizes = {name: len(base64.b64decode(value)) for name, value in sealed.items()}
    assert sizes.pop("ciphertext") == size
    assert sizes.pop("initializationVector") == 12
    assert sizes.pop("authenticationTag") == 16
    assert sizes.pop("ciphertextMetadata") == 17
    assert sizes == ({"ciphertextDataIntegrityValue": 32} if cdiv else {})
    assert rig.decrypt(sealed, **aad) == (200, {"plaintext": plaintext})


def test_the_aad_of_the_cipher_is_the_specifications(rig: XksRig) -> None:
    """Opened here with the key itself, by the layout that the document promises."""
    _status, sealed = rig.encrypt(additionalAuthenticatedData=AAD)
    raw = {name: base64.b64decode(value) for name, value in sealed.items()}
    metadata, aad = raw["ciphertextMetadata"], base64.b64decode(AAD)
    assert metadata[:5] == b"\x01\x00\x00\x00\x01"
    key = rig.keys["foo"]
    material = rig.service.secret(key)
    cipher = Xaes256Gcm(derive.service_key(material, key.owner, rig.service.key_id(key), "xks"))
    opened = cipher.decrypt(
        metadata[5:] + raw["initializationVector"],
        raw["ciphertext"] + raw["authenticationTag"],
        len(aad).to_bytes(2) + aad + len(metadata).to_bytes(1) + metadata,
    )
    assert opened == b"Hello World!"


def test_no_two_encryptions_are_alike(rig: XksRig) -> None:
    sealed = [rig.encrypt()[1] for _ in range(20)]
    for name in ("initializationVector", "ciphertextMetadata", "ciphertext", "authenticationTag"):
        assert len({one[name] for one in sealed}) == 20


def test_the_integrity_value_is_over_what_was_sent(rig: XksRig) -> None:
    for aad in ({}, {"additionalAuthenticatedData": AAD}):
        _status, sealed = rig.encrypt(**aad, **CDIV)
        names = ("ciphertextMetadata", "initializationVector", "ciphertext", "authenticationTag")
        parts = [base64.b64decode(aad.get("additionalAuthenticatedData", ""))]
        parts += [base64.b64decode(sealed[name]) for name in names]
        assert (
            base64.b64decode(sealed["ciphertextDataIntegrityValue"])
            == hashlib.sha256(b"".join(parts)).digest()
        )


@pytest.mark.parametrize(
    ("sealed_with", "opened_with"),
    [(AAD, ...), (AAD, None), (AAD, ""), (AAD, AAD2), (..., AAD), ("", AAD)],
    ids=str,
)
def test_aad_missing_added_or_different_fails(rig: XksRig, sealed_with: object, opened_with: object) -> None:
    _status, sealed = rig.encrypt(additionalAuthenticatedData=sealed_with)
    answer = rig.decrypt(sealed, additionalAuthenticatedData=opened_with)
    assert name_of(answer) == (400, "InvalidCiphertextException")


def test_absent_null_and_empty_aad_are_one(rig: XksRig) -> None:
    for sealed_with in (..., None, ""):
        for opened_with in (..., None, ""):
            _status, sealed = rig.encrypt(additionalAuthenticatedData=sealed_with)
            assert rig.decrypt(sealed, additionalAuthenticatedData=opened_with)[0] == 200


def test_metadata_passed_as_aad_does_not_decrypt(rig: XksRig) -> None:
    _status, sealed = rig.encrypt()
    for metadata in (..., None, sealed["ciphertextMetadata"]):
        answer = rig.decrypt(
            sealed, ciphertextMetadata=metadata, additionalAuthenticatedData=sealed["ciphertextMetadata"]
        )
        assert name_of(answer) == (400, "InvalidCiphertextException")


@pytest.mark.parametrize(
    "name", ["ciphertext", "ciphertextMetadata", "initializationVector", "authenticationTag"]
)
def test_every_flipped_bit_is_found(rig: XksRig, name: str) -> None:
    _status, sealed = rig.encrypt(additionalAuthenticatedData=AAD)
    raw = base64.b64decode(sealed[name])
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        value = base64.b64encode(changed).decode()
        answer = rig.decrypt(sealed, additionalAuthenticatedData=AAD, **{name: value})
        assert name_of(answer) == (400, "InvalidCiphertextException"), bit


def test_a_ciphertext_belongs_to_its_key(rig: XksRig) -> None:
    _status, sealed = rig.encrypt("foo")
    assert name_of(rig.decrypt(sealed, "dec-only")) == (400, "InvalidCiphertextException")


def test_metadata_of_an_active_key(rig: XksRig) -> None:
    expected = {"keySpec": "AES_256", "keyUsage": ["ENCRYPT", "DECRYPT"], "keyStatus": "ENABLED"}
    assert rig.metadata() == (200, expected)
    usages = {name: rig.metadata(name)[1]["keyUsage"] for name in rig.keys}
    assert usages == {
        "foo": ["ENCRYPT", "DECRYPT"], "enc-only": ["ENCRYPT"], "dec-only": ["DECRYPT"], "impotent": []
    }  # fmt: skip


def test_health_of_a_serving_tenant(tmp_path: Path) -> None:
    rig = XksRig(tmp_path, fleet=XksFleet(proxies=3, manager_model="Luna 7.8"))
    assert rig.health() == (
        200,
        {
            "xksProxyFleetSize": 3,
            "xksProxyVendor": "Sealgate",
            "xksProxyModel": MODEL,
            "ekmVendor": "Sealgate",
            "ekmFleetDetails": [{"id": "acme", "model": "Luna 7.8", "healthStatus": "ACTIVE"}],
        },
    )
    rig.close()


@pytest.mark.parametrize(
    "said", [{"proxies": 0}, {"manager_model": ""}, {"manager_model": "é"}, {"manager_model": "x" * 129}]
)
def test_what_aws_is_told_of_the_fleet_is_checked(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(said))):
        XksFleet(**said)


def test_an_operation_that_aws_has_not_thought_of_yet_is_served(rig: XksRig) -> None:
    later = METADATA | {
        "kmsOperation": "BulkEncrypt",
        "sourceIdentity": "x",
        "awsPrincipalArn": "AWS Internal",
    }
    assert rig.ask("keys/foo/encrypt", encrypt_body(requestMetadata=later, new=[1]))[0] == 200
    assert rig.ask("keys/foo/metadata", {"requestMetadata": later})[0] == 200
    assert rig.ask("health", {"requestMetadata": HEALTH_METADATA | {"kmsOperation": "New"}})[0] == 200


def test_a_load_balancer_may_ping(rig: XksRig) -> None:
    assert rig.dialect.claims("/ping")
    assert judged(rig.dialect.handle(Call(method="GET", path="/ping", peer=PEER)))[0] == 200
    answer = rig.dialect.handle(Call(method="POST", path="/ping", peer=PEER))
    assert judged(answer)[0] == 405
    assert dict(answer.headers)["allow"] == "GET, HEAD"


# Paths and methods (order 1 to 3).


@pytest.mark.parametrize(
    "path",
    [
        "/kms/xks/v1/health",
        f"/{PREFIX}x/kms/xks/v1/health",
        f"/{PREFIX}/invalid/kms/xks/v1/health",
        f"/x/{PREFIX}/kms/xks/v1/health",
        "/tenants/kms/xks/v1/health",
        f"{API}",
        f"{API}/",
        f"{API}/health/",
        f"{API}/Health",
        f"{API}/keys",
        f"{API}/keys/foo",
        f"{API}/keys/foo/",
        f"{API}/keys/foo/sign",
        f"{API}/keys/foo/encrypt/",
        f"{API}/keys//encrypt",
        f"{API}/keys/a/b/encrypt",
        f"{API}/keys/./encrypt",
        f"{API}/keys/../encrypt",
        f"{API}/keys/f%6fo/encrypt",
        f"{API}/keys/foo/encrypt%20",
        f"{API}/keys/foo /encrypt",
        f"{API}/keys/foé/encrypt",
        f"{API}/keys/foo/encrypt\n",
        f"{API}/keys/{'x' * 129}/encrypt",
        f"//{PREFIX}/kms/xks/v1/health",
        f"/{PREFIX}//kms/xks/v1/health",
        f"/./{PREFIX}/kms/xks/v1/health",
        f"/a/../{PREFIX}/kms/xks/v1/health",
        f"/{'p' * 130}/kms/xks/v1/health",
        f"/{PREFIX}/kms/xks/v2/health",
        f"/{PREFIX}/KMS/xks/v1/health",
    ],
)
def test_a_path_that_is_none_is_told_so_whoever_signed_it(rig: XksRig, path: str) -> None:
    body = json.dumps({"requestMetadata": HEALTH_METADATA}).encode()
    for method in ("POST", "GET"):
        headers = signed_headers(rig.credentials, path=path, body=body, now_s=rig.service.clock.wall_s())
        answer = judged(
            rig.dialect.handle(Call(method=method, path=path, headers=headers, body=body, peer=PEER))
        )
        assert name_of(answer) == (404, "InvalidUriPathException")
    assert rig.service.records() == []


def test_a_query_is_refused_even_when_the_rest_is_good(rig: XksRig) -> None:
    call = rig.call("health", {"requestMetadata": HEALTH_METADATA})
    assert judged(rig.dialect.handle(call))[0] == 200
    assert name_of(judged(rig.dialect.handle(replace(call, query="x=1")))) == (404, "InvalidUriPathException")


def test_the_longest_path_is_served(rig: XksRig) -> None:
    prefix, key_id = "p" * 116, "k" * 128
    assert len(f"/{prefix}/kms/xks/v1") == 128
    rig.keys = {key_id[: 256 - 128 - len("/keys//encrypt")]: rig.keys["foo"]}
    rig.set_store(prefix=prefix)
    credentials = rig.issue(prefix)
    (external,) = rig.keys
    answer = rig.ask(f"keys/{external}/encrypt", encrypt_body(), prefix=prefix, credentials=credentials)
    assert answer[0] == 200


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "post"])
def test_another_method_is_405_before_any_signature(rig: XksRig, target: str, method: str) -> None:
    answer = rig.dialect.handle(Call(method=method, path=f"{API}/{target}", peer=PEER))
    assert name_of(judged(answer)) == (405, "ValidationException")
    assert dict(answer.headers)["allow"] == "POST"


def test_what_the_dialect_claims(rig: XksRig) -> None:
    for path in (f"{API}/health", "/kms/xks/v1", "/x/kms/xks/v1", "/kms/xks/v1/", "/ping"):
        assert rig.dialect.claims(path)
    for path in ("/", "/v1/transit/encrypt/x", "/kms/xks/v10", "/ping/", "/sealgate/v1/keys"):
        assert not rig.dialect.claims(path)


def test_too_large_a_body_is_refused_unread(rig: XksRig) -> None:
    assert rig.dialect.max_body_bytes == MAX_BODY_BYTES
    call = rig.call("keys/foo/encrypt", b" " * (MAX_BODY_BYTES + 1))
    assert name_of(judged(rig.dialect.handle(call))) == (413, "ValidationException")
    assert judged(rig.dialect.handle(rig.call("keys/foo/encrypt", b" " * MAX_BODY_BYTES)))[0] == 400


# Authentication (order 4).


@pytest.mark.parametrize("target", TARGETS)
def test_a_call_needs_its_signature(rig: XksRig, target: str) -> None:
    body = body_for(rig, target)
    good = rig.call(target, body)
    assert judged(rig.dialect.handle(good))[0] == 200
    other = Credentials(
        access_key_id=rig.credentials.access_key_id, secret="Invalid" + rig.credentials.secret
    )
    unknown = Credentials(
        access_key_id="Invalid" + rig.credentials.access_key_id, secret=rig.credentials.secret
    )
    calls = [
        replace(good, headers=tuple(h for h in good.headers if h[0] != "authorization")),
        replace(good, headers=(*good.headers, ("authorization", "x"))),
        replace(good, headers=(*good.headers, ("host", "x"))),
        replace(good, body=good.body + b" "),
        replace(good, path=good.path.replace("foo", "dec-only"))
        if "foo" in target
        else replace(good, body=b""),
        rig.call(target, body, credentials=other),
        rig.call(target, body, credentials=unknown),
        rig.call(target, body, skew_s=301),
        rig.call(target, body, skew_s=-301),
    ]
    texts = set()
    for call in calls:
        status, content = judged(rig.dialect.handle(call))
        assert name_of((status, content)) == (401, "AuthenticationFailedException")
        texts.add(json.dumps(content))
    assert len(texts) == 1  # one text for all causes
    causes = [record.get("cause") for record in rig.service.records()[-len(calls) :]]
    assert causes == ["missing", *["duplicate"] * 2, *["signature"] * 3, "credential", "skew", "skew"]


def test_five_minutes_of_skew_are_served_and_so_is_a_retry(rig: XksRig) -> None:
    for skew_s in (-300, 300):
        assert rig.ask("health", {"requestMetadata": HEALTH_METADATA}, skew_s=skew_s)[0] == 200
    call = rig.call("health", {"requestMetadata": HEALTH_METADATA})
    assert [judged(rig.dialect.handle(call))[0] for _ in range(3)] == [200] * 3
    rig.service.clock.shift(301)
    assert judged(rig.dialect.handle(call))[0] == 401


def test_a_region_may_be_pinned(rig: XksRig) -> None:
    body = {"requestMetadata": HEALTH_METADATA}
    assert rig.ask("health", body, region="ap-south-1")[0] == 200
    rig.set_store(region="eu-central-1")
    assert name_of(rig.ask("health", body, region="us-east-1")) == (401, "AuthenticationFailedException")
    assert rig.ask("health", body, region="eu-central-1")[0] == 200


def test_credentials_are_rotated_while_running(rig: XksRig) -> None:
    body = {"requestMetadata": HEALTH_METADATA}
    old, new = rig.credentials, rig.issue()
    assert rig.ask("health", body, credentials=old)[0] == rig.ask("health", body, credentials=new)[0] == 200
    rig.service.revoke(old.access_key_id)
    assert rig.ask("health", body, credentials=old)[0] == 401
    assert rig.ask("health", body, credentials=new)[0] == 200


def test_a_credential_is_for_its_own_prefix(rig: XksRig) -> None:
    second = XksStore(prefix="tenants/second", keys={"foo": "orders"})
    rig.set_store(second)
    theirs = rig.service.add_key("orders", tenant="rival")
    rig.service.push(theirs)
    rig.service.add_dialect(
        DialectName.XKS,
        XksSettings(stores=(XksStore(prefix="rival", keys={"foo": "orders"}),)),
        tenant="rival",
    )
    credentials = {
        PREFIX: rig.credentials,
        "tenants/second": rig.issue("tenants/second"),
        "rival": rig.issue("rival", tenant="rival"),
    }
    for prefix in credentials:
        for of_prefix, signer in credentials.items():
            status, _content = rig.ask("keys/foo/encrypt", encrypt_body(), prefix=prefix, credentials=signer)
            assert status == (200 if prefix == of_prefix else 401)


def test_a_credential_does_not_follow_its_prefix_to_another_tenant(rig: XksRig) -> None:
    """The rival had this prefix once, and a credential for it; now it is acme's."""
    rig.service.add_key("orders", tenant="rival")
    rig.service.add_dialect(DialectName.XKS, tenant="rival")
    answer = rig.ask("keys/foo/encrypt", encrypt_body(), credentials=rig.issue(PREFIX, tenant="rival"))
    assert name_of(answer) == (401, "AuthenticationFailedException")
    assert rig.service.records()[-1]["cause"] == "tenant"


def test_a_rivals_ciphertext_does_not_decrypt(rig: XksRig) -> None:
    theirs = rig.service.add_key("orders", tenant="rival")
    rig.service.push(theirs)
    store = XksStore(prefix="rival", keys={"foo": "orders"})
    rig.service.add_dialect(DialectName.XKS, XksSettings(stores=(store,)), tenant="rival")
    signer = rig.issue("rival", tenant="rival")
    _status, sealed = rig.ask("keys/foo/encrypt", encrypt_body(), prefix="rival", credentials=signer)
    assert name_of(rig.decrypt(sealed)) == (400, "InvalidCiphertextException")


def test_a_credential_from_elsewhere_or_ended_is_unknown(rig: XksRig) -> None:
    body = {"requestMetadata": HEALTH_METADATA}
    near = rig.issue(networks=("10.0.0.0/8",))
    assert rig.ask("health", body, credentials=near, peer=Peer(address="10.1.2.3"))[0] == 200
    assert rig.ask("health", body, credentials=near)[0] == 401
    ending = rig.issue(not_after_s=rig.service.clock.wall_s() + 10)
    assert rig.ask("health", body, credentials=ending)[0] == 200
    rig.service.clock.shift(10)
    assert rig.ask("health", body, credentials=ending)[0] == 401


def test_a_credential_may_be_for_some_keys_and_operations(rig: XksRig) -> None:
    signer = rig.issue(keys=frozenset({"orders"}), operations=frozenset({Op.DECRYPT}))
    sealed = rig.encrypt()[1]
    assert rig.ask("keys/foo/decrypt", decrypt_body(sealed), credentials=signer)[0] == 200
    denied = (403, "AccessDeniedException")
    assert name_of(rig.ask("keys/foo/encrypt", encrypt_body(), credentials=signer)) == denied
    metadata = {"requestMetadata": METADATA}
    assert rig.ask("keys/foo/metadata", metadata, credentials=signer)[1]["keyUsage"] == ["DECRYPT"]
    assert name_of(rig.ask("keys/dec-only/metadata", metadata, credentials=signer)) == denied
    assert name_of(rig.ask("keys/dec-only/decrypt", decrypt_body(sealed), credentials=signer)) == denied


SUBJECT = "cks.kms.eu-west-1.amazonaws.com"


def test_a_client_certificate_must_have_its_name(rig: XksRig) -> None:
    authority = make_server_ca()
    rig.set_store(client_subject=SUBJECT)
    body = {"requestMetadata": HEALTH_METADATA}
    good, other = (
        issue_server(authority, [name]).certificate.public_bytes(Encoding.DER)
        for name in (SUBJECT, "cks.kms.us-east-1.amazonaws.com")
    )
    unreadable = [
        of_unknown_version(issue_server(authority, [SUBJECT]).certificate, authority),
        with_unknown_string(issue_server(authority, [SUBJECT]).certificate, authority).public_bytes(
            Encoding.DER
        ),
    ]
    wrong = [None, other, *unreadable]
    for certificate, status in (*((certificate, 401) for certificate in wrong), (good, 200)):
        peer = Peer(address="127.0.0.1", certificate_der=certificate)
        assert rig.ask("health", body, peer=peer)[0] == status


# Quota (order 5).


def test_a_quota_is_told_as_throttling(tmp_path: Path) -> None:
    quota = Quota(requests_per_s=1, burst=2)
    rig = XksRig(tmp_path, limits=Limits(tenant=quota, credential=quota))
    body = {"requestMetadata": HEALTH_METADATA}
    answers = [rig.dialect.handle(rig.call("health", body)) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert name_of(judged(answers[2])) == (429, "ThrottlingException")
    assert dict(answers[2].headers)["retry-after"] == "1"
    stranger = rig.call("health", body, skew_s=900)
    assert judged(rig.dialect.handle(stranger))[0] == 401  # who is not known has no quota
    rig.service.clock.shift(1)
    assert rig.health()[0] == 200
    rig.close()


# JSON and metadata, secondary authorization, key, state, usage, fields (order 6 to 11).


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"requestMetadata":{}}', b"\xff", b"{" * 99_000])
def test_without_metadata_nothing_is_valid(rig: XksRig, target: str, body: bytes) -> None:
    assert name_of(rig.ask(target, body)) == (400, "ValidationException")
    assert name_of(rig.ask(target.replace("foo", "no-such-key"), body)) == (400, "ValidationException")


def test_secondary_authorization_is_off_and_can_be_switched_on(rig: XksRig) -> None:
    sealed = rig.encrypt()[1]
    rig.set_store(rules=(XksRule(name="alice encrypts", principal="*:user/Alice", operation="Encrypt"),))
    assert rig.encrypt()[0] == 200
    assert rig.service.records()[-1]["rule"] == "alice encrypts"
    eve = METADATA | {"awsPrincipalArn": "arn:aws:iam::1:user/Eve"}
    for answer in (
        rig.decrypt(sealed),
        rig.ask("keys/foo/metadata", {"requestMetadata": eve}),
        rig.ask("keys/no-such-key/metadata", {"requestMetadata": eve}),  # before the key is looked for
    ):
        assert name_of(answer) == (403, "AccessDeniedException")
        assert rig.service.records()[-1]["rule"] == "none admits"
    assert rig.health()[0] == 200  # never on health


@pytest.mark.parametrize("operation", ["metadata", "encrypt", "decrypt"])
def test_a_key_that_is_not_there(rig: XksRig, operation: str) -> None:
    body = {"requestMetadata": METADATA}
    for key_id in ("no-such-key", "orders", "FOO", "..."):
        assert name_of(rig.ask(f"keys/{key_id}/{operation}", body)) == (404, "KeyNotFoundException")


def test_a_signing_key_is_no_key_of_this_api(rig: XksRig) -> None:
    signing = rig.service.add_key("signer", algorithm=SigningAlgorithm.ES256)
    rig.service.push(signing)
    rig.keys["signer"] = signing
    rig.set_store()
    assert name_of(rig.metadata("signer")) == (404, "KeyNotFoundException")
    assert name_of(rig.encrypt("signer")) == (404, "KeyNotFoundException")


INVALID_STATE = (400, "InvalidStateException")
INVALID_USAGE = (400, "InvalidKeyUsageException")
NOT_FOUND = (404, "KeyNotFoundException")
OK = (200, "")
BOTH = ["ENCRYPT", "DECRYPT"]


@pytest.mark.parametrize(
    ("state", "encrypts", "decrypts", "shown"),
    [
        (KeyState.ACTIVE, OK, OK, ("ENABLED", BOTH)),
        (KeyState.DEACTIVATED, INVALID_USAGE, OK, ("ENABLED", ["DECRYPT"])),
        (KeyState.PRE_ACTIVE, INVALID_STATE, INVALID_STATE, ("DISABLED", BOTH)),
        (KeyState.SUSPENDED, INVALID_STATE, INVALID_STATE, ("DISABLED", BOTH)),
        (KeyState.COMPROMISED, INVALID_STATE, INVALID_STATE, ("DISABLED", BOTH)),
        (KeyState.DESTROYED, NOT_FOUND, NOT_FOUND, None),
    ],
    ids=str,
)
def test_key_states(
    rig: XksRig,
    state: KeyState,
    encrypts: tuple[int, str],
    decrypts: tuple[int, str],
    shown: tuple[str, list[str]] | None,
) -> None:
    sealed = rig.encrypt()[1]
    rig.service.push(rig.keys["foo"], state)
    assert name_of(rig.encrypt()) == encrypts
    assert name_of(rig.encrypt(**CDIV)) == encrypts
    assert name_of(rig.decrypt(sealed)) == decrypts
    status, metadata = rig.metadata()
    if shown is None:
        assert (status, metadata["errorName"]) == NOT_FOUND
    else:
        assert (metadata["keyStatus"], metadata["keyUsage"]) == shown
    assert rig.health()[1]["ekmFleetDetails"][0]["healthStatus"] == "ACTIVE"  # one key is not the store


def test_a_blocked_key_is_disabled_and_leaves_the_others_alone(rig: XksRig) -> None:
    sealed = rig.encrypt()[1]
    rig.service.serve(replace(rig.keys["foo"], blocked=True))
    assert name_of(rig.encrypt()) == name_of(rig.decrypt(sealed)) == INVALID_STATE
    assert rig.metadata()[1]["keyStatus"] == "DISABLED"
    assert rig.encrypt("enc-only")[0] == 200
    assert rig.health()[0] == 200


def test_a_blocked_key_tells_its_state_before_its_usage(rig: XksRig) -> None:
    assert name_of(rig.encrypt("impotent")) == INVALID_USAGE
    rig.service.serve(replace(rig.keys["impotent"], blocked=True))
    assert name_of(rig.encrypt("impotent")) == INVALID_STATE


def test_rotation_keeps_what_was_encrypted_before(rig: XksRig) -> None:
    key, before = rig.keys["foo"], rig.encrypt()[1]
    rig.service.push(key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    after = rig.encrypt()[1]
    versions = [base64.b64decode(one["ciphertextMetadata"])[1:5] for one in (before, after)]
    assert versions == [b"\0\0\0\x01", b"\0\0\0\x02"]
    assert rig.decrypt(before)[0] == rig.decrypt(after)[0] == 200
    rig.service.push(key, KeyState.DESTROYED, KeyState.ACTIVE)
    assert name_of(rig.decrypt(before)) == INVALID_STATE  # a destroyed version of a key that lives
    assert rig.decrypt(after)[0] == 200


def test_a_version_that_never_was_is_an_invalid_ciphertext(rig: XksRig) -> None:
    sealed = rig.encrypt()[1]
    metadata = bytearray(base64.b64decode(sealed["ciphertextMetadata"]))
    metadata[4] = 9
    answer = rig.decrypt(sealed, ciphertextMetadata=base64.b64encode(metadata).decode())
    assert name_of(answer) == (400, "InvalidCiphertextException")


def test_keys_that_lack_an_operation(rig: XksRig) -> None:
    status, sealed = rig.encrypt("enc-only")
    assert status == 200
    assert name_of(rig.decrypt(sealed, "enc-only")) == INVALID_USAGE
    assert name_of(rig.encrypt("enc-only", **CDIV)) == INVALID_USAGE  # it could not be tried
    for key in ("dec-only", "impotent"):
        assert name_of(rig.encrypt(key)) == name_of(rig.encrypt(key, **CDIV)) == INVALID_USAGE
    assert name_of(rig.decrypt(sealed, "impotent")) == INVALID_USAGE
    # Usage is told before the fields are looked at.
    assert name_of(rig.encrypt("dec-only", plaintext=...)) == INVALID_USAGE


@pytest.mark.parametrize(
    "fields",
    [
        {"plaintext": ...}, {"plaintext": None}, {"plaintext": 5}, {"plaintext": "_-=="}, {"plaintext": "AA"},
        {"encryptionAlgorithm": ...}, {"encryptionAlgorithm": "AES_CBC"},
        {"additionalAuthenticatedData": "?"}, {"ciphertextDataIntegrityValueAlgorithm": "SHA_384"},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_an_encryption(rig: XksRig, fields: dict[str, Any]) -> None:
    assert name_of(rig.encrypt(**fields)) == (400, "ValidationException")


def test_more_than_we_take_is_unsupported(rig: XksRig) -> None:
    big = base64.b64encode(bytes(65_536)).decode()
    for field in ("plaintext", "additionalAuthenticatedData"):
        assert name_of(rig.encrypt(**{field: big})) == (501, "UnsupportedOperationException")


# Revocation, staleness, health.


def test_revocation_is_final_and_shows_at_once(rig: XksRig) -> None:
    sealed = rig.encrypt()[1]
    assert rig.health()[0] == 200  # and is remembered
    for key in rig.keys.values():
        rig.service.withdraw(key)
    assert name_of(rig.encrypt()) == name_of(rig.decrypt(sealed)) == INVALID_STATE
    assert rig.metadata() == (200, {"keySpec": "AES_256", "keyUsage": BOTH, "keyStatus": "DISABLED"})
    assert name_of(rig.health()) == INVALID_STATE
    for key in rig.keys.values():
        rig.service.push(key)
    assert rig.decrypt(sealed)[0] == rig.health()[0] == 200


def test_staleness_may_be_retried_and_shows_at_once(rig: XksRig) -> None:
    sealed = rig.encrypt()[1]
    assert rig.health()[1]["ekmFleetDetails"][0]["healthStatus"] == "ACTIVE"
    rig.service.clock.shift(VALIDITY_S - 10)
    assert rig.health()[1]["ekmFleetDetails"][0]["healthStatus"] == "DEGRADED"
    assert rig.encrypt()[0] == rig.decrypt(sealed)[0] == 200
    rig.service.clock.shift(10)
    late = (503, "DependencyTimeoutException")
    assert name_of(rig.encrypt()) == name_of(rig.decrypt(sealed)) == name_of(rig.metadata()) == late
    status, health = rig.health()
    assert (status, health["ekmFleetDetails"][0]["healthStatus"]) == (200, "UNAVAILABLE")
    for key in rig.keys.values():
        rig.service.push(key)
    assert rig.decrypt(sealed)[0] == 200
    assert rig.health()[1]["ekmFleetDetails"][0]["healthStatus"] == "ACTIVE"


class TriedCore(Core):
    """A core whose trial of the cipher can be counted and can fail."""

    trials = 0
    sound = True

    @override
    def self_test(self) -> bool:
        self.trials += 1
        return super().self_test() and self.sound


def test_the_trial_of_the_cipher_is_remembered_for_less_than_a_minute(tmp_path: Path) -> None:
    rig = XksRig(tmp_path, core_type=TriedCore)
    core = rig.core
    assert isinstance(core, TriedCore)
    for _ in range(3):
        assert rig.health()[0] == 200
    assert core.trials == 1
    assert TRIAL_MAX_AGE_S <= 60
    rig.service.clock.shift(TRIAL_MAX_AGE_S)
    core.sound = False
    for _ in range(2):  # a failure is not remembered
        assert name_of(rig.health()) == (500, "InternalException")
    assert rig.service.records()[-1]["outcome"] == "failed"
    core.sound = True
    assert rig.health()[0] == 200
    assert core.trials == 4
    rig.close()


def test_health_uses_no_key_of_the_tenants(rig: XksRig) -> None:
    rig.health()
    record = rig.service.records()[-1]
    assert record["operation"] == "health"
    assert not {"key", "key_id", "version"} & set(record)


class FlippingCore(Core):
    """A bit flips between the cipher and the answer."""

    @override
    def encrypt(self, ticket: Ticket, plaintext: bytes, aad: Aad, **others: Any) -> Sealed:
        sealed = super().encrypt(ticket, plaintext, aad, **others)
        return replace(sealed, ciphertext=bytes([sealed.ciphertext[0] ^ 1]) + sealed.ciphertext[1:])


def test_what_does_not_decrypt_is_not_sent(tmp_path: Path) -> None:
    rig = XksRig(tmp_path, core_type=FlippingCore)
    assert name_of(rig.encrypt(**CDIV)) == (500, "InternalException")
    assert rig.service.records()[-1]["error"] == "cipher-failed"
    rig.close()


# Records.


def test_what_a_record_says_and_what_not(rig: XksRig) -> None:
    rig.encrypt(additionalAuthenticatedData=AAD)
    record = rig.service.records()[-1]
    expected = {
        "dialect": "xks",
        "operation": "encrypt",
        "tenant": "acme",
        "key": "foo",
        "version": 1,
        "key_id": str(rig.service.key_id(rig.keys["foo"])),
        "caller": "tests",
        "credential": rig.credentials.access_key_id,
        "request_id": METADATA["kmsRequestId"],
        "resource": METADATA["kmsKeyArn"],
        "kms_operation": "Encrypt",
        "principal": METADATA["awsPrincipalArn"],
        "via_service": "ebs",
        "region": "us-east-1",
        "outcome": "ok",
    }
    assert {name: record[name] for name in expected} == expected
    text = rig.service.audit_file.read_text()
    assert PLAINTEXT not in text
    assert "Hello World!" not in text
    assert AAD not in text
    assert rig.credentials.secret not in text


def test_every_refusal_is_recorded_once(rig: XksRig) -> None:
    rig.encrypt("no-such-key")
    rig.encrypt(plaintext="?")
    rig.decrypt(rig.encrypt()[1], additionalAuthenticatedData=AAD)
    found = [
        (record["outcome"], record.get("error"), record.get("error_name")) for record in rig.service.records()
    ]
    assert found == [
        ("refused", "key-not-found", "KeyNotFoundException"),
        ("refused", "input-refused", "ValidationException"),
        ("ok", None, None),
        ("refused", "does-not-verify", "InvalidCiphertextException"),
    ]


def test_strangers_cannot_fill_the_log(rig: XksRig) -> None:
    rig.set_store(XksStore(prefix="tenants/second", keys={"foo": "orders"}))
    body = {"requestMetadata": HEALTH_METADATA}
    wrong = Credentials(access_key_id="A" * 20, secret="x")
    for _ in range(1000):
        assert rig.ask("health", body, credentials=wrong)[0] == 401
    assert len(rig.service.records()) == BURST
    assert rig.health()[0] == 200
    assert rig.service.records()[-1]["outcome"] == "ok"  # who is known is recorded always
    assert rig.ask("health", body, credentials=wrong, prefix="tenants/second")[0] == 401
    assert len(rig.service.records()) == BURST + 2  # another store's failures are not hidden
    rig.service.clock.shift(1)
    assert rig.ask("health", body, credentials=wrong)[0] == 401
    assert rig.service.records()[-1]["items"] == 1000 - BURST + 1


def test_without_its_record_no_answer_leaves(rig: XksRig) -> None:
    sealed = rig.encrypt()[1]
    rig.service.audit_file.unlink()
    for answer in (
        rig.encrypt(),
        rig.decrypt(sealed),
        rig.metadata(),
        rig.health(),
        rig.encrypt("no-such-key"),
    ):
        assert name_of(answer) == (500, "InternalException")


class RevokedMeanwhile(Core):
    """The tenant withdraws its keys while a decryption runs."""

    withdraw: Callable[[], None]

    @override
    def decrypt(self, ticket: Ticket, **others: Any) -> bytes:
        plaintext = super().decrypt(ticket, **others)
        self.withdraw()
        return plaintext


def test_a_call_that_loses_its_leave_meanwhile_is_not_answered(tmp_path: Path) -> None:
    rig = XksRig(tmp_path, core_type=RevokedMeanwhile)
    assert isinstance(rig.core, RevokedMeanwhile)
    rig.core.withdraw = lambda: rig.service.withdraw(rig.keys["foo"])
    sealed = rig.encrypt()[1]
    assert name_of(rig.decrypt(sealed)) == INVALID_STATE
    records = rig.service.records()
    assert [record["outcome"] for record in records] == ["ok", "refused"]
    rig.close()


def test_hostile_texts_stay_on_one_line(rig: XksRig) -> None:
    hostile = METADATA | {"kmsRequestId": 'x\n{"seq":1}\u202e\x1b[31m' + "y" * 9000, "kmsViaService": "é\r\n"}
    assert rig.ask("keys/foo/encrypt", encrypt_body(requestMetadata=hostile))[0] == 200
    record = rig.service.records()[-1]
    assert len(str(record["request_id"])) <= 512
    assert not {"\n", "\x1b", "\u202e"} & set(str(record["request_id"]))


# What the HTTP layer has to say.


@pytest.mark.parametrize("trouble", Trouble)
def test_every_trouble_has_its_answer_in_one_line_of_json(rig: XksRig, trouble: Trouble) -> None:
    call = Call(method="GET", path=f"{API}/health", peer=PEER)
    for known in (None, call):
        answer = rig.dialect.refuse(trouble, known, "reason\nwith é" + "x" * 600)
        status, content = judged(answer)
        assert status >= 400
        assert content["errorName"] in set(ErrorName)
        assert ("allow" in dict(answer.headers)) == (status == 405)


def test_a_tenant_that_has_switched_the_dialect_off_has_no_store(rig: XksRig) -> None:
    entry = rig.service.directory.dialect("acme", DialectName.XKS)
    assert entry is not None
    rig.service.serve(replace(entry, enabled=False))
    assert name_of(rig.health()) == (404, "InvalidUriPathException")
