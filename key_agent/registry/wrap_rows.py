"""Wraps in this environment's own database: what the signed rows neither hold nor need to.

1. A wrap is bound to tenant, service, key id, KEK and environment, and the signed row holds the check value
   of what is in it. So no signature stands on it: one that was exchanged or altered opens as no such key.
2. Only what the HSM has opened again is written, as `verified`; it takes the place of whatever stood there.
3. Keys are long on their way through an HSM. Whether this environment still is one that takes them is asked
   in the transaction that stores them.
4. Proxies have a key once they acknowledge a sequence that was reserved after its wrap was stored.
"""

from collections.abc import Collection, Sequence
from itertools import batched
from typing import Final

from sqlalchemy import Connection, bindparam, delete, func, select, update

from envelope.keys import KeyState
from key_agent.registry.access import VERIFIED, insert_wraps
from key_agent.registry.rows import is_sound
from key_agent.registry.states import KekState
from key_agent.registry.tables import dek, dek_wrap, environment, kek, key_ring, push_sequence
from key_agent.sources.source import WrappedKey

_AT_ONCE = 500
_GONE: Final = delete(dek_wrap).where(
    dek_wrap.c.dek_id == bindparam("b_id"), dek_wrap.c.kek_id == bindparam("b_kek")
)
_AFTER: Final = update(dek).where(dek.c.id == bindparam("b_id")).values(after_sequence=bindparam("b_after"))


def takes_keys(c: Connection, environment_id: str, kek_id: str, states: Collection[str]) -> bool:
    """Rule 3: whether the environment is in one of *states*, and that KEK of it is active."""
    state = c.scalar(select(environment.c.state).where(environment.c.id == environment_id))
    kek_state = c.scalar(select(kek.c.state).where(kek.c.id == kek_id))
    return state in states and kek_state == KekState.ACTIVE


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
    stored = {
        name: key
        for name, key in zip(names, keys, strict=True)
        if (row := known.get(name)) is not None
        and row.state != KeyState.DESTROYED
        and bytes(row.kcv) == key.kcv
        and row.network_service_id == str(key.owner)
    }
    if stored:
        sequences = highest_sequences(c, {str(key.owner) for key in stored.values()})
        c.execute(_GONE, [{"b_id": name, "b_kek": key.kek_id} for name, key in stored.items()])
        insert_wraps(c, stored.values(), now_ms, route=route)
        c.execute(
            _AFTER, [{"b_id": name, "b_after": sequences[str(key.owner)]} for name, key in stored.items()]
        )
    return list(stored)


def highest_sequences(c: Connection, services: Collection[str]) -> dict[str, int]:
    """The highest sequence that was reserved for each of these network services; 0 for none."""
    found = dict.fromkeys(services, 0)
    for some in batched(sorted(found), _AT_ONCE):
        query = (
            select(push_sequence.c.network_service_id, func.max(push_sequence.c.sequence))
            .where(push_sequence.c.network_service_id.in_(some))
            .group_by(push_sequence.c.network_service_id)
        )
        found |= {name: int(highest) for name, highest in c.execute(query)}
    return found


def sound_wraps(c: Connection, kek_id: str) -> set[str]:
    """Ids of the keys that have a verified, undamaged wrap under that KEK."""
    query = select(dek_wrap).where(dek_wrap.c.kek_id == kek_id, dek_wrap.c.state == VERIFIED)
    return {row.dek_id for row in c.execute(query) if is_sound(row)}


def sound_among(c: Connection, kek_id: str, key_ids: Collection[str]) -> set[str]:
    """Of these keys, those that `sound_wraps` would name."""
    found: set[str] = set()
    for some in batched(sorted(key_ids), _AT_ONCE):
        query = select(dek_wrap).where(
            dek_wrap.c.kek_id == kek_id, dek_wrap.c.state == VERIFIED, dek_wrap.c.dek_id.in_(some)
        )
        found |= {row.dek_id for row in c.execute(query) if is_sound(row)}
    return found


def after_sequences(c: Connection, key_ids: Collection[str]) -> dict[str, tuple[str, int]]:
    """For each key: its network service, and the sequence that its proxies have to have passed."""
    found: dict[str, tuple[str, int]] = {}
    for some in batched(sorted(key_ids), _AT_ONCE):
        query = (
            select(dek.c.id, dek.c.after_sequence, key_ring.c.network_service_id)
            .join(key_ring, key_ring.c.id == dek.c.ring_id)
            .where(dek.c.id.in_(some))
        )
        found |= {row.id: (row.network_service_id, row.after_sequence) for row in c.execute(query)}
    return found
