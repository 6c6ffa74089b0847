"""Wraps in this environment's own database: what the signed rows neither hold nor need to.

1. A wrap is bound to tenant, service, key id, KEK and environment, and the signed row holds the check value
   of what is in it. So no signature stands on it: one that was exchanged or altered opens as no such key.
2. Only what the HSM has opened again is written, as `verified`; it takes the place of whatever stood there.
3. Proxies have a key once they acknowledge a sequence that was reserved after its wrap was stored.
"""

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, delete, func, select, update

from envelope.keys import KeyState
from key_agent.registry.access import VERIFIED, insert_wrap, is_sound
from key_agent.registry.tables import dek, dek_wrap, key_ring, push_sequence
from key_agent.sources.source import WrappedKey

_AT_ONCE = 500


def store_wraps(c: Connection, keys: Sequence[WrappedKey], *, route: str, now_ms: int) -> list[str]:
    """*keys* that the HSM has just opened; which of them are stored.

    One that is unknown here, destroyed, or has another check value than the signed row, is left out.
    """
    names = [str(key.key_id) for key in keys]
    known = {
        row.id: row
        for row in c.execute(
            select(dek.c.id, dek.c.kcv, dek.c.state, key_ring.c.network_service_id)
            .join(key_ring, key_ring.c.id == dek.c.ring_id)
            .where(dek.c.id.in_(names))
        )
    }
    sequences: dict[str, int] = {}
    stored = []
    for key in keys:
        row = known.get(str(key.key_id))
        if row is None or row.state == KeyState.DESTROYED or bytes(row.kcv) != key.kcv:
            continue
        if row.network_service_id != str(key.owner):
            continue
        c.execute(delete(dek_wrap).where(dek_wrap.c.dek_id == row.id, dek_wrap.c.kek_id == key.kek_id))
        insert_wrap(c, key, now_ms, route=route)
        owner = str(key.owner)
        if owner not in sequences:
            sequences[owner] = _highest_sequence(c, owner)
        c.execute(update(dek).where(dek.c.id == row.id).values(after_sequence=sequences[owner]))
        stored.append(row.id)
    return stored


def _highest_sequence(c: Connection, owner: str) -> int:
    found = c.scalar(
        select(func.max(push_sequence.c.sequence)).where(push_sequence.c.network_service_id == owner)
    )
    return int(found or 0)


def sound_wraps(c: Connection, kek_id: str) -> set[str]:
    """Ids of the keys that have a verified, undamaged wrap under that KEK."""
    query = select(dek_wrap).where(dek_wrap.c.kek_id == kek_id, dek_wrap.c.state == VERIFIED)
    return {row.dek_id for row in c.execute(query) if is_sound(row)}


def after_sequences(c: Connection, key_ids: Collection[str]) -> dict[str, tuple[str, int]]:
    """For each key: its network service, and the sequence that its proxies have to have passed."""
    found: dict[str, tuple[str, int]] = {}
    wanted = sorted(key_ids)
    for at in range(0, len(wanted), _AT_ONCE):
        query = (
            select(dek.c.id, dek.c.after_sequence, key_ring.c.network_service_id)
            .join(key_ring, key_ring.c.id == dek.c.ring_id)
            .where(dek.c.id.in_(wanted[at : at + _AT_ONCE]))
        )
        found |= {row.id: (row.network_service_id, row.after_sequence) for row in c.execute(query)}
    return found
