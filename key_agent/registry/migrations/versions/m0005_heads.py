"""Shared rows are bound to their term's holder: what was signed before that is not carried over."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().execute(sa.text("SELECT count(*) FROM shared_row")).scalar_one():
        raise RuntimeError(
            "this registry has shared rows of an earlier version, whose signatures say too little. Found the "
            "environments anew: a registry from before `env init`, or a backup of its keys, then `env init` "
            "and `env join`"
        )
    op.drop_table("shared_seal")
    op.create_table(
        "shared_seal",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=False),
        sa.Column("head_signature", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shared_seal")),
    )


def downgrade() -> None:
    raise NotImplementedError("the registry does not go back: restore a backup")
