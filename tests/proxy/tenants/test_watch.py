"""How changes reach the running proxy: recorded first, then applied."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import override

import pytest

from envelope.audit import Value
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Directory
from proxy.tenants.tenant_store import add_tenant, update_tenant
from proxy.tenants.watch import DirectoryWatch
from runtime.audit import AuditLog, AuditUnavailableError
from tests.fakes.clock import ManualClock
from tests.pki import Tenant


class Scene:
    """A directory, an audit log that may be full, a watch, and what was applied."""

    def __init__(self, path: Path, clock: ManualClock) -> None:
        self.path = path
        self.clock = clock
        self.store = DirectoryStore.open(f"sqlite:///{path / 'directory.db'}", path, clock=clock)
        self.audit = SometimesFull.open(path / "audit.jsonl", clock)
        self.watch = self.make_watch()
        self.applied: list[int] = []

    def make_watch(self) -> DirectoryWatch:
        recorded = self.path / "audit.revision"
        return DirectoryWatch(self.store, self.audit, self.clock, interval_s=1, recorded_file=recorded)

    def is_stale(self) -> bool:
        return self.watch.failure is not None

    def recorded(self) -> list[int]:
        events = [json.loads(line) for line in self.audit.path.read_text().splitlines()]
        return [event["revision"] for event in events if event["action"] == "directory-changed"]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        directory = await self.watch.load()

        async def apply(directory: Directory) -> None:
            self.applied.append(directory.revision)

        task = asyncio.create_task(self.watch.run(directory, apply))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def tick(self) -> None:
        """One look at the database, to its end: the watch sleeps again."""
        await self.clock.wait_for_sleepers()
        await self.clock.advance(1)
        await self.clock.wait_for_sleepers()


class SometimesFull(AuditLog):
    is_full = False

    @override
    def append(self, action: str, *, outcome: str = "ok", durable: bool = True, **fields: Value) -> None:
        if self.is_full:
            raise AuditUnavailableError("cannot be written: No space left on device", "free the disk")
        super().append(action, outcome=outcome, durable=durable, **fields)


@pytest.fixture
async def scene(tmp_path: Path, clock: ManualClock) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path, clock)
    yield scene
    scene.store.close()
    scene.audit.close()


async def test_a_change_is_recorded_and_applied(scene: Scene, acme: Tenant, globex: Tenant) -> None:
    add_tenant(scene.store, "acme", acme.root.certificate, actor="ada")
    async with scene.running():
        assert scene.recorded() == [1], "what happened while the proxy was down is recorded at start"
        await scene.tick()
        assert scene.applied == []
        add_tenant(scene.store, "globex", globex.root.certificate, actor="ada")
        update_tenant(scene.store, "globex", actor="ada", tunnel_hosts=["a.example"])
        await scene.tick()
        assert scene.applied == [3], "several changes are one new picture"
    assert scene.recorded() == [1, 2, 3]
    (event,) = [
        json.loads(line) for line in scene.audit.path.read_text().splitlines() if '"revision":2,' in line
    ]
    assert (event["change"], event["tenant"], event["actor"]) == ("tenant-added", "globex", "ada")


async def test_a_restart_repeats_and_loses_nothing(scene: Scene, acme: Tenant) -> None:
    add_tenant(scene.store, "acme", acme.root.certificate, actor="ada")
    await scene.watch.load()
    await scene.make_watch().load()
    assert scene.recorded() == [1]
    update_tenant(scene.store, "acme", actor="ada", tunnel_hosts=[])
    await scene.make_watch().load()
    assert scene.recorded() == [1, 2]


async def test_what_cannot_be_recorded_does_not_take_effect(scene: Scene, acme: Tenant) -> None:
    async with scene.running():
        scene.audit.is_full = True
        add_tenant(scene.store, "acme", acme.root.certificate, actor="ada")
        await scene.tick()
        assert scene.applied == []
        assert scene.is_stale()
        scene.audit.is_full = False
        await scene.tick()
        assert scene.applied == [1]
        assert not scene.is_stale()
    scene.audit.is_full = True
    (scene.path / "audit.revision").unlink()
    with pytest.raises(AuditUnavailableError):
        await scene.watch.load()


async def test_a_lost_database_leaves_the_picture_in_force(scene: Scene, acme: Tenant) -> None:
    async with scene.running():
        scene.store.close()
        hidden = scene.path / "hidden"
        (scene.path / "directory.db").rename(hidden)
        (scene.path / "directory.db").mkdir()
        await scene.tick()
        assert scene.applied == []
        assert scene.is_stale()
        (scene.path / "directory.db").rmdir()
        hidden.rename(scene.path / "directory.db")
        await scene.tick()
        assert not scene.is_stale()


async def test_a_directory_that_went_back_is_an_event(scene: Scene, acme: Tenant) -> None:
    add_tenant(scene.store, "acme", acme.root.certificate, actor="ada")
    (scene.path / "audit.revision").write_text("41\n")
    await scene.watch.load()
    assert '"action":"directory-went-back"' in scene.audit.path.read_text()
    update_tenant(scene.store, "acme", actor="ada", tunnel_hosts=[])
    await scene.watch.load()
    assert scene.recorded() == [2]
