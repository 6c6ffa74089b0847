"""The directory: tenants and network services in a database, and the history of every change.

1. A change is one transaction: it checks the rules against what is there, raises the revision by one and
   leaves one row of history. Changes queue (SQLite: BEGIN IMMEDIATE, PostgreSQL: the revision's row lock).
2. What is committed survives a power cut (runtime/database.py).
3. No two tenants and services can be confused: listeners, ids, hosts within a tenant, roots and their names
   differ, and a managed host is never tunnelled.
4. Private keys are files, written before the row that names them is committed and removed after the row that
   did is gone; a crash between leaves a file that nobody uses, never a row without its key.
5. A named key of the encryption service is a row like a network service's, without upstream; dialects and
   credentials are `service_store.py`'s.
6. The history is the record of provisioning. The running proxy copies it to its audit log before it acts
   (proxy/tenants/watch.py).
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import ColumnElement, Connection, Engine, Row, and_, delete, insert, select, update
from sqlalchemy.engine import make_url

from envelope.certificates import (
    CertificateError,
    Identity,
    Role,
    fingerprint,
    read_identity,
    verify_certificate,
)
from envelope.errors import FormatError, SealgateError
from envelope.keys import NetworkService, check_name
from proxy.encryption_service.credentials import SecretSealer
from proxy.encryption_service.model import NamedKey
from proxy.tenants import certificates, migrations, service_rows
from proxy.tenants.certificates import CredentialError, KeyType
from proxy.tenants.model import (
    ANY_NAME,
    CertificateFiles,
    Directory,
    LegacyPolicy,
    Listen,
    Recipient,
    ServiceEntry,
    TenantEntry,
    TunnelRule,
    Upstream,
)
from proxy.tenants.tables import (
    directory,
    history,
    network_service,
    proxy_user,
    service_credential,
    service_dialect,
    signer,
    tenant,
    tunnel_host,
)
from proxy.tenants.user_rows import read_access, read_users
from proxy.tenants.vault_rows import read_vault
from proxy.vault.model import UpstreamCredential
from runtime.clock import Clock
from runtime.database import make_engine, read_only, transaction

BUSY_TIMEOUT_S: Final = 10.0
_UNCHANGED: Final = object()


class ChangeRefusedError(SealgateError):
    """The change would break a rule of the directory; nothing was changed."""

    code = "refused"

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(cause)
        self.next_step = next_step


class NotThereError(ChangeRefusedError):
    """The tenant or network service does not exist."""

    code = "not-there"


class DirectoryUnavailableError(SealgateError):
    """The database cannot be read or written."""

    def __init__(
        self,
        cause: str,
        next_step: str = (
            "check proxy.database_url, the disk and the database server; `sealgate doctor` says more"
        ),
    ) -> None:
        super().__init__(f"directory database: {cause}")
        self.next_step = next_step


class NoDirectoryError(DirectoryUnavailableError):
    """There is no database yet, or an empty one: nothing has been provisioned."""

    def __init__(self, place: str) -> None:
        super().__init__(f"{place} does not exist", "the first `sealgate tenant add` makes it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One row of history; `detail` holds public facts only."""

    revision: int
    at_ms: int
    actor: str
    action: str
    tenant: str
    service: str | None
    detail: Mapping[str, str]

    def as_json(self) -> dict[str, object]:
        return {
            "revision": self.revision,
            "at_ms": self.at_ms,
            "actor": self.actor,
            "action": self.action,
            "tenant": self.tenant,
            "service": self.service,
            "detail": dict(self.detail),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a change is about to write."""

    action: str
    tenant: str
    service: str | None = None
    detail: Mapping[str, str]


class DirectoryStore:
    """The only way to the tables. Blocking: on an event loop call it by `asyncio.to_thread`."""

    def __init__(self, engine: Engine, state_dir: Path, clock: Clock) -> None:
        """Use `DirectoryStore.open`."""
        self._engine = engine
        self._reader = read_only(engine)
        self._state_dir = state_dir
        self._clock = clock
        self._sealer = SecretSealer(state_dir)

    @classmethod
    def open(cls, url: str, state_dir: Path, *, clock: Clock, migrate: bool = True) -> Self:
        """Connect, and with *migrate* bring the schema to the newest version.

        DirectoryUnavailableError if the database cannot be used, or without *migrate* has another schema.
        """
        parsed = make_url(url)
        if parsed.drivername == "sqlite" and parsed.database:
            _prepare_file(Path(parsed.database), create=migrate)
        engine = make_engine(
            parsed,
            failure=DirectoryUnavailableError,
            busy_timeout_s=BUSY_TIMEOUT_S,
            pool_size=2,
            max_overflow=2,
        )
        store = cls(engine, state_dir, clock)
        try:
            with store._transaction() as connection:
                if migrate:
                    migrations.upgrade(connection)
                else:
                    _check_schema(connection)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # Reading.

    def revision(self) -> int:
        """The number of the last change. Cheap: the running proxy asks every second."""
        with self._transaction(self._reader) as connection:
            return int(connection.execute(select(directory.c.revision)).scalar_one())

    def snapshot(self) -> Directory:
        """The whole directory at one revision."""
        with self._transaction(self._reader) as connection:
            return self._snapshot(connection)

    def history(self, *, after: int = 0, limit: int = 1000) -> list[Change]:
        """Changes with a revision above *after*, oldest first."""
        with self._transaction(self._reader) as connection:
            rows = connection.execute(
                select(history).where(history.c.revision > after).order_by(history.c.revision).limit(limit)
            )
            return [
                Change(
                    revision=row.revision,
                    at_ms=row.at_ms,
                    actor=row.actor,
                    action=row.action,
                    tenant=row.tenant_id,
                    service=row.service,
                    detail=json.loads(row.detail),
                )
                for row in rows
            ]

    def private_keys(self) -> set[Path]:
        """Every private key file in use: of network services, of renewals under way, of interception CAs."""
        with self._transaction(self._reader) as connection:
            services = connection.execute(
                select(network_service.c.key_file, network_service.c.pending_key_file)
            )
            names = {name for row in services for name in row if name is not None}
            names.update(connection.execute(select(tenant.c.ca_key_file)).scalars())
        return {self._state_dir / name for name in names}

    # Changing tenants.

    def add_tenant(
        self,
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
        now_s = self._clock.wall_s()
        rules = _tunnel_rules(tunnel_hosts)
        self._check_root(root)
        self._check_signers(name, root, signers)
        ca = certificates.make_interception_ca(name, now_s=now_s)
        token = secrets.token_hex(4)
        ca_certificate_file, ca_key_file = f"ca/{name}-{token}.pem", f"ca/{name}-{token}.key"

        def change(connection: Connection, before: Directory) -> Draft:
            if name in before.tenants:
                raise ChangeRefusedError(
                    f"tenant {name} exists", f"change it by `sealgate tenant update {name}`"
                )
            _check_other_roots(before, name, root)
            if forward_listen is not None:
                _check_listener(before, forward_listen, reserved, user=None)
            connection.execute(
                insert(tenant).values(
                    id=name,
                    root_der=root.public_bytes(Encoding.DER),
                    forward_address=None if forward_listen is None else str(forward_listen),
                    ca_certificate_file=ca_certificate_file,
                    ca_key_file=ca_key_file,
                    created_at_ms=_ms(now_s),
                    updated_at_ms=_ms(now_s),
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

        with self.new_files() as files:
            files.certificate(ca_certificate_file, ca.certificate)
            files.private_key(ca_key_file, ca.key)
            after = self.change(change, actor)
        return after.tenants[name]

    def update_tenant(
        self,
        name: str,
        *,
        actor: str,
        root: x509.Certificate | None = None,
        forward_listen: object = _UNCHANGED,
        tunnel_hosts: Iterable[str] | None = None,
        signers: Sequence[x509.Certificate] | None = None,
        reserved: Iterable[Listen] = (),
    ) -> TenantEntry:
        """Replace what is given; *forward_listen* is a Listen or None.

        A new *root* voids the services' certificates that it has not signed.

        ChangeRefusedError as for `add_tenant`, or if a managed host would be tunnelled.
        """
        if root is not None:
            self._check_root(root)
        rules = None if tunnel_hosts is None else _tunnel_rules(tunnel_hosts)

        def change(connection: Connection, before: Directory) -> Draft:
            entry = tenant_in(before, name)
            detail: dict[str, str] = {}
            values: dict[str, object] = {"updated_at_ms": _ms(self._clock.wall_s())}
            current_root = root or entry.root_certificate
            if root is not None:
                _check_other_roots(before, name, root)
                values["root_der"] = root.public_bytes(Encoding.DER)
                detail["root_sha256"] = fingerprint(root).hex()
                self._drop_foreign_certificates(connection, before, name, root)
            if forward_listen is not _UNCHANGED:
                listen = forward_listen if isinstance(forward_listen, Listen) else None
                if listen is not None and listen != entry.forward_listen:
                    _check_listener(before, listen, reserved, user=entry)
                values["forward_address"] = None if listen is None else str(listen)
                detail["forward_listen"] = "none" if listen is None else str(listen)
            if rules is not None:
                for service in before.services_of(name):
                    _check_not_tunnelled(service.upstream, rules)
                _replace_tunnel_hosts(connection, name, rules)
                detail["tunnel_hosts"] = " ".join(sorted(rules))
            if signers is not None:
                self._check_signers(name, current_root, signers)
                _replace_signers(connection, name, signers)
                detail["signers"] = " ".join(fingerprint(pin).hex() for pin in signers)
            connection.execute(update(tenant).where(tenant.c.id == name).values(values))
            return Draft(action="tenant-updated", tenant=name, detail=detail)

        return self.change(change, actor).tenants[name]

    def remove_tenant(self, name: str, *, actor: str) -> None:
        """Remove a tenant, its CA and credentials. ChangeRefusedError if it has network services or keys."""
        obsolete: list[Path] = []

        def change(connection: Connection, before: Directory) -> Draft:
            entry = tenant_in(before, name)
            recipients = before.recipients_of(name)
            if recipients:
                raise ChangeRefusedError(
                    f"tenant {name} has {len(recipients)} network service(s) or key(s)",
                    "remove them first: " + ", ".join(f"`{_removal(entry)}`" for entry in recipients),
                )
            obsolete.extend([entry.interception_ca.certificate_file, entry.interception_ca.key_file])
            for table in (tunnel_host, signer, service_dialect, service_credential, proxy_user):
                connection.execute(delete(table).where(table.c.tenant_id == name))
            connection.execute(delete(tenant).where(tenant.c.id == name))
            return Draft(action="tenant-removed", tenant=name, detail={})

        self.change(change, actor)
        remove_files(obsolete)

    # Changing network services.

    def add_service(
        self,
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
        tenant_in(self.snapshot(), owner.tenant)  # before a directory is made for its keys
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
            _check_upstream(before, owner, upstream)
            if reverse_listen is not None:
                _check_listener(before, reverse_listen, reserved, user=None)
            now_ms = _ms(self._clock.wall_s())
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
                    profile_options=_options_text(profile_options),
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
            if (text := _options_text(profile_options)) is not None:
                detail["profile_options"] = text
            return Draft(action="service-added", tenant=owner.tenant, service=owner.service, detail=detail)

        with self.new_files() as files:
            files.private_key(key_file, key)
            self.change(change, actor)
        return certificates.make_service_csr(owner, key)

    def certificate_request(self, owner: NetworkService) -> x509.CertificateSigningRequest:
        """The CSR of the newest key of *owner*: the one that waits for its certificate, if there is one."""
        with self._transaction(self._reader) as connection:
            recipient_in(self._snapshot(connection), owner)
            row = _service_row(connection, owner)
        try:
            key = certificates.read_private_key(self._state_dir / (row.pending_key_file or row.key_file))
        except CredentialError as error:
            raise ChangeRefusedError(
                str(error), f"make a new key by `sealgate service renew {owner}`"
            ) from None
        return certificates.make_service_csr(owner, key)

    def update_service(
        self,
        owner: NetworkService,
        *,
        actor: str,
        upstream: Upstream | None = None,
        profile: str | None = None,
        legacy: LegacyPolicy | None = None,
        reverse_listen: object = _UNCHANGED,
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
            entry = _service_in(before, owner)
            values: dict[str, object] = {"updated_at_ms": _ms(self._clock.wall_s())}
            detail: dict[str, str] = {}
            if upstream is not None:
                _check_upstream(before, owner, upstream)
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
            if reverse_listen is not _UNCHANGED:
                listen = reverse_listen if isinstance(reverse_listen, Listen) else None
                if listen is not None and listen != entry.reverse_listen:
                    _check_listener(before, listen, reserved, user=None)
                values["reverse_listen"] = None if listen is None else str(listen)
                detail["reverse_listen"] = "none" if listen is None else str(listen)
            if names is not None:
                values["reverse_names"] = " ".join(names) or None
                detail["reverse_names"] = " ".join(names)
            if profile_options is not None:
                text = values["profile_options"] = _options_text(profile_options(entry))
                detail["profile_options"] = text or "{}"
            connection.execute(_update_service(owner).values(values))
            return Draft(action="service-updated", tenant=owner.tenant, service=owner.service, detail=detail)

        return self.change(change, actor).services[owner]

    def renew_service(
        self, owner: NetworkService, *, actor: str, key_type: KeyType = KeyType.P256
    ) -> x509.CertificateSigningRequest:
        """A new key and its CSR; the present certificate serves on until the new one is imported."""
        key = certificates.new_private_key(key_type)
        key_file = key_name(owner)
        obsolete: list[Path] = []

        def change(connection: Connection, before: Directory) -> Draft:
            entry = recipient_in(before, owner)
            row = _service_row(connection, owner)
            values: dict[str, object] = {"updated_at_ms": _ms(self._clock.wall_s())}
            if entry.certificate is None:
                obsolete.append(entry.key_file)
                values["key_file"] = key_file
            else:
                if row.pending_key_file is not None:
                    obsolete.append(self._state_dir / row.pending_key_file)
                values["pending_key_file"] = key_file
            connection.execute(_update_service(owner).values(values))
            detail = {"key_type": key_type.value}
            return Draft(action="service-renewed", tenant=owner.tenant, service=owner.service, detail=detail)

        with self.new_files() as files:
            files.private_key(key_file, key)
            self.change(change, actor)
        remove_files(obsolete)
        return certificates.make_service_csr(owner, key)

    def import_certificate(
        self, owner: NetworkService, certificate: x509.Certificate, *, actor: str
    ) -> Recipient:
        """Take the certificate that the tenant's root made of the CSR. Importing it again changes nothing.

        CertificateError if it does not hold under the tenant's root; ChangeRefusedError if not for our key.
        """
        obsolete: list[Path] = []

        def change(connection: Connection, before: Directory) -> Draft | None:
            entry = recipient_in(before, owner)
            verify_certificate(
                certificate,
                root=before.tenants[owner.tenant].root_certificate,
                expected=Identity(owner.tenant, Role.SERVICE, owner.service),
                now_s=self._clock.wall_s(),
            )
            if entry.certificate == certificate:
                return None
            row = _service_row(connection, owner)
            key_file = self._key_file_for(certificate, [row.pending_key_file, row.key_file], owner)
            values: dict[str, object] = {
                "certificate_der": certificate.public_bytes(Encoding.DER),
                "key_file": key_file,
                "updated_at_ms": _ms(self._clock.wall_s()),
            }
            if key_file == row.pending_key_file:
                values["pending_key_file"] = None
                obsolete.append(self._state_dir / row.key_file)
            connection.execute(_update_service(owner).values(values))
            return Draft(
                action="certificate-imported",
                tenant=owner.tenant,
                service=owner.service,
                detail={
                    "certificate_sha256": fingerprint(certificate).hex(),
                    "not_after": certificate.not_valid_after_utc.isoformat(),
                },
            )

        after = self.change(change, actor)
        remove_files(obsolete)
        return after.recipients[owner]

    def remove_service(self, owner: NetworkService, *, actor: str) -> None:
        """Remove a network service and its private key. What it has sealed stays in the cloud, sealed."""
        obsolete: list[Path] = []

        def change(connection: Connection, before: Directory) -> Draft:
            _service_in(before, owner)
            obsolete.extend(self.delete_recipient(connection, owner))
            return Draft(action="service-removed", tenant=owner.tenant, service=owner.service, detail={})

        self.change(change, actor)
        remove_files(obsolete)

    # For service_store.py.

    @property
    def state_dir(self) -> Path:
        return self._state_dir

    def now_ms(self) -> int:
        return _ms(self._clock.wall_s())

    def delete_recipient(self, connection: Connection, owner: NetworkService) -> list[Path]:
        """Delete the row; the key files that are then nobody's, to be removed once that is committed."""
        row = _service_row(connection, owner)
        connection.execute(delete(network_service).where(_is(owner)))
        names = (row.key_file, row.pending_key_file)
        return [self._state_dir / name for name in names if name is not None]

    def change(self, change: Callable[[Connection, Directory], Draft | None], actor: str) -> Directory:
        """Run *change* alone, with its row of history and the next revision; None changed nothing."""
        with self._transaction() as connection:
            revision = int(
                connection.execute(select(directory.c.revision).with_for_update()).scalar_one()  # rule 1
            )
            draft = change(connection, self._snapshot(connection))
            if draft is not None:
                connection.execute(update(directory).values(revision=revision + 1))
                connection.execute(
                    insert(history).values(
                        revision=revision + 1,
                        at_ms=_ms(self._clock.wall_s()),
                        actor=actor[:255],
                        action=draft.action,
                        tenant_id=draft.tenant,
                        service=draft.service,
                        detail=json.dumps(dict(draft.detail), sort_keys=True),
                    )
                )
            return self._snapshot(connection)

    def _snapshot(self, connection: Connection) -> Directory:
        revision = connection.execute(select(directory.c.revision)).scalar_one()
        tunnels: dict[str, set[str]] = {}
        for row in connection.execute(select(tunnel_host)):
            tunnels.setdefault(row.tenant_id, set()).add(row.pattern)
        pins: dict[str, list[x509.Certificate]] = {}
        for row in connection.execute(select(signer).order_by(signer.c.fingerprint)):
            pins.setdefault(row.tenant_id, []).append(x509.load_der_x509_certificate(row.certificate_der))
        tenants = [
            TenantEntry(
                tenant=row.id,
                root_certificate=x509.load_der_x509_certificate(row.root_der),
                forward_listen=None if row.forward_address is None else Listen.parse(row.forward_address),
                tunnel_hosts=frozenset(tunnels.get(row.id, ())),
                interception_ca=CertificateFiles(
                    certificate_file=self._state_dir / row.ca_certificate_file,
                    key_file=self._state_dir / row.ca_key_file,
                ),
                signers=tuple(pins.get(row.id, ())),
                access=_sound(read_access, row.access),
            )
            for row in connection.execute(select(tenant).order_by(tenant.c.id))
        ]
        vault = read_vault(connection, self._sealer)
        services = [
            self._service_entry(row, vault.get(NetworkService(row.tenant_id, row.name), {}))
            for row in connection.execute(
                select(network_service)
                .where(network_service.c.upstream_host.is_not(None))
                .order_by(network_service.c.tenant_id, network_service.c.name)
            )
        ]
        try:
            encryption_service = service_rows.read(connection, self._state_dir)
        except service_rows.BrokenRowError as error:
            raise DirectoryUnavailableError(str(error)) from error
        return Directory.of(
            int(revision), tenants, services, encryption_service, users=read_users(connection)
        )

    def _service_entry(self, row: Row[Any], credentials: Mapping[str, UpstreamCredential]) -> ServiceEntry:
        der = row.certificate_der
        return ServiceEntry(
            owner=NetworkService(row.tenant_id, row.name),
            upstream=Upstream(row.upstream_scheme, row.upstream_host, row.upstream_port),
            profile=row.profile,
            legacy=LegacyPolicy(row.legacy),
            reverse_listen=None if row.reverse_listen is None else Listen.parse(row.reverse_listen),
            certificate=None if der is None else x509.load_der_x509_certificate(der),
            key_file=self._state_dir / row.key_file,
            reverse_names=frozenset((row.reverse_names or "").split()),
            profile_options=_sound(_options, row.profile_options),
            credentials=credentials,
        )

    def _check_root(self, root: x509.Certificate) -> None:
        try:
            certificates.check_root(root, now_s=self._clock.wall_s())
        except CredentialError as error:
            raise ChangeRefusedError(str(error), "give the tenant's self-signed root certificate") from None

    def _check_signers(self, name: str, root: x509.Certificate, signers: Iterable[x509.Certificate]) -> None:
        for certificate in signers:
            identity = Identity(name, Role.AGENT_SIGNING, read_identity(certificate).name)
            verify_certificate(certificate, root=root, expected=identity, now_s=self._clock.wall_s())

    def _drop_foreign_certificates(
        self, connection: Connection, before: Directory, name: str, root: x509.Certificate
    ) -> None:
        for service in before.recipients_of(name):
            if service.certificate is None:
                continue
            try:
                verify_certificate(
                    service.certificate,
                    root=root,
                    expected=Identity(name, Role.SERVICE, service.owner.service),
                    now_s=self._clock.wall_s(),
                )
            except CertificateError:
                connection.execute(_update_service(service.owner).values(certificate_der=None))

    def _key_file_for(
        self, certificate: x509.Certificate, candidates: Sequence[str | None], owner: NetworkService
    ) -> str:
        for name in candidates:
            if name is None:
                continue
            try:
                key = certificates.read_private_key(self._state_dir / name)
            except CredentialError as error:
                raise ChangeRefusedError(
                    str(error), f"make a new key by `sealgate service renew {owner}`"
                ) from None
            if key.public_key() == certificate.public_key():
                return name
        raise ChangeRefusedError(
            f"the certificate is for another key than those of {owner} on this proxy",
            "have the tenant's root sign the CSR that was written last",
        )

    @contextlib.contextmanager
    def new_files(self) -> Iterator["NewFiles"]:
        """Files that go again if the change that names them does not come about."""
        files = NewFiles(self._state_dir)
        try:
            yield files
        except BaseException:
            remove_files(files.written)
            raise

    def _transaction(self, engine: Engine | None = None) -> AbstractContextManager[Connection]:
        """One transaction. DirectoryUnavailableError for whatever the database raises."""
        return transaction(engine or self._engine, failure=DirectoryUnavailableError)


class NewFiles:
    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.written: list[Path] = []

    def private_key(self, name: str, key: certificates.PrivateKey) -> None:
        path = self._state_dir / name
        certificates.write_private_key(key, path)
        self.written.append(path)

    def certificate(self, name: str, certificate: x509.Certificate) -> None:
        path = self._state_dir / name
        certificates.write_new_file(path, certificates.certificate_pem(certificate), mode=0o600)
        self.written.append(path)


# Rules.


def tenant_in(before: Directory, name: str) -> TenantEntry:
    entry = before.tenants.get(name)
    if entry is None:
        raise NotThereError(f"there is no tenant {name}", "see `sealgate list`")
    return entry


def _service_in(before: Directory, owner: NetworkService) -> ServiceEntry:
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


def _removal(entry: Recipient) -> str:
    noun = "key" if isinstance(entry, NamedKey) else "service"
    return f"sealgate {noun} remove {entry.owner}"


def _sound[T](read: Callable[[str | None], T], text: str | None) -> T:
    try:
        return read(text)
    except FormatError as error:
        raise DirectoryUnavailableError(str(error)) from error


def _name_rules(reverse_names: Iterable[str]) -> list[str]:
    return sorted({name if name == ANY_NAME else TunnelRule.parse(name).pattern for name in reverse_names})


def _options_text(options: Mapping[str, object] | None) -> str | None:
    return json.dumps(options, sort_keys=True) if options else None


def _options(text: str | None) -> dict[str, object]:
    options = {} if text is None else json.loads(text)
    if not isinstance(options, dict):
        raise FormatError("the options of a profile are damaged")
    return options


def _check_listener(
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


def _check_upstream(before: Directory, owner: NetworkService, upstream: Upstream) -> None:
    same_host = before.service_for_host(owner.tenant, upstream.host, upstream.port)
    if same_host is not None and same_host.owner != owner:
        raise ChangeRefusedError(
            f"{upstream.authority} is {same_host.owner} already", "give one network service per host and port"
        )
    _check_not_tunnelled(upstream, before.tenants[owner.tenant].tunnel_hosts)


def _check_other_roots(before: Directory, name: str, root: x509.Certificate) -> None:
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


def _tunnel_rules(patterns: Iterable[str]) -> frozenset[str]:
    return frozenset(TunnelRule.parse(pattern).pattern for pattern in patterns)


def _check_not_tunnelled(upstream: Upstream, rules: Iterable[str]) -> None:
    for pattern in rules:
        if TunnelRule(pattern).matches(upstream.host):
            raise ChangeRefusedError(
                f"{upstream.host} is a managed host and would be tunnelled by {pattern!r}, unsealed",
                "remove the pattern from the tunnelled hosts, or the service",
            )


# Statements.


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


def _service_row(connection: Connection, owner: NetworkService) -> Row[Any]:
    return connection.execute(select(network_service).where(_is(owner))).one()


def _update_service(owner: NetworkService) -> Any:
    return update(network_service).where(_is(owner))


def _is(owner: NetworkService) -> ColumnElement[bool]:
    return and_(network_service.c.tenant_id == owner.tenant, network_service.c.name == owner.service)


def key_name(owner: NetworkService) -> str:
    return f"keys/{owner.tenant}/{owner.service}-{secrets.token_hex(4)}.key"


def remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # nobody uses it any more; doctor lists what is left
            path.unlink(missing_ok=True)


def _ms(wall_s: float) -> int:
    return int(wall_s * 1000)


# Connections.


def _check_schema(connection: Connection) -> None:
    found = migrations.current(connection)
    if found is None:
        raise NoDirectoryError("its schema")
    if found != migrations.HEAD:
        raise DirectoryUnavailableError(
            f"schema version {found}, this program needs {migrations.HEAD}",
            "`sealgate run` brings an older one to it; for a newer one install the newer program",
        )


def _prepare_file(path: Path, *, create: bool) -> None:
    if not create and not path.exists():
        raise NoDirectoryError(str(path))
    try:
        certificates.make_private_directory(path.parent)
    except OSError as error:
        raise DirectoryUnavailableError(f"{error.filename}: {error.strerror}") from None
