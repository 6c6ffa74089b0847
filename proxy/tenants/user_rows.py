"""How a tenant's rules for its users stand in the directory: JSON in one column, read strictly."""

import base64
import binascii
from collections.abc import Iterable

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Connection, select

from envelope.errors import FormatError
from proxy.tenants.tables import proxy_user
from proxy.users.model import OPEN, Proof, UserAccess, UserEntry, Users, parse_networks, parse_proxy_address


class _Access(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    networks: list[str] = []
    client_roots: list[str] = []
    requires: list[Proof] = []
    proxies: list[str] = []
    proxies_speak_tls: bool = False


def access_text(access: UserAccess) -> str:
    """What stands in the column."""
    roots = (root.public_bytes(Encoding.DER) for root in access.client_roots)
    stored = _Access(
        networks=[str(network) for network in access.networks],
        client_roots=[base64.b64encode(root).decode() for root in roots],
        requires=sorted(access.requires),
        proxies=list(access.proxies),
        proxies_speak_tls=access.proxies_speak_tls,
    )
    return msgspec.json.encode(stored).decode()


def read_access(text: str | None) -> UserAccess:
    """FormatError if the column holds something else."""
    if text is None:
        return OPEN
    try:
        stored = msgspec.json.decode(text, type=_Access)
        roots = [x509.load_der_x509_certificate(base64.b64decode(root)) for root in stored.client_roots]
    except (msgspec.MsgspecError, binascii.Error, ValueError) as error:
        raise FormatError(f"a tenant's access rules are damaged ({type(error).__name__})") from error
    return UserAccess(
        networks=parse_networks(stored.networks),
        client_roots=tuple(roots),
        requires=frozenset(stored.requires),
        proxies=tuple(map(parse_proxy_address, stored.proxies)),
        proxies_speak_tls=stored.proxies_speak_tls,
    )


def read_users(connection: Connection) -> Users:
    rows: Iterable[UserEntry] = (
        UserEntry(
            tenant=row.tenant_id,
            name=row.name,
            verifier=row.verifier,
            created_at_s=row.created_at_ms / 1000,
            not_after_s=None if row.not_after_ms is None else row.not_after_ms / 1000,
        )
        for row in connection.execute(select(proxy_user).order_by(proxy_user.c.tenant_id, proxy_user.c.name))
    )
    return {(entry.tenant, entry.name): entry for entry in rows}
