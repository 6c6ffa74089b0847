"""Changes of the encryption service in the directory: named keys, dialects, credentials.

1. Each is one transaction with one row of history, like every change of the directory (directory.py rule
   1).
2. What a caller names and what yields a tenant is unique over all tenants: XKS prefixes, KACLS paths,
   credential ids. Settings name the tenant's own keys only, of the right use.
3. A key that a credential or a dialect names cannot be removed: what is left would name the next key of
   that name.
4. A secret is returned once, by the call that makes it, and never read back. The history has ids and labels
   only.
5. Rotating a credential adds one with the same rights. Both live until the old one's end, or until it is
   revoked; there are never more than two of one line, so that a forgotten rotation is noticed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from sqlalchemy import ColumnElement, Connection, delete, insert, update

from envelope.keys import KeyUse, NetworkService, SigningAlgorithm
from proxy.encryption_service.credentials import (
    SecretSealer,
    check_access_key,
    file_key_of,
    new_access_key,
    new_bearer,
    read_bearer,
)
from proxy.encryption_service.dialects.kacls_endpoint import check_endpoint
from proxy.encryption_service.dialects.xks_store import check_store
from proxy.encryption_service.model import (
    KIND_OF,
    OPERATIONS_OF,
    CredentialEntry,
    CredentialKind,
    DialectEntry,
    DialectName,
    DialectSettings,
    KaclsSettings,
    NamedKey,
    NativeSettings,
    Network,
    Op,
    TransitSettings,
    XksSettings,
    url_path,
)
from proxy.tenants import certificates
from proxy.tenants.certificates import KeyType
from proxy.tenants.directory import DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError, NotThereError
from proxy.tenants.key_files import key_name, new_files, remove_files
from proxy.tenants.model import Directory
from proxy.tenants.recipient_store import delete_recipient
from proxy.tenants.rules import tenant_in
from proxy.tenants.service_rows import joined, settings_text
from proxy.tenants.tables import named_key, network_service, service_credential, service_dialect
from proxy.tenants.vault_store import reseal_vault

MAX_LABEL_CHARS: Final = 100
MAX_PER_LINE: Final = 2
_MOUNT: Final = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_LABEL: Final = re.compile(r"[ -~]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a credential is bound to (model.py rule 3)."""

    tenant: str
    dialect: DialectName
    label: str
    keys: frozenset[str] | None = None
    operations: frozenset[Op] = frozenset(Op)
    endpoint: str | None = None
    networks: tuple[Network, ...] = ()
    not_after_s: float | None = None
    requests_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A new credential and its secret, which nobody can read again."""

    entry: CredentialEntry
    secret: str = field(repr=False)
    """Bearer: the whole token. SigV4: the raw secret access key."""


class ServiceStore:
    """The encryption service's part of the directory. Blocking, like `DirectoryStore`."""

    def __init__(self, store: DirectoryStore) -> None:
        self._store = store
        self._sealer = SecretSealer(store.state_dir)

    # Named keys.

    def add_key(
        self,
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
        tenant_in(self._store.snapshot(), owner.tenant)
        key = certificates.new_private_key(key_type)
        key_file = key_name(owner)

        def change(connection: Connection, before: Directory) -> Draft:
            tenant_in(before, owner.tenant)
            if owner in before.recipients:
                raise ChangeRefusedError(f"{owner} exists", "choose another name, or see `sealgate key list`")
            now_ms = self._store.now_ms()
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

        with new_files(self._store.state_dir) as files:
            files.private_key(key_file, key)
            self._store.change(change, actor)
        return certificates.make_service_csr(owner, key)

    def set_blocked(self, owner: NetworkService, *, blocked: bool, actor: str) -> NamedKey:
        """Let nobody use the key, or everybody again who may. The tenant's other keys are not touched."""

        def change(connection: Connection, before: Directory) -> Draft | None:
            if _key_in(before, owner).blocked == blocked:
                return None
            connection.execute(update(named_key).where(*_is_key(owner)).values(blocked=blocked))
            return _about_key("key-blocked" if blocked else "key-unblocked", owner, {})

        return self._store.change(change, actor).encryption_service.keys[owner]

    def remove_key(self, owner: NetworkService, *, actor: str) -> None:
        """Remove the named key and its private key. ChangeRefusedError while something names it (rule 3)."""
        obsolete: list[Path] = []

        def change(connection: Connection, before: Directory) -> Draft:
            _key_in(before, owner)
            users = _users_of(before, owner)
            if users:
                raise ChangeRefusedError(
                    f"{owner} is named by {', '.join(users)}", "revoke or change what names it first"
                )
            connection.execute(delete(named_key).where(*_is_key(owner)))
            obsolete.extend(delete_recipient(self._store, connection, owner))
            return _about_key("key-removed", owner, {})

        self._store.change(change, actor)
        remove_files(obsolete)

    # Dialects.

    def set_dialect(
        self,
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
                "updated_at_ms": self._store.now_ms(),
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

        return self._store.change(change, actor).encryption_service.dialects[tenant, dialect]

    # Credentials.

    def issue(
        self,
        grant: Grant,
        *,
        actor: str,
        access_key: tuple[str, str] | None = None,
        token: str | None = None,
    ) -> Issued:
        """A new credential. *access_key*: id and raw secret of the tenant's own making, for SigV4 only.

        *token*: that another proxy has made, so that its holder is let in at either (several environments).
        ChangeRefusedError if the grant names what is not there; FormatError for a malformed secret.
        """
        made = self._make(grant, access_key, token=token)

        def change(connection: Connection, before: Directory) -> Draft:
            _check_grant(before, grant)
            self._insert(connection, before, made.entry)
            return _about_credential("credential-issued", made.entry)

        self._store.change(change, actor)
        return made

    def rotate(
        self, credential_id: str, *, actor: str, old_ends_s: float | None, ends_s: float | None = None
    ) -> Issued:
        """A second credential with the same rights; the old one lives until *old_ends_s*, if given.

        *ends_s*: the new one's own end, in place of the old one's. ChangeRefusedError if there are two of
        this line already (rule 5), or the new one would have ended.
        """
        old = self._credential(self._store.snapshot(), credential_id)
        grant = Grant(
            tenant=old.tenant,
            dialect=old.dialect,
            label=old.label,
            keys=old.keys,
            operations=old.operations,
            endpoint=old.endpoint,
            networks=old.networks,
            not_after_s=old.not_after_s if ends_s is None else ends_s,
            requests_per_s=old.requests_per_s,
        )
        made = self._make(grant, None, replaces=credential_id)

        def change(connection: Connection, before: Directory) -> Draft:
            current = self._credential(before, credential_id)
            now_s = self._store.now_ms() / 1000
            if grant.not_after_s is not None and grant.not_after_s <= now_s:
                raise ChangeRefusedError(
                    f"{credential_id} has ended, and its successor with it", "give a new end by --valid-for"
                )
            line = _line_of(before, current, now_s=now_s)
            if len(line) >= MAX_PER_LINE:
                raise ChangeRefusedError(
                    f"{' and '.join(sorted(line))} are both live",
                    "revoke the one that is used no more by `sealgate credential revoke`",
                )
            self._insert(connection, before, made.entry)
            if old_ends_s is not None and (current.not_after_s is None or old_ends_s < current.not_after_s):
                connection.execute(
                    update(service_credential)
                    .where(service_credential.c.id == credential_id)
                    .values(not_after_ms=int(old_ends_s * 1000), updated_at_ms=self._store.now_ms())
                )
            return _about_credential("credential-rotated", made.entry, replaces=credential_id)

        self._store.change(change, actor)
        return made

    def revoke(self, credential_id: str, *, actor: str) -> CredentialEntry:
        """Delete the credential: from the next picture of the directory on nobody is let in by it."""
        gone: list[CredentialEntry] = []

        def change(connection: Connection, before: Directory) -> Draft:
            entry = self._credential(before, credential_id)
            gone.append(entry)
            connection.execute(delete(service_credential).where(service_credential.c.id == credential_id))
            return _about_credential("credential-revoked", entry)

        self._store.change(change, actor)
        return gone[0]

    def rotate_file_key(self, *, actor: str) -> int:
        """Seal every SigV4 secret (of callers, and what requests are signed with upstream) by a new file key,
        then remove the old ones. How many were sealed anew.

        ChangeRefusedError if one does not open: nothing is changed then.
        """
        old = self._sealer.names()
        new = self._sealer.new_key()
        done: list[str] = []

        def change(connection: Connection, before: Directory) -> Draft:
            done.clear()
            for entry in before.encryption_service.credentials.values():
                if entry.kind is not CredentialKind.SIGV4 or file_key_of(entry.verifier) == new:
                    continue
                secret = self._sealer.open(entry.verifier, entry.id, entry.tenant)
                if secret is None:
                    raise ChangeRefusedError(
                        f"the stored secret of {entry.id} does not open",
                        "restore its file key, or revoke the credential",
                    )
                sealed = self._sealer.seal(secret.decode(), entry.id, entry.tenant, key=new)
                connection.execute(
                    update(service_credential)
                    .where(service_credential.c.id == entry.id)
                    .values(verifier=sealed, updated_at_ms=self._store.now_ms())
                )
                done.append(entry.id)
            done.extend(reseal_vault(connection, before, self._sealer, new))
            return Draft(action="file-key-rotated", tenant="", detail={"resealed": str(len(done))})

        try:
            self._store.change(change, actor)
        except BaseException:
            self._sealer.remove([new])
            raise
        self._sealer.remove(old)
        return len(done)

    # Within.

    def _make(
        self,
        grant: Grant,
        access_key: tuple[str, str] | None,
        *,
        token: str | None = None,
        replaces: str | None = None,
    ) -> Issued:
        kind = KIND_OF.get(grant.dialect)
        if kind is None:
            raise ChangeRefusedError(
                f"{grant.dialect} has no credentials: its callers bring an identity provider's tokens",
                "name the issuers in the dialect's settings",
            )
        if access_key is not None and kind is not CredentialKind.SIGV4:
            raise ChangeRefusedError("only xks has access keys", "leave it out: a token is made here")
        if token is not None and kind is not CredentialKind.BEARER:
            raise ChangeRefusedError("xks has no tokens", "give the pair by --access-key-file")
        if kind is CredentialKind.BEARER:
            made = new_bearer() if token is None else read_bearer(token)
            name, secret, verifier = made.id, made.token, made.verifier
        else:
            if access_key is not None:
                check_access_key(*access_key)
            name, secret = access_key or new_access_key()
            verifier = self._sealer.seal(secret, name, grant.tenant)
        now_s = self._store.now_ms() // 1000
        entry = CredentialEntry(
            id=name,
            tenant=grant.tenant,
            dialect=grant.dialect,
            kind=kind,
            label=grant.label,
            keys=grant.keys,
            operations=grant.operations,
            endpoint=grant.endpoint,
            networks=grant.networks,
            not_after_s=grant.not_after_s,
            verifier=verifier,
            requests_per_s=grant.requests_per_s,
            replaces=replaces,
            created_at_s=now_s,
            changed_at_s=now_s,
        )
        return Issued(entry=entry, secret=secret)

    def _insert(self, connection: Connection, before: Directory, entry: CredentialEntry) -> None:
        if entry.id in before.encryption_service.credentials:
            raise ChangeRefusedError(f"there is a credential {entry.id} already", "choose another id")
        now_ms = self._store.now_ms()
        connection.execute(
            insert(service_credential).values(
                id=entry.id,
                tenant_id=entry.tenant,
                dialect=entry.dialect.value,
                kind=entry.kind.value,
                label=entry.label,
                keys=None if entry.keys is None else joined(entry.keys),
                operations=joined(entry.operations),
                endpoint=entry.endpoint,
                networks=" ".join(str(network) for network in entry.networks),
                not_after_ms=None if entry.not_after_s is None else int(entry.not_after_s * 1000),
                verifier=entry.verifier,
                requests_per_s=entry.requests_per_s,
                replaces=entry.replaces,
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
        )

    def _credential(self, before: Directory, credential_id: str) -> CredentialEntry:
        entry = before.encryption_service.credentials.get(credential_id)
        if entry is None:
            raise NotThereError(f"there is no credential {credential_id}", "see `sealgate credential list`")
        return entry


# Rules.

_DEFAULTS: Final[Mapping[DialectName, DialectSettings]] = {
    DialectName.NATIVE: NativeSettings(),
    DialectName.TRANSIT: TransitSettings(),
}


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
        if entry.tenant == owner.tenant and owner.service in dict(_keys_named(entry.settings))
    ]
    return users


def _keys_named(settings: DialectSettings) -> Iterable[tuple[str, KeyUse]]:
    """The named keys that *settings* name, each with the use it must have."""
    if isinstance(settings, XksSettings):
        for store in settings.stores:
            yield from ((name, KeyUse.DATA) for name in store.keys.values())
    if isinstance(settings, KaclsSettings):
        for place in settings.endpoints:
            yield place.wrapping_key, KeyUse.DATA
            if place.signing_key is not None:
                yield place.signing_key, KeyUse.SIGN


def _check_settings(before: Directory, entry: DialectEntry) -> None:
    """Rule 2."""
    settings = entry.settings
    match settings:
        case XksSettings():
            _check_stores(before, entry.tenant, settings)
        case TransitSettings():
            _check_mounts(settings)
        case KaclsSettings():
            _check_kacls(before, entry.tenant, settings)
    for name, use in _keys_named(settings):
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
    places = _endpoints_of(entry.settings)
    for credential in before.encryption_service.credentials.values():
        if (credential.tenant, credential.dialect) != (entry.tenant, entry.dialect):
            continue
        if credential.endpoint is not None and credential.endpoint not in places:
            raise ChangeRefusedError(
                f"credential {credential.id} is bound to {credential.endpoint}",
                f"`sealgate credential revoke {credential.id}` first",
            )


def _endpoints_of(settings: DialectSettings) -> set[str]:
    match settings:
        case XksSettings():
            return {store.prefix for store in settings.stores}
        case TransitSettings():
            return {mount.mount for mount in settings.mounts}
        case _:
            return set()


def _check_grant(before: Directory, grant: Grant) -> None:
    tenant_in(before, grant.tenant)
    if not _LABEL.fullmatch(grant.label) or len(grant.label) > MAX_LABEL_CHARS:
        raise ChangeRefusedError(
            "a label is printable ASCII", f"give one of 1 to {MAX_LABEL_CHARS} characters"
        )
    for name in grant.keys or ():
        if before.encryption_service.key(grant.tenant, name) is None:
            raise ChangeRefusedError(f"tenant {grant.tenant} has no key {name}", "see `sealgate key list`")
    if grant.keys is not None and not grant.keys:
        raise ChangeRefusedError("the credential is for no key", "name some, or none for all")
    if not grant.operations:
        raise ChangeRefusedError("the credential is for no operation", f"choose of: {joined(set(Op))}")
    entry = before.encryption_service.dialects.get((grant.tenant, grant.dialect))
    if entry is None:
        raise ChangeRefusedError(
            f"{grant.dialect} is not set up for tenant {grant.tenant}",
            f"`sealgate dialect enable {grant.tenant} {grant.dialect}` first",
        )
    places = _endpoints_of(entry.settings)
    if grant.dialect is DialectName.XKS and grant.endpoint is None:
        raise ChangeRefusedError("an XKS credential is for one key store", "give its prefix by --endpoint")
    if grant.endpoint is not None and grant.endpoint not in places:
        raise ChangeRefusedError(
            f"{grant.dialect} of tenant {grant.tenant} has no {grant.endpoint!r}",
            f"choose of: {joined(places)}" if places else f"{grant.dialect} has no endpoints: leave it out",
        )
    if grant.requests_per_s is not None and grant.requests_per_s <= 0:
        raise ChangeRefusedError("a rate is above 0", "leave it out for the service's default")


def _line_of(before: Directory, entry: CredentialEntry, *, now_s: float) -> set[str]:
    """The live credentials that came of each other by rotation, *entry* among them."""
    entries = before.encryption_service.credentials
    parents = {found.id: found.replaces for found in entries.values() if found.replaces in entries}

    def first(name: str) -> str:
        seen = set()
        while (parent := parents.get(name)) is not None and name not in seen:
            seen.add(name)
            name = parent
        return name

    return {
        found.id
        for found in entries.values()
        if first(found.id) == first(entry.id) and (found.not_after_s is None or found.not_after_s > now_s)
    }


# Statements.


def _is_key(owner: NetworkService) -> tuple[ColumnElement[bool], ...]:
    return (named_key.c.tenant_id == owner.tenant, named_key.c.name == owner.service)


def _about_key(action: str, owner: NetworkService, detail: Mapping[str, str]) -> Draft:
    return Draft(action=action, tenant=owner.tenant, service=owner.service, detail=detail)


def _about_credential(action: str, entry: CredentialEntry, **detail: str) -> Draft:
    facts = {
        "credential": entry.id,
        "dialect": entry.dialect.value,
        "label": entry.label,
        "keys": "all" if entry.keys is None else joined(entry.keys),
        "operations": joined(entry.operations),
    }
    if entry.endpoint is not None:
        facts["endpoint"] = entry.endpoint
    if entry.networks:
        facts["networks"] = " ".join(str(network) for network in entry.networks)
    if entry.not_after_s is not None:
        facts["not_after_s"] = str(int(entry.not_after_s))
    return Draft(action=action, tenant=entry.tenant, detail={**facts, **detail})
