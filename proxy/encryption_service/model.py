"""What the encryption service is told to serve: frozen pictures, part of the directory's.

1. A named key is a network service that has no upstream: keys are pushed to it, rotated and revoked like to
   any other. It has one use.
2. A dialect is off for a tenant until an entry switches it on. What a dialect's entry says is a setting of
   the tenant's, checked when it is written (`sealgate dialect`), and again when it is read.
3. A credential is bound to one tenant and dialect, to some or all of the tenant's named keys and
   operations, and where wanted to one endpoint (XKS prefix, transit mount), source networks, and an end.
4. A bearer token is not stored: 256 random bits need no slow hash, so SHA-256 of it is. A SigV4 secret has
   to be known to be verified: it is stored sealed by this proxy's file key (`access.py`).
5. Look-ups by what a caller names (prefix, path, credential id) yield the tenant; no look-up crosses
   tenants.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
from cryptography import x509

from envelope.keys import KeyUse, NetworkService, SigningAlgorithm

type Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class DialectName(StrEnum):
    NATIVE = "native"
    XKS = "xks"
    TRANSIT = "transit"
    KACLS = "kacls"


class Op(StrEnum):
    """What can be asked of a named key."""

    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    REWRAP = "rewrap"  # decrypt and encrypt again; the plaintext stays inside
    GENERATE = "generate"  # a data key: random bytes and the same encrypted
    SIGN = "sign"
    VERIFY = "verify"


OPERATIONS_OF: Final[Mapping[KeyUse, frozenset[Op]]] = {
    KeyUse.DATA: frozenset({Op.ENCRYPT, Op.DECRYPT, Op.REWRAP, Op.GENERATE}),
    KeyUse.SIGN: frozenset({Op.SIGN, Op.VERIFY}),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NamedKey:
    """One named key. `operations` is what the tenant allows, a part of what its use can do."""

    owner: NetworkService
    use: KeyUse = KeyUse.DATA
    algorithm: SigningAlgorithm | None = None
    """Of a signing key; None for a data key."""
    blocked: bool = False
    operations: frozenset[Op] = OPERATIONS_OF[KeyUse.DATA]
    certificate: x509.Certificate | None = field(default=None, repr=False)
    """To which envelopes are sealed; without it nothing can be pushed."""
    key_file: Path = field(default=Path("/nonexistent"), repr=False)
    created_at_s: int = 0
    """When it was provisioned here, Unix time."""

    @property
    def name(self) -> str:
        return self.owner.service

    @property
    def tenant(self) -> str:
        return self.owner.tenant


# Settings of the dialects.


class XksRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Secondary authorization: every pattern given must match (`*` and `?` as in fnmatch, case counts)."""

    name: str
    """Stands in the audit record of what it admits."""
    principal: str | None = None
    kms_key: str | None = None
    via_service: str | None = None
    source_vpc: str | None = None
    operation: str | None = None


class XksStore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One external key store: `https://<host>/<prefix>/kms/xks/v1`."""

    prefix: str
    """Path segments `[A-Za-z0-9_-]` joined by `/`, without leading or trailing slash; unguessable."""
    keys: dict[str, str] = {}
    """External key id -> name of the tenant's named key."""
    region: str | None = None
    """If given, the only region a signature's scope may name."""
    client_subject: str | None = None
    """If given, the CN that the client certificate must have (mTLS)."""
    rules: tuple[XksRule, ...] = ()
    """Secondary authorization; empty: the AWS key policy rules."""


class XksSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    stores: tuple[XksStore, ...] = ()


class TransitMount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`/v1/<mount>/...`; all named keys of the tenant that the token's credential admits are in it."""

    mount: str = "transit"
    namespace: str | None = None
    """If given, `X-Vault-Namespace` must be this or absent."""


class TransitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mounts: tuple[TransitMount, ...] = (TransitMount(),)


class NativeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_try_all: Annotated[int, msgspec.Meta(ge=0, le=64)] = 64
    """Keys that may be tried for one ciphertext which names none; 0: none is."""
    published_keys: tuple[str, ...] = ()
    """Signing keys whose public halves anybody may fetch: `/sealgate/v1/jwks/<tenant>`."""


class TokenIssuer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose JWTs are believed: `iss`, the `aud` they must carry, where their keys are."""

    issuer: str
    jwks_url: str
    audience: str


class KaclsEndpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One KACLS base URL of a tenant."""

    url: str
    """As Google Workspace is told, e.g. `https://kacls.example.com/kacls/acme/v1`; its path is served."""
    wrapping_key: str
    """Name of the tenant's data key that wraps DEKs."""
    signing_key: str | None = None
    """Name of the tenant's RSA signing key: for `/certs`, `/delegate`, and JWTs to other KACLS."""
    authentication_issuers: tuple[TokenIssuer, ...] = ()
    """The tenant's identity providers."""
    authorization_issuers: tuple[TokenIssuer, ...] = ()
    """Google's token issuers; empty: the well-known ones."""
    guest_issuers: tuple[TokenIssuer, ...] = ()
    """Identity providers of people without a Google account; empty: none is let in."""
    owner_domain: str | None = None
    """The Workspace domain; without it a token that names one is refused."""
    admins: dict[str, tuple[str, ...]] = {}
    """E-mail address -> the privileged calls that it may make."""
    perimeters: dict[str, dict[str, tuple[str, ...]]] = {}
    """Perimeter id -> claim of the authentication token -> values of which it must have one."""
    trusted_kacls: tuple[str, ...] = ()
    """Base URLs of other KACLS: `/rewrap` calls these only, `/privilegedunwrap` believes these only."""
    allowed_origins: tuple[str, ...] = ("https://client-side-encryption.google.com",)
    """Web origins whose pages may call and read the answers."""


class KaclsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoints: tuple[KaclsEndpoint, ...] = ()


type DialectSettings = XksSettings | TransitSettings | NativeSettings | KaclsSettings

SETTINGS_OF: Final[Mapping[DialectName, type[msgspec.Struct]]] = {
    DialectName.NATIVE: NativeSettings,
    DialectName.XKS: XksSettings,
    DialectName.TRANSIT: TransitSettings,
    DialectName.KACLS: KaclsSettings,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DialectEntry:
    """One dialect of one tenant."""

    tenant: str
    dialect: DialectName
    enabled: bool = True
    settings: DialectSettings


# Credentials.


class CredentialKind(StrEnum):
    BEARER = "bearer"
    SIGV4 = "sigv4"


KIND_OF: Final[Mapping[DialectName, CredentialKind]] = {
    DialectName.NATIVE: CredentialKind.BEARER,
    DialectName.TRANSIT: CredentialKind.BEARER,
    DialectName.XKS: CredentialKind.SIGV4,
}
"""KACLS has none: its callers bring the tokens of identity providers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialEntry:
    """One credential; the secret itself is not in it (rule 4)."""

    id: str
    """Of SigV4 the access key id; of a bearer token the part between its dots."""
    tenant: str
    dialect: DialectName
    kind: CredentialKind
    label: str
    """What the admin calls it; stands in the audit records."""
    keys: frozenset[str] | None = None
    """Names of named keys; None: all of the tenant's."""
    operations: frozenset[Op] = frozenset(Op)
    endpoint: str | None = None
    """XKS prefix (always), transit mount (None: all)."""
    networks: tuple[Network, ...] = ()
    """Source networks; empty: from anywhere."""
    not_after_s: float | None = None
    """Unix time of its end; None: until it is revoked."""
    verifier: bytes = field(repr=False)
    """Bearer: SHA-256 of the token. SigV4: nonce, sealed secret, tag."""
    requests_per_s: float | None = None
    """None: the service's default for a credential."""
    replaces: str | None = None
    """The credential that this one was issued to take over from."""
    created_at_s: int = 0
    changed_at_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceDirectory:
    """All of the encryption service at one revision of the directory."""

    keys: Mapping[NetworkService, NamedKey]
    dialects: Mapping[tuple[str, DialectName], DialectEntry]
    credentials: Mapping[str, CredentialEntry]
    _stores: Mapping[str, tuple[DialectEntry, XksStore]] = field(init=False, repr=False, compare=False)
    _endpoints: Mapping[str, tuple[DialectEntry, KaclsEndpoint]] = field(
        init=False, repr=False, compare=False
    )
    _of_tenant: Mapping[str, tuple[NamedKey, ...]] = field(init=False, repr=False, compare=False)
    _by_name: Mapping[tuple[str, str], NamedKey] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stores: dict[str, tuple[DialectEntry, XksStore]] = {}
        endpoints: dict[str, tuple[DialectEntry, KaclsEndpoint]] = {}
        for entry in self.dialects.values():
            if not entry.enabled:
                continue
            if isinstance(entry.settings, XksSettings):
                stores |= {store.prefix: (entry, store) for store in entry.settings.stores}
            if isinstance(entry.settings, KaclsSettings):
                endpoints |= {url_path(place.url): (entry, place) for place in entry.settings.endpoints}
        of_tenant: dict[str, list[NamedKey]] = {}
        for key in sorted(self.keys.values(), key=lambda key: key.owner):
            of_tenant.setdefault(key.owner.tenant, []).append(key)
        object.__setattr__(self, "_stores", stores)
        object.__setattr__(self, "_endpoints", endpoints)
        by_name = {(key.owner.tenant, key.owner.service): key for key in self.keys.values()}
        object.__setattr__(self, "_by_name", by_name)
        object.__setattr__(self, "_of_tenant", {name: tuple(keys) for name, keys in of_tenant.items()})

    @classmethod
    def of(
        cls,
        keys: Iterable[NamedKey] = (),
        dialects: Iterable[DialectEntry] = (),
        credentials: Iterable[CredentialEntry] = (),
    ) -> Self:
        return cls(
            keys={key.owner: key for key in keys},
            dialects={(entry.tenant, entry.dialect): entry for entry in dialects},
            credentials={entry.id: entry for entry in credentials},
        )

    def dialect(self, tenant: str, dialect: DialectName) -> DialectEntry | None:
        """The entry if *tenant* has this dialect switched on."""
        entry = self.dialects.get((tenant, dialect))
        return entry if entry is not None and entry.enabled else None

    def xks_store(self, prefix: str) -> tuple[DialectEntry, XksStore] | None:
        """The key store at *prefix*, whosoever it is, if its tenant has XKS switched on."""
        return self._stores.get(prefix)

    def kacls_endpoint(self, path: str) -> tuple[DialectEntry, KaclsEndpoint] | None:
        """The KACLS whose base URL has this path (no trailing slash), if switched on."""
        return self._endpoints.get(path)

    def kacls_paths(self) -> Iterable[str]:
        return self._endpoints.keys()

    def key(self, tenant: str, name: str) -> NamedKey | None:
        """The named key *name* of *tenant*; *name* may be anything."""
        return self._by_name.get((tenant, name))

    def keys_of(self, tenant: str) -> tuple[NamedKey, ...]:
        """The named keys of *tenant*, by name."""
        return self._of_tenant.get(tenant, ())


EMPTY: Final = ServiceDirectory.of()


def url_path(url: str) -> str:
    """The path of a base URL, without trailing slash."""
    rest = url.partition("://")[2]
    return "/" + rest.partition("/")[2].rstrip("/")
