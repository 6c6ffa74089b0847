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

Rotation is out of scope: a chain is one file, verified when opened (about 10 µs per line). Stop the process
and move the file away to begin a new one; record the old one's head.
"""

import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from prometheus_client import Counter

from envelope import audit
from envelope.audit import BrokenChainError, Head, Value
from envelope.errors import SealgateError
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

    @classmethod
    def open(cls, path: Path, clock: Clock) -> Self:
        """Open or create the log, verify it, continue its chain.

        AuditUnavailableError: not writable, held by another process, or broken.
        """
        path = path.absolute()  # a change of directory must not make it another file
        log = cls(path, clock, _open_locked(path))
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
        except BrokenChainError as error:
            raise AuditUnavailableError(f"{self.path} is broken at {error}", mend_broken(self.path)) from None
        self._head, self._size_bytes = chain.head, chain.size_bytes
        if chain.torn:
            self._move_torn_line(chain.torn)

    def _move_torn_line(self, torn: bytes) -> None:
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
        self.append(
            "audit-recovered",
            torn_bytes=len(torn),
            torn_file=saved.name,
            torn_sha256=hashlib.sha256(torn).hexdigest(),
        )


@dataclass(frozen=True, slots=True)
class Chain:
    """What a log holds: the head and size in bytes of its whole lines, and the torn rest."""

    head: Head
    size_bytes: int
    torn: bytes


def read_chain(stream: BinaryIO, *, expected: Head | None = None) -> Chain:
    """Verify the whole log in *stream*. BrokenChainError names the first line that is wrong.

    *expected* is a head recorded earlier (envelope/audit.py rule 3): its event must be there.
    """
    head, size_bytes, line_number = audit.EMPTY, 0, 0
    seen = expected is None or expected == head
    torn = b""
    while line := stream.readline(audit.MAX_LINE_BYTES + 1):
        if not line.endswith(b"\n") and len(line) <= audit.MAX_LINE_BYTES:
            torn = line
            break
        line_number += 1
        try:
            head = audit.verify([line], start=head)
        except BrokenChainError as error:
            raise BrokenChainError(line_number, error.reason) from None
        size_bytes += len(line)
        seen = seen or head == expected
    if expected is not None and not seen:
        raise BrokenChainError(
            line_number + 1, f"event {expected.seq} with its recorded hash is not in this chain"
        )
    return Chain(head, size_bytes, torn)


def mend_broken(path: Path) -> str:
    """What to do about a broken log."""
    return (
        f"find out who wrote to it; keep it as evidence: mv {path} {path}.broken; then start again: "
        "a new chain begins"
    )


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
