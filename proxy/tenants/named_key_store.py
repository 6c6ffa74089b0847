"""Changes of the encryption service's named keys (directory.py, rule 1: one transaction, one row of history).

1. A key's use, algorithm and operations fit each other.
2. A key that a credential or a dialect names cannot be removed: what is left would name the next key of that
   name.
"""

from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from sqlalchemy import ColumnElement, Connection, delete, insert, update

from envelope.keys import KeyUse, NetworkService, SigningAlgorithm
from proxy.encryption_service.model import OPERATIONS_OF, NamedKey, Op
from proxy.tenants import certificates
from proxy.tenants.certificates import KeyType
from proxy.tenants.dialect_store import keys_named
from proxy.tenants.directory import DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError, NotThereError
from proxy.tenants.key_files import key_name, new_files, remove_files
from proxy.tenants.model import Directory
from proxy.tenants.recipient_store import delete_recipient
from proxy.tenants.rules import tenant_in
from proxy.tenants.service_rows import joined
from proxy.tenants.tables import named_key, network_service


def add_key(
    store: DirectoryStore,
    owner: NetworkService,
    *,
    actor: str,
    use: KeyUse = KeyUse.DATA,
    algorithm: SigningAlgorithm | None = None,
    operations: frozenset[Op] | None = None,
    key_type: KeyType = KeyType.P256,
) -> x509.CertificateSigningRequest:
    """Provision a named key; the private key made here opens envelopes, the CSR is for the tenant's root.

    ChangeRefusedError if the id is taken, or use, algorithm and operations do not fit each other.
    """
    chosen = _checked_use(use, algorithm, operations)
    tenant_in(store.snapshot(), owner.tenant)
    key = certificates.new_private_key(key_type)
    key_file = key_name(owner)

    def change(connection: Connection, before: Directory) -> Draft:
        tenant_in(before, owner.tenant)
        if owner in before.recipients:
            raise ChangeRefusedError(f"{owner} exists", "choose another name, or see `sealgate key list`")
        now_ms = store.now_ms()
        connection.execute(
            insert(network_service).values(
                tenant_id=owner.tenant,
                name=owner.service,
                key_file=key_file,
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
        )
        connection.execute(
            insert(named_key).values(
                tenant_id=owner.tenant,
                name=owner.service,
                key_use=use.value,
                algorithm=None if algorithm is None else algorithm.value,
                blocked=False,
                operations=joined(chosen),
            )
        )
        detail = {"use": use.value, "operations": joined(chosen), "key_type": key_type.value}
        if algorithm is not None:
            detail["algorithm"] = algorithm.value
        return _about_key("key-added", owner, detail)

    with new_files(store.state_dir) as files:
        files.private_key(key_file, key)
        store.change(change, actor)
    return certificates.make_service_csr(owner, key)


def set_blocked(store: DirectoryStore, owner: NetworkService, *, blocked: bool, actor: str) -> NamedKey:
    """Let nobody use the key, or everybody again who may. The tenant's other keys are not touched."""

    def change(connection: Connection, before: Directory) -> Draft | None:
        if _key_in(before, owner).blocked == blocked:
            return None
        connection.execute(update(named_key).where(*_is_key(owner)).values(blocked=blocked))
        return _about_key("key-blocked" if blocked else "key-unblocked", owner, {})

    return store.change(change, actor).encryption_service.keys[owner]


def remove_key(store: DirectoryStore, owner: NetworkService, *, actor: str) -> None:
    """Remove the named key and its private key. ChangeRefusedError while something names it (rule 2)."""
    obsolete: list[Path] = []

    def change(connection: Connection, before: Directory) -> Draft:
        _key_in(before, owner)
        users = _users_of(before, owner)
        if users:
            raise ChangeRefusedError(
                f"{owner} is named by {', '.join(users)}", "revoke or change what names it first"
            )
        connection.execute(delete(named_key).where(*_is_key(owner)))
        obsolete.extend(delete_recipient(store, connection, owner))
        return _about_key("key-removed", owner, {})

    store.change(change, actor)
    remove_files(obsolete)


def _checked_use(
    use: KeyUse, algorithm: SigningAlgorithm | None, operations: frozenset[Op] | None
) -> frozenset[Op]:
    if (use is KeyUse.SIGN) != (algorithm is not None):
        raise ChangeRefusedError(
            "a signing key has an algorithm, and a data key has none",
            f"give --use sign --algorithm {' | '.join(SigningAlgorithm)}, or neither",
        )
    possible = OPERATIONS_OF[use]
    chosen = possible if operations is None else operations
    if not chosen or not chosen <= possible:
        raise ChangeRefusedError(
            f"a {use} key cannot {joined(chosen - possible) or 'do nothing'}",
            f"choose of: {joined(possible)}",
        )
    return chosen


def _key_in(before: Directory, owner: NetworkService) -> NamedKey:
    tenant_in(before, owner.tenant)
    key = before.encryption_service.keys.get(owner)
    if key is None:
        raise NotThereError(f"there is no key {owner}", "see `sealgate key list`")
    return key


def _users_of(before: Directory, owner: NetworkService) -> list[str]:
    service = before.encryption_service
    users = [
        f"credential {entry.id}"
        for entry in service.credentials.values()
        if entry.tenant == owner.tenant and owner.service in (entry.keys or ())
    ]
    users += [
        f"the settings of {entry.dialect}"
        for entry in service.dialects.values()
        if entry.tenant == owner.tenant and owner.service in dict(keys_named(entry.settings))
    ]
    return users


def _is_key(owner: NetworkService) -> tuple[ColumnElement[bool], ...]:
    return (named_key.c.tenant_id == owner.tenant, named_key.c.name == owner.service)


def _about_key(action: str, owner: NetworkService, detail: Mapping[str, str]) -> Draft:
    return Draft(action=action, tenant=owner.tenant, service=owner.service, detail=detail)
