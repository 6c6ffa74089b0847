"""Users of forward proxies and listeners that tenants share; options of profiles, names in reverse mode."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite cannot drop a unique column, and a table that others refer to cannot be made anew inside a
    # transaction: `forward_listen` stays, empty, and a column that tenants may share takes its place.
    op.add_column("tenant", sa.Column("forward_address", sa.String(64)))
    op.add_column("tenant", sa.Column("access", sa.Text))
    op.execute("UPDATE tenant SET forward_address = forward_listen, forward_listen = NULL")
    op.add_column("network_service", sa.Column("profile_options", sa.Text))
    op.add_column("network_service", sa.Column("reverse_names", sa.Text))
    op.create_table(
        "proxy_user",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("verifier", sa.LargeBinary, nullable=False),
        sa.Column("not_after_ms", sa.BigInteger),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "name", name="pk_proxy_user"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_proxy_user_tenant_id"),
    )
