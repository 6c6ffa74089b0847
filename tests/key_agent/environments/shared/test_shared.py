"""Shared rows in registries of several environments, on SQLite and PostgreSQL: all of an epoch or nothing."""

import os
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.shared.documents import DekBody, Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.shared_errors import EpochGapError, StaleTermError
from key_agent.environments.shared.shared_view import Shared
from tests import postgres
from tests.key_agent.environments.registries import (
    ADMINS,
    KID,
    NEXT_KID,
    NOW_MS,
    RING,
    SERVICE,
    TENANT,
    Holder,
    key,
    registry_of,
)
from tests.key_agent.registry.conftest import url_of_postgres

__all__ = ["url_of_postgres"]  # a fixture

needs_postgres = pytest.mark.skipif(
    postgres.URL_VARIABLE not in os.environ, reason="no PostgreSQL: run by `python -m tests.postgres`"
)
COMPROMISED = KeyState.COMPROMISED


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Holder, Holder]]:
    """The manager's, and the one under test on that database; it has the first epoch."""
    url = None if request.param == "sqlite" else request.getfixturevalue("url_of_postgres")
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(registry_of(tmp_path, "a"))
        b = await stack.enter_async_context(registry_of(tmp_path, "b", url))
        await a.write(*a.first_rows())
        await a.write((Kind.ENVIRONMENT, "b", b.environment()))
        b.shared.pin("agent-a", a.public)
        await b.take(await a.shared.since(0))
        yield a, b


async def tables(holder: Holder) -> dict[str, list[tuple[object, ...]]]:
    """All that an epoch changes."""
    return {
        name: [tuple(row) for row in await holder.sql(f"SELECT * FROM {name} ORDER BY 1, 2")]
        for name in (
            "shared_row",
            "shared_seal",
            "environment",
            "tenant",
            "network_service",
            "key_ring",
            "dek",
        )
    }


def successor() -> tuple[tuple[Kind, str, object], ...]:
    return (
        (Kind.DEK, KID, key("a", KeyState.DEACTIVATED, successor=NEXT_KID)),
        (Kind.DEK, NEXT_KID, key("a", KeyState.ACTIVE, 2, predecessor=KID, activated_at_ms=NOW_MS)),
    )


async def test_what_one_has_written_the_other_has(pair: tuple[Holder, Holder]) -> None:
    a, b = pair
    await b.take(await a.write(*successor()))  # type: ignore[arg-type]
    one, other = await a.shared.snapshot(), await b.shared.snapshot()
    assert (one.term, one.epoch, one.digest) == (other.term, other.epoch, other.digest) == (1, 3, one.digest)
    assert dict(one.deks) == dict(other.deks)
    for holder in (a, b):
        await holder.shared.verify()
        rows = await holder.sql("SELECT id, state, predecessor_id, owner_environment_id FROM dek ORDER BY id")
        assert [tuple(row) for row in rows] == [
            (KID, "deactivated", None, "a"),
            (NEXT_KID, "active", KID, "a"),
        ]


async def test_whoever_comes_while_a_key_is_followed_by_another_has_both(
    pair: tuple[Holder, Holder], tmp_path: Path
) -> None:
    """The new one is written first, since it is not active; the old one is there at the end all the same."""
    a, _ = pair
    coming = key("a", KeyState.PRE_ACTIVE, 2, predecessor=KID)
    await a.write((Kind.DEK, NEXT_KID, coming))
    async with registry_of(tmp_path, "c") as c:
        c.shared.pin("agent-a", a.public)
        await c.take(await a.shared.since(0))
        await c.shared.verify()
        rows = await c.sql("SELECT id, state, predecessor_id FROM dek ORDER BY version")
        assert [tuple(row) for row in rows] == [(KID, "active", None), (NEXT_KID, "pre-active", KID)]


