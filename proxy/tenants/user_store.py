"""Changes of users and access rules in the directory.

1. Each is one transaction with one row of history, like every change of the directory (directory.py rule 1).
2. A password is returned once, by the call that draws it, and never read back.
3. Tenants that share a listener keep rules by which their users can be told apart.
"""

from typing import Final

from sqlalchemy import ColumnElement, Connection, delete, insert, update

from proxy.tenants.directory import DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError, NotThereError
from proxy.tenants.model import Directory
from proxy.tenants.rules import tenant_in
from proxy.tenants.tables import proxy_user, tenant
from proxy.tenants.user_rows import access_text
from proxy.users.model import Password, Proof, UserAccess, check_user_name

MAX_USERS: Final = 100_000
"""Of one tenant: each picture of the directory holds all of them."""


def set_access(store: DirectoryStore, name: str, access: UserAccess, *, actor: str) -> UserAccess:
    """Replace a tenant's rules. ChangeRefusedError if they make no sense, or it shares its listener."""
    if Proof.CERTIFICATE in access.requires and not access.client_roots:
        raise ChangeRefusedError(
            "client certificates are required, and no authority vouches for any", "give --client-ca too"
        )

    def change(connection: Connection, before: Directory) -> Draft:
        entry = tenant_in(before, name)
        sharing = () if entry.forward_listen is None else before.tenants_of_listener(entry.forward_listen)
        if len(sharing) > 1 and not access.identifies:
            raise ChangeRefusedError(
                f"{name} shares {entry.forward_listen}, so its users must be told from others'",
                "keep --require or --network, or give the tenant a listener of its own",
            )
        connection.execute(
            update(tenant)
            .where(tenant.c.id == name)
            .values(access=access_text(access), updated_at_ms=store.now_ms())
        )
        detail = {
            "networks": " ".join(str(network) for network in access.networks),
            "requires": " ".join(sorted(access.requires)),
            "client_roots": str(len(access.client_roots)),
            "proxies": " ".join(access.proxies),
        }
        return Draft(action="access-changed", tenant=name, detail=detail)

    return store.change(change, actor).tenants[name].access


def issue_password(
    store: DirectoryStore, name: str, user: str, *, actor: str, not_after_s: float | None = None
) -> Password:
    """A password for a new user, or a new one for a user there is: the old one ends now."""
    check_user_name(user)
    password = Password.draw(name, user)

    def change(connection: Connection, before: Directory) -> Draft:
        tenant_in(before, name)
        now_ms = store.now_ms()
        values = {
            "verifier": password.verifier,
            "not_after_ms": None if not_after_s is None else round(not_after_s * 1000),
            "updated_at_ms": now_ms,
        }
        if (name, user) in before.users:
            connection.execute(update(proxy_user).where(_is(name, user)).values(values))
            return Draft(action="user-renewed", tenant=name, detail={"user": user})
        if sum(key[0] == name for key in before.users) >= MAX_USERS:
            raise ChangeRefusedError(
                f"{name} has {MAX_USERS} users already", "remove some, or use client certificates"
            )
        connection.execute(
            insert(proxy_user).values(tenant_id=name, name=user, created_at_ms=now_ms, **values)
        )
        return Draft(action="user-added", tenant=name, detail={"user": user})

    store.change(change, actor)
    return password


def remove_user(store: DirectoryStore, name: str, user: str, *, actor: str) -> None:
    """Connections of that user are cut when the running proxy reads the directory. NotThereError."""

    def change(connection: Connection, before: Directory) -> Draft:
        tenant_in(before, name)
        if (name, user) not in before.users:
            raise NotThereError(f"there is no user {name}/{user}", "see `sealgate user list`")
        connection.execute(delete(proxy_user).where(_is(name, user)))
        return Draft(action="user-removed", tenant=name, detail={"user": user})

    store.change(change, actor)


def _is(name: str, user: str) -> ColumnElement[bool]:
    return (proxy_user.c.tenant_id == name) & (proxy_user.c.name == user)
