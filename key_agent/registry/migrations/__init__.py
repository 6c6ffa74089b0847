"""The registry's schema, version by version (Alembic).

A version that was released is never edited; `upgrade` runs in one transaction, so a crash leaves the old
schema.
"""

from pathlib import Path

from alembic import command
from sqlalchemy import Connection

from runtime.database import migration_config


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, in the caller's transaction."""
    command.upgrade(migration_config(connection, Path(__file__).parent), "head")
