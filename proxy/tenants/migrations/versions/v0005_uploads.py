"""State of uploads that take several requests: parts, small ones held, completions."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def _upload() -> list[sa.Column[object]]:
    return [
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("upload_ref", sa.LargeBinary(16), nullable=False),
    ]


def _message() -> list[sa.Column[object]]:
    return [
        *_upload(),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("tag", sa.String(255), nullable=False),
    ]


def upgrade() -> None:
    op.create_table(
        "upload_part",
        *_message(),
        sa.Column("stored_bytes", sa.BigInteger, nullable=False),
        sa.Column("commitment", sa.LargeBinary(32), nullable=False),
        sa.Column("digests", sa.LargeBinary),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "service", "upload_ref", "number", "tag", name="pk_upload_part"),
    )
    op.create_table(
        "upload_held",
        *_message(),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("sealed_bytes", sa.BigInteger, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "service", "upload_ref", "number", "tag", name="pk_upload_held"),
    )
    op.create_table(
        "upload_completion",
        *_upload(),
        sa.Column("asked", sa.LargeBinary(32), nullable=False),
        sa.Column("request", sa.LargeBinary, nullable=False),
        sa.Column("final_number", sa.BigInteger, nullable=False),
        sa.Column("is_joined", sa.Boolean, nullable=False),
        sa.Column("is_done", sa.Boolean, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "service", "upload_ref", name="pk_upload_completion"),
    )
