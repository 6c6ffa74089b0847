"""The rows of tenants and network services, read as one picture (tables.py says what stands in them)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from sqlalchemy import Connection, Row, select

from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy.encryption_service.credentials import SecretSealer
from proxy.tenants import service_rows
from proxy.tenants.errors import DirectoryUnavailableError
from proxy.tenants.model import (
    CertificateFiles,
    Directory,
    LegacyPolicy,
    Listen,
    ServiceEntry,
    TenantEntry,
    Upstream,
)
from proxy.tenants.tables import directory, network_service, signer, tenant, tunnel_host
from proxy.tenants.user_rows import read_access, read_users
from proxy.tenants.vault_rows import read_vault
from proxy.vault.model import UpstreamCredential


def read(connection: Connection, state_dir: Path, sealer: SecretSealer) -> Directory:
    """The whole directory. DirectoryUnavailableError where a row is damaged."""
    revision = connection.execute(select(directory.c.revision)).scalar_one()
    tunnels: dict[str, set[str]] = {}
    for row in connection.execute(select(tunnel_host)):
        tunnels.setdefault(row.tenant_id, set()).add(row.pattern)
    pins: dict[str, list[x509.Certificate]] = {}
    for row in connection.execute(select(signer).order_by(signer.c.fingerprint)):
        pins.setdefault(row.tenant_id, []).append(x509.load_der_x509_certificate(row.certificate_der))
    tenants = [
        TenantEntry(
            tenant=row.id,
            root_certificate=x509.load_der_x509_certificate(row.root_der),
            forward_listen=None if row.forward_address is None else Listen.parse(row.forward_address),
            tunnel_hosts=frozenset(tunnels.get(row.id, ())),
            interception_ca=CertificateFiles(
                certificate_file=state_dir / row.ca_certificate_file,
                key_file=state_dir / row.ca_key_file,
            ),
            signers=tuple(pins.get(row.id, ())),
            access=_sound(read_access, row.access),
        )
        for row in connection.execute(select(tenant).order_by(tenant.c.id))
    ]
    vault = read_vault(connection, sealer)
    services = [
        _service_entry(row, state_dir, vault.get(NetworkService(row.tenant_id, row.name), {}))
        for row in connection.execute(
            select(network_service)
            .where(network_service.c.upstream_host.is_not(None))
            .order_by(network_service.c.tenant_id, network_service.c.name)
        )
    ]
    try:
        encryption_service = service_rows.read(connection, state_dir)
    except service_rows.BrokenRowError as error:
        raise DirectoryUnavailableError(str(error)) from error
    return Directory.of(int(revision), tenants, services, encryption_service, users=read_users(connection))


def _service_entry(
    row: Row[Any], state_dir: Path, credentials: Mapping[str, UpstreamCredential]
) -> ServiceEntry:
    der = row.certificate_der
    return ServiceEntry(
        owner=NetworkService(row.tenant_id, row.name),
        upstream=Upstream(row.upstream_scheme, row.upstream_host, row.upstream_port),
        profile=row.profile,
        legacy=LegacyPolicy(row.legacy),
        reverse_listen=None if row.reverse_listen is None else Listen.parse(row.reverse_listen),
        certificate=None if der is None else x509.load_der_x509_certificate(der),
        key_file=state_dir / row.key_file,
        reverse_names=frozenset((row.reverse_names or "").split()),
        profile_options=_sound(_options, row.profile_options),
        credentials=credentials,
    )


def options_text(options: Mapping[str, object] | None) -> str | None:
    return json.dumps(options, sort_keys=True) if options else None


def _options(text: str | None) -> dict[str, object]:
    options = {} if text is None else json.loads(text)
    if not isinstance(options, dict):
        raise FormatError("the options of a profile are damaged")
    return options


def _sound[T](read: Callable[[str | None], T], text: str | None) -> T:
    try:
        return read(text)
    except FormatError as error:
        raise DirectoryUnavailableError(str(error)) from error
