"""The calls of the KACLS API, as a browser, an admin and another KACLS make them; and each that must fail."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, override

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envelope.base64url import b64u_decode
from envelope.keys import KeyState, SigningAlgorithm
from proxy.encryption_service.call import Answer
from proxy.encryption_service.core import Core, Sealed
from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.dialects.kacls_answers import (
    ANSWER_TO_DENIAL,
    ANSWER_TO_ERROR,
    ANSWER_TO_REFUSAL,
    ANSWER_TO_TROUBLE,
)
from proxy.encryption_service.dialects.kacls_policy import Denial
from proxy.encryption_service.errors import KeyRefused, Refusal, ServiceError
from proxy.encryption_service.jwks import MAX_AGE_S, MAX_STALE_S, MIN_INTERVAL_S
from proxy.encryption_service.limits import Limits, Quota
from proxy.encryption_service.model import DialectEntry, DialectName, KaclsSettings
from proxy.encryption_service.strangers import BURST
from tests.proxy.encryption_service.dialects.kacls_rig import (
    ADMIN,
    GOOGLE,
    GUEST_IDP,
    IDP,
    ORIGIN,
    RESOURCE,
    URL,
    USER,
    KaclsRig,
    b64,
    endpoint,
    issuer_of,
    jwks_url,
    new_key,
    ok,
    refused,
    unb64,
)
from tests.proxy.encryption_service.token_mint import Mint

VECTORS = (
    (
        "//googleapis.com/testcase/hJB0PzRI7nl79LC18qaV8WMDCBALBSs9BREcq79MfVw",
        "",
        "6a68079290123ed8f23c845cc8bda91cd961c0246b79446662919e336920cbef",
        "4d9aafeb06cd0e812d0f3c10f18573a5aee4c86300a104fad9b258f0b71bd813",
    ),
    (
        "//googleapis.com/testcase/od8yfZiS5ZF2RN27X4ClalsV6LobL2FwKRk4qOJxWdE",
        "perimeter1",
        "05b62b91cb66f19e27789fb69eb680fac113a70a120178d6cfa6b1b4cb11bb95",
        "1b6231a171bc10ef99dd3b08f0742620811a59191570284d32b674c531cc2da5",
    ),
)


@pytest.fixture
async def kacls(tmp_path: Path) -> AsyncIterator[KaclsRig]:
    rig = KaclsRig(tmp_path)
    await rig.fetch_keys()
    yield rig
    await rig.issuer_keys.aclose()
    rig.close()


# What it is for.


def test_what_was_wrapped_is_unwrapped(kacls: KaclsRig) -> None:
    for size in (1, 16, 32, 128):
        key = new_key()[:1] * size
        wrapped = kacls.wrapped(key)
        assert unb64(ok(kacls.unwrap(wrapped))["key"]) == key
    key = new_key()
    assert key not in unb64(kacls.wrapped(key))
    assert kacls.wrapped(key) != kacls.wrapped(key)


def test_names_of_gmail_fit_a_kilobyte(kacls: KaclsRig) -> None:
    """512 bytes of resource name, 128 of perimeter and of key: the most that each may have."""
    resource, perimeter, key = "ü" * 256, "p" * 128, b"k" * 128
    kacls.set_endpoint(perimeters={perimeter: {}})
    wrapped = kacls.wrapped(key, resource_name=resource, perimeter_id=perimeter)
    assert len(wrapped) <= 1024
    assert unb64(ok(kacls.unwrap(wrapped, resource_name=resource))["key"]) == key
    assert refused(kacls.unwrap(wrapped, resource_name="ü" * 255)) == (403, "resource-name")


@pytest.mark.parametrize(("resource", "perimeter", "key", "expected"), VECTORS)
def test_the_digest_is_googles(
    kacls: KaclsRig, resource: str, perimeter: str, key: str, expected: str
) -> None:
    kacls.set_endpoint(perimeters={"perimeter1": {}})
    wrapped = kacls.wrapped(bytes.fromhex(key), resource_name=resource, perimeter_id=perimeter)
    answer = kacls.call(
        "digest",
        authorization=kacls.authorization("verifier", resource_name=resource),
        reason="",
        wrapped_key=wrapped,
    )
    assert unb64(ok(answer)["resource_key_hash"]).hex() == expected


def test_admins_wrap_and_unwrap_without_google(kacls: KaclsRig) -> None:
    """What drive-cse-upload sends."""
    key = new_key()
    wrapped = ok(
        kacls.call(
            "privilegedwrap",
            key=b64(key),
            resource_name=RESOURCE,
            perimeter_id="",
            authentication=kacls.authentication(ADMIN.upper()),
            reason="import",
        )
    )["wrapped_key"]
    answer = kacls.call(
        "privilegedunwrap",
        wrapped_key=wrapped,
        resource_name=RESOURCE,
        authentication=kacls.authentication(ADMIN),
        reason="import",
    )
    assert unb64(ok(answer)["key"]) == key
    assert unb64(ok(kacls.unwrap(wrapped))["key"]) == key


def test_status_and_certs_are_for_everybody(kacls: KaclsRig) -> None:
    status = kacls.dialect.handle(kacls.http("status", method="GET", headers=()))
    assert isinstance(status, Answer)
    read = ok(status)
    assert (read["server_type"], read["vendor_id"], read["name"]) == ("KACLS", "Sealgate", "acme")
    assert read["version"]
    assert {"wrap", "unwrap", "digest", "rewrap", "privilegedunwrap", "certs"} <= set(
        read["operations_supported"]
    )
    certs = kacls.dialect.handle(kacls.http("certs", method="GET", headers=()))
    assert isinstance(certs, Answer)
    (jwk,) = ok(certs)["keys"]
    assert set(jwk) == {"kty", "use", "alg", "kid", "n", "e"}
    assert jwk["kid"] == str(kacls.service.key_id(kacls.identity))
    assert kacls.service.records() == []
    kacls.set_endpoint(signing_key=None, trusted_kacls=())
    certs = kacls.dialect.handle(kacls.http("certs", method="GET", headers=()))
    assert isinstance(certs, Answer)
    assert refused(certs) == (404, "key-not-found")
    status = kacls.dialect.handle(kacls.http("status", method="GET", headers=()))
    assert isinstance(status, Answer)
    assert "rewrap" not in ok(status)["operations_supported"]


# Tokens.


def forged(kacls: KaclsRig, mint: Mint, claims: dict[str, object]) -> dict[str, str]:
    """What an attacker, or a broken issuer, might send in place of a token of *mint*."""
    now_s = kacls.clock.wall_s()
    attacker = Mint(mint.issuer, mint.audience, number=9, kid=mint.kid)
    good = mint.token(claims, now_s=now_s)
    header, middle, signature = good.split(".")
    return {
        "algorithm": mint.unsigned(claims, now_s=now_s),
        "algorithm ": mint.confused(claims, now_s=now_s),
        "algorithm  ": mint.token(claims, now_s=now_s, alg="PS256"),
        "header": mint.token(claims, now_s=now_s, crit=["exp"]),
        "header ": mint.token(claims, now_s=now_s, kid=None),
        "unknown-key": mint.token(claims, now_s=now_s, kid="other"),
        "signature": attacker.token(claims, now_s=now_s, jwk=attacker.jwk(), jku="https://evil.example/keys"),
        "signature ": f"{header}.{middle}.{'A' * len(signature)}",
        "issuer": mint.token({**claims, "iss": "https://evil.example"}, now_s=now_s),
        "audience": mint.token({**claims, "aud": "somebody-else"}, now_s=now_s),
        "expired": mint.token(claims, now_s=now_s - 3661),
        "not-yet-valid": mint.token(claims, now_s=now_s + 3600),
        "claim": mint.token({**claims, "email": None}, now_s=now_s),
        "claim ": mint.token({**claims, "email": ["alice@acme.example"]}, now_s=now_s),
        "claim  ": mint.token({**claims, "email": "a" * 400 + "@x"}, now_s=now_s),
        "malformed": "x.y.z",
        "malformed ": good + "=",
        "too-large": mint.token({**claims, "x": "y" * 17_000}, now_s=now_s),
    }


def test_a_bad_authentication_token_is_401(kacls: KaclsRig) -> None:
    for name, token in forged(kacls, IDP, {"email": USER}).items():
        answer = kacls.call(
            "wrap", authentication=token, authorization=kacls.authorization("writer"), key="AAAA", reason=""
        )
        assert refused(answer) == (401, name.strip()), name
        assert dict(answer.headers)["www-authenticate"].startswith("Bearer")
        assert dict(answer.headers)["access-control-allow-origin"] == ORIGIN
    unverified = kacls.authentication(person={"email_verified": False})
    answer = kacls.call(
        "wrap", authentication=unverified, authorization=kacls.authorization("writer"), key="AAAA"
    )
    assert refused(answer) == (401, "claim")
    assert all(record["outcome"] == "refused" for record in kacls.service.records())
    assert not any("caller" in record for record in kacls.service.records())


def test_a_bad_authorization_token_is_403(kacls: KaclsRig) -> None:
    claims: dict[str, object] = {
        "email": USER, "role": "writer", "kacls_url": URL, "resource_name": RESOURCE,
    }  # fmt: skip
    for name, token in forged(kacls, GOOGLE, claims).items():
        answer = kacls.call(
            "wrap", authentication=kacls.authentication(), authorization=token, key="AAAA", reason=""
        )
        assert refused(answer) == (403, name.strip()), name


def test_each_issuer_has_one_part(kacls: KaclsRig) -> None:
    """One party's token must never be taken for another's: not Google's for a person's, nor the reverse."""
    as_google = kacls.authorization("writer", mint=IDP)
    as_person = kacls.authentication(mint=GOOGLE)
    both = kacls.authorization("writer")
    for authentication, authorization, expected in (
        (as_person, both, (401, "issuer")),
        (both, both, (401, "issuer")),
        (kacls.authentication(), as_google, (403, "issuer")),
        (as_google, as_google, (403, "issuer")),
        (kacls.authentication(mint=GUEST_IDP), both, (401, "issuer")),
    ):
        answer = kacls.call("wrap", authentication=authentication, authorization=authorization, key="AAAA")
        assert refused(answer) == expected


# Rules of wrap and unwrap. Each changes one thing about a call that otherwise succeeds.
type Changes = dict[str, Any]
WRAP_DENIALS: tuple[tuple[Changes, Changes, int, str], ...] = (
    ({"role": "reader"}, {}, 403, "role"),
    ({"role": "verifier"}, {}, 403, "role"),
    ({"role": "migrator"}, {}, 403, "role"),
    ({"role": None}, {}, 403, "role"),
    ({"role": "Writer"}, {}, 403, "role"),
    ({"kacls_url": "https://evil.example/kacls/acme/v1"}, {}, 403, "kacls-url"),
    ({"kacls_url": URL + "2"}, {}, 403, "kacls-url"),
    ({"kacls_url": None}, {}, 403, "claim"),
    ({"kacls_owner_domain": "evil.example"}, {}, 403, "owner-domain"),
    ({"resource_name": None}, {}, 403, "claim"),
    ({"resource_name": ""}, {}, 403, "claim"),
    ({"resource_name": "x" * 513}, {}, 403, "claim"),
    ({"perimeter_id": "p" * 129}, {}, 403, "claim"),
    ({"perimeter_id": 5}, {}, 403, "claim"),
    ({"perimeter_id": "nowhere"}, {}, 403, "unknown-perimeter"),
    ({"perimeter_id": "board"}, {}, 403, "perimeter"),
    ({"perimeter_id": "board"}, {"department": "sales", "mfa": True}, 403, "perimeter"),
    ({"perimeter_id": "board"}, {"department": "board", "mfa": False}, 403, "perimeter"),
    ({"perimeter_id": "board"}, {"department": "board"}, 403, "perimeter"),
    ({"perimeter_id": "board"}, {"department": {"board": 1}, "mfa": "true"}, 403, "perimeter"),
    ({"email": "bob@acme.example"}, {}, 403, "not-the-same-user"),
    ({}, {"google_email": "bob@acme.example"}, 403, "not-the-same-user"),
    ({"email_type": "google-visitor"}, {}, 403, "guest-access"),
    ({"email_type": "customer-idp"}, {}, 403, "guest-access"),
    ({"email_type": "martian"}, {}, 403, "unknown-email-type"),
    ({"delegated_to": "room@acme.example"}, {}, 403, "delegation"),
    ({}, {"delegated_to": "room@acme.example", "resource_name": RESOURCE}, 403, "delegation"),
    ({}, {"delegated_to": "room@acme.example"}, 401, "claim"),
    (
        {"delegated_to": "room@acme.example"},
        {"delegated_to": "hall@acme.example", "resource_name": RESOURCE},
        403,
        "delegation",
    ),
    (
        {"delegated_to": "room@acme.example"},
        {"delegated_to": "room@acme.example", "resource_name": RESOURCE + "2"},
        403,
        "delegation",
    ),
)
WRAP_ADMISSIONS: tuple[tuple[Changes, Changes], ...] = (
    ({"role": "upgrader"}, {}),
    ({"email": "ALICE@Acme.Example"}, {}),
    ({}, {"email": "other@elsewhere.example", "google_email": "Alice@acme.example"}),
    ({"kacls_url": URL + "/"}, {}),
    ({"kacls_owner_domain": "ACME.example"}, {}),
    ({"email_type": "google"}, {}),
    ({"perimeter_id": None}, {}),
    ({"perimeter_id": "board"}, {"department": "legal", "mfa": True}),
    ({"perimeter_id": "board"}, {"department": ["sales", "board"], "mfa": "true"}),
    (
        {"delegated_to": "Room@acme.example"},
        {"delegated_to": "room@acme.example", "resource_name": RESOURCE},
    ),
)


@pytest.mark.parametrize(("claims", "person", "status", "details"), WRAP_DENIALS)
def test_wrap_is_refused(
    kacls: KaclsRig, claims: Changes, person: Changes, status: int, details: str
) -> None:
    answer = kacls.wrap(new_key(), person=person, **claims)
    assert refused(answer) == (status, details)
    (record,) = kacls.service.records()
    assert record["operation"] == "wrap"
    assert record["outcome"] == "refused"


@pytest.mark.parametrize(("claims", "person"), WRAP_ADMISSIONS)
def test_wrap_is_admitted(kacls: KaclsRig, claims: Changes, person: Changes) -> None:
    assert "wrapped_key" in ok(kacls.wrap(new_key(), person=person, **claims))


def test_an_owner_domain_that_is_not_set_up_is_not_believed(kacls: KaclsRig) -> None:
    kacls.set_endpoint(owner_domain=None)
    assert refused(kacls.wrap(new_key(), kacls_owner_domain="acme.example")) == (403, "owner-domain")
    assert ok(kacls.wrap(new_key()))


def test_unwrap_asks_for_what_was_wrapped(kacls: KaclsRig) -> None:
    board = {"department": "board", "mfa": True}
    key = new_key()
    wrapped = kacls.wrapped(key, person=board, perimeter_id="board")
    assert unb64(ok(kacls.unwrap(wrapped, person=board))["key"]) == key
    assert ok(kacls.unwrap(wrapped, person=board, role="writer"))
    # The perimeter of the blob counts, whatever Google says now.
    for perimeter in (None, "", "board"):
        assert refused(kacls.unwrap(wrapped, perimeter_id=perimeter)) == (403, "perimeter")
    kacls.set_endpoint(perimeters={})
    assert refused(kacls.unwrap(wrapped, person=board)) == (403, "unknown-perimeter")
    kacls.set_endpoint()
    for role in ("upgrader", "verifier", "decrypter", None):
        assert refused(kacls.unwrap(wrapped, person=board, role=role)) == (403, "role")
    other = kacls.unwrap(wrapped, person=board, resource_name=RESOURCE + "x")
    assert refused(other) == (403, "resource-name")
    assert key not in other.body


def test_guests_come_by_their_own_issuer(kacls: KaclsRig) -> None:
    kacls.set_endpoint(guest_issuers=(issuer_of(GUEST_IDP),))
    guest = "eve@elsewhere.example"

    def wrap(mint: Mint, email_type: str | None) -> Answer:
        return kacls.call(
            "wrap",
            authentication=kacls.authentication(guest, mint=mint),
            authorization=kacls.authorization("writer", guest, email_type=email_type),
            key=b64(new_key()),
        )

    assert ok(wrap(GUEST_IDP, "google-visitor"))
    assert ok(wrap(GUEST_IDP, "customer-idp"))
    assert refused(wrap(GUEST_IDP, "google")) == (403, "guest-access")
    assert refused(wrap(GUEST_IDP, None)) == (403, "guest-access")
    assert refused(wrap(IDP, "google-visitor")) == (403, "guest-access")
    kacls.set_endpoint(
        guest_issuers=(issuer_of(GUEST_IDP),), admins={guest: ("privilegedwrap",), ADMIN: ("privilegedwrap",)}
    )
    answer = kacls.call(
        "privilegedwrap",
        authentication=kacls.authentication(guest, mint=GUEST_IDP),
        key="AAAA",
        resource_name="x",
    )
    assert refused(answer) == (403, "admin-list")


def test_admins_may_what_the_list_says_and_no_more(kacls: KaclsRig) -> None:
    kacls.set_endpoint(admins={ADMIN: ("privilegedwrap",), "takeout@acme.example": ("privilegedunwrap",)})
    wrapped = kacls.wrapped(new_key())

    def privileged(operation: str, token: str, **members: str) -> Answer:
        usual = {"resource_name": RESOURCE, "authentication": token}
        return kacls.call(operation, **(usual | members))

    takeout = kacls.authentication("takeout@acme.example")
    assert ok(privileged("privilegedunwrap", takeout, wrapped_key=wrapped))
    for token in (kacls.authentication(ADMIN), kacls.authentication(USER)):
        assert refused(privileged("privilegedunwrap", token, wrapped_key=wrapped)) == (403, "admin-list")
    assert refused(privileged("privilegedwrap", takeout, key="AAAA")) == (403, "admin-list")
    google = kacls.authorization("writer", ADMIN)
    assert refused(privileged("privilegedwrap", google, key="AAAA")) == (401, "issuer")
    other = privileged("privilegedunwrap", takeout, wrapped_key=wrapped, resource_name=RESOURCE + "x")
    assert refused(other) == (403, "resource-name")
    admin = kacls.authentication(ADMIN)
    unknown = privileged("privilegedwrap", admin, key="AAAA", perimeter_id="nowhere")
    assert refused(unknown) == (403, "unknown-perimeter")
    ours = kacls.authentication(ADMIN, person={"delegated_to": "x@y", "resource_name": RESOURCE})
    assert refused(privileged("privilegedwrap", ours, key="AAAA")) == (403, "admin-list")


def test_digest_is_for_the_verifier(kacls: KaclsRig) -> None:
    wrapped = kacls.wrapped(new_key())
    for role in ("reader", "writer", None):
        answer = kacls.call("digest", authorization=kacls.authorization(role), wrapped_key=wrapped)
        assert refused(answer) == (403, "role")
    other = kacls.authorization("verifier", resource_name="other")
    assert refused(kacls.call("digest", authorization=other, wrapped_key=wrapped)) == (403, "resource-name")
    foreign = kacls.authorization("verifier", kacls_url="https://evil.example")
    assert refused(kacls.call("digest", authorization=foreign, wrapped_key=wrapped)) == (403, "kacls-url")


# Blobs.


def test_a_changed_or_foreign_blob_is_refused(kacls: KaclsRig) -> None:
    wrapped = unb64(kacls.wrapped(new_key()))
    for index in range(len(wrapped)):
        changed = bytearray(wrapped)
        changed[index] ^= 1
        assert refused(kacls.unwrap(b64(bytes(changed))))[0] == 400, index
    for size in range(0, len(wrapped), 5):
        assert refused(kacls.unwrap(b64(wrapped[:size])))[0] == 400
    assert refused(kacls.unwrap(b64(wrapped + b"x")))[0] == 400
    assert ok(kacls.unwrap(b64(wrapped)))


def test_a_blob_is_its_tenants_and_its_keys(kacls: KaclsRig) -> None:
    other_url = "https://kacls.example.com/kacls/globex"
    kacls.add_tenant("globex", other_url)
    wrapped, theirs = kacls.wrapped(new_key()), kacls.wrapped(new_key(), url=other_url)
    assert ok(kacls.unwrap(theirs, url=other_url))
    assert refused(kacls.unwrap(wrapped, url=other_url)) == (400, "does-not-verify")
    assert refused(kacls.unwrap(theirs)) == (400, "does-not-verify")
    # A token for one KACLS is none for the other.
    assert refused(kacls.unwrap(theirs, url=other_url, kacls_url=URL)) == (403, "kacls-url")
    kacls.service.push(kacls.service.add_key("second"))
    kacls.set_endpoint(wrapping_key="second")
    assert refused(kacls.unwrap(wrapped)) == (400, "does-not-verify")


def test_a_blob_opens_in_no_other_dialect(kacls: KaclsRig) -> None:
    from proxy.encryption_service.core import Purpose
    from proxy.encryption_service.dialects import kacls_blob
    from proxy.encryption_service.errors import DoesNotVerify
    from proxy.encryption_service.model import Op

    parsed = kacls_blob.parse(unb64(kacls.wrapped(new_key())))
    core = kacls.service.core
    for dialect in DialectName:
        caller = kacls.service.caller(DialectName.KACLS)
        ticket = core.admit(caller, kacls.key, Op.DECRYPT)

        def decrypt(dialect: DialectName = dialect, ticket: Any = ticket) -> bytes:
            return core.decrypt(
                ticket,
                version=parsed.version,
                nonce=parsed.nonce,
                ciphertext=parsed.ciphertext,
                tag=parsed.tag,
                aad=parsed.head,
                purpose=Purpose(dialect),
            )

        if dialect is DialectName.KACLS:
            assert decrypt()
        else:
            with pytest.raises(DoesNotVerify):
                decrypt()


# Keys' states.


def test_a_key_that_is_rotated_unwraps_what_it_wrapped(kacls: KaclsRig) -> None:
    key = new_key()
    wrapped = kacls.wrapped(key)
    kacls.service.push(kacls.key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    assert unb64(ok(kacls.unwrap(wrapped))["key"]) == key
    assert unb64(kacls.wrapped(key))[2:6] == (2).to_bytes(4)
    kacls.service.push(kacls.key, KeyState.DEACTIVATED)
    assert unb64(ok(kacls.unwrap(wrapped))["key"]) == key
    assert refused(kacls.wrap(key)) == (403, "key-refused:deactivated")
    kacls.service.push(kacls.key, KeyState.DESTROYED, KeyState.ACTIVE)
    assert refused(kacls.unwrap(wrapped)) == (403, "key-refused:version-gone")
    kacls.service.push(kacls.key, KeyState.DESTROYED)
    assert refused(kacls.unwrap(wrapped)) == (404, "key-not-found")


@pytest.mark.parametrize("state", [KeyState.PRE_ACTIVE, KeyState.SUSPENDED, KeyState.COMPROMISED])
def test_a_key_that_may_do_nothing_does_nothing(kacls: KaclsRig, state: KeyState) -> None:
    wrapped = kacls.wrapped(new_key())
    kacls.service.push(kacls.key, state)
    assert refused(kacls.unwrap(wrapped))[0] == 403
    assert refused(kacls.wrap(new_key()))[0] == 403


def test_revoked_is_final_and_stale_is_not(kacls: KaclsRig) -> None:
    wrapped = kacls.wrapped(new_key())

    def status() -> Answer:
        answer = kacls.dialect.handle(kacls.http("status", method="GET"))
        assert isinstance(answer, Answer)
        return answer

    kacls.clock.shift(320)  # the agent is late, the keys are valid
    assert ok(kacls.unwrap(wrapped))
    assert ok(status())
    kacls.clock.shift(11)
    for answer in (kacls.unwrap(wrapped), kacls.wrap(new_key()), status()):
        assert refused(answer) == (503, "stale")
        assert int(dict(answer.headers)["retry-after"]) >= 1
    kacls.service.push(kacls.key)
    assert ok(kacls.unwrap(wrapped))
    kacls.service.withdraw(kacls.key)
    for answer in (kacls.unwrap(wrapped), kacls.wrap(new_key()), status()):
        assert refused(answer) == (403, "revoked")


def test_a_blocked_key_and_a_dialect_that_is_off(kacls: KaclsRig) -> None:
    kacls.service.add_key("workspace", blocked=True)
    assert refused(kacls.wrap(new_key())) == (403, "key-refused:blocked")
    kacls.service.serve(
        DialectEntry(
            tenant="acme",
            dialect=DialectName.KACLS,
            enabled=False,
            settings=KaclsSettings(endpoints=(endpoint(),)),
        )
    )
    assert refused(kacls.wrap(new_key())) == (404, "not-found")


def test_a_tenants_quota_is_429_and_strangers_use_none_of_it(tmp_path: Path) -> None:
    limits = Limits(tenant=Quota(requests_per_s=1, burst=3))
    kacls = KaclsRig(tmp_path, limits=limits)
    try:
        import asyncio

        asyncio.run(kacls.fetch_keys())
        for _ in range(20):
            assert refused(kacls.wrap(b"k", user="eve@x.example", person={"aud": "other"}))[0] == 401
        for _ in range(3):
            assert ok(kacls.wrap(b"k"))
        answer = kacls.wrap(b"k")
        assert refused(answer) == (429, "quota")
        assert dict(answer.headers)["retry-after"] == "1"
        assert dict(answer.headers)["access-control-allow-origin"] == ORIGIN
    finally:
        kacls.close()


class _ChangesAfter(Core):
    """Something ends while the work is done: between `admit` and `finish`."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    @override
    def encrypt(self, *arguments: Any, **named: Any) -> Sealed:
        sealed = super().encrypt(*arguments, **named)
        self.meanwhile()
        return sealed


