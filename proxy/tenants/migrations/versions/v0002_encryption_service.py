"""Named keys (network services without an upstream), dialects and credentials of the encryption service."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_OF_AN_UPSTREAM: dict[str, sa.types.TypeEngine[Any]] = {
    "upstream_scheme": sa.String(5),
    "upstream_host": sa.String(253),
    "upstream_port": sa.Integer(),
    "profile": sa.String(63),
    "legacy": sa.String(16),
}


def upgrade() -> None:
    with op.batch_alter_table("network_service") as batch:
        for name, kind in _OF_AN_UPSTREAM.items():
            batch.alter_column(name, existing_type=kind, existing_nullable=False, nullable=True)
    op.create_table(
        "named_key",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("key_use", sa.String(8), nullable=False),
        sa.Column("algorithm", sa.String(16)),
        sa.Column("blocked", sa.Boolean, nullable=False),
        sa.Column("operations", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "name", name="pk_named_key"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "name"],
            ["network_service.tenant_id", "network_service.name"],
            name="fk_named_key_tenant_id",
        ),
    )
    op.create_table(
        "service_dialect",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("dialect", sa.String(16), nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "dialect", name="pk_service_dialect"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_service_dialect_tenant_id"),
    )
    op.create_table(
        "service_credential",
        sa.Column("id", sa.String(30), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("dialect", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("label", sa.String(255), nullable=False),
        sa.Column("keys", sa.Text),
        sa.Column("operations", sa.Text, nullable=False),
        sa.Column("endpoint", sa.String(255)),
        sa.Column("networks", sa.Text, nullable=False),
        sa.Column("not_after_ms", sa.BigInteger),
        sa.Column("verifier", sa.LargeBinary, nullable=False),
        sa.Column("requests_per_s", sa.Float),
        sa.Column("replaces", sa.String(30)),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_service_credential"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_service_credential_tenant_id"),
    )
