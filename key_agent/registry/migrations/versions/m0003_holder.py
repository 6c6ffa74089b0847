"""Who works with the registry: found out after a connection was lost (database.py, rule 4)."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "holder",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("instance", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holder")),
    )


def downgrade() -> None:
    raise NotImplementedError("the registry does not go back: restore a backup")