def test_what_ends_meanwhile_is_not_answered(kacls: KaclsRig) -> None:
    rig = kacls.service
    core = _ChangesAfter(
        keys=rig.keys, access=rig.access, directory=lambda: rig.directory, audit=rig.audit, clock=rig.clock
    )
    core.meanwhile = lambda: rig.withdraw(kacls.key)
    kacls.dialect._calls._core = core
    assert refused(kacls.wrap(new_key())) == (403, "revoked")
    assert rig.records()[-1]["error"] == "revoked"


# Records.


def test_every_call_is_recorded_once_and_says_who_what_and_why(kacls: KaclsRig) -> None:
    nasty = 'drive\r\n{"outcome":"ok"}\x1b[2J\u202e\u2028' + "x" * 900
    wrapped = ok(kacls.wrap(new_key(), reason=nasty, perimeter_id=None))["wrapped_key"]
    refused(kacls.unwrap(wrapped, resource_name="other\n\x00"))
    lines = kacls.service.audit_file.read_bytes().splitlines()
    done, denied = kacls.service.records()
    assert len([line for line in lines if b"service-call" in line]) == 2
    assert done["caller"] == USER
    assert done["resource"] == RESOURCE
    assert done["key"] == "workspace"
    assert done["version"] == 1
    assert done["key_id"] == str(kacls.service.key_id(kacls.key))
    assert done["role"] == "writer"
    assert done["outcome"] == "ok"
    reason = str(done["reason"])
    assert reason.startswith("drive")
    assert reason.isprintable() or "�" in reason
    assert not set("\r\n\x1b\u202e\u2028") & set(reason)
    assert len(reason) <= 512
    assert (denied["error"], denied["outcome"]) == ("resource-name", "refused")
    assert "\n" not in str(denied["resource"])
    text = kacls.service.audit_file.read_text()
    assert wrapped not in text
    assert "eyJ" not in text  # no token


