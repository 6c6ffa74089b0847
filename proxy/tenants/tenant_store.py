"""Changes of tenants: each is one transaction with one row of history (directory.py, rule 1).

A tenant has a root of its own, an interception CA that is made here, hosts that are tunnelled, and the agents
whose signatures count. A new root voids the certificates of services that it has not signed.
"""

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Connection, delete, insert, update

from envelope.certificates import (
    CertificateError,
    Identity,
    Role,
    fingerprint,
    read_identity,
    verify_certificate,
)
from envelope.keys import check_name
from proxy.tenants import certificates
from proxy.tenants.certificates import CredentialError
from proxy.tenants.directory import UNCHANGED, DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError
from proxy.tenants.key_files import new_files, remove_files
from proxy.tenants.model import Directory, Listen, TenantEntry
from proxy.tenants.recipient_store import command, update_of
from proxy.tenants.rules import (
    check_listener,
    check_not_tunnelled,
    check_other_roots,
    tenant_in,
    tunnel_rules,
)
from proxy.tenants.tables import proxy_user, service_credential, service_dialect, signer, tenant, tunnel_host


def add_tenant(
    store: DirectoryStore,
    name: str,
    root: x509.Certificate,
    *,
    actor: str,
    forward_listen: Listen | None = None,
    tunnel_hosts: Iterable[str] = (),
    signers: Sequence[x509.Certificate] = (),
    reserved: Iterable[Listen] = (),
) -> TenantEntry:
    """Provision a tenant and make its interception CA. *reserved*: addresses of this process's own.

    ChangeRefusedError if the name, the root or the listener is taken, or the root is no root.
    """
    check_name("tenant", name)
    now_s = store.now_s()
    rules = tunnel_rules(tunnel_hosts)
    _check_root(store, root)
    _check_signers(store, name, root, signers)
    ca = certificates.make_interception_ca(name, now_s=now_s)
    token = secrets.token_hex(4)
    ca_certificate_file, ca_key_file = f"ca/{name}-{token}.pem", f"ca/{name}-{token}.key"

    def change(connection: Connection, before: Directory) -> Draft:
        if name in before.tenants:
            raise ChangeRefusedError(f"tenant {name} exists", f"change it by `sealgate tenant update {name}`")
        check_other_roots(before, name, root)
        if forward_listen is not None:
            check_listener(before, forward_listen, reserved, user=None)
        connection.execute(
            insert(tenant).values(
                id=name,
                root_der=root.public_bytes(Encoding.DER),
                forward_address=None if forward_listen is None else str(forward_listen),
                ca_certificate_file=ca_certificate_file,
                ca_key_file=ca_key_file,
                created_at_ms=int(now_s * 1000),
                updated_at_ms=int(now_s * 1000),
            )
        )
        _replace_tunnel_hosts(connection, name, rules)
        _replace_signers(connection, name, signers)
        detail = {"root_sha256": fingerprint(root).hex()}
        if forward_listen is not None:
            detail["forward_listen"] = str(forward_listen)
        if rules:
            detail["tunnel_hosts"] = " ".join(sorted(rules))
        if signers:
            detail["signers"] = " ".join(fingerprint(pin).hex() for pin in signers)
        return Draft(action="tenant-added", tenant=name, detail=detail)

    with new_files(store.state_dir) as files:
        files.certificate(ca_certificate_file, ca.certificate)
        files.private_key(ca_key_file, ca.key)
        after = store.change(change, actor)
    return after.tenants[name]


