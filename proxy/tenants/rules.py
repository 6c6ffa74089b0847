"""What must be true of the directory before a change, and after it: rules over a picture of it.

No two tenants and services can be confused: listeners, ids, hosts within a tenant, roots and their names
differ, and a managed host is never tunnelled.
"""

from collections.abc import Iterable

from cryptography import x509

from envelope.keys import NetworkService
from proxy.encryption_service.model import NamedKey
from proxy.tenants.errors import ChangeRefusedError, NotThereError
from proxy.tenants.model import Directory, Listen, Recipient, ServiceEntry, TenantEntry, TunnelRule, Upstream


def tenant_in(before: Directory, name: str) -> TenantEntry:
    entry = before.tenants.get(name)
    if entry is None:
        raise NotThereError(f"there is no tenant {name}", "see `sealgate list`")
    return entry


def service_in(before: Directory, owner: NetworkService) -> ServiceEntry:
    tenant_in(before, owner.tenant)
    entry = before.services.get(owner)
    if entry is None:
        raise NotThereError(f"there is no network service {owner}", "see `sealgate list`")
    return entry


def recipient_in(before: Directory, owner: NetworkService) -> Recipient:
    tenant_in(before, owner.tenant)
    entry = before.recipients.get(owner)
    if entry is None:
        raise NotThereError(f"there is no network service or key {owner}", "see `sealgate list`")
    return entry


def check_free(before: Directory, owner: NetworkService) -> None:
    """A service and a named key share their names: keys are pushed to one or the other."""
    entry = before.recipients.get(owner)
    if isinstance(entry, NamedKey):
        raise ChangeRefusedError(f"{owner} is a named key of the encryption service", "choose another name")


def check_listener(
    before: Directory, listen: Listen, reserved: Iterable[Listen], *, user: TenantEntry | None
) -> None:
    """*user*: the tenant whose forward proxy is to listen there; tenants whose users show whose they are
    may share an address."""
    sharing = before.tenants_of_listener(listen) if before.service_of_listener(listen) is None else ()
    if sharing and user is not None and all(entry.access.identifies for entry in (*sharing, user)):
        return
    users = {
        entry.forward_listen: f"tenant {entry.tenant}"
        for entry in before.tenants.values()
        if user is None or entry.tenant != user.tenant
    }
    users |= {entry.reverse_listen: f"network service {owner}" for owner, entry in before.services.items()}
    users |= dict.fromkeys(reserved, "the proxy itself (push, health)")
    for taken, whose in users.items():
        if taken is not None and listen.clashes_with(taken):
            raise ChangeRefusedError(
                f"{listen} clashes with {taken} of {whose}", "choose another address or port"
            )


def check_upstream(before: Directory, owner: NetworkService, upstream: Upstream) -> None:
    same_host = before.service_for_host(owner.tenant, upstream.host, upstream.port)
    if same_host is not None and same_host.owner != owner:
        raise ChangeRefusedError(
            f"{upstream.authority} is {same_host.owner} already", "give one network service per host and port"
        )
    check_not_tunnelled(upstream, before.tenants[owner.tenant].tunnel_hosts)


def check_other_roots(before: Directory, name: str, root: x509.Certificate) -> None:
    """Equal names would let OpenSSL look up the wrong tenant's root."""
    for other, entry in before.tenants.items():
        if other == name:
            continue
        theirs = entry.root_certificate
        if theirs == root or theirs.subject == root.subject or theirs.public_key() == root.public_key():
            raise ChangeRefusedError(
                f"the root (or its subject or key) is that of tenant {other}",
                "give each tenant a root of its own",
            )


def tunnel_rules(patterns: Iterable[str]) -> frozenset[str]:
    return frozenset(TunnelRule.parse(pattern).pattern for pattern in patterns)


def check_not_tunnelled(upstream: Upstream, rules: Iterable[str]) -> None:
    for pattern in rules:
        if TunnelRule(pattern).matches(upstream.host):
            raise ChangeRefusedError(
                f"{upstream.host} is a managed host and would be tunnelled by {pattern!r}, unsealed",
                "remove the pattern from the tunnelled hosts, or the service",
            )
