"""Encrypt, decrypt, sign, verify under named keys: no I/O but the audit record, no await, memory only.

The order of every call, in every dialect:

    caller = access.bearer(...)                     who (or sigv4, or tokens)
    limiter.admit(caller.tenant, ...)               how much
    key    = core.find(caller.tenant, name)         KeyNotFound
    ticket = core.admit(caller, key, Op.ENCRYPT)    may this caller, this key: AccessDenied, KeyRefused, ...
    sealed = core.encrypt(ticket, ...)              what was asked, for a batch as often as needed
    core.finish(ticket, Entry(...))                 asked again, then recorded; only then the answer leaves

1. Nothing is done without a ticket, and a ticket remembers each key version that was used under it. `confirm`
   asks for all of it again: credential, block, state, deadline. What ended meanwhile is not answered.
2. Every call leaves an audit record before its answer leaves, refused ones too (`record`). Without the record
   there is no answer: NotRecorded.
3. A DEK belongs to one tenant, key, version, dialect and context (docs/format.md 6.6): what one dialect has
   encrypted opens in no other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from envelope.keys import KeyId, KeyState
from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.model import DialectName, NamedKey, Op, ServiceDirectory
from proxy.keys.cache import KeyCache
from runtime.audit import AuditLog
from runtime.clock import Clock

MAX_PLAINTEXT_BYTES: Final = 32 << 20
"""Of one item; larger bodies are for the native API's streams."""
NONCE_SIZE: Final = 24
TAG_SIZE: Final = 16

type PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


class Standing(StrEnum):
    """How a tenant, or one key, stands: for health and for what cannot be served."""

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


class HashName(StrEnum):
    SHA256 = "sha2-256"
    SHA384 = "sha2-384"
    SHA512 = "sha2-512"


class RsaPadding(StrEnum):
    PSS = "pss"
    PKCS1V15 = "pkcs1v15"


class Marshaling(StrEnum):
    """Of an ECDSA signature."""

    ASN1 = "asn1"  # DER
    JWS = "jws"  # r ‖ s, fixed length


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureScheme:
    """How to sign; what does not apply to the key's algorithm is InputRefused, not ignored."""

    hash_name: HashName = HashName.SHA256
    prehashed: bool = False
    padding: RsaPadding | None = None
    """RSA; None: PSS."""
    salt_length: int | None = None
    """PSS; None: the hash's length. -1 at verification: any."""
    marshaling: Marshaling | None = None
    """ECDSA; None: ASN1."""


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


class Outcome(StrEnum):
    OK = "ok"
    REFUSED = "refused"  # the caller's or the key's fault
    FAILED = "failed"  # ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The audit record of one call. Strings of strangers are cut and cleaned by `Core.record`."""

    dialect: DialectName
    operation: str
    tenant: str = ""
    key: str = ""
    """External name: a named key's, or what the caller called it if it was not found."""
    version: int = 0
    key_id: KeyId | None = None
    caller: str = ""
    credential_id: str = ""
    request_id: str = ""
    """The provider's."""
    resource: str = ""
    reason: str = ""
    outcome: Outcome = Outcome.OK
    error: str = ""
    items: int = 1
    latency_us: int = 0
    detail: Mapping[str, str] = field(default_factory=dict)
    """What else the dialect has to say, public facts only."""


class Ticket:
    """Leave for one caller to do one operation with one key; made by `Core.admit` alone."""

    __slots__ = ("caller", "key", "op")

    def __init__(self, caller: Caller, key: NamedKey, op: Op) -> None:
        self.caller: Final = caller
        self.key: Final = key
        self.op: Final = op


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
        degraded_below_s: float = 20.0,
    ) -> None:
        """*degraded_below_s*: a key good for less has missed its refresh (validity - interval - margin)."""
        self._keys = keys
        self._access = access
        self._directory = directory
        self._audit = audit
        self._clock = clock
        self._degraded_below_s = degraded_below_s

    def standing(self, tenant: str, key: NamedKey | None = None) -> Standing:
        """Of one key, or of the tenant, whom one blocked key does not make worse."""
        raise NotImplementedError

    def find(self, tenant: str, name: str) -> NamedKey:
        """The named key, blocked or not. KeyNotFound; also if every version of it was destroyed."""
        raise NotImplementedError

    def admit(self, caller: Caller, key: NamedKey, op: Op) -> Ticket:
        """NotAuthenticated, AccessDenied, UsageRefused, KeyRefused, Revoked, Stale, KeyNotFound."""
        raise NotImplementedError

    def encrypt(
        self, ticket: Ticket, plaintext: bytes, aad: bytes, *, purpose: Purpose, version: int | None = None
    ) -> Sealed:
        """Under the active version; *version* must be that one if it is given.

        KeyRefused (NOT_ACTIVE, DEACTIVATED, VERSION_GONE, ...), Revoked, Stale, UsageRefused, TooLarge.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def sign(
        self, ticket: Ticket, message: bytes, scheme: SignatureScheme, *, version: int | None = None
    ) -> Signature:
        """Under the active version. *message* is the digest if the scheme says `prehashed`. As `encrypt`."""
        raise NotImplementedError

    def verify(
        self, ticket: Ticket, version: int, signature: bytes, message: bytes, scheme: SignatureScheme
    ) -> None:
        """Return if it is this key version's signature, else DoesNotVerify. Other errors as `decrypt`."""
        raise NotImplementedError

    def versions(self, key: NamedKey) -> list[KeyVersion]:
        """What this process knows of the key's versions, ascending; tombstones included."""
        raise NotImplementedError

    def confirm(self, ticket: Ticket) -> None:
        """Whether all of it still holds (rule 1). Errors as `admit`."""
        raise NotImplementedError

    def record(self, entry: Entry) -> None:
        """NotRecorded if the audit log cannot take it: then nothing else may be answered."""
        raise NotImplementedError

    def finish(self, ticket: Ticket, entry: Entry) -> None:
        """`confirm`, then `record`; what `confirm` raises is recorded as the outcome, and raised."""
        raise NotImplementedError

    def self_test(self) -> bool:
        """A real encryption and decryption with a key of our own: for deep health. Never a tenant's key."""
        raise NotImplementedError
