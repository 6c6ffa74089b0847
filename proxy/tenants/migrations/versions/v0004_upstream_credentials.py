"""Upstream credentials of network services, sealed by a file key."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "upstream_credential",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("access_key", sa.String(128), nullable=False),
        sa.Column("upstream_access_key", sa.String(128), nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("not_after_ms", sa.BigInteger),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "service", "access_key", name="pk_upstream_credential"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "service"],
            ["network_service.tenant_id", "network_service.name"],
            name="fk_upstream_credential_tenant_id",
            ondelete="CASCADE",
        ),
    )
