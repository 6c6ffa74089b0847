"""One connection, one thread, one transaction at a time; what is committed survives a power cut (hsm.md 10).

1. SQLite: WAL with synchronous=FULL, set on each connection and read back; BEGIN IMMEDIATE; a 0700 directory.
2. PostgreSQL: fsync, full_page_writes and synchronous_commit are demanded at each connection.
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

from sqlalchemy import Connection, Engine, create_engine, delete, event, insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from key_agent.errors import KeyAgentError
from key_agent.registry import migrations
from key_agent.registry.tables import holder

_BUSY_TIMEOUT_MS: Final = 5000
_SYNCHRONOUS_FULL: Final = 2
# A session whose agent lost its machine ends within a minute, and with it its lock.
_POSTGRES_SESSION: Final = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
_POSTGRES_LOCK: Final = "hashtextextended('sealgate key agent in ' || current_schema(), 0)"
# A server notices within milliseconds that a process was killed.
_LOCK_PATIENCE_S: Final = 2.0
_POSTGRES_DURABLE: Final = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "remote_write", "remote_apply"),
}


class RegistryError(KeyAgentError):
    """The registry could not be read or written; nothing of the transaction was kept."""


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
        self._engine = self._make_engine(url)
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
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            # Without parameters: rows hold nothing secret, but an error text is no place for them either.
            cause = getattr(error, "orig", None) or error
            raise RegistryError(f"registry: {type(cause).__name__}: {str(cause).strip()}") from error

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

    def _make_engine(self, url: URL) -> Engine:
        if url.drivername == "sqlite":
            # One connection, used by the writer thread alone. Autocommit, so that BEGIN is ours to say.
            engine = create_engine(
                url, poolclass=StaticPool, connect_args={"isolation_level": None, "check_same_thread": False}
            )
            event.listen(engine, "connect", _sqlite_connected)
            event.listen(engine, "begin", _sqlite_begin)
            return engine
        name = {"connect_timeout": 5, "application_name": self._application_name}
        engine = create_engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args=name)
        event.listen(engine, "connect", self._postgres_connected)
        return engine

    @property
    def _application_name(self) -> str:
        return f"sealgate-key-agent {self._instance}"

    def _postgres_connected(self, connection: Any, _record: object) -> None:
        try:
            with connection.cursor() as cursor:
                _check_durability(cursor)
                for name, value in _POSTGRES_SESSION.items():
                    cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
                self._hold_alone(cursor)
                if self._is_claimed:
                    self._check_holder(cursor)
            connection.commit()
        except BaseException:
            connection.close()
            raise

    def _hold_alone(self, cursor: Any) -> None:
        """Take the lock, which then ends with this connection."""
        give_up_s = time.monotonic() + _LOCK_PATIENCE_S
        while not _ask(cursor, f"SELECT pg_try_advisory_lock({_POSTGRES_LOCK})"):
            # Our own lost connection may hold it, if the server has not noticed yet that it is lost.
            _ask(
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
        if _ask(cursor, "SELECT instance FROM holder") != self._instance:
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
        raise RegistryError(f"registry: {directory}: {error.strerror}; `key-agent init` makes it") from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise RegistryError(f"registry: {directory} is open to others: chmod 700 {directory}")
    if status.st_uid != os.geteuid():
        raise RegistryError(
            f"registry: {directory} belongs to user {status.st_uid}, not to user {os.geteuid()}"
        )


def _lock_file(url: URL) -> int:
    """A descriptor that holds the lock of the database's file, until it is closed or the process ends."""
    # A file of its own: closing any descriptor of the database's would drop SQLite's locks.
    path = Path(str(Path(url.database or "").resolve()) + ".lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RegistryError(f"registry: {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise RegistryInUseError(
                f"another key agent works with {url.database}",
                "stop that one first; or give this agent a database of its own (agent.database_url)",
            ) from None
        raise RegistryError(f"registry: {path}: {error.strerror}") from error
    return descriptor


def _sqlite_connected(connection: Any, _record: object) -> None:
    def pragma(text: str) -> object:
        row = connection.execute(f"PRAGMA {text}").fetchone()
        return row[0] if row else None

    pragma(f"busy_timeout = {_BUSY_TIMEOUT_MS}")
    mode = pragma("journal_mode = WAL")
    pragma("synchronous = FULL")
    pragma("foreign_keys = ON")
    # NORMAL lost acknowledged commits in 40 of 40 power cuts.
    if (found := pragma("synchronous")) != _SYNCHRONOUS_FULL:
        raise RegistryError(f"registry: SQLite answers synchronous={found}, not 2 (FULL)")
    if mode != "wal":
        raise RegistryError(f"registry: SQLite answers journal_mode={mode}, not wal; is it a local disk?")
    if pragma("foreign_keys") != 1:
        raise RegistryError("registry: this SQLite knows no foreign keys")


def _sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_durability(cursor: Any) -> None:
    for name, allowed in _POSTGRES_DURABLE.items():
        found = _ask(cursor, f"SHOW {name}")
        if found not in allowed:
            raise RegistryError(
                f"registry: PostgreSQL has {name}={found}; a power cut would lose what was acknowledged: "
                f"set {name}=on"
            )


def _lock_holder(cursor: Any) -> str:
    """Who holds the lock, for people."""
    found = _ask(
        cursor,
        "SELECT "  # noqa: S608 - of constants
        "coalesce('from ' || host(a.client_addr), 'on the database server itself') || ', since ' || "
        "date_trunc('second', a.backend_start) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid "
        "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 "
        "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
        f"AND (l.classid::bigint << 32) | l.objid::bigint = {_POSTGRES_LOCK}",
    )
    return found or "it has just ended"


def _ask(cursor: Any, query: str, *parameters: object) -> Any:
    """The first column of the first row; None without one."""
    cursor.execute(query, parameters or None)
    row = cursor.fetchone()
    return row[0] if row else None
