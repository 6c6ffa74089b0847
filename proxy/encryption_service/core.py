"""Encrypt, decrypt, sign, verify under named keys: no I/O but the audit record, no await, memory only.

The order of every call, in every dialect:

    caller = access.bearer(...)                     who (or sigv4, or tokens)
    limiter.admit(caller.tenant, ...)               how much
    key    = core.states.find(caller.tenant, name)  KeyNotFound
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
4. What a key's state allows is `key_states.py`'s to say.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from envelope import derive
from envelope.errors import IntegrityError, KeyUnavailableError, Unavailable
from envelope.keys import KEY_MATERIAL_SIZE, KeyId, KeyState, NetworkService
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
    ServiceError,
    Stale,
    TooLarge,
    UsageRefused,
)
from proxy.encryption_service.key_states import DEGRADED_BELOW_S, KeyStates
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
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock

__all__ = [
    "NONCE_SIZE",
    "TAG_SIZE",
    "Core",
    "Entry",
    "HashName",
    "Marshaling",
    "Outcome",
    "PublicKey",
    "Purpose",
    "RsaPadding",
    "Sealed",
    "SealedAll",
    "Signature",
    "SignatureScheme",
    "Ticket",
]

MAX_PLAINTEXT_BYTES: Final = 32 << 20
"""Of one item; larger bodies are for the native API's streams."""
MAX_CONTEXT_BYTES: Final = 4096

_NEEDS_ACTIVE: Final = frozenset({Op.ENCRYPT, Op.GENERATE, Op.REWRAP, Op.SIGN})
_ENCRYPTS: Final = frozenset({Op.ENCRYPT, Op.GENERATE, Op.REWRAP})
_DECRYPTS: Final = frozenset({Op.DECRYPT, Op.REWRAP})
_TEST_OWNER: Final = NetworkService("sealgate", "self-test")


type Aad = bytes | Callable[[int, bytes], bytes]
"""What is authenticated besides the plaintext, or how it follows from version and nonce where a dialect binds
what it stores of them."""


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

        *refuses*, *is_one_of_several*: see `KeyStates`.

        *counted*: is told of each recorded call its dialect, operation, and error or `ok`: for metrics.
        """
        self._keys = keys
        self._access = access
        self._directory = directory
        self._audit = audit
        self._clock = clock
        self._limiter = limiter
        self._counted = counted
        self.states: Final = KeyStates(
            keys,
            directory,
            degraded_below_s=degraded_below_s,
            refuses=refuses,
            is_one_of_several=is_one_of_several,
        )
        """How keys stand; what a caller without a ticket may be told."""

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
                self.states.refuse_version(ticket.key, error.reason)
            if not (used.state is KeyState.ACTIVE if has_sealed else self.states.may_open(used, ticket.key)):
                self.states.refuse_state(used.state)
        if not ticket._used and self._keys.word(ticket.key.owner).withdrawn:  # noqa: SLF001
            self.states.refuse_withdrawn(ticket.key.owner.tenant)

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
        key = self.states.of_key_id(ticket.key, key_id)
        if not self.states.may_open(key, ticket.key):
            self.states.refuse_state(key.state)
        self._note(ticket, key, has_sealed=False)
        return key

    def candidates(self, ticket: Ticket) -> list[DataKey]:
        """Every version that may open an object which names none, in the order to be tried.

        The caller compares commitments, says `opened_by`, and records how many it has tried.
        """
        if ticket.op is not Op.DECRYPT:
            raise UsageRefused(f"this is not leave to decrypt: {ticket.op}")
        found = self._keys.candidates(ticket.key.owner)
        return [key for key in found if self.states.may_open(key, ticket.key)]

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
            self.states.refuse_version(ticket.key, Unavailable.UNKNOWN)
        key = self._version_for(ticket, version)
        return version, key.signing_key.public_key()

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
        self.states.check_served(caller.tenant)
        if directory.keys.get(key.owner) is not key:
            raise KeyNotFound("there is no such key")
        self._access.authorize(caller, key, op)
        if op not in OPERATIONS_OF[key.use] or op not in key.operations:
            raise UsageRefused(f"key {key.name} is not for this: {op}")
        if key.blocked:
            raise KeyRefused(Refusal.BLOCKED, f"key {key.name} is blocked")
        if op in _NEEDS_ACTIVE:
            self.states.active(key)
            return
        word = self._keys.word(key.owner)
        if word.withdrawn:
            self.states.refuse_withdrawn(caller.tenant)
        if word.valid_for_s <= 0:
            raise Stale("no valid key is here at the moment")
        self.states.check_openable(key)

    def _active_for(self, ticket: Ticket, version: int | None) -> DataKey:
        """The active version, noted on the ticket; if *version* is given it must be that one."""
        if version is None:
            key = self.states.active(ticket.key)
        else:
            key = self.states.version(ticket.key, version)
            if key.state is not KeyState.ACTIVE:
                self.states.refuse_state(key.state)
        self._note(ticket, key, has_sealed=True)
        return key

    def _version_for(self, ticket: Ticket, version: int) -> DataKey:
        """The version to decrypt or verify with, noted on the ticket."""
        key = self.states.version(ticket.key, version)
        if not self.states.may_open(key, ticket.key):
            self.states.refuse_state(key.state)
        self._note(ticket, key, has_sealed=False)
        return key

    def _note(self, ticket: Ticket, key: DataKey, *, has_sealed: bool) -> None:
        if ticket.key.algorithm is not None and key.algorithm != ticket.key.algorithm:
            raise UsageRefused(f"key {ticket.key.name} was pushed with another algorithm than provisioned")
        used = ticket._used  # noqa: SLF001
        if not used or used[-1][0] is not key or used[-1][1] is not has_sealed:  # a batch mostly uses one
            used.append((key, has_sealed))

    def _cipher(self, key: DataKey, purpose: Purpose) -> Xaes256Gcm:
        if len(purpose.context) > MAX_CONTEXT_BYTES:
            raise InputRefused(f"a context has at most {MAX_CONTEXT_BYTES} bytes")
        return key.service_cipher(purpose.dialect.value, purpose.context)
