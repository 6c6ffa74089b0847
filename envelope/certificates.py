"""Who a certificate speaks for: roles under a tenant's root (docs/format.md section 5, "Certificates").

1. All certificates of a tenant hang on one root, so each states its role in exactly one URI SAN; without that
   a network service's key could sign envelopes:
       urn:sealgate:<tenant>:service:<service>     recipient of key material
       urn:sealgate:<tenant>:agent:<id>:signing    signs key-material envelopes
       urn:sealgate:<tenant>:agent:<id>:tls        the agent's mTLS identity
       urn:sealgate:<tenant>:balancer:<id>         a load balancer's companion: it reads and confirms
2. The role fixes what the key may be and do. A service certificate only receives (RSA keyEncipherment, EC
   keyAgreement, no signatures, no TLS purpose: never a reused TLS certificate), a signing certificate only
   signs (ES256, so P-256), a TLS certificate authenticates clients.
3. A chain ends at the one root that is given, not at a store of roots: another tenant's root proves nothing.
4. Path validation is cryptography's (RFC 5280 as profiled by its verifier: names, signatures, validity of
   every certificate, path length, unknown critical extensions). What is ours is rules 1 and 2, and the code.

Revocation lists are not read here: an agent pins the certificate it encrypts to and reads its root's list
(key_agent/push/revocations.py), a proxy drops a signer when its tenant's entry no longer lists it, and
certificates are meant to be short-lived.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, assert_never, override

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
)

from envelope.errors import FormatError, SealgateError
from envelope.keys import check_name

MAX_INTERMEDIATES: Final = 2  # root -> issuing CA -> department: more is a mistake rather than a policy
MIN_RSA_BITS: Final = 2048
RECIPIENT_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)

_PREFIX: Final = "urn:sealgate:"
_URI: Final = re.compile(
    r"urn:sealgate:([^:]+):(?:service:([^:]+)|balancer:([^:]+)|agent:([^:]+):(signing|tls))"
)


class CertificateError(SealgateError):
    """A certificate that must not be believed. `code` is stable and names the rule that refused it.

    "malformed" not readable as a certificate with unambiguous extensions; "identity" not exactly one
    well-formed Sealgate URI; "tenant", "role", "name" another one than expected; "expired", "not-yet-valid";
    "ca" a CA certificate in a leaf's place; "key" wrong type or too weak; "key-usage" the key may do what its
    role must not, or not what it must; "chain" no valid path to the given root.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Role(StrEnum):
    SERVICE = "service"
    AGENT_SIGNING = "agent-signing"
    AGENT_TLS = "agent-tls"
    BALANCER = "balancer"


_NAMED: Final = {Role.SERVICE: "service", Role.BALANCER: "load balancer"}


@dataclass(frozen=True, slots=True)
class Identity:
    """What one certificate speaks for; `name` is the id of a service, an agent or a load balancer."""

    tenant: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        check_name(_NAMED.get(self.role, "agent"), self.name)

    @override
    def __str__(self) -> str:
        return identity_uri(self)


@dataclass(frozen=True, slots=True)
class AnyHolder:
    """Anyone with this role in this tenant: for callers who learn the name from the certificate."""

    tenant: str
    role: Role


def identity_uri(identity: Identity) -> str:
    """The URI SAN that states *identity*."""
    match identity.role:
        case Role.SERVICE:
            return f"{_PREFIX}{identity.tenant}:service:{identity.name}"
        case Role.AGENT_SIGNING:
            return f"{_PREFIX}{identity.tenant}:agent:{identity.name}:signing"
        case Role.AGENT_TLS:
            return f"{_PREFIX}{identity.tenant}:agent:{identity.name}:tls"
        case Role.BALANCER:
            return f"{_PREFIX}{identity.tenant}:balancer:{identity.name}"
        case _:
            assert_never(identity.role)


