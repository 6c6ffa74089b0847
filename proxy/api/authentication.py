"""Which key agent speaks, by the certificate of its connection and its own tenant's root."""

import asyncio

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
    try:
        tenant = read_identity(certificate).tenant
        entry = directory.tenants.get(tenant)
        if entry is None:
            raise forbidden("tenant", "This tenant is not provisioned on this proxy.")
        return verify_certificate(
            certificate, root=entry.root_certificate, expected=AnyHolder(tenant, Role.AGENT_TLS), now_s=now_s
        )
    except CertificateError as error:
        raise forbidden(f"certificate-{error.code}", f"The client certificate is refused: {error}.") from None


def forbidden(code: str, cause: str) -> ProblemError:
    """The answer to an agent that may not do this."""
    next_step = "Have the tenant's root certify this agent for TLS, and the tenant provisioned on this proxy."
    return ProblemError(403, code, cause, next_step)
