"""The core on real keys: what opens, what must not, and what a change in between does to an answer."""

import dataclasses
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from envelope import derive
from envelope.keys import KeyId, KeyState, SigningAlgorithm
from envelope.xaes import Xaes256Gcm
from proxy.encryption_service.access import Caller
from proxy.encryption_service.core import (
    MAX_CONTEXT_BYTES,
    MAX_PLAINTEXT_BYTES,
    NONCE_SIZE,
    TAG_SIZE,
    Entry,
    Outcome,
    Purpose,
    Sealed,
    SignatureScheme,
    Ticket,
)
from proxy.encryption_service.errors import (
    AccessDenied,
    DoesNotVerify,
    InputRefused,
    KeyNotFound,
    KeyRefused,
    NotAuthenticated,
    NotRecorded,
    Refusal,
    Revoked,
    ServiceError,
    Stale,
    TooLarge,
    UsageRefused,
    Withdrawn,
)
from proxy.encryption_service.key_states import DEGRADED_BELOW_S, Standing
from proxy.encryption_service.model import DialectName, NamedKey, Op, ServiceDirectory
from tests.proxy.encryption_service.service_rig import PEER, TENANT, VALIDITY_S, ServiceRig

S = KeyState
PURPOSE = Purpose(DialectName.NATIVE)
PLAIN = b"the quick brown fox"
AAD = b"row 17"


class Bench:
    """One key, one caller who may do everything with it."""

    def __init__(self, rig: ServiceRig) -> None:
        self.rig = rig
        self.core = rig.core
        self.key = rig.add_key()
        rig.push(self.key)
        self.caller = rig.caller()

    def ticket(self, op: Op, key: NamedKey | None = None, caller: Caller | None = None) -> Ticket:
        return self.core.admit(caller or self.caller, key or self.key, op)

    def encrypt(self, key: NamedKey | None = None, *, purpose: Purpose = PURPOSE, aad: bytes = AAD) -> Sealed:
        return self.core.encrypt(self.ticket(Op.ENCRYPT, key), PLAIN, aad, purpose=purpose)

    def decrypt(
        self,
        sealed: Sealed,
        key: NamedKey | None = None,
        *,
        purpose: Purpose = PURPOSE,
        aad: bytes = AAD,
        caller: Caller | None = None,
    ) -> bytes:
        return self.core.decrypt(
            self.ticket(Op.DECRYPT, key, caller),
            version=sealed.version,
            nonce=sealed.nonce,
            ciphertext=sealed.ciphertext,
            tag=sealed.tag,
            aad=aad,
            purpose=purpose,
        )


@pytest.fixture
def bench(rig: ServiceRig) -> Bench:
    return Bench(rig)


def entry(**changes: object) -> Entry:
    return dataclasses.replace(
        Entry(dialect=DialectName.NATIVE, operation="encrypt", tenant=TENANT, key="orders"),
        **changes,  # type: ignore[arg-type]
    )


# What opens.


def test_what_is_encrypted_opens_again(bench: Bench) -> None:
    sealed = bench.encrypt()
    assert (len(sealed.nonce), len(sealed.ciphertext), len(sealed.tag)) == (NONCE_SIZE, len(PLAIN), TAG_SIZE)
    assert (sealed.version, sealed.key_id) == (1, bench.rig.key_id(bench.key))
    assert PLAIN not in sealed.ciphertext
    assert bench.decrypt(sealed) == PLAIN


def test_what_is_encrypted_at_once_opens_one_by_one(bench: Bench) -> None:
    messages = [(f"plain {number}".encode(), b"aad %d" % number) for number in range(100)]
    ticket = bench.ticket(Op.ENCRYPT)
    sealed = bench.core.encrypt_all(ticket, messages, purpose=PURPOSE)
    with pytest.raises(UsageRefused):
        bench.core.encrypt_all(bench.ticket(Op.DECRYPT), messages, purpose=PURPOSE)
    with pytest.raises(TooLarge):
        bench.core.encrypt_all(ticket, [(bytes(MAX_PLAINTEXT_BYTES + 1), b"")], purpose=PURPOSE)
    assert (sealed.version, sealed.key_id) == (1, bench.rig.key_id(bench.key))
    for message, (plaintext, aad) in zip(sealed.messages, messages, strict=True):
        one = Sealed(
            version=1,
            key_id=sealed.key_id,
            nonce=message[:NONCE_SIZE],
            ciphertext=message[NONCE_SIZE:-TAG_SIZE],
            tag=message[-TAG_SIZE:],
        )
        assert bench.decrypt(one, aad=aad) == plaintext
        with pytest.raises(DoesNotVerify):
            bench.decrypt(one, aad=aad + b"x")
    bench.rig.withdraw(bench.key)
    with pytest.raises(Revoked):  # the version that all were made under is on the ticket
        bench.core.confirm(ticket)


