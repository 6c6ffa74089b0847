"""The audit log: events of envelope/audit.py appended to a file. What cannot be written is refused.

1. One process writes a log, held by flock; each process of a proxy has its own file.
2. A line is one write(2) with O_APPEND. If it does not fit (disk full), what was written of it is cut off
   again and AuditUnavailableError raised: the caller refuses the operation. The next append may succeed.
3. `durable=True` returns after fdatasync. `durable=False` leaves the line in the page cache: it survives the
   process being killed, not the machine; for events of the data path, which are many, and are on disk with
   the next durable one. They are written on event loops, so they wait for no other thread's sync.
4. After a failed fdatasync nobody knows what is on disk (the kernel forgets the error): the log stays refused
   until it is opened anew, which reads and verifies it.
5. The file is ours alone: if it was removed, replaced, cut or written by someone else, appending is refused.
6. Opening verifies the whole chain. A last line without its newline was torn by a crash: it was never
   acknowledged as durable, so it is moved to `<file>.torn-<seq>`, and an event says so. Any other damage
   refuses to open: to move the file away, and with it the evidence, is for a person to do.

7. A file that is large or old enough is closed, and the chain goes on in the next one (audit_files.py). A
   rotation that fails changes nothing: the file is written on, and it is tried again later. Where an event of
   the data path finds that it is due, most of the file is synced in a thread first, and the file written on
   meanwhile: what the rotation itself has to sync is then little. When the log is
   opened the written file is verified (about 10 µs per line), and that it goes on from the last closed one.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import structlog
from prometheus_client import Counter

from envelope import audit
from envelope.audit import BrokenChainError, Head, Value
from envelope.errors import SealgateError
from runtime.audit_files import (
    CONTINUED,
    Chain,
    RotationSettings,
    closed_files,
    closed_name,
    last_head,
    last_seq,
    read_chain,
    tail_head,
    time_ms,
)
from runtime.clock import Clock
from runtime.files import sync_directory
from runtime.observe import NAMESPACE, REGISTRY

FILE_MODE: Final = 0o600
FAILURES: Final = Counter(
    "audit_failures",
    "Events that the audit log did not take: what they stand for was refused, but for withdrawals",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
_READ_BYTES: Final = 1 << 20
_LITTLE_BYTES: Final = 256 << 10
"""What an event loop may have synced: some hundred events."""
_RETRIES: Final = 16
"""A rotation that failed is tried again when the file has grown by this part of what it may hold."""

log = structlog.get_logger("audit")


class AuditUnavailableError(SealgateError):
    """The audit log cannot be written: the operation must be refused. `next_step` says how to mend it."""

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(f"audit log {cause}")
        self.next_step = next_step


class AuditLog:
    """An open log. `append` is for any thread; `durable=True` blocks for the duration of an fdatasync."""

    def __init__(self, path: Path, clock: Clock, descriptor: int) -> None:
        """Use `AuditLog.open`."""
        self.path = path
        self._path = str(path)  # a Path is turned into text anew at each stat
        self._clock = clock
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()  # taken before the other one where both are
        self._head = audit.EMPTY
        self._size_bytes = 0
        self._failure: str | None = None
        self._identity = _identity(os.fstat(descriptor))
        self._rotation = RotationSettings()
        self._rotate_at_bytes = self._rotation.max_bytes
        self._rotate_at_s = float("inf")
        self._synced_bytes = 0
        """So much of the file is on disk, as far as `_sync_aside` has seen to it."""
        self._asides = 0
        """How often it has, for this file."""
        self._syncing: threading.Thread | None = None

    @classmethod
    def open(cls, path: Path, clock: Clock, rotation: RotationSettings | None = None) -> Self:
        """Open or create the log, verify it, continue its chain.

        AuditUnavailableError: not writable, held by another process, or broken.
        """
        path = path.absolute()  # a change of directory must not make it another file
        log = cls(path, clock, _open_locked(path))
        if rotation is not None:
            log._rotation, log._rotate_at_bytes = rotation, rotation.max_bytes
        try:
            log._continue_chain()
        except BaseException:
            log.close()
            raise
        return log

    @property
    def head(self) -> Head:
        """The last event's number and hash, to be recorded elsewhere (envelope/audit.py rule 3)."""
        return self._head

    def append(self, action: str, *, outcome: str = "ok", durable: bool = True, **fields: Value) -> None:
        """Write one event. AuditUnavailableError if it cannot be: then refuse what it stands for."""
        try:
            self._append(action, outcome, fields, durable=durable)
        except AuditUnavailableError:
            FAILURES.inc()
            raise

    def _append(self, action: str, outcome: str, fields: Mapping[str, Value], *, durable: bool) -> None:
        if self._is_due():
            self._rotate(waits=durable)
        with self._lock:
            self._check_usable()
            line, head = audit.encode_event(
                self._head, wall_s=self._clock.wall_s(), action=action, outcome=outcome, fields=fields
            )
            self._write(line)
            self._head = head
        if durable:
            with self._sync_lock:
                self._check_synced()
                self._sync()

    def close(self) -> None:
        """Sync, as far as possible, and let the file go; appending is refused from now on."""
        with self._sync_lock, self._lock:
            if self._descriptor < 0:
                return
            try:
                os.fdatasync(self._descriptor)
            except OSError:
                pass  # A refused log stays refused; nobody waits for this one.
            finally:
                os.close(self._descriptor)
                self._descriptor = -1
                self._failure = "is closed"

    # ---- the next file

    def _is_due(self) -> bool:
        return self._size_bytes >= self._rotate_at_bytes or (
            self._rotation.max_age_s > 0 and self._clock.wall_s() >= self._rotate_at_s
        )

    def _rotate(self, *, waits: bool) -> None:
        """Close the file and begin the next one, if that is due still and can be done now.

        AuditUnavailableError if the log cannot be used at all.
        """
        # Twice as much each time: who writes faster than the disk takes it comes to an end, too.
        if not waits and self._size_bytes - self._synced_bytes > _LITTLE_BYTES << self._asides:
            self._begin_sync_aside()
            return
        if not self._sync_lock.acquire(blocking=waits):
            return  # rule 3: an event of the data path waits for no sync; a later one will find its time
        try:
            with self._lock:
                if self._is_due():
                    self._check_usable()
                    self._sync()
                    self._begin_next()
        finally:
            self._sync_lock.release()

    def _begin_sync_aside(self) -> None:
        """Rule 7, unless a thread is at it."""
        if self._syncing is None or not self._syncing.is_alive():
            syncing = threading.Thread(target=self._sync_aside, name="audit-sync", daemon=True)
            try:
                syncing.start()
            except RuntimeError as error:  # the machine has no thread for us: no reason to refuse the event
                self._try_later(str(error))
                return
            self._syncing = syncing

    def _sync_aside(self) -> None:
        with self._sync_lock:  # so no rotation exchanges the file meanwhile
            size_bytes = self._size_bytes
            if self._failure is not None:
                return
            try:
                self._sync()
            except AuditUnavailableError as error:  # rule 4: from now on it refuses
                log.error("audit log refused", cause=str(error))  # noqa: TRY400 - nothing to trace
                return
            self._synced_bytes, self._asides = size_bytes, self._asides + 1

    def _begin_next(self) -> None:
        """Whatever can fail is done before the first name changes."""
        closed, begun = closed_name(self.path, self._head), self.path.with_name(f".{self.path.name}.next")
        descriptor = -1
        try:
            begun.unlink(missing_ok=True)  # of a rotation that was interrupted
            descriptor = _open_locked(begun)
            line, head = self._continued(closed, recovered=False)
            _write_all(descriptor, line)
            _rename(self.path, closed)
        except (OSError, AuditUnavailableError) as error:
            self._give_up(descriptor, begun, str(error))
            return
        before, self._descriptor = self._descriptor, descriptor
        self._identity = _identity(os.fstat(descriptor))
        self._begun(head, len(line))
        os.close(before)
        try:
            begun.rename(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise self._fail(
                f"was rotated by half ({error.strerror})", f"mv {begun} {self._path}, then restart"
            ) from error

    def _give_up(self, descriptor: int, begun: Path, cause: str) -> None:
        """Write on; the next try comes later."""
        with contextlib.suppress(OSError):
            if descriptor >= 0:
                os.close(descriptor)
            begun.unlink(missing_ok=True)
        self._try_later(cause)

    def _try_later(self, cause: str) -> None:
        self._rotate_at_bytes = self._size_bytes + self._rotation.max_bytes // _RETRIES
        self._rotate_at_s = self._clock.wall_s() + max(60.0, self._rotation.max_age_s / _RETRIES)
        log.warning("audit log not rotated; it is written on", file=self._path, cause=cause)

    def _continued(self, closed: Path, *, recovered: bool) -> tuple[bytes, Head]:
        return audit.encode_event(
            self._head,
            wall_s=self._clock.wall_s(),
            action=CONTINUED,
            fields={"previous_file": closed.name, "recovered": "yes" if recovered else "no"},
        )

    def _begun(self, head: Head, size_bytes: int) -> None:
        """The file begins with the one event that *head* is of."""
        self._head, self._size_bytes = head, size_bytes
        self._synced_bytes = self._asides = 0
        self._rotate_at_bytes = self._rotation.max_bytes
        self._rotate_at_s = self._clock.wall_s() + self._rotation.max_age_s

    def _check_usable(self) -> None:
        self._check_synced()
        try:
            status = os.stat(self._path)  # noqa: PTH116 - on the data path
        except OSError as error:
            raise self._fail(f"has gone ({error.strerror})", "restore the file, then restart") from error
        if _identity(status) != self._identity or status.st_size != self._size_bytes:
            raise self._fail("was replaced, cut or written by someone else", "find out by whom, then restart")

    def _check_synced(self) -> None:
        """A sync after a failed one may say that all is well: the kernel has forgotten."""
        if self._failure is not None:
            raise AuditUnavailableError(
                f"{self.path} {self._failure}", "find the cause in the log, then restart"
            )

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._descriptor, line)
            reason = "No space left on device" if written != len(line) else None
        except OSError as error:
            written, reason = 0, error.strerror or type(error).__name__
        if reason is None:
            self._size_bytes += written
            return
        try:
            os.ftruncate(self._descriptor, self._size_bytes)
        except OSError as error:
            raise self._fail(
                f"holds half a line ({error.strerror})", "check the file system, then restart"
            ) from error
        raise AuditUnavailableError(
            f"{self.path} cannot be written: {reason}", f"free or mend the disk that holds {self.path.parent}"
        )

    def _sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._fail(f"was not synced ({error.strerror})", "check the disk, then restart") from error

    def _fail(self, cause: str, next_step: str) -> AuditUnavailableError:
        """Refuse everything from now on."""
        self._failure = cause
        return AuditUnavailableError(f"{self.path} {cause}", next_step)

    def _continue_chain(self) -> None:
        try:
            with open(os.dup(self._descriptor), "rb", buffering=_READ_BYTES) as stream:  # noqa: PTH123
                stream.seek(0)
                chain = read_chain(stream)
                stream.seek(0)
                first = stream.readline(audit.MAX_LINE_BYTES)
            closed = self._last_closed(chain)
        except BrokenChainError as error:
            raise AuditUnavailableError(f"{self.path} is broken at {error}", mend_broken(self.path)) from None
        before = self._end_of(closed, chain) if closed is not None else None
        self._head, self._size_bytes = chain.head, chain.size_bytes
        if not chain.size_bytes and before is not None:
            self._head = before
        self._rotate_at_s = (time_ms(first) / 1000 or self._clock.wall_s()) + self._rotation.max_age_s
        torn = self._save_torn_line(chain.torn) if chain.torn else None
        if not chain.size_bytes and closed is not None:
            line, head = self._continued(closed, recovered=True)
            self._write(line)
            self._begun(head, len(line))
            self._sync()
        if torn is not None:
            self._append("audit-recovered", "ok", torn, durable=True)

    def _last_closed(self, chain: Chain) -> Path | None:
        """The closed file that the written one, which holds *chain*, goes on from.

        None: it is not here, or there is none. BrokenChainError.
        """
        try:
            closed = closed_files(self.path)
        except OSError as error:
            raise AuditUnavailableError(
                f"{self.path.parent} cannot be read: {error.strerror}", "let this user read it"
            ) from error
        if not closed or (chain.size_bytes and last_seq(closed[-1]) < chain.start.seq):
            return None
        if chain.size_bytes and last_seq(closed[-1]) > chain.start.seq:
            raise BrokenChainError(1, f"it begins before the end of {closed[-1].name}")
        return closed[-1]

    def _end_of(self, closed: Path, chain: Chain) -> Head:
        """Where *closed* ends, and what the written file holds goes on. AuditUnavailableError."""
        try:
            # It is all that there is if the written file is gone.
            end = tail_head(closed) if chain.size_bytes else last_head(closed)
        except OSError as error:
            raise AuditUnavailableError(
                f"{closed} cannot be read: {error.strerror}", "let this user read it"
            ) from error
        except BrokenChainError as error:
            raise AuditUnavailableError(f"is broken at {error}", mend_broken(closed)) from None
        if chain.size_bytes and end != chain.start:
            raise AuditUnavailableError(
                f"{self.path} does not continue {closed.name}",
                f"find out which was changed; {mend_broken(closed)}",
            )
        return end

    def _save_torn_line(self, torn: bytes) -> dict[str, Value]:
        """Move it away; what an event has to say of it."""
        saved = self.path.with_name(f"{self.path.name}.torn-{self._head.seq + 1}")
        try:
            descriptor = os.open(saved, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
            with open(descriptor, "wb") as file:  # noqa: PTH123 - with a mode
                file.write(torn)
                file.flush()
                os.fsync(descriptor)
            os.ftruncate(self._descriptor, self._size_bytes)
            sync_directory(self.path.parent)
        except OSError as error:
            raise AuditUnavailableError(
                f"{self.path} ends in a torn line that cannot be moved to {saved}: {error.strerror}",
                f"free the disk that holds {self.path.parent}, or make it writable",
            ) from error
        return {
            "torn_bytes": len(torn),
            "torn_file": saved.name,
            "torn_sha256": hashlib.sha256(torn).hexdigest(),
        }


def mend_broken(path: Path) -> str:
    """What to do about a broken log."""
    return (
        f"find out who wrote to it; keep it as evidence: mv {path} {path}.broken; then start again: "
        "a new chain begins, or goes on from the last closed file"
    )


def _rename(path: Path, closed: Path) -> None:
    """OSError, also if there is such a file already."""
    if closed.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(closed))
    path.rename(closed)


def _write_all(descriptor: int, line: bytes) -> None:
    """Durably. OSError."""
    if os.write(descriptor, line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fdatasync(descriptor)


def _open_locked(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, FILE_MODE)
    except OSError as error:
        raise AuditUnavailableError(
            f"{path} cannot be opened: {error.strerror}",
            f"make {path.parent} an existing directory that this user may write",
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AuditUnavailableError(f"{path} is not a regular file", "give the path of a file")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sync_directory(path.parent)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise AuditUnavailableError(
                f"{path} is written by another process",
                "stop that process first; two that run side by side need a state_dir each",
            ) from error
        raise AuditUnavailableError(
            f"{path} cannot be locked or synced: {error.strerror}", "put it on a local file system"
        ) from error
    return descriptor


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