async def test_many_rows_are_one_epoch_as_well(pair: tuple[Holder, Holder]) -> None:
    """More than go to the database at once: new ones, then half of them changed together with new ones."""
    a, b = pair

    def many(numbers: range, state: KeyState) -> list[tuple[Kind, str, DekBody]]:
        return [
            (
                Kind.DEK,
                f"{number:032x}",
                msgspec.structs.replace(key("a", state, number), owner_environment="b"),
            )
            for number in numbers
        ]

    await b.take(await a.write(*many(range(100, 1300), KeyState.PRE_ACTIVE)))
    await b.take(await a.write(*many(range(700, 1900), KeyState.DEACTIVATED)))
    for holder in (a, b):
        await holder.shared.verify()
        rows = await holder.sql(
            "SELECT state, count(*) FROM dek WHERE version >= 100 GROUP BY state ORDER BY 1"
        )
        assert [tuple(row) for row in rows] == [("deactivated", 1200), ("pre-active", 600)]
    assert (await tables(a))["dek"] == (await tables(b))["dek"]


async def test_many_rows_are_signed_and_checked_beside_the_event_loop(pair: tuple[Holder, Holder]) -> None:
    """Whoever asks this agent meanwhile is answered. CPU time: how busy the machine is plays no part."""
    a, b = pair
    rows = [
        (Kind.DEK, f"{number:032x}", key("a", KeyState.PRE_ACTIVE, number)) for number in range(100, 3100)
    ]

    async def own_part[T](work: Awaitable[T]) -> tuple[T, float]:
        all_s, own_s = time.process_time(), time.thread_time()
        done = await work
        return done, (time.thread_time() - own_s) / (time.process_time() - all_s)

    delta, part = await own_part(a.write(*rows))
    assert part < 0.25
    _, part = await own_part(b.take(delta))
    assert part < 0.25


async def test_it_is_the_same_after_it_was_opened_again(pair: tuple[Holder, Holder], tmp_path: Path) -> None:
    a, _ = pair
    before = await a.shared.snapshot()
    await a.registry.close()
    async with registry_of(tmp_path, "a") as again:
        found = await again.shared.snapshot()
        assert (found.term, found.epoch, found.digest) == (before.term, before.epoch, before.digest)
        assert found.deks == before.deks


async def test_a_change_that_changes_nothing_makes_no_epoch(pair: tuple[Holder, Holder]) -> None:
    a, _ = pair
    delta = await a.write((Kind.DEK, KID, key("a")))
    assert (delta.epoch_from, delta.epoch_to, delta.rows) == (2, 2, ())

    def fails(draft: Draft) -> None:
        draft.put(Kind.DEK, KID, key("a", COMPROMISED))
        raise IntegrityError("no")

    with pytest.raises(IntegrityError):
        await a.shared.write(fails, term=1, now_ms=NOW_MS)
    assert (await a.shared.snapshot()).deks[KID].state is KeyState.ACTIVE


async def test_what_ends_in_the_middle_of_an_epoch_has_written_nothing_of_it(
    pair: tuple[Holder, Holder],
) -> None:
    a, b = pair
    delta = await a.write(*successor())  # type: ignore[arg-type]
    await b.take(delta)

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    await b.promote(ADMINS)
    b_before = await tables(b)
    with pytest.raises(KeyboardInterrupt):
        await b.write((Kind.DEK, NEXT_KID, key("a", COMPROMISED, 2)), term=2, also=killed)
    assert await tables(b) == b_before
    assert (await b.shared.snapshot()).epoch == delta.epoch_to + 1
    await b.shared.verify()


async def test_deltas_apply_in_their_order_and_once(pair: tuple[Holder, Holder]) -> None:
    a, b = pair
    first = await a.write((Kind.DEK, KID, key("a", KeyState.SUSPENDED)))
    second = await a.write((Kind.DEK, KID, key("a", COMPROMISED)))
    with pytest.raises(EpochGapError) as gap:
        await b.take(second)
    assert gap.value.own_epoch == 2
    await b.take(first)
    await b.take(second)
    await b.take(second)  # again: nothing
    for old in (first, await a.shared.since(0)):
        if old.epoch_to < 4:
            with pytest.raises(EpochGapError):
                await b.take(old)
        else:
            await b.take(old)
    assert (await b.shared.snapshot()).deks[KID].state is COMPROMISED
    both = await a.shared.since(2)
    assert (both.epoch_from, both.epoch_to, len(both.rows)) == (2, 4, 1)


