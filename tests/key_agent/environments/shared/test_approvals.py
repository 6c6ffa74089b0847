"""Two persons or nothing: every way to fall short of it is refused with its own code."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from envelope.base64url import b64u_encode
from key_agent.environments.shared.approvals import (
    REQUIRED,
    Action,
    AdminPrivateKey,
    ApprovalError,
    check_granted,
    payload_sha256,
    payload_text,
    read_private_key,
    read_public_key,
    sign_statement,
    statement,
)
from key_agent.environments.shared.documents import AdminBody, AdminState, ApprovalBody

NOW_MS = 1_800_000_000_000
PAYLOAD: dict[str, object] = {"keys": ["aa", "bb"]}
NAME = "a-0123456789abcdef"
KEYS: dict[str, AdminPrivateKey] = {
    "ada": ed25519.Ed25519PrivateKey.generate(),
    "bob": ec.generate_private_key(ec.SECP256R1()),
    "eve": ed25519.Ed25519PrivateKey.generate(),
}


def public_pem(key: AdminPrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def admin(name: str, key: AdminPrivateKey | None = None, state: AdminState = AdminState.ACTIVE) -> AdminBody:
    public = read_public_key(public_pem(key or KEYS[name]))
    return AdminBody(name=name, public_key=public, state=state, added_at_ms=0, added_by="setup")


ADMINS = {name: admin(name) for name in KEYS}


def asked(**more: Any) -> ApprovalBody:
    text = payload_text(PAYLOAD)
    body = ApprovalBody(
        action=Action.INCIDENT_COMPROMISE,
        subject="inc-7",
        payload=text,
        payload_sha256=payload_sha256(text),
        requested_by="ada",
        requested_at_ms=NOW_MS - 1000,
        expires_at_ms=NOW_MS + 1000,
        signatures={},
    )
    return msgspec.structs.replace(body, **more)


def signed(body: ApprovalBody, *names: str, tenant: str = "acme", approval: str = NAME) -> ApprovalBody:
    what = statement(tenant, approval, body)
    return msgspec.structs.replace(
        body, signatures={name: sign_statement(KEYS[name], what) for name in names}
    )


def granted(body: ApprovalBody | None, **more: Any) -> tuple[str, ...]:
    wanted: dict[str, Any] = {
        "action": Action.INCIDENT_COMPROMISE,
        "subject": "inc-7",
        "payload": PAYLOAD,
        "now_ms": NOW_MS,
    }
    admins = more.pop("admins", ADMINS)
    return check_granted("acme", NAME, body, admins, **(wanted | more))


def test_two_of_three_are_enough_with_both_kinds_of_keys() -> None:
    assert granted(signed(asked(), "ada", "bob")) == ("ada", "bob")
    assert granted(signed(asked(), "ada", "bob", "eve")) == ("ada", "bob", "eve")


@pytest.mark.parametrize("names", [(), ("ada",), ("bob",)])
def test_fewer_are_not(names: tuple[str, ...]) -> None:
    assert len(names) < REQUIRED
    with pytest.raises(ApprovalError) as caught:
        granted(signed(asked(), *names))
    assert caught.value.code == "too-few"


def test_one_key_under_two_names_is_one_person() -> None:
    twin = ADMINS | {"ada2": admin("ada2", KEYS["ada"])}
    body = signed(asked(), "ada")
    body = msgspec.structs.replace(body, signatures=body.signatures | {"ada2": body.signatures["ada"]})
    with pytest.raises(ApprovalError) as caught:
        granted(body, admins=twin)
    assert caught.value.code == "too-few"


def test_the_word_of_somebody_removed_or_never_known_counts_for_nothing() -> None:
    body = signed(asked(), "ada", "bob")
    removed = ADMINS | {"bob": admin("bob", state=AdminState.REMOVED)}
    for admins in (removed, {"ada": ADMINS["ada"]}):
        with pytest.raises(ApprovalError) as caught:
            granted(body, admins=admins)
        assert caught.value.code == "too-few"
        assert "1 of 2 signatures; bob: no administrator" in str(caught.value)  # else nobody could tell why


CHANGES: dict[str, Callable[[ApprovalBody], ApprovalBody]] = {
    "subject": lambda body: msgspec.structs.replace(body, subject="inc-8"),
    "action": lambda body: msgspec.structs.replace(body, action=Action.INCIDENT_CANCEL),
    "payload": lambda body: msgspec.structs.replace(body, payload=payload_text({"keys": ["cc"]})),
    "requested_by": lambda body: msgspec.structs.replace(body, requested_by="bob"),
    "requested_at_ms": lambda body: msgspec.structs.replace(body, requested_at_ms=NOW_MS - 999),
    "expires_at_ms": lambda body: msgspec.structs.replace(body, expires_at_ms=NOW_MS + 99_999),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_signature_is_over_everything(change: str) -> None:
    """Whoever can write the rows cannot make another approval of a signed one."""
    body = CHANGES[change](signed(asked(), "ada", "bob"))
    body = msgspec.structs.replace(body, payload_sha256=payload_sha256(body.payload))
    wanted: dict[str, Any] = {
        "action": Action(body.action),
        "subject": body.subject,
        "payload": msgspec.json.decode(body.payload),
    }
    with pytest.raises(ApprovalError) as caught:
        granted(body, **wanted)
    assert caught.value.code == "signature"


@pytest.mark.parametrize("other", [{"tenant": "globex"}, {"approval": "a-ffffffffffffffff"}])
def test_a_signature_fits_no_other_tenant_or_approval(other: dict[str, str]) -> None:
    with pytest.raises(ApprovalError) as caught:
        granted(signed(asked(), "ada", "bob", **other))
    assert caught.value.code == "signature"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("other-action", {"action": Action.KEYS_RETIRE}),
        ("other-action", {"subject": "inc-8"}),
        ("other-payload", {"payload": {"keys": ["aa"]}}),
        ("other-payload", {"payload": {}}),
        ("expired", {"now_ms": NOW_MS + 1000}),
        ("expired", {"now_ms": NOW_MS - 1001}),
    ],
)
def test_it_allows_what_it_says_and_while_it_says(code: str, wanted: dict[str, Any]) -> None:
    body = signed(asked(), "ada", "bob")
    with pytest.raises(ApprovalError) as caught:
        granted(body, **wanted)
    assert caught.value.code == code
    assert caught.value.next_step


def test_it_serves_once_and_has_to_exist() -> None:
    with pytest.raises(ApprovalError) as caught:
        granted(signed(asked(used_at_ms=NOW_MS), "ada", "bob"))
    assert caught.value.code == "used"
    with pytest.raises(ApprovalError) as caught:
        granted(None)
    assert caught.value.code == "unknown"


def test_a_hash_that_is_not_the_payloads_is_no_approval() -> None:
    with pytest.raises(ApprovalError) as caught:
        granted(signed(asked(payload_sha256=payload_sha256("{}")), "ada", "bob"))
    assert caught.value.code == "other-payload"


@pytest.mark.parametrize("spoiled", ["", "AA", "not base64url!"])
def test_what_is_no_signature_is_refused(spoiled: str) -> None:
    body = msgspec.structs.replace(asked(), signatures={"ada": spoiled, "bob": spoiled})
    with pytest.raises(ApprovalError) as caught:
        granted(body)
    assert caught.value.code == "signature"


def test_only_keys_of_two_kinds_are_taken() -> None:
    refused: list[rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = [
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
        ec.generate_private_key(ec.SECP384R1()),
    ]
    for key in refused:
        with pytest.raises(ApprovalError, match="Ed25519"):
            read_public_key(public_pem(key))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(ApprovalError, match="Ed25519"):
            read_private_key(pem, None)
    for text in ("", "x", "ä", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(ApprovalError):
            read_public_key(text)


@pytest.mark.parametrize("name", ["ada", "bob"])
def test_a_private_key_is_read_with_its_passphrase_alone(name: str) -> None:
    pem = KEYS[name].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open"))
    found = read_private_key(pem, b"open")
    body = signed(asked(), "eve")
    what = statement("acme", NAME, body)
    body = msgspec.structs.replace(body, signatures=body.signatures | {name: sign_statement(found, what)})
    assert name in granted(body)
    for wrong in (None, b"shut"):
        with pytest.raises(ApprovalError):
            read_private_key(pem, wrong)


def test_what_openssl_signs_counts() -> None:
    """`openssl dgst -sha256 -sign`: DER, as a smart card's tool writes it too."""
    key = KEYS["bob"]
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    body = signed(asked(), "ada")
    raw = key.sign(statement("acme", NAME, body), ec.ECDSA(hashes.SHA256()))
    body = msgspec.structs.replace(body, signatures=body.signatures | {"bob": b64u_encode(raw)})
    assert granted(body) == ("ada", "bob")


@pytest.mark.parametrize(
    "payload", ["{\u00e9}", "\ud800", "{" * 60_000], ids=["letters", "surrogate", "deep"]
)
def test_a_payload_that_nobody_writes_so_can_be_shown_and_allows_nothing(payload: str) -> None:
    """In the row of a breached manager it would else keep the list of all approvals from everybody."""
    body = asked(payload=payload, payload_sha256=payload_sha256(payload))
    assert payload_sha256(payload).encode() in statement("acme", NAME, body)
    with pytest.raises(ApprovalError) as refused:
        check_granted(
            "acme",
            NAME,
            body,
            ADMINS,
            action=Action.INCIDENT_COMPROMISE,
            subject="inc-7",
            payload=PAYLOAD,
            now_ms=NOW_MS,
        )
    assert refused.value.code == "other-payload"
