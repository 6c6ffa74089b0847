"""The registry in a file: what it shows without the HSM (nothing), and what an import does and does not."""

import base64
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from envelope.keys import KeyState, NetworkService
from key_agent.agent import Agent
from key_agent.command_line.backup_cli import imported_text
from key_agent.consent import Standing
from key_agent.operations.backup import RESERVED_SERVICE, BackupError
from key_agent.operations.operations import Operations
from key_agent.registry.states import REVOKED_BY_COMMAND, KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.registry.tables import dek_wrap
from tests.key_agent.conftest import Bench, until

S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")


async def _content(operations: Operations) -> str:
    made = await operations.backup_export()
    content = made["content_base64"]
    assert isinstance(content, str)
    return content


async def _import(operations: Operations, content: str, *, trial: bool = False) -> Any:
    result: Any = await operations.backup_import(content_base64=content, trial=trial)
    imported_text(result)
    return result


@asynccontextmanager
async def _fresh(bench: Bench, tmp_path: Path) -> AsyncIterator[tuple[Agent, Operations]]:
    """The machine burnt down; the HSM and the proxies did not."""
    directory = tmp_path / "new-machine"
    directory.mkdir(mode=0o700, exist_ok=True)
    async with bench.agent(url=f"sqlite:///{directory / 'registry.db'}") as life:
        yield life


async def test_a_lost_registry_comes_back_with_every_key(bench: Bench, tmp_path: Path) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        await operations.rotate(service="s3")
        await operations.service_set(service="box", rotate_after_days=7)
        before = await agent.registry.archive(now_ms=1)
        content = await _content(operations)
    bench.proxy().restart()
    async with _fresh(bench, tmp_path) as (agent, operations):
        tried = await _import(operations, content, trial=True)
        assert (await agent.registry.book()).services == (), "a trial changes nothing"
        done = await _import(operations, content)
        assert {name: tried[name] for name in ("keys", "services", "keks")} == {
            name: done[name] for name in ("keys", "services", "keks")
        }
        assert (len(done["keys"]), len(done["services"]), done["refused"], done["kept"]) == (3, 2, {}, {})
        after = await agent.registry.archive(now_ms=1)
        assert [(key.kid, key.state, key.version, key.wraps) for key in after.keys] == [
            (key.kid, key.state, key.version, key.wraps) for key in before.keys
        ]
        assert after.services == before.services
        await until(lambda: len(bench.proxy().valid_keys(S3)) == 2)
        assert len(bench.proxy().valid_keys(BOX)) == 1
        again = await _import(operations, content)
        assert (again["keys"], again["wraps"], again["services"], again["ended"]) == ([], [], [], {})


async def test_the_file_shows_nothing_without_the_hsm_and_needs_its_kek(bench: Bench, tmp_path: Path) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        content = await _content(operations)
        kek = agent.consent.kek
        assert kek is not None
        raw = base64.b64decode(content)
        [key] = await agent.registry.data_keys()
        [wrapped] = await agent.registry.wrapped_keys(kek.reference.kek_id)
        for word in (b"acme/s3", str(key.key_id).encode(), b"p1.example", wrapped.wrapped, b"BEGIN CERT"):
            assert word not in raw
            assert base64.b64encode(word) not in raw
        bench.source.destroy(kek)
    async with _fresh(bench, tmp_path) as (agent, operations):
        with pytest.raises(RefusedChangeError, match="is not in the HSM: kek_destroyed"):
            await _import(operations, content)
        bench.source.replace(kek)
        with pytest.raises(RefusedChangeError, match="kek_replaced"):
            await _import(operations, content)
        assert (await agent.registry.book()).services == ()


async def test_every_changed_byte_is_found(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, "s3")
        raw = base64.b64decode(await _content(operations))
        head = raw.index(b"\n", raw.index(b"\n") + 1) + 1
        places = [0, 5, *range(20, head, 37), *range(head, len(raw), 211), len(raw) - 1]
        for place in places:
            bad = bytearray(raw)
            bad[place] ^= 1
            with pytest.raises((BackupError, RefusedChangeError)):
                await _import(operations, base64.b64encode(bad).decode())
        for bad_end in (raw[:-1], raw + b"x", raw[: head + 10], raw[:head], raw[:10], b""):
            with pytest.raises(BackupError):
                await _import(operations, base64.b64encode(bad_end).decode())
        with pytest.raises(BackupError, match="base64"):
            await _import(operations, "no base64!")
        assert (await _import(operations, base64.b64encode(raw).decode()))["keys"] == []


async def test_another_headers_lines_do_not_fit(bench: Bench) -> None:
    """Two files of one registry: head of the one, body of the other."""
    async with bench.agent() as (_, operations):
        await bench.provision(operations, "s3")
        one, two = [base64.b64decode(await _content(operations)) for _ in range(2)]
        heads = [raw.index(b"\n", raw.index(b"\n") + 1) + 1 for raw in (one, two)]
        mixed = one[: heads[0]] + two[heads[1] :]
        with pytest.raises(BackupError, match="not as it was written"):
            await _import(operations, base64.b64encode(mixed).decode())


