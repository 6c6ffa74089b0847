"""The vault's rows in the directory: upstream credentials of network services.

1. Each change is one transaction with one row of history (directory.py rule 1); history names access keys,
   never a secret.
2. Secrets are sealed by a file key of the state directory before they reach the database
   (encryption_service/credentials.py rules 2 and 3), bound to tenant, service and access key.
"""

from typing import Final

import msgspec
from sqlalchemy import ColumnElement, Connection, delete, insert, update

from envelope.keys import NetworkService
from proxy.encryption_service.credentials import SecretSealer, file_key_of
from proxy.tenants.directory import DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError, NotThereError
from proxy.tenants.model import Directory, ServiceEntry
from proxy.tenants.tables import upstream_credential
from proxy.vault.model import Secrets, UpstreamCredential, binding, check_access_key, check_secrets

MAX_CREDENTIALS: Final = 10_000
"""Of one network service: each picture of the directory holds all of them."""
PROFILES: Final = frozenset({"azure-blob", "s3"})
"""Whose requests are signed so."""


def add_credential(
    store: DirectoryStore,
    owner: NetworkService,
    access_key: str,
    secrets: Secrets,
    *,
    actor: str,
    upstream_access_key: str | None = None,
    not_after_s: float | None = None,
    replace: bool = False,
) -> UpstreamCredential:
    """Put a credential into the vault; with *replace* in place of the one that is there.

    FormatError for what can be none. ChangeRefusedError if there is one already, if the service's profile
    signs nothing, or if a session token comes without an upstream secret.
    """
    check_access_key(access_key)
    upstream = check_access_key(upstream_access_key or access_key)
    check_secrets(secrets)
    if upstream != access_key and secrets.upstream_secret is None:
        raise ChangeRefusedError(
            "another upstream access key has a secret of its own", "give --upstream-secret-file too"
        )
    if secrets.session_token is not None and secrets.upstream_secret is None:
        raise ChangeRefusedError(
            "a session token belongs to an upstream secret; clients use a gateway key of their own",
            "give --upstream-access-key and --upstream-secret-file too",
        )
    sealer = SecretSealer(store.state_dir)

    def change(connection: Connection, before: Directory) -> Draft:
        service = _service_in(before, owner)
        if service.profile not in PROFILES:
            raise ChangeRefusedError(
                f"{owner} has the profile {service.profile}, which signs nothing",
                f"upstream credentials are for services of the profiles {', '.join(sorted(PROFILES))}",
            )
        known = access_key in service.credentials
        if known and not replace:
            raise ChangeRefusedError(
                f"{owner} has a credential for {access_key} already", "give --replace to exchange it"
            )
        if not known and len(service.credentials) >= MAX_CREDENTIALS:
            raise ChangeRefusedError(f"{owner} has {MAX_CREDENTIALS} credentials already", "remove some")
        now_ms = store.now_ms()
        values = {
            "upstream_access_key": upstream,
            "sealed": sealer.seal_bound(msgspec.json.encode(secrets), binding(owner, access_key)),
            "not_after_ms": None if not_after_s is None else round(not_after_s * 1000),
            "updated_at_ms": now_ms,
        }
        if known:
            connection.execute(update(upstream_credential).where(_is(owner, access_key)).values(values))
        else:
            connection.execute(
                insert(upstream_credential).values(
                    tenant_id=owner.tenant,
                    service=owner.service,
                    access_key=access_key,
                    created_at_ms=now_ms,
                    **values,
                )
            )
        return Draft(
            action="upstream-credential-replaced" if known else "upstream-credential-added",
            tenant=owner.tenant,
            service=owner.service,
            detail={"access_key": access_key, "upstream_access_key": upstream},
        )

    return store.change(change, actor).services[owner].credentials[access_key]


def remove_credential(store: DirectoryStore, owner: NetworkService, access_key: str, *, actor: str) -> None:
    """NotThereError. A running proxy refuses that access key once it has read the directory."""

    def change(connection: Connection, before: Directory) -> Draft:
        if access_key not in _service_in(before, owner).credentials:
            raise NotThereError(
                f"{owner} has no credential for {access_key}",
                "see `sealgate s3-credential list` or `azure-credential list`",
            )
        connection.execute(delete(upstream_credential).where(_is(owner, access_key)))
        return Draft(
            action="upstream-credential-removed",
            tenant=owner.tenant,
            service=owner.service,
            detail={"access_key": access_key},
        )

    store.change(change, actor)


def reseal_vault(connection: Connection, before: Directory, sealer: SecretSealer, new: bytes) -> list[str]:
    """Seal every secret by the file key *new*, in the caller's transaction. The access keys they belong to.

    ChangeRefusedError if one does not open.
    """
    done: list[str] = []
    for service in before.services.values():
        for access_key, entry in service.credentials.items():
            if file_key_of(entry.sealed) == new:
                continue
            bound = binding(service.owner, access_key)
            opened = sealer.open_bound(entry.sealed, bound)
            if opened is None:
                raise ChangeRefusedError(
                    f"the stored secret of {service.owner} {access_key} does not open",
                    "restore its file key, or remove the credential",
                )
            connection.execute(
                update(upstream_credential)
                .where(_is(service.owner, access_key))
                .values(sealed=sealer.seal_bound(opened, bound, key=new))
            )
            done.append(access_key)
    return done


def _service_in(before: Directory, owner: NetworkService) -> ServiceEntry:
    service = before.services.get(owner)
    if service is None:
        raise NotThereError(f"there is no network service {owner}", "see `sealgate list`")
    return service


def _is(owner: NetworkService, access_key: str) -> ColumnElement[bool]:
    return (
        (upstream_credential.c.tenant_id == owner.tenant)
        & (upstream_credential.c.service == owner.service)
        & (upstream_credential.c.access_key == access_key)
    )
