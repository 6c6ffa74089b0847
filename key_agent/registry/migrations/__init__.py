"""The registry's schema, version by version (Alembic).

A version that was released is never edited; `upgrade` runs in one transaction, so a crash leaves the old
schema.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, in the caller's transaction."""
    config = Config()
    # ConfigParser would read a % in the path.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
