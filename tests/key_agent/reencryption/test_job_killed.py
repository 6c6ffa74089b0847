"""B-41: a hundred thousand objects, and the process that rewrites them is killed five times by SIGKILL.

The store is a file, mapped into memory, of two bytes for each object: whose key it has, and how often it was
written. Both are written by one instruction; so what a killed process has done is there, whole or not at all.
"""

import asyncio
import mmap
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, override

from envelope.keys import KeyId
from key_agent.reencryption.connector import Connector, Found, Rewrite
from key_agent.reencryption.job import JobState, Progress, ReencryptionJob
from key_agent.reencryption.ledger import FileLedger

OBJECTS: Final = 100_000
KILLS: Final = 5
JOB: Final = "5e" * 8
OLD, TODAY, OTHER = (KeyId.parse(text * 16) for text in ("01", "02", "03"))
_MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""6,000 pages of a ledger that need not outlive the machine here."""
REPOSITORY = Path(__file__).parents[3]


class FileStore(Connector):
    """Object n: byte 2n is its key, byte 2n + 1 counts how often it was written."""

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            self._bytes = mmap.mmap(opened.fileno(), 0)

    @override
    async def names(self, *, after: str) -> AsyncIterator[str]:
        for number in range(int(after) + 1 if after else 0, OBJECTS):
            yield f"{number:06}"

    @override
    async def look(self, name: str) -> Found | None:
        return Found(name=name, version="-", key_id=KeyId(bytes([self._bytes[2 * int(name)]]) * 16))

    @override
    async def rewrite(self, found: Found) -> tuple[Rewrite, str]:
        at = 2 * int(found.name)
        self._bytes[at : at + 2] = bytes((TODAY.raw[0], self._bytes[at + 1] + 1))
        return Rewrite.DONE, ""

    @override
    async def close(self) -> None:
        self._bytes.close()


async def _main(directory: Path) -> None:
    """What is killed: it goes on from where the ledger says."""
    ledger, store = FileLedger(directory), FileStore(directory / "store")
    await ReencryptionJob(await ledger.load(JOB), store, ledger).run()
    await store.close()


async def test_b_41_killed_five_times_each_object_is_written_once_and_keys_end_only_then() -> None:
    chance = random.Random(41)
    with TemporaryDirectory(dir=_MEMORY) as name:
        directory = Path(name)
        before = bytes(chance.choice((OLD, OTHER)).raw[0] for _ in range(OBJECTS))
        (directory / "store").write_bytes(b"".join(bytes((key, 0)) for key in before))
        ledger = FileLedger(directory)
        await ledger.save_progress(
            Progress(job_id=JOB, incident_id="inc-1", connector="file", sources=(OLD,))
        )
        kills = 0
        while (now := await ledger.load(JOB)).state is not JobState.DONE:
            assert OLD not in await ledger.rewritten_keys(), "no key ends before the last object is written"
            at = now.scanned + chance.randrange(OBJECTS // (KILLS + 2))
            if await _run(directory, at if kills < KILLS else None):
                kills += 1
        assert kills == KILLS
        assert await ledger.rewritten_keys() == {OLD}
        done = (directory / "store").read_bytes()
    old = before.count(OLD.raw[0])
    assert (now.scanned, now.rewritten, now.skipped, now.failed) == (OBJECTS, old, OBJECTS - old, 0)
    assert done[::2] == before.replace(OLD.raw[:1], TODAY.raw[:1])
    assert done[1::2] == before.replace(OLD.raw[:1], b"\x01").replace(OTHER.raw[:1], b"\x00"), "exactly once"


async def _run(directory: Path, at: int | None) -> bool:
    """A process that rewrites, killed when it has come beyond *at* objects; whether it was."""
    ledger = FileLedger(directory)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.key_agent.reencryption.test_job_killed", str(directory),
        cwd=REPOSITORY, env=dict(os.environ),
    )  # fmt: skip
    if at is None:
        assert await process.wait() == 0
        return False

    waiting = asyncio.create_task(process.wait(), name="rewriting")
    async with asyncio.timeout(300):
        while not waiting.done() and (await ledger.load(JOB)).scanned <= at:
            await asyncio.wait({waiting}, timeout=0.005)
    if not waiting.done():
        process.kill()
    return await waiting == -signal.SIGKILL


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
