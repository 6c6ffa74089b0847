"""A proxy's directory and real agents in memory: what tests of the push path start from."""

import itertools
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs import pki as dev_pki
from certs.pki import Credential
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.material import Claims, Operation, seal_envelope
from proxy.tenants.model import (
    CertificateFiles,
    Directory,
    LegacyPolicy,
    ServiceEntry,
    TenantEntry,
    Upstream,
)
from tests.fakes.clock import ManualClock
from tests.pki import ServiceCredential, Tenant, make_tenant, write_credential

PROXY_ID = "proxy-1"
VALIDITY_S = 330


@dataclass
class HostedTenant:
    """A tenant with its services on this proxy and one agent."""

    pki: Tenant
    agent_id: str
    services: dict[str, ServiceCredential]
    signing: Credential
    tls: Credential
    tls_files: tuple[Path, Path]
    entries: list[ServiceEntry]
    versions: dict[KeyId, int] = field(default_factory=dict)
    _sequence: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1_000_000))

    @property
    def name(self) -> str:
        return self.pki.name

    def owner(self, service: str = "drive") -> NetworkService:
        return NetworkService(self.name, service)

    def entry(self, *, signers: tuple[x509.Certificate, ...] = ()) -> TenantEntry:
        nowhere = Path("/nonexistent")
        return TenantEntry(
            tenant=self.name,
            root_certificate=self.pki.root.certificate,
            forward_listen=None,
            tunnel_hosts=frozenset(),
            interception_ca=CertificateFiles(certificate_file=nowhere, key_file=nowhere),
            signers=signers,
        )

    def next_sequence(self) -> int:
        return next(self._sequence)

    def seal(
        self,
        clock: ManualClock,
        challenge: bytes | None,
        *keys: KeyMaterial,
        service: str = "drive",
        operation: Operation = Operation.SET,
        sequence: int | None = None,
        audience: str = PROXY_ID,
        validity_s: int = VALIDITY_S,
        issued_at_s: int | None = None,
        token_id: bytes | None = None,
        recipient: x509.Certificate | None = None,
        signing: Credential | None = None,
        issuer: str | None = None,
    ) -> str:
        """An envelope of this tenant's agent, right unless told otherwise."""
        now_s = int(clock.wall_s()) if issued_at_s is None else issued_at_s
        signer = signing or self.signing
        claims = Claims(
            issuer=issuer or self.agent_id,
            audience=audience,
            owner=self.owner(service),
            issued_at_s=now_s,
            expires_at_s=now_s + validity_s,
            sequence=self.next_sequence() if sequence is None else sequence,
            token_id=token_id or os.urandom(16),
            nonce=challenge,
            operation=operation,
            keys=keys,
        )
        return seal_envelope(
            claims,
            recipient=recipient or self.services[service].certificate,
            signing_key=signer.key,
            signing_certificate=signer.certificate,
        )

    def key(
        self,
        state: KeyState = KeyState.ACTIVE,
        *,
        service: str = "drive",
        key_id: KeyId | None = None,
        secret: bytes | None = None,
    ) -> KeyMaterial:
        raw = os.urandom(32) if secret is None else secret
        key_id = key_id or KeyId.random()
        return KeyMaterial(
            owner=self.owner(service),
            key_id=key_id,
            state=state,
            version=self.versions.setdefault(key_id, len(self.versions) + 1),
            secret=bytearray(raw),
        )


def host_tenant(
    directory: Path,
    name: str = "acme",
    *,
    services: tuple[str, ...] = ("drive", "mail"),
    key_type: str = "p256",
    agent_id: str = "hq",
) -> HostedTenant:
    """A tenant with keys below *directory*."""
    pki = make_tenant(name)
    credentials = {service: pki.service(service, key_type=key_type) for service in services}
    entries = []
    for number, (service, credential) in enumerate(credentials.items()):
        _, key_file = write_credential(credential, directory, f"{name}-{service}")
        entries.append(
            ServiceEntry(
                owner=NetworkService(name, service),
                upstream=Upstream("https", f"{service}.example.com", 443 + number),
                profile="generic",
                legacy=LegacyPolicy.STRICT,
                reverse_listen=None,
                certificate=credential.certificate,
                key_file=key_file,
            )
        )
    tls = pki.agent_tls(agent_id)
    return HostedTenant(
        pki=pki,
        agent_id=agent_id,
        services=credentials,
        signing=pki.agent_signing(agent_id),
        tls=tls,
        tls_files=write_credential(tls, directory, f"{name}-agent-tls"),
        entries=entries,
    )


def directory_of(*tenants: HostedTenant, revision: int = 1) -> Directory:
    return Directory.of(
        revision,
        [tenant.entry() for tenant in tenants],
        [entry for tenant in tenants for entry in tenant.entries],
    )


def agent_certified_by(tenant: HostedTenant, claimed: str) -> Credential:
    """An agent certificate that names *claimed* under *tenant*'s root; `certs.pki` refuses to make it."""
    key = ec.generate_private_key(ec.SECP256R1())
    genuine = tenant.tls.certificate
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (extension.value, extension.critical)
        for extension in genuine.extensions
        if extension.oid
        not in (
            x509.SubjectAlternativeName.oid,
            x509.SubjectKeyIdentifier.oid,
            x509.AuthorityKeyIdentifier.oid,
        )
    ]
    uri = x509.UniformResourceIdentifier(f"urn:sealgate:{claimed}:agent:hq:tls")
    certificate = dev_pki.certify(
        key.public_key(),
        subject=dev_pki.name("hq", claimed),
        issuer=tenant.pki.root,
        valid_from=datetime(2020, 1, 1, tzinfo=UTC),
        validity=timedelta(days=9000),
        extensions=[*extensions, (x509.SubjectAlternativeName([uri]), False)],
    )
    return Credential(key, certificate)
