"""The signed rows in this environment's database, and the seal over all of them.

1. Rows are written as they were signed, byte by byte.
2. The seal is term, epoch and digest of all rows, signed by this agent, with the newest term's holder's
   signature under the same (the head). It is written in the transaction that writes the rows.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, bindparam, delete, insert, select, update

from key_agent.environments.shared.documents import Head, Kind, SharedRow
from key_agent.environments.shared.shared_errors import RegistryTamperedError
from key_agent.environments.shared.shared_view import Key, Shared
from key_agent.registry.tables import shared_row, shared_seal

_SEAL_DOMAIN: Final = b"sealgate/v1 registry seal\0"
_ONE: Final = 1
_BATCH: Final = 500
_UPDATE_ROW: Final = (
    update(shared_row)
    .where(shared_row.c.kind == bindparam("b_kind"), shared_row.c.id == bindparam("b_id"))
    .values({name: bindparam(f"b_{name}") for name in ("term", "epoch", "signer", "body", "signature")})
)


def read_rows(c: Connection) -> dict[Key, SharedRow]:
    """RegistryTamperedError: one is of no known kind."""
    rows: dict[Key, SharedRow] = {}
    for row in c.execute(select(shared_row)):
        try:
            kind = Kind(row.kind)
        except ValueError:
            raise RegistryTamperedError(f"a shared row is of no known kind: {row.kind[:32]!r}") from None
        rows[kind, row.id] = SharedRow(
            kind=kind,
            id=row.id,
            term=row.term,
            epoch=row.epoch,
            signer=row.signer,
            body=row.body,
            signature=row.signature,
        )
    return rows


def write_rows(c: Connection, rows: Iterable[SharedRow]) -> None:
    """Insert or replace them."""
    for some in batched(rows, _BATCH):
        _write_some(c, some)


def delete_rows(c: Connection, gone: Iterable[Key]) -> None:
    for kind, row_id in gone:
        c.execute(delete(shared_row).where(shared_row.c.kind == kind, shared_row.c.id == row_id))


@dataclass(frozen=True, slots=True)
class Seal:
    """Rule 2, as it is stored."""

    head: Head
    signature: str

    @property
    def position(self) -> tuple[int, int]:
        return (self.head.term, self.head.epoch)

    def check(self, key: Ed25519PrivateKey, tenant: str, digest: str) -> None:
        """RegistryTamperedError unless this agent, by *key*, has sealed rows of that *digest*."""
        try:
            key.public_key().verify(bytes.fromhex(self.signature), _seal_bytes(tenant, self.head))
        except (InvalidSignature, ValueError):
            raise RegistryTamperedError("the seal of the shared rows is not this agent's") from None
        if digest != self.head.digest:
            raise RegistryTamperedError("the shared rows are not those that were sealed")


def read_seal(c: Connection) -> Seal | None:
    row = c.execute(select(shared_seal)).one_or_none()
    if row is None:
        return None
    head = Head(term=row.term, epoch=row.epoch, digest=row.digest, signature=row.head_signature)
    return Seal(head, row.signature)


def write_seal(c: Connection, key: Ed25519PrivateKey, tenant: str, shared: Shared) -> None:
    head = Head(term=shared.term, epoch=shared.epoch, digest=shared.digest, signature=shared.head)
    c.execute(delete(shared_seal))
    c.execute(
        insert(shared_seal).values(
            id=_ONE,
            term=head.term,
            epoch=head.epoch,
            digest=head.digest,
            signature=key.sign(_seal_bytes(tenant, head)).hex(),
            head_signature=head.signature,
        )
    )


def check_seal(c: Connection, keys: Sequence[Ed25519PrivateKey], tenant: str) -> None:
    """RegistryTamperedError: there is a seal, and it is by none of *keys*."""
    seal = read_seal(c)
    if seal is None:
        return
    *others, last = keys
    for key in others:
        with contextlib.suppress(RegistryTamperedError):
            seal.check(key, tenant, seal.head.digest)
            return
    seal.check(last, tenant, seal.head.digest)


def reseal(c: Connection, key: Ed25519PrivateKey, tenant: str) -> None:
    """The seal that is there, which the caller has checked, by another key of this agent."""
    seal = read_seal(c)
    if seal is not None:
        c.execute(update(shared_seal).values(signature=key.sign(_seal_bytes(tenant, seal.head)).hex()))


def _seal_bytes(tenant: str, head: Head) -> bytes:
    return _SEAL_DOMAIN + f"{tenant}\0{head.term}\0{head.epoch}\0{head.digest}".encode()


def _write_some(c: Connection, rows: Sequence[SharedRow]) -> None:
    there: set[Key] = set()
    for kind in {row.kind for row in rows}:
        ids = [row.id for row in rows if row.kind is kind]
        query = select(shared_row.c.id).where(shared_row.c.kind == kind, shared_row.c.id.in_(ids))
        there |= {(kind, row_id) for row_id in c.scalars(query)}
    if known := [row for row in rows if row.key in there]:
        c.execute(
            _UPDATE_ROW, [{f"b_{name}": value for name, value in _columns(row).items()} for row in known]
        )
    if new := [row for row in rows if row.key not in there]:
        c.execute(insert(shared_row), [_columns(row) for row in new])


def _columns(row: SharedRow) -> dict[str, object]:
    return {
        "kind": row.kind.value,
        "id": row.id,
        "term": row.term,
        "epoch": row.epoch,
        "signer": row.signer,
        "body": row.body,
        "signature": row.signature,
    }
