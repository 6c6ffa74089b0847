"""An archive fills what a registry lacks, on both databases. (With an HSM behind it: test_backup.py.)"""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import update

from envelope.keys import KeyState, KeyUse
from key_agent.registry.archive import Archive, Restored
from key_agent.registry.model import Patience, RotationCause
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError, Registry
from key_agent.registry.tables import dek_wrap
from tests.key_agent.registry.records import BOX, NOW_MS, S3, add_service, key_of, open_registry


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await open_registry(url)
    yield opened
    await opened.close()


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[Registry]:
    """Another machine's, that the archive comes from."""
    directory = tmp_path / "source"
    directory.mkdir(mode=0o700)
    opened = await open_registry(f"sqlite:///{directory / 'registry.db'}")
    yield opened
    await opened.close()


def _all_wraps(archive: Archive) -> set[tuple[str, str]]:
    return {(key.kid, wrap.kek_id) for key in archive.keys for wrap in key.wraps}


async def _restore(registry: Registry, archive: Archive, *, is_trial: bool = False) -> Restored:
    return await registry.restore(
        archive, opened=_all_wraps(archive), refused=set(), now_ms=NOW_MS, is_trial=is_trial
    )


async def test_all_comes_back_and_a_second_time_nothing_changes(registry: Registry, source: Registry) -> None:
    await add_service(source, S3, "p1", "p2")
    sign = key_of(S3, use=KeyUse.SIGN, algorithm="ES256")
    await source.add_service(S3, proxy_id="p1", certificate_pem="PEM", key=sign, now_ms=NOW_MS)
    await add_service(source, BOX)
    await source.remove_service(BOX, now_ms=NOW_MS)
    await source.reserve([S3], ["p1"], now_ms=NOW_MS + 77, until_ms=NOW_MS + 99)
    archive = await source.archive(now_ms=NOW_MS)
    sent = msgspec.json.decode(msgspec.json.encode(archive), type=Archive)
    assert sent == archive
    trial = await _restore(registry, sent, is_trial=True)
    assert await registry.keks() == []
    done = await _restore(registry, sent)
    assert done == trial
    assert await registry.archive(now_ms=NOW_MS) == archive
    assert await _restore(registry, sent) == Restored()
    _, [made] = await registry.reserve([S3], ["p1"], now_ms=NOW_MS, until_ms=NOW_MS + 1)
    assert made.sequence == NOW_MS + 78, "sequences go on, whatever the clock says"


async def test_wraps_count_only_once_they_were_opened(registry: Registry, source: Registry) -> None:
    key = await add_service(source, S3)
    archive = await source.archive(now_ms=NOW_MS)
    done = await registry.restore(archive, opened=set(), refused=set(), now_ms=NOW_MS)
    assert done.waiting == [str(key.key_id)]
    [row] = await registry.data_keys()
    assert (row.state, row.wrapped_by, row.waits_for) == (KeyState.DEACTIVATED, (), ("k1",))
    _, made = await registry.reserve([S3], ["p1"], now_ms=NOW_MS, until_ms=NOW_MS + 1)
    assert made == [], "nothing of it travels"
    done = await _restore(registry, archive)
    assert done.wraps == [str(key.key_id)]
    [row] = await registry.data_keys()
    assert (row.wrapped_by, row.waits_for) == (("k1",), ())


async def test_a_refused_wrap_is_not_taken_and_neither_is_its_key(
    registry: Registry, source: Registry
) -> None:
    key = await add_service(source, S3)
    archive = await source.archive(now_ms=NOW_MS)
    done = await registry.restore(archive, opened=set(), refused=_all_wraps(archive), now_ms=NOW_MS)
    assert done.kept == {str(key.key_id): "no wrap of it in the backup opens"}
    assert await registry.data_keys() == []


async def test_a_second_active_key_comes_back_to_open(registry: Registry, source: Registry) -> None:
    theirs = await add_service(source, S3)
    archive = await source.archive(now_ms=NOW_MS)
    ours = await add_service(registry, S3)
    done = await _restore(registry, archive)
    assert done.keys == [str(theirs.key_id)]
    found = {key.key_id: (key.state, key.version) for key in await registry.data_keys()}
    assert found == {
        ours.key_id: (KeyState.ACTIVE, 1),
        theirs.key_id: (KeyState.DEACTIVATED, 2),
    }


