"""Databases: which are accepted, and that a connection which would lose commits is none."""

import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from runtime.database import ask, check_url_settings, chosen_url, make_engine, read_only, transaction
from runtime.settings import SettingsError
from tests.postgres import URL_VARIABLE, running

POSTGRES_URL = os.environ.get(URL_VARIABLE, "")
needs_postgres = pytest.mark.skipif(not POSTGRES_URL, reason=f"{URL_VARIABLE} names no PostgreSQL server")


class BrokenError(Exception):
    """What a caller of this module calls its own."""


def engine_of(url: URL, prepare: Callable[[Any], None] | None = None, busy_timeout_s: float = 10) -> Engine:
    return make_engine(
        url,
        failure=BrokenError,
        busy_timeout_s=busy_timeout_s,
        pool_size=2,
        max_overflow=0,
        application_name="sealgate-test",
        prepare=prepare,
    )


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    return make_url(POSTGRES_URL if request.param == "postgres" else f"sqlite:///{tmp_path / 'x.db'}")


@pytest.fixture
def engine(url: URL) -> Iterator[Engine]:
    opened = engine_of(url)
    with transaction(opened, failure=BrokenError) as connection:
        connection.execute(text("CREATE TABLE probe_of_tests (n INTEGER PRIMARY KEY)"))
    yield opened
    with transaction(opened, failure=BrokenError) as connection:
        connection.execute(text("DROP TABLE probe_of_tests"))
    opened.dispose()


def count(engine: Engine) -> int:
    with transaction(read_only(engine), failure=BrokenError) as connection:
        return int(connection.execute(text("SELECT count(*) FROM probe_of_tests")).scalar_one())


# The settings.


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://h/d", "x.database_url: 'mysql' is not supported"),
        ("postgresql://h/d", "postgresql\\+psycopg"),
        ("sqlite:///relative.db", "absolute"),
        ("sqlite://", "absolute"),
        ("rubbish", "not a database URL"),
        ("postgresql+psycopg://u@h:port/d", "not a database URL"),
        ("postgresql+psycopg://u:hidden-word@h/d", "database_url_file"),
    ],
)
def test_a_url_that_does_not_fit_is_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        check_url_settings("x", url, None)
    assert "hidden-word" not in str(caught.value)


def test_a_password_with_unescaped_marks_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="not a database URL") as caught:
        check_url_settings("x", "postgresql+psycopg://u:pass@h:hidden-word@db/d", None)
    assert "hidden-word" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_at_most_one_place_names_the_database() -> None:
    check_url_settings("x", None, None)
    check_url_settings("x", None, Path("/f"))
    check_url_settings("x", "sqlite:////a", None)
    check_url_settings("x", "postgresql+psycopg://u@h/d", None)
    with pytest.raises(ValueError, match=r"x\.database_url and x\.database_url_file"):
        check_url_settings("x", "sqlite:////a", Path("/f"))


@pytest.mark.parametrize("in_file", [False, True])
def test_a_missing_driver_is_named_with_what_brings_it(
    in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # how Python remembers that there is none
    url, file = "postgresql+psycopg://u@h/d", None
    if in_file:
        file = tmp_path / "url"
        file.touch(mode=0o600)
        file.write_text(url)
    with pytest.raises(SettingsError, match="package psycopg, which cannot be imported") as caught:
        chosen_url(None if in_file else url, file, default=tmp_path / "x.db")
    assert "requirements-agent.lock" in str(caught.value)
    assert str(file) in str(caught.value) or not in_file
    assert chosen_url(None, None, default=tmp_path / "x.db").startswith("sqlite")


def test_where_the_database_is(tmp_path: Path) -> None:
    default = tmp_path / "default.db"
    assert chosen_url("sqlite:////a", None, default=default) == "sqlite:////a"
    assert chosen_url(None, None, default=default) == f"sqlite:///{default}"
    file = tmp_path / "url"
    file.touch(mode=0o600)
    file.write_text("postgresql+psycopg://u:hidden-word@h/d\n")
    assert chosen_url(None, file, default=default) == "postgresql+psycopg://u:hidden-word@h/d"
    for content in (b"mysql://u:hidden-word@h/d", b"\xff\xfe hidden-word"):
        file.write_bytes(content)
        with pytest.raises(SettingsError) as caught:
            chosen_url(None, file, default=default)
        assert str(file) in str(caught.value)
        assert "hidden-word" not in str(caught.value)
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        chosen_url(None, file, default=default)
    with pytest.raises(SettingsError, match="cannot be read"):
        chosen_url(None, tmp_path / "missing", default=default)


# Connections.


def test_every_sqlite_connection_is_durable(tmp_path: Path) -> None:
    engine = engine_of(make_url(f"sqlite:///{tmp_path / 'x.db'}"))
    with engine.connect() as one, engine.connect() as other:
        for connection in (one, other):
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("synchronous", "journal_mode", "foreign_keys", "busy_timeout")
            ]
            assert found == [2, "wal", 1, 10_000]
            connection.rollback()
    engine.dispose()


def test_a_sqlite_that_cannot_keep_a_wal_is_refused(tmp_path: Path) -> None:
    # Without shared memory, as on many network disks.
    engine = engine_of(make_url(f"sqlite:///file:{tmp_path / 'x.db'}?vfs=unix-dotfile&uri=true"))
    with pytest.raises(BrokenError, match="journal_mode=delete"):
        engine.connect()
    engine.dispose()


