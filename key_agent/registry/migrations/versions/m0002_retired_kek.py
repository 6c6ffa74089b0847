"""A KEK can be `retired`: such rows stand beside the current one, as the replaced ones do."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_CURRENT = "state NOT IN ('pre-active', 'deactivated', 'retired')"


def upgrade() -> None:
    op.drop_index("one_current_kek", "kek")
    op.create_index(
        "one_current_kek",
        "kek",
        ["environment_id"],
        unique=True,
        sqlite_where=sa.text(_CURRENT),
        postgresql_where=sa.text(_CURRENT),
    )


def downgrade() -> None:
    raise NotImplementedError("the registry does not go back: restore a backup")
