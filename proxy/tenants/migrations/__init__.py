"""The directory's schema, version by version (Alembic).

A version that was released is never edited; `upgrade` runs in one transaction: a crash leaves the old schema.
"""

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from runtime.database import migration_config

HEAD: Final = "0006"
"""The newest version; a test compares it with the scripts."""
_LOCK: Final = 0x5EA16A7E  # any number that no other application locks in this database


def current(connection: Connection) -> str | None:
    """The version of the schema that is there, None for an empty database."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, in the caller's transaction. Concurrent callers queue."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    if current(connection) == HEAD:
        return
    command.upgrade(configuration(connection), "head")


def configuration(connection: Connection) -> Config:
    return migration_config(connection, Path(__file__).parent)
