"""The keys and certificates of recipients in the directory: of network services and of named keys.

1. A private key is made here and stays here; what leaves is a request for a certificate.
2. A certificate serves until its successor is imported: the renewed key waits beside it.
3. Only the tenant's root certifies, only this recipient, and only a key that is here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import ColumnElement, Connection, Row, and_, delete, select, update

from envelope.certificates import Identity, Role, fingerprint, verify_certificate
from envelope.keys import NetworkService
from proxy.encryption_service.model import NamedKey
from proxy.tenants import certificates
from proxy.tenants.certificates import CredentialError, KeyType
from proxy.tenants.directory import DirectoryStore, Draft
from proxy.tenants.errors import ChangeRefusedError
from proxy.tenants.key_files import key_name, new_files, remove_files
from proxy.tenants.model import Directory, Recipient
from proxy.tenants.rules import recipient_in
from proxy.tenants.tables import network_service


def certificate_request(store: DirectoryStore, owner: NetworkService) -> x509.CertificateSigningRequest:
    """The CSR of the newest key of *owner*: the one that waits for its certificate, if there is one."""
    key_file = store.newest_key_file(owner)
    try:
        key = certificates.read_private_key(key_file)
    except CredentialError as error:
        entry = store.snapshot().recipients[owner]
        raise ChangeRefusedError(str(error), f"make a new key by {command('renew', entry)}") from None
    return certificates.make_service_csr(owner, key)


def renew_key(
    store: DirectoryStore, owner: NetworkService, *, actor: str, key_type: KeyType = KeyType.P256
) -> x509.CertificateSigningRequest:
    """A new key and its CSR; the present certificate serves on until the new one is imported."""
    key = certificates.new_private_key(key_type)
    key_file = key_name(owner)
    obsolete: list[Path] = []

    def change(connection: Connection, before: Directory) -> Draft:
        entry = recipient_in(before, owner)
        row = row_of(connection, owner)
        values: dict[str, object] = {"updated_at_ms": store.now_ms()}
        if entry.certificate is None:
            obsolete.append(entry.key_file)
            values["key_file"] = key_file
        else:
            if row.pending_key_file is not None:
                obsolete.append(store.state_dir / row.pending_key_file)
            values["pending_key_file"] = key_file
        connection.execute(update_of(owner).values(values))
        detail = {"key_type": key_type.value}
        return Draft(action="service-renewed", tenant=owner.tenant, service=owner.service, detail=detail)

    with new_files(store.state_dir) as files:
        files.private_key(key_file, key)
        store.change(change, actor)
    remove_files(obsolete)
    return certificates.make_service_csr(owner, key)


def import_certificate(
    store: DirectoryStore, owner: NetworkService, certificate: x509.Certificate, *, actor: str
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
            now_s=store.now_s(),
        )
        if entry.certificate == certificate:
            return None
        row = row_of(connection, owner)
        key_file = _key_file_for(store, certificate, [row.pending_key_file, row.key_file], entry)
        values: dict[str, object] = {
            "certificate_der": certificate.public_bytes(Encoding.DER),
            "key_file": key_file,
            "updated_at_ms": store.now_ms(),
        }
        if key_file == row.pending_key_file:
            values["pending_key_file"] = None
            obsolete.append(store.state_dir / row.key_file)
        connection.execute(update_of(owner).values(values))
        return Draft(
            action="certificate-imported",
            tenant=owner.tenant,
            service=owner.service,
            detail={
                "certificate_sha256": fingerprint(certificate).hex(),
                "not_after": certificate.not_valid_after_utc.isoformat(),
            },
        )

    after = store.change(change, actor)
    remove_files(obsolete)
    return after.recipients[owner]


def delete_recipient(store: DirectoryStore, connection: Connection, owner: NetworkService) -> list[Path]:
    """Delete the row; the key files that are then nobody's, to be removed once that is committed."""
    row = row_of(connection, owner)
    connection.execute(delete(network_service).where(is_row_of(owner)))
    names = (row.key_file, row.pending_key_file)
    return [store.state_dir / name for name in names if name is not None]


def _key_file_for(
    store: DirectoryStore,
    certificate: x509.Certificate,
    candidates: Sequence[str | None],
    entry: Recipient,
) -> str:
    for name in candidates:
        if name is None:
            continue
        try:
            key = certificates.read_private_key(store.state_dir / name)
        except CredentialError as error:
            raise ChangeRefusedError(str(error), f"make a new key by {command('renew', entry)}") from None
        if key.public_key() == certificate.public_key():
            return name
    raise ChangeRefusedError(
        f"the certificate is for another key than those of {entry.owner} on this proxy",
        "have the tenant's root sign the CSR that was written last",
    )


def command(verb: str, entry: Recipient) -> str:
    """What an operator types to *verb* it: services and named keys have commands of their own."""
    noun = "key" if isinstance(entry, NamedKey) else "service"
    return f"`sealgate {noun} {verb} {entry.owner}`"


def row_of(connection: Connection, owner: NetworkService) -> Row[Any]:
    return connection.execute(select(network_service).where(is_row_of(owner))).one()


def update_of(owner: NetworkService) -> Any:
    return update(network_service).where(is_row_of(owner))


def is_row_of(owner: NetworkService) -> ColumnElement[bool]:
    return and_(network_service.c.tenant_id == owner.tenant, network_service.c.name == owner.service)
