"""Tenants, network services and the history of their changes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    directory = op.create_table(
        "directory",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_directory"),
        sa.CheckConstraint("id = 1", name="ck_directory_one_row"),
    )
    op.create_table(
        "tenant",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("root_der", sa.LargeBinary, nullable=False),
        sa.Column("forward_listen", sa.String(64)),
        sa.Column("ca_certificate_file", sa.String(255), nullable=False),
        sa.Column("ca_key_file", sa.String(255), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenant"),
        sa.UniqueConstraint("forward_listen", name="uq_tenant_forward_listen"),
    )
    op.create_table(
        "tunnel_host",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("pattern", sa.String(255), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "pattern", name="pk_tunnel_host"),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name="fk_tunnel_host_tenant_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "signer",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("certificate_der", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "fingerprint", name="pk_signer"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_signer_tenant_id", ondelete="CASCADE"),
    )
    op.create_table(
        "network_service",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("upstream_scheme", sa.String(5), nullable=False),
        sa.Column("upstream_host", sa.String(253), nullable=False),
        sa.Column("upstream_port", sa.Integer, nullable=False),
        sa.Column("profile", sa.String(63), nullable=False),
        sa.Column("legacy", sa.String(16), nullable=False),
        sa.Column("reverse_listen", sa.String(64)),
        sa.Column("certificate_der", sa.LargeBinary),
        sa.Column("key_file", sa.String(255), nullable=False),
        sa.Column("pending_key_file", sa.String(255)),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "name", name="pk_network_service"),
        sa.UniqueConstraint(
            "tenant_id", "upstream_host", "upstream_port", name="uq_network_service_upstream"
        ),
        sa.UniqueConstraint("reverse_listen", name="uq_network_service_reverse_listen"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_network_service_tenant_id"),
    )
    op.create_table(
        "history",
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("action", sa.String(63), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("service", sa.String(63)),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("revision", name="pk_history"),
    )
    op.bulk_insert(directory, [{"id": 1, "revision": 0}])
