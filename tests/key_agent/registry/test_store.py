"""The registry, on SQLite and on PostgreSQL (conftest.py)."""

import asyncio
import math
import os
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, text

from envelope.errors import MisuseError
from envelope.keys import KeyId, KeyState, NetworkService
from key_agent.registry.database import Database, RegistryError
from key_agent.registry.model import Proxy, Receipt, Reservation
from key_agent.registry.states import KekState
from key_agent.registry.store import MAX_SEQUENCE, RefusedChangeError, Registry
from key_agent.registry.tables import metadata
from key_agent.sources.source import Kek, KekReference, WrapMethod, WrappedKey
from tests.key_agent.registry.conftest import POSTGRES_URL, needs_postgres

NOW_MS = 1_800_000_000_000
S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")


async def _open(url: str, **changes: Any) -> Registry:
    names = {"tenant_id": "acme", "environment_id": "main", "agent_id": "hq"} | changes
    return await Registry.open(url, now_ms=NOW_MS, **names)


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await _open(url)
    yield opened
    await opened.close()


def _reference(kek_id: str = "k1") -> KekReference:
    return KekReference(
        kek_id=kek_id, label=f"sealgate-{kek_id}", object_id=kek_id.encode(), environment_id="main"
    )


def _kek(kek_id: str = "k1") -> Kek:
    return Kek(
        reference=_reference(kek_id),
        method=WrapMethod.GCM,
        token_serial="serial",
        canary_ciphertext=b"canary",
        canary_sha256=b"sha",
        created_at_ms=NOW_MS,
    )


def _key(owner: NetworkService = S3, kek_id: str = "k1") -> WrappedKey:
    return WrappedKey(
        owner=owner,
        key_id=KeyId.random(),
        kek_id=kek_id,
        environment_id="main",
        method=WrapMethod.GCM,
        wrapped=os.urandom(60),
        kcv=os.urandom(16),
        token_serial="serial",
        created_at_ms=NOW_MS,
    )


async def _with_kek(registry: Registry, kek_id: str = "k1", *keys: WrappedKey) -> None:
    await registry.begin_kek(_reference(kek_id), now_ms=NOW_MS)
    await registry.complete_kek(_kek(kek_id), keys, now_ms=NOW_MS)


async def _with_service(registry: Registry, *owners: NetworkService, proxy: str = "p1") -> list[WrappedKey]:
    if await registry.current_kek() is None:
        await _with_kek(registry)
    await registry.add_proxy(Proxy(id=proxy, url="https://p.example", ca_pem="CA"), now_ms=NOW_MS)
    keys = []
    for owner in owners:
        key = None if await registry.has_active_key(owner) else _key(owner)
        await registry.add_service(owner, proxy_id=proxy, certificate_pem="PEM", key=key, now_ms=NOW_MS)
        keys += [key] if key else []
    return keys


async def _reserve(
    registry: Registry, *owners: NetworkService, proxies: tuple[str, ...] = ("p1",), now_ms: int = NOW_MS
) -> tuple[Kek, list[Reservation]]:
    return await registry.reserve(owners, proxies, now_ms=now_ms, until_ms=now_ms + 330_000)


async def test_the_migrations_lead_to_the_tables(url: str, registry: Registry) -> None:
    def differences() -> list[object]:
        engine = create_engine(url)
        try:
            with engine.connect() as connection:
                context = MigrationContext.configure(connection, opts={"compare_type": True})
                return list(compare_metadata(context, metadata))
        finally:
            engine.dispose()

    assert await asyncio.to_thread(differences) == []


async def test_sqlite_is_durable(directory: Path) -> None:
    database = await Database.open(f"sqlite:///{directory / 'registry.db'}")

    async def pragma(name: str) -> object:
        return await database.transact(lambda c: c.exec_driver_sql(f"PRAGMA {name}").scalar())

    assert await pragma("synchronous") == 2
    assert await pragma("journal_mode") == "wal"
    assert await pragma("foreign_keys") == 1
    await database.close()
    await database.close()
    with pytest.raises(RegistryError, match="closed"):
        await database.transact(lambda _: None)


async def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o750)  # noqa: PTH101
    with pytest.raises(RegistryError, match="chmod 700"):
        await Database.open(f"sqlite:///{tmp_path / 'registry.db'}")
    with pytest.raises(RegistryError, match="init"):
        await Database.open(f"sqlite:///{tmp_path / 'missing' / 'registry.db'}")


