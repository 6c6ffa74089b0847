"""What must be remembered between the requests of one upload: its parts, and how it was completed.

1. A part is remembered before its client learns that it was stored: what was acknowledged can be completed,
   after a restart and by any proxy that shares the database (docs/adr/0022).
2. A part is named by its number and the service's own tag for these very bytes. One sent again leaves both:
   which of them counts, the client says when it completes, and the service, which knows the last one only.
3. Nothing here opens anything. Lengths and commitments stand in the object's manifest too; what is held of
   small parts are sealed bytes; digests of plaintext are sealed by whoever gives them.
4. Of an upload by offset the giver's own state is kept, sealed bytes and counts; it changes only from the
   version that was read, so that two requests at once cannot both go on from one place.
5. All of it is bounded: parts of an upload, bytes held for an upload and for a network service; uploads that
   nothing happened to for `KEEP_S` are forgotten, and what is held for one after `KEEP_HELD_S`.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NoReturn, Self

import structlog
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import make_url

from envelope.errors import SealgateError
from envelope.keys import NetworkService
from envelope.multipart import Part
from proxy.tenants.tables import upload_completion, upload_held, upload_part, upload_session
from runtime.clock import Clock
from runtime.database import make_engine, read_only, transaction

KEEP_S: Final = 14 * 24 * 3600.0
"""Uploads are days long at most: services' own rules abort what lies about."""
KEEP_HELD_S: Final = 24 * 3600.0
"""Of an upload that nothing happens to. Then its small last part has to be sent again before it is completed:
who begins uploads and ends none would keep others from theirs for as long."""
KEEP_COMPLETED_S: Final = 24 * 3600.0
"""A client that got no answer completes again, and is to get the service's own answer."""
SWEEP_S: Final = 3600.0
MAX_HELD_PARTS: Final = 3
"""Of one upload: only the last part may be small, and who sends small ones first cannot complete them."""
MAX_HELD_BYTES: Final = 256 * 1024 * 1024
"""Of one network service."""
MAX_TAGS: Final = 4
"""Of one part number: the last ones."""
MAX_ROWS: Final = 100_000
"""Of one upload: Azure holds so many blocks of a blob."""
MAX_SESSION_BYTES: Final = 256 * 1024 * 1024
"""Of one network service: the states of its uploads by offset."""
IDLE_S: Final = 3600.0
"""Where no room is left, those that nothing happened to for so long make place, the oldest first."""
_AT_ONCE: Final = 256
"""Rows that are looked at together where room is made."""
_VERSION_BITS: Final = 62
_BUSY_TIMEOUT_S: Final = 10.0

_log = structlog.get_logger(__name__)


class UploadsUnavailableError(SealgateError):
    """The database cannot be used: nothing may be acknowledged."""


class UploadsFullError(SealgateError):
    """No more is remembered of this upload, or held for this network service."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload of a network service. `ref`: `envelope.multipart.upload_ref` of the service's id for it."""

    owner: NetworkService
    ref: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPart:
    """A part as it lies at the service, which calls it *tag* (S3: the part's ETag, without quotes)."""

    part: Part
    tag: str
    digests: bytes | None = field(default=None, repr=False)
    """Sealed; the giver's own."""
    is_held: bool = False
    """Its sealed bytes can be had again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the service was asked when the client completed the upload with what hashes to `asked`."""

    asked: bytes
    request: bytes
    final_number: int
    """Of the part that ends with the manifest."""
    is_joined: bool
    """That part begins with the client's last part."""
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """An upload by offset, as it was read. `version`: drawn anew with each change, none comes again."""

    version: int
    state: bytes = field(repr=False)


