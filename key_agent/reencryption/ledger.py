"""Progress of re-encryptions, each in a file of its own below `state_dir`: whole or as it was before.

1. A file holds names of objects that failed, ids of keys and counts; no secret and no content.
2. What it says of a finished job is what the end of a key rests on (`keys retire`): a file that cannot be
   read is an error, never a job that is done.
"""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import KeyId
from key_agent.errors import KeyAgentError
from key_agent.reencryption.job import JobState, Progress
from runtime.files import replace_file

DIRECTORY_NAME: Final = "reencryption"
_KEYS: Final = ("sources", "sealing")
_JOB_ID: Final = re.compile(r"[0-9a-f]{16}")


class LedgerError(KeyAgentError):
    """A job's file cannot be read or written."""


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
    has_shown: bool = False


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

    async def all(self) -> Sequence[Progress]:
        """Every job there ever was. LedgerError: one cannot be read."""
        return await asyncio.to_thread(self._all)

    async def rewritten_keys(self) -> frozenset[KeyId]:
        """Keys of which a finished job has found nothing left, and no other one knows of any. LedgerError."""
        jobs = await self.all()
        whole = {key_id for job in jobs if job.is_whole for key_id in job.sources}
        return frozenset(whole.difference(*(job.sources for job in jobs if job.may_have_left)))

    def _save(self, progress: Progress) -> None:
        keys = {name: tuple(map(str, getattr(progress, name))) for name in _KEYS}
        page = _Page(**{name: getattr(progress, name) for name in _Page.__struct_fields__} | keys)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            replace_file(self._file(progress.job_id), msgspec.json.encode(page))
        except OSError as error:
            raise LedgerError(f"{self._directory}: {error.strerror}") from error

    def _load(self, job_id: str) -> Progress:
        file = self._file(job_id)
        try:
            page = msgspec.json.decode(file.read_bytes(), type=_Page)
            fields = msgspec.structs.asdict(page)
            keys = {name: tuple(map(KeyId.parse, fields[name])) for name in _KEYS}
            progress = Progress(**fields | keys)
        except FileNotFoundError:
            raise LedgerError(f"there is no re-encryption {job_id}") from None
        except OSError as error:
            raise LedgerError(f"{file}: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeError, FormatError) as error:
            raise LedgerError(f"{file} is damaged: {error}") from None
        if progress.job_id != job_id:
            raise LedgerError(f"{file} holds another job")
        return progress

    def _all(self) -> list[Progress]:
        try:
            files = sorted(self._directory.glob("*.json"))
        except OSError as error:
            raise LedgerError(f"{self._directory}: {error.strerror}") from error
        return [self._load(file.stem) for file in files]

    def _file(self, job_id: str) -> Path:
        if not _JOB_ID.fullmatch(job_id):
            raise LedgerError(f"not the id of a re-encryption: {job_id!r}")
        return self._directory / f"{job_id}.json"