async def test_a_database_that_is_none_is_refused(directory: Path) -> None:
    tmp_path = directory
    (tmp_path / "registry.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(RegistryError, match="DatabaseError"):
        await Database.open(f"sqlite:///{tmp_path / 'registry.db'}")


async def test_what_raises_leaves_nothing_behind(registry: Registry) -> None:
    await _with_service(registry, S3)
    key = _key(BOX)
    with pytest.raises(RefusedChangeError):
        await registry.add_service(BOX, proxy_id="p9", certificate_pem="PEM", key=key, now_ms=NOW_MS)
    assert (await registry.book()).services == (S3,)


async def test_another_tenants_or_environments_registry_is_refused(url: str, registry: Registry) -> None:
    await registry.close()
    for changes in ({"tenant_id": "globex"}, {"environment_id": "other"}):
        with pytest.raises(RefusedChangeError, match="belongs to"):
            await _open(url, **changes)
    again = await _open(url)
    await again.close()


async def test_a_kek_is_named_before_it_is_made(registry: Registry) -> None:
    assert await registry.begin_kek(_reference("k1"), now_ms=NOW_MS) == (_reference("k1"), False)
    assert await registry.current_kek() is None
    # After a crash: the same name, and the word that the HSM may hold it half-made.
    assert await registry.begin_kek(_reference("k2"), now_ms=NOW_MS) == (_reference("k1"), True)
    await registry.complete_kek(_kek("k1"), [], now_ms=NOW_MS)
    row = await registry.current_kek()
    assert row is not None
    assert (row.kek, row.state, row.version) == (_kek("k1"), KekState.ACTIVE, 1)


async def test_a_new_kek_needs_the_old_ones_end(registry: Registry) -> None:
    await _with_service(registry, S3)
    await registry.begin_kek(_reference("k2"), now_ms=NOW_MS)
    with pytest.raises(MisuseError):
        await registry.complete_kek(_kek("k2"), [], now_ms=NOW_MS)
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    new = _key(S3, "k2")
    await registry.complete_kek(_kek("k2"), [new], now_ms=NOW_MS)
    assert [row.state for row in await registry.keks()] == [KekState.DEACTIVATED, KekState.ACTIVE]
    old_key, new_key = await registry.data_keys()
    assert (old_key.state, old_key.wrapped_by) == (KeyState.DEACTIVATED, ("k1",))
    assert (new_key.state, new_key.wrapped_by, new_key.version) == (KeyState.ACTIVE, ("k2",), 2)
    _, [reservation] = await _reserve(registry, S3)
    assert [key.key_id for key, _ in reservation.keys] == [new.key_id], "old wraps do not travel"
    assert [key.key_id for key in await registry.wrapped_keys("k1")] == [old_key.key_id]


@pytest.mark.parametrize("state", [KekState.SUSPENDED, KekState.REVOKED, KekState.DESTROYED])
async def test_no_keys_leave_under_a_kek_that_is_not_active(registry: Registry, state: KekState) -> None:
    await _with_service(registry, S3)
    await registry.set_kek_state("k1", state, "why", now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match=str(state)):
        await _reserve(registry, S3)


async def test_sequences_rise_whatever_the_clock_does(registry: Registry) -> None:
    await _with_service(registry, S3)
    found = []
    for now_ms in (NOW_MS, NOW_MS, NOW_MS - 5000, NOW_MS + 1000):
        _, [reservation] = await _reserve(registry, S3, now_ms=now_ms)
        found.append(reservation.sequence)
    assert found == [NOW_MS, NOW_MS + 1, NOW_MS + 2, NOW_MS + 1000]
    await registry.spend_sequences({S3: NOW_MS + 5000})
    await registry.spend_sequences({S3: NOW_MS + 4000})
    assert (await registry.book()).sequences == {S3: NOW_MS + 5000}
    with pytest.raises(RefusedChangeError, match="too high"):
        await _reserve(registry, S3, now_ms=MAX_SEQUENCE + 1)


async def test_a_reservation_is_on_disk_before_it_returns(url: str, registry: Registry) -> None:
    await _with_service(registry, S3)
    _, [reservation] = await _reserve(registry, S3)

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
    await _with_service(registry, S3, BOX, proxy="p1")
    await _with_service(registry, S3, proxy="p2")
    _, made = await _reserve(registry, S3, BOX, proxies=("p2", "p3"))
    assert [(item.owner, [link.proxy_id for link in item.links]) for item in made] == [(S3, ["p2"])]
    await registry.remove_proxy("p2", now_ms=NOW_MS)
    _, made = await _reserve(registry, S3, proxies=("p1", "p2"))
    assert [link.proxy_id for link in made[0].links] == ["p1"]
    await registry.remove_service(S3, now_ms=NOW_MS)
    assert (await _reserve(registry, S3))[1] == []


async def test_a_damaged_wrap_is_found_without_the_hsm(url: str, registry: Registry) -> None:
    [key] = await _with_service(registry, S3)

    def damage() -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE dek_wrap SET wrapped = wrapped_sha256"))
        engine.dispose()

    await asyncio.to_thread(damage)
    _, [reservation] = await _reserve(registry, S3)
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
    await _with_service(registry, S3)
    _, [reservation] = await _reserve(registry, S3)
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
    await _with_service(registry, S3)
    await _reserve(registry, S3)
    [link] = (await registry.book()).links
    assert link.may_hold_keys(NOW_MS + 330_000 + 29_000, math.inf), "a clock behind ours ends later"
    assert not link.may_hold_keys(link.silent_at_ms, math.inf)


async def test_a_removed_service_comes_back_with_a_new_key(registry: Registry) -> None:
    [old] = await _with_service(registry, S3)
    assert await registry.remove_service(S3, now_ms=NOW_MS) == ["p1"]
    assert not await registry.has_active_key(S3)
    [new] = await _with_service(registry, S3)
    states = {key.key_id: key.state for key in await registry.data_keys()}
    assert states == {old.key_id: KeyState.DESTROYED, new.key_id: KeyState.ACTIVE}
    with pytest.raises(RefusedChangeError, match="no network service"):
        await registry.remove_service(BOX, now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match="at proxy"):
        await registry.remove_service(S3, proxy_id="p7", now_ms=NOW_MS)


async def test_a_second_key_never_is_active_beside_the_first(registry: Registry) -> None:
    await _with_service(registry, S3)
    await registry.add_service(S3, proxy_id="p1", certificate_pem="PEM", key=_key(S3), now_ms=NOW_MS)
    states = [key.state for key in await registry.data_keys()]
    assert states == [KeyState.DEACTIVATED, KeyState.ACTIVE]


async def test_moved_wraps_make_an_old_key_travel_again(registry: Registry) -> None:
    [old] = await _with_service(registry, S3)
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    new = _key(S3, "k2")
    await _with_kek(registry, "k2", new)
    moved = replace(old, kek_id="k2", wrapped=os.urandom(60))
    assert await registry.move_wraps("k1", [moved], now_ms=NOW_MS) == 1
    assert await registry.move_wraps("k1", [moved], now_ms=NOW_MS) == 0, "the old wrap is gone: done before"
    assert {key.key_id: key.wrapped_by for key in await registry.data_keys()}[old.key_id] == ("k2",)
    _, [reservation] = await _reserve(registry, S3)
    assert {(key.key_id, state) for key, state in reservation.keys} == {
        (old.key_id, KeyState.DEACTIVATED),
        (new.key_id, KeyState.ACTIVE),
    }


async def test_a_full_disk_refuses_and_keeps_the_old_rows(directory: Path) -> None:
    tmp_path = directory
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    registry = await _open(url)
    await _with_service(registry, S3)
    before = await registry.data_keys()

    def limit(c: Connection) -> None:
        c.exec_driver_sql("PRAGMA max_page_count = 1")

    await registry._database.transact(limit)

    async def add_many() -> None:
        for number in range(1000):
            owner = NetworkService("acme", f"s{number}")
            await registry.add_service(
                owner, proxy_id="p1", certificate_pem="x" * 2000, key=_key(owner), now_ms=NOW_MS
            )

    with pytest.raises(RegistryError, match="full"):
        await add_many()
    kept = {key.key_id for key in await registry.data_keys()}
    assert {key.key_id for key in before} <= kept
    await registry.close()
    check = sqlite3.connect(tmp_path / "registry.db")
    assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check.close()


@needs_postgres
async def test_a_postgres_that_would_lose_commits_is_refused() -> None:
    assert POSTGRES_URL is not None
    with pytest.raises(RegistryError, match="synchronous_commit=off"):
        await Database.open(f"{POSTGRES_URL}?options=-csynchronous_commit%3Doff")


@needs_postgres
async def test_a_postgres_that_cut_the_connection_is_found_again() -> None:
    assert POSTGRES_URL is not None
    url = POSTGRES_URL
    database = await Database.open(url)
    pid = await database.transact(lambda c: c.exec_driver_sql("SELECT pg_backend_pid()").scalar())

    def cut() -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        engine.dispose()

    await asyncio.to_thread(cut)
    again = await database.transact(lambda c: c.exec_driver_sql("SELECT pg_backend_pid()").scalar())
    assert again != pid
    await database.close()
