"""What a job's file says is what was saved, or an error: the end of keys rests on it."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from envelope.keys import KeyId
from key_agent.reencryption.job import JobState, Progress
from key_agent.reencryption.ledger import DIRECTORY_NAME, FileLedger, LedgerError
from key_agent.reencryption.losses import unfinished

JOB = "00112233445566ff"
OLD, OTHER, TODAY = KeyId.random(), KeyId.random(), KeyId.random()


def progress(job_id: str = JOB, **more: object) -> Progress:
    found: dict[str, object] = {
        "job_id": job_id,
        "incident_id": "inc-1",
        "connector": "https://store/ by way of https://proxy/",
        "sources": (OLD, OTHER),
        "sealing": (TODAY,),
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
        "left_before": 2,
        "named_before": ("y", "é"),
    }
    return Progress(**(found | more))  # type: ignore[arg-type]


async def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path)
    assert await ledger.all() == []
    await ledger.save_progress(progress())
    await ledger.save_progress(progress("ff" * 8, state=JobState.DONE, sources=(OTHER,)))
    assert await FileLedger(tmp_path).load(JOB) == progress()
    assert len(await ledger.all()) == 2
    assert (tmp_path / DIRECTORY_NAME).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "met",
    [{"rewritten": 1}, {"failed": 1}, {"met": 1}, {"batch": ("a",)}],
    ids=["rewritten", "failed", "met", "under way"],
)
async def test_a_job_that_knows_of_objects_outweighs_one_that_has_found_none(
    tmp_path: Path, met: dict[str, object]
) -> None:
    """Another folder, or one that was put back since: what the first names would be lost with its key."""
    ledger = FileLedger(tmp_path)
    await ledger.save_progress(progress("ff" * 8, state=JobState.DONE))
    await ledger.save_progress(progress("ee" * 8, sources=(KeyId.random(),)))
    begun = progress(
        sources=(OLD,), state=JobState.RUNNING, batch=(), rewritten=0, failed=0, failures=dict[str, str]()
    )
    await ledger.save_progress(begun)
    assert await ledger.rewritten_keys() == {OLD, OTHER}, "one that met nothing, as of a slip, says nothing"
    await ledger.save_progress(replace(begun, **met))  # type: ignore[arg-type]
    assert await ledger.rewritten_keys() == {OTHER}
    await ledger.save_progress(replace(begun, state=JobState.DONE))
    assert await ledger.rewritten_keys() == {OLD, OTHER}


async def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path)
    await ledger.save_progress(progress())
    file = tmp_path / DIRECTORY_NAME / f"{JOB}.json"
    page = msgspec.json.decode(file.read_bytes())
    for name in (
        "met",
        "passes",
        "sealing",
        "has_met",
        "has_shown",
        "left_before",
        "named_before",
        "dropped_at_ms",
    ):
        del page[name]
    file.write_bytes(msgspec.json.encode(page))
    assert await ledger.load(JOB) == progress(sealing=(), left_before=0, named_before=())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"job_id":"x"}'])
async def test_a_damaged_file_is_an_error_and_no_finished_job(tmp_path: Path, content: bytes) -> None:
    ledger = FileLedger(tmp_path)
    await ledger.save_progress(progress(state=JobState.DONE))
    (tmp_path / DIRECTORY_NAME / f"{JOB}.json").write_bytes(content)
    for look in (ledger.load(JOB), ledger.all(), ledger.rewritten_keys(), ledger.drop(JOB, now_ms=5)):
        with pytest.raises(LedgerError) as refused:
            await look
        assert "backup" in refused.value.next_step, (
            "nobody is told to take it away: what it knew would be gone"
        )


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


async def test_a_dropped_job_is_not_waited_for_and_keeps_what_it_knows(tmp_path: Path) -> None:
    """Or its keys would end without a word, with the objects that it has left."""
    ledger = FileLedger(tmp_path)
    await ledger.save_progress(progress())
    await ledger.save_progress(progress("ff" * 8, state=JobState.DONE))
    assert set(unfinished(await ledger.all())) == {str(OLD), str(OTHER)}
    assert await ledger.drop(JOB, now_ms=5) == progress(dropped_at_ms=5)
    assert await ledger.drop(JOB, now_ms=6) == progress(dropped_at_ms=5), "a second time changes nothing"
    assert await ledger.load(JOB) == progress(dropped_at_ms=5)
    assert unfinished(await ledger.all()) == {}
    assert await ledger.rewritten_keys() == frozenset()


async def test_what_cannot_be_dropped_is_left_as_it_is(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path)
    await ledger.save_progress(progress(state=JobState.DONE))
    with pytest.raises(LedgerError, match="is done") as refused:
        await ledger.drop(JOB, now_ms=5)
    assert "rests on it" in refused.value.next_step
    assert await ledger.load(JOB) == progress(state=JobState.DONE)
    for name in ("ee" * 8, "../x"):
        with pytest.raises(LedgerError, match=r"no re-encryption|not the id") as refused:
            await ledger.drop(name, now_ms=5)
        assert "list" in refused.value.next_step
    assert _files(tmp_path) == [f"{JOB}.json", f"{JOB}.lock"]


def _files(state_dir: Path) -> list[str]:
    return sorted(file.name for file in (state_dir / DIRECTORY_NAME).iterdir())


async def test_a_job_at_work_is_not_dropped(tmp_path: Path) -> None:
    """What it learns meanwhile would be written over, and with it that objects are left."""
    ledger = FileLedger(tmp_path)
    begun = progress(batch=(), failed=0, failures=dict[str, str](), rewritten=0)
    await ledger.save_progress(begun)
    with ledger.held(JOB):
        with pytest.raises(LedgerError, match="another process") as refused:
            await FileLedger(tmp_path).drop(JOB, now_ms=5)
        with pytest.raises(LedgerError, match="another process"), FileLedger(tmp_path).held(JOB):
            pass
        await ledger.save_progress(replace(begun, met=7))
    assert "Ctrl-C" in refused.value.next_step
    assert (await ledger.drop(JOB, now_ms=5)).met == 7
