"""Key material at real key servers: it opens in its place only, and moves."""

from dataclasses import replace

import pytest

from envelope.keys import KeyId, NetworkService
from key_agent.sources.envelopes import WrappedKeyError
from key_agent.sources.servers import keks, material
from key_agent.sources.servers.server import KeyServer
from key_agent.sources.source import Kek, NewKey
from tests.key_agent.sources.conftest import ANOTHER_REFERENCE
from tests.key_agent.sources.servers.subjects import NOW_S, OWNER, make_kek, new_reference


def test_keys_open_in_their_place_only(server: KeyServer) -> None:
    kek, other_kek = make_kek(server), make_kek(server)
    owners = [NetworkService("acme", f"service-{number}") for number in range(3)]
    rows = material.generate(
        server, kek, [NewKey(owner=owner) for owner in owners], now_ms=NOW_S * 1000, budget_s=30
    )
    assert [row.owner for row in rows] == owners
    good = rows[0]

    def refused(row: object, owner: NetworkService = owners[0], under: Kek = kek) -> str:
        opener = material._Opener(server, under, NOW_S)
        opener.prepare([(owner, row)])  # type: ignore[list-item]
        with pytest.raises(WrappedKeyError) as caught:
            opener.reveal(owner, row)  # type: ignore[arg-type]
        return str(caught.value)

    opener = material._Opener(server, kek, NOW_S)
    opener.prepare([(row.owner, row) for row in rows])
    revealed = [opener.reveal(row.owner, row) for row in rows]
    assert len({bytes(material) for material in revealed}) == 3
    assert bytes(32) not in revealed
    opener.wipe()
    refused(replace(good, key_id=KeyId.random()))
    refused(replace(good, wrapped=rows[1].wrapped))
    refused(replace(good, wrapped=good.wrapped[:-8]))
    refused(replace(good, wrapped=b""))
    refused(good, owner=owners[1])
    refused(replace(good, owner=owners[1]), owner=owners[1])
    refused(replace(good, kcv=rows[1].kcv))
    disguised = replace(good, kek_id=other_kek.reference.kek_id)
    assert other_kek.reference.kek_id == kek.reference.kek_id  # only the binding's names are alike
    assert isinstance(refused(disguised, under=other_kek), str)
    for index in range(0, len(good.wrapped), 11):
        refused(replace(good, wrapped=keks._changed(good.wrapped, index)))


def test_keys_move(server: KeyServer) -> None:
    old, new = make_kek(server), make_kek(server, replace(new_reference(), kek_id=ANOTHER_REFERENCE.kek_id))
    rows = material.generate(server, old, [NewKey(owner=OWNER)] * 3, now_ms=NOW_S * 1000, budget_s=30)
    bad = replace(rows[2], wrapped=rows[1].wrapped)
    moved, failed = material.rewrap(server, old, new, [*rows[:2], bad], now_ms=NOW_S * 1000, budget_s=30)
    assert [(row.key_id, row.kcv) for row in moved] == [(row.key_id, row.kcv) for row in rows[:2]]
    assert [key_id for key_id, _ in failed] == [bad.key_id]
    opener = material._Opener(server, new, NOW_S)
    opener.prepare([(OWNER, moved[0])])
    assert len(opener.reveal(OWNER, moved[0])) == 32
