"""A development PKI: tenant root -> network-service, agent-signing and mTLS certificates, made at run time.

    python -m certs.pki root --tenant acme --out DIR            DIR/root.pem, DIR/root.key
    python -m certs.pki sign-service --root DIR --csr FILE --out FILE
    python -m certs.pki agent --root DIR --agent hq --out DIR   DIR/signing.{pem,key}, DIR/tls.{pem,key}
    python -m certs.pki server-ca --name NAME --out DIR         DIR/ca.pem, DIR/ca.key
    python -m certs.pki server --ca DIR --name localhost [--name 127.0.0.1] --out DIR   DIR/server.{pem,key}
    python -m certs.pki interception-ca --tenant acme --out DIR DIR/interception-ca.{pem,key}

1. For development, demos and tests. What a production PKI must put into the certificates: certs/README.md.
2. Every key made here is EC P-256; a service's key comes with its CSR (RSA or EC) and never travels.
3. A root signs only for its own tenant (its organisation name), and checks the CSR's signature, role and key.
4. Private keys are written once, mode 0600, never over an existing file.
"""

import argparse
import ipaddress
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from envelope.certificates import (
    CertificateError,
    Identity,
    Role,
    check_public_key,
    identity_uri,
    key_usage,
    read_identity,
)
from envelope.errors import FormatError
from envelope.keys import check_name

CA_VALIDITY: Final = timedelta(days=3650)
LEAF_VALIDITY: Final = timedelta(days=365)
# A clock that is a little behind must not find a fresh certificate invalid.
BACKDATING: Final = timedelta(minutes=5)

type PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class PkiError(Exception):
    """What was asked for cannot be issued; the text says why."""


class Credential(NamedTuple):
    """A private key with the certificate of its public key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def certify(
    public_key: PublicKey,
    *,
    subject: x509.Name,
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
    issuer: Credential | None = None,
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
    valid_from: datetime | None = None,
    validity: timedelta,
) -> x509.Certificate:
    """A certificate for *public_key*, signed by *issuer* or, for a root, by its own *issuer_key*.

    *extensions* are (value, critical) pairs; key identifiers are added.
    """
    signing_key = issuer.key if issuer else issuer_key
    if signing_key is None:
        raise PkiError("nobody to sign: give issuer or issuer_key")
    begin = valid_from or datetime.now(UTC) - BACKDATING
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + validity)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False
        )
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    return builder.sign(signing_key, hashes.SHA256())


def name(common_name: str, organisation: str | None = None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organisation is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    return x509.Name(attributes)


def make_ca(
    subject: x509.Name,
    *,
    path_length: int | None = 0,
    issuer: Credential | None = None,
    valid_from: datetime | None = None,
    validity: timedelta = CA_VALIDITY,
) -> Credential:
    """A CA: self-signed, or below *issuer*."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(
        key.public_key(),
        subject=subject,
        issuer=issuer,
        issuer_key=key,
        valid_from=valid_from,
        validity=validity,
        extensions=[
            (x509.BasicConstraints(ca=True, path_length=path_length), True),
            (key_usage(key_cert_sign=True, crl_sign=True), True),
        ],
    )
    return Credential(key, certificate)


def make_root(
    tenant: str, *, valid_from: datetime | None = None, validity: timedelta = CA_VALIDITY
) -> Credential:
    """The root of one tenant. FormatError if *tenant* is not a valid id."""
    check_name("tenant", tenant)
    subject = name(f"{tenant} Sealgate root", tenant)
    return make_ca(subject, valid_from=valid_from, validity=validity)


def tenant_of(root: x509.Certificate) -> str:
    """The tenant that a root made by `make_root` belongs to; PkiError for another certificate."""
    organisations = root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if len(organisations) != 1:
        raise PkiError("not a tenant's root of this development PKI: it names no single organisation")
    return check_name("tenant", str(organisations[0].value))


def sign_service_csr(
    root: Credential,
    csr: x509.CertificateSigningRequest,
    validity: timedelta = LEAF_VALIDITY,
    *,
    valid_from: datetime | None = None,
) -> x509.Certificate:
    """The certificate of the network service that *csr* names.

    PkiError unless the CSR is signed by its own key, states the role service of the root's tenant, and has a
    key that may receive key material.
    """
    if not csr.is_signature_valid:
        raise PkiError("the CSR is not signed by its own key")
    tenant = tenant_of(root.certificate)
    try:
        identity = read_identity(csr)
        check_public_key(csr, identity)
    except CertificateError as error:
        raise PkiError(f"CSR refused: {error}") from error
    if identity.role is not Role.SERVICE:
        raise PkiError(f"CSR refused: {identity} is not a network service")
    if identity.tenant != tenant:
        raise PkiError(f"CSR refused: {identity} is not of tenant {tenant}, whose root this is")
    public_key = csr.public_key()
    if isinstance(public_key, rsa.RSAPublicKey):
        usage = key_usage(key_encipherment=True)
    elif isinstance(public_key, ec.EllipticCurvePublicKey):
        usage = key_usage(key_agreement=True)
    else:
        raise PkiError("CSR refused: neither an RSA nor an EC key")  # check_public_key said so before
    return certify(
        public_key,
        subject=name(f"{identity.tenant}/{identity.name}", tenant),
        issuer=root,
        valid_from=valid_from,
        validity=validity,
        extensions=[*_leaf_extensions(identity), (usage, True)],
    )


