"""One connection, one thread, one transaction at a time.

1. What is committed survives a power cut (runtime/database.py).
2. SQLite lies in a 0700 directory.
3. Calls run in the writer's own thread, never on the event loop. A caller that is cancelled leaves its
   transaction to end by itself, whole or not at all.
4. One agent per registry, wherever its `state_dir` is: two would not know of each other's keys and sequences.
   SQLite: a lock on a file beside it. PostgreSQL: an advisory lock held by the one connection, so that
   nothing is read or written without it; taken again after a lost connection, unless another agent came in
   between.
"""

import asyncio
import fcntl
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import Connection, delete, insert
from sqlalchemy.engine import URL, make_url

from key_agent.errors import KeyAgentError
from key_agent.registry import migrations
from key_agent.registry.tables import holder
from runtime.database import ask, make_engine, transaction

_BUSY_TIMEOUT_S: Final = 5.0
# A session whose agent lost its machine ends within a minute, and with it its lock.
_POSTGRES_SESSION: Final = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
_POSTGRES_LOCK: Final = "hashtextextended('sealgate key agent in ' || current_schema(), 0)"
# A server notices within milliseconds that a process was killed.
_LOCK_PATIENCE_S: Final = 2.0


class RegistryError(KeyAgentError):
    """The registry could not be read or written; nothing of the transaction was kept."""


def _failure(cause: str) -> RegistryError:
    return RegistryError(f"registry: {cause}")


class RegistryInUseError(RegistryError):
    """Another agent works with this registry, or did while our connection was lost."""

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(f"registry: {cause}")
        self.next_step = next_step


class Database:
    """`transact` is the only way to the tables."""

    def __init__(self, url: URL) -> None:
        self._instance = os.urandom(8).hex()
        self._is_claimed = False
        self._lock = None if url.drivername != "sqlite" else _lock_file(url)
        self._engine = make_engine(
            url,
            failure=_failure,
            busy_timeout_s=_BUSY_TIMEOUT_S,
            # The one connection, used by the writer thread alone.
            pool_size=1,
            max_overflow=0,
            application_name=self._application_name,
            prepare=self._prepare_postgres,
        )
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._closed = False

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect, check durability, migrate. RegistryError says what is wrong and where.

        RegistryInUseError: another agent has it open.
        """
        parsed = make_url(url)
        if parsed.drivername == "sqlite":
            _check_directory(parsed)
        database = cls(parsed)
        try:
            await database.transact(migrations.upgrade)
            await database.transact(database._claim)
        except BaseException:
            await database.close()
            raise
        return database

    async def transact[T](self, work: Callable[[Connection], T]) -> T:
        """Run *work* in one transaction, in the writer thread; its result after COMMIT returned.

        RegistryError for what the database raises; anything else that *work* raises passes, after ROLLBACK.
        """
        if self._closed:
            raise RegistryError("the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._transact, work)

    def _transact[T](self, work: Callable[[Connection], T]) -> T:
        with transaction(self._engine, failure=_failure) as connection:
            return work(connection)

    async def close(self) -> None:
        """Idempotent; waits for a transaction that is running."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._writer, self._engine.dispose)
        finally:
            if self._lock is not None:
                os.close(self._lock)
        self._writer.shutdown(wait=False)

    def _claim(self, c: Connection) -> None:
        c.execute(delete(holder))
        c.execute(insert(holder).values(id=1, instance=self._instance))
        self._is_claimed = True

    @property
    def _application_name(self) -> str:
        return f"sealgate-key-agent {self._instance}"

    def _prepare_postgres(self, cursor: Any) -> None:
        for name, value in _POSTGRES_SESSION.items():
            cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
        self._hold_alone(cursor)
        if self._is_claimed:
            self._check_holder(cursor)

    def _hold_alone(self, cursor: Any) -> None:
        """Take the lock, which then ends with this connection."""
        give_up_s = time.monotonic() + _LOCK_PATIENCE_S
        while not ask(cursor, f"SELECT pg_try_advisory_lock({_POSTGRES_LOCK})"):
            # Our own lost connection may hold it, if the server has not noticed yet that it is lost.
            ask(
                cursor,
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE application_name = %s AND pid <> pg_backend_pid()",
                self._application_name,
            )
            if time.monotonic() > give_up_s:
                raise RegistryInUseError(
                    f"another key agent works with it ({_lock_holder(cursor)})",
                    "stop that one first; or give this agent a database of its own (agent.database_url)",
                )
            time.sleep(0.05)

    def _check_holder(self, cursor: Any) -> None:
        if ask(cursor, "SELECT instance FROM holder") != self._instance:
            raise RegistryInUseError(
                "another key agent worked with it while this one's connection was lost",
                "see to it that only one runs, then restart this one: it reads the registry anew",
            )


def _check_directory(url: URL) -> None:
    """The database, its -wal and its -shm lie in one directory of ours alone."""
    directory = Path(url.database or "").parent
    try:
        status = directory.stat()
    except OSError as error:
        raise _failure(f"{directory}: {error.strerror}; `key-agent init` makes it") from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise _failure(f"{directory} is open to others: chmod 700 {directory}")
    if status.st_uid != os.geteuid():
        raise _failure(f"{directory} belongs to user {status.st_uid}, not to user {os.geteuid()}")


def _lock_file(url: URL) -> int:
    """A descriptor that holds the lock of the database's file, until it is closed or the process ends."""
    # A file of its own: closing any descriptor of the database's would drop SQLite's locks.
    path = Path(str(Path(url.database or "").resolve()) + ".lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _failure(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise RegistryInUseError(
                f"another key agent works with {url.database}",
                "stop that one first; or give this agent a database of its own (agent.database_url)",
            ) from None
        raise _failure(f"{path}: {error.strerror}") from error
    return descriptor


def _lock_holder(cursor: Any) -> str:
    """Who holds the lock, for people."""
    found = ask(
        cursor,
        "SELECT "  # noqa: S608 - of constants
        "coalesce('from ' || host(a.client_addr), 'on the database server itself') || ', since ' || "
        "date_trunc('second', a.backend_start) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid "
        "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 "
        "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
        f"AND (l.classid::bigint << 32) | l.objid::bigint = {_POSTGRES_LOCK}",
    )
    return found or "it has just ended"
