"""A KACLS as a tenant sets it up: whom it believes, and what can be known to be wrong before the first call.

1. An issuer of authentication (a person's identity provider) is not one of authorization (Google), nor
   another KACLS, nor ourselves: one signature must never count as both of the two that a call needs.
2. Names in settings are compared with claims in one form: e-mail addresses and domains without regard to
   case (of addresses that of ASCII, or a person could bear a name that counts as another's), URLs without a
   final slash and else as they are.
3. A perimeter that is named nowhere is no perimeter: what is wrapped for it could be opened by nobody who is
   meant, so it is refused. The empty name is the exception, and has no conditions unless it is given some.
"""

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self
from urllib.parse import urlsplit

from proxy.encryption_service.model import DialectEntry, KaclsEndpoint, TokenIssuer, url_path
from proxy.encryption_service.outbound import OutboundError, check_url
from proxy.encryption_service.tokens import Issuer

GOOGLE_AUDIENCE: Final = "cse-authorization"
MIGRATION_AUDIENCE: Final = "kacls-migration"
DELEGATION_AUDIENCE: Final = "kacls-delegation"
CERTS: Final = "/certs"
MAX_PERIMETER_BYTES: Final = 128
_GOOGLE_ISSUERS: Final = (
    *(f"gsuitecse-tokenissuer-{app}" for app in ("drive", "meet", "calendar", "gmail")),
    "apps-security-cse-kaclscommunication",
)
_GOOGLE_KEYS: Final = "https://www.googleapis.com/service_accounts/v1/jwk/"
_PATH: Final = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_EMAIL: Final = re.compile(r"[^@\s]+@[^@\s]+")
_ORIGIN: Final = re.compile(r"https://[a-z0-9.-]+(:[0-9]{1,5})?")
# Where the other dialects live: a path is one dialect's only.
_FOREIGN: Final = ("/v1/", "/sealgate/", "/openapi.json/", "/ping/")


class Privileged(StrEnum):
    """The calls that need an admin, by their path."""

    WRAP = "privilegedwrap"
    UNWRAP = "privilegedunwrap"
    PRIVATE_KEY_DECRYPT = "privilegedprivatekeydecrypt"
    WRAP_PRIVATE_KEY = "wrapprivatekey"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kacls:
    """An endpoint as calls look at it."""

    entry: DialectEntry
    endpoint: KaclsEndpoint
    url: str
    """Without final slash."""
    authorization: Mapping[str, Issuer] = field(repr=False)
    users: Mapping[str, Issuer] = field(repr=False)
    """The tenant's identity providers, and this KACLS itself for delegated tokens."""
    guests: Mapping[str, Issuer] = field(repr=False)
    sources: Mapping[str, Issuer] = field(repr=False)
    """Other KACLS that may have keys unwrapped, to migrate them away from here."""
    admins: Mapping[str, frozenset[str]] = field(repr=False)
    origins: frozenset[str]

    @classmethod
    def of(cls, entry: DialectEntry, endpoint: KaclsEndpoint) -> Self:
        url = normal_url(endpoint.url)
        itself = Issuer(issuer=url, audiences=frozenset({DELEGATION_AUDIENCE}), jwks_url=url + CERTS)
        return cls(
            entry=entry,
            endpoint=endpoint,
            url=url,
            authorization=_issuers(endpoint.authorization_issuers) or GOOGLE_ISSUERS,
            users={
                **_issuers(endpoint.authentication_issuers),
                **({url: itself} if endpoint.signing_key else {}),
            },
            guests=_issuers(endpoint.guest_issuers),
            sources={
                source: Issuer(
                    issuer=source, audiences=frozenset({MIGRATION_AUDIENCE}), jwks_url=source + CERTS
                )
                for source in map(normal_url, endpoint.trusted_kacls)
            },
            admins={normal_email(email): frozenset(calls) for email, calls in endpoint.admins.items()},
            origins=frozenset(endpoint.allowed_origins),
        )

    @property
    def tenant(self) -> str:
        return self.entry.tenant

    def may(self, email: str, call: Privileged) -> bool:
        """Whether the admin list lets *email* make *call*."""
        return call in self.admins.get(normal_email(email), frozenset())

    def conditions(self, perimeter_id: str) -> Mapping[str, tuple[str, ...]] | None:
        """What the perimeter wants of a token's claims; None if there is no such perimeter (rule 3)."""
        return self.endpoint.perimeters.get(perimeter_id, None if perimeter_id else {})


def normal_url(url: str) -> str:
    return url.rstrip("/")


def normal_email(email: str) -> str:
    """Without regard to the case of A to Z only: to Unicode a long s is an s, and a Kelvin sign a k."""
    return email.translate(_LOWER)