def update_tenant(
    store: DirectoryStore,
    name: str,
    *,
    actor: str,
    root: x509.Certificate | None = None,
    forward_listen: object = UNCHANGED,
    tunnel_hosts: Iterable[str] | None = None,
    signers: Sequence[x509.Certificate] | None = None,
    reserved: Iterable[Listen] = (),
) -> TenantEntry:
    """Replace what is given; *forward_listen* is a Listen or None.

    A new *root* voids the services' certificates that it has not signed.

    ChangeRefusedError as for `add_tenant`, or if a managed host would be tunnelled.
    """
    if root is not None:
        _check_root(store, root)
    rules = None if tunnel_hosts is None else tunnel_rules(tunnel_hosts)

    def change(connection: Connection, before: Directory) -> Draft:
        entry = tenant_in(before, name)
        detail: dict[str, str] = {}
        values: dict[str, object] = {"updated_at_ms": store.now_ms()}
        current_root = root or entry.root_certificate
        if root is not None:
            check_other_roots(before, name, root)
            values["root_der"] = root.public_bytes(Encoding.DER)
            detail["root_sha256"] = fingerprint(root).hex()
            _drop_foreign_certificates(store, connection, before, name, root)
        if forward_listen is not UNCHANGED:
            listen = forward_listen if isinstance(forward_listen, Listen) else None
            if listen is not None and listen != entry.forward_listen:
                check_listener(before, listen, reserved, user=entry)
            values["forward_address"] = None if listen is None else str(listen)
            detail["forward_listen"] = "none" if listen is None else str(listen)
        if rules is not None:
            for service in before.services_of(name):
                check_not_tunnelled(service.upstream, rules)
            _replace_tunnel_hosts(connection, name, rules)
            detail["tunnel_hosts"] = " ".join(sorted(rules))
        if signers is not None:
            _check_signers(store, name, current_root, signers)
            _replace_signers(connection, name, signers)
            detail["signers"] = " ".join(fingerprint(pin).hex() for pin in signers)
        connection.execute(update(tenant).where(tenant.c.id == name).values(values))
        return Draft(action="tenant-updated", tenant=name, detail=detail)

    return store.change(change, actor).tenants[name]


def remove_tenant(store: DirectoryStore, name: str, *, actor: str) -> None:
    """Remove a tenant, its CA and credentials. ChangeRefusedError if it has network services or keys."""
    obsolete: list[Path] = []

    def change(connection: Connection, before: Directory) -> Draft:
        entry = tenant_in(before, name)
        recipients = before.recipients_of(name)
        if recipients:
            raise ChangeRefusedError(
                f"tenant {name} has {len(recipients)} network service(s) or key(s)",
                "remove them first: " + ", ".join(command("remove", entry) for entry in recipients),
            )
        obsolete.extend([entry.interception_ca.certificate_file, entry.interception_ca.key_file])
        for table in (tunnel_host, signer, service_dialect, service_credential, proxy_user):
            connection.execute(delete(table).where(table.c.tenant_id == name))
        connection.execute(delete(tenant).where(tenant.c.id == name))
        return Draft(action="tenant-removed", tenant=name, detail={})

    store.change(change, actor)
    remove_files(obsolete)


def _check_root(store: DirectoryStore, root: x509.Certificate) -> None:
    try:
        certificates.check_root(root, now_s=store.now_s())
    except CredentialError as error:
        raise ChangeRefusedError(str(error), "give the tenant's self-signed root certificate") from None


def _check_signers(
    store: DirectoryStore, name: str, root: x509.Certificate, signers: Iterable[x509.Certificate]
) -> None:
    for certificate in signers:
        identity = Identity(name, Role.AGENT_SIGNING, read_identity(certificate).name)
        verify_certificate(certificate, root=root, expected=identity, now_s=store.now_s())


def _drop_foreign_certificates(
    store: DirectoryStore, connection: Connection, before: Directory, name: str, root: x509.Certificate
) -> None:
    for service in before.recipients_of(name):
        if service.certificate is None:
            continue
        try:
            verify_certificate(
                service.certificate,
                root=root,
                expected=Identity(name, Role.SERVICE, service.owner.service),
                now_s=store.now_s(),
            )
        except CertificateError:
            connection.execute(update_of(service.owner).values(certificate_der=None))


def _replace_tunnel_hosts(connection: Connection, name: str, rules: Iterable[str]) -> None:
    connection.execute(delete(tunnel_host).where(tunnel_host.c.tenant_id == name))
    for pattern in sorted(rules):
        connection.execute(insert(tunnel_host).values(tenant_id=name, pattern=pattern))


def _replace_signers(connection: Connection, name: str, signers: Iterable[x509.Certificate]) -> None:
    connection.execute(delete(signer).where(signer.c.tenant_id == name))
    for digest, certificate in {fingerprint(pin).hex(): pin for pin in signers}.items():
        connection.execute(
            insert(signer).values(
                tenant_id=name, fingerprint=digest, certificate_der=certificate.public_bytes(Encoding.DER)
            )
        )
