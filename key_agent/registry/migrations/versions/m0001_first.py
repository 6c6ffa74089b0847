"""The first schema.

Written out, not derived from tables.py: what was released does not change when the tables do.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "holder",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("instance", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holder")),
    )
    op.create_table(
        "environment",
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("kms_type", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=True),
        sa.Column("state_since_ms", sa.BigInteger(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environment")),
    )
    op.create_table(
        "proxy",
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("ca_pem", sa.Text(), nullable=False),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_proxy")),
    )
    op.create_table(
        "kek",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("environment_id", sa.String(length=63), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("method", sa.String(length=16), nullable=True),
        sa.Column("token_serial", sa.String(length=64), nullable=True),
        sa.Column("canary_ciphertext", sa.LargeBinary(), nullable=True),
        sa.Column("canary_sha256", sa.LargeBinary(), nullable=True),
        sa.Column("made_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("made_sha256", sa.LargeBinary(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=True),
        sa.Column("state_since_ms", sa.BigInteger(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["environment_id"], ["environment.id"], name=op.f("fk_kek_environment_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_kek")),
    )
    op.create_index(
        "one_current_kek",
        "kek",
        ["environment_id"],
        unique=True,
        sqlite_where=sa.text("state NOT IN ('pre-active', 'deactivated', 'retired')"),
        postgresql_where=sa.text("state NOT IN ('pre-active', 'deactivated', 'retired')"),
    )
    op.create_index("one_kek_version", "kek", ["environment_id", "version"], unique=True)
    op.create_index(
        "one_unfinished_kek",
        "kek",
        ["environment_id"],
        unique=True,
        sqlite_where=sa.text("state = 'pre-active'"),
        postgresql_where=sa.text("state = 'pre-active'"),
    )
    op.create_table(
        "tenant",
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("home_environment_id", sa.String(length=63), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["home_environment_id"], ["environment.id"], name=op.f("fk_tenant_home_environment_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenant")),
    )
    op.create_table(
        "network_service",
        sa.Column("id", sa.String(length=127), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_network_service_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_network_service")),
    )
    op.create_table(
        "key_ring",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("purpose", sa.String(length=16), nullable=False),
        sa.Column("network_service_id", sa.String(length=127), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["network_service_id"], ["network_service.id"], name=op.f("fk_key_ring_network_service_id")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_key_ring_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_key_ring")),
    )
    op.create_index("one_ring", "key_ring", ["network_service_id", "purpose"], unique=True)
    op.create_table(
        "push_sequence",
        sa.Column("issuer", sa.String(length=63), nullable=False),
        sa.Column("network_service_id", sa.String(length=127), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["network_service_id"], ["network_service.id"], name=op.f("fk_push_sequence_network_service_id")
        ),
        sa.PrimaryKeyConstraint("issuer", "network_service_id", name=op.f("pk_push_sequence")),
    )
    op.create_table(
        "service_proxy",
        sa.Column("network_service_id", sa.String(length=127), nullable=False),
        sa.Column("proxy_id", sa.String(length=63), nullable=False),
        sa.Column("certificate_pem", sa.Text(), nullable=False),
        sa.Column("withdrawn", sa.Boolean(), nullable=False),
        sa.Column("issued_sequence", sa.BigInteger(), nullable=False),
        sa.Column("issued_until_ms", sa.BigInteger(), nullable=False),
        sa.Column("accepted_sequence", sa.BigInteger(), nullable=False),
        sa.Column("accepted_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("valid_until_ms", sa.BigInteger(), nullable=True),
        sa.Column("withdrawn_sequence", sa.BigInteger(), nullable=False),
        sa.Column("withdrawn_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("error_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["network_service_id"], ["network_service.id"], name=op.f("fk_service_proxy_network_service_id")
        ),
        sa.ForeignKeyConstraint(["proxy_id"], ["proxy.id"], name=op.f("fk_service_proxy_proxy_id")),
        sa.PrimaryKeyConstraint("network_service_id", "proxy_id", name=op.f("pk_service_proxy")),
    )
    op.create_table(
        "dek",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("ring_id", sa.String(length=32), nullable=False),
        sa.Column("owner_environment_id", sa.String(length=63), nullable=False),
        sa.Column("generator_environment_id", sa.String(length=63), nullable=False),
        sa.Column("key_type", sa.String(length=16), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=True),
        sa.Column("state_since_ms", sa.BigInteger(), nullable=False),
        sa.Column("kcv", sa.LargeBinary(), nullable=False),
        sa.Column("predecessor_id", sa.String(length=32), nullable=True),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["generator_environment_id"], ["environment.id"], name=op.f("fk_dek_generator_environment_id")
        ),
        sa.ForeignKeyConstraint(
            ["owner_environment_id"], ["environment.id"], name=op.f("fk_dek_owner_environment_id")
        ),
        sa.ForeignKeyConstraint(["predecessor_id"], ["dek.id"], name=op.f("fk_dek_predecessor_id")),
        sa.ForeignKeyConstraint(["ring_id"], ["key_ring.id"], name=op.f("fk_dek_ring_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_dek_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dek")),
    )
    op.create_index(
        "one_active",
        "dek",
        ["tenant_id", "ring_id", "owner_environment_id"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_index("one_dek_version", "dek", ["ring_id", "version"], unique=True)
    op.create_table(
        "dek_wrap",
        sa.Column("dek_id", sa.String(length=32), nullable=False),
        sa.Column("kek_id", sa.String(length=64), nullable=False),
        sa.Column("format", sa.Integer(), nullable=False),
        sa.Column("route", sa.String(length=16), nullable=False),
        sa.Column("wrap_alg", sa.String(length=16), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("wrapped_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("token_serial", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("made_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("verified_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["dek_id"], ["dek.id"], name=op.f("fk_dek_wrap_dek_id")),
        sa.ForeignKeyConstraint(["kek_id"], ["kek.id"], name=op.f("fk_dek_wrap_kek_id")),
        sa.PrimaryKeyConstraint("dek_id", "kek_id", name=op.f("pk_dek_wrap")),
    )
    op.create_index("dek_wrap_by_kek", "dek_wrap", ["kek_id"], unique=False)


def downgrade() -> None:
    raise NotImplementedError("the registry does not go back: restore a backup")
