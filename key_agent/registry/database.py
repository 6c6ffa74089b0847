"""One connection, one thread, one transaction at a time.

1. What is committed survives a power cut (runtime/database.py).
2. SQLite lies in a 0700 directory.
3. Calls run in the writer's own thread, never on the event loop. A caller that is cancelled leaves its
   transaction to end by itself, whole or not at all.
4. One agent at a time works with a registry, wherever its `state_dir` is: two would not know of each other's
   keys and sequences. Who does holds the lease (lease.py), renews it while it lives, and finds its own term
   in every transaction; one that has lost it keeps nothing any more and has to start anew.
5. After a failure nobody knows what the registry holds: a COMMIT may have gone through without an answer.
   `returned` is set as soon as it works again, and what is in memory is read anew.
"""

import asyncio
import contextlib
import os
import stat
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import structlog
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL, make_url

from key_agent.errors import KeyAgentError
from key_agent.registry import lease, migrations
from key_agent.registry.lease import LOOK_S, RENEW_S, TRUST_S, Holding, Process, Watch
from runtime.clock import Clock, SystemClock
from runtime.database import make_engine, read_only, transaction

_BUSY_TIMEOUT_S: Final = 5.0
# A session whose agent lost its machine ends within a minute, and what it had begun with it.
_POSTGRES_SESSION: Final = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
_POSTGRES_LOCK_TIMEOUT: Final = "2s"

log = structlog.get_logger(__name__)


class RegistryError(KeyAgentError):
    """The registry could not be read or written. Nothing of the transaction was kept, unless the cause says
    that the connection was lost while it committed."""


type OnStandby = Callable[[Holding | RegistryError], Awaitable[None]]
"""Told who leads, or why the registry cannot be used yet, at each look in vain. What it raises ends it."""


def _failure(cause: str) -> RegistryError:
    return RegistryError(f"registry: {cause}")


class RegistryInUseError(RegistryError):
    """Another agent works with this registry, or has taken it over from this one."""

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(f"registry: {cause}")
        self.next_step = next_step


