"""Whose user is it: from a listener and what a client shows to one tenant, or to a refusal. Pure.

1. Proofs are judged before anything else the client says. A wrong one is refused even where none is asked
   for: who shows credentials means to be known by them.
2. What a client shows must name one tenant. Two proofs that name two are refused.
3. The order: certificate and credentials, then the listener if it is one tenant's alone, then the narrowest
   source network. Nothing left: 407.
4. Comparing a password takes the same time whether the name exists or not.
5. An identity is asked again when the directory has changed (`still_holds`): a user who was removed is cut.
"""

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, override

from cryptography import x509
from cryptography.x509 import verification

from proxy import refusals
from proxy.refusals import Refusal, RefusedError
from proxy.users.model import Address, Network, Proof, UserAccess, Users, prefix_length, verifier_of

_MAX_CREDENTIALS: Final = 1024
_NOBODY: Final = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a client has shown so far."""

    address: Address
    certificate: x509.Certificate | None = None
    """Of the TLS connection to the proxy itself; its key was proven in the handshake, nothing else."""
    intermediates: tuple[x509.Certificate, ...] = ()
    authorization: tuple[str, ...] = field(default=(), repr=False)
    """All Proxy-Authorization fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The tenant a client belongs to, and how that is known."""

    tenant: str
    user: str | None = None
    verifier: bytes | None = field(default=None, repr=False)
    certificate: x509.Certificate | None = None
    intermediates: tuple[x509.Certificate, ...] = ()
    address: Address

    @property
    def name(self) -> str | None:
        """For the audit log: the user's name, or the subject of the certificate."""
        if self.user is not None:
            return self.user
        return None if self.certificate is None else self.certificate.subject.rfc4514_string()[:128]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthenticationRefusal(Refusal):
    """407, with the challenge (RFC 9110 11.7.1)."""

    realm: str

    @classmethod
    def of(cls, base: Refusal, realm: str) -> "AuthenticationRefusal":
        return cls(
            code=base.code, status=base.status, cause=base.cause, next_step=base.next_step, realm=realm
        )

    @override
    def headers(self) -> list[tuple[str, str]]:
        challenge = f'Basic realm="{self.realm}", charset="UTF-8"'
        return [*Refusal.headers(self), ("Proxy-Authenticate", challenge)]


def identify(candidates: Mapping[str, UserAccess], shown: Shown, users: Users, *, now_s: float) -> Identity:
    """The tenant among *candidates* (those of the listener, by id) whose user this is. RefusedError."""
    realm = f"Sealgate {next(iter(candidates))}" if len(candidates) == 1 else "Sealgate"
    user = _user(candidates, shown, users, realm, now_s)
    vouching = _vouching(candidates, shown, now_s)
    if shown.certificate is not None and not vouching:
        raise RefusedError(refusals.USER_CERTIFICATE)
    named = {user[0]} if user is not None else set[str]()
    if vouching:
        named = named & vouching if named else vouching
        if not named:
            raise RefusedError(refusals.USER_MISMATCH)
    tenant = _one(candidates, named, shown)
    if tenant is None:
        raise RefusedError(AuthenticationRefusal.of(refusals.PROXY_AUTHENTICATION, realm))
    access = candidates[tenant]
    if not access.permits(shown.address):
        raise RefusedError(refusals.USER_NETWORK)
    if Proof.CREDENTIALS in access.requires and user is None:
        raise RefusedError(AuthenticationRefusal.of(refusals.PROXY_AUTHENTICATION, realm))
    if Proof.CERTIFICATE in access.requires and not vouching:
        raise RefusedError(refusals.USER_CERTIFICATE)
    return Identity(
        tenant=tenant,
        user=user[1] if user is not None else None,
        verifier=users[user].verifier if user is not None else None,
        certificate=shown.certificate,
        intermediates=shown.intermediates,
        address=shown.address,
    )


