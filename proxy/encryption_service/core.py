"""Encrypt, decrypt, sign, verify under named keys: no I/O but the audit record, no await, memory only.

The order of every call, in every dialect:

    caller = access.bearer(...)                     who (or sigv4, or tokens)
    limiter.admit(caller.tenant, ...)               how much
    key    = core.find(caller.tenant, name)         KeyNotFound
    ticket = core.admit(caller, key, Op.ENCRYPT)    may this caller, this key: AccessDenied, KeyRefused, ...
    sealed = core.encrypt(ticket, ...)              what was asked, for a batch as often as needed
    core.finish(ticket, Entry(...))                 asked again, then recorded; only then the answer leaves

1. Nothing is done without a ticket, and a ticket remembers each key version that was used under it.
   `confirm` asks for all of it again: credential, block, state, deadline. What ended meanwhile is not
   answered.
2. Every call leaves an audit record before its answer leaves, refused ones too (`record`). Without the
   record there is no answer: NotRecorded.
3. A DEK belongs to one tenant, key, version, dialect and context (docs/format.md 6.1): what one dialect has
   encrypted opens in no other. Signatures know no dialects: a signing key is one key.
4. A version's state decides (encryption-service-apis.md 6): active does all, deactivated decrypts and
   verifies. Pre-active does nothing while no version is active; beside an active one it decrypts and
   verifies, because in a rotation another proxy may be ahead of us by one push (docs/format.md 6.2).
5. Keys that were withdrawn are the tenant's last word (Revoked), but for one of several environments: there
   another one is to be asked (Withdrawn).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NoReturn

from envelope import derive
from envelope.errors import IntegrityError, KeyUnavailableError, Unavailable
from envelope.keys import KEY_MATERIAL_SIZE, KeyId, KeyState, KeyUse, NetworkService
from envelope.xaes import NONCE_SIZE, TAG_SIZE, Xaes256Gcm
from proxy.encryption_service import signatures
from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.errors import (
    DoesNotVerify,
    InputRefused,
    KeyNotFound,
    KeyRefused,
    NotRecorded,
    Refusal,
    Revoked,
    ServiceError,
    Stale,
    TooLarge,
    UsageRefused,
    Withdrawn,
)
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import (
    OPERATIONS_OF,
    DialectName,
    NamedKey,
    Op,
    ServiceDirectory,
)
from proxy.encryption_service.recording import ACTION, Entry, Outcome, fields_of, refused
from proxy.encryption_service.signatures import HashName, Marshaling, PublicKey, RsaPadding, SignatureScheme
from proxy.keys.cache import DataKey, KeyCache
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock

__all__ = [
    "NONCE_SIZE",
    "TAG_SIZE",
    "Core",
    "Entry",
    "HashName",
    "KeyVersion",
    "Marshaling",
    "Outcome",
    "PublicKey",
    "Purpose",
    "RsaPadding",
    "Sealed",
    "SealedAll",
    "Signature",
    "SignatureScheme",
    "Standing",
    "Ticket",
]

MAX_PLAINTEXT_BYTES: Final = 32 << 20
"""Of one item; larger bodies are for the native API's streams."""
MAX_CONTEXT_BYTES: Final = 4096
DEGRADED_BELOW_S: Final = 20.0
"""Keys are good for 330 s and refreshed within 300 s: with less than this left the agent is late."""

