"""What a job's file says is what was saved, or an error: the end of keys rests on it."""

from pathlib import Path

import pytest

from envelope.keys import KeyId
from key_agent.reencryption.job import JobState, Progress
from key_agent.reencryption.ledger import DIRECTORY_NAME, FileLedger, LedgerError

JOB = "00112233445566ff"
OLD, OTHER = KeyId.random(), KeyId.random()


def progress(job_id: str = JOB, **more: object) -> Progress:
    found: dict[str, object] = {
        "job_id": job_id,
        "incident_id": "inc-1",
        "connector": "https://store/ by way of https://proxy/",
        "sources": (OLD, OTHER),
        "state": JobState.INCOMPLETE,
        "cursor": "a/ä\n",
        "batch": ("x", "y"),
        "batch_upto": "z",
        "batch_beside": 3,
        "scanned": 7,
        "rewritten": 5,
        "skipped": 2,
        "failures": {"a": "HTTP 423"},
        "failed": 1,
    }
    return Progress(**(found | more))  # type: ignore[arg-type]


async def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path)
    assert await ledger.all() == []
    await ledger.save_progress(progress())
    await ledger.save_progress(progress("ff" * 8, state=JobState.DONE, sources=(OTHER,)))
    assert await FileLedger(tmp_path).load(JOB) == progress()
    assert len(await ledger.all()) == 2
    assert await ledger.rewritten_keys() == {OTHER}, "an incomplete job says nothing of its keys"
    assert (tmp_path / DIRECTORY_NAME).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"job_id":"x"}'])
async def test_a_damaged_file_is_an_error_and_no_finished_job(tmp_path: Path, content: bytes) -> None:
    ledger = FileLedger(tmp_path)
    await ledger.save_progress(progress(state=JobState.DONE))
    (tmp_path / DIRECTORY_NAME / f"{JOB}.json").write_bytes(content)
    for look in (ledger.load(JOB), ledger.all(), ledger.rewritten_keys()):
        with pytest.raises(LedgerError):
            await look


async def test_another_jobs_file_is_none(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path)
    await ledger.save_progress(progress(state=JobState.DONE))
    (tmp_path / DIRECTORY_NAME / f"{JOB}.json").rename(tmp_path / DIRECTORY_NAME / f"{'ee' * 8}.json")
    with pytest.raises(LedgerError, match="another job"):
        await ledger.all()


@pytest.mark.parametrize("name", ["", "../x", "ABCDEF0123456789", "00112233445566ff\n"])
async def test_only_an_id_is_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(LedgerError):
        await FileLedger(tmp_path).load(name)