def still_holds(identity: Identity, access: UserAccess, users: Users, *, now_s: float) -> bool:
    """Whether *identity* would be given again under the rules of now."""
    if not access.permits(identity.address):
        return False
    if identity.user is not None:
        entry = users.get((identity.tenant, identity.user))
        if entry is None or entry.verifier != identity.verifier or _is_over(entry.not_after_s, now_s):
            return False
    elif Proof.CREDENTIALS in access.requires:
        return False
    if identity.certificate is not None:
        return vouches(access.client_roots, identity.certificate, identity.intermediates, now_s=now_s)
    return Proof.CERTIFICATE not in access.requires


def vouches(
    roots: Sequence[x509.Certificate],
    certificate: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    *,
    now_s: float,
) -> bool:
    """Whether one of *roots* vouches for a client by this certificate (RFC 5280, extended key usage too).

    Nobody does for one whose subject cannot be read: it is the user's name in the audit log.
    """
    if not roots:
        return False
    try:
        verifier = (
            verification.PolicyBuilder()
            .store(verification.Store(list(roots)))
            .time(datetime.fromtimestamp(now_s, UTC))
            .build_client_verifier()
        )
        verifier.verify(certificate, list(intermediates))
        certificate.subject.rfc4514_string()
    except Exception:  # noqa: BLE001 - VerificationError, ValueError, KeyError: the issuer chooses what is in it
        return False
    return True


def _user(
    candidates: Iterable[str], shown: Shown, users: Users, realm: str, now_s: float
) -> tuple[str, str] | None:
    if not shown.authorization:
        return None
    refused = RefusedError(AuthenticationRefusal.of(refusals.PROXY_CREDENTIALS, realm))
    text, password = _basic(shown.authorization, refused)
    tenant, slash, name = text.partition("/")
    if not slash:
        allowed = list(candidates)
        tenant, name = (allowed[0] if len(allowed) == 1 else "", text)
    entry = users.get((tenant, name)) if tenant in candidates else None
    given = verifier_of(tenant, name, password)
    is_right = hmac.compare_digest(given, entry.verifier if entry is not None else _NOBODY)
    if entry is None or not is_right or _is_over(entry.not_after_s, now_s):
        raise refused
    return tenant, name


def _basic(fields: Sequence[str], refused: RefusedError) -> tuple[str, bytes]:
    """Name and password of RFC 7617 credentials, which may be wrong in any way."""
    scheme, _, encoded = fields[0].partition(" ")
    if len(fields) != 1 or scheme.lower() != "basic" or len(encoded) > _MAX_CREDENTIALS:
        raise refused
    try:
        pair = base64.b64decode(encoded.strip(" "), validate=True)
        name, colon, password = pair.partition(b":")
        text = name.decode()
    except (binascii.Error, ValueError):
        raise refused from None
    if not colon:
        raise refused
    return text, password


def _vouching(candidates: Mapping[str, UserAccess], shown: Shown, now_s: float) -> set[str]:
    """The tenants whose authorities vouch for the client's certificate."""
    if shown.certificate is None:
        return set()
    return {
        tenant
        for tenant, access in candidates.items()
        if vouches(access.client_roots, shown.certificate, shown.intermediates, now_s=now_s)
    }


def _one(candidates: Mapping[str, UserAccess], named: set[str], shown: Shown) -> str | None:
    if len(named) == 1:
        return next(iter(named))
    left = {tenant: access for tenant, access in candidates.items() if not named or tenant in named}
    if len(left) == 1 and len(candidates) == 1:
        return next(iter(left))
    lengths = {tenant: _narrowness(access.networks, shown.address) for tenant, access in left.items()}
    best = max(lengths.values(), default=-1)
    nearest = [tenant for tenant, length in lengths.items() if length == best]
    return nearest[0] if best >= 0 and len(nearest) == 1 else None


def _narrowness(networks: Iterable[Network], address: Address) -> int:
    length = prefix_length(networks, address)
    return -1 if length is None else length


def _is_over(not_after_s: float | None, now_s: float) -> bool:
    return not_after_s is not None and now_s >= not_after_s


def address_of(text: str) -> Address:
    """Of a peer name; a link-local address without its zone. RefusedError if it is none."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        raise RefusedError(refusals.USER_NETWORK) from None