_NEEDS_ACTIVE: Final = frozenset({Op.ENCRYPT, Op.GENERATE, Op.REWRAP, Op.SIGN})
_ENCRYPTS: Final = frozenset({Op.ENCRYPT, Op.GENERATE, Op.REWRAP})
_DECRYPTS: Final = frozenset({Op.DECRYPT, Op.REWRAP})
# A version that cannot be used because of its own state.
_REFUSALS: Final[Mapping[Unavailable, Refusal]] = {
    Unavailable.UNKNOWN: Refusal.VERSION_UNKNOWN,
    Unavailable.WITHDRAWN: Refusal.VERSION_GONE,  # one of several: the service itself is not withdrawn
    Unavailable.NOT_ACTIVE: Refusal.NOT_ACTIVE,
    Unavailable.SUSPENDED: Refusal.SUSPENDED,
    Unavailable.COMPROMISED: Refusal.COMPROMISED,
    Unavailable.DESTROYED: Refusal.VERSION_GONE,
}
_STATES: Final[Mapping[Unavailable | None, KeyState]] = {
    Unavailable.SUSPENDED: KeyState.SUSPENDED,
    Unavailable.COMPROMISED: KeyState.COMPROMISED,
    Unavailable.DESTROYED: KeyState.DESTROYED,
    Unavailable.WITHDRAWN: KeyState.DESTROYED,
}
_KEY_REFUSALS: Final[Mapping[KeyState, Refusal]] = {
    KeyState.PRE_ACTIVE: Refusal.NOT_ACTIVE,
    KeyState.DEACTIVATED: Refusal.DEACTIVATED,
    KeyState.SUSPENDED: Refusal.SUSPENDED,
    KeyState.COMPROMISED: Refusal.COMPROMISED,
    KeyState.DESTROYED: Refusal.DESTROYED,
}
_TEST_OWNER: Final = NetworkService("sealgate", "self-test")


type Aad = bytes | Callable[[int, bytes], bytes]
"""What is authenticated besides the plaintext, or how it follows from version and nonce where a dialect binds
what it stores of them."""


class Standing(StrEnum):
    """How a tenant, or one key, stands: for health, and for what cannot be served."""

    SERVING = "serving"
    DEGRADED = "degraded"  # the agent is late, the keys are still valid
    STALE = "stale"  # validity over, or nothing pushed since the start: retry
    REVOKED = "revoked"  # withdrawn by the tenant: final


@dataclass(frozen=True, slots=True)
class Purpose:
    """What separates ciphertexts: the dialect, and within it an optional context of the caller's."""

    dialect: DialectName
    context: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """XAES-256-GCM: 24 bytes nonce, ciphertext of the plaintext's length, 16 bytes tag."""

    version: int
    key_id: KeyId
    nonce: bytes
    ciphertext: bytes
    tag: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedAll:
    """Several messages, each nonce ‖ ciphertext ‖ tag of `Sealed`."""

    version: int
    key_id: KeyId
    messages: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    version: int
    key_id: KeyId
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyVersion:
    """One version of a named key that this process holds or has a tombstone of."""

    version: int
    key_id: KeyId
    state: KeyState
    seen_at_s: int
    """Unix time at which this process first received it."""
    public_key: PublicKey | None = None
    """Of a signing key whose material is here."""


class Ticket:
    """Leave for one caller to do one operation with one key; made by `Core.admit` alone."""

    __slots__ = ("_directory", "_used", "caller", "key", "op")

    def __init__(self, caller: Caller, key: NamedKey, op: Op, directory: ServiceDirectory) -> None:
        self.caller: Final = caller
        self.key: Final = key
        self.op: Final = op
        self._directory: Final = directory
        self._used: list[tuple[DataKey, bool]] = []  # and whether it encrypted or signed


