"""A checksum over what the proof about a KEK rests on: a damaged row is no revocation."""

import json
from hashlib import sha256

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_KEK = sa.table(
    "kek",
    sa.column("id", sa.String),
    sa.column("environment_id", sa.String),
    sa.column("label", sa.String),
    sa.column("object_id", sa.LargeBinary),
    sa.column("method", sa.String),
    sa.column("token_serial", sa.String),
    sa.column("canary_ciphertext", sa.LargeBinary),
    sa.column("canary_sha256", sa.LargeBinary),
    sa.column("made_at_ms", sa.BigInteger),
    sa.column("made_sha256", sa.LargeBinary),
)


def upgrade() -> None:
    op.add_column("kek", sa.Column("made_sha256", sa.LargeBinary(), nullable=True))
    connection = op.get_bind()
    for row in connection.execute(sa.select(_KEK).where(_KEK.c.canary_ciphertext.is_not(None))).all():
        parts = [
            row.id,
            row.environment_id,
            row.label,
            bytes(row.object_id).hex(),
            row.method,
            row.token_serial,
            bytes(row.canary_ciphertext).hex(),
            bytes(row.canary_sha256).hex(),
            row.made_at_ms,
        ]
        digest = sha256(json.dumps(parts).encode()).digest()
        connection.execute(sa.update(_KEK).where(_KEK.c.id == row.id).values(made_sha256=digest))


def downgrade() -> None:
    raise NotImplementedError("the registry does not go back: restore a backup")