def issue_agent_signing(
    root: Credential,
    tenant: str,
    agent_id: str,
    *,
    valid_from: datetime | None = None,
    validity: timedelta = LEAF_VALIDITY,
) -> Credential:
    """The key and certificate by which an agent signs key-material envelopes."""
    identity = Identity(tenant, Role.AGENT_SIGNING, agent_id)
    extensions = [(key_usage(digital_signature=True), True)]
    return _issue_agent(root, identity, extensions, valid_from=valid_from, validity=validity)


def issue_agent_tls(
    root: Credential,
    tenant: str,
    agent_id: str,
    *,
    hostnames: Sequence[str] = (),
    valid_from: datetime | None = None,
    validity: timedelta = LEAF_VALIDITY,
) -> Credential:
    """The credential by which an agent authenticates at a proxy; *hostnames* if it serves peers as well."""
    identity = Identity(tenant, Role.AGENT_TLS, agent_id)
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if hostnames:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    extensions = [(key_usage(digital_signature=True), True), (x509.ExtendedKeyUsage(purposes), False)]
    return _issue_agent(
        root, identity, extensions, valid_from=valid_from, validity=validity, hostnames=hostnames
    )


def issue_balancer(
    root: Credential,
    tenant: str,
    balancer_id: str,
    *,
    valid_from: datetime | None = None,
    validity: timedelta = LEAF_VALIDITY,
) -> Credential:
    """The credential by which a load balancer's companion authenticates at the agents."""
    identity = Identity(tenant, Role.BALANCER, balancer_id)
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    extensions = [(key_usage(digital_signature=True), True), (purposes, False)]
    return _issue_agent(root, identity, extensions, valid_from=valid_from, validity=validity)


def make_server_ca(
    common_name: str, *, valid_from: datetime | None = None, validity: timedelta = CA_VALIDITY
) -> Credential:
    """A CA for TLS servers (proxies' push endpoints, demo storage); it belongs to no tenant."""
    return make_ca(name(common_name), valid_from=valid_from, validity=validity)


def make_interception_ca(
    tenant: str, *, valid_from: datetime | None = None, validity: timedelta = CA_VALIDITY
) -> Credential:
    """The CA under which a forward proxy answers for the services of *tenant*; its clients trust it."""
    check_name("tenant", tenant)
    return make_ca(name(f"{tenant} Sealgate interception CA"), valid_from=valid_from, validity=validity)


def issue_server(
    ca: Credential,
    hostnames: Sequence[str],
    *,
    valid_from: datetime | None = None,
    validity: timedelta = LEAF_VALIDITY,
) -> Credential:
    """The key and certificate of a TLS server; *hostnames* are DNS names or IP addresses."""
    if not hostnames:
        raise PkiError("a server's certificate needs at least one host name")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(
        key.public_key(),
        subject=name(hostnames[0][:64]),
        issuer=ca,
        valid_from=valid_from,
        validity=validity,
        extensions=[
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName([_host(hostname) for hostname in hostnames]), False),
            (key_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        ],
    )
    return Credential(key, certificate)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_credential(credential: Credential, directory: Path, stem: str) -> tuple[Path, Path]:
    """Write `<stem>.pem` and `<stem>.key` (0600), return their paths. FileExistsError if one is there."""
    directory.mkdir(parents=True, exist_ok=True)
    certificate_file, key_file = directory / f"{stem}.pem", directory / f"{stem}.key"
    _write_new(key_file, key_pem(credential.key), mode=0o600)
    _write_new(certificate_file, certificate_pem(credential.certificate), mode=0o644)
    return certificate_file, key_file


def read_credential(directory: Path, stem: str) -> Credential:
    """Inverse of `write_credential`. PkiError if a file is missing, unreadable, or not of the other."""
    certificate_file, key_file = directory / f"{stem}.pem", directory / f"{stem}.key"
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise PkiError(f"{directory}: no usable {stem}.pem with {stem}.key ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise PkiError(f"{directory}: {stem}.key is not the key of {stem}.pem")
    return Credential(key, certificate)


def _issue_agent(
    root: Credential,
    identity: Identity,
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
    *,
    valid_from: datetime | None,
    validity: timedelta,
    hostnames: Sequence[str] = (),
) -> Credential:
    if identity.tenant != (tenant := tenant_of(root.certificate)):
        raise PkiError(f"{identity} is not of tenant {tenant}, whose root this is")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(
        key.public_key(),
        subject=name(f"{identity.name} {identity.role}", identity.tenant),
        issuer=root,
        valid_from=valid_from,
        validity=validity,
        extensions=[*_leaf_extensions(identity, hostnames), *extensions],
    )
    return Credential(key, certificate)


def _leaf_extensions(
    identity: Identity, hostnames: Sequence[str] = ()
) -> list[tuple[x509.ExtensionType, bool]]:
    names = [x509.UniformResourceIdentifier(identity_uri(identity)), *map(_host, hostnames)]
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName(names), False),
    ]


