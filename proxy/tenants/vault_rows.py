"""How upstream credentials stand in the directory: one row each, secrets sealed."""

from collections.abc import Mapping
from functools import partial

from sqlalchemy import Connection, select

from envelope.keys import NetworkService
from proxy.encryption_service.credentials import SecretSealer
from proxy.tenants.tables import upstream_credential
from proxy.vault.model import UpstreamCredential, binding


def read_vault(
    connection: Connection, sealer: SecretSealer
) -> Mapping[NetworkService, Mapping[str, UpstreamCredential]]:
    """All entries, by service and access key; their secrets stay sealed."""
    found: dict[NetworkService, dict[str, UpstreamCredential]] = {}
    for row in connection.execute(select(upstream_credential)):
        owner = NetworkService(row.tenant_id, row.service)
        sealer.prepare(row.sealed)
        found.setdefault(owner, {})[row.access_key] = UpstreamCredential(
            access_key=row.access_key,
            upstream_access_key=row.upstream_access_key,
            not_after_s=None if row.not_after_ms is None else row.not_after_ms / 1000,
            created_at_s=row.created_at_ms / 1000,
            sealed=row.sealed,
            opener=partial(sealer.open_bound, binding=binding(owner, row.access_key)),
        )
    return found
