"""Changes of the credentials of the encryption service's callers (directory.py, rule 1).

1. The ids of credentials are unique over all tenants.
2. A secret is returned once, by the call that makes it, and never read back. The history has ids and labels
   only.
3. Rotating a credential adds one with the same rights. Both live until the old one's end, or until it is
   revoked; there are never more than two of one line, so that a forgotten rotation is noticed.
"""

import re
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection, delete, insert, update

from proxy.encryption_service.credentials import (
    SecretSealer,
    check_access_key,
    file_key_of,
    new_access_key,
    new_bearer,
    read_bearer,
)
from proxy.encryption_service.model import KIND_OF, CredentialEntry, CredentialKind, DialectName, Network, Op
from proxy.tenants.dialect_store import endpoints_of
from proxy.tenants.directory import DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError, DirectoryUnavailableError, NotThereError
from proxy.tenants.model import Directory
from proxy.tenants.rules import tenant_in
from proxy.tenants.service_rows import joined
from proxy.tenants.tables import service_credential
from proxy.tenants.vault_store import reseal_vault

MAX_LABEL_CHARS: Final = 100
MAX_PER_LINE: Final = 2
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


def issue_credential(
    store: DirectoryStore,
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
    made = _make(store, grant, access_key, token=token)

    def change(connection: Connection, before: Directory) -> Draft:
        _check_grant(before, grant)
        _insert(store, connection, before, made.entry)
        return _about_credential("credential-issued", made.entry)

    store.change(change, actor)
    return made


def rotate_credential(
    store: DirectoryStore,
    credential_id: str,
    *,
    actor: str,
    old_ends_s: float | None,
    ends_s: float | None = None,
) -> Issued:
    """A second credential with the same rights; the old one lives until *old_ends_s*, if given.

    *ends_s*: the new one's own end, in place of the old one's. ChangeRefusedError if there are two of
    this line already (rule 3), or the new one would have ended.
    """
    old = _credential_in(store.snapshot(), credential_id)
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
    made = _make(store, grant, None, replaces=credential_id)

    def change(connection: Connection, before: Directory) -> Draft:
        current = _credential_in(before, credential_id)
        now_s = store.now_ms() / 1000
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
        _insert(store, connection, before, made.entry)
        if old_ends_s is not None and (current.not_after_s is None or old_ends_s < current.not_after_s):
            connection.execute(
                update(service_credential)
                .where(service_credential.c.id == credential_id)
                .values(not_after_ms=int(old_ends_s * 1000), updated_at_ms=store.now_ms())
            )
        return _about_credential("credential-rotated", made.entry, replaces=credential_id)

    store.change(change, actor)
    return made


def revoke_credential(store: DirectoryStore, credential_id: str, *, actor: str) -> CredentialEntry:
    """Delete the credential: from the next picture of the directory on nobody is let in by it."""
    gone: list[CredentialEntry] = []

    def change(connection: Connection, before: Directory) -> Draft:
        entry = _credential_in(before, credential_id)
        gone.append(entry)
        connection.execute(delete(service_credential).where(service_credential.c.id == credential_id))
        return _about_credential("credential-revoked", entry)

    store.change(change, actor)
    return gone[0]


def rotate_file_key(store: DirectoryStore, *, actor: str) -> int:
    """Seal every SigV4 secret (of callers, and what requests are signed with upstream) by a new file key,
    then remove the old ones. How many were sealed anew.

    ChangeRefusedError if one does not open: nothing is changed then.
    """
    sealer = SecretSealer(store.state_dir)
    old = sealer.names()
    new = sealer.new_key()
    done: list[str] = []

    def change(connection: Connection, before: Directory) -> Draft:
        done.clear()
        for entry in before.encryption_service.credentials.values():
            if entry.kind is not CredentialKind.SIGV4 or file_key_of(entry.verifier) == new:
                continue
            secret = sealer.open(entry.verifier, entry.id, entry.tenant)
            if secret is None:
                raise ChangeRefusedError(
                    f"the stored secret of {entry.id} does not open",
                    "restore its file key, or revoke the credential",
                )
            sealed = sealer.seal(secret.decode(), entry.id, entry.tenant, key=new)
            connection.execute(
                update(service_credential)
                .where(service_credential.c.id == entry.id)
                .values(verifier=sealed, updated_at_ms=store.now_ms())
            )
            done.append(entry.id)
        done.extend(reseal_vault(connection, before, sealer, new))
        return Draft(action="file-key-rotated", tenant="", detail={"resealed": str(len(done))})

    try:
        store.change(change, actor)
    except DirectoryUnavailableError:
        raise  # a commit that was not answered may have been kept: its secrets open by the new key alone
    except Exception:
        sealer.remove([new])
        raise
    sealer.remove(old)
    return len(done)


def _make(
    store: DirectoryStore,
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
        verifier = SecretSealer(store.state_dir).seal(secret, name, grant.tenant)
    now_s = store.now_ms() // 1000
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


def _insert(store: DirectoryStore, connection: Connection, before: Directory, entry: CredentialEntry) -> None:
    if entry.id in before.encryption_service.credentials:
        raise ChangeRefusedError(f"there is a credential {entry.id} already", "choose another id")
    now_ms = store.now_ms()
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


def _credential_in(before: Directory, credential_id: str) -> CredentialEntry:
    entry = before.encryption_service.credentials.get(credential_id)
    if entry is None:
        raise NotThereError(f"there is no credential {credential_id}", "see `sealgate credential list`")
    return entry


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
    places = endpoints_of(entry.settings)
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