def parse_identity_uri(uri: str) -> Identity:
    """Inverse of `identity_uri`. CertificateError "identity" for anything else."""
    match = _URI.fullmatch(uri)
    if not match:
        raise CertificateError("identity", f"not the URI of a Sealgate role: {uri!r}")
    tenant, service, balancer, agent, purpose = match.groups()
    if service or balancer:
        role = Role.SERVICE if service else Role.BALANCER
    else:
        role = Role.AGENT_SIGNING if purpose == "signing" else Role.AGENT_TLS
    try:
        return Identity(tenant, role, service or balancer or agent)
    except FormatError as error:
        raise CertificateError("identity", f"{uri!r}: {error}") from error


def read_identity(certificate: x509.Certificate | x509.CertificateSigningRequest) -> Identity:
    """The role that a certificate or CSR states. It proves nothing: see `verify_certificate`.

    URIs of other schemes may stand beside ours. CertificateError "identity" or "malformed".
    """
    extension = _extension(certificate, x509.SubjectAlternativeName)
    uris = extension.get_values_for_type(x509.UniformResourceIdentifier) if extension else []
    # A URN's prefix is case-insensitive (RFC 8141): a second one must not hide behind capitals.
    ours = [uri for uri in uris if uri.lower().startswith(_PREFIX)]
    if len(ours) != 1:
        raise CertificateError("identity", f"{len(ours)} URIs begin with {_PREFIX}, exactly one must")
    return parse_identity_uri(ours[0])


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's DER form (`x5t#S256`), 32 bytes."""
    return certificate.fingerprint(hashes.SHA256())


def verify_certificate(
    certificate: x509.Certificate,
    *,
    root: x509.Certificate,
    intermediates: Sequence[x509.Certificate] = (),
    expected: Identity | AnyHolder,
    now_s: float,
) -> Identity:
    """The identity of *certificate* once everything about it is as *expected* (rules 1 to 4).

    *now_s* is wall-clock time in seconds since the epoch; both ends of a validity belong to it (RFC 5280,
    4.1.2.5).
    CertificateError says with its `code` which rule was broken.
    """
    now = datetime.fromtimestamp(now_s, UTC)
    identity = read_identity(certificate)
    if identity.tenant != expected.tenant:
        raise CertificateError("tenant", f"{identity} is not of tenant {expected.tenant}")
    if identity.role is not expected.role:
        raise CertificateError("role", f"{identity} does not have the role {expected.role}")
    if isinstance(expected, Identity) and identity.name != expected.name:
        raise CertificateError("name", f"{identity} is not {expected}")
    _check_validity(certificate, identity, now)
    _check_leaf(certificate, identity)
    check_public_key(certificate, identity)
    _check_usage(certificate, identity)
    _check_chain(certificate, identity, root, intermediates, now)
    return identity