def test_the_key_is_the_derivation_of_the_format(bench: Bench) -> None:
    """Anyone with the key material and docs/format.md can open it without this program."""
    for purpose in (PURPOSE, Purpose(DialectName.TRANSIT, b"customer 4711")):
        sealed = bench.encrypt(purpose=purpose)
        dek = derive.service_key(
            bench.rig.secret(bench.key),
            bench.key.owner,
            sealed.key_id,
            purpose.dialect.value,
            purpose.context,
        )
        assert Xaes256Gcm(dek).decrypt(sealed.nonce, sealed.ciphertext + sealed.tag, AAD) == PLAIN


def test_every_version_that_may_decrypt_does(bench: Bench) -> None:
    first = bench.encrypt()
    bench.rig.push(bench.key, S.DEACTIVATED, S.ACTIVE)
    second = bench.encrypt()
    assert (first.version, second.version) == (1, 2)
    assert bench.decrypt(first) == bench.decrypt(second) == PLAIN


def test_generate_and_rewrap(bench: Bench) -> None:
    data_key, sealed = bench.core.generate(bench.ticket(Op.GENERATE), 32, AAD, purpose=PURPOSE)
    assert len(data_key) == 32
    assert bench.decrypt(sealed) == data_key
    bench.rig.push(bench.key, S.DEACTIVATED, S.ACTIVE)
    ticket = bench.ticket(Op.REWRAP)
    plain = bench.core.decrypt(
        ticket,
        version=1,
        nonce=sealed.nonce,
        ciphertext=sealed.ciphertext,
        tag=sealed.tag,
        aad=AAD,
        purpose=PURPOSE,
    )
    again = bench.core.encrypt(ticket, plain, AAD, purpose=PURPOSE)
    bench.core.finish(ticket, entry(operation="rewrap"))
    assert again.version == 2
    assert bench.decrypt(again) == data_key
    for size in (0, -1, 1025):
        with pytest.raises(InputRefused):
            bench.core.generate(bench.ticket(Op.GENERATE), size, AAD, purpose=PURPOSE)


def test_aad_may_follow_from_version_and_nonce(bench: Bench) -> None:
    sealed = bench.core.encrypt(
        bench.ticket(Op.ENCRYPT), PLAIN, lambda version, nonce: b"%d" % version + nonce, purpose=PURPOSE
    )
    assert bench.decrypt(sealed, aad=b"1" + sealed.nonce) == PLAIN


# What does not.


def test_nothing_opens_elsewhere(bench: Bench) -> None:
    """Every separation on its own: all else is as it was when it was encrypted."""
    rig = bench.rig
    sealed = bench.encrypt()
    other_key = rig.add_key("invoices")
    same_name = rig.add_key("orders", tenant="globex")
    rig.push(other_key)
    rig.push(same_name)
    stranger = rig.caller(tenant="globex")
    rig.push(bench.key, S.ACTIVE, S.DEACTIVATED)
    attempts: dict[str, Callable[[], bytes]] = {
        "key": lambda: bench.decrypt(sealed, other_key),
        "tenant": lambda: bench.decrypt(sealed, same_name, caller=stranger),
        "version": lambda: bench.decrypt(dataclasses.replace(sealed, version=2)),
        "aad": lambda: bench.decrypt(sealed, aad=AAD + b"\0"),
        "no aad": lambda: bench.decrypt(sealed, aad=b""),
        "context": lambda: bench.decrypt(sealed, purpose=Purpose(DialectName.NATIVE, b"x")),
        **{
            dialect: lambda dialect=dialect: bench.decrypt(sealed, purpose=Purpose(dialect))  # type: ignore[misc]
            for dialect in DialectName
            if dialect is not DialectName.NATIVE
        },
    }
    assert len(attempts) == 9
    for what, attempt in attempts.items():
        with pytest.raises(DoesNotVerify):
            pytest.fail(f"opened with another {what}: {attempt()!r}")
    assert bench.decrypt(sealed) == PLAIN