class Core:
    """The one core behind all dialects. One event loop, no threads."""

    def __init__(
        self,
        *,
        keys: KeyCache,
        access: Access,
        directory: Callable[[], ServiceDirectory],
        audit: AuditLog,
        clock: Clock,
        limiter: Limiter | None = None,
        counted: Callable[[str, str, str], None] | None = None,
        degraded_below_s: float = DEGRADED_BELOW_S,
        refuses: Callable[[str], bool] | None = None,
        is_one_of_several: Callable[[str], bool] | None = None,
    ) -> None:
        """*limiter*: is told how much of the process's time each call took.

        *refuses*: tenants that nothing is done for at this moment. *is_one_of_several*: tenants that have
        other environments (rule 5).

        *counted*: is told of each recorded call its dialect, operation, and error or `ok`: for metrics.
        """
        self._keys = keys
        self._access = access
        self._directory = directory
        self._audit = audit
        self._clock = clock
        self._limiter = limiter
        self._counted = counted
        self._degraded_below_s = degraded_below_s
        self._refuses = refuses
        self._is_one_of_several = is_one_of_several

    # Looking.

    def standing(self, tenant: str, key: NamedKey | None = None) -> Standing:
        """Of one key, or of the tenant, whom one key's withdrawal or block does not make worse.

        A tenant is revoked when all its keys are, stale when none is served, degraded when one that was
        served is late or stale. A tenant without keys serves.
        """
        if key is not None:
            return self._standing_of(key.owner)[0]
        found = [self._standing_of(key.owner) for key in self._directory().keys_of(tenant)]
        standings = {standing for standing, _heard in found}
        if not found or standings == {Standing.SERVING}:
            return Standing.SERVING
        if standings == {Standing.REVOKED}:
            return Standing.REVOKED
        if not standings & {Standing.SERVING, Standing.DEGRADED}:
            return Standing.STALE
        if Standing.DEGRADED in standings or (Standing.STALE, True) in found:
            return Standing.DEGRADED
        return Standing.SERVING

    def find(self, tenant: str, name: str) -> NamedKey:
        """The named key, blocked or not. KeyNotFound; also if every version of it was destroyed."""
        key = self._directory().key(tenant, name)
        if key is None or self.state_of(key) is KeyState.DESTROYED:
            raise KeyNotFound("there is no such key")
        return key

    def state_of(self, key: NamedKey) -> KeyState | None:
        """The state of the key as a whole: that of its active version, else of its newest that lives.

        DESTROYED if no version lives. None if none was ever pushed here, what was has run out, or all of it
        was withdrawn: that says something of the tenant's will, and nothing of the key.
        """
        try:
            return self._active(key).state
        except KeyUnavailableError:
            pass
        versions = [] if self._keys.word(key.owner).withdrawn else self._versions_of(key)
        living = [state for _version, state in versions if state is not KeyState.DESTROYED]
        if not living:
            return KeyState.DESTROYED if versions else None
        used = [state for state in living if state is not KeyState.PRE_ACTIVE]
        return used[-1] if used else living[-1]

    def versions(self, key: NamedKey) -> list[KeyVersion]:
        """What this process knows of the key's versions, ascending; tombstones included, expired ones not."""
        found = []
        for holding in self._keys.versions(key.owner, key.use):
            state = holding.key.state if holding.key else _STATES.get(holding.reason)
            if state is None:
                continue
            public = None
            if holding.key is not None and key.use is KeyUse.SIGN:
                public = holding.key.signing_key.public_key()
            found.append(
                KeyVersion(
                    version=holding.version,
                    key_id=holding.key_id,
                    state=state,
                    seen_at_s=holding.seen_at_s,
                    public_key=public,
                )
            )
        return found

    # Leave.

    def admit(self, caller: Caller, key: NamedKey, op: Op) -> Ticket:
        """NotAuthenticated, AccessDenied, UsageRefused, KeyRefused, Revoked, Stale, KeyNotFound."""
        directory = self._directory()
        self._gate(directory, caller, key, op)
        return Ticket(caller, key, op, directory)

    def confirm(self, ticket: Ticket) -> None:
        """Whether all of it still holds (rule 1). Errors as `admit`."""
        directory = self._directory()
        if directory is ticket._directory:  # noqa: SLF001 - a ticket is ours
            self._access.check_live(ticket.caller)
        else:
            key = directory.keys.get(ticket.key.owner)
            if key is None:
                raise KeyNotFound("there is no such key")
            self._gate(directory, ticket.caller, key, ticket.op)
        for used, has_sealed in ticket._used:  # noqa: SLF001
            try:
                used.check()
            except KeyUnavailableError as error:
                self._refuse(ticket.key, error.reason)
            if not (used.state is KeyState.ACTIVE if has_sealed else self._may_open(used, ticket.key)):
                self._refuse_state(used.state)
        if not ticket._used and self._keys.word(ticket.key.owner).withdrawn:  # noqa: SLF001
            self._refuse_withdrawn(ticket.key.owner.tenant)

    def finish(self, ticket: Ticket, entry: Entry) -> None:
        """`confirm`, then `record`; what `confirm` raises is recorded as the outcome, and raised."""
        try:
            self.confirm(ticket)
        except ServiceError as error:
            self.record(refused(entry, error))
            raise
        self.record(entry)

    def record(self, entry: Entry) -> None:
        """NotRecorded if the audit log cannot take it: then nothing else may be answered."""
        if self._limiter is not None and entry.tenant:
            self._limiter.charge(entry.tenant, entry.latency_us * 1e-6)
        try:
            self._audit.append(ACTION, outcome=entry.outcome.value, durable=False, **fields_of(entry))
        except AuditUnavailableError as error:
            raise NotRecorded(str(error)) from error
        if self._counted is not None:
            self._counted(entry.dialect.value, entry.operation, entry.error or entry.outcome.value)

    # Work.

    def encrypt(
        self, ticket: Ticket, plaintext: bytes, aad: Aad, *, purpose: Purpose, version: int | None = None
    ) -> Sealed:
        """Under the active version; *version* must be that one if it is given.

        KeyRefused (NOT_ACTIVE, DEACTIVATED, VERSION_GONE, ...), Revoked, Stale, UsageRefused, TooLarge.
        """
        if ticket.op not in _ENCRYPTS:
            raise UsageRefused(f"this is not leave to encrypt: {ticket.op}")
        if len(plaintext) > MAX_PLAINTEXT_BYTES:
            raise TooLarge(f"a plaintext has at most {MAX_PLAINTEXT_BYTES} bytes")
        key = self._active_for(ticket, version)
        cipher = self._cipher(key, purpose)
        nonce = os.urandom(NONCE_SIZE)
        sealed = cipher.encrypt(nonce, plaintext, aad if isinstance(aad, bytes) else aad(key.version, nonce))
        return Sealed(
            version=key.version,
            key_id=key.key_id,
            nonce=nonce,
            ciphertext=sealed[:-TAG_SIZE],
            tag=sealed[-TAG_SIZE:],
        )

    def encrypt_all(
        self,
        ticket: Ticket,
        messages: Sequence[tuple[bytes, bytes]],
        *,
        purpose: Purpose,
        version: int | None = None,
    ) -> SealedAll:
        """As `encrypt` for each (plaintext, aad), all under one version and purpose."""
        if ticket.op not in _ENCRYPTS:
            raise UsageRefused(f"this is not leave to encrypt: {ticket.op}")
        if any(len(plaintext) > MAX_PLAINTEXT_BYTES for plaintext, _ in messages):
            raise TooLarge(f"a plaintext has at most {MAX_PLAINTEXT_BYTES} bytes")
        key = self._active_for(ticket, version)
        return SealedAll(
            version=key.version,
            key_id=key.key_id,
            messages=tuple(self._cipher(key, purpose).seal_all(messages)),
        )

    def decrypt(
        self,
        ticket: Ticket,
        *,
        version: int,
        nonce: bytes,
        ciphertext: bytes,
        tag: bytes,
        aad: bytes,
        purpose: Purpose,
    ) -> bytes:
        """The plaintext. DoesNotVerify; KeyRefused, Revoked, Stale, UsageRefused, TooLarge."""
        if ticket.op not in _DECRYPTS:
            raise UsageRefused(f"this is not leave to decrypt: {ticket.op}")
        if len(ciphertext) > MAX_PLAINTEXT_BYTES:
            raise TooLarge(f"a ciphertext has at most {MAX_PLAINTEXT_BYTES} bytes")
        key = self._version_for(ticket, version)
        if len(tag) != TAG_SIZE:
            raise DoesNotVerify
        try:
            return self._cipher(key, purpose).decrypt(nonce, ciphertext + tag, aad)
        except IntegrityError:
            raise DoesNotVerify from None

    def generate(
        self, ticket: Ticket, size_bytes: int, aad: bytes, *, purpose: Purpose
    ) -> tuple[bytes, Sealed]:
        """A data key of so many random bytes, and the same encrypted. InputRefused; else as `encrypt`."""
        if not 0 < size_bytes <= KEY_MATERIAL_SIZE * 32:
            raise InputRefused("a data key has 1 to 1024 bytes")
        data_key = os.urandom(size_bytes)
        return data_key, self.encrypt(ticket, data_key, aad, purpose=purpose)

    def object_key(self, ticket: Ticket, key_id: KeyId | None = None) -> DataKey:
        """Whose K_obj seals an object: the active version; or opens one: the version *key_id*.

        For bodies that stream; who holds it asks `DataKey.check` at every piece. As `encrypt`, `decrypt`.
        """
        if key_id is None:
            if ticket.op is not Op.ENCRYPT:
                raise UsageRefused(f"this is not leave to encrypt: {ticket.op}")
            return self._active_for(ticket, None)
        if ticket.op is not Op.DECRYPT:
            raise UsageRefused(f"this is not leave to decrypt: {ticket.op}")
        key = self._of_key_id(ticket.key, key_id)
        if not self._may_open(key, ticket.key):
            self._refuse_state(key.state)
        self._note(ticket, key, has_sealed=False)
        return key

    def holder_of(self, tenant: str, keys: Sequence[NamedKey], key_id: KeyId) -> NamedKey:
        """The one of *keys*, which are *tenant*'s, that *key_id* is or was a version of.

        KeyRefused (VERSION_UNKNOWN) if it is none's. Withdrawn, Revoked, Stale if that cannot be said now,
        because one that is not here at the moment may have it.
        """
        if self._refuses is not None and self._refuses(tenant):
            raise Withdrawn("this environment is withdrawn, or was not told yet that it may serve")
        for key in keys:
            if self._keys.knows(key.owner, key_id):
                return key
        words = [self._keys.word(key.owner) for key in keys]
        if words and all(word.withdrawn for word in words):
            self._refuse_withdrawn(tenant)
        if any(not word.withdrawn and word.valid_for_s <= 0 for word in words):
            raise Stale("no valid key is here at the moment")
        raise KeyRefused(Refusal.VERSION_UNKNOWN, "no key of this id is known here")

    def candidates(self, ticket: Ticket) -> list[DataKey]:
        """Every version that may open an object which names none, in the order to be tried.

        The caller compares commitments, says `opened_by`, and records how many it has tried.
        """
        if ticket.op is not Op.DECRYPT:
            raise UsageRefused(f"this is not leave to decrypt: {ticket.op}")
        found = self._keys.candidates(ticket.key.owner)
        return [key for key in found if self._may_open(key, ticket.key)]

    def opened_by(self, ticket: Ticket, key: DataKey) -> None:
        """One of the `candidates` it was. Whatever ends it now is not answered (rule 1)."""
        if key.owner != ticket.key.owner:
            raise KeyNotFound("there is no such key")
        self._note(ticket, key, has_sealed=False)

    def sign(
        self,
        ticket: Ticket,
        message: bytes | Callable[[KeyId], bytes],
        scheme: SignatureScheme,
        *,
        version: int | None = None,
    ) -> Signature:
        """Under the active version. *message* is the digest if the scheme says `prehashed`; or how it follows
        from the key's id, where what is signed names its key.

        InputRefused if the scheme does not fit the key's algorithm; else as `encrypt`.
        """
        if ticket.op is not Op.SIGN:
            raise UsageRefused(f"this is not leave to sign: {ticket.op}")
        key = self._active_for(ticket, version)
        if not isinstance(message, bytes):
            message = message(key.key_id)
        signature = signatures.sign(key.signing_key, key.algorithm, message, scheme)
        return Signature(version=key.version, key_id=key.key_id, signature=signature)

    def verify(
        self, ticket: Ticket, version: int, signature: bytes, message: bytes, scheme: SignatureScheme
    ) -> None:
        """Return if it is this key version's signature, else DoesNotVerify. Other errors as `decrypt`."""
        if ticket.op is not Op.VERIFY:
            raise UsageRefused(f"this is not leave to verify: {ticket.op}")
        key = self._version_for(ticket, version)
        signatures.verify(key.signing_key.public_key(), key.algorithm, signature, message, scheme)

    def verification_key(self, ticket: Ticket, key_id: KeyId) -> tuple[int, PublicKey]:
        """Version and public half of the key with this id, for signatures that name their key.

        KeyRefused (VERSION_UNKNOWN, COMPROMISED, ...), Revoked, Stale.
        """
        if ticket.op is not Op.VERIFY:
            raise UsageRefused(f"this is not leave to verify: {ticket.op}")
        holdings = self._keys.versions(ticket.key.owner, ticket.key.use)
        version = next((holding.version for holding in holdings if holding.key_id == key_id), None)
        if version is None:
            self._refuse(ticket.key, Unavailable.UNKNOWN)
        key = self._version_for(ticket, version)
        return version, key.signing_key.public_key()

    def public_keys(self, tenant: str, keys: Iterable[NamedKey]) -> list[tuple[NamedKey, KeyVersion]]:
        """What signatures of *keys*, which are *tenant*'s, may be verified with now, ascending.

        Those of a blocked, withdrawn, suspended, compromised or destroyed key are not among them. Withdrawn,
        Stale if that cannot be said at the moment: who takes an empty answer for "none" forgets sound keys.
        """
        if self._refuses is not None and self._refuses(tenant):
            raise Withdrawn("this environment is withdrawn, or was not told yet that it may serve")
        found: list[tuple[NamedKey, KeyVersion]] = []
        for key in keys:
            if key.use is not KeyUse.SIGN or key.blocked or key.owner.tenant != tenant:
                continue
            word = self._keys.word(key.owner)
            if word.withdrawn:
                continue
            if word.valid_for_s <= 0:
                raise Stale("no valid key is here at the moment")
            found += [(key, version) for version in self.versions(key) if version.public_key is not None]
        return found

    def self_test(self) -> bool:
        """A real encryption and decryption with a key of our own: for deep health. Never a tenant's key."""
        material = os.urandom(KEY_MATERIAL_SIZE)
        cipher = Xaes256Gcm(derive.service_key(material, _TEST_OWNER, KeyId.random(), "self-test"))
        nonce, sealed = cipher.seal(material, b"self-test")
        try:
            return cipher.decrypt(nonce, sealed, b"self-test") == material
        except IntegrityError:
            return False

    # Within.

    def _gate(self, directory: ServiceDirectory, caller: Caller, key: NamedKey, op: Op) -> None:
        """Everything that must hold before an operation, and again after it."""
        if self._refuses is not None and self._refuses(caller.tenant):
            raise Withdrawn("this environment is withdrawn, or was not told yet that it may serve")
        if directory.keys.get(key.owner) is not key:
            raise KeyNotFound("there is no such key")
        self._access.authorize(caller, key, op)
        if op not in OPERATIONS_OF[key.use] or op not in key.operations:
            raise UsageRefused(f"key {key.name} is not for this: {op}")
        if key.blocked:
            raise KeyRefused(Refusal.BLOCKED, f"key {key.name} is blocked")
        if op in _NEEDS_ACTIVE:
            self._active_or_refuse(key)
            return
        word = self._keys.word(key.owner)
        if word.withdrawn:
            self._refuse_withdrawn(caller.tenant)
        if word.valid_for_s <= 0:
            raise Stale("no valid key is here at the moment")
        self._check_openable(key)

    def _check_openable(self, key: NamedKey) -> None:
        """Return if some version may decrypt or verify: an active one, or else any that is here."""
        try:
            self._active(key)
        except KeyUnavailableError as error:
            reason = error.reason
        else:
            return
        held = (holding.key for holding in self._keys.versions(key.owner, key.use))
        if not any(found is not None and self._may_open(found, key) for found in held):
            self._refuse_key(key, reason)

    def _active(self, key: NamedKey) -> DataKey:
        if key.use is KeyUse.SIGN:
            return self._keys.signing_key(key.owner)
        return self._keys.sealing_key(key.owner)

    def _active_or_refuse(self, key: NamedKey) -> DataKey:
        try:
            return self._active(key)
        except KeyUnavailableError as error:
            self._refuse_key(key, error.reason)

    def _active_for(self, ticket: Ticket, version: int | None) -> DataKey:
        """The active version, noted on the ticket; if *version* is given it must be that one."""
        if version is None:
            key = self._active_or_refuse(ticket.key)
        else:
            key = self._find_version(ticket.key, version)
            if key.state is not KeyState.ACTIVE:
                self._refuse_state(key.state)
        self._note(ticket, key, has_sealed=True)
        return key

    def _version_for(self, ticket: Ticket, version: int) -> DataKey:
        """The version to decrypt or verify with, noted on the ticket."""
        key = self._find_version(ticket.key, version)
        if not self._may_open(key, ticket.key):
            self._refuse_state(key.state)
        self._note(ticket, key, has_sealed=False)
        return key

    def _find_version(self, key: NamedKey, version: int) -> DataKey:
        try:
            return self._keys.key_of_version(key.owner, key.use, version)
        except KeyUnavailableError as error:
            self._refuse(key, error.reason)

    def _of_key_id(self, key: NamedKey, key_id: KeyId) -> DataKey:
        try:
            return self._keys.opening_key(key.owner, key_id)
        except KeyUnavailableError as error:
            self._refuse(key, error.reason)

    def _note(self, ticket: Ticket, key: DataKey, *, has_sealed: bool) -> None:
        if ticket.key.algorithm is not None and key.algorithm != ticket.key.algorithm:
            raise UsageRefused(f"key {ticket.key.name} was pushed with another algorithm than provisioned")
        used = ticket._used  # noqa: SLF001
        if not used or used[-1][0] is not key or used[-1][1] is not has_sealed:  # a batch mostly uses one
            used.append((key, has_sealed))

    def _may_open(self, version: DataKey, key: NamedKey) -> bool:
        """Rule 4."""
        if version.state is KeyState.PRE_ACTIVE:
            try:
                self._active(key)
            except KeyUnavailableError:
                return False
            return True
        return version.state in {KeyState.ACTIVE, KeyState.DEACTIVATED}

    def _cipher(self, key: DataKey, purpose: Purpose) -> Xaes256Gcm:
        if len(purpose.context) > MAX_CONTEXT_BYTES:
            raise InputRefused(f"a context has at most {MAX_CONTEXT_BYTES} bytes")
        return key.service_cipher(purpose.dialect.value, purpose.context)

    def _standing_of(self, owner: NetworkService) -> tuple[Standing, bool]:
        """With whether the agent has said anything of it since the start."""
        word = self._keys.word(owner)
        if word.withdrawn:
            return Standing.REVOKED, True
        if word.valid_for_s <= 0:
            return Standing.STALE, word.was_given
        late = word.valid_for_s < self._degraded_below_s
        return (Standing.DEGRADED if late else Standing.SERVING), True

    def _versions_of(self, key: NamedKey) -> list[tuple[int, KeyState]]:
        return [
            (holding.version, state)
            for holding in self._keys.versions(key.owner, key.use)
            if (state := holding.key.state if holding.key else _STATES.get(holding.reason)) is not None
        ]

    def _refuse_withdrawn(self, tenant: str) -> NoReturn:
        """The tenant's last word, or, from one of several environments, this one's alone."""
        if self._is_one_of_several is not None and self._is_one_of_several(tenant):
            raise Withdrawn("the keys were withdrawn from this environment")
        raise Revoked("the keys were withdrawn by their owner")

    def _refuse_key(self, key: NamedKey, reason: Unavailable) -> NoReturn:
        """There is no active version: because of the tenant, of time, or of the key's own state?"""
        word = self._keys.word(key.owner)
        if word.withdrawn:
            self._refuse_withdrawn(key.owner.tenant)
        if word.valid_for_s <= 0 or reason is Unavailable.EXPIRED:
            raise Stale("no valid key is here at the moment")
        state = self.state_of(key)
        refusal = Refusal.NOT_ACTIVE if state is None else _KEY_REFUSALS.get(state, Refusal.NOT_ACTIVE)
        if refusal is Refusal.DESTROYED:
            raise KeyNotFound("there is no such key")
        raise KeyRefused(refusal, f"key {key.name} is {'not active' if state is None else state}")

    def _refuse(self, key: NamedKey, reason: Unavailable) -> NoReturn:
        """One version is not here: because of the tenant, of time, or of its own state?"""
        word = self._keys.word(key.owner)
        if word.withdrawn:
            self._refuse_withdrawn(key.owner.tenant)
        if word.valid_for_s <= 0 or reason is Unavailable.EXPIRED:
            raise Stale("no valid key is here at the moment")
        raise KeyRefused(_REFUSALS[reason], f"this version of key {key.name} cannot be used: {reason}")

    def _refuse_state(self, state: KeyState) -> NoReturn:
        raise KeyRefused(_KEY_REFUSALS[state], f"this version of the key is {state}")