def test_without_a_record_there_is_no_answer(kacls: KaclsRig) -> None:
    wrapped = kacls.wrapped(new_key())
    kacls.service.audit_file.unlink()
    for answer in (kacls.unwrap(wrapped), kacls.wrap(new_key()), kacls.wrap(new_key(), role="reader")):
        assert refused(answer) == (500, "not-recorded")


def test_strangers_cannot_fill_the_log(kacls: KaclsRig) -> None:
    for _ in range(int(BURST) + 100):
        answer = kacls.call("unwrap", authentication="x", authorization="y", wrapped_key="AAAA", reason="z")
        assert refused(answer)[0] == 401
    assert len(kacls.service.records()) == BURST


# The border.


def test_browsers_of_the_allowed_origin_may_read_every_answer(kacls: KaclsRig) -> None:
    answers = [
        kacls.wrap(new_key()),
        kacls.wrap(new_key(), role="reader"),
        kacls.call("wrap"),
        kacls.call("unknown"),
        kacls.dialect.handle(kacls.http("wrap", method="GET")),
        kacls.dialect.handle(kacls.http("status", method="GET")),
        kacls.dialect.handle(kacls.http("wrap", b"{}", headers=(("content-type", "text/plain"),))),
        *(kacls.dialect.refuse(trouble, kacls.http("wrap")) for trouble in Trouble),
    ]
    for answer in answers:
        assert isinstance(answer, Answer)
        headers = dict(answer.headers)
        assert headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-credentials" not in headers
        assert headers["vary"] == "origin"


