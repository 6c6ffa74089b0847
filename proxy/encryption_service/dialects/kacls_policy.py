"""Who may do what at a KACLS: tokens, roles, perimeters, admins. Nothing here touches a key.

1. A person's call carries two tokens: authentication (401 if it is not good), authorization (403). They must
   be for the same person, at this KACLS, for this owner domain, in a role that the call is for.
2. The address that counts is `google_email`, else `email`; compared without regard to case.
3. People without a Google account come through issuers that are for guests only, and nobody else does.
4. A token that acts for someone (`delegated_to`) is for one resource, and Google must have said the same. One
   that this KACLS has made does nothing else: no privileged call, no further delegation.
5. Claims of the authentication token are what a perimeter's conditions are about.
6. A privileged call needs its name behind the caller's address in the admin list, or is another KACLS's that
   migrates: then the token is for one resource, for us, and short-lived.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from envelope.errors import SealgateError
from proxy.encryption_service.dialects.kacls_endpoint import (
    DELEGATION_AUDIENCE,
    MAX_PERIMETER_BYTES,
    Kacls,
    Privileged,
    normal_email,
    normal_url,
)
from proxy.encryption_service.dialects.kacls_messages import MAX_RESOURCE_BYTES
from proxy.encryption_service.tokens import (
    Claims,
    Issuer,
    KeySource,
    TokenError,
    TokenFault,
    unverified_issuer,
    verify,
)

MIGRATION_LIFETIME_S: Final = 3600.0
MAX_EMAIL_BYTES: Final = 320
_USER_TYPES: Final = frozenset({"google"})
_GUEST_TYPES: Final = frozenset({"google-visitor", "customer-idp"})


class Role(StrEnum):
    """What Google's authorization token lets its bearer do."""

    READER = "reader"
    WRITER = "writer"
    UPGRADER = "upgrader"
    VERIFIER = "verifier"
    MIGRATOR = "migrator"
    DECRYPTER = "decrypter"
    SIGNER = "signer"


class Denial(StrEnum):
    """Why somebody may not. The first is 401: come back with another token; all others are 403."""

    AUTHENTICATION = "authentication-token"
    AUTHORIZATION = "authorization-token"
    USER = "not-the-same-user"
    GUEST = "guest-access"
    ROLE = "role"
    KACLS_URL = "kacls-url"
    OWNER_DOMAIN = "owner-domain"
    DELEGATION = "delegation"
    PERIMETER = "perimeter"
    ADMIN = "admin-list"
    RESOURCE = "resource-name"
    SPKI = "spki-hash"
    ORIGINAL_KACLS = "original-kacls"


class DeniedError(SealgateError):
    """Not for this caller; `cause` says more where there is more, and holds nothing of a token."""

    def __init__(self, why: Denial, cause: str = "") -> None:
        super().__init__(why.value)
        self.why = why
        self.cause = cause or why.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Whom the authentication token is about."""

    email: str
    claims: Claims = field(repr=False)
    is_guest: bool = False

    @property
    def is_delegate(self) -> bool:
        return self.claims.members.get("delegated_to") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What the authorization token says, checked against the endpoint."""

    email: str
    email_type: str
    role: str
    resource_name: str
    perimeter_id: str
    delegated_to: str | None
    claims: Claims = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivilegedCaller:
    """An admin by e-mail address, or another KACLS by URL."""

    name: str
    is_kacls: bool


