"""Where key material comes from: the one interface before every HSM and key server.

1. Key material (KM) never crosses this interface: `generate` returns it wrapped by the KEK,
   `seal_envelopes` returns envelopes that only the recipient's private key opens.
2. "It failed" and "it is revoked" are different answers: KekRevokedError is proven, KeySourceError is not.
3. One bad wrapped key or one bad recipient certificate never spoils the others: such failures are values.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from envelope.errors import MisuseError
from envelope.keys import KeyId, KeyState, KeyUse, NetworkService, SigningAlgorithm
from key_agent.sources.verdict import Diagnosis, Verdict

if TYPE_CHECKING:  # a worker process has no use for it
    from key_agent.sources.pace import Pace

__all__ = [
    "Arrival",
    "Destination",
    "Diagnosis",
    "EnvelopeRequest",
    "EnvelopeResult",
    "Exported",
    "Kek",
    "KekReference",
    "KekType",
    "KeySource",
    "NewKey",
    "Parcel",
    "Recipient",
    "Rewrapped",
    "Route",
    "Verdict",
    "WrapMethod",
    "WrappedKey",
]


class KekType(StrEnum):
    """What kind of key a KEK is. The public half of an asymmetric one lets other environments wrap for it."""

    AES_256 = "aes-256"
    RSA_3072 = "rsa-3072"
    EC_P256 = "ec-p256"


class WrapMethod(StrEnum):
    """How the KEK wraps KM; stored with every wrapped key and never changed silently (docs/hsm.md)."""

    GCM = "gcm"
    """AES-256-GCM, IV from the HSM's generator: IV (12) ‖ ciphertext ‖ tag (16), binding as AAD."""
    GCM_IN_PLACE = "gcm-in-place"
    """The same bytes; the HSM makes the IV and writes it over the zeros that it was given."""
    GCM_APPENDED = "gcm-appended"
    """The HSM makes the IV and appends it: IV size (1) ‖ IV (12 or 16) ‖ ciphertext ‖ tag (16)."""
    KW = "kw"
    """AES key wrap (RFC 3394) of SHA-256(binding) ‖ KM ‖ zeros up to a multiple of 8."""
    CBC_HMAC = "cbc+hmac"
    """AES-256-CBC and HMAC-SHA-256 by two HSM keys: IV (16) ‖ ciphertext ‖ HMAC (32)."""
    RSA_OAEP_256 = "rsa-oaep-256"
    """OAEP (SHA-256) of a content key ‖ AES-256-GCM of KM by it ‖ HMAC by a second HSM key."""
    RSA_OAEP_1 = "rsa-oaep-1"
    """The same with SHA-1 in the OAEP, for HSMs that have no other. OAEP needs no collision resistance."""
    ECDH_ES = "ecdh-es"
    """ECDH-ES+A256KW of a content key ‖ AES-256-GCM of KM by it ‖ HMAC by a second HSM key."""
    TRANSIT = "transit"
    """OpenBao's transit engine: its ciphertext, the binding as associated data."""

    @property
    def kek_type(self) -> KekType:
        match self:
            case WrapMethod.RSA_OAEP_256 | WrapMethod.RSA_OAEP_1:
                return KekType.RSA_3072
            case WrapMethod.ECDH_ES:
                return KekType.EC_P256
            case _:
                return KekType.AES_256

    @property
    def has_mac_key(self) -> bool:
        """Whether a second key in the HSM authenticates what the KEK wraps. One gone, the KEK is gone."""
        return self in (
            WrapMethod.CBC_HMAC,
            WrapMethod.RSA_OAEP_256,
            WrapMethod.RSA_OAEP_1,
            WrapMethod.ECDH_ES,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KekReference:
    """A KEK's name: what a crash between naming and creating must leave in the registry."""

    kek_id: str
    label: str
    """CKA_LABEL."""
    object_id: bytes
    """CKA_ID; label and id together find exactly one key."""
    environment_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kek:
    """A KEK as the registry stores it: nothing of it is secret."""

    reference: KekReference
    method: WrapMethod
    token_serial: str
    """Pinned: the same label on another token is another token."""
    canary_ciphertext: bytes
    """Worthless random bytes under this KEK: opening them proves the KEK."""
    canary_sha256: bytes
    created_at_ms: int
    public_key_der: bytes = b""
    """SubjectPublicKeyInfo of an asymmetric KEK, pinned: what is sealed to it is not asked of the token."""
    valid_from_s: int | None = None
    """Unix seconds; before it a diagnosis says `kek_expired`. Besides CKA_START_DATE."""
    valid_until_s: int | None = None
    """Unix seconds, not included. Besides CKA_END_DATE, which no token enforces and some cannot read."""
    is_adopted: bool = False
    """Made by the HSM's owner, not by `create_kek`."""

    @property
    def kek_type(self) -> KekType:
        return self.method.kek_type


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key to be made. MisuseError unless a signing key, and only that, names a `SigningAlgorithm`."""

    owner: NetworkService
    use: KeyUse = KeyUse.DATA
    algorithm: str | None = None

    def __post_init__(self) -> None:
        if (self.use is KeyUse.SIGN) != (self.algorithm in tuple(SigningAlgorithm)):
            raise MisuseError(f"a key for {self.use} is not made with algorithm {self.algorithm}")
        if self.use is KeyUse.DATA and self.algorithm is not None:
            raise MisuseError("only a signing key names an algorithm")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """An EKM: KM encrypted by the KEK, bound to owner, key id, KEK and environment (format.md 6.1)."""

    owner: NetworkService
    key_id: KeyId
    kek_id: str
    environment_id: str
    method: WrapMethod
    wrapped: bytes
    kcv: bytes
    """16 bytes, not secret: finds exchanged wrapped keys before data is written under them."""
    token_serial: str
    created_at_ms: int
    use: KeyUse = KeyUse.DATA
    algorithm: str | None = None
    """Of a signing key, and only of it: a `SigningAlgorithm`."""
    version: int = 1
    """Rises per service and use. The registry assigns it; envelopes carry it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipient:
    """One proxy that an owner's envelope goes to."""

    audience: str
    """The proxy's id."""
    nonce: bytes | None
    """The proxy's 16-byte challenge of this push session."""
    certificate_der: bytes
    """The network service's certificate at that proxy. The caller has checked chain, role and validity."""
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvelopeRequest:
    """All keys of one network service, for every proxy that hosts it (`op: set`)."""

    owner: NetworkService
    keys: tuple[tuple[WrappedKey, KeyState], ...]
    recipients: tuple[Recipient, ...]
    issued_at_s: int
    expires_at_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvelopeResult:
    """What became of one `EnvelopeRequest`.

    A failed key is left out of the envelopes, the sound ones still travel. If no key opened there are no
    tokens at all: an empty `set`, or tombstones alone, would take the others back.
    """

    owner: NetworkService
    tokens: Mapping[str, str] = field(repr=False)
    """Audience -> compact JWE."""
    failed_keys: Mapping[KeyId, str]
    """Key id -> why it is left out (damaged, exchanged, kcv)."""
    failed_recipients: Mapping[str, str]
    """Audience -> why there is no envelope for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped:
    """What became of wrapped keys that were to change their KEK. A failed one is left as it was."""

    keys: tuple[WrappedKey, ...]
    """Under the new KEK: same owner, key id, use, algorithm, version and kcv."""
    failed_keys: Mapping[KeyId, str]
    """Key id -> why it is not among them (damaged, exchanged, kcv)."""


class Route(StrEnum):
    """How key material reaches another environment (parcels.py)."""

    PUBLIC = "public"
    """Sealed to the public half of its KEK: its HSM wraps nothing."""
    PEER = "peer"
    """Sealed to its agent's transport key, and wrapped by its HSM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Another environment's KEK, as the signed rows describe it."""

    environment_id: str
    kek_id: str
    method: WrapMethod
    public_key_der: bytes = b""
    """Of an asymmetric KEK."""
    transport_key_der: bytes = b""
    """SubjectPublicKeyInfo, P-256, of its agent's transport key."""

    @property
    def route(self) -> Route:
        return Route.PUBLIC if self.public_key_der else Route.PEER


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Key material on its way to one environment. Not secret: it opens there alone."""

    owner: NetworkService
    key_id: KeyId
    kek_id: str
    environment_id: str
    route: Route
    sealed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A parcel for us, and what the signed rows say of the key in it."""

    parcel: Parcel
    kcv: bytes
    use: KeyUse = KeyUse.DATA
    algorithm: str | None = None
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What became of wrapped keys that were to be sent: each opened one has a parcel for each destination."""

    parcels: tuple[Parcel, ...]
    failed_keys: Mapping[KeyId, str]
    """Key id -> why it is not among them (damaged, exchanged, kcv)."""


class KeySource(ABC):
    """An HSM or key server. Each method raises `KeySourceError` (or a child) and nothing else on failure."""

    pace: "Pace"
    """Whether it answers as soon as it should."""

    @abstractmethod
    async def create_kek(
        self,
        reference: KekReference,
        *,
        kek_type: KekType | None = None,
        valid_until_s: int | None = None,
        replace_unfinished: bool = False,
    ) -> Kek:
        """Make the KEK in the HSM, check that it is sensitive and cannot be extracted, and make its canary.

        Without *kek_type* the first wrap method that works decides. *valid_until_s*: Unix seconds.

        A key of that name in the token is an error, for somebody's data may need it. *replace_unfinished*
        says that the registry knows better: it named this KEK and crashed before it was made; then what is
        there is destroyed. UnsupportedError if the token weakens the key or offers no wrap method.
        """

    @abstractmethod
    async def adopt_kek(
        self,
        reference: KekReference,
        *,
        kek_type: KekType | None = None,
        valid_from_s: int | None = None,
        valid_until_s: int | None = None,
    ) -> Kek:
        """Take a key that the HSM's owner made, named by label and id, as the KEK; nothing in it is changed.

        It has to be as strong as one that `create_kek` makes and to show a wrap method. Where the method
        needs a second key for its HMAC, its label and its id are the KEK's with `-mac`; it is made if the
        token lets it be. UnsupportedError says what is missing.
        """

    @abstractmethod
    async def destroy_kek(self, kek: Kek) -> None:
        """Destroy the KEK and search again; returns only when the token shows no key of that name any more.

        Already gone is success. Backups and clones of the HSM are outside of this promise.
        """

    @abstractmethod
    async def set_kek_enabled(self, kek: Kek, *, enabled: bool) -> None:
        """Disable (no decryption, no unwrapping) or enable the KEK. UnsupportedError: the token refuses."""

    @abstractmethod
    async def generate(self, kek: Kek, wanted: Sequence[NewKey]) -> list[WrappedKey]:
        """One new wrapped key for each of *wanted*, in that order, with a new key id each, as version 1.

        KM comes from the HSM's generator (a signing key as signing_keys.py says), is wrapped, opened again
        and compared, and dropped.
        """

    @abstractmethod
    async def rewrap(self, old: Kek, new: Kek, keys: Sequence[WrappedKey]) -> Rewrapped:
        """The same KM under another KEK: opened under *old*, sealed under *new* with the binding of its new
        place, opened again there, compared with what it was and with its kcv, and dropped.

        Both KEKs open their canaries first. KekRevokedError: a diagnosis proved one of them revoked; nothing
        was made that the caller has to keep.
        """

    @abstractmethod
    async def export_keys(
        self, kek: Kek, keys: Sequence[WrappedKey], destinations: Sequence[Destination]
    ) -> Exported:
        """The same KM for other environments: opened here, compared with its kcv, sealed for each of
        *destinations*, and dropped. KekRevokedError as for `seal_envelopes`.
        """

    @abstractmethod
    async def import_keys(
        self, kek: Kek, arrivals: Sequence[Arrival], *, transport_key_file: Path
    ) -> Rewrapped:
        """Keys from other environments under our KEK: opened, compared with the kcv of the signed rows,
        wrapped, opened again, and dropped. Where the parcel is sealed to our KEK already, our HSM opens it
        and adds its HMAC, and wraps nothing. A bad parcel is a failed key.
        """

    @abstractmethod
    async def seal_envelopes(self, kek: Kek, requests: Sequence[EnvelopeRequest]) -> list[EnvelopeResult]:
        """Open the wrapped keys in the HSM, seal them to every recipient; one result per request, in order.

        KekRevokedError: a diagnosis proved it; nothing was sealed that the caller has to keep.
        """

    @abstractmethod
    async def diagnose(self, kek: Kek) -> Diagnosis:
        """Does the KEK work, is it revoked, or can nobody tell? An outage is a verdict here, no error."""

    @abstractmethod
    async def describe(self) -> dict[str, object]:
        """For `doctor`: module, token, methods with the reasons for those refused. JSON-able, no secrets."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the HSM. Idempotent."""