def test_preflight(kacls: KaclsRig) -> None:
    for operation in ("wrap", "unwrap", "status", "rewrap", "privatekeysign"):
        answer = kacls.dialect.handle(kacls.http(operation, method="OPTIONS", headers=()))
        assert isinstance(answer, Answer)
        assert (answer.status, answer.body, answer.content_type) == (204, b"", "")
        headers = dict(answer.headers)
        assert headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in headers["access-control-allow-methods"]
        assert headers["access-control-allow-headers"] == "content-type"
        assert "access-control-allow-private-network" not in headers
    private = kacls.http(
        "wrap", method="OPTIONS", headers=(("access-control-request-private-network", "true"),)
    )
    answer = kacls.dialect.handle(private)
    assert isinstance(answer, Answer)
    assert dict(answer.headers)["access-control-allow-private-network"] == "true"
    answer = kacls.dialect.handle(kacls.http("wrap", method="OPTIONS", origin=None, headers=()))
    assert isinstance(answer, Answer)
    assert dict(answer.headers)["allow"] == "POST, OPTIONS"
    assert "access-control-allow-origin" not in dict(answer.headers)


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://client-side-encryption.google.com",
        ORIGIN + ".evil.example",
        "",
    ],
)
def test_other_origins_neither_call_nor_read(kacls: KaclsRig, origin: str) -> None:
    before = len(kacls.service.records())
    for method, operation in (("POST", "wrap"), ("OPTIONS", "wrap"), ("GET", "status"), ("POST", "unknown")):
        answer = kacls.dialect.handle(kacls.http(operation, b"{}", method=method, origin=origin))
        assert isinstance(answer, Answer)
        assert refused(answer) == (403, "origin")
        assert "access-control-allow-origin" not in dict(answer.headers)
    for trouble in Trouble:
        headers = dict(kacls.dialect.refuse(trouble, kacls.http("wrap", origin=origin)).headers)
        assert "access-control-allow-origin" not in headers
    assert len(kacls.service.records()) == before


