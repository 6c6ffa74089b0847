"""The encryption service's rows of the directory, read as frozen pictures.

1. What stands in a row was checked when it was written; it is parsed again, strictly, and what does not parse
   fails the whole picture: the proxy goes on with the one it has (watch.py).
"""

import ipaddress
from pathlib import Path
from typing import Any, cast

import msgspec
from cryptography import x509
from sqlalchemy import Connection, Row, select

from envelope.errors import SealgateError
from envelope.keys import KeyUse, NetworkService, SigningAlgorithm
from proxy.encryption_service.model import (
    SETTINGS_OF,
    CredentialEntry,
    CredentialKind,
    DialectEntry,
    DialectName,
    DialectSettings,
    NamedKey,
    Op,
    ServiceDirectory,
)
from proxy.tenants.tables import named_key, network_service, service_credential, service_dialect


class BrokenRowError(SealgateError):
    """A row that this program did not write so."""


def read(connection: Connection, state_dir: Path) -> ServiceDirectory:
    """All of the encryption service, in the caller's transaction. BrokenRowError."""
    keys = select(named_key, network_service).join(
        network_service,
        (network_service.c.tenant_id == named_key.c.tenant_id) & (network_service.c.name == named_key.c.name),
    )
    try:
        return ServiceDirectory.of(
            [_key(row, state_dir) for row in connection.execute(keys)],
            [_dialect(row) for row in connection.execute(select(service_dialect))],
            [_credential(row) for row in connection.execute(select(service_credential))],
        )
    except (ValueError, msgspec.MsgspecError) as error:
        raise BrokenRowError(f"a row of the encryption service cannot be read: {error}") from error


def settings_text(settings: DialectSettings) -> str:
    return msgspec.json.encode(settings).decode()


def parse_settings(dialect: DialectName, text: str | bytes) -> DialectSettings:
    """msgspec.ValidationError or DecodeError: not the settings of this dialect."""
    return cast("DialectSettings", msgspec.json.decode(text, type=SETTINGS_OF[dialect]))


def words(text: str) -> list[str]:
    return text.split()


def joined(values: frozenset[Any] | set[Any]) -> str:
    return " ".join(sorted(str(value) for value in values))


def _key(row: Row[Any], state_dir: Path) -> NamedKey:
    der = row.certificate_der
    return NamedKey(
        owner=NetworkService(row.tenant_id, row.name),
        use=KeyUse(row.key_use),
        algorithm=None if row.algorithm is None else SigningAlgorithm(row.algorithm),
        blocked=row.blocked,
        operations=frozenset(Op(word) for word in words(row.operations)),
        certificate=None if der is None else x509.load_der_x509_certificate(der),
        key_file=state_dir / row.key_file,
        created_at_s=row.created_at_ms // 1000,
    )


def _dialect(row: Row[Any]) -> DialectEntry:
    name = DialectName(row.dialect)
    return DialectEntry(
        tenant=row.tenant_id,
        dialect=name,
        enabled=row.enabled,
        settings=parse_settings(name, row.settings),
    )


def _credential(row: Row[Any]) -> CredentialEntry:
    return CredentialEntry(
        id=row.id,
        tenant=row.tenant_id,
        dialect=DialectName(row.dialect),
        kind=CredentialKind(row.kind),
        label=row.label,
        keys=None if row.keys is None else frozenset(words(row.keys)),
        operations=frozenset(Op(word) for word in words(row.operations)),
        endpoint=row.endpoint,
        networks=tuple(ipaddress.ip_network(word) for word in words(row.networks)),
        not_after_s=None if row.not_after_ms is None else row.not_after_ms / 1000,
        verifier=row.verifier,
        requests_per_s=row.requests_per_s,
        replaces=row.replaces,
        created_at_s=row.created_at_ms // 1000,
        changed_at_s=row.updated_at_ms // 1000,
    )