class UploadStore:
    """Use as `async with`; every method waits for the database in a thread. UploadsUnavailableError."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        """Use `UploadStore.open`."""
        self._engine = engine
        self._reader = read_only(engine)
        self._clock = clock

    @classmethod
    def open(cls, url: str, *, clock: Clock) -> Self:
        """On the directory's database *url*, whose schema is there already. Nothing is asked yet."""
        engine = make_engine(
            make_url(url),
            failure=UploadsUnavailableError,
            busy_timeout_s=_BUSY_TIMEOUT_S,
            pool_size=2,
            max_overflow=2,
        )
        return cls(engine, clock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.dispose()

    # ---- parts

    async def add_part(self, upload: Upload, kept: KeptPart, *, held: bytes | None = None) -> None:
        """Remember a part, and with *held* its sealed bytes. UploadsFullError."""
        if held is not None and len(held) != kept.part.stored_bytes:
            raise UploadsFullError("the bytes to be held are not the part's")

        def add(connection: Connection) -> None:
            mark = {**_columns(upload), "number": kept.part.number, "tag": kept.tag}
            now_ms = self._now_ms()
            for table in (upload_held, upload_part):
                connection.execute(delete(table).where(*_equal(table, mark)))
            rows = select(func.count()).where(_of(upload_part, upload))
            if connection.execute(rows).scalar_one() >= MAX_ROWS:
                raise UploadsFullError(f"more than {MAX_ROWS} parts were sent for one upload")
            # Newer than all of its number, whatever the clocks of other proxies say.
            of_number = (_of(upload_part, upload), upload_part.c.number == kept.part.number)
            newest_ms = connection.execute(select(func.max(upload_part.c.at_ms)).where(*of_number)).scalar()
            values = {
                "stored_bytes": kept.part.stored_bytes,
                "commitment": kept.part.commitment,
                "digests": kept.digests,
                "at_ms": now_ms if newest_ms is None else max(now_ms, newest_ms + 1),
            }
            connection.execute(insert(upload_part).values(**mark, **values))
            self._forget_older_tags(connection, upload, kept.part.number)
            if held is not None:
                values = {"sealed": held, "sealed_bytes": len(held), "at_ms": now_ms}
                connection.execute(insert(upload_held).values(**mark, **values))
                self._bound_held(connection, upload)

        await self._in_thread(lambda: self._change(add))

    def _forget_older_tags(self, connection: Connection, upload: Upload, number: int) -> None:
        of_number = (_of(upload_part, upload), upload_part.c.number == number)
        newest = select(upload_part.c.tag, upload_part.c.at_ms).where(*of_number)
        tags = [row.tag for row in connection.execute(newest.order_by(upload_part.c.at_ms.desc()))]
        for tag in tags[MAX_TAGS:]:
            mark = {**_columns(upload), "number": number, "tag": tag}
            for table in (upload_held, upload_part):
                connection.execute(delete(table).where(*_equal(table, mark)))

    def _bound_held(self, connection: Connection, upload: Upload) -> None:
        numbers = select(upload_held.c.number).where(_of(upload_held, upload)).distinct()
        highest = connection.execute(numbers.order_by(upload_held.c.number.desc())).scalars().all()
        if len(highest) > MAX_HELD_PARTS:
            surplus = upload_held.c.number < highest[MAX_HELD_PARTS - 1]
            connection.execute(delete(upload_held).where(_of(upload_held, upload), surplus))
        total = select(func.coalesce(func.sum(upload_held.c.sealed_bytes), 0)).where(
            upload_held.c.tenant_id == upload.owner.tenant, upload_held.c.service == upload.owner.service
        )
        if connection.execute(total).scalar_one() <= MAX_HELD_BYTES:
            return
        self._forget_idle_held(connection)
        if connection.execute(total).scalar_one() > MAX_HELD_BYTES:
            raise UploadsFullError(f"{upload.owner} has small last parts of too many uploads at once")

    def _forget_idle_held(self, connection: Connection) -> None:
        """What is held for uploads that nothing has happened to for `KEEP_HELD_S`."""
        cutoff_ms = self._now_ms() - round(KEEP_HELD_S * 1000)
        named = (upload_part.c.tenant_id, upload_part.c.service, upload_part.c.upload_ref)
        is_of_it = (
            (upload_part.c.tenant_id == upload_held.c.tenant_id)
            & (upload_part.c.service == upload_held.c.service)
            & (upload_part.c.upload_ref == upload_held.c.upload_ref)
        )
        recent = select(*named).where(is_of_it, upload_part.c.at_ms >= cutoff_ms).exists()
        connection.execute(delete(upload_held).where(~recent))

    async def parts(self, upload: Upload) -> list[KeptPart]:
        """All that is remembered, by rising number; of one number the newest first."""

        def read(connection: Connection) -> list[KeptPart]:
            held = {
                (row.number, row.tag)
                for row in connection.execute(
                    select(upload_held.c.number, upload_held.c.tag).where(_of(upload_held, upload))
                )
            }
            rows = connection.execute(
                select(upload_part)
                .where(_of(upload_part, upload))
                .order_by(upload_part.c.number, upload_part.c.at_ms.desc())
            )
            return [
                KeptPart(
                    part=Part(row.number, row.stored_bytes, bytes(row.commitment)),
                    tag=row.tag,
                    digests=None if row.digests is None else bytes(row.digests),
                    is_held=(row.number, row.tag) in held,
                )
                for row in rows
            ]

        return await self._in_thread(lambda: self._read(read))

    async def held(self, upload: Upload, kept: KeptPart) -> bytes | None:
        """The sealed bytes of a part; None if they are not held."""

        def read(connection: Connection) -> bytes | None:
            mark = {**_columns(upload), "number": kept.part.number, "tag": kept.tag}
            row = connection.execute(select(upload_held.c.sealed).where(*_equal(upload_held, mark))).first()
            return None if row is None else bytes(row.sealed)

        return await self._in_thread(lambda: self._read(read))

    # ---- completing

    async def completion(self, upload: Upload) -> Completion | None:
        def read(connection: Connection) -> Completion | None:
            row = connection.execute(select(upload_completion).where(_of(upload_completion, upload))).first()
            if row is None:
                return None
            return Completion(
                asked=bytes(row.asked),
                request=bytes(row.request),
                final_number=row.final_number,
                is_joined=row.is_joined,
                is_done=row.is_done,
            )

        return await self._in_thread(lambda: self._read(read))

    async def complete(self, upload: Upload, completion: Completion) -> None:
        """Remember what the service is about to be asked, in place of what it was asked before."""

        def change(connection: Connection) -> None:
            connection.execute(delete(upload_completion).where(_of(upload_completion, upload)))
            connection.execute(
                insert(upload_completion).values(
                    **_columns(upload),
                    asked=completion.asked,
                    request=completion.request,
                    final_number=completion.final_number,
                    is_joined=completion.is_joined,
                    is_done=completion.is_done,
                    at_ms=self._now_ms(),
                )
            )
            if completion.is_done:
                self._forget_parts(connection, upload)

        await self._in_thread(lambda: self._change(change))

    async def forget(self, upload: Upload) -> None:
        """The upload is no more: aborted, or unknown to the service."""

        def change(connection: Connection) -> None:
            connection.execute(delete(upload_completion).where(_of(upload_completion, upload)))
            self._forget_parts(connection, upload)

        await self._in_thread(lambda: self._change(change))

    async def forget_completion(self, upload: Upload) -> None:
        """The service has refused it: what it was asked would be refused again."""

        def change(connection: Connection) -> None:
            connection.execute(delete(upload_completion).where(_of(upload_completion, upload)))

        await self._in_thread(lambda: self._change(change))

    async def forget_parts(self, upload: Upload, parts: Iterable[KeptPart]) -> None:
        """These are of no use any more; others of the upload, which came meanwhile, are."""
        marks = [
            {"its_number": kept.part.number, "its_tag": kept.tag, "its_ref": upload.ref} for kept in parts
        ]
        if not marks:
            return

        def change(connection: Connection) -> None:
            for table in (upload_held, upload_part):
                connection.execute(
                    delete(table).where(
                        table.c.tenant_id == upload.owner.tenant,
                        table.c.service == upload.owner.service,
                        table.c.upload_ref == bindparam("its_ref"),
                        table.c.number == bindparam("its_number"),
                        table.c.tag == bindparam("its_tag"),
                    ),
                    marks,
                )

        await self._in_thread(lambda: self._change(change))

    def _forget_parts(self, connection: Connection, upload: Upload) -> None:
        for table in (upload_held, upload_part):
            connection.execute(delete(table).where(_of(table, upload)))

    # ---- uploads by offset

    async def session(self, upload: Upload) -> Session | None:
        """None: nothing is known of it."""

        def read(connection: Connection) -> Session | None:
            row = connection.execute(select(upload_session).where(_of(upload_session, upload))).first()
            return None if row is None else Session(row.version, bytes(row.state))

        return await self._in_thread(lambda: self._read(read))

    async def begin_session(self, upload: Upload, state: bytes) -> None:
        """A new one, in place of whatever was known by its name. UploadsFullError."""

        def change(connection: Connection) -> None:
            connection.execute(delete(upload_session).where(_of(upload_session, upload)))
            self._make_room(connection, upload, len(state))
            values = {"state": state, "state_bytes": len(state), "at_ms": self._now_ms()}
            version = secrets.randbits(_VERSION_BITS)
            connection.execute(insert(upload_session).values(**_columns(upload), version=version, **values))

        await self._in_thread(lambda: self._change(change))

    async def change_session(self, upload: Upload, read: Session, state: bytes) -> Session | None:
        """*state* in place of what was *read*; None if it has changed since, or is gone. UploadsFullError."""

        def change(connection: Connection) -> Session | None:
            self._make_room(connection, upload, len(state) - len(read.state))
            version = secrets.randbits(_VERSION_BITS)
            changed = connection.execute(
                update(upload_session)
                .where(_of(upload_session, upload), upload_session.c.version == read.version)
                .values(version=version, state=state, state_bytes=len(state), at_ms=self._now_ms())
            )
            return Session(version, state) if changed.rowcount == 1 else None

        return await self._in_thread(lambda: self._change(change))

    async def forget_session(self, upload: Upload, read: Session | None = None) -> bool:
        """It is no more: cancelled, or cannot be gone on with. False: it has changed since it was *read*, and
        stays, or nothing was known of it."""

        def change(connection: Connection) -> bool:
            its = _of(upload_session, upload)
            if read is not None:
                its &= upload_session.c.version == read.version
            return connection.execute(delete(upload_session).where(its)).rowcount == 1

        return await self._in_thread(lambda: self._change(change))

    def _make_room(self, connection: Connection, upload: Upload, more_bytes: int) -> None:
        owner = upload.owner
        of_service = (upload_session.c.tenant_id == owner.tenant, upload_session.c.service == owner.service)
        total = select(func.coalesce(func.sum(upload_session.c.state_bytes), 0)).where(*of_service)
        surplus = connection.execute(total).scalar_one() + more_bytes - MAX_SESSION_BYTES
        if more_bytes <= 0 or surplus <= 0:
            return
        idle = upload_session.c.at_ms < self._now_ms() - round(IDLE_S * 1000)
        idle &= upload_session.c.upload_ref != upload.ref  # not its own, which goes on just now
        its = (upload_session.c.upload_ref, upload_session.c.state_bytes)  # not the states: they fill memory
        oldest = select(*its).where(*of_service, idle).order_by(upload_session.c.at_ms).limit(_AT_ONCE)
        while rows := connection.execute(oldest).all():
            for row in rows:
                gone = Upload(owner, bytes(row.upload_ref))
                connection.execute(delete(upload_session).where(_of(upload_session, gone)))
                surplus -= row.state_bytes
                if surplus <= 0:
                    return
        raise UploadsFullError(f"{owner} has too many uploads by offset at once")

    # ---- time

    async def keep_swept(self) -> NoReturn:
        """Sweep every hour."""
        while True:
            await self._clock.sleep(SWEEP_S)
            try:
                await self.sweep()
            except UploadsUnavailableError as error:
                _log.warning("uploads not swept", cause=str(error))

    async def sweep(self) -> int:
        """Forget uploads that nothing has happened to for too long; how many."""

        def change(connection: Connection) -> int:
            now_ms = self._now_ms()
            old = (
                select(upload_part.c.tenant_id, upload_part.c.service, upload_part.c.upload_ref)
                .group_by(upload_part.c.tenant_id, upload_part.c.service, upload_part.c.upload_ref)
                .having(func.max(upload_part.c.at_ms) < now_ms - round(KEEP_S * 1000))
            )
            self._forget_idle_held(connection)
            gone = connection.execute(old).all()
            for row in gone:
                upload = Upload(NetworkService(row.tenant_id, row.service), bytes(row.upload_ref))
                self._forget_parts(connection, upload)
            ended = upload_completion.c.at_ms < now_ms - round(KEEP_COMPLETED_S * 1000)
            done = upload_completion.c.is_done.is_(True)
            connection.execute(delete(upload_completion).where(ended, done))
            old_ones = upload_completion.c.at_ms < now_ms - round(KEEP_S * 1000)
            connection.execute(delete(upload_completion).where(old_ones))
            left = upload_session.c.at_ms < now_ms - round(KEEP_S * 1000)
            sessions = connection.execute(delete(upload_session).where(left))
            return len(gone) + sessions.rowcount

        return await self._in_thread(lambda: self._change(change))

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)

    # ---- the database

    async def _in_thread[T](self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    def _change[T](self, work: Callable[[Connection], T]) -> T:
        with transaction(self._engine, failure=UploadsUnavailableError) as connection:
            return work(connection)

    def _read[T](self, work: Callable[[Connection], T]) -> T:
        with transaction(self._reader, failure=UploadsUnavailableError) as connection:
            return work(connection)


def _columns(upload: Upload) -> dict[str, object]:
    return {"tenant_id": upload.owner.tenant, "service": upload.owner.service, "upload_ref": upload.ref}


def _of(table: Table, upload: Upload) -> ColumnElement[bool]:
    return (
        (table.c.tenant_id == upload.owner.tenant)
        & (table.c.service == upload.owner.service)
        & (table.c.upload_ref == upload.ref)
    )


def _equal(table: Table, mark: dict[str, object]) -> Iterator[ColumnElement[bool]]:
    for name, value in mark.items():
        yield table.c[name] == value
