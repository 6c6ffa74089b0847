"""Changes of network services in the directory (directory.py, rule 1: one transaction, one row of history).

Their keys and certificates are `recipient_store.py`'s, as those of named keys are.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cryptography import x509
from sqlalchemy import Connection, insert

from envelope.keys import NetworkService
from proxy.tenants import certificates
from proxy.tenants.certificates import KeyType
from proxy.tenants.directory import UNCHANGED, DirectoryStore, Draft
from proxy.tenants.directory_rows import options_text
from proxy.tenants.errors import ChangeRefusedError
from proxy.tenants.key_files import key_name, new_files, remove_files
from proxy.tenants.model import ANY_NAME, Directory, LegacyPolicy, Listen, ServiceEntry, TunnelRule, Upstream
from proxy.tenants.recipient_store import delete_recipient, update_of
from proxy.tenants.rules import check_free, check_listener, check_upstream, service_in, tenant_in
from proxy.tenants.tables import network_service


def add_service(
    store: DirectoryStore,
    owner: NetworkService,
    upstream: Upstream,
    *,
    actor: str,
    profile: str = "generic",
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    reverse_listen: Listen | None = None,
    key_type: KeyType = KeyType.P256,
    reserved: Iterable[Listen] = (),
    profile_options: Mapping[str, object] | None = None,
    reverse_names: Iterable[str] = (),
) -> x509.CertificateSigningRequest:
    """Provision a network service; its new private key stays here, the CSR is for the tenant's root.

    *profile_options*: JSON-able; whoever calls has had the profile check them. *reverse_names*: as for
    `update_service`.

    ChangeRefusedError if the id, the host or the listener is taken, or the host is tunnelled.
    """
    tenant_in(store.snapshot(), owner.tenant)  # before a directory is made for its keys
    key = certificates.new_private_key(key_type)
    key_file = key_name(owner)
    names = _name_rules(reverse_names)

    def change(connection: Connection, before: Directory) -> Draft:
        tenant_in(before, owner.tenant)
        check_free(before, owner)
        if owner in before.services:
            raise ChangeRefusedError(
                f"network service {owner} exists, and not as given here",
                f"change it by `sealgate service update {owner}`; a new key: `sealgate service renew`",
            )
        check_upstream(before, owner, upstream)
        if reverse_listen is not None:
            check_listener(before, reverse_listen, reserved, user=None)
        now_ms = store.now_ms()
        connection.execute(
            insert(network_service).values(
                tenant_id=owner.tenant,
                name=owner.service,
                upstream_scheme=upstream.scheme,
                upstream_host=upstream.host,
                upstream_port=upstream.port,
                profile=profile,
                legacy=legacy.value,
                reverse_listen=None if reverse_listen is None else str(reverse_listen),
                reverse_names=" ".join(names) or None,
                profile_options=options_text(profile_options),
                key_file=key_file,
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
        )
        detail = {
            "upstream": str(upstream),
            "profile": profile,
            "legacy": legacy.value,
            "key_type": key_type.value,
        }
        if reverse_listen is not None:
            detail["reverse_listen"] = str(reverse_listen)
        if names:
            detail["reverse_names"] = " ".join(names)
        if (text := options_text(profile_options)) is not None:
            detail["profile_options"] = text
        return Draft(action="service-added", tenant=owner.tenant, service=owner.service, detail=detail)

    with new_files(store.state_dir) as files:
        files.private_key(key_file, key)
        store.change(change, actor)
    return certificates.make_service_csr(owner, key)


def update_service(
    store: DirectoryStore,
    owner: NetworkService,
    *,
    actor: str,
    upstream: Upstream | None = None,
    profile: str | None = None,
    legacy: LegacyPolicy | None = None,
    reverse_listen: object = UNCHANGED,
    reverse_names: Iterable[str] | None = None,
    profile_options: Callable[[ServiceEntry], Mapping[str, object]] | None = None,
    reserved: Iterable[Listen] = (),
) -> ServiceEntry:
    """Replace what is given; *reverse_listen* is a Listen or None. Keys and certificate stay.

    *profile_options* makes of the service as it stands all its options, checked by the profile.

    *reverse_names*: host names (or `*.domain`, or ANY_NAME) that clients of the reverse listener may use;
    none: those of the service and the listener.

    ChangeRefusedError as for `add_service`.
    """
    names = None if reverse_names is None else _name_rules(reverse_names)

    def change(connection: Connection, before: Directory) -> Draft:
        entry = service_in(before, owner)
        values: dict[str, object] = {"updated_at_ms": store.now_ms()}
        detail: dict[str, str] = {}
        if upstream is not None:
            check_upstream(before, owner, upstream)
            values |= {
                "upstream_scheme": upstream.scheme,
                "upstream_host": upstream.host,
                "upstream_port": upstream.port,
            }
            detail["upstream"] = str(upstream)
        if profile is not None:
            values["profile"] = detail["profile"] = profile
        if legacy is not None:
            values["legacy"] = detail["legacy"] = legacy.value
        if reverse_listen is not UNCHANGED:
            listen = reverse_listen if isinstance(reverse_listen, Listen) else None
            if listen is not None and listen != entry.reverse_listen:
                check_listener(before, listen, reserved, user=None)
            values["reverse_listen"] = None if listen is None else str(listen)
            detail["reverse_listen"] = "none" if listen is None else str(listen)
        if names is not None:
            values["reverse_names"] = " ".join(names) or None
            detail["reverse_names"] = " ".join(names)
        if profile_options is not None:
            text = values["profile_options"] = options_text(profile_options(entry))
            detail["profile_options"] = text or "{}"
        connection.execute(update_of(owner).values(values))
        return Draft(action="service-updated", tenant=owner.tenant, service=owner.service, detail=detail)

    return store.change(change, actor).services[owner]


def remove_service(store: DirectoryStore, owner: NetworkService, *, actor: str) -> None:
    """Remove a network service and its private key. What it has sealed stays in the cloud, sealed."""
    obsolete: list[Path] = []

    def change(connection: Connection, before: Directory) -> Draft:
        service_in(before, owner)
        obsolete.extend(delete_recipient(store, connection, owner))
        return Draft(action="service-removed", tenant=owner.tenant, service=owner.service, detail={})

    store.change(change, actor)
    remove_files(obsolete)


def _name_rules(reverse_names: Iterable[str]) -> list[str]:
    return sorted({name if name == ANY_NAME else TunnelRule.parse(name).pattern for name in reverse_names})
