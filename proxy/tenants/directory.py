"""The directory: tenants and network services in a database, and the history of every change.

1. A change is one transaction: it checks the rules against what is there, raises the revision by one and
   leaves one row of history. Changes queue (SQLite: BEGIN IMMEDIATE, PostgreSQL: the revision's row lock).
2. What is committed survives a power cut (runtime/database.py).
3. Who may change what is written beside it: tenants (tenant_store.py), network services, the keys and
   certificates of both them and named keys (recipient_store.py), users, the encryption service, secrets for
   upstream. A named key is a row like a network service's, without upstream.
4. The history is the record of provisioning. The running proxy copies it to its audit log before it acts
   (proxy/tenants/watch.py).
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.engine import make_url

from envelope.keys import NetworkService
from proxy.encryption_service.credentials import SecretSealer
from proxy.tenants import certificates, directory_rows, migrations
from proxy.tenants.errors import DirectoryUnavailableError, NoDirectoryError
from proxy.tenants.model import Directory
from proxy.tenants.rules import recipient_in
from proxy.tenants.tables import directory, history, network_service, tenant
from runtime.clock import Clock
from runtime.database import make_engine, read_only, transaction

BUSY_TIMEOUT_S: Final = 10.0
UNCHANGED: Final = object()
"""An argument that was not given, where None says something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One row of history; `detail` holds public facts only."""

    revision: int
    at_ms: int
    actor: str
    action: str
    tenant: str
    service: str | None
    detail: Mapping[str, str]

    def as_json(self) -> dict[str, object]:
        return {
            "revision": self.revision,
            "at_ms": self.at_ms,
            "actor": self.actor,
            "action": self.action,
            "tenant": self.tenant,
            "service": self.service,
            "detail": dict(self.detail),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a change is about to write."""

    action: str
    tenant: str
    service: str | None = None
    detail: Mapping[str, str]


class DirectoryStore:
    """The only way to the tables. Blocking: on an event loop call it by `asyncio.to_thread`."""

    def __init__(self, engine: Engine, state_dir: Path, clock: Clock) -> None:
        """Use `DirectoryStore.open`."""
        self._engine = engine
        self._reader = read_only(engine)
        self._state_dir = state_dir
        self._clock = clock
        self._sealer = SecretSealer(state_dir)

    @classmethod
    def open(cls, url: str, state_dir: Path, *, clock: Clock, migrate: bool = True) -> Self:
        """Connect, and with *migrate* bring the schema to the newest version.

        DirectoryUnavailableError if the database cannot be used, or without *migrate* has another schema.
        """
        parsed = make_url(url)
        if parsed.drivername == "sqlite" and parsed.database:
            _prepare_file(Path(parsed.database), create=migrate)
        engine = make_engine(
            parsed,
            failure=DirectoryUnavailableError,
            busy_timeout_s=BUSY_TIMEOUT_S,
            pool_size=2,
            max_overflow=2,
        )
        store = cls(engine, state_dir, clock)
        try:
            with store._transaction() as connection:
                if migrate:
                    migrations.upgrade(connection)
                else:
                    _check_schema(connection)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # Reading.

    def revision(self) -> int:
        """The number of the last change. Cheap: the running proxy asks every second."""
        with self._transaction(self._reader) as connection:
            return int(connection.execute(select(directory.c.revision)).scalar_one())

    def snapshot(self) -> Directory:
        """The whole directory at one revision."""
        with self._transaction(self._reader) as connection:
            return directory_rows.read(connection, self._state_dir, self._sealer)

    def history(self, *, after: int = 0, limit: int = 1000) -> list[Change]:
        """Changes with a revision above *after*, oldest first."""
        with self._transaction(self._reader) as connection:
            rows = connection.execute(
                select(history).where(history.c.revision > after).order_by(history.c.revision).limit(limit)
            )
            return [
                Change(
                    revision=row.revision,
                    at_ms=row.at_ms,
                    actor=row.actor,
                    action=row.action,
                    tenant=row.tenant_id,
                    service=row.service,
                    detail=json.loads(row.detail),
                )
                for row in rows
            ]

    def private_keys(self) -> set[Path]:
        """Every private key file in use: of network services, of renewals under way, of interception CAs."""
        with self._transaction(self._reader) as connection:
            services = connection.execute(
                select(network_service.c.key_file, network_service.c.pending_key_file)
            )
            names = {name for row in services for name in row if name is not None}
            names.update(connection.execute(select(tenant.c.ca_key_file)).scalars())
        return {self._state_dir / name for name in names}

    def newest_key_file(self, owner: NetworkService) -> Path:
        """The private key of *owner* that waits for its certificate, else the one in use. NotThereError."""
        with self._transaction(self._reader) as connection:
            recipient_in(directory_rows.read(connection, self._state_dir, self._sealer), owner)
            row = connection.execute(
                select(network_service.c.key_file, network_service.c.pending_key_file).where(
                    network_service.c.tenant_id == owner.tenant, network_service.c.name == owner.service
                )
            ).one()
        return self._state_dir / str(row.pending_key_file or row.key_file)

    # Changing.

    @property
    def state_dir(self) -> Path:
        return self._state_dir

    def now_s(self) -> float:
        """Wall clock."""
        return self._clock.wall_s()

    def now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)

    def change(self, change: Callable[[Connection, Directory], Draft | None], actor: str) -> Directory:
        """Run *change* alone, with its row of history and the next revision; None changed nothing."""
        with self._transaction() as connection:
            revision = int(
                connection.execute(select(directory.c.revision).with_for_update()).scalar_one()  # rule 1
            )
            draft = change(connection, directory_rows.read(connection, self._state_dir, self._sealer))
            if draft is not None:
                connection.execute(update(directory).values(revision=revision + 1))
                connection.execute(
                    insert(history).values(
                        revision=revision + 1,
                        at_ms=self.now_ms(),
                        actor=actor[:255],
                        action=draft.action,
                        tenant_id=draft.tenant,
                        service=draft.service,
                        detail=json.dumps(dict(draft.detail), sort_keys=True),
                    )
                )
            return directory_rows.read(connection, self._state_dir, self._sealer)

    def _transaction(self, engine: Engine | None = None) -> AbstractContextManager[Connection]:
        """One transaction. DirectoryUnavailableError for whatever the database raises."""
        return transaction(engine or self._engine, failure=DirectoryUnavailableError)


def _check_schema(connection: Connection) -> None:
    found = migrations.current(connection)
    if found is None:
        raise NoDirectoryError("its schema")
    if found != migrations.HEAD:
        raise DirectoryUnavailableError(
            f"schema version {found}, this program needs {migrations.HEAD}",
            "`sealgate run` brings an older one to it; for a newer one install the newer program",
        )


def _prepare_file(path: Path, *, create: bool) -> None:
    if not create and not path.exists():
        raise NoDirectoryError(str(path))
    try:
        certificates.make_private_directory(path.parent)
    except OSError as error:
        raise DirectoryUnavailableError(f"{error.filename}: {error.strerror}") from None
