"""How a change in the directory reaches the running proxy.

1. The directory's revision is asked for every so often; a change made anywhere (this machine's command line,
   another proxy of the cluster) is taken over within that time.
2. Each change is an audit event on disk before it takes effect. If it cannot be written the old picture stays
   in force and the change is tried again.
3. The last revision that was recorded stands in a file beside the log, so a restart neither loses nor repeats
   a change (a crash between the two may repeat the last ones).
4. A database that cannot be read changes nothing: the proxy goes on with the picture it has, and says so.
5. A directory that went back (a restored backup) is an event of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, NoReturn

import structlog

from proxy.tenants.directory import Change, DirectoryStore
from proxy.tenants.errors import DirectoryUnavailableError
from proxy.tenants.model import Directory
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock
from runtime.files import replace_file

PAGE: Final = 1000
_log: Final = structlog.get_logger("directory")


class DirectoryWatch:
    """Polls a directory; `failure` says why the picture may be stale, None if it is not."""

    def __init__(
        self, store: DirectoryStore, audit: AuditLog, clock: Clock, *, interval_s: float, recorded_file: Path
    ) -> None:
        self._store = store
        self._audit = audit
        self._clock = clock
        self._interval_s = interval_s
        self._recorded_file = recorded_file
        self.failure: str | None = None

    async def load(self) -> Directory:
        """The picture to begin with, once its changes are recorded.

        DirectoryUnavailableError or AuditUnavailableError: the proxy cannot start.
        """
        return await asyncio.to_thread(self._load)

    async def run(self, directory: Directory, apply: Callable[[Directory], Awaitable[None]]) -> NoReturn:
        """Call *apply* with each new picture after *directory*."""
        revision = directory.revision
        while True:
            await self._clock.sleep(self._interval_s)
            try:
                if await asyncio.to_thread(self._store.revision) == revision:
                    self.failure = None
                    continue
                directory = await self.load()
            except (DirectoryUnavailableError, AuditUnavailableError) as error:
                if self.failure is None:
                    _log.exception("directory not read", revision=revision)
                self.failure = str(error)
                continue
            await apply(directory)
            revision, self.failure = directory.revision, None
            _log.info("directory applied", revision=revision)

    def _load(self) -> Directory:
        directory = self._store.snapshot()
        recorded = self._recorded()
        if recorded > directory.revision:
            self._audit.append("directory-went-back", revision=directory.revision, recorded_revision=recorded)
            recorded = directory.revision
            self._remember(recorded)
        while recorded < directory.revision:
            page = [
                change
                for change in self._store.history(after=recorded, limit=PAGE)
                if change.revision <= directory.revision
            ]
            if not page:
                break
            for number, change in enumerate(page, start=1):
                self._record(change, durable=number == len(page))
            recorded = page[-1].revision
            self._remember(recorded)
        return directory

    def _record(self, change: Change, *, durable: bool) -> None:
        self._audit.append(
            "directory-changed",
            durable=durable,
            revision=change.revision,
            change=change.action,
            changed_at_ms=change.at_ms,
            actor=change.actor,
            tenant=change.tenant,
            service=change.service,
            detail=" ".join(f"{name}={value}" for name, value in sorted(change.detail.items())),
        )

    def _recorded(self) -> int:
        try:
            return int(self._recorded_file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def _remember(self, revision: int) -> None:
        try:
            replace_file(self._recorded_file, b"%d\n" % revision)
        except OSError as error:
            cause = f"position {self._recorded_file} cannot be written: {error.strerror}"
            raise AuditUnavailableError(cause, "free the disk that holds the audit log") from error