def test_two_origins_are_none(kacls: KaclsRig) -> None:
    answer = kacls.dialect.handle(kacls.http("status", method="GET", headers=(("origin", ORIGIN),)))
    assert isinstance(answer, Answer)
    assert refused(answer) == (403, "origin")


def test_paths(kacls: KaclsRig) -> None:
    path = "/kacls/acme/v1"
    dialect = kacls.dialect
    assert dialect.claims(f"{path}/wrap")
    assert dialect.claims("/kacls/nobody/wrap")
    assert not dialect.claims("/v1/transit/encrypt/x")
    kacls.set_endpoint(url="https://kacls.example.com/t/acme")
    assert dialect.claims("/t/acme/wrap")
    assert not dialect.claims("/t/acme2/wrap")
    assert not dialect.claims("/t/acme/x/wrap")
    kacls.set_endpoint()
    for operation in ("", "Wrap", "wrap/", "wrap%20", "../wrap", "%77rap", "wrap;x", "takeout_unwrap"):
        assert refused(kacls.call(operation))[0] == 404, operation
    answer = dialect.handle(kacls.http("wrap", b"{}", query="x=1"))
    assert isinstance(answer, Answer)
    assert refused(answer)[0] == 404
    for method in ("GET", "PUT", "DELETE", "HEAD", "PATCH", "post"):
        answer = dialect.handle(kacls.http("wrap", b"{}", method=method))
        assert isinstance(answer, Answer)
        assert refused(answer) == (405, "method")
        assert dict(answer.headers)["allow"] == "POST, OPTIONS"


