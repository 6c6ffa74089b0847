"""Sequences, reservations and receipts in the registry, on both databases."""

import asyncio
import math
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import create_engine, text

from key_agent.registry.model import Receipt
from key_agent.registry.pushes import MAX_SEQUENCE
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError, Registry
from tests.key_agent.registry.records import BOX, NOW_MS, S3, open_registry, reserve, with_services


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await open_registry(url)
    yield opened
    await opened.close()


@pytest.mark.parametrize("state", [KekState.SUSPENDED, KekState.REVOKED, KekState.DESTROYED])
async def test_no_keys_leave_under_a_kek_that_is_not_active(registry: Registry, state: KekState) -> None:
    await with_services(registry, S3)
    await registry.set_kek_state("k1", state, "why", now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match=str(state)):
        await reserve(registry, S3)


async def test_sequences_rise_whatever_the_clock_does(registry: Registry) -> None:
    await with_services(registry, S3)
    found = []
    for now_ms in (NOW_MS, NOW_MS, NOW_MS - 5000, NOW_MS + 1000):
        _, [reservation] = await reserve(registry, S3, now_ms=now_ms)
        found.append(reservation.sequence)
    assert found == [NOW_MS, NOW_MS + 1, NOW_MS + 2, NOW_MS + 1000]
    await registry.spend_sequences({S3: NOW_MS + 5000})
    await registry.spend_sequences({S3: NOW_MS + 4000})
    assert (await registry.book()).sequences == {S3: NOW_MS + 5000}
    with pytest.raises(RefusedChangeError, match="too high"):
        await reserve(registry, S3, now_ms=MAX_SEQUENCE + 1)


async def test_a_reservation_is_on_disk_before_it_returns(url: str, registry: Registry) -> None:
    await with_services(registry, S3)
    _, [reservation] = await reserve(registry, S3)

    def look() -> tuple[object, ...]:
        engine = create_engine(url)
        with engine.connect() as connection:
            link = connection.execute(
                text("SELECT issued_sequence, issued_until_ms FROM service_proxy")
            ).one()
            sequence = connection.execute(text("SELECT sequence FROM push_sequence")).one()
        engine.dispose()
        return (*link, *sequence)

    seen = await asyncio.to_thread(look)
    assert seen == (reservation.sequence, NOW_MS + 330_000, reservation.sequence)


async def test_reservations_are_for_linked_proxies_and_live_services_only(registry: Registry) -> None:
    await with_services(registry, S3, BOX, proxy="p1")
    await with_services(registry, S3, proxy="p2")
    _, made = await reserve(registry, S3, BOX, proxies=("p2", "p3"))
    assert [(item.owner, [link.proxy_id for link in item.links]) for item in made] == [(S3, ["p2"])]
    await registry.remove_proxy("p2", now_ms=NOW_MS)
    _, made = await reserve(registry, S3, proxies=("p1", "p2"))
    assert [link.proxy_id for link in made[0].links] == ["p1"]
    await registry.remove_service(S3, now_ms=NOW_MS)
    assert (await reserve(registry, S3))[1] == []


async def test_a_damaged_wrap_is_found_without_the_hsm(url: str, registry: Registry) -> None:
    [key] = await with_services(registry, S3)

    def damage() -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE dek_wrap SET wrapped = wrapped_sha256"))
        engine.dispose()

    await asyncio.to_thread(damage)
    _, [reservation] = await reserve(registry, S3)
    assert reservation.keys == ()
    assert reservation.damaged == (key.key_id,)


def _receipt(**changes: object) -> Receipt:
    values = {
        "owner": S3,
        "proxy_id": "p1",
        "sequence": 10,
        "accepted": True,
        "keys": 1,
        "at_ms": NOW_MS,
        "valid_until_ms": NOW_MS + 330_000,
        "error": None,
    }
    return Receipt(**(values | changes))  # type: ignore[arg-type]


async def test_receipts_newer_ones_win_and_withdrawals_end_what_may_be_held(registry: Registry) -> None:
    await with_services(registry, S3)
    _, [reservation] = await reserve(registry, S3)
    [link] = (await registry.book()).links
    assert link.may_hold_keys(NOW_MS, math.inf), "issued counts, answered or not"
    sequence = reservation.sequence
    await registry.record_receipts([_receipt(sequence=sequence)])
    await registry.record_receipts([_receipt(sequence=sequence - 1, valid_until_ms=1)])
    [link] = (await registry.book()).links
    assert (link.accepted_sequence, link.valid_until_ms) == (sequence, NOW_MS + 330_000)
    await registry.record_receipts([_receipt(accepted=False, keys=0, error="owner: no")])
    [link] = (await registry.book()).links
    assert link.error == "owner: no"
    assert link.valid_until_ms is not None
    await registry.record_receipts([_receipt(sequence=sequence + 1, keys=0, valid_until_ms=None)])
    [link] = (await registry.book()).links
    assert link.valid_until_ms is None
    assert link.error is None
    assert not link.may_hold_keys(NOW_MS, math.inf)


async def test_what_was_issued_ends_by_itself(registry: Registry) -> None:
    await with_services(registry, S3)
    await reserve(registry, S3)
    [link] = (await registry.book()).links
    assert link.may_hold_keys(NOW_MS + 330_000 + 29_000, math.inf), "a clock behind ours ends later"
    assert not link.may_hold_keys(link.silent_at_ms, math.inf)
