"""What is pushed, in the registry: sequence and promise before an envelope leaves, receipts after it.

1. Sequences are `max(stored + 1, Unix ms)` (format.md 5): rising also after an old backup was restored.
2. A sequence and what may be held under it are committed *before* an envelope leaves; the keys are read in
   the same transaction, so the higher sequence always carries the newer set.
3. Only an active KEK gives a reservation. This is the second lock; the first is `key_agent.consent`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, bindparam, insert, select, update

from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.registry.access import RefusedChangeError, RegistryAccess, all_links
from key_agent.registry.model import HeldKey, Link, Presenter, Receipt, Reservation
from key_agent.registry.rows import is_sound, link_row, wrapped_key
from key_agent.registry.states import KekState
from key_agent.registry.tables import dek, key_ring, network_service, proxy, push_sequence, service_proxy
from key_agent.sources.source import Kek, WrappedKey

MAX_SEQUENCE: Final = 2**53 - 1
MAX_TOMBSTONES: Final = 64
"""Of destroyed keys, the newest of a service travel, so that proxies say "destroyed" and not "unknown"."""


class Pushes(RegistryAccess):
    presenter: Presenter | None = None
    """Set where there are several environments, each with an active key: which of them seals here."""

    async def reserve(
        self,
        owners: Iterable[NetworkService],
        proxy_ids: Iterable[str],
        *,
        now_ms: int,
        until_ms: int,
    ) -> tuple[Kek, list[Reservation]]:
        """Spend a sequence per service and note what those proxies may hold until *until_ms*; then keys may
        leave.

        Services without a link to one of the proxies, or without a key, are left out. RefusedChangeError
        unless the current KEK is active.
        """
        names, places = sorted(map(str, owners)), sorted(proxy_ids)

        def work(c: Connection) -> tuple[Kek, list[Reservation]]:
            current = self._current(c)
            if current is None or current.kek is None or current.state is not KekState.ACTIVE:
                state = "missing" if current is None else current.state
                raise RefusedChangeError(f"no keys leave: the KEK is {state}", "see `key-agent status`")
            links = self._links_by_owner(c, names, places)
            rows: dict[str, list[Row[Any]]] = {}
            for row in c.execute(
                self._verified_wraps(current.reference.kek_id)
                .where(key_ring.c.network_service_id.in_(names))
                .order_by(dek.c.key_type, dek.c.version)
            ):
                rows.setdefault(row.network_service_id, []).append(row)
            tombstones = self._tombstones(c, names)
            for name in tombstones:
                rows.setdefault(name, [])
            wanted = [name for name in names if name in rows and name in links]
            sequences = self._spend_sequences(c, wanted, lambda _, stored: max(stored + 1, now_ms))
            issued = [
                {"b_service": name, "b_proxy": link.proxy_id, "b_sequence": sequences[name]}
                for name in wanted
                for link in links[name]
            ]
            if issued:
                c.execute(_ISSUED, [row | {"b_until_ms": until_ms} for row in issued])
            made = [
                _reservation(
                    name,
                    sequences[name],
                    rows=rows[name],
                    links=links[name],
                    present=self.presenter,
                    tombstones=[_tombstone(row, current.kek) for row in tombstones.get(name, ())],
                )
                for name in wanted
            ]
            return current.kek, made

        return await self._database.transact(work)

    def _tombstones(self, c: Connection, names: list[str]) -> dict[str, list[Any]]:
        """The newest destroyed keys of each service."""
        found: dict[str, list[Any]] = {}
        query = (
            select(
                dek.c.id,
                dek.c.kcv,
                dek.c.key_type,
                dek.c.alg,
                dek.c.version,
                dek.c.created_at_ms,
                key_ring.c.network_service_id,
            )
            .join(key_ring, dek.c.ring_id == key_ring.c.id)
            # One that never was active is in no object.
            .where(
                key_ring.c.network_service_id.in_(names),
                dek.c.state == KeyState.DESTROYED,
                dek.c.activated_at_ms.is_not(None),
            )
            .order_by(dek.c.state_since_ms.desc(), dek.c.id)
        )
        for row in c.execute(query):
            mine = found.setdefault(row.network_service_id, [])
            if len(mine) < MAX_TOMBSTONES:
                mine.append(row)
        return found

    def _links_by_owner(self, c: Connection, names: list[str], places: list[str]) -> dict[str, list[Link]]:
        links: dict[str, list[Link]] = {}
        query = (
            all_links()
            .join(proxy, proxy.c.id == service_proxy.c.proxy_id)
            .join(network_service, network_service.c.id == service_proxy.c.network_service_id)
            .where(
                service_proxy.c.network_service_id.in_(names),
                service_proxy.c.proxy_id.in_(places),
                service_proxy.c.withdrawn.is_(False),
                proxy.c.removed.is_(False),
                network_service.c.removed.is_(False),
            )
        )
        for row in c.execute(query):
            links.setdefault(row.network_service_id, []).append(link_row(row))
        return links

    async def spend_sequences(self, sequences: Mapping[NetworkService, int]) -> None:
        """Note the sequences of withdrawals. They are above all known ones; a lower one changes nothing."""
        wanted = {str(owner): sequence for owner, sequence in sequences.items()}
        await self._database.transact(
            lambda c: self._spend_sequences(c, list(wanted), lambda name, stored: max(stored, wanted[name]))
        )

    def _spend_sequences(
        self, c: Connection, names: Sequence[str], choose: Callable[[str, int], int]
    ) -> dict[str, int]:
        """Store what *choose* makes of each name and the sequence stored for it (0 for none)."""
        mine = and_(push_sequence.c.issuer == self._agent, push_sequence.c.network_service_id.in_(names))
        stored = {
            row.network_service_id: row.sequence for row in c.execute(select(push_sequence).where(mine))
        }
        chosen = {name: choose(name, stored.get(name, 0)) for name in names}
        for name, sequence in chosen.items():
            if sequence > MAX_SEQUENCE:
                raise RefusedChangeError(
                    f"{name}: sequence {sequence} is too high", "set the clock of this machine"
                )
        rows = [
            {"b_issuer": self._agent, "b_service": name, "b_sequence": sequence}
            for name, sequence in chosen.items()
        ]
        for statement, part in (
            (_SEQUENCE_UPDATE, [row for row in rows if row["b_service"] in stored]),
            (_SEQUENCE_INSERT, [row for row in rows if row["b_service"] not in stored]),
        ):
            if part:
                c.execute(statement, part)
        return chosen

    async def record_receipts(self, receipts: Sequence[Receipt]) -> None:
        """What the proxies answered. An older receipt never overwrites a newer one."""

        def work(c: Connection) -> None:
            for statement, part in (
                (_REFUSED, [receipt for receipt in receipts if not receipt.accepted]),
                (_KEYS_ACCEPTED, [receipt for receipt in receipts if receipt.accepted and receipt.keys]),
                (_WITHDRAWAL_ACCEPTED, [r for r in receipts if r.accepted and not r.keys]),
            ):
                if part:
                    c.execute(statement, [_receipt_row(receipt) for receipt in part])

        await self._database.transact(work)


def _reservation(
    name: str,
    sequence: int,
    *,
    rows: list[Row[Any]],
    links: list[Link],
    tombstones: list[tuple[WrappedKey, KeyState]],
    present: Presenter | None,
) -> Reservation:
    states = {row.id: KeyState(row.state) for row in rows}
    if present is not None:
        states |= present(name, [_held_key(row) for row in rows if is_sound(row)])
    sound = [(wrapped_key(row), states[row.id]) for row in rows if is_sound(row)]
    # Tombstones alone would take a service's keys back: they do so only if there are no others.
    keys = [*sound, *tombstones] if sound or not rows else []
    return Reservation(
        owner=NetworkService.parse(name),
        sequence=sequence,
        keys=tuple(keys),
        damaged=tuple(KeyId.parse(row.id) for row in rows if not is_sound(row)),
        links=tuple(links),
    )


def _held_key(row: Row[Any]) -> HeldKey:
    return HeldKey(
        key_id=row.id, ring=row.ring_id, owner_environment=row.owner_environment_id, state=KeyState(row.state)
    )


def _tombstone(row: Row[Any], current: Kek) -> tuple[WrappedKey, KeyState]:
    """A destroyed key: its name travels, there is nothing else of it."""
    key = WrappedKey(
        owner=NetworkService.parse(row.network_service_id),
        key_id=KeyId.parse(row.id),
        kek_id=current.reference.kek_id,
        environment_id=current.reference.environment_id,
        method=current.method,
        wrapped=b"",
        kcv=bytes(row.kcv),
        token_serial=current.token_serial,
        created_at_ms=row.created_at_ms,
        use=KeyUse(row.key_type),
        algorithm=row.alg,
        version=row.version,
    )
    return key, KeyState.DESTROYED


# Statements for many rows at once; their parameters are `b_...`.

_PLACE: Final = and_(
    service_proxy.c.network_service_id == bindparam("b_service"),
    service_proxy.c.proxy_id == bindparam("b_proxy"),
)
_ISSUED: Final = (
    update(service_proxy)
    .where(_PLACE)
    .values(issued_sequence=bindparam("b_sequence"), issued_until_ms=bindparam("b_until_ms"))
)
_SEQUENCE_UPDATE: Final = (
    update(push_sequence)
    .where(
        push_sequence.c.issuer == bindparam("b_issuer"),
        push_sequence.c.network_service_id == bindparam("b_service"),
    )
    .values(sequence=bindparam("b_sequence"))
)
_SEQUENCE_INSERT: Final = insert(push_sequence).values(
    issuer=bindparam("b_issuer"),
    network_service_id=bindparam("b_service"),
    sequence=bindparam("b_sequence"),
)
_NO_ERROR: Final = {"error": None, "error_at_ms": None}
_REFUSED: Final = (
    update(service_proxy)
    .where(_PLACE)
    .values(error=bindparam("b_error"), error_at_ms=bindparam("b_at_ms"), updated_at_ms=bindparam("b_at_ms"))
)
_KEYS_ACCEPTED: Final = (
    update(service_proxy)
    .where(_PLACE, service_proxy.c.accepted_sequence < bindparam("b_sequence"))
    .values(
        accepted_sequence=bindparam("b_sequence"),
        accepted_at_ms=bindparam("b_at_ms"),
        valid_until_ms=bindparam("b_until_ms"),
        updated_at_ms=bindparam("b_at_ms"),
        **_NO_ERROR,
    )
)
_WITHDRAWAL_ACCEPTED: Final = (
    update(service_proxy)
    .where(_PLACE, service_proxy.c.withdrawn_sequence < bindparam("b_sequence"))
    .values(
        withdrawn_sequence=bindparam("b_sequence"),
        withdrawn_at_ms=bindparam("b_at_ms"),
        valid_until_ms=None,
        updated_at_ms=bindparam("b_at_ms"),
        **_NO_ERROR,
    )
)


def _receipt_row(receipt: Receipt) -> dict[str, object]:
    return {
        "b_service": str(receipt.owner),
        "b_proxy": receipt.proxy_id,
        "b_sequence": receipt.sequence,
        "b_at_ms": receipt.at_ms,
        "b_until_ms": receipt.valid_until_ms,
        "b_error": receipt.error,
    }