def test_troubles_have_the_dialects_shape(kacls: KaclsRig) -> None:
    assert set(ANSWER_TO_TROUBLE) == set(Trouble)
    for trouble in Trouble:
        for call in (None, kacls.http("wrap"), kacls.http("x", url="https://x/kacls/nobody")):
            assert refused(kacls.dialect.refuse(trouble, call))[0] == ANSWER_TO_TROUBLE[trouble][0]


def test_the_tables_are_whole() -> None:
    """Whatever the core raises has an answer; and no denial is taken for an outage."""
    kinds = {kind for kind in ServiceError.__subclasses__() if kind is not KeyRefused}
    assert kinds <= set(ANSWER_TO_ERROR)
    assert set(ANSWER_TO_REFUSAL) == set(Refusal)
    assert set(ANSWER_TO_DENIAL) == set(Denial)
    assert {why for why, (status, _) in ANSWER_TO_DENIAL.items() if status != 403} == {Denial.AUTHENTICATION}


BAD_BODIES = (
    b"", b"[]", b"null", b"\xff", b"{", b'{"authentication":1}', b"[" * 50_000, b'{"a":' * 10_000,
    b'{"authentication":"\\ud800","authorization":"x","key":"AAAA"}',
    b'{"authentication":"x","authorization":"y","key":"AAAA","reason":5}',
    b'{"authentication":"x","authorization":"y","key":"AAAA","reason":NaN}',
    b'{"authentication":"x","authorization":"y"}',
    b'{"authentication":null,"authorization":"y","key":"AAAA"}',
)  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES)
def test_bodies_that_are_no_request(kacls: KaclsRig, body: bytes) -> None:
    answer = kacls.dialect.handle(kacls.http("wrap", body))
    assert isinstance(answer, Answer)
    assert refused(answer) == (400, "input-refused")


@pytest.mark.parametrize(
    ("operation", "member", "value"),
    [
        ("wrap", "key", ""),
        ("wrap", "key", "AAA"),
        ("wrap", "key", "AAB="),  # another spelling of AAA=
        ("wrap", "key", "A-_="),
        ("wrap", "key", "AAAA\n"),
        ("wrap", "key", "A A A A "),
        ("wrap", "key", b64(b"k" * 129)),
        ("wrap", "reason", "x" * 1025),
        ("wrap", "reason", "ü" * 513),
        ("unwrap", "wrapped_key", "A" * 1028),
        ("privilegedwrap", "resource_name", ""),
        ("privilegedwrap", "resource_name", "x" * 513),
        ("privilegedwrap", "perimeter_id", "x" * 129),
    ],
)
def test_members_that_are_not_as_specified(kacls: KaclsRig, operation: str, member: str, value: str) -> None:
    good: dict[str, str] = {
        "authentication": kacls.authentication(ADMIN),
        "authorization": kacls.authorization("writer", ADMIN),
        "key": b64(new_key()),
        "wrapped_key": kacls.wrapped(new_key()),
        "resource_name": RESOURCE,
        "perimeter_id": "",
        "reason": "",
    }
    assert ok(kacls.call(operation, **good))
    assert refused(kacls.call(operation, **(good | {member: value}))) == (400, "input-refused")


