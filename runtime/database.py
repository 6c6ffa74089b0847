"""Databases of both processes: which ones, and what is committed survives a power cut.

1. SQLite or PostgreSQL (psycopg). A password in a URL stands in a file, never in the settings.
2. SQLite: WAL with synchronous=FULL, set on each connection and read back; BEGIN IMMEDIATE, so that a change
   which read first cannot find the lock taken when it writes. `read_only` transactions take no lock.
3. PostgreSQL: fsync, full_page_writes and synchronous_commit are demanded at each connection. A server that
   has vanished from the network is noticed within half a minute, not after the two hours of TCP.
4. A caller sees its own error: `failure` makes it of the cause, which holds neither statement nor parameters.
5. A connection that is lost while it commits leaves the caller without an answer; the error says so.
"""

import importlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from alembic.config import Config
from sqlalchemy import Connection, Engine, MetaData, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from runtime.settings import SettingsError, read_secret_file

CONNECT_TIMEOUT_S: Final = 5
_POSTGRES_DRIVER: Final = "psycopg"
_POSTGRES_NETWORK: Final = {
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""Of libpq; what the URL says goes before it."""
_UNANSWERED: Final = "; the connection was lost while it committed: it may have been kept"
_SYNCHRONOUS_FULL: Final = 2
_POSTGRES_DURABLE: Final = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "remote_write", "remote_apply"),
}

type Failure = Callable[[str], Exception]
"""The caller's error for a cause."""


# The settings.


def check_url_settings(section: str, url: str | None, url_file: Path | None) -> None:
    """For the `database_url` and `database_url_file` of *section*; ValueError if they are not good."""
    if url is not None and url_file is not None:
        raise ValueError(f"{section}.database_url and {section}.database_url_file: give one of them")
    if url is not None:
        _check_url(url, name=f"{section}.database_url", may_hold_password=False)


def chosen_url(url: str | None, url_file: Path | None, *, default: Path) -> str:
    """*url*, or what *url_file* holds, or SQLite in the file *default*.

    SettingsError if the file cannot be read or holds no URL, or the driver of PostgreSQL is not installed.
    """
    if url is not None:
        _check_driver(url, place="database_url")
        return url
    if url_file is None:
        return f"sqlite:///{default}"
    content = bytes(read_secret_file(url_file)).decode(errors="replace").strip()
    try:
        _check_url(content, name="its content", may_hold_password=True)
    except ValueError as error:
        raise SettingsError(str(url_file), "", allowed=str(error)) from None
    _check_driver(content, place=str(url_file))
    return content


def _check_driver(url: str, *, place: str) -> None:
    """SettingsError if this environment cannot talk to the database of *url*."""
    if make_url(url).drivername == "sqlite":
        return
    try:
        importlib.import_module(_POSTGRES_DRIVER)
    except ImportError as error:
        raise SettingsError(
            place,
            "",
            allowed=f"PostgreSQL needs the package {_POSTGRES_DRIVER}, which cannot be imported here "
            f"({error}); pip install --require-hashes -r requirements-proxy.lock (the agent: "
            "requirements-agent.lock) brings it",
        ) from None


def _check_url(url: str, *, name: str, may_hold_password: bool) -> None:
    """ValueError unless *url* names SQLite or PostgreSQL by psycopg. Never repeats a password."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(
            f"{name} is not a database URL (sqlite:////path or postgresql+psycopg://...)"
        ) from None
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ValueError(f"{name}: {parsed.drivername!r} is not supported: sqlite or postgresql+psycopg is")
    if parsed.password is not None and not may_hold_password:
        raise ValueError(f"{name} holds a password: put the URL into a file and name it in database_url_file")
    if parsed.drivername == "sqlite" and (parsed.database is None or not Path(parsed.database).is_absolute()):
        raise ValueError(f"{name}: SQLite needs an absolute path (sqlite:////var/lib/...)")


# Connections and transactions.


def make_engine(
    url: URL,
    *,
    failure: Failure,
    busy_timeout_s: float,
    pool_size: int,
    max_overflow: int,
    application_name: str | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Engine:
    """An engine whose connections are durable, or refused with *failure*.

    PostgreSQL: *prepare* gets a cursor of each new connection; what it does is committed, and the connection
    is not used if it raises. SQLite waits *busy_timeout_s* for a lock.
    """
    pool: dict[str, Any] = {"pool_size": pool_size, "max_overflow": max_overflow}
    if url.drivername == "sqlite":
        # Autocommit, so that BEGIN is ours to say.
        arguments: dict[str, Any] = {"isolation_level": None, "check_same_thread": False}
        engine = create_engine(url, connect_args=arguments, **pool)
        event.listen(engine, "connect", _first(lambda c: _prepare_sqlite(c, failure, busy_timeout_s)))
        event.listen(engine, "begin", _begin_sqlite)
    else:
        arguments = {"connect_timeout": CONNECT_TIMEOUT_S}
        arguments |= {name: value for name, value in _POSTGRES_NETWORK.items() if name not in url.query}
        if application_name is not None:
            arguments["application_name"] = application_name
        engine = create_engine(url, connect_args=arguments, pool_pre_ping=True, **pool)
        event.listen(engine, "connect", _first(lambda c: _prepare_postgres(c, failure, prepare)))
    return engine


def read_only(engine: Engine) -> Engine:
    """*engine* for transactions that only read: each sees one state, and no change waits for it."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(sealgate_read=True)
    return engine.execution_options(isolation_level="REPEATABLE READ")


@contextmanager
def transaction(engine: Engine, *, failure: Failure) -> Iterator[Connection]:
    """One transaction, committed at the end. *failure* of what the database raises; the rest passes."""
    is_committing = False
    try:
        with engine.begin() as connection:
            yield connection
            is_committing = True
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
        doubt = _UNANSWERED if is_committing and is_lost else ""
        raise failure(f"{type(cause).__name__}: {str(cause).strip()}{doubt}") from error


def ask(cursor: Any, query: str, *parameters: object) -> Any:
    """The first column of the first row; None without one."""
    cursor.execute(query, parameters or None)
    row = cursor.fetchone()
    return row[0] if row else None


def new_metadata() -> MetaData:
    """For a schema: constraints have names, so that a migration can change them on both databases."""
    return MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def migration_config(connection: Connection, scripts: Path) -> Config:
    """What Alembic's commands take, for the migrations in the folder *scripts*, in *connection*."""
    config = Config()
    # ConfigParser would read a % in the path.
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _first(prepare: Callable[[Any], None]) -> Callable[[Any, object], None]:
    """Prepares a new connection. SQLAlchemy forgets one that its listener refused: it is closed here."""

    def listener(connection: Any, _record: object) -> None:
        try:
            prepare(connection)
        except BaseException:
            connection.close()
            raise

    return listener


def _prepare_sqlite(connection: Any, failure: Failure, busy_timeout_s: float) -> None:
    def pragma(text: str) -> object:
        row = connection.execute(f"PRAGMA {text}").fetchone()
        return row[0] if row else None

    pragma(f"busy_timeout = {int(busy_timeout_s * 1000)}")
    mode = _when_free(lambda: pragma("journal_mode = WAL"), busy_timeout_s)
    pragma("synchronous = FULL")
    pragma("foreign_keys = ON")
    # NORMAL lost acknowledged commits in 40 of 40 power cuts.
    if (found := pragma("synchronous")) != _SYNCHRONOUS_FULL:
        raise failure(f"SQLite answers synchronous={found}, not 2 (FULL)")
    if mode != "wal":
        raise failure(f"SQLite answers journal_mode={mode}, not wal; is it a local disk?")
    if pragma("foreign_keys") != 1:
        raise failure("this SQLite knows no foreign keys")


def _when_free[T](work: Callable[[], T], timeout_s: float) -> T:
    """What *work* returns. The change of journal mode, unlike the rest of SQLite, heeds no busy timeout."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_s:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("sealgate_read", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _prepare_postgres(connection: Any, failure: Failure, prepare: Callable[[Any], None] | None) -> None:
    with connection.cursor() as cursor:
        for name, allowed in _POSTGRES_DURABLE.items():
            if (found := ask(cursor, f"SHOW {name}")) not in allowed:
                raise failure(
                    f"PostgreSQL has {name}={found}; a power cut would lose what was acknowledged: "
                    f"set {name}=on"
                )
        if prepare is not None:
            prepare(cursor)
    connection.commit()