async def test_one_key_id_never_gets_two_materials(registry: Registry, source: Registry) -> None:
    theirs = await add_service(source, S3)
    archive = await source.archive(now_ms=NOW_MS)
    ours = key_of(S3, key_id=theirs.key_id)
    await add_service(registry, S3, key=ours)
    done = await _restore(registry, archive)
    assert "check values differ" in done.kept[str(theirs.key_id)]
    [kept] = await registry.wrapped_keys("k1")
    assert kept.wrapped == ours.wrapped


async def test_a_damaged_wrap_is_replaced(registry: Registry, source: Registry) -> None:
    await add_service(source, S3)
    archive = await source.archive(now_ms=NOW_MS)
    await _restore(registry, archive)
    await registry._database.transact(lambda c: c.execute(update(dek_wrap).values(wrapped=b"rot")))
    assert (await registry.archive(now_ms=NOW_MS)).keys[0].wraps == (), "it is in no archive"
    assert len((await _restore(registry, archive)).wraps) == 1
    assert await registry.archive(now_ms=NOW_MS) == archive


async def test_tombstones_win_in_both_directions(registry: Registry, source: Registry) -> None:
    key = await add_service(source, S3)
    living = await source.archive(now_ms=NOW_MS)
    await source.change_key(S3, key.key_id, KeyState.DEACTIVATED, None, now_ms=NOW_MS)
    await source.change_key(S3, key.key_id, KeyState.DESTROYED, None, now_ms=NOW_MS)
    dead = await source.archive(now_ms=NOW_MS)
    await _restore(registry, living)
    done = await _restore(registry, dead)
    assert done.ended == {str(key.key_id): "destroyed"}
    done = await _restore(registry, living)
    assert "stays destroyed" in done.kept[str(key.key_id)]
    [row] = await registry.data_keys()
    assert (row.state, row.wrapped_by) == (KeyState.DESTROYED, ())


async def test_a_key_on_its_way_here_that_ended_there_ends(registry: Registry, source: Registry) -> None:
    await add_service(source, S3)
    base = await source.archive(now_ms=NOW_MS)
    await _restore(registry, base)
    new = key_of(S3)
    patience = Patience(usual_ms=1)
    await registry.begin_rotations([new], RotationCause.COMMAND, patience, now_ms=NOW_MS)
    [made] = await source.begin_rotations([new], RotationCause.COMMAND, patience, now_ms=NOW_MS)
    await source.activate_rotation(made, [], patience, now_ms=NOW_MS)
    await source.change_key(S3, new.key_id, KeyState.COMPROMISED, None, now_ms=NOW_MS)
    done = await _restore(registry, await source.archive(now_ms=NOW_MS))
    assert str(new.key_id) in done.ended
    assert await registry.open_rotations() == []
    states = {key.key_id: key.state for key in await registry.data_keys()}
    assert states[new.key_id] is KeyState.DESTROYED, "it never sealed here"
    [gone] = [key for key in await registry.data_keys() if key.key_id == new.key_id]
    assert (gone.wrapped_by, gone.waits_for) == ((), ()), "no copy of a destroyed key comes out of a backup"


async def test_a_kek_that_was_taken_back_here_stays_so(registry: Registry, source: Registry) -> None:
    await add_service(source, S3)
    archive = await source.archive(now_ms=NOW_MS)
    await _restore(registry, archive)
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    await _restore(registry, archive)
    assert [row.state for row in await registry.keks()] == [KekState.REVOKED]


async def test_another_registrys_archive_is_refused(registry: Registry, source: Registry) -> None:
    archive = await source.archive(now_ms=NOW_MS)
    for other in (
        msgspec.structs.replace(archive, tenant="globex"),
        msgspec.structs.replace(archive, environment="other"),
    ):
        with pytest.raises(RefusedChangeError, match="nowhere else"):
            await _restore(registry, other)
