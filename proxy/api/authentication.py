"""Which key agent speaks, by the certificate of its connection and its own tenant's root.

1. It is asked at every request: the tenant as the directory has it now, its root as it is now, and the dates
   of both certificates by the clock as it is now.
2. What cannot change is worked out once: that this root signed this certificate, and for which role. Only
   what was found good is remembered, so a refusal is always the full check's.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache
from cryptography import x509

from envelope.certificates import (
    AnyHolder,
    CertificateError,
    Identity,
    Role,
    read_identity,
    verify_certificate,
)
from proxy.tenants.model import Directory
from runtime.serve import ProblemError
from runtime.tls import peer_certificate

REMEMBERED: Final = 1024
"""Certificates, of all tenants: whose is pushed out is checked in full again."""


@dataclass(frozen=True, slots=True)
class _Verified:
    """A certificate that *root* vouches for, from and until (Unix seconds, both included)."""

    identity: Identity
    root: x509.Certificate
    from_s: float
    until_s: float


_verified: Final[LRUCache[x509.Certificate, _Verified]] = LRUCache(maxsize=REMEMBERED)
"""By the whole certificate. Both certificates alone decide what is in it: any directory may use it."""


def peer_of(transport: asyncio.BaseTransport | None, directory: Directory, *, now_s: float) -> Identity:
    """The agent at the other end, as `authenticate` says."""
    try:
        certificate = peer_certificate(transport)
    except ValueError:  # OpenSSL has taken it: it is less strict about DER
        raise forbidden("certificate-malformed", "The client certificate is not readable.") from None
    return authenticate(certificate, directory, now_s=now_s)


def authenticate(certificate: x509.Certificate | None, directory: Directory, *, now_s: float) -> Identity:
    """The agent this TLS certificate speaks for, by its own tenant's root. ProblemError 403 otherwise."""
    if certificate is None:
        raise forbidden("no-certificate", "The connection has no client certificate.")
    known = _verified.get(certificate)
    try:
        tenant = read_identity(certificate).tenant if known is None else known.identity.tenant
        entry = directory.tenants.get(tenant)
        if entry is None:
            raise forbidden("tenant", "This tenant is not provisioned on this proxy.")
        root = entry.root_certificate
        if known is not None and known.root == root and known.from_s <= now_s <= known.until_s:
            return known.identity
        identity = verify_certificate(
            certificate, root=root, expected=AnyHolder(tenant, Role.AGENT_TLS), now_s=now_s
        )
    except CertificateError as error:
        raise forbidden(f"certificate-{error.code}", f"The client certificate is refused: {error}.") from None
    _verified[certificate] = _Verified(
        identity,
        root,
        from_s=max(one.not_valid_before_utc.timestamp() for one in (certificate, root)),
        until_s=min(one.not_valid_after_utc.timestamp() for one in (certificate, root)),
    )
    return identity


def forbidden(code: str, cause: str) -> ProblemError:
    """The answer to an agent that may not do this."""
    next_step = "Have the tenant's root certify this agent for TLS, and the tenant provisioned on this proxy."
    return ProblemError(403, code, cause, next_step)