async def test_what_is_not_the_managers_word_is_refused_and_changes_nothing(
    pair: tuple[Holder, Holder], tmp_path: Path
) -> None:
    a, b = pair
    before = await tables(b)
    delta = await a.write((Kind.DEK, KID, key("a", COMPROMISED)))
    with pytest.raises(EpochGapError):  # whatever is left out: all of it has to be brought
        await b.take(msgspec.structs.replace(delta, rows=()))
    forged = [
        msgspec.structs.replace(delta, tenant="acma"),
        msgspec.structs.replace(delta, digest="00" * 32),
        msgspec.structs.replace(delta, signature="00" * 64),
        msgspec.structs.replace(delta, signer="agent-b"),
        msgspec.structs.replace(await a.shared.since(0), rows=()),
        msgspec.structs.replace(
            delta,
            rows=(
                msgspec.structs.replace(
                    delta.rows[0], body=delta.rows[0].body.replace("compromised", "active")
                ),
            ),
        ),
    ]
    with pytest.raises(FormatError):
        await b.take(
            msgspec.structs.replace(
                delta, rows=(msgspec.structs.replace(delta.rows[0], body=delta.rows[0].body + " "),)
            )
        )
    for wrong in forged:
        with pytest.raises(IntegrityError):
            await b.take(wrong)
    async with registry_of(tmp_path, "x") as stranger:
        await stranger.write(*stranger.first_rows())
        await stranger.write((Kind.DEK, KID, key("x", COMPROMISED)))
        with pytest.raises(IntegrityError):
            await b.take(await stranger.shared.since(0))
    assert await tables(b) == before


async def test_a_manager_whose_term_is_over_writes_nothing(pair: tuple[Holder, Holder]) -> None:
    a, b = pair
    old = await a.write((Kind.DEK, KID, key("a", KeyState.SUSPENDED)))
    await b.promote(ADMINS)
    with pytest.raises(StaleTermError):
        await b.take(old)
    with pytest.raises(StaleTermError):
        await b.write((Kind.DEK, KID, key("a")), term=1)
    await a.take(await b.shared.since(0))
    with pytest.raises(StaleTermError):
        await a.write((Kind.DEK, KID, key("a")), term=1)


async def test_another_managers_history_replaces_ours_but_frees_no_key(pair: tuple[Holder, Holder]) -> None:
    a, b = pair
    await a.write((Kind.DEK, KID, key("a", COMPROMISED)), (Kind.DEK, NEXT_KID, key("a", KeyState.ACTIVE, 2)))
    await b.promote(ADMINS)
    found = await a.take(await b.shared.since(0))
    assert (found.term, found.epoch) == (2, 3)
    assert set(found.deks) == {KID}
    # In the tables the key stays compromised, and the one that nobody else knows seals nothing.
    rows = await a.sql("SELECT id, state FROM dek ORDER BY id")
    assert [tuple(row) for row in rows] == [(KID, "compromised"), (NEXT_KID, "deactivated")]
    await a.shared.verify()
    # The next manager's write in that history says so itself.
    await a.promote(ADMINS)
    assert (await a.shared.snapshot()).deks[KID].state is COMPROMISED


async def test_a_crash_between_commit_and_mark_is_no_tampering(pair: tuple[Holder, Holder]) -> None:
    a, _ = pair
    old = a.mark.read_bytes()
    await a.write((Kind.DEK, KID, key("a", COMPROMISED)))
    a.mark.write_bytes(old)
    await a.shared.verify()
    assert (await a.shared.snapshot()).epoch == 3
    assert a.mark.read_bytes() != old  # the mark follows


async def test_a_destroyed_key_keeps_its_row_and_a_removed_service_its_name(
    pair: tuple[Holder, Holder],
) -> None:
    a, b = pair
    removed = msgspec.structs.replace((await a.shared.snapshot()).services[SERVICE], removed=True)
    await b.take(
        await a.write((Kind.DEK, KID, key("a", KeyState.DESTROYED)), (Kind.SERVICE, SERVICE, removed))
    )
    assert [tuple(row) for row in await b.sql("SELECT id, state FROM dek")] == [(KID, "destroyed")]
    assert [bool(row[0]) for row in await b.sql("SELECT removed FROM network_service")] == [True]
    assert not (await b.registry.book()).services


def test_an_empty_registry_is_nobodys() -> None:
    empty = Shared()
    assert (empty.term, empty.epoch, empty.tenant, dict(empty.deks)) == (0, 0, None, {})
    assert TENANT
    assert RING