def check_public_key(
    certificate: x509.Certificate | x509.CertificateSigningRequest, identity: Identity
) -> None:
    """CertificateError "key" unless the public key suits the role (rule 2)."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError("key", f"{identity}: the public key is not readable") from error
    if isinstance(key, rsa.RSAPublicKey):
        if identity.role is Role.AGENT_SIGNING:
            raise CertificateError(
                "key", f"{identity}: envelopes are signed by ES256, so by a P-256 key, not by RSA"
            )
        if key.key_size < MIN_RSA_BITS:
            raise CertificateError(
                "key", f"{identity}: RSA with {key.key_size} bits, at least {MIN_RSA_BITS} must be"
            )
    elif isinstance(key, ec.EllipticCurvePublicKey):
        curves = (ec.SECP256R1,) if identity.role is Role.AGENT_SIGNING else RECIPIENT_CURVES
        if not isinstance(key.curve, curves):
            allowed = " or ".join(curve.name for curve in curves)
            raise CertificateError("key", f"{identity}: curve {key.curve.name}, {allowed} must be")
    else:
        raise CertificateError("key", f"{identity}: neither an RSA nor an EC key")


def key_usage(**allowed: bool) -> x509.KeyUsage:
    """KeyUsage with only the named uses."""
    names = (*_USAGES, "encipher_only", "decipher_only")
    return x509.KeyUsage(**(dict.fromkeys(names, False) | allowed))


def _extension[T: x509.ExtensionType](
    certificate: x509.Certificate | x509.CertificateSigningRequest, kind: type[T]
) -> T | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateError("malformed", f"the extensions are not readable: {error}") from error


def _check_validity(certificate: x509.Certificate, identity: Identity, now: datetime) -> None:
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            "not-yet-valid", f"{identity} is valid from {certificate.not_valid_before_utc.isoformat()}"
        )
    if now > certificate.not_valid_after_utc:
        raise CertificateError(
            "expired", f"{identity} was valid until {certificate.not_valid_after_utc.isoformat()}"
        )


def _check_leaf(certificate: x509.Certificate, identity: Identity) -> None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise CertificateError("ca", f"{identity} stands in a CA certificate")


def _check_usage(certificate: x509.Certificate, identity: Identity) -> None:
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None:
        raise CertificateError("key-usage", f"{identity}: the KeyUsage extension is missing")
    allowed = {name for name in _USAGES if getattr(usage, name)}
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    is_rsa = isinstance(certificate.public_key(), rsa.RSAPublicKey)
    match identity.role:
        case Role.SERVICE:
            required = {"key_encipherment"} if is_rsa else {"key_agreement"}
            excess = allowed - required
        case Role.AGENT_SIGNING:
            required = {"digital_signature"}
            excess = allowed - required - {"content_commitment"}
        case Role.AGENT_TLS | Role.BALANCER:
            required = {"digital_signature"}
            # Issuers commonly add the key exchange of older TLS versions; it gives this role nothing.
            excess = allowed - required - {"key_encipherment", "key_agreement"}
            if purposes is None or ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
                raise CertificateError(
                    "key-usage", f"{identity}: the extended key usage clientAuth is missing"
                )
        case _:
            assert_never(identity.role)
    if required - allowed:
        raise CertificateError("key-usage", f"{identity}: KeyUsage lacks {', '.join(sorted(required))}")
    if excess:
        raise CertificateError("key-usage", f"{identity}: KeyUsage must not have {', '.join(sorted(excess))}")
    if (
        identity.role not in (Role.AGENT_TLS, Role.BALANCER)
        and purposes is not None
        and not _TLS_PURPOSES.isdisjoint(purposes)
    ):
        raise CertificateError(
            "key-usage", f"{identity}: a certificate for TLS must not be used for this as well"
        )


# encipher_only and decipher_only only mean something beside key_agreement and are narrowings of it.
_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_TLS_PURPOSES: Final = frozenset(
    {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    }
)


# The web-PKI profile is too narrow for leaves: it wants an authority key identifier and, for this verifier,
# the purpose clientAuth. What it would say of KeyUsage, SAN and purposes, rules 1 and 2 say for each role.
_LEAF_POLICY: Final = ExtensionPolicy.permit_all()
# ... and for CAs only in this: not every enterprise root has a subject key identifier.
_CA_POLICY: Final = ExtensionPolicy.webpki_defaults_ca().may_be_present(
    x509.SubjectKeyIdentifier, Criticality.NON_CRITICAL, None
)


def _check_chain(
    certificate: x509.Certificate,
    identity: Identity,
    root: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    now: datetime,
) -> None:
    # A verifier keeps the moment it was built for, so each check builds its own.
    verifier = (
        PolicyBuilder()
        .store(Store([root]))
        .time(now)
        .max_chain_depth(MAX_INTERMEDIATES)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
        .build_client_verifier()
    )
    try:
        verifier.verify(certificate, list(intermediates))
    except Exception as error:
        # VerificationError, mostly; where that would quote a name of an unknown string type, KeyError.
        raise CertificateError("chain", f"{identity} does not chain to its tenant's root: {error}") from error