def test_the_first_connection_waits_for_the_lock(tmp_path: Path) -> None:
    """Setting WAL heeds no busy timeout of SQLite's own."""
    path = tmp_path / "x.db"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("CREATE TABLE t (n)")
    holder.execute("BEGIN EXCLUSIVE")
    impatient = engine_of(make_url(f"sqlite:///{path}"), busy_timeout_s=0)
    with (
        pytest.raises(BrokenError, match="locked"),
        transaction(impatient, failure=BrokenError),
    ):
        pass
    threading.Timer(0.1, lambda: holder.execute("COMMIT")).start()
    patient = engine_of(make_url(f"sqlite:///{path}"))
    with transaction(patient, failure=BrokenError) as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    for engine in (impatient, patient):
        engine.dispose()
    holder.close()


@needs_postgres
@pytest.mark.parametrize("value", ["off", "local"])
def test_a_postgres_that_would_lose_commits_is_refused(value: str) -> None:
    engine = engine_of(
        make_url(POSTGRES_URL).update_query_dict({"options": f"-csynchronous_commit={value}"}, append=True)
    )
    with pytest.raises(BrokenError, match=f"synchronous_commit={value}"):
        engine.connect()
    engine.dispose()


@needs_postgres
def test_a_postgres_that_loses_what_it_synced_is_refused_until_it_is_set_right() -> None:
    """A server of its own: these settings are the whole server's."""
    with running() as cluster:
        url = make_url(cluster.url)
        engine = engine_of(url)
        for name in ("fsync", "full_page_writes"):
            for value in ("off", "on"):
                _set_at_server(url, name, value)
                if value == "off":
                    with pytest.raises(BrokenError, match=f"PostgreSQL has {name}=off.* set {name}=on"):
                        engine.connect()
                else:
                    engine.connect().close()
                    engine.dispose()


def _set_at_server(url: URL, name: str, value: str) -> None:
    """Return when new connections see it."""
    administrator = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with administrator.connect() as connection:
        connection.execute(text(f"ALTER SYSTEM SET {name} = {value}"))
        connection.execute(text("SELECT pg_reload_conf()"))
    deadline_s = time.monotonic() + 60
    while True:
        with administrator.connect() as connection:
            if connection.execute(text(f"SHOW {name}")).scalar() == value:
                return
        assert time.monotonic() < deadline_s


@needs_postgres
def test_a_server_that_vanished_is_noticed_and_the_url_has_the_last_word() -> None:
    for given, expected in (({}, "20000"), ({"tcp_user_timeout": "7000"}, "7000")):
        engine = engine_of(make_url(POSTGRES_URL).update_query_dict(given))
        with engine.connect() as connection:
            dbapi: Any = connection.connection.dbapi_connection
            found = {option.keyword.decode(): option.val for option in dbapi.pgconn.info}
            assert found["tcp_user_timeout"] == expected.encode()
            assert (found["keepalives_idle"], found["keepalives_interval"]) == (b"5", b"5")
        engine.dispose()


@needs_postgres
def test_what_prepares_a_connection_is_kept_and_can_refuse_it() -> None:
    def prepare(cursor: Any) -> None:
        cursor.execute("SELECT set_config('search_path', 'pg_catalog', false)")
        assert ask(cursor, "SELECT %s || 'b'", "a") == "ab"
        assert ask(cursor, "SELECT 1 WHERE false") is None

    def refuse(_cursor: Any) -> None:
        raise LookupError("not this one")

    engine = engine_of(make_url(POSTGRES_URL), prepare)
    with transaction(engine, failure=BrokenError) as connection:
        assert connection.execute(text("SHOW search_path")).scalar() == "pg_catalog"
        assert connection.execute(text("SHOW application_name")).scalar() == "sealgate-test"
    engine.dispose()
    engine = engine_of(make_url(POSTGRES_URL), refuse)
    with pytest.raises(LookupError):
        engine.connect()
    engine.dispose()


# Transactions.


def test_a_transaction_is_whole_or_nothing(engine: Engine) -> None:
    with transaction(engine, failure=BrokenError) as connection:
        connection.execute(text("INSERT INTO probe_of_tests VALUES (1)"))

    def fail() -> None:
        with transaction(engine, failure=BrokenError) as connection:
            connection.execute(text("INSERT INTO probe_of_tests VALUES (2)"))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert count(engine) == 1


def test_the_callers_error_holds_no_parameters(engine: Engine) -> None:
    with pytest.raises(BrokenError) as caught, transaction(engine, failure=BrokenError) as connection:
        connection.execute(text("SELECT :hidden FROM no_such_table"), {"hidden": "hidden-word"})
    assert "no_such_table" in str(caught.value)
    assert "hidden-word" not in str(caught.value)


def test_reading_waits_for_no_change_and_sees_one_state(engine: Engine) -> None:
    with transaction(engine, failure=BrokenError) as change:
        change.execute(text("INSERT INTO probe_of_tests VALUES (1)"))
        assert count(engine) == 0
    with transaction(read_only(engine), failure=BrokenError) as reader:
        query = text("SELECT count(*) FROM probe_of_tests")
        assert reader.execute(query).scalar() == 1
        with transaction(engine, failure=BrokenError) as change:
            change.execute(text("INSERT INTO probe_of_tests VALUES (2)"))
        assert reader.execute(query).scalar() == 1
    assert count(engine) == 2


def test_a_change_in_sqlite_has_the_lock_from_its_beginning(tmp_path: Path) -> None:
    url = make_url(f"sqlite:///{tmp_path / 'x.db'}")
    engine, other = engine_of(url), engine_of(url, busy_timeout_s=0)
    with (
        transaction(engine, failure=BrokenError),
        pytest.raises(BrokenError, match="locked"),
        transaction(other, failure=BrokenError),
    ):
        pass
    for opened in (engine, other):
        opened.dispose()