class Database:
    """`transact` is the only way to the tables."""

    def __init__(self, url: URL, *, agent_id: str, clock: Clock) -> None:
        self._agent_id = agent_id
        self._clock = clock
        self._instance = os.urandom(8).hex()
        self._here = Process.own()
        self._term: int | None = None
        self._trusted_until_boot_s = -1.0
        self._deposed: RegistryInUseError | None = None
        self.deposed = asyncio.Event()
        """Another has taken over: whatever is in memory may be old. Set once and for good."""
        self._has_failed = False
        self.returned = asyncio.Event()
        """It works again after a failure, or a time without a lease that counts. Who waits clears it."""
        self._engine = make_engine(
            url,
            failure=_failure,
            busy_timeout_s=_BUSY_TIMEOUT_S,
            # The one connection, used by the writer thread alone.
            pool_size=1,
            max_overflow=0,
            application_name=_application_name(self._instance),
            prepare=_prepare_postgres,
        )
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._renewing: asyncio.Task[NoReturn] | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        agent_id: str = "",
        clock: Clock | None = None,
        on_standby: OnStandby | None = None,
    ) -> Self:
        """Connect, check durability, migrate, take the lease. RegistryError says what is wrong and where.

        While another agent holds the lease: RegistryInUseError, or, with *on_standby*, wait until it is free;
        and until the database is there.
        """
        parsed = make_url(url)
        if parsed.drivername == "sqlite":
            _check_directory(parsed)
        database = cls(parsed, agent_id=agent_id, clock=clock or SystemClock())
        try:
            await database._patiently(lambda: database._run(migrations.upgrade), on_standby)
            await database._lead(on_standby)
        except BaseException:
            await database.close()
            raise
        return database

    @property
    def leads(self) -> bool:
        """Whether the lease can be relied on at this moment (lease.py, rule 3)."""
        return self._deposed is None and self._clock.boot_s() < self._trusted_until_boot_s

    @property
    def term(self) -> int:
        return self._term or 0

    async def transact[T](self, work: Callable[[Connection], T]) -> T:
        """Run *work* in one transaction, in the writer thread; its result after COMMIT returned.

        RegistryError for what the database raises; anything else that *work* raises passes, after ROLLBACK.
        RegistryInUseError: the lease is another's by now.
        """
        return await self._run(lambda c: self._fenced(c, work))

    async def read_lease(self) -> Holding | None:
        """Who holds the lease, for people."""
        if self._closed:
            raise RegistryError("the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._read_lease)

    async def close(self) -> None:
        """Idempotent; waits for a transaction that is running, and lets the lease go."""
        if self._closed:
            return
        self._closed = True
        if self._renewing is not None:
            self._renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewing
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, self._let_go)
        self._writer.shutdown(wait=False)

    async def _run[T](self, work: Callable[[Connection], T]) -> T:
        if self._closed:
            raise RegistryError("the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._transact, work)

    def _transact[T](self, work: Callable[[Connection], T]) -> T:
        try:
            with transaction(self._engine, failure=_failure) as connection:
                return work(connection)
        except RegistryError:
            self._has_failed = True
            raise

    def _read_lease(self) -> Holding | None:
        with transaction(read_only(self._engine), failure=_failure) as connection:
            return lease.read(connection)

    def _fenced[T](self, c: Connection, work: Callable[[Connection], T]) -> T:
        if self._deposed is not None:
            raise self._deposed
        if self._term is not None and not lease.check(c, instance=self._instance, term=self._term):
            raise self._depose(lease.read(c))
        return work(c)

    async def _patiently[T](self, work: Callable[[], Awaitable[T]], on_standby: OnStandby | None) -> T:
        """What *work* returns; who stands by has time until the database is there, and free."""
        while True:
            try:
                return await work()
            except RegistryError as error:
                if on_standby is None:
                    raise
                log.warning("the registry cannot be used yet", cause=str(error))
                await on_standby(error)
            await self._clock.sleep(LOOK_S)

    # The lease.

    async def _lead(self, on_standby: OnStandby | None) -> None:
        watch = Watch(self._here)
        while True:
            holding = await self._patiently(self.read_lease, on_standby)
            if watch.may_take(holding, self._clock.boot_s()):
                failure = await self._take(holding)
                if self._term is not None:
                    break
                if failure is not None and on_standby is not None:
                    await on_standby(failure)
            elif holding is not None:
                if on_standby is not None:
                    await on_standby(holding)
                elif watch.is_alive:
                    raise RegistryInUseError(
                        f"another key agent works with it ({holding.describe()})",
                        "stop that one first, or let it lead: `key-agent run` stands by; "
                        "or give this agent a database of its own (agent.database_url)",
                    )
            await self._clock.sleep(LOOK_S)
        self._renewing = asyncio.create_task(self._renew_for_ever(), name="registry:lease")

    async def _take(self, seen: Holding | None) -> RegistryError | None:
        """Try it; what went wrong, if not somebody was quicker. `_term` is the lease's if it is ours."""
        began_boot_s = self._clock.boot_s()

        def work(c: Connection) -> int | None:
            if c.dialect.name == "postgresql":
                _end_session(c, seen)
            return lease.take(
                c,
                seen,
                instance=self._instance,
                agent_id=self._agent_id,
                here=self._here,
                boot_s=began_boot_s,
                now_ms=int(self._clock.wall_s() * 1000),
            )

        try:
            self._term = await self._run(work)
        except RegistryInUseError:
            raise
        except RegistryError as error:
            # Two reach for it at once, or its frozen holder is inside a transaction: look again.
            log.warning("the registry's lease could not be taken yet", cause=str(error))
            return error
        if self._term is None:
            return None
        self._has_failed = False
        self._trusted_until_boot_s = began_boot_s + TRUST_S
        if seen is not None and not seen.is_free:
            log.warning("took the registry over", term=self._term, before=seen.describe())
        return None

    async def _renew_for_ever(self) -> NoReturn:
        while True:
            await self._clock.sleep(RENEW_S)
            began_boot_s = self._clock.boot_s()
            led = self.leads
            try:
                has_failed = await self._run(lambda c: self._renewed(c, self._clock.boot_s()))
            except RegistryError as error:
                log.warning("the registry's lease could not be renewed", cause=str(error))
                continue
            if has_failed is None:
                continue
            self._trusted_until_boot_s = began_boot_s + TRUST_S
            if has_failed or not led:
                log.info("the registry works again", term=self._term)
                self.returned.set()

    def _renewed(self, c: Connection, boot_s: float) -> bool | None:
        """Whether anything had failed since the last renewal; None if the lease is another's."""
        if self._deposed is None and lease.renew(c, instance=self._instance, term=self.term, boot_s=boot_s):
            # Here, in the writer's thread: what fails after it, this COMMIT too, counts for the next one.
            has_failed, self._has_failed = self._has_failed, False
            return has_failed
        if self._deposed is None:
            self._depose(lease.read(c))
        return None

    def _depose(self, holding: Holding | None) -> RegistryInUseError:
        """In the writer's thread."""
        by = "nobody is named" if holding is None else holding.describe()
        self._deposed = RegistryInUseError(
            f"another key agent has taken it over ({by})",
            "restart this one: it reads the registry anew, and stands by while the other leads",
        )
        log.error("this agent leads no more", by=by, term=self._term)
        self._loop.call_soon_threadsafe(self.deposed.set)
        return self._deposed

    def _let_go(self) -> None:
        try:
            if self._term is not None and self._deposed is None:
                term = self._term
                with contextlib.suppress(RegistryError):
                    self._transact(lambda c: lease.release(c, instance=self._instance, term=term))
        finally:
            self._engine.dispose()


def _application_name(instance: str) -> str:
    return f"sealgate-key-agent {instance}"


def _prepare_postgres(cursor: Any) -> None:
    for name, value in _POSTGRES_SESSION.items():
        cursor.execute("SELECT set_config(%s, %s, false)", (name, value))


def _end_session(c: Connection, seen: Holding | None) -> None:
    """End what the holder, who is out of time, has left open at the server; and do not wait for it long."""
    c.execute(text("SELECT set_config('lock_timeout', :value, true)"), {"value": _POSTGRES_LOCK_TIMEOUT})
    if seen is not None and not seen.is_free:
        c.execute(
            text(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE application_name = :name AND pid <> pg_backend_pid()"
            ),
            {"name": _application_name(seen.instance)},
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
