"""The directory's tables, as the newest migration leaves them.

1. Nothing here is secret: private keys are files below the state directory, named relative to it.
2. Times are milliseconds since the Unix epoch. Ids are text and immutable.
3. Every change is one transaction that raises `directory.revision` by one and leaves one row of `history`.
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from runtime.database import new_metadata

metadata = new_metadata()

directory = Table(
    "directory",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

tenant = Table(
    "tenant",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("root_der", LargeBinary, nullable=False),
    Column("forward_listen", String(64), unique=True),
    Column("ca_certificate_file", String(255), nullable=False),
    Column("ca_key_file", String(255), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

tunnel_host = Table(
    "tunnel_host",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True),
    Column("pattern", String(255), primary_key=True),
)

signer = Table(
    "signer",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True),
    Column("fingerprint", String(64), primary_key=True),
    Column("certificate_der", LargeBinary, nullable=False),
)

network_service = Table(
    "network_service",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id"), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("upstream_scheme", String(5), nullable=False),
    Column("upstream_host", String(253), nullable=False),
    Column("upstream_port", Integer, nullable=False),
    Column("profile", String(63), nullable=False),
    Column("legacy", String(16), nullable=False),
    Column("reverse_listen", String(64), unique=True),
    Column("certificate_der", LargeBinary),
    # The key of that certificate; while there is none, the key of the first CSR.
    Column("key_file", String(255), nullable=False),
    # The key of a CSR whose certificate has not come yet, during a renewal.
    Column("pending_key_file", String(255)),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    UniqueConstraint("tenant_id", "upstream_host", "upstream_port", name="uq_network_service_upstream"),
)

history = Table(
    "history",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("action", String(63), nullable=False),
    Column("tenant_id", String(63), nullable=False),
    Column("service", String(63)),
    Column("detail", Text, nullable=False),  # JSON object, string values
)
