"""Life of keys: rotation in two phases, KEKs that follow each other, key uses, suspension."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_CURRENT = "state NOT IN ('pre-active', 'staged', 'deactivated', 'retired')"
_UNFINISHED = "state IN ('pre-active', 'staged')"
_OPEN = "phase IN ('distributing', 'activated')"


def upgrade() -> None:
    op.add_column("kek", sa.Column("attributes", sa.Text(), nullable=True))
    op.add_column("kek", sa.Column("rotated_to", sa.String(length=64), nullable=True))
    op.drop_index("one_current_kek", "kek")
    op.drop_index("one_unfinished_kek", "kek")
    op.create_index(
        "one_current_kek",
        "kek",
        ["environment_id"],
        unique=True,
        sqlite_where=sa.text(_CURRENT),
        postgresql_where=sa.text(_CURRENT),
    )
    op.create_index(
        "one_unfinished_kek",
        "kek",
        ["environment_id"],
        unique=True,
        sqlite_where=sa.text(_UNFINISHED),
        postgresql_where=sa.text(_UNFINISHED),
    )
    op.add_column("network_service", sa.Column("rotate_after_days", sa.Integer(), nullable=True))
    op.add_column("dek", sa.Column("alg", sa.String(length=16), nullable=True))
    op.add_column("dek", sa.Column("activated_at_ms", sa.BigInteger(), nullable=True))
    op.add_column("dek", sa.Column("suspended_from", sa.String(length=16), nullable=True))
    op.add_column("dek", sa.Column("after_sequence", sa.BigInteger(), server_default="0", nullable=False))
    # Until now a key was active from its making on.
    op.execute("UPDATE dek SET activated_at_ms = created_at_ms")
    op.create_table(
        "key_rotation",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("ring_id", sa.String(length=32), nullable=False),
        sa.Column("new_dek_id", sa.String(length=32), nullable=False),
        sa.Column("old_dek_id", sa.String(length=32), nullable=True),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("cause", sa.String(length=16), nullable=False),
        sa.Column("after_sequence", sa.BigInteger(), nullable=False),
        sa.Column("phase_since_ms", sa.BigInteger(), nullable=False),
        sa.Column("phase_until_ms", sa.BigInteger(), nullable=False),
        sa.Column("late_proxies", sa.Text(), nullable=True),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["ring_id"], ["key_ring.id"], name=op.f("fk_key_rotation_ring_id")),
        sa.ForeignKeyConstraint(["new_dek_id"], ["dek.id"], name=op.f("fk_key_rotation_new_dek_id")),
        sa.ForeignKeyConstraint(["old_dek_id"], ["dek.id"], name=op.f("fk_key_rotation_old_dek_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_key_rotation")),
    )
    op.create_index(
        "one_open_rotation",
        "key_rotation",
        ["ring_id"],
        unique=True,
        sqlite_where=sa.text(_OPEN),
        postgresql_where=sa.text(_OPEN),
    )


def downgrade() -> None:
    raise NotImplementedError("the registry does not go back: restore a backup")
