"""Ciphertexts opened by the key they name, by one of a ring's, by one of all: and by no other."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envelope import cobblestone, derive
from envelope.cobblestone import derive_message_keys
from envelope.keys import ANONYMOUS, KeyId, KeyState, NetworkService, SigningAlgorithm
from envelope.objects import Bind, Header, Sealer
from proxy.encryption_service.core import Core
from proxy.encryption_service.dialects.native import NativeDialect
from proxy.encryption_service.dialects.native_errors import row_of
from proxy.encryption_service.errors import KeyRefused, Refusal
from proxy.encryption_service.limits import Limits, Quota
from proxy.encryption_service.model import DialectName, NamedKey, NativeSettings, Op
from tests.envelope.forgeries import two_key_record
from tests.proxy.encryption_service.dialects.test_native import AAD, FAILED, HELLO, OTHER, NativeRig
from tests.vectors import reference

A, D = KeyState.ACTIVE, KeyState.DEACTIVATED


@pytest.fixture
def native(tmp_path: Path) -> Iterator[NativeRig]:
    rig = NativeRig(tmp_path)
    yield rig
    rig.rig.close()


def encrypt(native: NativeRig, key: str = "orders", **more: Any) -> tuple[str, str]:
    """The ciphertext, and the id of the key."""
    status, document = native.call("encrypt", {"key": key, "plaintext": HELLO, **more})
    assert status == 200, document
    return document["ciphertext"], document["key_id"]


def decrypt(native: NativeRig, ciphertext: str, *, token: str = "", **more: Any) -> tuple[int, Any]:
    """The status, and the plaintext or the error's code."""
    status, document = native.call("decrypt", {"ciphertext": ciphertext, **more}, token=token)
    return status, document["plaintext"] if status == 200 else document["code"]


def tried(native: NativeRig) -> int:
    """How many keys the last call has tried, by its record."""
    return int(str(native.rig.records()[-1].get("tried", "0")))


def flipped(ciphertext: str, at: int) -> str:
    raw = bytearray(base64.b64decode(ciphertext))
    raw[at] ^= 1
    return base64.b64encode(raw).decode()


# --- by the key that is named ---


def test_a_ciphertext_names_its_key_and_opens_by_it_alone(native: NativeRig) -> None:
    ciphertext, key_id = encrypt(native, aad=AAD)
    assert Header.parse(base64.b64decode(ciphertext)) == Header(KeyId.parse(key_id), Bind.CALLER)
    status, document = native.call("decrypt", {"ciphertext": ciphertext, "aad": AAD})
    assert (status, document) == (
        200,
        {"key": "orders", "version": 1, "key_id": key_id, "candidates": 0, "plaintext": HELLO},
    )
    assert decrypt(native, ciphertext, aad=AAD, ring="orders", key_id=key_id) == (200, HELLO)
    assert decrypt(native, ciphertext) == FAILED
    assert decrypt(native, ciphertext, aad=OTHER) == FAILED
    assert decrypt(native, ciphertext, aad=AAD, key_id="00" * 15 + "01") == FAILED
    native.rig.push(native.rig.add_key("second"))
    assert decrypt(native, ciphertext, aad=AAD, ring="second") == (404, "key-version-unknown")
    native.rig.push(native.key, D, A)
    assert decrypt(native, ciphertext, aad=AAD) == (200, HELLO)
    assert encrypt(native)[1] != key_id
    assert native.rig.records()[-1]["version"] == 2