def check_endpoint(endpoint: KaclsEndpoint) -> None:
    """ValueError, for the admin, if the endpoint could not serve as it is meant."""
    urls = {
        "url": [endpoint.url],
        "trusted_kacls": list(endpoint.trusted_kacls),
        "jwks_url": [
            issuer.jwks_url
            for issuers in (
                endpoint.authentication_issuers,
                endpoint.authorization_issuers,
                endpoint.guest_issuers,
            )
            for issuer in issuers
        ],
    }
    for name, listed in urls.items():
        for url in listed:
            _check_https(name, url)
    path = url_path(endpoint.url)
    if not _PATH.fullmatch(path) or urlsplit(endpoint.url).query:
        raise ValueError(f"{endpoint.url}: give each KACLS a path of its own, like /kacls/acme, and no query")
    if any(f"{path}/".startswith(foreign) for foreign in _FOREIGN) or "/kms/xks/v1" in path:
        raise ValueError(f"{endpoint.url}: that path is another dialect's; choose one like /kacls/acme")
    if not endpoint.authentication_issuers:
        raise ValueError(f"{endpoint.url} believes no identity provider: name it in authentication_issuers")
    _check_issuers(endpoint)
    _check_people(endpoint)
    for perimeter_id, claims in endpoint.perimeters.items():
        if len(perimeter_id.encode()) > MAX_PERIMETER_BYTES:
            raise ValueError(
                f"a perimeter id has at most {MAX_PERIMETER_BYTES} bytes: {perimeter_id[:40]!r}..."
            )
        if any(not claim or not values for claim, values in claims.items()):
            raise ValueError(f"perimeter {perimeter_id!r}: a claim without values admits nobody")
    for origin in endpoint.allowed_origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"not a web origin: {origin!r} (https://host or https://host:port is)")


def _check_https(name: str, url: str) -> None:
    try:
        check_url(url)
    except OutboundError as error:
        raise ValueError(f"{name}: {url!r}: {error}") from None


def _check_issuers(endpoint: KaclsEndpoint) -> None:
    """Rule 1."""
    roles = {
        "authentication_issuers": {issuer.issuer for issuer in endpoint.authentication_issuers},
        "guest_issuers": {issuer.issuer for issuer in endpoint.guest_issuers},
        "authorization_issuers": {issuer.issuer for issuer in endpoint.authorization_issuers}
        or set(GOOGLE_ISSUERS),
        "trusted_kacls": {normal_url(url) for url in endpoint.trusted_kacls},
        "url": {normal_url(endpoint.url)},
    }
    seen: dict[str, str] = {}
    for role, names in roles.items():
        for name in names:
            if not name:
                raise ValueError(f"{role}: an issuer needs a name")
            if name in seen:
                raise ValueError(f"{name} stands in {seen[name]} and in {role}: one party has one part")
            seen[name] = role
    keys: dict[str, str] = {}
    for issuer in (
        *endpoint.authentication_issuers,
        *endpoint.guest_issuers,
        *endpoint.authorization_issuers,
    ):
        if not issuer.audience:
            raise ValueError(f"issuer {issuer.issuer}: without an audience every token of it would count")
        if keys.setdefault(issuer.issuer, issuer.jwks_url) != issuer.jwks_url:
            raise ValueError(f"issuer {issuer.issuer} has two jwks_url")
    if endpoint.trusted_kacls and endpoint.signing_key is None:
        raise ValueError(f"{endpoint.url}: to migrate from another KACLS it needs a signing_key")


def _check_people(endpoint: KaclsEndpoint) -> None:
    for email, calls in endpoint.admins.items():
        if not _EMAIL.fullmatch(email):
            raise ValueError(f"admins: not an e-mail address: {email!r}")
        unknown = set(calls) - set(Privileged)
        if unknown or not calls:
            choice = ", ".join(Privileged)
            raise ValueError(f"admins: {email} may make which calls? Choose of: {choice}")
    if len({normal_email(email) for email in endpoint.admins}) != len(endpoint.admins):
        raise ValueError("admins: an address stands twice, in different letters")


def _issuers(configured: Iterable[TokenIssuer]) -> dict[str, Issuer]:
    found: dict[str, Issuer] = {}
    for one in configured:
        audiences = found[one.issuer].audiences if one.issuer in found else frozenset()
        found[one.issuer] = Issuer(
            issuer=one.issuer, audiences=audiences | {one.audience}, jwks_url=one.jwks_url
        )
    return found


GOOGLE_ISSUERS: Final[Mapping[str, Issuer]] = _issuers(
    TokenIssuer(
        issuer=f"{name}@system.gserviceaccount.com",
        jwks_url=f"{_GOOGLE_KEYS}{name}@system.gserviceaccount.com",
        audience=GOOGLE_AUDIENCE,
    )
    for name in _GOOGLE_ISSUERS
)