async def test_another_tenants_file_is_refused(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, "s3")
        raw = base64.b64decode(await _content(operations))
        magic, line, rest = raw.split(b"\n", 2)
        for name, value in (("tenant", "globex"), ("environment", "other")):
            changed = json.dumps(json.loads(line) | {name: value}).encode()
            with pytest.raises(RefusedChangeError, match="the backup is of"):
                await _import(operations, base64.b64encode(b"\n".join([magic, changed, rest])).decode())


async def test_what_was_destroyed_since_stays_destroyed(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        [kid] = bench.proxy().valid_keys(S3)
        content = await _content(operations)
        await operations.rotate(service="s3")
        await operations.key_destroy(service="s3", kid=kid, confirm=kid)
        done = await _import(operations, content)
        assert "stays destroyed" in done["kept"][kid]
        states = {str(key.key_id): key.state for key in await agent.registry.data_keys()}
        assert states[kid] is KeyState.DESTROYED
        assert bench.proxy().held[S3].claims.keys


async def test_what_the_backup_knows_to_have_ended_ends_here_too(bench: Bench, tmp_path: Path) -> None:
    """The registry was put back from an older copy; the export is newer."""
    async with bench.agent() as (_, operations):
        await bench.provision(operations, "s3")
        [first] = bench.proxy().valid_keys(S3)
        await operations.rotate(service="s3")
        [second] = set(bench.proxy().valid_keys(S3)) - {first}
        older = await _content(operations)
        await operations.key_destroy(service="s3", kid=first, confirm=first)
        await operations.key_compromise(service="s3", kid=second, reason="leaked")
        await operations.rotate(service="s3")
        newer = await _content(operations)
    async with _fresh(bench, tmp_path) as (agent, operations):
        await _import(operations, older)
        assert {key.state for key in await agent.registry.data_keys()} == {
            KeyState.DEACTIVATED,
            KeyState.ACTIVE,
        }
        done = await _import(operations, newer)
        assert done["ended"] == {first: "destroyed", second: "compromised"}
        assert len(done["keys"]) == 1
        keys = {str(key.key_id): key for key in await agent.registry.data_keys()}
        assert keys[first].state is KeyState.DESTROYED
        assert keys[first].wrapped_by == ()
        assert keys[second].state is KeyState.COMPROMISED
        assert keys[done["keys"][0]].state is KeyState.ACTIVE


async def test_a_lost_wrap_is_put_back_and_a_sound_one_left_alone(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        content = await _content(operations)
        [lost, kept] = await agent.registry.data_keys()
        await agent.registry._database.transact(
            lambda c: c.execute(delete(dek_wrap).where(dek_wrap.c.dek_id == str(lost.key_id)))
        )
        done = await _import(operations, content)
        assert done["wraps"] == [str(lost.key_id)]
        assert {key.wrapped_by for key in await agent.registry.data_keys()} == {kept.wrapped_by}


async def test_a_wrap_that_the_hsm_does_not_open_is_not_taken(bench: Bench, tmp_path: Path) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        content = await _content(operations)
        [bad] = [key for key in await agent.registry.data_keys() if key.owner == S3]
    bench.source.spoil(bad.key_id)
    async with _fresh(bench, tmp_path) as (agent, operations):
        done = await _import(operations, content)
        assert done["refused"] == {str(bad.key_id): "does not open"}
        assert [key.owner for key in await agent.registry.data_keys()] == [BOX]
        bench.source.unspoil(bad.key_id)
        assert (await _import(operations, content))["keys"] == [str(bad.key_id)]
        assert {key.state for key in await agent.registry.data_keys()} == {KeyState.ACTIVE}


async def test_keys_of_a_kek_that_is_not_there_wait_for_it(bench: Bench, tmp_path: Path) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        lost_kek = agent.consent.kek
        assert lost_kek is not None
        [old] = bench.proxy().valid_keys(S3)
        await operations.kek_revoke()
        await operations.reinstate()
        content = await _content(operations)
    async with _fresh(bench, tmp_path) as (agent, operations):
        done = await _import(operations, content)
        assert done["waiting"] == [old]
        assert list(done["absent_keks"]) == [lost_kek.reference.kek_id]
        await until(lambda: len(bench.proxy().valid_keys(S3)) == 1)
        [row] = [key for key in await agent.registry.data_keys() if str(key.key_id) == old]
        assert row.wrapped_by == (), "nobody has opened it: it does not count"
        bench.source.bring_back(lost_kek)
        restored: Any = await operations.reinstate(restore=True)
        assert restored["earlier"][0]["moved"] == 1
        await until(lambda: len(bench.proxy().valid_keys(S3)) == 2)


async def test_a_revoked_kek_stays_revoked_whatever_a_backup_says(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        kek = agent.consent.kek
        assert kek is not None
        content = await _content(operations)
        await operations.kek_revoke()
        bench.source.bring_back(kek)
        await _import(operations, content)
        row = await agent.registry.current_kek()
        assert row is not None
        assert row.state is KekState.DESTROYED
        assert not bench.proxy().valid_keys(S3)


async def test_a_backup_from_before_a_rotation_of_keks_and_one_from_after(
    bench: Bench, tmp_path: Path
) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        before = await _content(operations)
        await operations.kek_rotate()
        after = await _content(operations)
    async with _fresh(bench, tmp_path) as (agent, operations):
        with pytest.raises(RefusedChangeError, match="kek_destroyed"):
            await _import(operations, before)
        await _import(operations, after)
        await until(lambda: bench.proxy().valid_keys(S3))
        assert [row.state for row in await agent.registry.keks()] == [KekState.RETIRED, KekState.ACTIVE]


async def test_an_older_registry_follows_the_keks_that_came_after(bench: Bench, tmp_path: Path) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        older = await _content(operations)
    async with _fresh(bench, tmp_path) as (_, operations):
        await _import(operations, older)
    async with bench.agent() as (_, operations):
        await operations.kek_rotate()
        newer = await _content(operations)
    bench.proxy().restart()
    async with _fresh(bench, tmp_path) as (agent, operations):
        # It finds its KEK destroyed, and cannot know better.
        await until(lambda: agent.consent.standing is Standing.REVOKED and agent._to_persist is None)
        done = await _import(operations, newer)
        assert len(done["keks"]) == 1
        assert [row.state for row in await agent.registry.keks()] == [
            KekState.DEACTIVATED,
            KekState.ACTIVE,
        ]
        await until(lambda: bench.proxy().valid_keys(S3))


async def test_a_registry_from_the_middle_of_a_rotation_of_keks_follows_it_to_its_end(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's snapshot fell between two steps of `kek rotate`; the backup is of after it."""
    middle = tmp_path / "new-machine"
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        succeed = agent.registry.succeed_kek

        async def snapshot(new_kek_id: str, *, now_ms: int) -> int:
            middle.mkdir(mode=0o700)
            with (
                closing(sqlite3.connect(bench.directory / "registry.db")) as here,
                closing(sqlite3.connect(middle / "registry.db")) as there,
            ):
                here.backup(there)
                there.execute("DELETE FROM lease")  # that of a process that is no more
                there.commit()
            return await succeed(new_kek_id, now_ms=now_ms)

        monkeypatch.setattr(agent.registry, "succeed_kek", snapshot)
        kek = (await operations.kek_rotate())["kek"]
        newer = await _content(operations)
        [kid] = bench.proxy().valid_keys(S3)
    bench.proxy().restart()
    async with _fresh(bench, tmp_path) as (agent, operations):
        await until(lambda: agent.consent.standing is Standing.REVOKED and agent._to_persist is None)
        assert (await _import(operations, newer))["keks"] == [kek]
        await until(lambda: bench.proxy().valid_keys(S3) == [kid])
        assert [row.state for row in await agent.registry.keks()] == [
            KekState.DEACTIVATED,
            KekState.ACTIVE,
        ]


async def test_but_not_if_it_was_revoked_by_command_here(bench: Bench, tmp_path: Path) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, "s3")
        older = await _content(operations)
    async with _fresh(bench, tmp_path) as (agent, operations):
        await _import(operations, older)
        row = await agent.registry.current_kek()
        assert row is not None
        await agent.registry.set_kek_state(
            row.reference.kek_id, KekState.REVOKED, REVOKED_BY_COMMAND, now_ms=1
        )
    async with bench.agent() as (_, operations):
        await operations.kek_rotate()
        newer = await _content(operations)
    async with _fresh(bench, tmp_path) as (agent, operations):
        await _import(operations, newer)
        assert [row.state for row in await agent.registry.keks()] == [
            KekState.REVOKED,
            KekState.DEACTIVATED,
        ]


async def test_a_removed_service_stays_removed(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        content = await _content(operations)
        await operations.service_remove(service="s3")
        done = await _import(operations, content)
        assert all("stays destroyed" in why for why in done["kept"].values())
        assert (await agent.registry.book()).services == ()
        assert not bench.proxy().valid_keys(S3)


async def test_a_key_on_its_way_comes_back_to_open(bench: Bench, tmp_path: Path) -> None:
    """It may have become active, and have sealed, after the file was written."""
    async with bench.agent() as (_, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        bench.proxy("p2").down = True
        result: Any = await operations.rotate(service="s3")
        content = await _content(operations)
    async with _fresh(bench, tmp_path) as (agent, operations):
        await _import(operations, content)
        states = {str(key.key_id): key.state for key in await agent.registry.data_keys()}
        assert states[result["rotations"][0]["new_kid"]] is KeyState.DEACTIVATED
        assert await agent.registry.open_rotations() == []


async def test_no_service_bears_the_name_of_backups(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, "s3")
        with pytest.raises(RefusedChangeError, match="backups"):
            await operations.service_add(
                service=RESERVED_SERVICE, proxy="p1", certificate_pem=bench.host(RESERVED_SERVICE)
            )


async def test_without_a_working_kek_there_is_no_export(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        with pytest.raises(RefusedChangeError, match="no KEK"):
            await operations.backup_export()
        await bench.provision(operations, "s3")
        await operations.kek_revoke()
        with pytest.raises(RefusedChangeError):
            await operations.backup_export()
