"""Changes of the encryption service's dialects (directory.py, rule 1: one transaction, one row of history).

1. What a caller names and what yields a tenant is unique over all tenants: XKS prefixes, KACLS paths.
2. Settings name the tenant's own keys only, of the right use.
3. An endpoint that a credential is bound to stays.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from sqlalchemy import Connection, insert, update

from envelope.keys import KeyUse, SigningAlgorithm
from proxy.encryption_service.dialects.kacls_endpoint import check_endpoint
from proxy.encryption_service.dialects.xks_store import check_store
from proxy.encryption_service.model import (
    DialectEntry,
    DialectName,
    DialectSettings,
    KaclsSettings,
    NativeSettings,
    TransitSettings,
    XksSettings,
    url_path,
)
from proxy.tenants.directory import DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError
from proxy.tenants.model import Directory
from proxy.tenants.rules import tenant_in
from proxy.tenants.service_rows import settings_text
from proxy.tenants.tables import service_dialect

_MOUNT: Final = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


_DEFAULTS: Final[Mapping[DialectName, DialectSettings]] = {
    DialectName.NATIVE: NativeSettings(),
    DialectName.TRANSIT: TransitSettings(),
}


def set_dialect(
    store: DirectoryStore,
    tenant: str,
    dialect: DialectName,
    *,
    actor: str,
    enabled: bool | None = None,
    settings: DialectSettings | None = None,
) -> DialectEntry:
    """Switch a dialect on or off, replace its settings, or both; what is not given stays.

    ChangeRefusedError if the settings break rule 2, or a dialect that has none is to be switched on.
    """

    def change(connection: Connection, before: Directory) -> Draft | None:
        tenant_in(before, tenant)
        known = before.encryption_service.dialects.get((tenant, dialect))
        wanted = settings if settings is not None else None if known is None else known.settings
        if wanted is None:
            wanted = _DEFAULTS.get(dialect)
        if wanted is None:
            raise ChangeRefusedError(
                f"{dialect} has no settings for tenant {tenant} yet",
                f"`sealgate dialect set {tenant} {dialect} --settings FILE`",
            )
        is_on = enabled if enabled is not None else known.enabled if known is not None else True
        after = DialectEntry(tenant=tenant, dialect=dialect, enabled=is_on, settings=wanted)
        if after == known:
            return None
        _check_settings(before, after)
        _check_endpoints_used(before, after)
        values = {
            "enabled": is_on,
            "settings": settings_text(wanted),
            "updated_at_ms": store.now_ms(),
        }
        is_it = (service_dialect.c.tenant_id == tenant) & (service_dialect.c.dialect == dialect.value)
        if known is None:
            connection.execute(
                insert(service_dialect).values(tenant_id=tenant, dialect=dialect.value, **values)
            )
        else:
            connection.execute(update(service_dialect).where(is_it).values(values))
        return Draft(
            action="dialect-set",
            tenant=tenant,
            detail={"dialect": dialect.value, "enabled": str(is_on).lower()},
        )

    return store.change(change, actor).encryption_service.dialects[tenant, dialect]


def keys_named(settings: DialectSettings) -> Iterable[tuple[str, KeyUse]]:
    """The named keys that *settings* name, each with the use it must have."""
    if isinstance(settings, XksSettings):
        for store in settings.stores:
            yield from ((name, KeyUse.DATA) for name in store.keys.values())
    if isinstance(settings, KaclsSettings):
        for place in settings.endpoints:
            yield place.wrapping_key, KeyUse.DATA
            if place.signing_key is not None:
                yield place.signing_key, KeyUse.SIGN


def endpoints_of(settings: DialectSettings) -> set[str]:
    """The places that a credential can be bound to."""
    match settings:
        case XksSettings():
            return {store.prefix for store in settings.stores}
        case TransitSettings():
            return {mount.mount for mount in settings.mounts}
        case _:
            return set()


def _check_settings(before: Directory, entry: DialectEntry) -> None:
    """Rules 1 and 2."""
    settings = entry.settings
    match settings:
        case XksSettings():
            _check_stores(before, entry.tenant, settings)
        case TransitSettings():
            _check_mounts(settings)
        case KaclsSettings():
            _check_kacls(before, entry.tenant, settings)
    for name, use in keys_named(settings):
        key = before.encryption_service.key(entry.tenant, name)
        if key is None:
            raise ChangeRefusedError(
                f"tenant {entry.tenant} has no key {name}", f"`sealgate key add {entry.tenant}/{name}` first"
            )
        if key.use is not use:
            raise ChangeRefusedError(f"{key.owner} is a {key.use} key", f"name a {use} key")


def _check_stores(before: Directory, tenant: str, settings: XksSettings) -> None:
    taken = {
        store.prefix: entry.tenant
        for entry in before.encryption_service.dialects.values()
        if isinstance(entry.settings, XksSettings) and entry.tenant != tenant
        for store in entry.settings.stores
    }
    for store in settings.stores:
        try:
            check_store(store)
        except ValueError as error:
            raise ChangeRefusedError(str(error), "see docs/encryption-service-xks.md") from None
        if store.prefix in taken:
            raise ChangeRefusedError(f"the prefix {store.prefix} is taken", "choose another one")
        taken[store.prefix] = tenant


def _check_mounts(settings: TransitSettings) -> None:
    seen = set()
    for mount in settings.mounts:
        if not _MOUNT.fullmatch(mount.mount) or mount.mount.split("/")[0] in {"sys", "auth"}:
            raise ChangeRefusedError(
                f"not a mount: {mount.mount!r}", "give segments of A-Z, a-z, 0-9, _ and -, not sys or auth"
            )
        if (mount.mount, mount.namespace) in seen:
            raise ChangeRefusedError(f"the mount {mount.mount} stands twice", "name each once")
        seen.add((mount.mount, mount.namespace))


def _check_kacls(before: Directory, tenant: str, settings: KaclsSettings) -> None:
    taken = {
        url_path(place.url)
        for entry in before.encryption_service.dialects.values()
        if isinstance(entry.settings, KaclsSettings) and entry.tenant != tenant
        for place in entry.settings.endpoints
    }
    for place in settings.endpoints:
        try:
            check_endpoint(place)
        except ValueError as error:
            raise ChangeRefusedError(str(error), "see docs/encryption-service-kacls.md") from None
        path = url_path(place.url)
        if path in taken:
            raise ChangeRefusedError(f"the path {path} is taken", "choose another one")
        taken.add(path)
        signing = before.encryption_service.key(tenant, place.signing_key or "")
        if signing is not None and signing.algorithm is not SigningAlgorithm.RS256:
            raise ChangeRefusedError(
                f"{signing.owner} does not sign by RS256, which the other side of a KACLS expects",
                f"`sealgate key add {tenant}/NAME --algorithm RS256` makes one that does",
            )


def _check_endpoints_used(before: Directory, entry: DialectEntry) -> None:
    """A credential's endpoint stays: what is made at that prefix later is somebody else's."""
    places = endpoints_of(entry.settings)
    for credential in before.encryption_service.credentials.values():
        if (credential.tenant, credential.dialect) != (entry.tenant, entry.dialect):
            continue
        if credential.endpoint is not None and credential.endpoint not in places:
            raise ChangeRefusedError(
                f"credential {credential.id} is bound to {credential.endpoint}",
                f"`sealgate credential revoke {credential.id}` first",
            )
