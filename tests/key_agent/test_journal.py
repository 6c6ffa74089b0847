"""The audit log beside the event loop: in order, durable before it is told, one sync for many."""

import asyncio
import json
import threading
from pathlib import Path
from typing import override

import pytest

from envelope.audit import Value
from key_agent.journal import Journal
from runtime.audit import AuditLog, AuditUnavailableError
from tests.fakes.clock import ManualClock


class SlowDisk(AuditLog):
    """Counts its syncs; the first one takes until `let` is set; full once `is_full`."""

    syncs = 0
    is_full = False

    def __init__(self, path: Path, clock: ManualClock, descriptor: int) -> None:
        super().__init__(path, clock, descriptor)
        self.let = threading.Event()

    @override
    def _sync(self) -> None:
        type(self).syncs += 1
        assert self.let.wait(30)
        super()._sync()

    @override
    def append(self, action: str, *, outcome: str = "ok", durable: bool = True, **fields: Value) -> None:
        if self.is_full and durable:
            raise AuditUnavailableError("cannot be synced", "free the disk")
        super().append(action, outcome=outcome, durable=durable, **fields)


@pytest.fixture
def disk(tmp_path: Path, clock: ManualClock) -> SlowDisk:
    SlowDisk.syncs = 0
    return SlowDisk.open(tmp_path / "audit.jsonl", clock)


async def test_what_comes_while_the_disk_syncs_shares_the_next_sync_in_order(disk: SlowDisk) -> None:
    journal = Journal(disk)
    first = asyncio.create_task(journal.record("event-0"))
    async with asyncio.timeout(30):
        while not disk.syncs:  # noqa: ASYNC110 - a thread's progress has no event
            await asyncio.sleep(0.001)
    for number in range(1, 100):
        journal.note(f"event-{number}")
    last = asyncio.create_task(journal.record("event-100"))
    await asyncio.sleep(0)
    disk.let.set()
    await first
    await last
    assert disk.syncs == 2
    lines = disk.path.read_text().splitlines()
    assert [f'"action":"event-{number}"' in line for number, line in enumerate(lines)] == [True] * 101
    await journal.close()


async def test_without_the_sync_nothing_of_it_counts_as_written(disk: SlowDisk) -> None:
    journal = Journal(disk)
    first = asyncio.create_task(journal.record("event-0"))
    async with asyncio.timeout(30):
        while not disk.syncs:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    records = [asyncio.create_task(journal.record(f"event-{number}")) for number in range(1, 4)]
    await asyncio.sleep(0)
    disk.is_full = True
    disk.let.set()
    await first
    for record in records:
        with pytest.raises(AuditUnavailableError):
            await record
    failures = [journal.failure]
    disk.is_full = False
    await journal.record("event-4")
    failures.append(journal.failure)
    assert failures == ["audit log cannot be synced", None]
    await journal.close()


async def test_an_event_is_written_however_long_the_words_are_that_it_quotes(
    tmp_path: Path, clock: ManualClock
) -> None:
    """A breached environment says why it is not to be trusted, at length: that must not go unrecorded."""
    path = tmp_path / "audit.jsonl"
    journal = Journal(AuditLog.open(path, clock))
    words = {f"f{number}": "\U0001f600" * 20_000 for number in range(20)}
    await journal.record("environment-notice", outcome="healing", peer="c", count=7, **words)
    await journal.record("event", reason="x" * 3000)
    assert journal.failure is None
    await journal.close()
    first, second = map(json.loads, path.read_bytes().splitlines())
    assert (first["peer"], first["count"]) == ("c", 7)
    assert first["f19"].startswith("\U0001f600" * 250)
    assert first["f19"].endswith("19750 characters more")
    assert second["reason"] == "x" * 3000, "what fits is as it was"
