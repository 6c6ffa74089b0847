"""Progress of re-encryptions, each in a file of its own below `state_dir`: whole or as it was before.

1. A file holds names of objects that failed, ids of keys and counts; no secret and no content.
2. What it says of a finished job is what the end of a key rests on (`keys retire`): a file that cannot be
   read is an error, never a job that is done.
3. One process works on a job: a second one would write over what the first has learned meanwhile.
4. A dropped job keeps what it knows: nothing else shows which objects are lost with its keys.
"""

import asyncio
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import KeyId
from key_agent.errors import KeyAgentError
from key_agent.reencryption.job import JobState, Progress
from key_agent.reencryption.losses import rewritten
from runtime.files import replace_file

DIRECTORY_NAME: Final = "reencryption"
_KEYS: Final = ("sources", "sealing")
_JOB_ID: Final = re.compile(r"[0-9a-f]{16}")
_SEE_LIST: Final = "`key-agent keys reencrypt list`"
_RESTORE: Final = "bring it back from a backup of `state_dir`; without it nobody knows what that job has left"


class LedgerError(KeyAgentError):
    """A job's file cannot be read or written, or not now."""

    def __init__(self, cause: str, next_step: str = "see that the agent's user may use it") -> None:
        super().__init__(cause)
        self.next_step = next_step


class _Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job_id: str
    incident_id: str | None
    connector: str
    sources: tuple[str, ...]
    state: JobState
    cursor: str
    batch: tuple[str, ...]
    batch_upto: str
    batch_beside: int
    scanned: int
    rewritten: int
    skipped: int
    failures: dict[str, str]
    failed: int
    met: int = 0
    passes: int = 0
    sealing: tuple[str, ...] = ()
    has_met: bool = False
    has_shown: bool = False
    left_before: int = 0
    named_before: tuple[str, ...] = ()
    dropped_at_ms: int | None = None


class FileLedger:
    """Implements `job.Ledger`."""

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / DIRECTORY_NAME

    async def save_progress(self, progress: Progress) -> None:
        """Durable when it returns. LedgerError."""
        await asyncio.to_thread(self._save, progress)

    async def load(self, job_id: str) -> Progress:
        """LedgerError: there is no such job, or its file cannot be read."""
        return await asyncio.to_thread(self._load, job_id)

    @contextmanager
    def held(self, job_id: str) -> Iterator[None]:
        """Alone at a job (rule 3). LedgerError: another process is at it."""
        lock = self._file(job_id).with_suffix(".lock")
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise LedgerError(f"{lock}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LedgerError(
                    f"{job_id} is at work in another process", "wait for its end, or end it (Ctrl-C)"
                ) from None
            yield
        finally:
            os.close(descriptor)

    async def drop(self, job_id: str, *, now_ms: int) -> Progress:
        """Its store is gone for good, somebody says (rule 4). LedgerError, also for one that is done."""
        return await asyncio.to_thread(self._drop, job_id, now_ms)

    async def all(self) -> Sequence[Progress]:
        """Every job there ever was. LedgerError: one cannot be read."""
        return await asyncio.to_thread(self._all)

    async def rewritten_keys(self) -> frozenset[KeyId]:
        """As `losses.rewritten`. LedgerError."""
        return rewritten(await self.all())

    def _save(self, progress: Progress) -> None:
        keys = {name: tuple(map(str, getattr(progress, name))) for name in _KEYS}
        page = _Page(**{name: getattr(progress, name) for name in _Page.__struct_fields__} | keys)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            replace_file(self._file(progress.job_id), msgspec.json.encode(page))
        except OSError as error:
            raise LedgerError(f"{self._directory}: {error.strerror}") from error

    def _drop(self, job_id: str, now_ms: int) -> Progress:
        self._load(job_id)  # no lock is made for a job that is none
        with self.held(job_id):
            progress = self._load(job_id)
            if progress.is_whole:
                raise LedgerError(
                    f"{job_id} is done: it has found nothing left that could be given up",
                    "leave it: the end of its keys rests on it",
                )
            if progress.dropped_at_ms is None:
                progress = replace(progress, dropped_at_ms=now_ms)
                self._save(progress)
        return progress

    def _load(self, job_id: str) -> Progress:
        file = self._file(job_id)
        try:
            page = msgspec.json.decode(file.read_bytes(), type=_Page)
            fields = msgspec.structs.asdict(page)
            keys = {name: tuple(map(KeyId.parse, fields[name])) for name in _KEYS}
            progress = Progress(**fields | keys)
        except FileNotFoundError:
            raise LedgerError(f"there is no re-encryption {job_id}", _SEE_LIST) from None
        except OSError as error:
            raise LedgerError(f"{file}: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeError, FormatError) as error:
            raise LedgerError(f"{file} is damaged: {error}", _RESTORE) from None
        if progress.job_id != job_id:
            raise LedgerError(f"{file} holds another job", _RESTORE)
        return progress

    def _all(self) -> list[Progress]:
        try:
            files = sorted(self._directory.glob("*.json"))
        except OSError as error:
            raise LedgerError(f"{self._directory}: {error.strerror}") from error
        return [self._load(file.stem) for file in files]

    def _file(self, job_id: str) -> Path:
        if not _JOB_ID.fullmatch(job_id):
            raise LedgerError(f"not the id of a re-encryption: {job_id!r}", _SEE_LIST)
        return self._directory / f"{job_id}.json"
