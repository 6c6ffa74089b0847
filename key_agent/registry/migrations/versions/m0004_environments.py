"""Several environments: signed rows that all of them have, who has acknowledged what, and patent B's view."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "shared_row",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("id", sa.String(length=127), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("signer", sa.String(length=127), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("kind", "id", name=op.f("pk_shared_row")),
    )
    op.create_index("shared_row_by_epoch", "shared_row", ["epoch"])
    op.create_table(
        "shared_seal",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shared_seal")),
    )
    op.create_table(
        "env_ack",
        sa.Column("party", sa.String(length=127), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("acked_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("until_ms", sa.BigInteger()),
        sa.Column("detail", sa.Text()),
        sa.PrimaryKeyConstraint("party", "kind", name=op.f("pk_env_ack")),
    )
    op.execute(
        """
        CREATE VIEW patent_b_keys AS
        SELECT w.dek_id AS dek_id, w.wrapped AS encrypted_dek,
               CASE d.state WHEN 'active' THEN 'active' WHEN 'compromised' THEN 'disabled'
                            WHEN 'suspended' THEN 'disabled' ELSE 'inactive' END AS status,
               d.owner_environment_id AS environment, w.kek_id AS kek_id, d.updated_at_ms AS "timestamp"
        FROM dek d JOIN dek_wrap w ON w.dek_id = d.id
        """
    )


def downgrade() -> None:
    raise NotImplementedError("the registry does not go back: restore a backup")