def test_members_that_nobody_knows_are_passed_over(kacls: KaclsRig) -> None:
    answer = kacls.call(
        "wrap",
        authentication=kacls.authentication(),
        authorization=kacls.authorization("writer"),
        key="AAAA",
        future={"deep": [1, 2]},
    )
    assert ok(answer)


@given(
    operation=st.sampled_from(["wrap", "unwrap", "digest", "rewrap", "delegate", "privatekeysign", "x", ""]),
    body=st.one_of(
        st.binary(max_size=100),
        st.dictionaries(
            st.sampled_from(
                [
                    "authentication",
                    "authorization",
                    "key",
                    "wrapped_key",
                    "reason",
                    "original_kacls_url",
                    "digest",
                ]
            ),
            st.one_of(st.text(max_size=20), st.none(), st.integers(), st.just("AAAA")),
        ).map(lambda members: json.dumps(members).encode()),
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_whatever_comes_is_answered_and_refused(kacls: KaclsRig, operation: str, body: bytes) -> None:
    answer = kacls.dialect.handle(kacls.http(operation, body))
    assert isinstance(answer, Answer)
    assert refused(answer)[0] in {400, 401, 403, 404}


# Waiting for the issuers' keys.


async def test_keys_that_are_not_at_hand_are_fetched_before_anything_is_done(tmp_path: Path) -> None:
    kacls = KaclsRig(tmp_path)
    try:
        answer = await kacls.wait(
            "wrap",
            authentication=kacls.authentication(),
            authorization=kacls.authorization("writer"),
            key="AAAA",
            reason="",
        )
        assert ok(answer)
        assert sorted(kacls.pages.asked) == sorted([jwks_url(IDP), jwks_url(GOOGLE)])
        assert len(kacls.service.records()) == 1
        assert ok(kacls.wrap(b"k"))  # at once
    finally:
        await kacls.issuer_keys.aclose()
        kacls.close()


@pytest.mark.parametrize("change", ["admin", "issuer", "moved"])
async def test_who_is_believed_no_more_once_the_keys_are_fetched_is_refused(
    tmp_path: Path, change: str
) -> None:
    """The call came while its caller was let in, and waited for an issuer that took its time."""
    kacls = KaclsRig(tmp_path)
    try:
        await kacls.fetch_keys()
        wrapped = kacls.wrapped(b"k")
        kacls.clock.shift(MAX_AGE_S + MAX_STALE_S)
        kacls.service.push(kacls.key)

        async def change_settings() -> None:
            match change:
                case "admin":
                    kacls.set_endpoint(admins={})
                case "issuer":
                    kacls.set_endpoint(authentication_issuers=(issuer_of(GUEST_IDP),))
                case _:
                    kacls.set_endpoint(url=URL + "/elsewhere")

        def unwrap() -> Awaitable[Answer]:
            return kacls.wait(
                "privilegedunwrap",
                authentication=kacls.authentication(ADMIN),
                resource_name=RESOURCE,
                wrapped_key=wrapped,
                reason="",
            )

        kacls.pages.before = change_settings
        answer = await unwrap()
        assert kacls.pages.asked, "it did not wait"
        assert answer.status in {401, 403, 404}, answer.body
        assert b'"key"' not in answer.body
        kacls.set_endpoint()
        assert ok(await unwrap())
    finally:
        await kacls.issuer_keys.aclose()
        kacls.close()


async def test_an_issuer_that_cannot_be_reached_is_an_outage(tmp_path: Path) -> None:
    kacls = KaclsRig(tmp_path)
    try:
        del kacls.pages.bodies[jwks_url(GOOGLE)]
        tokens = {
            "authentication": kacls.authentication(),
            "authorization": kacls.authorization("writer"),
            "key": "AAAA",
        }
        answer = await kacls.wait("wrap", **tokens)
        assert refused(answer) == (503, "issuer-keys")
        assert dict(answer.headers)["access-control-allow-origin"] == ORIGIN
        asked = len(kacls.pages.asked)
        assert refused(await kacls.wait("wrap", **tokens)) == (503, "issuer-keys")
        assert len(kacls.pages.asked) == asked  # not asked again at once
        kacls.pages.bodies[jwks_url(GOOGLE)] = GOOGLE.key_set()
        kacls.clock.shift(MIN_INTERVAL_S)
        assert ok(await kacls.wait("wrap", **tokens))
    finally:
        await kacls.issuer_keys.aclose()
        kacls.close()


async def test_a_rotated_issuer_key_counts_at_once_and_an_old_one_ends(kacls: KaclsRig) -> None:
    new = Mint(IDP.issuer, IDP.audience, number=7, kid="key-2")
    kacls.pages.bodies[jwks_url(IDP)] = new.key_set()
    kacls.clock.shift(MIN_INTERVAL_S)

    def tokens(mint: Mint) -> dict[str, str]:
        return {
            "authentication": kacls.authentication(mint=mint),
            "authorization": kacls.authorization("writer"),
            "key": "AAAA",
        }

    assert ok(await kacls.wait("wrap", **tokens(new)))
    assert refused(await kacls.wait("wrap", **tokens(IDP))) == (401, "unknown-key")
    kacls.clock.shift(MAX_AGE_S)
    for key in (kacls.key, kacls.identity):
        kacls.service.push(key)
    assert ok(await kacls.wait("wrap", **tokens(new)))


# Delegation.


def delegate(kacls: KaclsRig, *, person: Changes | None = None, **claims: Any) -> Answer:
    return kacls.call(
        "delegate",
        authentication=kacls.authentication(person=person),
        authorization=kacls.authorization(
            **({"role": "reader", "delegated_to": "room@acme.example"} | claims)
        ),
        reason="meet",
    )


def test_a_delegate_does_one_thing_for_one_person(kacls: KaclsRig) -> None:
    person = {"department": "board", "mfa": True, "salary": 5}
    key = new_key()
    wrapped = kacls.wrapped(key, person=person, perimeter_id="board")
    token = ok(delegate(kacls, person=person))["delegated_authentication"]
    assert kacls.service.records()[-1]["delegated_to"] == "room@acme.example"
    assert kacls.service.records()[-1]["key"] == "identity"

    def unwrap(authentication: str, **claims: Any) -> Answer:
        usual: Changes = {"role": "reader", "delegated_to": "room@acme.example"}
        return kacls.call(
            "unwrap",
            authentication=authentication,
            authorization=kacls.authorization(**(usual | claims)),
            wrapped_key=wrapped,
        )

    assert unb64(ok(unwrap(token))["key"]) == key  # the perimeter's claims came along
    assert refused(unwrap(token, delegated_to="hall@acme.example")) == (403, "delegation")
    assert refused(unwrap(token, delegated_to=None)) == (403, "delegation")
    assert refused(unwrap(token, resource_name="other")) == (403, "delegation")
    assert refused(unwrap(token, email="bob@acme.example")) == (403, "not-the-same-user")
    again = kacls.call(
        "delegate",
        authentication=token,
        authorization=kacls.authorization("reader", delegated_to="x@acme.example"),
    )
    assert refused(again) == (403, "delegation")
    claims = json.loads(b64u_decode(token.split(".")[1]))
    assert "salary" not in claims
    assert claims["exp"] - claims["iat"] == 3600
    kacls.clock.shift(300)
    kacls.service.push(kacls.key)
    kacls.push_identity()
    kacls.service.withdraw(kacls.identity)  # the enterprise takes its word back
    assert refused(unwrap(token)) == (401, "unknown-key")


def test_who_may_delegate(kacls: KaclsRig) -> None:
    assert ok(delegate(kacls))
    for claims, person, expected in (
        ({"delegated_to": None}, {}, (403, "delegation")),
        ({"delegated_to": ""}, {}, (403, "delegation")),
        ({"email": "bob@acme.example"}, {}, (403, "not-the-same-user")),
        ({"kacls_url": "https://evil.example"}, {}, (403, "kacls-url")),
        ({"perimeter_id": "board"}, {}, (403, "perimeter")),
        ({"delegated_to": "x" * 400}, {}, (403, "claim")),
    ):
        assert refused(delegate(kacls, person=person, **claims)) == expected
    admin = kacls.authentication(ADMIN, person={"delegated_to": "x@y.z", "resource_name": RESOURCE})
    answer = kacls.call("privilegedwrap", authentication=admin, key="AAAA", resource_name=RESOURCE)
    assert refused(answer) == (403, "admin-list")
    kacls.set_endpoint(signing_key=None, trusted_kacls=())
    assert refused(delegate(kacls)) == (404, "key-not-found")
    kacls.service.push(kacls.service.add_key("wrong", algorithm=SigningAlgorithm.ES256))
    kacls.set_endpoint(signing_key="wrong")
    assert refused(delegate(kacls)) == (403, "usage-refused")


def test_nobody_makes_tokens_of_ours(kacls: KaclsRig) -> None:
    """`iss` is this KACLS, so the keys are in memory: another's signature, or kid, finds none."""
    forger = Mint(URL, "kacls-delegation", number=9, kid=str(kacls.service.key_id(kacls.identity)))
    claims = {"email": USER, "delegated_to": "room@acme.example", "resource_name": RESOURCE, "kacls_url": URL}
    for token, details in (
        (forger.token(claims, now_s=kacls.clock.wall_s()), "signature"),
        (forger.token(claims, now_s=kacls.clock.wall_s(), kid="other"), "unknown-key"),
    ):
        answer = kacls.call(
            "wrap",
            authentication=token,
            authorization=kacls.authorization("writer", delegated_to="room@acme.example"),
            key="AAAA",
        )
        assert refused(answer) == (401, details)
    assert kacls.pages.asked == []
    # Signed by us, and still not for us: what we say to another KACLS is no delegation here.
    caller = kacls.service.caller(DialectName.KACLS)
    now = int(kacls.clock.wall_s())
    whole = claims | {"iss": URL, "aud": "kacls-delegation", "iat": now, "exp": now + 60}
    place = kacls.dialect._at("/kacls/acme/v1/wrap")
    assert place is not None
    for change, expected in (
        ({}, (200, "")),
        ({"kacls_url": "https://other.example/kacls"}, (401, "claim")),
        ({"kacls_url": None}, (401, "claim")),
        ({"delegated_to": None}, (401, "claim")),
        ({"resource_name": None}, (401, "claim")),
        ({"aud": "kacls-migration"}, (401, "audience")),
    ):
        token, _ticket, _version = kacls.dialect._calls._identity.sign(place, caller, whole | change)
        answer = kacls.call(
            "wrap",
            authentication=token,
            authorization=kacls.authorization("writer", delegated_to="room@acme.example"),
            key="AAAA",
        )
        assert (answer.status, "") == expected if answer.status == 200 else refused(answer) == expected


def test_a_blocked_identity_is_nobodys(kacls: KaclsRig) -> None:
    token = ok(delegate(kacls))["delegated_authentication"]
    kacls.service.add_key("identity", algorithm=SigningAlgorithm.RS256, blocked=True)
    certs = kacls.dialect.handle(kacls.http("certs", method="GET", headers=()))
    assert isinstance(certs, Answer)
    assert ok(certs) == {"keys": []}
    answer = kacls.call(
        "wrap",
        authentication=token,
        authorization=kacls.authorization("writer", delegated_to="room@acme.example"),
        key="AAAA",
    )
    assert refused(answer) == (401, "unknown-key")
    assert refused(delegate(kacls)) == (403, "key-refused:blocked")


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("content-type", "text/plain"),),
        (("content-type", "application/x-www-form-urlencoded"),),
        (("content-type", "application/json"), ("content-type", "application/json")),
    ],
)
def test_what_a_page_may_send_without_asking_is_not_taken(
    kacls: KaclsRig, headers: tuple[tuple[str, str], ...]
) -> None:
    answer = kacls.dialect.handle(kacls.http("wrap", b"{}", headers=headers))
    assert isinstance(answer, Answer)
    assert refused(answer) == (415, "content-type")
    utf8 = kacls.http("wrap", b"{}", headers=(("content-type", "Application/JSON; charset=utf-8"),))
    answer = kacls.dialect.handle(utf8)
    assert isinstance(answer, Answer)
    assert refused(answer) == (400, "input-refused")