def test_every_bit_and_every_cut_counts(native: NativeRig) -> None:
    for anonymous in (False, True):
        raw = base64.b64decode(encrypt(native, aad=AAD, anonymous=anonymous)[0])
        for bit in range(8 * len(raw)):
            changed = bytearray(raw)
            changed[bit // 8] ^= 1 << bit % 8
            got = decrypt(native, base64.b64encode(changed).decode(), aad=AAD)
            assert got in {FAILED, (404, "key-version-unknown")}, bit
        for size in range(len(raw)):
            assert decrypt(native, base64.b64encode(raw[:size]).decode(), aad=AAD)[0] in {404, 422}
        assert decrypt(native, base64.b64encode(raw + b"\0").decode(), aad=AAD) == FAILED


STATES = [
    (D, (200, HELLO), (200, HELLO)),
    (KeyState.SUSPENDED, (423, "key-suspended"), FAILED),
    (KeyState.COMPROMISED, (423, "key-compromised"), FAILED),
    (KeyState.DESTROYED, (410, "key-version-gone"), FAILED),
]


@pytest.mark.parametrize(("state", "named", "by_trial"), STATES, ids=str)
def test_the_state_of_the_key_decides(
    native: NativeRig, state: KeyState, named: tuple[int, str], by_trial: tuple[int, str]
) -> None:
    ciphertext, key_id = encrypt(native)
    anonymous = encrypt(native, anonymous=True)[0]
    native.rig.push(native.key, state, A)
    assert decrypt(native, ciphertext) == named
    assert decrypt(native, anonymous, key_id=key_id) == named
    assert decrypt(native, anonymous) == by_trial
    native.rig.push(native.key, state)
    whole = (410, "key-destroyed") if state is KeyState.DESTROYED else named
    assert decrypt(native, ciphertext) == whole
    assert decrypt(native, encrypt_elsewhere(native)) == (404, "key-version-unknown")


def encrypt_elsewhere(native: NativeRig) -> str:
    """By a key that was never here."""
    owner = native.key.owner
    sealer = Sealer(os.urandom(32), owner, KeyId.random())
    return base64.b64encode(bytes(sealer.update(b"hello")) + sealer.finalize()).decode()


def test_refusals_have_statuses_of_their_own() -> None:
    """What the table of refusals says of each; a new one has to be put there."""
    statuses = {Refusal.NOT_ACTIVE: 409, Refusal.DEACTIVATED: 409, Refusal.VERSION_UNKNOWN: 404}
    statuses |= dict.fromkeys((Refusal.VERSION_GONE, Refusal.DESTROYED), 410)
    statuses |= dict.fromkeys((Refusal.SUSPENDED, Refusal.COMPROMISED, Refusal.BLOCKED), 423)
    assert {why: row_of(KeyRefused(why, "x")).status for why in Refusal} == statuses


async def test_later_is_told_from_never(native: NativeRig) -> None:
    ciphertext = encrypt(native)[0]
    anonymous = encrypt(native, anonymous=True)[0]
    second = native.rig.add_key("second")
    assert decrypt(native, encrypt_elsewhere(native)) == (503, "stale"), "second may have it"
    assert decrypt(native, anonymous) == (200, HELLO)
    native.rig.push(second)
    native.rig.withdraw(native.key)
    assert decrypt(native, ciphertext) == (403, "revoked")
    assert decrypt(native, anonymous, ring="orders") == (403, "revoked")
    assert decrypt(native, anonymous) == FAILED, "none of those that are left"
    native.rig.withdraw(second)
    assert decrypt(native, anonymous) == (403, "revoked")
    native.rig.push(native.key)
    await native.rig.clock.advance(331)
    assert decrypt(native, ciphertext) == (503, "stale")
    assert decrypt(native, anonymous) == (503, "stale")


def test_a_withdrawn_environment_says_so(native: NativeRig) -> None:
    ciphertext, anonymous = encrypt(native)[0], encrypt(native, anonymous=True)[0]
    rig = native.rig
    core = Core(
        keys=rig.keys,
        access=rig.access,
        directory=lambda: rig.directory,
        audit=rig.audit,
        clock=rig.clock,
        refuses=lambda tenant: tenant == "acme",
    )
    native.dialect = NativeDialect(
        core=core,
        access=rig.access,
        limiter=rig.limiter,
        directory=lambda: rig.directory,
        clock=rig.clock,
    )
    rig.push(rig.add_key("signer", algorithm=SigningAlgorithm.ES256))
    for path, body in (
        ("encrypt", {"key": "orders", "plaintext": HELLO}),
        ("decrypt", {"ciphertext": ciphertext}),
        ("decrypt", {"ciphertext": anonymous}),
        ("decrypt", {"ciphertext": encrypt_elsewhere(native)}),
        ("keys/orders/encrypt", {"plaintext": HELLO}),
        ("token", {"key": "signer", "subject": "ann", "audience": "shop"}),
    ):
        answer = native.answer(path, body)
        assert (answer.status, dict(answer.headers)["retry-after"]) == (503, "2"), path
        assert b'"env-healing"' in answer.body
    assert native.code("/.well-known/jwks.json", method="GET") == (503, "env-healing")
    assert native.rig.records()[-1]["error"] == "env-healing"


# --- by trying ---


def test_an_anonymous_ciphertext_names_nothing(native: NativeRig) -> None:
    ciphertext, key_id = encrypt(native, anonymous=True)
    raw = base64.b64decode(ciphertext)
    assert Header.parse(raw) == Header(ANONYMOUS)
    assert bytes.fromhex(key_id) not in raw
    second = native.rig.add_key("second")
    native.rig.push(second, D, A)
    for more, count in (({}, 3), ({"ring": "orders"}, 1), ({"key_id": key_id}, 0)):
        status, document = native.call("decrypt", {"ciphertext": ciphertext, **more})
        assert (status, document["plaintext"]) == (200, HELLO)
        assert (document["key"], document["key_id"], document["candidates"]) == ("orders", key_id, count)
        assert tried(native) == count
    record = native.rig.records()[-2]
    assert (record["key"], record["key_id"], record["tried"], record["outcome"]) == (
        "orders",
        key_id,
        "1",
        "ok",
    )
    assert decrypt(native, ciphertext, ring="second") == FAILED
    assert tried(native) == 2
    assert native.rig.records()[-1]["outcome"] == "refused"
    assert decrypt(native, ciphertext, key_id=str(native.rig.key_id(second))) == FAILED
    assert decrypt(native, ciphertext, ring="third") == (404, "key-not-found")
    assert decrypt(native, ciphertext, aad=AAD) == FAILED


class Counted:
    """How often a candidate was derived for comparing, and how often AES-GCM was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.derived = 0
        self.opened = 0
        derived = cobblestone.derive_message_keys
        take = cobblestone.ChunkOpener.finalize

        def counted(*arguments: Any) -> Any:
            self.derived += 1
            return derived(*arguments)

        def finalized(opener: Any) -> bytes:
            if opener._keys is not None:
                self.opened += 1
            return take(opener)

        monkeypatch.setattr(cobblestone, "derive_message_keys", counted)
        monkeypatch.setattr(cobblestone.ChunkOpener, "finalize", finalized)

    def since(self) -> tuple[int, int]:
        found = (self.derived, self.opened)
        self.derived = self.opened = 0
        return found


def test_fifty_candidates_are_fifty_comparisons_and_one_opening(
    native: NativeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B-16, and of B-18 that what was changed and what was never ours take the same steps."""
    states = [*[D] * 49, A]
    ciphertexts = []
    for number in (1, 25, 50):  # the oldest key, one between, the newest
        native.rig.push(native.key, *[A if at == number else D for at in range(1, 51)])
        ciphertexts.append(encrypt(native, anonymous=True)[0])
    native.rig.push(native.key, *states)
    sealer = Sealer(os.urandom(32), native.key.owner, ANONYMOUS)
    foreign = base64.b64encode(bytes(sealer.update(b"hello")) + sealer.finalize()).decode()
    counted = Counted(monkeypatch)
    for ciphertext in ciphertexts:
        assert decrypt(native, ciphertext) == (200, HELLO)
        assert counted.since() == (50, 1)
    for changed in (foreign, flipped(ciphertexts[0], 33), flipped(ciphertexts[2], 60)):
        assert decrypt(native, changed) == FAILED
        assert counted.since() == (50, 0)
        assert tried(native) == 50


def test_no_more_keys_are_tried_than_the_tenant_allows(native: NativeRig) -> None:
    """B-19."""
    native.rig.push(native.key)
    oldest = encrypt(native, anonymous=True)[0]
    native.rig.push(native.key, *[D] * 79, A)
    newest, newest_id = encrypt(native, anonymous=True)
    assert decrypt(native, newest) == (200, HELLO)
    assert tried(native) == 64
    assert decrypt(native, oldest) == (422, "too-many-keys")
    assert tried(native) == 64
    assert decrypt(native, oldest, key_id=str(native.rig.key_id(native.key))) == (200, HELLO)
    native.rig.add_dialect(DialectName.NATIVE, NativeSettings(max_try_all=3))
    assert decrypt(native, newest) == (200, HELLO)
    assert tried(native) == 3
    native.rig.add_dialect(DialectName.NATIVE, NativeSettings(max_try_all=0))
    assert decrypt(native, newest) == (422, "too-many-keys")
    assert tried(native) == 0
    assert decrypt(native, newest, key_id=newest_id) == (200, HELLO)


def test_trials_stay_with_the_tenant_and_the_credential(native: NativeRig) -> None:
    """B-19: the same material, even the same name, of another tenant opens nothing."""
    rig = native.rig
    rig.push(rig.add_key("second"))
    ciphertext, key_id = encrypt(native)
    anonymous = encrypt(native, anonymous=True)[0]
    rig.add_dialect(DialectName.NATIVE, tenant="globex")
    theirs = rig.add_key("orders", tenant="globex")
    share_material(native, native.key, theirs)
    rig.push(theirs)
    other = rig.add_bearer(DialectName.NATIVE, tenant="globex")
    assert decrypt(native, anonymous, token=other) == FAILED
    assert tried(native) == 1
    assert decrypt(native, anonymous, token=other, key_id=key_id) == FAILED
    assert decrypt(native, ciphertext, token=other) == FAILED
    narrow = rig.add_bearer(DialectName.NATIVE, keys=frozenset({"second"}))
    assert decrypt(native, anonymous, token=narrow) == FAILED
    assert tried(native) == 1
    assert decrypt(native, ciphertext, token=narrow) == (404, "key-version-unknown")
    for ring in ("orders", "nothing"):  # what is not for it is the same to it as what is not there
        assert decrypt(native, anonymous, token=narrow, ring=ring) == (403, "access-denied")
        assert decrypt(native, anonymous, token=narrow, ring=ring, key_id=key_id) == (403, "access-denied")
        assert decrypt(native, anonymous, token=narrow, ring=ring, key_id="ab" * 16) == (403, "access-denied")
    encrypts = rig.add_bearer(DialectName.NATIVE, operations=frozenset({Op.ENCRYPT}))
    assert decrypt(native, anonymous, token=encrypts) == FAILED
    assert tried(native) == 0
    assert decrypt(native, ciphertext, token=encrypts) == (403, "access-denied")


def share_material(native: NativeRig, of: NamedKey, other: NamedKey) -> None:
    known = native.rig._materials
    known[other.owner] = dict(known[of.owner])


def test_trials_are_paid_for_by_the_key(tmp_path: Path) -> None:
    native = NativeRig(tmp_path, limits=Limits(credential=Quota(requests_per_s=0.001, burst=10)))
    try:
        native.rig.push(native.key, *[D] * 63, A)
        anonymous = encrypt(native, anonymous=True)[0]
        assert decrypt(native, anonymous) == (200, HELLO)  # 1 + 1 + 8 of 10
        assert decrypt(native, anonymous)[1] == "quota"
    finally:
        native.rig.close()


def test_one_ciphertext_for_two_keys_opens_by_the_one_it_commits_to(native: NativeRig) -> None:
    """B-17: AES-GCM would take the forgery under both keys; trying by it, the order would decide."""
    native.rig.push(native.key, D, A)
    owner = native.key.owner
    header, salt = Header(ANONYMOUS).encode(), bytes(range(24))
    context = derive.lp(b"sealgate/v1 body") + header + derive.scope(owner) + derive.lp(b"")
    materials = [native.rig.secret(native.key, version) for version in (1, 2)]
    keys = [derive.object_key(material, owner, ANONYMOUS) for material in materials]
    made = [derive_message_keys(key, salt, context) for key in keys]
    record, plains = two_key_record([cobblestone_pair(key, salt, context) for key in keys])
    assert plains[0] != plains[1]
    for version, (message_keys, plain) in enumerate(zip(made, plains, strict=True), start=1):
        forged = base64.b64encode(header + salt + message_keys.commitment + record).decode()
        for states in ((D, A), (A, D)):  # whichever is tried first
            native.rig.push(native.key, *states)
            status, document = native.call("decrypt", {"ciphertext": forged})
            assert (status, document["version"]) == (200, version)
            assert base64.b64decode(document["plaintext"]) == plain
        other = str(native.rig.key_id(native.key, 3 - version))
        assert decrypt(native, forged, key_id=other) == FAILED
    neither = base64.b64encode(header + salt + bytes(32) + record).decode()
    assert decrypt(native, neither) == FAILED


def cobblestone_pair(key: bytes, salt: bytes, context: bytes) -> tuple[bytes, bytes]:
    """AES key and nonce of a message's first chunk, by the independent reader."""
    okm = reference.expand(key, b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context, 76)
    return okm[:32], okm[32:44]


# --- what else is asked ---


def test_what_is_asked_is_checked(native: NativeRig) -> None:
    ciphertext = encrypt(native)[0]
    native.rig.push(native.rig.add_key("signer", algorithm=SigningAlgorithm.ES256))
    assert native.code("encrypt", {"key": "signer", "plaintext": HELLO}) == (409, "usage-refused")
    assert decrypt(native, ciphertext, ring="signer") == (404, "key-version-unknown")
    long = base64.b64encode(bytes(65_536)).decode()
    assert native.code("encrypt", {"key": "orders", "plaintext": HELLO, "aad": long})[0] == 400
    assert decrypt(native, ciphertext, aad=long) == (400, "input-refused")
    for body in ({}, {"ciphertext": HELLO, "key_id": "ORDERS"}, {"ciphertext": HELLO, "version": 1}):
        assert native.code("decrypt", body) == (400, "malformed")
    assert decrypt(native, HELLO) == FAILED
    assert native.code("decrypt", method="GET") == (405, "method-not-allowed")
    native.rig.add_key("orders", blocked=True)
    assert native.code("encrypt", {"key": "orders", "plaintext": HELLO}) == (423, "key-blocked")
    assert decrypt(native, ciphertext) == (423, "key-blocked")


def test_a_stream_opens_what_was_made_here_and_the_other_way_round(native: NativeRig) -> None:
    """One format: what `seal` makes with a name is what `encrypt` makes with that aad."""
    key_id = native.rig.key_id(native.key)
    object_key = derive.object_key(native.rig.secret(native.key), native.key.owner, key_id)
    sealer = Sealer(object_key, NetworkService("acme", "orders"), key_id, bind=Bind.CALLER, name=b"invoice 7")
    sealed = bytes(sealer.update(b"hello")) + sealer.finalize()
    assert decrypt(native, base64.b64encode(sealed).decode(), aad=AAD) == (200, HELLO)