def test_the_same_material_separates_by_name(rig: ServiceRig) -> None:
    """Even an agent that pushed one material to two keys would not join them."""
    bench = Bench(rig)
    twin = rig.add_key("twin")
    rig._materials[twin.owner] = {1: (rig.key_id(bench.key), rig.secret(bench.key))}
    rig.push(twin)
    with pytest.raises(DoesNotVerify):
        bench.decrypt(bench.encrypt(), twin)


def test_every_bit_and_every_cut(bench: Bench) -> None:
    sealed = bench.encrypt()
    for name in ("nonce", "ciphertext", "tag"):
        right: bytes = getattr(sealed, name)

        def changed(value: bytes, name: str = name) -> Sealed:
            return dataclasses.replace(sealed, **{name: value})  # type: ignore[arg-type]

        for bit in range(8 * len(right)):
            wrong = bytearray(right)
            wrong[bit // 8] ^= 1 << bit % 8
            with pytest.raises(DoesNotVerify):
                bench.decrypt(changed(bytes(wrong)))
        for end in range(len(right)):
            with pytest.raises(DoesNotVerify):
                bench.decrypt(changed(right[:end]))
        with pytest.raises(DoesNotVerify):
            bench.decrypt(changed(right + b"\0"))
    for size in (1, TAG_SIZE):  # the same bytes, cut elsewhere
        moved = dataclasses.replace(
            sealed, ciphertext=sealed.ciphertext + sealed.tag[:size], tag=sealed.tag[size:]
        )
        with pytest.raises(DoesNotVerify):
            bench.decrypt(moved)


def test_no_two_ciphertexts_are_alike(bench: Bench) -> None:
    assert len({bench.encrypt().nonce for _ in range(1000)}) == 1000
    assert len({bench.encrypt().ciphertext for _ in range(100)}) == 100


def test_sizes_and_contexts_are_bounded(bench: Bench) -> None:
    too_long = bytes(MAX_PLAINTEXT_BYTES + 1)
    with pytest.raises(TooLarge):
        bench.core.encrypt(bench.ticket(Op.ENCRYPT), too_long, b"", purpose=PURPOSE)
    with pytest.raises(TooLarge):
        bench.core.decrypt(
            bench.ticket(Op.DECRYPT),
            version=1,
            nonce=bytes(24),
            ciphertext=too_long,
            tag=bytes(16),
            aad=b"",
            purpose=PURPOSE,
        )
    with pytest.raises(InputRefused):
        bench.encrypt(purpose=Purpose(DialectName.NATIVE, bytes(MAX_CONTEXT_BYTES + 1)))


def test_a_ticket_is_for_its_operation(bench: Bench) -> None:
    sealed = bench.encrypt()
    with pytest.raises(UsageRefused):
        bench.core.encrypt(bench.ticket(Op.DECRYPT), PLAIN, AAD, purpose=PURPOSE)
    with pytest.raises(UsageRefused):
        bench.core.decrypt(
            bench.ticket(Op.ENCRYPT),
            version=1,
            nonce=sealed.nonce,
            ciphertext=sealed.ciphertext,
            tag=sealed.tag,
            aad=AAD,
            purpose=PURPOSE,
        )
    with pytest.raises(UsageRefused):
        bench.core.sign(bench.ticket(Op.ENCRYPT), PLAIN, SignatureScheme())
    with pytest.raises(UsageRefused):
        bench.core.verify(bench.ticket(Op.DECRYPT), 1, b"", PLAIN, SignatureScheme())
    for op in (Op.SIGN, Op.VERIFY):
        with pytest.raises(UsageRefused):
            bench.ticket(op)


# States (docs/encryption-service.md, "States").


@dataclasses.dataclass(frozen=True)
class Row:
    """The states of versions 1, 2, ...; why version 1 neither encrypts nor decrypts, None if it does."""

    states: tuple[KeyState, ...]
    encrypts: Refusal | None
    decrypts: Refusal | None
    whole: KeyState


ROWS = [
    Row((S.ACTIVE,), None, None, S.ACTIVE),
    Row((S.DEACTIVATED,), Refusal.DEACTIVATED, None, S.DEACTIVATED),
    Row((S.PRE_ACTIVE,), Refusal.NOT_ACTIVE, Refusal.NOT_ACTIVE, S.PRE_ACTIVE),
    Row((S.SUSPENDED,), Refusal.SUSPENDED, Refusal.SUSPENDED, S.SUSPENDED),
    Row((S.COMPROMISED,), Refusal.COMPROMISED, Refusal.COMPROMISED, S.COMPROMISED),
    # Version 1 of a key that lives in another version.
    Row((S.DEACTIVATED, S.ACTIVE), None, None, S.ACTIVE),
    Row((S.PRE_ACTIVE, S.ACTIVE), None, None, S.ACTIVE),  # core.py rule 4
    Row((S.SUSPENDED, S.ACTIVE), None, Refusal.SUSPENDED, S.ACTIVE),
    Row((S.COMPROMISED, S.ACTIVE), None, Refusal.COMPROMISED, S.ACTIVE),
    Row((S.DESTROYED, S.ACTIVE), None, Refusal.VERSION_GONE, S.ACTIVE),
    Row((S.DESTROYED, S.DEACTIVATED), Refusal.DEACTIVATED, Refusal.VERSION_GONE, S.DEACTIVATED),
    Row((S.DEACTIVATED, S.PRE_ACTIVE), Refusal.DEACTIVATED, None, S.DEACTIVATED),
    Row((S.DEACTIVATED, S.SUSPENDED), Refusal.SUSPENDED, None, S.SUSPENDED),
    Row((S.COMPROMISED, S.DESTROYED), Refusal.COMPROMISED, Refusal.COMPROMISED, S.COMPROMISED),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "+".join(row.states))
def test_the_table_of_states(bench: Bench, row: Row) -> None:
    sealed = bench.encrypt()
    bench.rig.push(bench.key, *row.states)
    assert refusal(bench.encrypt) == row.encrypts
    assert refusal(lambda: bench.decrypt(sealed)) == row.decrypts
    assert bench.core.states.state_of(bench.key) is row.whole
    assert [version.state for version in bench.core.states.versions(bench.key)] == list(row.states)
    assert bench.core.states.standing(TENANT) is Standing.SERVING, "a key's state is not its tenant's"


def refusal(attempt: Callable[[], object]) -> Refusal | None:
    try:
        attempt()
    except KeyRefused as error:
        return error.why
    return None


def test_a_destroyed_key_is_not_there(bench: Bench) -> None:
    sealed = bench.encrypt()
    bench.rig.push(bench.key, S.DESTROYED)
    with pytest.raises(KeyNotFound):
        bench.core.states.find(TENANT, "orders")
    with pytest.raises(KeyNotFound):
        bench.encrypt()
    with pytest.raises(KeyNotFound):
        bench.decrypt(sealed)
    assert bench.core.states.state_of(bench.key) is S.DESTROYED


def test_a_named_version(bench: Bench) -> None:
    bench.rig.push(bench.key, S.DEACTIVATED, S.ACTIVE, S.PRE_ACTIVE)

    def encrypt(version: int) -> int:
        ticket = bench.ticket(Op.ENCRYPT)
        return bench.core.encrypt(ticket, PLAIN, AAD, purpose=PURPOSE, version=version).version

    assert encrypt(2) == 2
    assert refusal(lambda: encrypt(1)) is Refusal.DEACTIVATED
    assert refusal(lambda: encrypt(3)) is Refusal.NOT_ACTIVE
    for version in (0, 4, -1, 2**40):
        assert refusal(lambda version=version: encrypt(version)) is Refusal.VERSION_UNKNOWN  # type: ignore[misc]


def test_a_version_that_a_push_leaves_out_is_gone(bench: Bench) -> None:
    sealed = bench.encrypt()
    bench.rig.push(bench.key, S.ACTIVE, versions=(2,))
    assert refusal(lambda: bench.decrypt(sealed)) is Refusal.VERSION_GONE


def test_find_takes_any_name(bench: Bench) -> None:
    assert bench.core.states.find(TENANT, "orders") is bench.key
    for name in ("", "Orders", "orders/", "../orders", "x" * 10_000, "orders\0"):
        with pytest.raises(KeyNotFound):
            bench.core.states.find(TENANT, name)
    with pytest.raises(KeyNotFound):
        bench.core.states.find("globex", "orders")


# Standing.


def test_a_tenant_degrades_goes_stale_and_comes_back(bench: Bench) -> None:
    core, clock = bench.core, bench.rig.clock
    sealed = bench.encrypt()
    assert core.states.standing(TENANT) is Standing.SERVING
    clock.shift(VALIDITY_S - DEGRADED_BELOW_S)
    assert core.states.standing(TENANT) is Standing.SERVING
    clock.shift(0.001)
    assert core.states.standing(TENANT) is core.states.standing(TENANT, bench.key) is Standing.DEGRADED
    assert bench.decrypt(sealed) == PLAIN, "degraded serves"
    clock.shift(DEGRADED_BELOW_S - 0.002)
    assert bench.decrypt(bench.encrypt()) == PLAIN
    clock.shift(0.001)
    assert core.states.standing(TENANT) is core.states.standing(TENANT, bench.key) is Standing.STALE
    with pytest.raises(Stale):
        bench.encrypt()
    with pytest.raises(Stale):
        bench.decrypt(sealed)
    bench.rig.push(bench.key)
    assert core.states.standing(TENANT) is Standing.SERVING
    assert bench.decrypt(sealed) == PLAIN


def test_one_of_several_environments_does_not_speak_for_the_others(bench: Bench) -> None:
    """A load balancer repeats 503 elsewhere; 403 would be the callers' last answer."""
    sealed = bench.encrypt()
    ticket = bench.rig.core.admit(bench.caller, bench.key, Op.ENCRYPT)
    bench.rig.several.add(TENANT)
    bench.rig.withdraw(bench.key)
    for call in (
        bench.encrypt,
        lambda: bench.decrypt(sealed),
        lambda: bench.core.confirm(ticket),
        lambda: bench.core.states.holder_of(TENANT, [bench.key], KeyId.random()),
    ):
        with pytest.raises(Withdrawn) as refused:
            call()
        assert refused.value.code == "env-healing"
    bench.rig.several.clear()
    with pytest.raises(Revoked):
        bench.encrypt()


def test_revoked_is_told_from_stale(bench: Bench) -> None:
    sealed = bench.encrypt()
    bench.rig.withdraw(bench.key)
    for _ in range(2):
        assert (
            bench.core.states.standing(TENANT)
            is bench.core.states.standing(TENANT, bench.key)
            is Standing.REVOKED
        )
        with pytest.raises(Revoked):
            bench.encrypt()
        with pytest.raises(Revoked):
            bench.decrypt(sealed)
        bench.rig.clock.shift(10 * VALIDITY_S)  # time does not make a revocation an outage
    bench.rig.push(bench.key)
    assert bench.core.states.standing(TENANT) is Standing.SERVING
    assert bench.decrypt(sealed) == PLAIN


def test_nothing_pushed_yet_is_stale(rig: ServiceRig) -> None:
    key = rig.add_key()
    assert rig.core.states.standing(TENANT) is rig.core.states.standing(TENANT, key) is Standing.STALE
    with pytest.raises(Stale):
        rig.core.admit(rig.caller(), key, Op.ENCRYPT)
    with pytest.raises(Stale):
        rig.core.admit(rig.caller(), key, Op.DECRYPT)
    assert rig.core.states.find(TENANT, "orders") is key
    assert rig.core.states.state_of(key) is None
    assert rig.core.states.standing("nobody") is Standing.SERVING


def test_one_key_leaves_the_others_alone(bench: Bench) -> None:
    rig, core = bench.rig, bench.core
    others = [rig.add_key(name) for name in ("withdrawn", "blocked", "suspended", "new")]
    withdrawn, blocked, suspended, _new = others
    for key in others[:3]:
        rig.push(key)
    rig.withdraw(withdrawn)
    rig.serve(dataclasses.replace(blocked, blocked=True))
    rig.push(suspended, S.SUSPENDED)
    assert core.states.standing(TENANT) is Standing.SERVING
    assert core.states.standing(TENANT, withdrawn) is Standing.REVOKED
    assert bench.decrypt(bench.encrypt()) == PLAIN
    # One that was served and is not refreshed with the others shows.
    rig.push(suspended, S.SUSPENDED, validity_s=10)
    rig.clock.shift(11)
    assert core.states.standing(TENANT) is Standing.DEGRADED
    for key in (bench.key, blocked, suspended, others[3]):
        rig.withdraw(key)
    assert core.states.standing(TENANT) is Standing.REVOKED


def test_lost_time_counts(bench: Bench) -> None:
    """A machine that was paused: the boot clock stood still, the wall clock has jumped."""
    bench.rig.clock.set_wall(bench.rig.clock.wall_s() + VALIDITY_S)
    bench.rig.keys.take_off_lost_time()
    assert bench.core.states.standing(TENANT) is Standing.STALE


# Leave, and the answer.


def blocked(bench: Bench) -> None:
    bench.rig.serve(dataclasses.replace(bench.key, blocked=True))


def operations_taken(bench: Bench) -> None:
    bench.rig.serve(dataclasses.replace(bench.key, operations=frozenset({Op.GENERATE})))


def key_removed(bench: Bench) -> None:
    now = bench.rig.directory
    bench.rig.directory = ServiceDirectory(keys={}, dialects=now.dialects, credentials=now.credentials)


def credential_revoked(bench: Bench) -> None:
    bench.rig.revoke(bench.caller.credential_id or "")


def credential_ended(bench: Bench) -> None:
    entry_ = bench.rig.directory.credentials[bench.caller.credential_id or ""]
    bench.rig.serve(dataclasses.replace(entry_, not_after_s=bench.rig.clock.wall_s()))


def credential_narrowed(bench: Bench) -> None:
    entry_ = bench.rig.directory.credentials[bench.caller.credential_id or ""]
    bench.rig.serve(dataclasses.replace(entry_, keys=frozenset({"invoices"})))


def credential_of_fewer_operations(bench: Bench) -> None:
    entry_ = bench.rig.directory.credentials[bench.caller.credential_id or ""]
    bench.rig.serve(dataclasses.replace(entry_, operations=frozenset({Op.GENERATE})))


def dialect_off(bench: Bench) -> None:
    now = bench.rig.directory.dialects[TENANT, DialectName.NATIVE]
    bench.rig.serve(dataclasses.replace(now, enabled=False))


def withdrawn(bench: Bench) -> None:
    bench.rig.withdraw(bench.key)


def expired(bench: Bench) -> None:
    bench.rig.clock.shift(VALIDITY_S)


def suspended(bench: Bench) -> None:
    bench.rig.push(bench.key, S.SUSPENDED)


def compromised(bench: Bench) -> None:
    bench.rig.push(bench.key, S.COMPROMISED)


def destroyed(bench: Bench) -> None:
    bench.rig.push(bench.key, S.DESTROYED)


CHANGES: list[tuple[Callable[[Bench], None], type[ServiceError]]] = [
    (blocked, KeyRefused),
    (operations_taken, UsageRefused),
    (key_removed, KeyNotFound),
    (credential_revoked, NotAuthenticated),
    (credential_ended, NotAuthenticated),
    (credential_narrowed, AccessDenied),
    (credential_of_fewer_operations, AccessDenied),
    (dialect_off, NotAuthenticated),
    (withdrawn, Revoked),
    (expired, Stale),
    (suspended, KeyRefused),
    (compromised, KeyRefused),
    (destroyed, ServiceError),
]


@pytest.mark.parametrize("op", [Op.ENCRYPT, Op.DECRYPT])
@pytest.mark.parametrize(("change", "error"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_changes_before_the_answer_leaves_is_not_answered(
    bench: Bench, change: Callable[[Bench], None], error: type[ServiceError], op: Op
) -> None:
    sealed = bench.encrypt()
    ticket = bench.ticket(op)
    if op is Op.ENCRYPT:
        bench.core.encrypt(ticket, PLAIN, AAD, purpose=PURPOSE)
    else:
        bench.core.decrypt(
            ticket,
            version=1,
            nonce=sealed.nonce,
            ciphertext=sealed.ciphertext,
            tag=sealed.tag,
            aad=AAD,
            purpose=PURPOSE,
        )
    bench.core.confirm(ticket)
    change(bench)
    with pytest.raises(error):
        bench.core.finish(ticket, entry())
    (record,) = bench.rig.records()
    assert record["outcome"] == "refused"
    assert record["error"]
    with pytest.raises(error):
        bench.ticket(op, bench.rig.directory.keys.get(bench.key.owner, bench.key))


def test_a_credential_that_ends_by_time_ends_what_is_under_way(bench: Bench) -> None:
    token = bench.rig.add_bearer(not_after_s=bench.rig.clock.wall_s() + 1)
    caller = bench.rig.access.bearer(token, dialect=DialectName.NATIVE, peer=PEER)
    ticket = bench.core.admit(caller, bench.key, Op.ENCRYPT)
    bench.core.confirm(ticket)
    bench.rig.clock.shift(1)
    with pytest.raises(NotAuthenticated):
        bench.core.confirm(ticket)


def test_deactivation_between_stops_what_encrypts_only(bench: Bench) -> None:
    sealed = bench.encrypt()
    tickets = {op: bench.ticket(op) for op in (Op.ENCRYPT, Op.DECRYPT)}
    bench.core.encrypt(tickets[Op.ENCRYPT], PLAIN, AAD, purpose=PURPOSE)
    bench.core.decrypt(
        tickets[Op.DECRYPT],
        version=1,
        nonce=sealed.nonce,
        ciphertext=sealed.ciphertext,
        tag=sealed.tag,
        aad=AAD,
        purpose=PURPOSE,
    )
    rewrap = bench.ticket(Op.REWRAP)
    bench.core.encrypt(rewrap, PLAIN, AAD, purpose=PURPOSE)
    bench.rig.push(bench.key, S.DEACTIVATED)
    for ticket in (tickets[Op.ENCRYPT], rewrap):
        assert refusal(lambda ticket=ticket: bench.core.confirm(ticket)) is Refusal.DEACTIVATED  # type: ignore[misc]
    bench.core.confirm(tickets[Op.DECRYPT])


def test_a_batch_is_confirmed_in_every_version_it_used(bench: Bench) -> None:
    bench.rig.push(bench.key, S.DEACTIVATED, S.ACTIVE)
    bench.rig.push(bench.key, S.ACTIVE)
    old = bench.encrypt()
    bench.rig.push(bench.key, S.DEACTIVATED, S.ACTIVE)
    new = bench.encrypt()
    ticket = bench.ticket(Op.DECRYPT)
    for sealed in (old, new, old, new):
        bench.core.decrypt(
            ticket,
            version=sealed.version,
            nonce=sealed.nonce,
            ciphertext=sealed.ciphertext,
            tag=sealed.tag,
            aad=AAD,
            purpose=PURPOSE,
        )
    bench.core.confirm(ticket)
    bench.rig.push(bench.key, S.COMPROMISED, S.ACTIVE)
    assert refusal(lambda: bench.core.confirm(ticket)) is Refusal.COMPROMISED


def test_another_tenants_caller_finds_nothing(bench: Bench) -> None:
    stranger = bench.rig.caller(tenant="globex")
    for op in Op:
        with pytest.raises(KeyNotFound):
            bench.core.admit(stranger, bench.key, op)


def test_a_key_that_is_not_the_directorys_is_refused(bench: Bench) -> None:
    """A picture that has been replaced, or one a dialect made up."""
    forged = dataclasses.replace(bench.key, operations=frozenset(Op))
    with pytest.raises(KeyNotFound):
        bench.core.admit(bench.caller, forged, Op.ENCRYPT)


def test_a_key_pushed_with_another_algorithm_is_refused(rig: ServiceRig) -> None:
    key = rig.add_key("signer", algorithm=SigningAlgorithm.ES256)
    rig.push(key)
    caller = rig.caller()
    other = dataclasses.replace(key, algorithm=SigningAlgorithm.EDDSA)
    rig.serve(other)
    with pytest.raises(UsageRefused):
        rig.core.sign(rig.core.admit(caller, other, Op.SIGN), b"m", SignatureScheme())


# The record.


def test_the_record_says_who_did_what_with_which_key(bench: Bench) -> None:
    ticket = bench.ticket(Op.ENCRYPT)
    sealed = bench.core.encrypt(ticket, PLAIN, AAD, purpose=PURPOSE)
    bench.core.finish(
        ticket,
        entry(
            version=sealed.version,
            key_id=sealed.key_id,
            caller=bench.caller.name,
            credential_id=bench.caller.credential_id,
            request_id="req-1",
            latency_us=12,
            detail={"operation_of_kms": "Encrypt"},
        ),
    )
    (record,) = bench.rig.records()
    for name in ("seq", "time", "prev", "hash"):
        record.pop(name)
    assert record == {
        "action": "service-call",
        "outcome": "ok",
        "dialect": "native",
        "operation": "encrypt",
        "tenant": TENANT,
        "key": "orders",
        "version": 1,
        "key_id": str(sealed.key_id),
        "caller": "tests",
        "credential": bench.caller.credential_id,
        "request_id": "req-1",
        "latency_us": 12,
        "operation_of_kms": "Encrypt",
    }


def test_nothing_secret_is_in_the_log(bench: Bench) -> None:
    token = bench.rig.add_bearer()
    caller = bench.rig.access.bearer(token, dialect=DialectName.NATIVE, peer=PEER)
    ticket = bench.core.admit(caller, bench.key, Op.ENCRYPT)
    sealed = bench.core.encrypt(ticket, PLAIN, AAD, purpose=Purpose(DialectName.NATIVE, b"secret context"))
    bench.core.finish(ticket, entry(caller=caller.name, credential_id=caller.credential_id))
    text = bench.rig.audit_file.read_bytes() + repr((caller, ticket, sealed, bench.key)).encode()
    for secret in (token.encode(), token.split(".")[2].encode(), PLAIN, b"secret context"):
        assert secret not in text
    assert bench.rig.secret(bench.key).hex().encode() not in text


@contextmanager
def full_disk(file: Path) -> Iterator[None]:
    """No file of this process may grow beyond the log's size: write(2) fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_without_the_record_there_is_no_answer(bench: Bench) -> None:
    bench.core.record(entry())
    ticket = bench.ticket(Op.ENCRYPT)
    bench.core.encrypt(ticket, PLAIN, AAD, purpose=PURPOSE)
    with full_disk(bench.rig.audit_file):
        with pytest.raises(NotRecorded):
            bench.core.finish(ticket, entry())
        with pytest.raises(NotRecorded):
            bench.core.record(entry(outcome=Outcome.REFUSED, error="access-denied"))
    bench.core.finish(ticket, entry())  # the disk has room again
    assert [record["outcome"] for record in bench.rig.records()] == ["ok", "ok"]


def test_a_log_that_someone_else_writes_refuses_all(bench: Bench) -> None:
    with bench.rig.audit_file.open("ab") as log:
        log.write(b"forged\n")
    with pytest.raises(NotRecorded):
        bench.core.finish(bench.ticket(Op.DECRYPT), entry())


# Signatures.


def test_sign_and_verify_by_version(rig: ServiceRig) -> None:
    key = rig.add_key("signer", algorithm=SigningAlgorithm.ES256)
    rig.push(key)
    caller, scheme = rig.caller(), SignatureScheme()
    made = rig.core.sign(rig.core.admit(caller, key, Op.SIGN), b"message", scheme)
    assert (made.version, made.key_id) == (1, rig.key_id(key))
    rig.push(key, S.DEACTIVATED, S.ACTIVE)
    verify = rig.core.admit(caller, key, Op.VERIFY)
    rig.core.verify(verify, 1, made.signature, b"message", scheme)
    rig.core.confirm(verify)
    with pytest.raises(DoesNotVerify):
        rig.core.verify(verify, 2, made.signature, b"message", scheme)
    with pytest.raises(DoesNotVerify):
        rig.core.verify(verify, 1, made.signature, b"massage", scheme)
    assert rig.core.sign(rig.core.admit(caller, key, Op.SIGN), b"m", scheme).version == 2
    public = [version.public_key for version in rig.core.states.versions(key)]
    assert len({repr(found) for found in public if found}) == 2
    for op in (Op.ENCRYPT, Op.DECRYPT, Op.GENERATE, Op.REWRAP):
        with pytest.raises(UsageRefused):
            rig.core.admit(caller, key, op)
    rig.withdraw(key)
    with pytest.raises(Revoked):
        rig.core.admit(caller, key, Op.SIGN)
    with pytest.raises(Revoked):
        rig.core.confirm(verify)


def test_a_wiped_key_never_encrypts(bench: Bench) -> None:
    """Zero is what wiping leaves: the object that a call holds refuses by itself."""
    held = bench.rig.keys.sealing_key(bench.key.owner)
    cipher = held.service_cipher("native")
    assert cipher is held.service_cipher("native"), "derived once"
    bench.rig.withdraw(bench.key)
    assert not any(held._secret)
    assert not held._ciphers
    with pytest.raises(Exception, match="withdrawn"):
        held.service_cipher("native")


def test_the_self_test_uses_no_tenants_key(rig: ServiceRig) -> None:
    assert rig.core.self_test()
