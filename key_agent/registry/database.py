"""One connection, one thread, one transaction at a time; what is committed survives a power cut (hsm.md 10).

1. SQLite: WAL with synchronous=FULL, set on each connection and read back; BEGIN IMMEDIATE; a 0700 directory.
2. PostgreSQL: fsync, full_page_writes and synchronous_commit are demanded at each connection.
3. Calls run in the writer's own thread, never on the event loop. A caller that is cancelled leaves its
   transaction to end by itself, whole or not at all.
"""

import asyncio
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from key_agent.errors import KeyAgentError
from key_agent.registry import migrations

_BUSY_TIMEOUT_MS: Final = 5000
_SYNCHRONOUS_FULL: Final = 2
_POSTGRES_DURABLE: Final = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "remote_write", "remote_apply"),
}


class RegistryError(KeyAgentError):
    """The registry could not be read or written; nothing of the transaction was kept."""


class Database:
    """`transact` is the only way to the tables."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._closed = False

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect, check durability, migrate. RegistryError says what is wrong and where."""
        parsed = make_url(url)
        if parsed.drivername == "sqlite":
            _check_directory(parsed)
        database = cls(_engine(parsed))
        try:
            await database.transact(migrations.upgrade)
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
        await loop.run_in_executor(self._writer, self._engine.dispose)
        self._writer.shutdown(wait=False)


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


def _engine(url: URL) -> Engine:
    if url.drivername == "sqlite":
        # One connection, used by the writer thread alone. Autocommit, so that BEGIN is ours to say.
        engine = create_engine(
            url, poolclass=StaticPool, connect_args={"isolation_level": None, "check_same_thread": False}
        )
        event.listen(engine, "connect", _sqlite_connected)
        event.listen(engine, "begin", _sqlite_begin)
    else:
        engine = create_engine(
            url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args={"connect_timeout": 5}
        )
        event.listen(engine, "connect", _postgres_connected)
    return engine


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


def _postgres_connected(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        for name, allowed in _POSTGRES_DURABLE.items():
            cursor.execute(f"SHOW {name}")
            (found,) = cursor.fetchone()
            if found not in allowed:
                raise RegistryError(
                    f"registry: PostgreSQL has {name}={found}; a power cut would lose what was acknowledged: "
                    f"set {name}=on"
                )
    connection.rollback()