class Policy:
    """The rules of one endpoint, at one moment. KeysNeededError and KeysUnavailableError pass through."""

    def __init__(self, kacls: Kacls, keys: KeySource, now_s: float) -> None:
        self._kacls = kacls
        self._keys = keys
        self._now_s = now_s

    # Tokens.

    def authenticate(self, token: str) -> Person:
        """The person, guest or not. DeniedError(AUTHENTICATION)."""
        guests = self._kacls.guests
        # Chooses the list; `verify` then holds the token to it.
        is_guest = bool(guests) and unverified_issuer(token) in guests
        try:
            claims = self._verify(token, guests if is_guest else self._kacls.users)
            email = self._email(claims)
        except TokenError as error:
            raise DeniedError(Denial.AUTHENTICATION, error.fault) from None
        return Person(email=email, claims=claims, is_guest=is_guest)

    def authorize(self, token: str, *roles: Role) -> Grant:
        """What Google allows here, in one of *roles* (none given: in any). DeniedError."""
        kacls = self._kacls
        try:
            claims = self._verify(token, kacls.authorization)
            grant = Grant(
                email=_bounded("email", claims.needed("email"), MAX_EMAIL_BYTES),
                email_type=claims.text("email_type") or "google",
                role=claims.text("role") or "",
                resource_name=_bounded("resource_name", claims.needed("resource_name"), MAX_RESOURCE_BYTES),
                perimeter_id=_bounded("perimeter_id", claims.text("perimeter_id") or "", MAX_PERIMETER_BYTES),
                delegated_to=claims.text("delegated_to"),
                claims=claims,
            )
            kacls_url = claims.needed("kacls_url")
            owner_domain = claims.text("kacls_owner_domain")
        except TokenError as error:
            raise DeniedError(Denial.AUTHORIZATION, error.fault) from None
        if normal_url(kacls_url) != kacls.url:
            raise DeniedError(Denial.KACLS_URL)
        ours = kacls.endpoint.owner_domain
        if owner_domain is not None and (ours is None or owner_domain.casefold() != ours.casefold()):
            raise DeniedError(Denial.OWNER_DOMAIN)
        if roles and grant.role not in roles:
            raise DeniedError(Denial.ROLE)
        return grant

    def same_user(self, person: Person, grant: Grant) -> None:
        """DeniedError unless both tokens are about one person, and about one delegation if any."""
        if grant.email_type not in _USER_TYPES | _GUEST_TYPES:
            raise DeniedError(Denial.GUEST, "unknown-email-type")
        if (grant.email_type in _GUEST_TYPES) != person.is_guest:
            raise DeniedError(Denial.GUEST)
        if normal_email(person.email) != normal_email(grant.email):
            raise DeniedError(Denial.USER)

    def same_delegation(self, person: Person, grant: Grant) -> None:
        """DeniedError unless both tokens name the same delegate, or neither names one."""
        theirs = person.claims.members.get("delegated_to")
        if theirs is None and grant.delegated_to is None:
            return
        if (
            not theirs
            or not grant.delegated_to
            or normal_email(theirs) != normal_email(grant.delegated_to)
            or person.claims.members.get("resource_name") != grant.resource_name
        ):
            raise DeniedError(Denial.DELEGATION)

    def may_delegate(self, person: Person, grant: Grant) -> str:
        """To whom. DeniedError; one who acts for another delegates nothing."""
        if person.is_delegate or not grant.delegated_to:
            raise DeniedError(Denial.DELEGATION)
        try:
            return _bounded("delegated_to", grant.delegated_to, MAX_EMAIL_BYTES)
        except TokenError as error:
            raise DeniedError(Denial.AUTHORIZATION, error.fault) from None

    # Where.

    def within(self, person: Person, perimeter_id: str) -> None:
        """DeniedError unless the person's claims meet the perimeter's conditions."""
        conditions = self._kacls.conditions(perimeter_id)
        if conditions is None:
            raise DeniedError(Denial.PERIMETER, "unknown-perimeter")
        for claim, values in conditions.items():
            if _values(person.claims.members.get(claim)).isdisjoint(values):
                raise DeniedError(Denial.PERIMETER)

    def known_perimeter(self, perimeter_id: str) -> None:
        """DeniedError if what is wrapped for it could be opened by nobody."""
        if self._kacls.conditions(perimeter_id) is None:
            raise DeniedError(Denial.PERIMETER, "unknown-perimeter")

    def carried(self, person: Person) -> Mapping[str, Any]:
        """The claims that any perimeter asks about, for a token that stands for this one."""
        names = {claim for claims in self._kacls.endpoint.perimeters.values() for claim in claims}
        members = person.claims.members
        return {name: members[name] for name in sorted(names) if name in members}

    # Without Google's word.

    def privileged(self, token: str, call: Privileged, *, resource_name: str = "") -> PrivilegedCaller:
        """An admin who may make *call*; for `privilegedunwrap` also a KACLS that migrates. DeniedError."""
        sources = self._kacls.sources
        if call is Privileged.UNWRAP and sources and unverified_issuer(token) in sources:
            return self._migrating(token, resource_name)
        person = self.authenticate(token)
        if person.is_guest or person.is_delegate or not self._kacls.may(person.email, call):
            raise DeniedError(Denial.ADMIN)
        return PrivilegedCaller(name=person.email, is_kacls=False)

    def _email(self, claims: Claims) -> str:
        """The address that counts. TokenError if it does not, or if a delegation is not whole (rule 4)."""
        if claims.members.get("email_verified", True) not in (True, "true"):
            raise TokenError(TokenFault.CLAIM, "the identity provider has not verified the address")
        delegated_to, is_ours = claims.text("delegated_to"), claims.issuer.issuer == self._kacls.url
        if (delegated_to is not None or is_ours) and not (delegated_to and claims.text("resource_name")):
            raise TokenError(TokenFault.CLAIM, "a delegated token names whom it is for, and the resource")
        if is_ours and normal_url(claims.needed("kacls_url")) != self._kacls.url:
            raise TokenError(TokenFault.CLAIM, "a delegated token of another KACLS")
        return _bounded("email", claims.text("google_email") or claims.needed("email"), MAX_EMAIL_BYTES)

    def _migrating(self, token: str, resource_name: str) -> PrivilegedCaller:
        try:
            claims = self._verify(token, self._kacls.sources, max_lifetime_s=MIGRATION_LIFETIME_S)
            kacls_url, resource = claims.needed("kacls_url"), claims.needed("resource_name")
        except TokenError as error:
            raise DeniedError(Denial.AUTHENTICATION, error.fault) from None
        if normal_url(kacls_url) != self._kacls.url:
            raise DeniedError(Denial.KACLS_URL)
        if resource != resource_name:
            raise DeniedError(Denial.RESOURCE)
        return PrivilegedCaller(name=claims.issuer.issuer, is_kacls=True)

    def _verify(
        self, token: str, issuers: Mapping[str, Issuer], *, max_lifetime_s: float = float("inf")
    ) -> Claims:
        return verify(
            token, issuers=issuers, keys=self._keys, now_s=self._now_s, max_lifetime_s=max_lifetime_s
        )


def delegation_claims(
    policy: Policy,
    person: Person,
    grant: Grant,
    *,
    url: str,
    delegated_to: str,
    now_s: float,
    lifetime_s: float,
) -> dict[str, Any]:
    """The claims of a token by which *delegated_to* acts for *person* on one resource."""
    return {
        **policy.carried(person),
        "iss": url,
        "aud": DELEGATION_AUDIENCE,
        "email": person.email,
        "delegated_to": delegated_to,
        "resource_name": grant.resource_name,
        "kacls_url": url,
        "iat": int(now_s),
        "exp": int(now_s + lifetime_s),
    }


def _bounded(name: str, text: str, max_bytes: int) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > max_bytes:
        raise TokenError(TokenFault.CLAIM, f"the claim {name} is longer than {max_bytes} bytes")
    return text


def _values(claim: Any) -> frozenset[str]:
    """A claim's values as text; what is neither text, truth value nor a list of texts has none."""
    if isinstance(claim, str):
        return frozenset({claim})
    if isinstance(claim, bool):
        return frozenset({"true" if claim else "false"})
    if isinstance(claim, list):
        return frozenset(one for one in claim if isinstance(one, str))
    return frozenset()