def _host(hostname: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(hostname))
    except ValueError:
        return x509.DNSName(hostname)


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m certs.pki", description="Sealgate's development PKI.")
    commands = parser.add_subparsers(dest="command", required=True)

    root = commands.add_parser("root", help="make a tenant's root")
    root.add_argument("--tenant", required=True)
    root.add_argument("--out", type=Path, required=True, help="directory for root.pem and root.key")

    service = commands.add_parser("sign-service", help="sign the CSR that `sealgate service add` wrote")
    service.add_argument("--root", type=Path, required=True, help="directory of root.pem and root.key")
    service.add_argument("--csr", type=Path, required=True)
    service.add_argument("--days", type=int, default=LEAF_VALIDITY.days)
    service.add_argument("--out", type=Path, required=True, help="file for the certificate")

    agent = commands.add_parser("agent", help="make an agent's signing and TLS credentials")
    agent.add_argument("--root", type=Path, required=True, help="directory of root.pem and root.key")
    agent.add_argument("--agent", required=True, help="agent id")
    agent.add_argument("--host", action="append", default=[], help="name it serves peers under; repeatable")
    agent.add_argument("--out", type=Path, required=True, help="directory for signing.* and tls.*")

    balancer = commands.add_parser("balancer", help="make the credential of a load balancer's companion")
    balancer.add_argument("--root", type=Path, required=True, help="directory of root.pem and root.key")
    balancer.add_argument("--id", required=True, help="as in its settings: lb_agent.id")
    balancer.add_argument("--out", type=Path, required=True, help="directory for tls.pem and tls.key")

    server_ca = commands.add_parser("server-ca", help="make a CA for TLS servers")
    server_ca.add_argument("--name", default="Sealgate development servers")
    server_ca.add_argument("--out", type=Path, required=True, help="directory for ca.pem and ca.key")

    server = commands.add_parser("server", help="make a TLS server's credential")
    server.add_argument("--ca", type=Path, required=True, help="directory of ca.pem and ca.key")
    server.add_argument("--name", action="append", required=True, help="DNS name or IP address; repeatable")
    server.add_argument("--out", type=Path, required=True, help="directory for server.pem and server.key")

    interception = commands.add_parser("interception-ca", help="make the CA of a tenant's forward proxy")
    interception.add_argument("--tenant", required=True)
    interception.add_argument("--out", type=Path, required=True, help="directory for interception-ca.*")
    return parser


def _run(arguments: argparse.Namespace) -> list[Path]:
    """Carry out one command; the files it wrote."""
    match arguments.command:
        case "root":
            return [*write_credential(make_root(arguments.tenant), arguments.out, "root")]
        case "sign-service":
            try:
                csr = x509.load_pem_x509_csr(arguments.csr.read_bytes())
            except ValueError as error:
                raise PkiError(f"{arguments.csr}: not a CSR in PEM form") from error
            root = read_credential(arguments.root, "root")
            certificate = sign_service_csr(root, csr, timedelta(days=arguments.days))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_bytes(certificate_pem(certificate))
            return [arguments.out]
        case "agent":
            root = read_credential(arguments.root, "root")
            tenant = tenant_of(root.certificate)
            signing = issue_agent_signing(root, tenant, arguments.agent)
            tls = issue_agent_tls(root, tenant, arguments.agent, hostnames=arguments.host)
            return [
                *write_credential(signing, arguments.out, "signing"),
                *write_credential(tls, arguments.out, "tls"),
            ]
        case "balancer":
            root = read_credential(arguments.root, "root")
            companion = issue_balancer(root, tenant_of(root.certificate), arguments.id)
            return [*write_credential(companion, arguments.out, "tls")]
        case "server-ca":
            return [*write_credential(make_server_ca(arguments.name), arguments.out, "ca")]
        case "server":
            ca = read_credential(arguments.ca, "ca")
            return [*write_credential(issue_server(ca, arguments.name), arguments.out, "server")]
        case _:
            ca = make_interception_ca(arguments.tenant)
            return [*write_credential(ca, arguments.out, "interception-ca")]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with the reason on stderr (2 for wrong usage, by argparse)."""
    arguments = _parser().parse_args(argv)
    try:
        written = _run(arguments)
    except FileExistsError as error:
        print(f"error: {error.filename} exists\n  next: choose another --out, or remove it", file=sys.stderr)
        return 1
    except (PkiError, FormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
