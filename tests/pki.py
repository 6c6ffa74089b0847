"""Certificates for tests, in memory and made at run time by the functions of certs/pki.py.

    acme = make_tenant("acme")
    acme.root.certificate
    service = acme.service("s3")                       # (key, certificate); RSA: key_type="rsa-2048"
    signing, tls = acme.agent_signing("hq"), acme.agent_tls("hq")
    ca = make_server_ca(); server = issue_server(ca, ["localhost", "127.0.0.1"])
    certificate_file, key_file = write_credential(server, tmp_path, "server")

Everything is valid from 2020 until 2049: real TLS and `tests.fakes.clock.ManualClock` both find it valid.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certs import pki
from certs.pki import Credential
from envelope.certificates import Identity, Role, identity_uri

VALID_FROM: Final = datetime(2020, 1, 1, tzinfo=UTC)
VALIDITY: Final = timedelta(days=29 * 365)

type PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class ServiceCredential(NamedTuple):
    """A network service's private key and certificate."""

    key: PrivateKey
    certificate: x509.Certificate


@functools.cache
def rsa_key(bits: int = 2048, number: int = 0) -> rsa.RSAPrivateKey:
    """RSA keys are slow to make: one per size and *number* and test process."""
    del number
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def new_key(key_type: str = "p256") -> PrivateKey:
    """A key of type p256, p384, rsa-2048, rsa-3072 ..."""
    match key_type.split("-"):
        case ["p256"]:
            return ec.generate_private_key(ec.SECP256R1())
        case ["p384"]:
            return ec.generate_private_key(ec.SECP384R1())
        case ["rsa", bits]:
            return rsa_key(int(bits))
    raise ValueError(key_type)


def make_csr(key: PrivateKey, uris: Iterable[str]) -> x509.CertificateSigningRequest:
    """A request signed by *key* for the URI SANs *uris*."""
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    builder = x509.CertificateSigningRequestBuilder().subject_name(pki.name("csr"))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    root: Credential = field(repr=False)

    def service(
        self, service: str = "s3", *, key_type: str = "p256", key: PrivateKey | None = None
    ) -> ServiceCredential:
        """Key and certificate of the network service `<tenant>/<service>`, by way of a CSR."""
        key = key or new_key(key_type)
        csr = make_csr(key, [identity_uri(Identity(self.name, Role.SERVICE, service))])
        return ServiceCredential(key, pki.sign_service_csr(self.root, csr, VALIDITY, valid_from=VALID_FROM))

    def agent_signing(self, agent_id: str = "hq") -> Credential:
        return pki.issue_agent_signing(
            self.root, self.name, agent_id, valid_from=VALID_FROM, validity=VALIDITY
        )

    def agent_tls(self, agent_id: str = "hq", *, hostnames: Iterable[str] = ()) -> Credential:
        return pki.issue_agent_tls(
            self.root,
            self.name,
            agent_id,
            hostnames=tuple(hostnames),
            valid_from=VALID_FROM,
            validity=VALIDITY,
        )

    def balancer(self, balancer_id: str = "lb-1") -> Credential:
        return pki.issue_balancer(self.root, self.name, balancer_id, valid_from=VALID_FROM, validity=VALIDITY)


def make_tenant(name: str = "acme") -> Tenant:
    return Tenant(name, pki.make_root(name, valid_from=VALID_FROM, validity=VALIDITY))


def make_server_ca(common_name: str = "test servers") -> Credential:
    return pki.make_server_ca(common_name, valid_from=VALID_FROM, validity=VALIDITY)


def make_interception_ca(tenant: str = "acme") -> Credential:
    return pki.make_interception_ca(tenant, valid_from=VALID_FROM, validity=VALIDITY)


def issue_server(ca: Credential, hostnames: Iterable[str] = ("localhost", "127.0.0.1")) -> Credential:
    return pki.issue_server(ca, tuple(hostnames), valid_from=VALID_FROM, validity=VALIDITY)


def resigned(certificate: x509.Certificate, issuer: Credential, change: Callable[[bytearray], None]) -> bytes:
    """The DER of *certificate*, signed anew by P-256, after *change* has exchanged bytes of its body."""
    body = bytearray(certificate.tbs_certificate_bytes)
    change(body)
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    signature = issuer.key.sign(bytes(body), ec.ECDSA(hashes.SHA256()))
    whole = bytes(body) + algorithm + bytes((0x03, len(signature) + 1, 0)) + signature
    return b"\x30\x82" + len(whole).to_bytes(2) + whole


def of_unknown_version(certificate: x509.Certificate, issuer: Credential) -> bytes:
    """As *certificate*, but of version 10: OpenSSL takes it, `cryptography` raises InvalidVersion."""

    def change(body: bytearray) -> None:
        body[body.index(bytes.fromhex("a003020102")) + 4] = 9

    return resigned(certificate, issuer, change)


def with_unknown_string(certificate: x509.Certificate, issuer: Credential) -> x509.Certificate:
    """As *certificate*, but its common name is a REAL: OpenSSL takes it, `cryptography` cannot read it.

    It is verified all the same; where that fails, the error that would quote the name is a KeyError.
    """
    (name,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    text = str(name.value).encode()

    def change(body: bytearray) -> None:
        body[body.index(bytes((len(text),)) + text) - 1] = 0x09  # the first: names of hosts follow it

    return x509.load_der_x509_certificate(resigned(certificate, issuer, change))


def write_credential(
    credential: Credential | ServiceCredential, directory: Path, stem: str
) -> tuple[Path, Path]:
    """Write `<stem>.pem` and `<stem>.key` (0600); returns (certificate file, key file)."""
    certificate_file, key_file = directory / f"{stem}.pem", directory / f"{stem}.key"
    key_file.touch(mode=0o600, exist_ok=False)
    key_file.write_bytes(pki.key_pem(credential.key))
    certificate_file.write_bytes(pki.certificate_pem(credential.certificate))
    return certificate_file, key_file


def write_certificate(certificate: x509.Certificate, path: Path) -> Path:
    path.write_bytes(pki.certificate_pem(certificate))
    return path
